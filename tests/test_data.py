"""What a worker ships of a patch, and what that costs; the case files that it comes from."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
from scipy import ndimage

import data
from patches import augment
from patches.cache import VolumeCache
from runtime import config
from settings import Augment
from volumes import casefile

SHAPES = [(10, 24, 24), (14, 20, 30), (6, 24, 24)]
HUGE = 2**40


def write(folder, number, shape, label=None, spacing=(2.0, 1.0, 1.0), image=None, **changes):
    rng = np.random.default_rng(number)
    if image is None:
        image = rng.integers(1, 255, (1, *shape)).astype(np.uint8)
    if label is None:
        label = np.zeros(shape, np.uint8)
        label[2:4, 3:9, 3:9] = 1
        label[:, :, -4:] = 2
    settings = {"unit": "micron", "affine": None, "group": f"g{number}", "ignore_label": 2}
    casefile.write_case(
        folder / f"case{number}.h5", image, label, spacing=spacing, **{**settings, **changes}
    )
    return casefile.read_case(folder / f"case{number}.h5")


@pytest.fixture
def stored(tmp_path):
    return [write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)]


TURNED = Augment(rotation=1.0, scaling=1.0, elastic=0.5).model_dump()


def patches(stored, *, budget=HUGE, augmentation=TURNED, **changes):
    settings = {
        "cache": VolumeCache(stored, budget),
        "patch": (4, 12, 12),
        "spacing": (0, 0, 0),
        "foreground": {1: 1.0},
        "foreground_share": 0.5,
        "jitter": 0.5,
        "clip": (0.5, 99.5),
        "seed": 0,
        "augment": augmentation,
    }
    return data.PatchDataset(stored, **{**settings, **changes})


def still(stored, **changes):
    """Patches without augmentation: boxes of the volume."""
    return patches(stored, augmentation=None, **changes)


def augment_batch(samples, patch=(4, 12, 12), regions=((1,),)):
    return augment.augment_batch(
        samples, patch, regions=regions, ignore_label=2, device=torch.device("cpu")
    )


def same(a, b):
    if torch.is_tensor(a) or isinstance(a, np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    return a == b


def same_sample(a, b):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------- a draw


def test_a_draw_depends_on_seed_epoch_and_index_only(stored):
    first = patches(stored)[1, 5]
    other = patches(stored)
    other[0, 0], other[1, 4]  # what was drawn before does not matter
    assert same_sample(first, other[1, 5])
    for place, seed in (((2, 5), 0), ((1, 6), 0), ((1, 5), 1)):
        changed = patches(stored, seed=seed)[place]
        assert not same(first["origin"], changed["origin"])
        assert first["intensity"] != changed["intensity"]


def test_a_sample_ships_only_the_box_in_the_source_dtype(stored):
    sample = still(stored)[0, 0]
    assert sample["image"].dtype == torch.uint8 and sample["label"].dtype == torch.uint8
    assert sample["image"].shape[1:] == sample["label"].shape == (4, 12, 12)
    with h5py.File(next(c.path for c in stored if c.id == sample["case"])) as file:
        z, y, x = sample["start"]
        box = (slice(z, z + 4), slice(y, y + 12), slice(x, x + 12))
        assert np.array_equal(sample["image"].numpy(), file["image"][(slice(None), *box)])
        assert np.array_equal(sample["label"].numpy(), file["label"][box])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_every_source_dtype_is_drawn_as_what_was_stored(tmp_path, dtype):
    image = np.random.default_rng(0).integers(0, 60_000, (1, 6, 14, 14)).astype(dtype)
    case = write(tmp_path, 0, (6, 14, 14), image=image)
    sample = still([case], patch=(6, 14, 14))[0, 0]
    assert torch.equal(sample["image"].double(), torch.from_numpy(image.astype(np.float64)))
    assert sample["image"].numpy().dtype == dtype  # as narrow as it was stored
    (drawn, *_) = augment_batch([sample])
    clipped = image[:, :4, :12, :12].astype(np.float32).clip(sample["low"][0], sample["high"][0])
    np.testing.assert_allclose(drawn[0], (clipped - sample["mean"]) / sample["std"], atol=1e-5)


def test_image_and_label_of_uint16_are_widened_before_anything_is_computed(tmp_path, monkeypatch):
    image = np.full((1, 6, 14, 14), 65535, np.uint16)
    sample = still([write(tmp_path, 0, (6, 14, 14), image=image)], patch=(6, 14, 14))[0, 0]
    sample["label"] = sample["label"].to(torch.uint16)
    resample_patch, seen = augment.resample.resample_patch, []

    def seeing(**boxes):
        seen.extend((boxes["image"], boxes["label"]))
        return resample_patch(**boxes)

    monkeypatch.setattr(augment.resample, "resample_patch", seeing)
    augment_batch([sample])
    assert [box.dtype for box in seen] == [torch.int32] * 2 and (seen[0] == 65535).all()


def test_drawn_batches_have_the_patch_shape_and_hold_the_foreground(stored):
    drawn = patches(stored, foreground_share=1.0)
    image, target, valid, _ = augment_batch([drawn[0, i] for i in range(4)])
    assert image.shape == target.shape == valid.shape == (4, 1, 4, 12, 12)
    assert torch.isfinite(image).all() and target.sum() > 0
    assert not (target.bool() & ~valid).any()


def test_unsigned_and_big_endian_integers_become_what_torch_has():
    for dtype in ("<u2", ">u2", ">i2", "<f4", ">f4", "u1"):
        array = np.array([0, 1, 200], dtype=dtype)
        assert torch.from_numpy(data.native(array)).tolist() == [0, 1, 200]


# ---------------------------------------------------------------------------- spacing


def test_target_spacing_reads_a_box_of_the_right_extent(stored):
    sample = still(stored, spacing=(0, 1.5, None))[0, 0]
    assert sample["spacing"] == (2.0, 1.5, 1.0)
    assert np.allclose(np.diag(sample["matrix"]), (1, 1.5, 1))
    assert sample["image"].shape[2] in (17, 18) and sample["image"].shape[3] in (12, 13)


@pytest.fixture(scope="module")
def outlier(tmp_path_factory):
    """512 x 512 x 61 voxels of 4.97 um: drawn whole at 1 um they would be 2 billion."""
    image, label = np.zeros((1, 61, 512, 512), np.uint8), np.zeros((61, 512, 512), np.uint8)
    block = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(30, 80, 80)), 2)
    image[0, 15:45, 200:280, 200:280] = 120 + 100 * block / np.abs(block).max()
    label[28:32, 238:242, 238:242] = 1
    folder = tmp_path_factory.mktemp("outlier")
    return image[0], write(
        folder, 0, label.shape, label, (4.97,) * 3, image, ignore_label=None, skeleton=False
    )


def test_an_outlier_of_large_voxels_costs_what_its_patch_needs(outlier):
    image, case = outlier
    drawn = still(
        [case], budget=0, patch=(24, 96, 96), spacing=(1, 1, 1), foreground_share=1.0, clip=None
    )
    for i in range(5):
        sample = drawn[0, i]
        assert (np.array(sample["image"].shape[1:]) <= (8, 25, 25)).all()
        patch, target, valid, _ = augment_batch([sample], (24, 96, 96))
        assert patch.shape == (1, 1, 24, 96, 96) and valid.all() and target.any()
        places = sample["origin"][:, None] + np.array([[0, 5, 23], [0, 50, 95], [0, 7, 95]]) / 4.97
        expected = ndimage.map_coordinates(image.astype(float), places, order=1)
        expected = (expected - sample["mean"][0]) / sample["std"][0]
        seen = patch[0, 0, [0, 5, 23], [0, 50, 95], [0, 7, 95]]
        assert np.allclose(seen.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("budget", [0, HUGE])
def test_drawing_an_outlier_takes_less_than_50_mb(outlier, budget):
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip(f"the peak of memory is read by way of {peak}, which is not here")
    turned = Augment(rotation=1.0, elastic=1.0, scaling=1.0).model_dump()
    about = {"patch": (24, 96, 96), "spacing": (1, 1, 1), "augmentation": turned}
    drawn = patches([outlier[1]], budget=budget, **about)
    augment_batch([drawn[0, 0]], (24, 96, 96))  # what torch loads once
    before = psutil.Process().memory_info().rss
    peak.write_text("5")  # forget the highest resident size so far
    for i in range(10):
        augment_batch([drawn[0, i]], (24, 96, 96))
    status = dict(s.split(":") for s in Path("/proc/self/status").read_text().splitlines())
    assert int(status["VmHWM"].split()[0]) * 1024 - before < 50e6


# ---------------------------------------------------------------------------- classes


@pytest.mark.parametrize("ratio", [{}, {"artery": 0.0}, {"artery": 0.0, "vein": 0.0}])
def test_a_ratio_that_weighs_no_class_is_refused(ratio):
    classes = {"background": 0, "vein": 1, "artery": 4, "nerve": 5}
    with pytest.raises(ValueError, match="a weight above 0 for one of vein, artery"):
        data.class_weights(classes, [1, 4], ratio)


@pytest.mark.parametrize("name", ["background", "nerve", "arteri"])
def test_a_ratio_for_what_is_no_foreground_class_is_refused(name):
    classes = {"background": 0, "vein": 1, "artery": 4, "nerve": 5}
    with pytest.raises(ValueError, match=f"among vein, artery, got {name}"):
        data.class_weights(classes, [1, 4], {"artery": 1.0, name: 1.0})


# ---------------------------------------------------------------------------- case files


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
    found = casefile.sample_coordinates(label, 1, np.random.default_rng(0), most=500)
    assert len({tuple(c) for c in found}) == 500 and found[:, 0].min() >= 5
    assert abs(found[:, 0].mean() - 22) < 2


def test_a_file_that_is_no_case_is_named(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"x\.h5: expected a case file written by prepare.py"):
        casefile.read_case(path)


def test_writing_a_case_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        casefile.write_case(
            tmp_path / "a.h5",
            np.zeros((1, 2, 2, 2), np.uint8),
            spacing=("x", 1, 1),
            unit="",
            affine=None,
            group="a",
        )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- numbers and units


def test_fill_values_are_clipped_unless_the_run_began_before_they_were_known():
    image = np.arange(1, 1001, dtype=np.float32).reshape(1, 10, 10, 10)
    image[0, :3] = -1e4
    about, rest = casefile.intensity_statistics(image), image[0, 3:]
    now, unclipped = data.normalisation(about, (0.5, 99.5)), data.normalisation(about, None)
    assert now["mean"] == unclipped["mean"] == [rest.mean(dtype=np.float64)]
    assert now["low"] == [pytest.approx(np.percentile(rest, 0.5))]
    assert (unclipped["low"], unclipped["high"]) == ((301.0,), (1000.0,))
    before = data.normalisation(about, (0.5, 99.5), typical=False)
    assert before["mean"] == [image.mean(dtype=np.float64)] and before["low"] == [-1e4]
    assert data.normalisation(about, None, typical=False)["low"] is None


def test_the_largest_unsigned_integers_do_not_become_negative():
    assert data.native(np.array([2**64 - 1], np.uint64)).tolist() == [2.0**64]


SPACINGS = [
    ((12, 20, 24), (8, 16, 16), (2, 1, 1), (50, 50, 50), "padding"),
    ((512, 512, 512), (128, 128, 128), (1, 1, 1), (1000, 1000, 1000), "padding"),
    ((40, 512, 512), (32, 128, 128), (5, 1, 1), (5000, 0, 0), "padding"),
    ((12, 20, 24), (8, 16, 16), (2, 1, 1), (1e-3, 1e-3, 1e-3), "less than one voxel"),
    ((40, 512, 512), (32, 128, 128), (5, 1, 1), (0, 1e-6, 1e-6), "less than one voxel"),
]


@pytest.mark.parametrize("shape, patch, stored, wanted, what", SPACINGS)
def test_a_spacing_in_another_unit_is_named_with_both_sizes(shape, patch, stored, wanted, what):
    (fault,) = data.spacing_faults("case a", shape, patch, stored, wanted, "mm")
    spacing = data.network_spacing(stored, wanted)
    assert fault.startswith("data.spacing: expected") and what in fault and "case a" in fault
    assert f"{shape[0] * stored[0]:.4g} x " in fault and f"{patch[0] * spacing[0]:.4g} x " in fault


def test_a_size_with_a_plus_leaves_coarser_voxels_as_they_are():
    wanted = (0.0, "1.6+", "1.6+")
    assert data.network_spacing((5.0, 0.6, 0.6), wanted) == (5.0, 1.6, 1.6)
    assert data.network_spacing((5.0, 2.485, 1.6), wanted) == (5.0, 2.485, 1.6)
    given = config.build(config.apply_overrides({}, ["data.spacing=[0,1.6+,1.6+]"]))
    assert given.data.spacing == wanted
    for size in ("-1+", "+", "1.6 +", "fine+", "1.6", -1, True, float("nan")):
        with pytest.raises(config.ConfigError, match=r"^data\.spacing"):
            config.build({"data": {"spacing": [0, size, 1]}})


FINE = [
    ((12, 20, 24), (8, 16, 16), (2, 1, 1), (0, 0, 0)),
    ((8, 8, 8), (128, 128, 128), (1, 1, 1), (0, 0, 0)),  # a small volume
    ((1, 512, 512), (1, 64, 64), (5, 1, 1), (2, 1, 1)),  # one slice
    ((512, 512, 512), (128, 128, 128), (1, 1, 1), (4, 4, 4)),
    ((3, 512, 512), (32, 128, 128), (1, 1, 1), (5, 1, 1)),
]


@pytest.mark.parametrize("shape, patch, stored, wanted", FINE)
def test_a_patch_may_be_larger_than_a_volume_and_coarser(shape, patch, stored, wanted):
    assert not list(data.spacing_faults("case a", shape, patch, stored, wanted, "mm"))


def test_spacings_that_differ_are_said_of_axes_that_are_used_as_stored(tmp_path):
    sizes = [(5.0, 0.994, 0.994), (5.0, 1.59, 0.995), (5.0, 1.0, 0.994)]
    cases = [write(tmp_path, i, SHAPES[i], spacing=size) for i, size in enumerate(sizes)]
    (note,) = data.mixed_spacings(cases, (None, 0.0, 0.0))
    assert "cases have voxels of 0.994 to 1.59 in y, and each is used as stored" in note
    assert note.endswith("data.spacing=[null,1.0,null] samples all alike")
    assert not [*data.mixed_spacings(cases, (0.0, 1.0, 0.0))]
