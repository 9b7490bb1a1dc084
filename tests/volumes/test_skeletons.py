"""The tubed skeleton of a target: its shape, its place in the case file, its way to the patch."""

import h5py
import numpy as np
import pytest
import torch
from scipy import ndimage

import data
import prepare
from patches import augment, resample
from patches.cache import VolumeCache
from runtime import build
from runtime.splits import Split
from settings import Augment
from volumes import casefile, phantoms, skeletons

TERMS = {"skeleton_recall": {"weight": 1.0}}
EVERYWHERE = np.ones((3, 3, 3))


def empty(shape=(12, 16, 20)):
    return np.zeros(shape, bool)


def pieces(mask):
    return ndimage.label(mask, EVERYWHERE)[1]


# ---------------------------------------------------------------------------- its shape


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_bar_of_three_voxels_becomes_the_line_along_its_middle(axis):
    bar = np.moveaxis(np.zeros((20, 9, 9), bool), 0, axis)
    along = np.moveaxis(bar, axis, 0)
    along[3:17, 3:6, 3:6] = True
    line = np.moveaxis(skeletons.thin(bar), axis, 0)
    assert pieces(line) == 1
    middle = np.argwhere(line[5:15]) - (0, 4, 4)
    assert (np.abs(middle[:, 1:]).sum(1) <= 1).all()  # a voxel beside the middle at most
    assert line[5:15].any((1, 2)).all()


@pytest.mark.parametrize("normal", [0, 1, 2])
def test_a_sheet_of_one_voxel_is_its_own_skeleton(normal):
    sheet = np.moveaxis(np.zeros((9, 20, 20), bool), 0, normal)
    np.moveaxis(sheet, normal, 0)[4, 2:18, 2:18] = True
    assert np.array_equal(skeletons.thin(sheet), sheet)


@pytest.mark.parametrize("facing", [(1, 0.15, 0), (1, 1, 0), (1, 1, 1), (0.2, 1, 0.4)])
def test_a_sheet_keeps_a_surface_whichever_way_it_faces(facing):
    normal = np.array(facing) / np.linalg.norm(facing)
    height = np.moveaxis(np.indices((30,) * 3) - 15, 0, -1) @ normal
    sheet = np.abs(height) <= 1.5
    surface = skeletons.thin(sheet)
    assert surface.sum() < 0.6 * sheet.sum() and pieces(surface) == 1
    assert skeletons.tubed_skeleton(sheet).sum() > 0.98 * sheet.sum()


def test_a_ring_stays_closed_and_is_one_loop():
    z, y, x = np.indices((9, 30, 30))
    ring = (np.abs(np.hypot(y - 15, x - 15) - 10) <= 1.5) & (np.abs(z - 4) <= 1)
    line = skeletons.thin(ring)
    assert line.sum() < 0.6 * ring.sum() and pieces(line) == 1
    flat = line.any(0)
    assert ndimage.label(~flat)[1] == 2  # inside and outside
    tube = skeletons.tubed_skeleton(ring)
    assert tube.sum() > 0.99 * ring.sum() and ndimage.label(~tube.any(0))[1] == 2


def test_a_thick_rod_is_covered_along_its_middle_only():
    _, y, x = np.indices((40, 30, 30))
    away = np.hypot(y - 15, x - 15)
    tube = skeletons.tubed_skeleton(away <= 9)
    assert tube[8:32, 15, 15].all()  # the ends may fork
    assert not (tube & (away > 4))[10:30].any()


def test_a_cut_through_a_bar_cuts_its_skeleton():
    bar = empty()
    bar[5:8, 6:9, 2:18] = True
    bar[:, :, 10] = False
    assert pieces(skeletons.tubed_skeleton(bar)) == 2


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 10), (4, 4, 4), (2, 9, 9), (4, 4, 12)])
def test_shapes_of_even_thickness_keep_a_skeleton(shape):
    box = empty()
    box[tuple(slice(3, 3 + n) for n in shape)] = True
    assert skeletons.thin(box).any()


def test_every_piece_of_a_random_mask_keeps_a_skeleton_inside_itself():
    rng = np.random.default_rng(0)
    for _ in range(150):
        shape = rng.integers(1, 9, 3)
        field = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0, 1.2))
        mask = field > np.quantile(field, rng.uniform(0.1, 0.9))
        labels, count = ndimage.label(mask, EVERYWHERE)
        tube = skeletons.tubed_skeleton(mask)
        assert not (tube & ~mask).any()
        assert set(labels[tube]) == set(range(1, count + 1))


def test_nothing_stays_nothing_and_one_voxel_stays_itself():
    mask = empty()
    assert not skeletons.tubed_skeleton(mask).any()
    mask[3, 0, 19] = True
    assert np.array_equal(skeletons.tubed_skeleton(mask), mask)


def test_a_full_volume_has_a_skeleton_in_its_middle():
    tube = skeletons.tubed_skeleton(np.ones((15, 15, 15), bool))
    assert tube[7, 7, 7] and tube.sum() < 0.6 * tube.size


def test_the_tube_is_what_a_distance_transform_finds_within_the_mask():
    mask = phantoms.vessels((12, 48, 48)).label == 1
    for radius, spacing in ((2, (1, 1, 1)), (2, (3, 1, 1)), (3, (0.2, 0.1, 0.1)), (0, (1, 1, 1))):
        away = ndimage.distance_transform_edt(~skeletons.thin(mask), sampling=spacing)
        expected = mask & (away <= radius * min(spacing) + 1e-6)
        assert np.array_equal(skeletons.tubed_skeleton(mask, radius, spacing), expected)


def test_a_sheet_that_runs_into_the_unlabeled_region_keeps_its_skeleton_up_to_there():
    whole = empty((20, 20, 24))
    whole[8:10, 2:18] = True  # two voxels thick, along the whole of x
    labeled = np.indices(whole.shape)[2] < 14
    tube = skeletons.tubed_skeleton(whole & labeled)
    assert np.array_equal(tube[..., 10:14], whole[..., 10:14])
    line = skeletons.thin(whole & labeled)
    assert (line.any(0)[3:17, 12]).all()  # at most one voxel short of the edge


def grown_bars():
    """Two bars of three voxels side by side, 200 and 7, and one of 3 within a block of 9."""
    label = np.zeros((14, 20, 40), np.uint8)
    label[3:6, 3:6, 2:38], label[3:6, 6:9, 2:38] = 200, 7
    label[7:14, 11:18, 2:38] = 9
    label[9:12, 13:16, 2:38] = 3
    return label


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0)])
def test_classes_that_touch_or_lie_in_each_other_keep_the_skeletons_they_have_alone(spacing):
    label = grown_bars()
    tubes = skeletons.tubed_skeletons(label, [3, 7, 9, 200], spacing)
    for class_id in (3, 7, 9, 200):
        alone = skeletons.tubed_skeleton(label == class_id, spacing=spacing)
        assert alone.any() and np.array_equal(tubes & (label == class_id), alone)
    assert not tubes[label == 0].any()
    together = skeletons.tubed_skeleton(label > 0, spacing=spacing)
    assert not np.array_equal(tubes, together)


def test_one_class_has_the_skeleton_of_the_whole_volume_bit_for_bit():
    rng = np.random.default_rng(0)
    for _ in range(20):
        label = np.zeros((9, 14, 15), np.uint8)
        share = rng.uniform(0.2, 0.9)
        label[tuple(slice(*sorted(rng.choice(n, 2, False))) for n in label.shape)] = 1
        label[rng.random(label.shape) > share] = 0
        whole = skeletons.tubed_skeleton(label == 1, spacing=(2.0, 1.0, 1.0))
        assert np.array_equal(skeletons.tubed_skeletons(label, [1], (2.0, 1.0, 1.0)), whole)
    assert not skeletons.tubed_skeletons(np.zeros((3, 3, 3), np.uint8), []).any()


def test_what_is_wrong_with_the_numbers_is_said():
    with pytest.raises(ValueError, match=r"mask: expected \(D, H, W\) bool, got \(3, 3\) bool"):
        skeletons.tubed_skeleton(np.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"mask: expected .* uint8"):
        skeletons.tubed_skeleton(np.ones((3, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="radius: expected 0 or more"):
        skeletons.tubed_skeleton(empty(), -1)
    with pytest.raises(ValueError, match="spacing: expected three numbers above 0"):
        skeletons.tubed_skeleton(empty(), 2, (1, 0, 1))


# ---------------------------------------------------------------------------- the case file


def two_classes():
    """Bars of class 1 and class 3, beside an unlabeled slab (2)."""
    label = np.zeros((12, 20, 24), np.uint8)
    label[3:8, 4:9, :16] = 1
    label[3:8, 12:17, :16] = 3
    label[:, :, 16:] = 2
    return label


def write(folder, label, **changes):
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (1, *label.shape)).astype(np.uint8)
    about = {"spacing": (1.0, 1.0, 1.0), "unit": "", "affine": None, "group": "g"}
    casefile.write_case(folder / "a.h5", image, label, ignore_label=2, **{**about, **changes})
    return casefile.read_case(folder / "a.h5")


def test_a_case_file_holds_the_tube_of_each_class_and_not_of_the_unlabeled(tmp_path):
    label = two_classes()
    label[3:8, 9:12, :16] = 3  # it touches class 1
    case = write(tmp_path, label)
    assert case.skeleton
    with h5py.File(case.path) as file:
        stored = file["skeleton"]
        assert stored.dtype == np.uint8 and stored.compression == "lzf"
        expected = skeletons.tubed_skeleton(label == 1) | skeletons.tubed_skeleton(label == 3)
        assert np.array_equal(stored[:], expected)
        assert expected[label == 1].any() and expected[label == 3].any()


def test_the_spacing_of_the_case_shapes_its_tube(tmp_path):
    label = two_classes()
    case = write(tmp_path, label, spacing=(5.0, 1.0, 1.0))
    with h5py.File(case.path) as file:
        expected = skeletons.tubed_skeleton((label == 1) | (label == 3), 2, (5, 1, 1))
        assert np.array_equal(file["skeleton"][:], expected)


def test_a_case_file_without_a_skeleton_says_so(tmp_path):
    assert not write(tmp_path, two_classes(), skeleton=False).skeleton
    case = write(tmp_path, two_classes())
    with h5py.File(case.path, "a") as file:
        del file["skeleton"]  # as files were before there were skeletons
    assert not casefile.read_case(case.path).skeleton


def test_prepare_writes_skeletons_unless_asked_not_to(tmp_path):
    phantom = ("--phantom", "vessels", "--cases", "1", "--shape", "10", "24", "24")
    for options, wanted in (((), True), (("--no-skeletons",), False)):
        out = tmp_path / str(wanted)
        assert prepare.main([*phantom, *options, "--workers", "1", "--out", str(out)]) == 0
        (case,) = casefile.read_dataset(out).cases.values()
        assert case.skeleton == wanted
        with h5py.File(case.path) as file:
            mask = file["label"][:] == 1
            if wanted:
                tube = skeletons.tubed_skeleton(mask, spacing=phantoms.VESSEL_SPACING)
                assert np.array_equal(file["skeleton"][:], tube) and tube.any()


# ---------------------------------------------------------------------------- the patch


def patches(case, *, augmentation=None, **changes):
    settings = {
        "cache": VolumeCache([case], 2**30),
        "patch": (8, 12, 12),
        "spacing": (0, 0, 0),
        "foreground": {1: 1.0},
        "foreground_share": 1.0,
        "jitter": 0.5,
        "clip": None,
        "seed": 0,
        "augment": augmentation,
    }
    return data.PatchDataset([case], **{**settings, **changes})


def make_batch(samples, foreground=(1,)):
    return augment.augment_batch(
        samples,
        (8, 12, 12),
        regions=[foreground],
        ignore_label=2,
        device=torch.device("cpu"),
    )


def test_a_sample_ships_the_box_of_the_skeleton_beside_the_label_if_asked(tmp_path):
    case = write(tmp_path, two_classes())
    sample = patches(case, skeletons=True)[0, 0]
    box = tuple(slice(a, a + n) for a, n in zip(sample["start"], (8, 12, 12), strict=True))
    assert sample["skeleton"].dtype == torch.uint8
    with h5py.File(case.path) as file:
        assert np.array_equal(sample["skeleton"], file["skeleton"][box])
    assert "skeleton" not in patches(case)[0, 0]


def test_a_case_without_a_skeleton_is_named_before_training(tmp_path):
    case = write(tmp_path, two_classes(), skeleton=False)
    with pytest.raises(ValueError, match="skeleton in every case file, got none in a; prepare"):
        build.check_skeletons(TERMS, Split([case], [], []))
    build.check_skeletons(TERMS, Split([write(tmp_path, two_classes())], [], []))


def test_a_batch_without_skeletons_has_none_and_one_with_them_the_target_of_before(tmp_path):
    case = write(tmp_path, two_classes())
    *plain, none = make_batch([patches(case)[0, i] for i in range(3)])
    *beside, skeleton = make_batch([patches(case, skeletons=True)[0, i] for i in range(3)])
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))
    assert skeleton.shape == (3, 1, 8, 12, 12) and skeleton.dtype == torch.float32
    assert set(skeleton.unique().tolist()) == {0.0, 1.0}


def test_the_skeleton_is_resampled_for_the_foreground_that_is_trained_alone(tmp_path):
    case = write(tmp_path, two_classes())
    samples = [patches(case, skeletons=True, patch=(12, 20, 24))[0, 0]]
    for classes in ([1], [3], [1, 3]):
        _, target, _, skeleton = augment.augment_batch(
            samples, (12, 20, 24), regions=[classes], ignore_label=2, device=torch.device("cpu")
        )
        tube = skeletons.tubed_skeleton(np.isin(two_classes(), (1, 3)))
        assert np.array_equal(skeleton[0, 0], tube & np.isin(two_classes(), classes))
        assert skeleton.sum() < target.sum()


def resample_whole(label, matrix, skeleton):
    """A patch of the label's own shape (a cube's), around its center."""
    n = label.shape[0]
    return resample.resample_patch(
        torch.zeros(1, *label.shape),
        torch.from_numpy(label),
        torch.from_numpy(skeleton),
        geometry={
            **resample.Map(matrix, matrix)._asdict(),
            "origin": (n - 1) / 2 - matrix @ np.full(3, (n - 1) / 2),
            "start": np.zeros(3, int),
            "inside": False,
            "shape": label.shape,
        },
        patch=label.shape,
        regions=[[1]],
        ignore_label=2,
    )


def crooked():
    """A label without any symmetry, partly unlabeled, and its skeleton: (20, 20, 20) uint8."""
    label = np.zeros((20, 20, 20), np.uint8)
    label[3:7, 2:18, 4:9] = 1
    label[3:15, 10:14, 5:17] = 1
    tube = skeletons.tubed_skeleton(label == 1)
    label[:, :, 15:] = 2
    return label, tube.astype(np.uint8)


@pytest.mark.parametrize("quarters", [0, 1, 3])
@pytest.mark.parametrize("mirrored", [(), (0,), (0, 2)])
def test_flips_and_quarter_turns_bring_the_skeleton_exactly_where_it_was(quarters, mirrored):
    label, tube = crooked()
    signs = [-1.0 if axis in mirrored else 1.0 for axis in range(3)]
    turn = np.round(augment.rotate_in((1, 2), quarters * np.pi / 2)) @ np.diag(signs)
    _, _, valid, skeleton = resample_whole(label, turn, tube)
    places = np.moveaxis(np.indices(label.shape), 0, -1) - 9.5
    source = tuple(np.moveaxis(np.round(places @ turn.T + 9.5).astype(int), -1, 0))
    assert np.array_equal(skeleton[0], (tube * (label != 2))[source])
    assert skeleton.any() and not (skeleton.bool() & ~valid).any()


def test_a_rotated_skeleton_stays_in_the_target_and_takes_the_voxels_of_the_same_places():
    label, tube = crooked()
    matrix = augment.rotate_in((1, 2), 0.5) @ augment.rotate_in((0, 1), 0.3)
    _, target, valid, skeleton = resample_whole(label, matrix, tube)
    assert skeleton.any() and not (skeleton > target).any()
    assert not (skeleton.bool() & ~valid).any()
    _, of_tube, _, _ = resample_whole(np.where(label == 2, 2, tube).astype(np.uint8), matrix, tube)
    assert torch.equal(skeleton, of_tube)


def test_a_skeleton_beside_a_wider_label_never_leaves_the_target():
    label, _ = crooked()
    everywhere = np.ones_like(label)
    _, target, _, skeleton = resample_whole(label, np.eye(3), everywhere)
    assert torch.equal(skeleton, target)


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_batches_carry_the_skeleton_through_the_loader(tmp_path, workers):
    case = write(tmp_path, two_classes())
    turned = Augment(rotation=1.0, scaling=1.0, elastic=1.0, roll=0.5).model_dump()
    dataset = patches(case, skeletons=True, augmentation=turned)
    plan = {"batches_per_epoch": 2, "batch_size": 2, "prefetch": 2, "pin": False}
    stream = data.Batches(dataset, 0, 2, **plan, workers=workers, persistent=True)
    for samples in stream:
        _, target, valid, skeleton = make_batch(samples)
        assert skeleton.any() and not (skeleton > target).any()
        assert not (skeleton.bool() & ~valid).any()
