"""How much the predictions that are averaged differ: inference.save_disagreement."""

import itertools
import math

import numpy as np
import pytest
import torch

from runtime import config, outputs
from runtime.arrays import load_network
from runtime.sliding_window import FLIPS, predict_slabs, predict_volume
from tests.runtime.test_sliding_window import channels_of, constant, random_volume, same
from tests.test_ensembles import other, read
from tests.test_infer import TURNED, faults_of, image_of, infer_ok, run, write_nifti
from tests.test_infer_classes import NESTED, TREES, made
from tests.test_infer_parts import files_of, predicted_rows
from volumes import files

__all__ = ["made", "other", "run"]  # fixtures

ASKED = "inference.save_disagreement=true"
FLIPPED = ["inference.flips=true", ASKED]
IMAGE = image_of((12, 16, 16))  # 2 rows of a window


def convolution(seed, channels=1):
    torch.manual_seed(seed)
    network = torch.nn.Conv3d(1, channels, 3, padding=1)
    torch.nn.init.normal_(network.weight)
    return network


def one_hot(channel):
    """A network that is sure of one of three classes."""
    return lambda x: torch.eye(3)[channel].mul(99).view(3, 1, 1, 1).expand(len(x), 3, *x.shape[2:])


def view(network, axes):
    """The network as it is where it sees its input flipped."""
    return lambda x: network(x.flip(axes)).flip(axes)


def disagreement(networks, volume, window, **how):
    """The maps alone (K, D, H, W)."""
    channels = how.get("channels", 1)
    return predict_volume(networks, volume, window, disagreement=True, **how)[channels:]


# ---------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("ratio", [(1, 1, 1), (1, 2.5, 0.4)])
def test_it_is_the_standard_deviation_of_the_networks_probabilities(ratio):
    networks, volume = [constant(p) for p in (0.2, 0.4, 0.9)], np.zeros((1, 9, 23, 14), np.uint8)
    differs = disagreement(networks, volume, (8, 8, 8), ratio=ratio)
    assert differs.shape == volume.shape and differs.dtype == np.float32
    np.testing.assert_allclose(differs, math.sqrt(0.26 / 3), atol=1e-6)  # of a mean of 0.5


def test_flips_disagree_where_a_network_is_lopsided_and_nowhere_else():
    def first_column(x):  # 1 at x = 0 of the window, whatever it shows
        return torch.where(torch.arange(x.shape[-1]) == 0, 30.0, -30.0).expand(x.shape)

    differs = disagreement(first_column, np.zeros((1, 2, 3, 4)), (2, 3, 4), flips=True)
    np.testing.assert_allclose(differs[0, 1, 2], [0.5, 0, 0, 0.5], atol=1e-6)
    differs = disagreement(same, random_volume(9, 11, 10), (5, 6, 6), flips=True)
    np.testing.assert_allclose(differs, 0, atol=1e-6)


@pytest.mark.parametrize("exclusive", [False, True])
def test_flips_of_several_networks_are_that_many_predictions(exclusive):
    networks, volume = [convolution(seed, 3) for seed in (1, 2)], random_volume(6, 7, 8)
    how = {"channels": 3, "exclusive": exclusive}
    views = [view(*pair) for pair in itertools.product(networks, FLIPS)]
    each = [predict_volume(network, volume, (6, 7, 8), **how) for network in views]
    expected = np.std(np.float64(each), axis=0)
    if exclusive:
        expected = np.sqrt((expected**2).sum(axis=0, keepdims=True) / 2)
    differs = disagreement(networks, volume, (6, 7, 8), flips=True, **how)
    assert expected.mean() > 0.05
    np.testing.assert_allclose(differs, expected, atol=1e-6)


def test_a_small_difference_of_high_probabilities_is_not_lost():
    logits = [math.log(p / (1 - p)) for p in (0.98, 0.98002)]
    networks = [lambda x, value=value: torch.full_like(x, value) for value in logits]
    differs = disagreement(networks, np.zeros((1, 4, 4, 4)), (4, 4, 4))
    np.testing.assert_allclose(differs, 1e-5, rtol=0.02)


def test_of_two_exclusive_classes_it_is_the_deviation_of_each():
    volume, how = random_volume(5, 6, 7), {"channels": 2, "exclusive": True}
    networks = [channels_of(0, 3), channels_of(1, -2)]
    each = [predict_volume(network, volume, (5, 6, 7), **how) for network in networks]
    differs = disagreement(networks, volume, (5, 6, 7), **how)
    np.testing.assert_allclose(differs[0], np.std(each, axis=0)[1], atol=1e-6)


def test_three_networks_that_are_sure_of_three_classes_disagree_most():
    how = {"channels": 3, "exclusive": True}
    differs = disagreement([one_hot(i) for i in range(3)], random_volume(4, 4, 4), (4, 4, 4), **how)
    np.testing.assert_allclose(differs, math.sqrt((1 - 1 / 3) / 2), atol=1e-6)
    together = disagreement([one_hot(1)] * 3, random_volume(4, 4, 4), (4, 4, 4), **how)
    np.testing.assert_allclose(together, 0, atol=1e-6)


@pytest.mark.parametrize(("overlap", "ratio"), [(0.5, (1, 1.3, 1)), (0, (1, 1, 1))])
def test_it_is_never_less_than_the_deviation_of_blended_flips(overlap, ratio):
    network, volume = convolution(1), random_volume(8, 12, 12)
    about = volume, (4, 6, 6), overlap
    each = [predict_volume(view(network, axes), *about, ratio=ratio) for axes in FLIPS]
    blended = np.std(np.float64(each), axis=0)
    differs = predict_volume(network, *about, flips=True, disagreement=True, ratio=ratio)[1:]
    assert (differs >= blended - 1e-6).all()
    if overlap == 0:  # each voxel is of one window
        np.testing.assert_allclose(differs, blended, atol=1e-6)


# ---------------------------------------------------------------------------- slabs


def test_probabilities_have_the_same_bits_with_it_and_planes_in_any_range_of_rows():
    volume, networks = random_volume(19, 9, 9), [convolution(seed, 2) for seed in (1, 2)]
    how = {"channels": 2, "flips": True, "ratio": (1.3, 1, 1)}
    whole = predict_volume(networks, volume, (6, 6, 6), disagreement=True, **how)
    assert len(whole) == 4
    without = predict_volume(networks, volume, (6, 6, 6), **how)
    np.testing.assert_array_equal(whole[:2], without)
    how |= {"disagreement": True, "rows": range(1, 3)}
    for z0, planes in predict_slabs(networks, volume, (6, 6, 6), **how):
        np.testing.assert_array_equal(planes, whole[:, z0 : z0 + planes.shape[1]])


def test_one_prediction_has_nothing_to_disagree_with():
    with pytest.raises(ValueError, match=r"^disagreement: expected flips or several networks"):
        predict_slabs(same, random_volume(4, 4, 4), (4, 4, 4), disagreement=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_it_is_that_of_a_cpu():
    volume, networks = random_volume(19, 9, 9), [convolution(seed, 3) for seed in (1, 2)]
    how = {"channels": 3, "flips": True}
    for exclusive in (False, True):
        how["exclusive"] = exclusive
        expected = disagreement([n.cpu() for n in networks], volume, (6, 6, 6), **how)
        on_gpu = [network.cuda() for network in networks]
        differs = disagreement(on_gpu, volume, (6, 6, 6), device="cuda", **how)
        np.testing.assert_allclose(differs, expected, atol=5e-3)  # TF32, if it is allowed


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("members", [1, 2])
def test_it_is_written_beside_the_same_masks_and_probabilities(run, other, tmp_path, members):
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    about = ["--ckpt", run(), *([other()] if members > 1 else []), "--input", tmp_path / "a.nii.gz"]
    about += [f"inference.flips={members == 1}", "inference.save_probabilities=true", "--output"]
    infer_ok(*about, tmp_path / "without")
    infer_ok(*about, tmp_path / "with", ASKED)
    plain, both = files_of(tmp_path / "without"), files_of(tmp_path / "with")
    assert both.keys() - plain.keys() == {"disagreement/a.nii.gz"}
    assert {name: both[name] for name in plain} == plain
    image = files.read_image(tmp_path / "with" / "disagreement" / "a.nii.gz")
    assert image.spacing == (2.0, 0.5, 0.5) and image.array.dtype == np.float32
    np.testing.assert_allclose(image.affine, TURNED)
    assert 0.001 < image.array.mean() < 0.5
    infer_ok(*about, tmp_path / "with", "inference.threshold=0.9")  # without that map
    assert files_of(tmp_path / "with").keys() == plain.keys()


@pytest.mark.parametrize(("regions", "exclusive"), [(TREES, True), (NESTED, False)])
def test_parts_leave_that_of_one_process(made, tmp_path, monkeypatch, regions, exclusive):
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    about = ["--ckpt", made(regions, exclusive), "--input", tmp_path / "a.nii.gz", *FLIPPED]
    infer_ok(*about, "--output", tmp_path / "one")
    ranges = predicted_rows(monkeypatch)
    for number in (2, 2, 1):  # the slabs that are there are not done again
        infer_ok(*about, "--output", tmp_path / "two", "--part", f"{number}/2")
    assert ranges == [range(1, 2), range(1)]
    names = [""] if exclusive else [f"{name}/" for name in regions]
    written = files_of(tmp_path / "one")
    assert written.keys() == {"a.nii.gz", *(f"disagreement/{name}a.nii.gz" for name in names)}
    assert files_of(tmp_path / "two") == written


@pytest.mark.parametrize(("regions", "exclusive"), [(TREES, True), (NESTED, False), (None, False)])
def test_python_gives_that_of_infer_py(made, run, tmp_path, regions, exclusive):
    path = made(regions, exclusive) if regions else run()
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    infer_ok(
        "--ckpt", path, "--input", tmp_path / "a.nii.gz", *FLIPPED, "--output", tmp_path / "out"
    )
    _, mask, differs = load_network(path, settings=FLIPPED).predict(IMAGE, (2.0, 0.5, 0.5))
    np.testing.assert_array_equal(mask, read(tmp_path / "out" / "a.nii.gz"))
    for name, own in differs.items() if regions is NESTED else [("", differs)]:
        np.testing.assert_array_equal(
            own, read(tmp_path / "out" / "disagreement" / name / "a.nii.gz")
        )


def test_one_network_without_flips_is_refused_before_anything_is_written(run, tmp_path, capsys):
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    about = "--ckpt", run(), "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out"
    assert faults_of(capsys, *about, ASKED) == [
        "inference.save_disagreement: expected predictions that can differ, got one network "
        "without flips; give inference.flips=true or several checkpoints, or set it to false"
    ]
    assert not (tmp_path / "out").exists()


def test_regions_with_a_map_each_need_names_of_folders():
    asked = config.build({"inference": {"save_disagreement": True}})
    regions = {"a": (1,), "b/c": (2,)}
    with pytest.raises(ValueError, match=r"^inference\.save_disagreement: .* got b/c; set it to"):
        outputs.check_settings(outputs.Outputs(regions), asked)
    asked.inference.threshold = None
    outputs.check_settings(outputs.Outputs(regions, exclusive=True), asked)  # one map
