import functools
import json
import math
import os
import shutil
import time
import types

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import torch

import data
import evaluate
import infer
import model
from patches import intensity
from runtime import checkpoint, config, ensemble, sliding_window
from runtime import folder as runs
from runtime.signals import CannotGoOn
from tests.runtime.test_device_memory import memory_error
from volumes import casefile, files

PATCH = (8, 16, 16)
NATIVE = [0.0, 0.0, 0.0]
# A viewer's worst case: y and z swap places, x is flipped, and the origin lies elsewhere.
TURNED = np.array([[-0.5, 0, 0, 40.0], [0, 0, 2.0, -7.0], [0, 0.5, 0, 3.0], [0, 0, 0, 1]])


def build_network(channels, strides, kernels):
    """(the project's network, whichever it is, its last convolution), in eval mode."""
    settings = config.build({"model": {"base": 4, "multipliers": (1, 2), "blocks": 1}}).model
    how = {"strides": strides, "kernels": kernels, "settings": settings.model_dump()}
    network = model.build_network(1, channels, **how).eval()
    return network, [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)][-1]


def network_of(seed, probability=None):
    torch.manual_seed(seed)
    strides = model.derive_strides(PATCH, (2, 1, 1), 2)
    kernels = model.derive_kernels(PATCH, (2, 1, 1), strides)
    network, last = build_network(1, strides, kernels)
    with torch.no_grad():  # about half of all voxels are foreground, or all as likely
        if probability is None:
            last.bias -= network(torch.randn(1, 1, *PATCH)).median()
        else:
            last.weight.zero_()
            last.bias.fill_(math.log(probability / (1 - probability)))
    return network, strides, kernels


@pytest.fixture
def run(tmp_path):
    """An untrained run with its checkpoint: run(**changes to what it knows of the data) -> path."""

    def make(ema=True, probability=None, decay=0.99, **facts):
        network, strides, kernels = network_of(1, probability)
        settings = config.build(
            {
                "sampling": {"patch": PATCH},
                "model": {"base": 4, "multipliers": (1, 2), "blocks": 1},
                "optim": {"ema": decay},
                "training": {"precision": "fp32"},  # on every processor
                "run": {"name": "tiny", "threads": 1, "device": "cpu"},
            }
        )
        state = dict.fromkeys(checkpoint.KEYS)
        averaged = ema and decay > 0
        state["model"] = network_of(2)[0].state_dict() if averaged else network.state_dict()
        state["ema"] = network.state_dict() if ema else None
        state |= {"config": settings.plain(), "loop": {"step": 0, "evaluations": {"chosen": {}}}}
        state["data"] = {
            "root": str(tmp_path / "cases"),
            "train": ["a"],
            "validation": ["b"],
            "test": [],
            "channels": 1,
            "classes": {"background": 0, "foreground": 1},
            "foreground": [1],
            "ignore_label": None,
            "spacing": NATIVE,
            "unit": "micron",
            "strides": [list(s) for s in strides],
            "kernels": [list(k) for k in kernels],
        } | facts
        path = tmp_path / "runs" / "tiny" / "checkpoints" / "last.pt"
        checkpoint.save(state, path)
        runs.link_newest(tmp_path / "runs", path.parent)
        return path

    return make


def image_of(shape, seed=0, dtype=np.uint8):
    image = np.random.default_rng(seed).integers(0, 200, shape)
    image[:, :, : shape[2] // 2] //= 4
    return image.astype(dtype)


def write_nifti(path, image, affine=TURNED):
    path.parent.mkdir(exist_ok=True)
    file = nibabel.Nifti1Image(image.T, affine)
    file.header.set_xyzt_units("micron")
    nibabel.save(file, path)


def make_cases(root, **images):
    root.mkdir()
    for case_id, image in images.items():
        about = {"spacing": (2.0, 0.5, 0.5), "unit": "micron", "affine": TURNED, "group": case_id}
        casefile.write_case(
            root / f"{case_id}.h5", image[None], **about, source_image=f"{case_id}.tif"
        )
    about = {"classes": {"background": 0, "foreground": 1}, "ignore_label": None, "unit": "micron"}
    casefile.write_dataset(root, **about, case_ids=list(images))


def expected_probs(image, ratio=(1, 1, 1), seed=1, network=None, **how):
    """What an untrained network says of an image (D, H, W), put together from the modules: (D, H,
    W), or (K, D, H, W) of a network of several channels."""
    about = data.normalisation(casefile.intensity_statistics(image[None]), (0.5, 99.5))
    normalize = functools.partial(intensity.normalise, **about)
    network = network or network_of(seed)[0]
    probs = sliding_window.predict_volume(
        network, image[None], PATCH, normalize=normalize, ratio=ratio, **how
    )
    return probs if how else probs[0]


def infer_ok(*arguments):
    assert infer.main([str(a) for a in arguments]) == 0


def faults_of(capsys, *arguments):
    assert infer.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip().split("\n")


# ---------------------------------------------------------------------------- what is written


def test_nifti_prediction_lies_on_its_image(run, tmp_path, capsys):
    image = image_of((9, 20, 18))
    write_nifti(tmp_path / "scan_0000.nii.gz", image)
    infer_ok("--ckpt", run(), "--input", tmp_path / "scan_0000.nii.gz")
    file = nibabel.load(tmp_path / "runs" / "tiny" / "predictions" / "scan.nii.gz")
    np.testing.assert_array_equal(file.affine, TURNED)
    assert file.header.get_xyzt_units()[0] == "micron" and file.get_data_dtype() == np.uint8
    assert file.header.get_zooms() == (0.5, 0.5, 2.0)
    mask = np.asarray(file.dataobj).T
    np.testing.assert_array_equal(mask, expected_probs(image) >= 0.5)
    assert 0 < mask.mean() < 1
    out = capsys.readouterr().out
    assert "scan: 9x20x18" in out and f"{100 * mask.mean():.2f} % foreground" in out
    assert "averaged (EMA) weights" in out


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 4), (1, 2)])  # of qform, sform
def test_a_prediction_keeps_the_forms_of_its_image_and_scores_against_it(run, tmp_path, codes):
    image = nibabel.Nifti1Image(image_of((8, 16, 16)).T, None)
    image.header.set_qform(TURNED, codes[0])
    sheared = TURNED @ [[1, 0, 0, 0], [0, 0.8, 0, 0], [0, 0.15, 1, 0], [0, 0, 0, 1]]
    image.header.set_sform(sheared if codes == (0, 4) else TURNED, codes[1])
    if codes == (0, 4):
        image.header["pixdim"][1:4] = np.linalg.norm(sheared[:3, :3], axis=0)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "a.nii.gz")
    infer_ok("--ckpt", run(), "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out")
    ours, theirs = (
        nibabel.load(f).header for f in (tmp_path / "out/a.nii.gz", tmp_path / "a.nii.gz")
    )
    for name in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    if codes[0]:
        np.testing.assert_array_equal(ours.get_qform(), theirs.get_qform())
    paths = [str(tmp_path / name) for name in ("out/a.nii.gz", "truth.nii.gz")]
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(image.dataobj) // 150, None, image.header), paths[1]
    )
    assert evaluate.main(["--pred", paths[0], "--truth", paths[1], "--scores", "dice"]) == 0


@pytest.mark.parametrize("changes", [{"ema": False}, {"decay": 0.0}], ids=str)
def test_weights_of_the_last_step_are_used_where_there_is_no_average(
    run, tmp_path, capsys, changes
):
    write_nifti(tmp_path / "a.nii", image_of((8, 16, 16)))
    infer_ok("--ckpt", run(**changes), "--input", tmp_path / "a.nii", "--output", tmp_path / "out")
    mask = files.read_label(tmp_path / "out" / "a.nii").array
    np.testing.assert_array_equal(mask, expected_probs(image_of((8, 16, 16))) >= 0.5)
    out = capsys.readouterr().out
    assert "weights of the last step" in out and "averaged" not in out


def test_tiff_prediction_is_a_tiff_of_equal_shape(run, tmp_path):
    image = image_of((5, 17, 23), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", image, compression="lzw")
    infer_ok("--ckpt", run(), "--input", tmp_path / "stack.tif", "--output", tmp_path / "out")
    mask = tifffile.imread(tmp_path / "out" / "stack.tif")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected_probs(image) >= 0.5)


def test_raw_volume_and_its_case_file_give_the_same(run, tmp_path):
    image = image_of((9, 20, 18))
    write_nifti(tmp_path / "b.nii.gz", image)
    make_cases(tmp_path / "cases", b=image)
    infer_ok("--ckpt", run(), "--input", tmp_path / "b.nii.gz", "--output", tmp_path / "raw")
    infer_ok("--ckpt", run(), "--input", tmp_path / "cases" / "b.h5", "--output", tmp_path / "case")
    raw = files.read_label(tmp_path / "raw" / "b.nii.gz").array
    np.testing.assert_array_equal(raw, tifffile.imread(tmp_path / "case" / "b.tif"))


def test_constant_network_gives_the_constant_up_to_the_border(run, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", image_of((20, 40, 23)))
    infer_ok("--ckpt", run(probability=0.3), "--input", tmp_path / "a.tif", "--output",
             tmp_path / "out", "inference.save_probabilities=true")  # fmt: skip
    probs = tifffile.imread(tmp_path / "out" / "probabilities" / "a.tif")
    assert probs.dtype == np.float32 and probs.shape == (20, 40, 23)
    np.testing.assert_allclose(probs, 0.3, atol=1e-6)
    assert not tifffile.imread(tmp_path / "out" / "a.tif").any()


@pytest.mark.parametrize("suffix", ["tif", "h5"])
def test_evaluate_finds_the_probabilities_that_were_saved(run, tmp_path, suffix):
    scan, truth = image_of((20, 40, 23)), np.zeros((20, 40, 23), np.uint8)
    truth[:10] = 1
    for folder, voxels in (("in", scan), ("truth", truth)):
        (tmp_path / folder).mkdir()
        files.write_volume(tmp_path / folder / f"a.{suffix}", voxels, spacing=(2.0, 1.0, 1.0))
    infer_ok("--ckpt", run(probability=0.3), "--input", tmp_path / "in", "--output",
             tmp_path / "out", "inference.save_probabilities=true")  # fmt: skip
    out = tmp_path / "s.json"
    about = ["--pred", tmp_path / "out", "--truth", tmp_path / "truth", "--out", out]
    assert evaluate.main([*map(str, about), "--scores", "ece"]) == 0
    (row,) = json.loads(out.read_text())["cases"]
    assert row["ece"] == pytest.approx(0.2, abs=1e-6)


def test_target_spacing_reaches_the_network_and_the_mask_keeps_the_grid(run, tmp_path):
    image = image_of((9, 40, 36))
    write_nifti(tmp_path / "fine.nii.gz", image)
    infer_ok("--ckpt", run(spacing=[0.0, 1.0, 1.0]), "--input", tmp_path / "fine.nii.gz",
             "inference.save_probabilities=true")  # fmt: skip
    folder = tmp_path / "runs" / "tiny" / "predictions"
    probs = files.read_image(folder / "probabilities" / "fine.nii.gz")
    assert probs.spacing == (2.0, 0.5, 0.5)
    np.testing.assert_allclose(probs.array[0], expected_probs(image, ratio=(1, 2, 2)), atol=1e-6)
    mask = files.read_label(folder / "fine.nii.gz").array
    np.testing.assert_array_equal(mask, probs.array[0] >= 0.5)


def test_a_spacing_by_hand_predicts_as_that_of_a_header(run, tmp_path):
    image = image_of((9, 40, 36))
    write_nifti(tmp_path / "a.nii.gz", image)
    tifffile.imwrite(tmp_path / "b.tif", image)
    ckpt, out = run(spacing=[0.0, 1.0, 1.0]), tmp_path / "out"
    infer_ok("--ckpt", ckpt, "--input", tmp_path / "a.nii.gz", "--output", out)
    infer_ok("--ckpt", ckpt, "--input", tmp_path / "b.tif", "--output", out,
             "--spacing", "2", "0.5", "0.5")  # fmt: skip
    stated, given = files.read_label(out / "a.nii.gz"), files.read_label(out / "b.tif")
    np.testing.assert_array_equal(given.array, stated.array)
    assert (given.spacing, given.unit) == ((2.0, 0.5, 0.5), "micron")


def test_settings_of_inference_take_effect(run, tmp_path):
    image = image_of((9, 20, 18))
    write_nifti(tmp_path / "a.nii.gz", image)
    probs = expected_probs(image)
    cut = float(np.quantile(probs, 0.97))  # specks, so that there is something to remove
    mask = probs >= cut
    pieces = [f"inference.threshold={cut!r}", "postprocess.min_component_voxels=4"]
    infer_ok("--ckpt", run(), "--input", tmp_path / "a.nii.gz", *pieces)
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    kept = mask & (sizes[labels] >= 4)
    written = files.read_label(tmp_path / "runs" / "tiny" / "predictions" / "a.nii.gz").array
    np.testing.assert_array_equal(written, kept)
    assert 0 < kept.sum() < mask.sum()


# ---------------------------------------------------------------------------- which inputs


def test_default_inputs_are_validation_cases_unless_there_are_test_cases(run, tmp_path, capsys):
    make_cases(tmp_path / "cases", **{name: image_of((8, 16, 16), 3) for name in "abc"})
    run()
    infer_ok("--ckpt", tmp_path / "runs" / "last.pt")
    folder = tmp_path / "runs" / "tiny" / "predictions"
    assert [p.name for p in folder.glob("*.*[!l]")] == ["b.tif"]
    assert "the run's validation cases" in capsys.readouterr().out
    run(test=["c", "a"])
    infer_ok("--ckpt", tmp_path / "runs" / "last.pt")
    assert sorted(p.name for p in folder.glob("*.*[!l]")) == ["a.tif", "b.tif", "c.tif"]
    assert "the run's test cases" in capsys.readouterr().out


def test_data_that_moved_are_named_on_the_command_line(run, tmp_path):
    make_cases(tmp_path / "elsewhere", b=image_of((8, 16, 16)))
    infer_ok("--ckpt", run(), f"data.root={tmp_path / 'elsewhere'}")
    assert (tmp_path / "runs" / "tiny" / "predictions" / "b.tif").is_file()


def test_prepared_folder_gives_all_its_cases_and_phantoms_become_nifti(run, tmp_path):
    make_cases(tmp_path / "cases", a=image_of((8, 16, 16)), b=image_of((8, 16, 16)))
    with h5py.File(tmp_path / "cases" / "a.h5", "r+") as file:
        file.attrs["source_image"] = "phantom scroll 0"
    infer_ok("--ckpt", run(), "--input", tmp_path / "cases", "--output", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.*[!l]")) == ["a.nii.gz", "b.tif"]
    np.testing.assert_array_equal(nibabel.load(tmp_path / "out" / "a.nii.gz").affine, TURNED)


def test_labels_in_a_folder_of_images_are_left_out_and_said(run, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    for name in ("a_img", "a_lbl", "b_img"):
        write_nifti(tmp_path / "both" / f"{name}.nii.gz", image_of((8, 16, 16)))
    infer_ok("--ckpt", run(), "--input", tmp_path / "both", "--output", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.*[!l]")) == ["a.nii.gz", "b.nii.gz"]
    assert "1 files named as labels left out" in capsys.readouterr().out


# ---------------------------------------------------------------------------- faults


def test_all_faults_come_at_once_and_nothing_is_written(run, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    write_nifti(folder / "good.nii.gz", image_of((8, 16, 16)))
    whole = (folder / "good.nii.gz").read_bytes()
    (folder / "short.nii.gz").write_bytes(whole[: len(whole) // 2])
    hole = image_of((8, 16, 16), dtype=np.float32)
    hole[1, 2, 3] = np.nan
    write_nifti(folder / "hole.nii.gz", hole)
    tifffile.imwrite(folder / "flat.tif", image_of((8, 16, 16))[0])
    with h5py.File(folder / "two.h5", "w") as file:
        file["image"] = np.zeros((2, 8, 16, 16), np.uint8)
    faults = faults_of(capsys, "--ckpt", run(), "--input", folder, tmp_path / "nowhere.tif",
                       "--output", tmp_path / "out", "inference.overlp=0.5")  # fmt: skip
    names = ["inference.overlp", "nowhere.tif", "flat.tif", "hole.nii.gz", "short.nii.gz", "two.h5"]
    assert len(faults) == len(names)
    assert all(sum(name in fault for fault in faults) == 1 for name in names)
    assert "inference.overlap" in faults[0] and "1 voxels of NaN" in "".join(faults)
    assert not (tmp_path / "out").exists()


def test_case_files_that_are_gone_are_named_one_by_one(run, tmp_path, capsys):
    faults = faults_of(capsys, "--ckpt", run(test=["x", "y"]))
    assert len(faults) == 2 and "x.h5" in faults[0] and "y.h5" in faults[1]
    assert all(fault.endswith("if the data lie elsewhere, give data.root=DIR") for fault in faults)


def test_run_without_cases_to_predict_asks_for_input(run, capsys):
    (fault,) = faults_of(capsys, "--ckpt", run(validation=[]))
    assert fault.startswith("--input: expected volumes")


def test_run_at_a_target_spacing_refuses_volumes_without_one(run, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "bare.tif", image_of((8, 16, 16)))
    file = nibabel.Nifti1Image(image_of((8, 16, 16)).T, np.eye(4))
    file.header.set_xyzt_units("mm")
    nibabel.save(file, tmp_path / "mm.nii")
    faults = faults_of(capsys, "--ckpt", run(spacing=[0.0, 1.0, 1.0]), "--input",
                       tmp_path / "bare.tif", tmp_path / "mm.nii")  # fmt: skip
    assert "bare.tif: expected a spacing" in faults[0]
    assert "mm.nii: expected a spacing in micron as in training, got mm" in faults[1]


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.base=8", "model.base: expected a setting of inference"),
        ("inference.window=[8,15,16]", "inference.window [8, 15, 16]: no stride fits axis y"),
        ("run.device=cuda:99", "run.device: expected auto, cpu or cuda:N"),
        ("inference.threshold=2", "inference.threshold: expected"),
    ],
)
def test_settings_that_cannot_work_are_named(run, tmp_path, capsys, override, words):
    write_nifti(tmp_path / "a.nii.gz", image_of((8, 16, 16)))
    (fault,) = faults_of(capsys, "--ckpt", run(), "--input", tmp_path / "a.nii.gz", override)
    assert fault.startswith(words)


def test_predictions_never_replace_inputs_or_each_other(run, tmp_path, capsys):
    write_nifti(tmp_path / "a.nii.gz", image_of((8, 16, 16)))
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "a_img.nii.gz")
    faults = faults_of(capsys, "--ckpt", run(), "--input", tmp_path / "a.nii.gz",
                       tmp_path / "a_img.nii.gz", "--output", tmp_path)  # fmt: skip
    assert "expected one input for this prediction" in faults[0]
    assert "would overwrite an input" in faults[1]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_checkpoint_that_is_none_gets_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    (fault,) = faults_of(capsys, "--ckpt", path)
    assert fault.startswith(f"{path}: expected a Lamina checkpoint")


def test_folder_with_a_foreign_dataset_json_is_a_folder_of_volumes(run, tmp_path):
    (tmp_path / "nnunet").mkdir()
    (tmp_path / "nnunet" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}}))
    write_nifti(tmp_path / "nnunet" / "a_0000.nii.gz", image_of((8, 16, 16)))
    infer_ok("--ckpt", run(), "--input", tmp_path / "nnunet", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "a.nii.gz").is_file()


def test_predictions_never_replace_the_raw_file_of_a_case(run, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.tif").write_bytes(b"raw")
    make_cases(tmp_path / "cases", a=image_of((8, 16, 16)))
    with h5py.File(tmp_path / "cases" / "a.h5", "r+") as file:
        file.attrs["source_image"] = str(tmp_path / "raw" / "a.tif")
    case = ("--input", tmp_path / "cases" / "a.h5")
    (fault,) = faults_of(capsys, "--ckpt", run(), *case, "--output", tmp_path / "raw")
    assert "would overwrite an input" in fault
    (fault,) = faults_of(capsys, "--ckpt", run(), *case, "--output", tmp_path / "p.nii.gz")
    assert "expected a folder or a .zarr, got the name of a file" in fault


# ---------------------------------------------------------------------------- memory


def test_prediction_goes_on_with_less_memory_and_the_next_volume_begins_there(
    run, tmp_path, capsys, monkeypatch
):
    image = image_of((9, 20, 18))
    for name in ("a", "b"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", image)
    call, failed, names = sliding_window._call, [], iter(["find", "plans", "cudnn 9"])

    def small(network, patches, *rest):
        if len(patches) > 1 or not failed or failed[-1] > 1:
            failed.append(len(patches))
            raise memory_error(next(names))
        return call(network, patches, *rest)

    monkeypatch.setattr(sliding_window, "_call", small)
    infer_ok("--ckpt", run(), "--input", tmp_path / "scans", "inference.batch=4")
    assert failed == [4, 2, 1]
    mask = np.asarray(nibabel.load(tmp_path / "runs/tiny/predictions/b.nii.gz").dataobj).T
    np.testing.assert_array_equal(mask, expected_probs(image) >= 0.5)
    assert "the results on the CPU" in capsys.readouterr().out


def test_a_window_that_fits_in_no_way_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", image_of((9, 20, 18)))

    def never(network, patches, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sliding_window, "_call", never)
    assert infer.main(["--ckpt", str(run()), "--input", str(tmp_path / "a.nii.gz")]) == 1
    error = capsys.readouterr().err
    assert "lower inference.window" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs/tiny/predictions/a.nii.gz").exists()


# ---------------------------------------------------------------------------- damaged files


def test_a_case_that_is_cut_off_is_named_before_anything_is_predicted(run, tmp_path, capsys):
    make_cases(tmp_path / "data", a=image_of((9, 20, 18)), b=image_of((9, 20, 18)))
    os.truncate(tmp_path / "data" / "b.h5", 3000)
    inputs = [tmp_path / "data" / f"{name}.h5" for name in "ab"]
    (fault,) = faults_of(capsys, "--ckpt", run(), "--input", *inputs)
    assert fault.startswith(f"{inputs[1]}: expected a whole .h5 file, got one that cannot be read")
    assert not (tmp_path / "runs/tiny/predictions").exists()


def test_a_case_whose_voxels_cannot_be_read_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    make_cases(tmp_path / "data", a=image_of((9, 20, 18)))

    def unreadable(*arguments, **how):
        raise OSError("Can't synchronously read data (filter returned failure during read)")

    monkeypatch.setattr(ensemble, "predict_case", unreadable)
    assert infer.main(["--ckpt", str(run()), "--input", str(tmp_path / "data" / "a.h5")]) == 1
    error = capsys.readouterr().err
    assert "a: " in error and "a.h5: expected a volume that can be read" in error
    assert len(error.splitlines()) == 1


def test_a_volume_that_is_gone_when_its_turn_comes_is_one_sentence(
    run, tmp_path, capsys, monkeypatch
):
    scans = [tmp_path / f"{name}.nii.gz" for name in "ab"]
    for scan in scans:
        write_nifti(scan, image_of((8, 16, 16)))
    slabs = ensemble.predict_case

    def last_of_the_folder(*arguments, **how):
        scans[1].unlink(missing_ok=True)
        return slabs(*arguments, **how)

    monkeypatch.setattr(ensemble, "predict_case", last_of_the_folder)
    arguments = ["--ckpt", run(), "--input", *scans, "--output", tmp_path / "out"]
    assert infer.main([str(a) for a in arguments]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"b: {scans[1]}: expected a") and "none there" in error
    assert [p.name for p in (tmp_path / "out").glob("*.*[!l]")] == ["a.nii.gz"]


def test_a_submission_that_cannot_be_opened_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    def full(path):
        raise OSError("no space left on device")

    write_nifti(tmp_path / "a.nii", image_of((8, 16, 16)))
    monkeypatch.setattr(infer, "open_submission", full)
    target = tmp_path / "s.zip"
    arguments = ["--ckpt", run(), "--input", tmp_path / "a.nii", "--submission", target]
    assert infer.main([str(a) for a in arguments]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"{target}: the submission cannot be written (no space left on device)"


# ---------------------------------------------------------------------------- the others go on


def three_scans(tmp_path):
    for seed, name in enumerate("abc"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", image_of((8, 16, 16), seed))
    return ["--input", str(tmp_path / "scans"), "--output", str(tmp_path / "out")]


def test_voxels_far_from_those_of_training_are_noted(run, tmp_path, capsys):
    write_nifti(tmp_path / "a.nii.gz", image_of((8, 16, 16)))
    volume = files.read_image(tmp_path / "a.nii.gz")
    for times, said in ((1.9, False), (2.1, True), (1 / 1.9, False), (1 / 2.1, True)):
        trained = [times * size for size in volume.spacing]
        ckpt = run(trained_spacing=trained, unit=volume.unit)
        infer_ok("--ckpt", ckpt, "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "o")
        assert ("a.nii.gz: voxels of" in capsys.readouterr().out) == said


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))


def order_of_work(monkeypatch, is_asynchronous, fails=()):
    """(what was done with volumes a, b, c, {id: sentence} of those that failed)."""
    events, about_to_write = [], {"a": "predict b", "b": "predict c"}
    inputs = [types.SimpleNamespace(id=name, shape=(1, 1, 1)) for name in "abc"]

    def predict(predictor, volume, console):
        events.append(f"predict {volume.id}")
        return volume.id

    def write(predictor, volume, whole, output):
        assert whole == volume.id
        end = time.monotonic() + 20
        while is_asynchronous and about_to_write.get(whole, events[0]) not in events:
            assert time.monotonic() < end
            time.sleep(0.001)
        if whole in fails:
            raise CannotGoOn("the prediction cannot be written (no space left on device)")
        events.append(f"write {whole}")
        return [], "a clause"

    monkeypatch.setattr(infer, "predict_whole", predict)
    monkeypatch.setattr(infer, "write_prediction", write)
    monkeypatch.setattr(infer, "is_asynchronous", lambda device: is_asynchronous)
    predictor = types.SimpleNamespace(device="a device")
    return events, infer.predict_all(predictor, inputs, None, infer.PartConsole(None))


def test_beside_a_gpu_a_volume_is_written_while_the_next_is_predicted(monkeypatch, capsys):
    events, failures = order_of_work(monkeypatch, True)
    # No more than two are in memory: a is written before c is predicted.
    assert events == ["predict a", "predict b", "write a", "predict c", "write b", "write c"]
    assert failures == {} and [line[:6] for line in capsys.readouterr().out.splitlines()] == [
        *("1/3 a:", "2/3 b:", "3/3 c:")
    ]


def test_beside_a_cpu_a_volume_is_written_before_the_next_is_predicted(monkeypatch):
    events, _ = order_of_work(monkeypatch, False)
    assert events == [f"{what} {name}" for name in "abc" for what in ("predict", "write")]


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_volume_that_a_thread_cannot_write_is_named_and_the_others_are_written(
    monkeypatch, is_asynchronous
):
    events, failures = order_of_work(monkeypatch, is_asynchronous, fails="b")
    assert failures == {"b": "b: the prediction cannot be written (no space left on device)"}
    assert [event for event in events if "write" in event] == ["write a", "write c"]


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError("Unable to allocate 3 TiB"), "b: memory ran out (Unable to allocate 3 TiB)"),
        (OSError("filter returned failure"), "b.nii.gz: expected a volume that can be read, got"),
        (KeyError("image"), "b: KeyError, see above"),
    ],
)
def test_a_volume_that_fails_is_named_and_the_others_are_predicted(
    run, tmp_path, capsys, monkeypatch, error, said
):
    arguments, calls, slabs = three_scans(tmp_path), [], ensemble.predict_case

    def second_fails(*arguments, **how):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return slabs(*arguments, **how)

    monkeypatch.setattr(ensemble, "predict_case", second_fails)
    target = tmp_path / "s.zip"
    assert infer.main(["--ckpt", str(run()), *arguments, "--submission", str(target)]) == 1
    out, err = capsys.readouterr()
    assert written(tmp_path) == ["a.nii.gz", "c.nii.gz"] and not target.exists()
    *_, failure, last = err.splitlines()
    assert said in failure and "3/3 c: 8x16x16" in out
    assert last == "--submission: not written, for masks are missing"


def test_a_prediction_that_cannot_be_written_does_not_stop_the_others(
    run, tmp_path, capsys, monkeypatch
):
    arguments, write = three_scans(tmp_path), infer.write_volume

    def full_once(path, *arguments, **how):
        if path.name == "a.nii.gz":
            raise OSError(28, "No space left on device")
        write(path, *arguments, **how)

    monkeypatch.setattr(infer, "write_volume", full_once)
    assert infer.main(["--ckpt", str(run()), *arguments]) == 1
    (failure,) = capsys.readouterr().err.splitlines()
    assert failure.startswith("a: the prediction cannot be written ([Errno 28] No space left")
    assert written(tmp_path) == ["b.nii.gz", "c.nii.gz"]


def test_what_cannot_be_written_or_shown_is_found_before_the_first_prediction(
    run, tmp_path, capsys
):
    arguments = three_scans(tmp_path)
    (tmp_path / "out" / "b.nii.gz").mkdir(parents=True)
    (fault,) = faults_of(capsys, "--ckpt", run(), *arguments)
    assert "b.nii.gz: expected a file to write, got a folder" in fault
    (tmp_path / "out" / "b.nii.gz").rmdir()
    faults = faults_of(capsys, "--ckpt", run(spacing=[2000.0, 500.0, 500.0]), *arguments)
    assert len(faults) == 3 and all("data.spacing: expected" in fault for fault in faults)
    assert written(tmp_path) == []


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_case_with_an_affine_of_no_axes_is_found_before_the_first_prediction(
    run, tmp_path, capsys, value
):
    make_cases(tmp_path / "data", a=image_of((8, 16, 16)), b=image_of((8, 16, 16)))
    with h5py.File(tmp_path / "data" / "b.h5", "a") as file:
        file.attrs["affine"] = np.full((4, 4), value)
    arguments = ("--input", tmp_path / "data", "--output", tmp_path / "out")
    (fault,) = faults_of(capsys, "--ckpt", run(), *arguments)
    assert "b.h5: expected an affine that can be inverted, got" in fault


# ---------------------------------------------------------------------------- numbers


def probabilities(tmp_path, checkpoint, **images):
    for name, image in images.items():
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", image)
    infer_ok("--ckpt", checkpoint, "--input", tmp_path / "scans", "--output", tmp_path / "out",
             "inference.save_probabilities=true")  # fmt: skip
    folder = tmp_path / "out" / "probabilities"
    return [nibabel.load(folder / f"{name}.nii.gz").get_fdata() for name in images]


def test_the_scale_of_an_image_does_not_change_its_prediction(run, tmp_path):
    image = image_of((8, 16, 16), dtype=np.float32) + 1
    scaled = {f"p{i}": image * np.float32(2.0**p) for i, p in enumerate((-100, -40, 30, 90))}
    plain, *others = probabilities(tmp_path, run(), plain=image, **scaled)
    assert np.ptp(plain) > 0.01 and all((other == plain).all() for other in others)


@pytest.mark.parametrize("fill", [-3.4e38, -1e4, 65535])
def test_a_fill_value_is_clipped_and_not_in_the_statistics(run, tmp_path, fill):
    image = image_of((8, 16, 40), dtype=np.float32) + 1
    image[:, :, 20:] = fill
    rest = image[:, :, :20].astype(np.float64)
    low, high = np.percentile(rest, (0.5, 99.5))
    about = {"mean": [rest.mean()], "std": [rest.std()], "low": [low], "high": [high]}
    normalize = functools.partial(intensity.normalise, **about)
    expected = sliding_window.predict_volume(
        network_of(1)[0], image[None], PATCH, normalize=normalize
    )[0]
    (probs,) = probabilities(tmp_path, run(typical=True), a=image)
    assert np.ptp(expected) > 0.01 and np.abs(probs.T - expected).max() < 1e-5


def test_a_run_that_knew_no_fill_values_predicts_as_it_was_trained(run, tmp_path):
    image = image_of((8, 16, 40), dtype=np.float32) + 1
    image[:, :, 20:] = -1e4
    low, high = np.percentile(image, (0.5, 99.5))
    about = {"mean": [image.mean(dtype=np.float64)], "std": [image.std(dtype=np.float64)]}
    normalize = functools.partial(intensity.normalise, **about, low=[low], high=[high])
    expected = sliding_window.predict_volume(
        network_of(1)[0], image[None], PATCH, normalize=normalize
    )[0]
    (probs,) = probabilities(tmp_path, run(), a=image)
    assert np.abs(probs.T - expected).max() < 1e-6


def test_a_blank_image_is_said_to_be_one(run, tmp_path, capsys):
    write_nifti(tmp_path / "a.nii.gz", np.zeros((8, 16, 16), np.uint8))
    infer_ok("--ckpt", run(), "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out")
    assert "a.nii.gz: channel 0 is 0 in all voxels" in capsys.readouterr().out
