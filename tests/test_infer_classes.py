"""Predictions of several classes, and of regions that may overlap: infer.py, alone and in parts."""

import re

import numpy as np
import pytest
import torch

from runtime import checkpoint, config, ensemble
from runtime.members import read_members
from scoring import postprocess
from tests.test_ensembles import read
from tests.test_infer import (
    PATCH,
    build_network,
    expected_probs,
    faults_of,
    image_of,
    infer_ok,
    network_of,
    run,
    write_nifti,
)
from tests.test_infer_parts import files_of, slabs_in
from volumes.inputs import check_inputs

__all__ = ["run"]  # a fixture

IMAGE = image_of((23, 30, 20))
CLASSES = {"background": 0, "artery": 3, "vein": 7}
TREES = {"artery": [3], "vein": [7]}
NESTED = {"vessel": [3, 7], "artery": [3]}
FACTS = {"classes": CLASSES, "foreground": [3, 7]}


def network_of_channels(count, seed):
    """A network whose channels are highest in about as many voxels each, and half above 0."""
    _, strides, kernels = network_of(seed)
    torch.manual_seed(seed)
    network, last = build_network(count, strides, kernels)
    with torch.no_grad():
        last.weight.normal_()
        logits = network(torch.randn(1, 1, *PATCH))
        last.bias -= logits.flatten(2).median(dim=2).values[0]
    return network


@pytest.fixture
def made(run, tmp_path):
    """made(regions, exclusive, changes to its settings, chosen=..., name=..., seed=..., **facts):
    the checkpoint of a run."""

    def make(regions, exclusive, changes=(), *, chosen=None, name="tiny", seed=1, **facts):
        facts = {**FACTS, "regions": regions, "exclusive": exclusive, **facts}
        state = checkpoint.load(run(**facts))
        state["config"] = config.apply_overrides(state["config"], changes)
        state["ema"] = network_of_channels(len(regions) + exclusive, seed).state_dict()
        state["loop"]["evaluations"]["chosen"] = chosen or {}
        path = tmp_path / "runs" / name / "checkpoints" / "last.pt"
        checkpoint.save(state, path)
        return path

    return make


@pytest.fixture
def scan(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    return "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out"


def probabilities(count, exclusive, seed=1):
    """(K, D, H, W) of the whole volume at once."""
    network = network_of_channels(count, seed)
    how = {"channels": count, "exclusive": exclusive, "batch": 2}  # windows, as in the settings
    return expected_probs(IMAGE, network=network, **how)


# ---------------------------------------------------------------------------- what is written


def test_each_voxel_gets_the_id_of_its_most_probable_class(made, scan, tmp_path, capsys):
    infer_ok("--ckpt", made(TREES, True), *scan)
    expected = np.array([0, 3, 7])[probabilities(3, exclusive=True).argmax(axis=0)]
    mask = read(tmp_path / "out" / "a.nii.gz")
    assert mask.dtype == np.uint8 and len(np.unique(mask)) == 3
    np.testing.assert_array_equal(mask, expected)
    said = capsys.readouterr().out
    assert "\nclasses    artery (3), vein (7): one of these in each voxel\n" in said
    assert "no flips, the most probable class, no postprocessing\n" in said
    shares = [f"{100 * (mask == i).mean():.2f} % {n}" for n, i in (("artery", 3), ("vein", 7))]
    assert f" s, {', '.join(shares)}, " in said
    assert files_of(tmp_path / "out").keys() == {"a.nii.gz"}


def test_regions_above_their_own_thresholds_are_painted_in_their_order(
    made, scan, tmp_path, capsys
):
    chosen = {"threshold": {"vessel": 0.4, "artery": 0.7}}
    path = made(NESTED, False, chosen=chosen)
    infer_ok("--ckpt", path, *scan, "inference.save_probabilities=true")
    vessel, artery = probabilities(2, exclusive=False)
    expected = np.where(artery >= 0.7, 3, np.where(vessel >= 0.4, 7, 0))
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.nii.gz"), expected)
    assert len(np.unique(expected)) == 3
    for name, probs in (("vessel", vessel), ("artery", artery)):
        saved = read(tmp_path / "out" / "probabilities" / name / "a.nii.gz")
        np.testing.assert_allclose(saved, probs, rtol=0, atol=1e-6)  # other convolutions
    said = capsys.readouterr().out
    assert "classes    vessel (3+7, written as 7), artery (3): regions that may overlap\n" in said
    assert "threshold {vessel: 0.4, artery: 0.7}, no postprocessing\n" in said


def test_a_number_given_for_one_region_leaves_the_others_as_they_were_chosen(made, scan, capsys):
    chosen = {"threshold": {"vessel": 0.4, "artery": 0.7}}
    chosen["min_component_voxels"] = {"vessel": 20, "artery": 0}
    given = ["inference.threshold.artery=0.6", "postprocess.min_component_voxels={artery: 5}"]
    infer_ok("--ckpt", made(NESTED, False, chosen=chosen), *scan, *given)
    said = capsys.readouterr().out
    assert "threshold {vessel: 0.4, artery: 0.6}, min_component_voxels {vessel: 20, ar" in said
    assert "artery: 5}\n" in said


def test_each_class_is_post_processed_with_its_own_size(made, scan, tmp_path):
    sizes = {"artery": 2000, "vein": 3}
    path = made(TREES, True, chosen={"min_component_voxels": sizes})
    infer_ok("--ckpt", path, *scan, "postprocess.max_hole_voxels=9")
    classes = probabilities(3, exclusive=True).argmax(axis=0)
    high = {name: classes == i for i, name in enumerate(TREES, start=1)}
    how = {"min_component_voxels": sizes, "max_hole_voxels": 9, "exclusive": True}
    expected = postprocess.apply_to_regions(high, **how)
    mask = read(tmp_path / "out" / "a.nii.gz")
    for name, number in (("artery", 3), ("vein", 7)):
        np.testing.assert_array_equal(mask == number, expected[name])
        assert 0 < expected[name].sum() != high[name].sum()


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("regions", "exclusive", "settings"),
    [
        (TREES, True, ["postprocess.max_hole_voxels=9"]),
        (NESTED, False, ["postprocess.hysteresis=0.4", "inference.threshold={vessel: 0.6}"]),
    ],
)
def test_parts_leave_the_files_of_one_process(made, scan, tmp_path, regions, exclusive, settings):
    about = ["--ckpt", made(regions, exclusive), *scan[:2], *settings]
    about += ["inference.save_probabilities=true", "--output"]
    infer_ok(*about, tmp_path / "one")
    for number in (2, 1):
        infer_ok(*about, tmp_path / "two", "--part", f"{number}/2")
    files = files_of(tmp_path / "one")
    assert files.keys() == {"a.nii.gz", *(f"probabilities/{name}/a.nii.gz" for name in regions)}
    assert files_of(tmp_path / "two") == files


def test_a_slab_of_classes_takes_one_byte_a_voxel(made, scan, tmp_path):
    infer_ok("--ckpt", made(TREES, True), *scan, "--part", "2/2")
    (path, *_) = (tmp_path / "out" / ".parts").glob("*/*/*.npz")
    assert slabs_in(tmp_path / "out") == ["2", "3", "4"]
    with np.load(path) as file:
        assert set(file) == {"z0", "classes", "classes.shape"}
        assert file["classes"].dtype == np.uint8 and file["classes"].shape[1:] == (30, 20)


def test_no_float_volume_is_made_unless_it_is_asked_for(made, scan):
    for regions, exclusive in ((TREES, True), (NESTED, False)):
        members = read_members([str(made(regions, exclusive))])
        settings, _ = ensemble.joint_settings(members, [])
        predictor = ensemble.Predictor(
            members, settings, members[0].data, torch.device("cpu"), "fp32"
        )
        (volume,), _ = check_inputs([str(scan[1])], members[0].data, "", scan[3])
        for _, layers in predictor.slabs(volume):
            assert {layer.dtype for layer in layers.values()} <= {np.dtype(bool), np.dtype("u1")}


# ---------------------------------------------------------------------------- ensembles


def test_an_ensemble_is_the_mean_of_its_networks_probabilities_of_classes(made, scan, tmp_path):
    paths = [made(TREES, True, name=name, seed=seed) for name, seed in (("x", 1), ("y", 3))]
    infer_ok("--ckpt", *paths, *scan)
    each = [probabilities(3, exclusive=True, seed=seed) for seed in (1, 3)]
    expected = np.array([0, 3, 7])[(each[0] + each[1]).argmax(axis=0)]
    assert (read(tmp_path / "out" / "a.nii.gz") == expected).mean() > 0.9999


def test_thresholds_and_sizes_of_an_ensemble_are_the_means_by_region(made, scan, capsys):
    def chosen(vessel, artery, size):
        sizes = {"vessel": size, "artery": 0}
        return {"threshold": {"vessel": vessel, "artery": artery}, "min_component_voxels": sizes}

    paths = [
        made(NESTED, False, chosen=chosen(0.7, 0.5, 20), name="x"),
        made(NESTED, False, chosen=chosen(0.6, 0.5, 0), name="y"),
    ]
    infer_ok("--ckpt", *paths, *scan)
    said = capsys.readouterr().out
    assert "threshold {vessel: 0.65, artery: 0.5} of {vessel: 0.7, artery: 0.5}, {vessel: 0" in said
    assert "threshold {vessel: 0.65, artery: 0.5}, min_component_voxels {vessel: 10, art" in said
    classes = [made(TREES, True, name=name) for name in "xy"]
    infer_ok("--ckpt", *classes, *scan)
    said = capsys.readouterr().out
    assert "probabilities; min_component_voxels {artery: 0, vein: 0} of" in said


@pytest.mark.parametrize(
    ("regions", "exclusive", "facts", "words"),
    [
        ({"vein": [7], "artery": [3]}, True, {}, "regions vein (vein), artery (artery), one in ea"),
        (TREES, False, {}, "artery (artery), vein (vein), that may overlap for artery (artery), v"),
        (TREES, True, {"classes": {"artery": 7, "vein": 3}}, "artery (vein), vein (artery), one "),
        (NESTED, False, {}, "regions vessel (artery+vein), artery (artery), that may overlap for "),
        ({"artery+vein": [3, 7]}, False, {}, "regions one foreground for artery (artery), vein ("),
    ],
)
def test_networks_that_tell_other_regions_apart_are_not_averaged(
    made, scan, capsys, regions, exclusive, facts, words
):
    paths = made(TREES, True, name="x"), made(regions, exclusive, name="y", **facts)
    (fault,) = faults_of(capsys, "--ckpt", *paths, *scan)
    assert words in fault and fault.endswith("average those of one kind")


def test_classes_of_one_name_and_order_are_averaged_whatever_their_ids(made, scan, tmp_path):
    other = {"classes": {"background": 0, "artery": 1, "vein": 2}, "foreground": [1, 2]}
    paths = made(TREES, True, name="x"), made({"artery": [1], "vein": [2]}, True, name="y", **other)
    infer_ok("--ckpt", *paths, *scan)
    assert set(np.unique(read(tmp_path / "out" / "a.nii.gz"))) == {0, 3, 7}  # those of the first


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("regions", "exclusive", "arguments", "words"),
    [
        (TREES, True, ["inference.threshold=0.5"], "inference.threshold: expected none, for a vo"),
        (TREES, True, ["postprocess.hysteresis=0.5"], "postprocess.hysteresis: expected none, fo"),
        (NESTED, False, ["inference.threshold={vein: 0.5}"], "among vessel, artery, got vein"),
        (TREES, True, ["postprocess.min_component_voxels.nerve=5"], "among artery, vein, got ner"),
        (TREES, True, ["--submission", "s.zip"], "of one foreground, .* tells artery, vein apart"),
        (
            NESTED,
            False,
            ["data.regions.vessel=[artery]"],
            "data.regions.vessel: expected a setting",
        ),
        (TREES, True, ["inference.threshold={artery: 2}"], "threshold.artery: expected a number l"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    made, scan, tmp_path, capsys, regions, exclusive, arguments, words
):
    (fault,) = faults_of(capsys, "--ckpt", made(regions, exclusive), *scan, *arguments)
    assert re.search(words, fault)
    assert not (tmp_path / "out").exists()
