import functools
import json

import h5py
import numpy as np
import pytest
import torch

import augment
import cases
import data
from settings import Augment

SHAPES = [(10, 24, 24), (14, 20, 30), (6, 24, 24)]


def write(folder, number, shape, label=None, spacing=(2.0, 1.0, 1.0), **changes):
    rng = np.random.default_rng(number)
    image = rng.integers(1, 255, (1, *shape)).astype(np.uint8)
    if label is None:
        label = np.zeros(shape, np.uint8)
        label[2:4, 3:9, 3:9] = 1
        label[:, :, -4:] = 2
    settings = {"unit": "micron", "affine": None, "group": f"g{number}", "ignore_label": 2}
    cases.write_case(
        folder / f"case{number}.h5", image, label, spacing=spacing, **{**settings, **changes}
    )
    return cases.read_case(folder / f"case{number}.h5")


@pytest.fixture
def stored(tmp_path):
    return [write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)]


def patches(stored, **changes):
    augmentation = Augment(rotation=1.0, scaling=1.0).model_dump()
    settings = {
        "patch": (4, 12, 12),
        "spacing": (0, 0, 0),
        "foreground": [1],
        "foreground_share": 0.5,
        "jitter": 0.5,
        "clip": (0.5, 99.5),
        "seed": 0,
        "draw_spatial": functools.partial(augment.draw_spatial, settings=augmentation),
        "draw_intensity": functools.partial(augment.draw_intensity, settings=augmentation),
        "place_patch": augment.place_patch,
    }
    return data.PatchDataset(stored, **{**settings, **changes})


def same(a, b):
    if torch.is_tensor(a) or isinstance(a, np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    return a == b


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_with_any_number_of_workers(stored, workers):
    def batches(count):
        plan = {"batches_per_epoch": 2, "batch_size": 2, "prefetch": 2, "pin": False}
        stream = data.patch_batches(patches(stored), 1, 5, **plan, workers=count, persistent=True)
        return list(stream)

    alone, many = batches(0), batches(workers)
    assert len(alone) == len(many) == 4
    for a, b in zip(alone, many, strict=True):
        for x, y in zip(a, b, strict=True):
            assert all(same(x[key], y[key]) for key in x)


def test_a_draw_depends_on_seed_epoch_and_index_only(stored):
    first = patches(stored)[1, 5]
    other = patches(stored)
    other[0, 0], other[1, 4]  # what was drawn before does not matter
    assert all(same(first[key], other[1, 5][key]) for key in first)
    for place, seed in (((2, 5), 0), ((1, 6), 0), ((1, 5), 1)):
        changed = patches(stored, seed=seed)[place]
        assert not all(same(first[key], changed[key]) for key in first)


def test_a_stream_that_starts_later_gives_what_the_whole_one_gives_there(stored):
    plan = {"batches_per_epoch": 3, "batch_size": 1, "prefetch": 2, "pin": False, "workers": 0}
    for persistent in (True, False):
        whole = list(data.patch_batches(patches(stored), 0, 7, **plan, persistent=persistent))
        tail = list(data.patch_batches(patches(stored), 4, 7, **plan, persistent=persistent))
        assert len(whole) == 7
        assert all(
            same(a[0]["origin"], b[0]["origin"]) for a, b in zip(whole[4:], tail, strict=True)
        )


def test_cases_take_turns(stored):
    seen = [patches(stored)[0, i]["case"] for i in range(6)]
    assert set(seen[:3]) == set(seen[3:]) == {"case0", "case1", "case2"}


def test_a_sample_ships_only_the_box_in_the_source_dtype(stored):
    sample = patches(stored, draw_spatial=functools.partial(augment.draw_spatial, settings=None))[
        0, 0
    ]
    assert sample["image"].dtype == torch.uint8 and sample["label"].dtype == torch.uint8
    assert sample["image"].shape[1:] == sample["label"].shape == (4, 12, 12)
    with h5py.File(next(c.path for c in stored if c.id == sample["case"])) as file:
        z, y, x = sample["start"]
        box = file["image"][:, z : z + 4, y : y + 12, x : x + 12]
    assert np.array_equal(sample["image"].numpy(), box)


def test_foreground_share_is_kept(stored):
    still = functools.partial(augment.draw_spatial, settings=None)
    for share in (0.0, 1.0):
        drawn = patches(stored, foreground_share=share, jitter=0.0, draw_spatial=still)
        hits = []
        for i in range(60):
            sample = drawn[0, i]
            centre = np.array(sample["origin"]) + (np.array([4, 12, 12]) - 1) / 2 - sample["start"]
            near = sample["label"].numpy()[tuple(np.clip(centre, 0, None).round().astype(int))]
            hits.append(near == 1)
        assert (np.mean(hits) > 0.5) == (share == 1.0)


def test_patches_reach_the_corners_of_the_volume(tmp_path):
    corner = np.zeros((12, 24, 24), np.uint8)
    corner[0, 0, 0] = corner[-1, -1, -1] = 1
    stored = [write(tmp_path, 0, corner.shape, corner)]
    still = functools.partial(augment.draw_spatial, settings=None)
    drawn = patches(stored, foreground_share=1.0, draw_spatial=still)
    starts = {tuple(drawn[0, i]["start"]) for i in range(20)}
    assert (0, 0, 0) in starts and (8, 12, 12) in starts


def test_unlabeled_voxels_are_never_the_centre(tmp_path):
    label = np.full((8, 16, 32), 2, np.uint8)
    label[:, :, :4] = 0
    stored = [write(tmp_path, 0, label.shape, label)]
    with h5py.File(stored[0].path) as file:
        assert file["background"][:, 2].max() < 4
        assert "foreground" not in file


def test_target_spacing_reads_a_box_of_the_right_extent(stored):
    still = functools.partial(augment.draw_spatial, settings=None)
    sample = patches(stored, spacing=(0, 1.5, None), draw_spatial=still)[0, 0]
    assert sample["spacing"] == (2.0, 1.5, 1.0)
    assert np.allclose(np.diag(sample["matrix"]), (1, 1.5, 1))
    assert sample["image"].shape[2] in (17, 18) and sample["image"].shape[3] == 12


def test_drawn_batches_have_the_patch_shape_and_hold_the_foreground(stored):
    drawn = patches(stored, foreground_share=1.0)
    image, target, valid, _ = augment.draw_batch(
        [drawn[0, i] for i in range(4)],
        (4, 12, 12),
        foreground=[1],
        ignore_label=2,
        device=torch.device("cpu"),
    )
    assert image.shape == target.shape == valid.shape == (4, 1, 4, 12, 12)
    assert torch.isfinite(image).all() and target.sum() > 0
    assert not (target.bool() & ~valid).any()


def test_unsigned_and_big_endian_integers_become_what_torch_has():
    for dtype in ("<u2", ">u2", ">i2", "<f4", ">f4", "u1"):
        array = np.array([0, 1, 200], dtype=dtype)
        assert torch.from_numpy(data.native(array)).tolist() == [0, 1, 200]


def test_case_file_holds_coordinates_statistics_and_attributes(tmp_path):
    case = write(tmp_path, 0, (10, 24, 24))
    assert (case.spacing, case.unit, case.group) == ((2.0, 1.0, 1.0), "micron", "g0")
    with h5py.File(case.path) as file:
        assert file["image"].dtype == np.uint8 and file["label"].dtype == np.uint8
        found = {tuple(c) for c in file["foreground/1"][:]}
        assert found == {tuple(c) for c in np.argwhere(file["label"][:] == 1)}
        values = file["image"][0].astype(float)
        statistics = json.loads(file.attrs["intensity"])
    nonzero = values[values != 0]
    assert np.isclose(statistics["mean"][0], nonzero.mean())
    assert np.isclose(statistics["percentiles"]["99.5"][0], np.percentile(nonzero, 99.5))


def test_coordinates_of_a_dense_class_are_a_sample_without_repeats():
    label = np.zeros((40, 60, 60), np.uint8)
    label[5:] = 1
    found = cases.sample_coordinates(label, 1, np.random.default_rng(0), most=500)
    assert len({tuple(c) for c in found}) == 500 and found[:, 0].min() >= 5
    assert abs(found[:, 0].mean() - 22) < 2


def test_a_file_that_is_no_case_is_named(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"x\.h5: expected a case file written by prepare.py"):
        cases.read_case(path)


def test_writing_a_case_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        cases.write_case(
            tmp_path / "a.h5",
            np.zeros((1, 2, 2, 2), np.uint8),
            spacing=("x", 1, 1),
            unit="",
            affine=None,
            group="a",
        )
    assert list(tmp_path.iterdir()) == []
