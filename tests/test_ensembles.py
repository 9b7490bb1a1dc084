"""Several checkpoints whose probabilities are averaged: infer.py --ckpt A B, or a sweep folder."""

import json

import nibabel
import numpy as np
import pytest

from runtime import checkpoint, config, ensemble
from runtime import folder as runs
from runtime.members import read_members
from tests.test_infer import (
    expected_probs,
    faults_of,
    image_of,
    infer_ok,
    make_cases,
    network_of,
    run,
    write_nifti,
)
from tests.test_infer_parts import files_of

__all__ = ["run"]  # a fixture

IMAGE = image_of((9, 20, 18))


@pytest.fixture
def other(run, tmp_path):
    """A second run: other(changes to its settings, chosen, name=..., seed=..., **facts) -> path."""

    def make(changes=(), chosen=None, name="other", seed=3, **facts):
        state = checkpoint.load(run())
        state["config"] = config.apply_overrides(state["config"], changes)
        state["ema"] = network_of(seed)[0].state_dict()
        state["data"] |= facts
        state["loop"]["evaluations"]["chosen"] = chosen or {}
        path = tmp_path / "runs" / name / "checkpoints" / "last.pt"
        checkpoint.save(state, path)
        return path

    return make


@pytest.fixture
def scan(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", IMAGE)
    return "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out"


def read(path):
    return np.asarray(nibabel.load(path).dataobj).T


@pytest.mark.parametrize("flips", ["false", "true"])
def test_an_ensemble_is_the_mean_of_its_networks(run, other, scan, tmp_path, capsys, flips):
    about = [*scan[:2], "inference.save_probabilities=true", f"inference.flips={flips}"]
    paths = [run(), other()]
    for index, path in enumerate(paths):
        infer_ok("--ckpt", path, *about, "--output", tmp_path / str(index))
    infer_ok("--ckpt", *paths, *about, "--output", tmp_path / "out")
    each = [read(tmp_path / name / "probabilities" / "a.nii.gz") for name in ("0", "1", "out")]
    np.testing.assert_allclose(each[2], (each[0] + each[1]) / 2, atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 0.01
    if flips == "false":
        expected = (expected_probs(IMAGE) + expected_probs(IMAGE, seed=3)) / 2
        np.testing.assert_allclose(each[2], expected, atol=1e-6)
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.nii.gz"), each[2] >= 0.5)
    said = capsys.readouterr().out
    assert all(f"checkpoint {path}, step 0" in said for path in paths)


def test_threshold_and_size_are_the_means_of_those_chosen_unless_given(other, scan, capsys):
    paths = [
        other(chosen={"threshold": 0.7, "min_component_voxels": 20}, name="x"),
        other(chosen={"threshold": 0.6, "min_component_voxels": 0}, name="y"),
    ]
    infer_ok("--ckpt", *paths, *scan)
    said = capsys.readouterr().out
    assert "threshold 0.65 of 0.7, 0.6; min_component_voxels 10 of 20, 0" in said
    assert "threshold 0.65, min_component_voxels 10\n" in said
    members = read_members(map(str, paths))
    joint, _ = ensemble.joint_settings(members, ["inference.threshold=0.123456789"])
    assert joint.inference.threshold == 0.123456789
    assert joint.postprocess.min_component_voxels == 10


def test_an_ensemble_takes_the_steps_that_most_of_its_networks_took(other, scan, capsys):
    took = [
        {"hysteresis": 0.2, "max_hole_voxels": 100},
        {"hysteresis": 0.4, "max_hole_voxels": 20, "closing_radius": 1.5},
        {"closing_radius": 2.5},
    ]
    paths = [other(chosen=chosen, name=str(i)) for i, chosen in enumerate(took)]
    infer_ok("--ckpt", *paths, *scan)
    said = capsys.readouterr().out
    assert "hysteresis 0.4 of 0.2, 0.4, None; max_hole_voxels 20 of 100, 20, 0; closing" in said
    assert (
        "no flips, threshold 0.5, hysteresis 0.4, max_hole_voxels 20, closing_radius 1.5\n" in said
    )
    infer_ok("--ckpt", *paths[:2], *scan)
    assert "threshold 0.5, hysteresis 0.4, max_hole_voxels 20\n" in capsys.readouterr().out
    infer_ok("--ckpt", *paths[1:], *scan, "postprocess.hysteresis=0.3")
    assert "threshold 0.5, hysteresis 0.3, closing_radius 1.5\n" in capsys.readouterr().out


def test_one_network_predicts_with_the_steps_that_validation_took(other, scan, tmp_path):
    took = {"hysteresis": 0.48, "max_hole_voxels": 30, "closing_radius": 1.5}
    about = ["--ckpt", other(chosen=took), *scan[:2], "inference.save_probabilities=true"]
    infer_ok(*about, "--output", tmp_path / "taken")
    given = [f"postprocess.{key}={value}" for key, value in took.items()]
    infer_ok(*about[:1], other(), *about[2:], *given, "--output", tmp_path / "given")
    masks = [read(tmp_path / name / "a.nii.gz") for name in ("taken", "given")]
    np.testing.assert_array_equal(*masks)
    probs = read(tmp_path / "taken" / "probabilities" / "a.nii.gz")
    assert (masks[0] != (probs >= 0.5)).any()


def test_parts_of_an_ensemble_leave_the_files_of_one_process(run, other, scan, tmp_path):
    about = ["--ckpt", run(), other(), *scan[:2], "inference.save_probabilities=true", "--output"]
    infer_ok(*about, tmp_path / "one")
    for number in (2, 1):
        infer_ok(*about, tmp_path / "two", "--part", f"{number}/2")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_default_inputs_are_those_that_no_run_was_trained_on(run, other, tmp_path):
    make_cases(tmp_path / "cases", **{name: image_of((8, 16, 16)) for name in "abc"})
    path = other(validation=["a", "c"], test=["b"])
    members = read_members([str(run(validation=["b", "c"], test=["a"])), str(path)])
    metadata = ensemble.joint_metadata(members)
    assert (metadata["test"], metadata["validation"]) == ([], ["c"])


# ---------------------------------------------------------------------------- sweep folders


def write_ledger(folder, **runs):
    """runs: {name: (variant, status)}."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"reason": None, "scores": {}, "seconds": 1, "peak_memory": 1, "peak_gpu_memory": None}
    lines = [rest | {"run": n, "variant": v, "status": s} for n, (v, s) in runs.items()]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_sweep_folder_stands_for_all_runs_of_its_variant(other, scan, tmp_path, capsys):
    folder = tmp_path / "runs" / "folds"
    paths = [other(name=f"folds/all_fold{i}_seed0", seed=i + 1) for i in range(2)]
    write_ledger(folder, all_fold0_seed0=("all", "done"), all_fold1_seed0=("all", "done"))
    infer_ok("--ckpt", folder, *scan)
    said = capsys.readouterr().out
    assert all(f"checkpoint {path}, step 0" in said for path in paths)
    mask = (expected_probs(IMAGE, seed=1) + expected_probs(IMAGE, seed=2)) / 2 >= 0.5
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.nii.gz"), mask)


@pytest.mark.parametrize(
    "runs, said",
    [
        (
            {"a_seed0": ("a", "done"), "b_seed0": ("b", "done")},
            "expected a sweep of one variant, got a, b; give the checkpoints of one, such as "
            "FOLDER/a_*/checkpoints/last.pt",
        ),
        ({}, "expected a sweep of one variant, got no runs"),
        (
            {"a_seed0": ("a", "done"), "a_seed1": ("a", "failed")},
            "expected runs that are done, got a_seed1, which are not; do them again",
        ),
    ],
)
def test_a_sweep_that_is_no_ensemble_is_one_sentence(other, scan, tmp_path, capsys, runs, said):
    folder = tmp_path / "runs" / "s"
    for name in runs:
        other(name=f"s/{name}")
    write_ledger(folder, **runs)
    (fault,) = faults_of(capsys, "--ckpt", folder, *scan)
    assert fault.startswith(f"{folder}: {said.replace('FOLDER', str(folder))}")


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, facts, said",
    [
        ([], {"unit": "mm"}, "unit mm for micron"),
        ([], {"spacing": [0.0, 1.0, 1.0]}, "data.spacing [0.0, 1.0, 1.0] for [0.0, 0.0, 0.0]"),
        (
            [],
            {"classes": {"background": 0, "vein": 1}},
            "foreground ['vein'] for ['foreground']",
        ),
        (["data.clip_percentiles=none"], {}, "data.clip_percentiles none for 0.5-99.5"),
        ([], {"typical": True, "unit": "mm"}, "unit mm for micron, fill values known True"),
    ],
)
def test_networks_that_saw_other_data_are_refused(
    run, other, scan, tmp_path, capsys, changes, facts, said
):
    theirs = other(changes, **facts)
    ours = run()
    (fault,) = faults_of(capsys, "--ckpt", ours, theirs, *scan)
    assert fault.startswith(f"{theirs}: expected a network for such data as {ours} has seen, got ")
    assert said in fault and not (tmp_path / "out").exists()


def test_networks_that_saw_other_voxel_sizes_are_refused(run, other, scan, capsys):
    far, near = (other(name=str(k), trained_spacing=[2.0, 0.5, 0.5 * k]) for k in (2.1, 1.9))
    null = other(name="null", spacing=[None, 0.0, None])  # as zeros
    ours = run(trained_spacing=[2.0, 0.5, 0.5])
    infer_ok("--ckpt", ours, near, null, *scan)
    capsys.readouterr()
    (fault,) = faults_of(capsys, "--ckpt", ours, far, *scan)
    assert "got voxels of [2.0, 0.5, 1.05] for [2.0, 0.5, 0.5]; average those of one" in fault


@pytest.mark.parametrize(
    "change, remedy",
    [
        ("inference.flips=true", "inference.flips=false"),
        ("inference.overlap=0.25", "inference.overlap=0.5"),
        ("inference.window=[8,24,16]", "inference.window=[8,16,16]"),
        ("postprocess.closing_radius=2.0", "postprocess.closing_radius=0.0"),
    ],
)
def test_networks_that_predict_otherwise_are_refused_with_the_remedy(
    run, other, scan, capsys, change, remedy
):
    theirs, key = other([change]), change.split("=")[0]
    ours = run()
    (fault,) = faults_of(capsys, "--ckpt", ours, theirs, *scan)
    assert fault.startswith(f"{key}: expected one for all checkpoints, got ")
    assert f"({ours})" in fault and f"({theirs})" in fault and f"give {key}=VALUE" in fault
    infer_ok("--ckpt", ours, theirs, *scan, remedy)


def test_a_checkpoint_that_comes_twice_or_cannot_be_read_is_named(run, scan, tmp_path, capsys):
    path, gone = run(), tmp_path / "gone.pt"
    link = tmp_path / "runs" / "last.pt"
    faults = faults_of(capsys, "--ckpt", path, link, gone, *scan)
    assert faults[0] == f"{path}: expected each checkpoint once, got it 2 times"
    assert faults[1] == f"{link}: expected each checkpoint once, got it 2 times"
    assert faults[2].startswith(f"{gone}: expected a Lamina checkpoint, got no such file")


def test_an_ensemble_asks_for_its_output_folder(run, other, scan, capsys):
    theirs = other()
    (fault,) = faults_of(capsys, "--ckpt", run(), theirs, *scan[:2])
    assert fault == "--output: expected a folder for the predictions of several checkpoints"


def test_a_run_folder_stands_for_its_best_state_and_run_and_step_are_said(
    run, scan, tmp_path, capsys
):
    last = run()
    best = last.rename(last.with_name("best.pt"))
    runs.link_newest(tmp_path / "runs", best.parent)
    for path in (tmp_path / "runs" / "tiny", tmp_path / "runs" / "best.pt"):
        infer_ok("--ckpt", path, *scan)
        said = capsys.readouterr().out
        named = best if path.is_dir() else path
        assert f"checkpoint {named}, step 0 of run tiny, " in said
        assert f"warning: {named} is of step 0, before any training" in said
    (line,) = {*(tmp_path / "out" / "predictions.jsonl").read_text().splitlines()}
    (about,) = json.loads(line)["of"]
    assert (about["tolerance"], about["unit"], about["step"]) == (2.0, "micron", 0)
