"""Which patches are drawn: around what, from which case, and how often each voxel is covered."""

import functools
import os
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
from patches import resample
from settings import Augment
from tests.test_data import SHAPES, augment_batch, patches, still, write
from volumes import files

SHARED = Path(os.environ.get("LAMINA_SHARED", Path(__file__).parents[2] / "shared")) / "data"


@pytest.fixture
def stored(tmp_path):
    return [write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)]


# ---------------------------------------------------------------------------- foreground


def around(dataset, count, epoch=0, first=0):
    return [dataset._center(epoch, i) for i in range(first, first + count)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 0.9, 1.0])
def test_foreground_share_is_exact_in_every_stretch(stored, share):
    dataset = patches(stored, foreground_share=share)
    for epoch in range(3):
        hits = np.cumsum([0] + [c != 0 for c, _ in around(dataset, 200, epoch)])
        for length in (1, 7, 50, 200):
            found = hits[length:] - hits[:-length]
            assert np.abs(found - share * length).max() < 1  # the share, within 1 / length


def test_the_voxel_drawn_around_is_of_its_class_and_valid_in_the_patch(stored):
    for jitter in (0.0, 0.5, 1.0):
        dataset = still(stored, jitter=jitter)
        for i in range(60):
            sample = dataset[0, i]
            place = sample["voxel"] - sample["origin"].astype(int)
            assert (place >= 0).all() and (place < (4, 12, 12)).all()
            assert (
                sample["label"][tuple(sample["voxel"] - sample["start"])] == sample["center_class"]
            )
            _, target, valid, _ = augment_batch([sample])
            assert valid[0, 0][tuple(place)]
            assert target[0, 0][tuple(place)] == (sample["center_class"] == 1)


def test_the_voxel_drawn_around_stays_in_a_turned_patch(tmp_path):
    stored = [write(tmp_path, 0, (24, 40, 40), spacing=(1, 1, 1))]
    turned = Augment(rotation=1.0, scaling=1.0, flip=0.5, turn90=0.5, elastic=1.0).model_dump()
    dataset, within = patches(stored, augmentation=turned, patch=(12, 16, 16)), []
    for i in range(300):
        sample = dataset[0, i]
        target = augment_batch([sample], patch=(12, 16, 16))[1]
        within.append(bool(target.any()) or sample["center_class"] == 0)
        reached = resample._place_in_patch(
            resample.Map(sample["matrix"], None, sample["control"].numpy(), sample["step"]),
            sample["origin"],
            np.array((12, 16, 16)),
            sample["voxel"],
        )
        assert (reached > -0.01).all() and (reached < np.array((12, 16, 16)) - 0.99).all()
    assert np.mean(within) > 0.98  # the nearest voxel of a thin bar may be its neighbour


def test_classes_come_by_their_weights(tmp_path):
    label = np.zeros((8, 24, 24), np.uint8)
    label[2, 2:12] = 1
    label[5, 3, 3:5] = 3  # rare: a list of 2 voxels against one of 240
    label[6, 20] = 4
    stored = [write(tmp_path, 0, label.shape, label)]
    for weights in ({1: 3.0, 3: 1.0}, {1: 0.2, 3: 0.5, 4: 0.3}, {1: 1.0, 3: 1.0, 4: 0.0}):
        dataset = patches(stored, foreground=weights, foreground_share=0.5)
        drawn = [dataset[0, i] for i in range(300)]
        counts = Counter(s["center_class"] for s in drawn)
        for class_id, weight in weights.items():
            share = weight / sum(weights.values())
            assert abs(counts[class_id] / 150 - share) < 0.03
        assert all(label[tuple(s["voxel"])] == s["center_class"] for s in drawn)


def test_a_class_that_no_case_has_leaves_its_share_to_the_others(stored):
    dataset = patches(stored, foreground={1: 1.0, 7: 5.0}, foreground_share=0.5)
    assert Counter(c for c, _ in around(dataset, 100)) == {0: 50, 1: 50}


def test_cases_take_turns(stored):
    seen = [c.id for _, c in around(patches(stored, foreground_share=1.0), 6)]
    assert set(seen[:3]) == set(seen[3:]) == {"case0", "case1", "case2"}


def test_cases_take_turns_within_foreground_and_within_background(stored):
    drawn = around(patches(stored, foreground_share=0.33), 300)
    for class_id in (0, 1):
        turns = [case.id for c, case in drawn if c == class_id]
        assert len(turns) >= 99
        for start in range(0, len(turns) - 2, 3):
            assert set(turns[start : start + 3]) == {"case0", "case1", "case2"}


def test_cases_of_a_class_among_several_come_equally_often(tmp_path):
    label = np.zeros((6, 20, 20), np.uint8)
    label[2, 3:9] = 1
    label[4, 3:9] = 3
    stored = [write(tmp_path, i, label.shape, label) for i in range(3)]
    drawn = around(patches(stored, foreground={1: 1.0, 3: 1.0}, foreground_share=1.0), 600)
    counts = Counter((c, case.id) for c, case in drawn)
    assert len(counts) == 6 and max(counts.values()) - min(counts.values()) < 0.3 * 100


def test_a_case_is_never_asked_for_what_it_does_not_have(tmp_path):
    bare, full, unlabeled = (np.full((6, 20, 20), c, np.uint8) for c in (0, 1, 2))
    mixed = bare.copy()
    mixed[2, 3:9, 3:9] = 1
    labels = [bare, full, unlabeled, mixed]
    stored = [write(tmp_path, i, (6, 20, 20), label) for i, label in enumerate(labels)]
    dataset = still(stored)
    drawn = [dataset[0, i] for i in range(80)]
    counts = Counter((s["center_class"], s["case"]) for s in drawn)
    assert counts == {(1, "case1"): 20, (1, "case3"): 20, (0, "case0"): 20, (0, "case3"): 20}


def test_without_foreground_or_without_background_all_draws_are_around_the_other(tmp_path):
    bare = [write(tmp_path, 0, (6, 20, 20), np.zeros((6, 20, 20), np.uint8))]
    full = [write(tmp_path, 1, (6, 20, 20), np.ones((6, 20, 20), np.uint8))]
    assert {c for c, _ in around(patches(bare, foreground_share=1.0), 20)} == {0}
    assert {c for c, _ in around(patches(full, foreground_share=0.0), 20)} == {1}


def test_cases_without_any_labeled_voxel_are_refused(tmp_path):
    stored = [write(tmp_path, 0, (6, 20, 20), np.full((6, 20, 20), 2, np.uint8))]
    with pytest.raises(ValueError, match=r"expected cases with labeled voxels .* got none"):
        patches(stored)


def test_weights_follow_the_names_of_the_classes():
    classes = {"background": 0, "vein": 1, "artery": 4, "nerve": 5}
    assert data.class_weights(classes, [1, 4], None) == {1: 1.0, 4: 1.0}
    assert data.class_weights(classes, [1, 4], {"artery": 3}) == {1: 0.0, 4: 3.0}
    with pytest.raises(ValueError, match=r"class_ratio: expected .* among vein, artery, got nerve"):
        data.class_weights(classes, [1, 4], {"nerve": 1.0})


def test_the_shares_that_a_batch_reached_are_counted():
    samples = [{"center_class": c} for c in (0, 1, 3, 1)]
    target = torch.zeros(4, 1, 2, 2, 2)
    target[1:, 0, 0, 1, 1] = 1
    valid = torch.ones_like(target, dtype=torch.bool)
    valid[0, :, 0] = False  # unlabeled: 4 of 32 voxels, and a class in one of them does not count
    target[0, 0, 0, 0, 0] = 1
    found = data.shares(samples, target, valid, {1: "artery", 3: "vein"})
    assert found == {
        "around_foreground": 0.75,
        "around_artery": 0.5,
        "around_vein": 0.25,
        "with_foreground": torch.tensor(0.75),
        "foreground": torch.tensor(3 / 28),
    }
    assert set(data.shares(samples, target, valid, {1: "artery"})) == {
        "around_foreground",
        "with_foreground",
        "foreground",
    }


def test_unlabeled_voxels_are_never_the_centre(tmp_path):
    label = np.full((8, 16, 32), 2, np.uint8)
    label[:, :, :4] = 0
    stored = [write(tmp_path, 0, label.shape, label)]
    with h5py.File(stored[0].path) as file:
        assert file["background"][:, 2].max() < 4
        assert "foreground" not in file
    assert all(patches(stored)[0, i]["voxel"][2] < 4 for i in range(20))


def vessels(name):
    image = files.read_image(SHARED / f"vesselNN_nifti/{name}_img.nii.gz").array
    label = files.read_label(SHARED / f"vesselNN_nifti/{name}_lbl.nii.gz").array
    return image[:, :, 100:228, 100:228], label[:, 100:228, 100:228]


def membranes():
    with h5py.File(SHARED / "fibsem_membrane/fib25_training_sample2_z0-115.h5") as file:
        return file["raw"][:40, :100, :100][None], file["membrane"][:40, :100, :100]


def one_in_a_hundred():
    """Bars of 4 x 4 voxels in 40 x 40: 1 % foreground."""
    label = np.zeros((20, 40, 40), np.uint8)
    label[:, 10:14, 30:34] = 1
    return np.random.default_rng(0).integers(1, 255, (1, *label.shape)).astype(np.uint8), label


REAL = {
    "a phantom with 1 % foreground": one_in_a_hundred,
    "vessels": functools.partial(vessels, "burgess2014_tgMouse"),
    "membranes": membranes,
}


@pytest.mark.parametrize("source", REAL.values(), ids=REAL)
def test_the_asked_share_of_patches_is_around_foreground(tmp_path, source):
    if source is not one_in_a_hundred and not SHARED.is_dir():
        pytest.skip(f"needs the volumes in {SHARED}")
    image, label = source()
    label = (label > 0).astype(np.uint8)
    stored = [write(tmp_path, 0, label.shape, label, image=image, skeleton=False)]
    for share in (0.33, 0.5, 0.9):
        dataset, hits, seen = still(stored, foreground_share=share, patch=(8, 24, 24)), [], []
        for i in range(200):
            sample = dataset[0, i]
            hits.append(label[tuple(sample["voxel"])] == 1)
            seen.append(bool((sample["label"] == 1).any()))
            assert seen[-1] or not hits[-1]
        assert abs(np.mean(hits) - share) < 0.03
        assert np.mean(seen) >= np.mean(hits)


# ---------------------------------------------------------------------------- the border


def test_patches_reach_the_corners_of_the_volume(tmp_path):
    corner = np.zeros((12, 24, 24), np.uint8)
    corner[0, 0, 0] = corner[-1, -1, -1] = 1
    stored = [write(tmp_path, 0, corner.shape, corner)]
    drawn = still(stored, foreground_share=1.0)
    starts = {tuple(drawn[0, i]["start"]) for i in range(20)}
    assert (0, 0, 0) in starts and (8, 12, 12) in starts


def coverage(case, count, patch):
    """How many of the patches cover each voxel."""
    dataset, times = still([case], patch=patch), np.zeros(case.shape)
    for i in range(count):
        sample = dataset[0, i]
        a = sample["start"]
        b = a + sample["label"].shape
        times[a[0] : b[0], a[1] : b[1], a[2] : b[2]] += 1
    return times


@pytest.mark.parametrize("whole", ["background", "foreground"])
def test_border_voxels_are_drawn_as_often_as_inner_ones_within_a_factor_of_2(tmp_path, whole):
    label = np.full((16, 32, 32), whole == "foreground", np.uint8)
    case = write(tmp_path, 0, label.shape, label, skeleton=False)
    times = coverage(case, 2000, (4, 8, 8))
    inner = times[2:-2, 4:-4, 4:-4].mean()
    for axis in range(3):
        for face in (0, -1):
            assert 0.5 < times.take(face, axis).mean() / inner < 2
    assert times.min() > 0


def test_off_center_keeps_the_voxel_in_the_patch_and_leaves_the_middle_alone():
    shape, half, rng = np.array((40, 40, 40)), np.array((4.0, 8.0, 8.0)), np.random.default_rng(0)
    for _ in range(200):
        voxel = rng.integers(shape)
        centre = data.off_center(rng, voxel, half, shape, jitter=0.5)
        assert (np.abs(centre - voxel) <= 0.9 * half + 1e-9).all()
    centre = data.off_center(rng, (20, 20, 0), half, np.array((41, 41, 41)), jitter=0.0)
    assert np.allclose(centre, (20, 20, -7.2))


def test_epochs_differ_in_the_order_of_cases_and_of_foreground(stored):
    dataset = patches(stored, foreground_share=0.3)
    orders = [around(dataset, 30, epoch) for epoch in range(3)]
    names = [[case.id for _, case in order] for order in orders]
    classes = [[class_id for class_id, _ in order] for order in orders]
    assert names[0] != names[1] != names[2] and classes[0] != classes[1] != classes[2]


def test_offsets_from_the_centre_are_independent_along_the_axes():
    rng, half = np.random.default_rng(0), np.full(3, 8.0)
    middle = np.full(3, 499.5)
    centres = np.array(
        [data.off_center(rng, middle, half, (1000,) * 3, jitter=0.5) for _ in range(500)]
    )
    assert np.abs(np.corrcoef(centres.T)[np.triu_indices(3, 1)]).max() < 0.2


def test_a_field_of_distant_points_leaves_the_patch_at_its_place(tmp_path):
    label = np.zeros((12, 60, 60), np.uint8)
    label[5:7, 20:40, 28:31] = 1
    stored = [write(tmp_path, 0, label.shape, label, spacing=(5, 1, 1))]
    bent = Augment(
        flip=0.0, turn90=0.0, rotation=0.0, scaling=0.0, elastic=1.0,
        elastic_spacing=200.0, elastic_amplitude_range=(10.0, 14.0),
    ).model_dump()  # fmt: skip
    dataset = patches(stored, augmentation=bent, patch=(8, 24, 24), foreground_share=1.0)
    for i in range(60):
        _, target, valid, _ = augment_batch([dataset[0, i]], patch=(8, 24, 24))
        assert target.any() and valid.float().mean() > 0.8
