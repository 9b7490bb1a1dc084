"""prepare.py --bbox and .zarr files: which voxels become cases, of which group, what is refused."""

import csv

import nibabel
import numpy as np
import pytest
import tifffile

import evaluate
import prepare
from tests.volumes.test_ome_zarr import chunk_files
from tests.volumes.zarrs import add_label, write_zarr
from volumes import casefile

SHAPE = (20, 24, 28)


def voxels(shape=SHAPE):
    return np.random.default_rng(0).integers(1, 200, shape).astype(np.uint8)


@pytest.fixture
def scroll(tmp_path):
    """An image of 20x24x28 voxels with its label inside; returns (path, image, label)."""
    image = voxels()
    label = (image > 100).astype(np.uint8)
    path = write_zarr(tmp_path / "scroll.zarr", [image, image[::2, ::2, ::2]], "0.5", shard=16)
    add_label(path, "ink", [label], "0.5")
    return path, image, label


def run(*arguments):
    return prepare.main([*(str(argument) for argument in arguments), "--workers", "1"])


def refused(capsys, tmp_path, *arguments):
    assert run(*arguments, "--out", tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    return capsys.readouterr().err.splitlines()[:-1]


def cases_in(folder):
    """{id: (Case, image, label)}"""
    everything = (slice(None),) * 3
    cases = casefile.read_dataset(folder).cases
    return {
        name: (
            case,
            casefile.read_array(case, "image", (0, *everything)),
            casefile.read_array(case, "label", everything),
        )
        for name, case in cases.items()
    }


def test_boxes_of_a_zarr_are_cases_of_one_group(scroll, tmp_path):
    path, image, label = scroll
    boxes = ("--bbox", "a=0:8,4:20,:", "b=8:,0:24,2:28")
    out = tmp_path / "out"
    assert run("--images", path, "--labels", f"{path}/labels/ink", "--out", out, *boxes) == 0
    cases = cases_in(out)
    for name, box in {"scroll_a": np.s_[0:8, 4:20], "scroll_b": np.s_[8:, :, 2:]}.items():
        case, voxels_of_case, label_of_case = cases[name]
        assert np.array_equal(voxels_of_case, image[box])
        assert np.array_equal(label_of_case, label[box])
        assert (case.group, case.spacing, case.unit) == ("scroll", (4.0, 2.0, 2.0), "micron")
    assert cases["scroll_a"][0].planes == (0, 8, 4, 20, 0, 28)


def test_of_a_zarr_a_box_alone_is_read(scroll, tmp_path):
    path, image, _ = scroll
    for key, file in chunk_files(path).items():
        if key != "c/0/0/0":
            file.write_bytes(b"damaged")
    assert run("--images", path, "--out", tmp_path / "out", "--bbox", "a=2:9,0:16,3:16") == 0
    case = casefile.read_dataset(tmp_path / "out").cases["scroll_a"]
    assert np.array_equal(casefile.read_array(case, "image", np.s_[0]), image[2:9, :16, 3:16])
    box = ("--bbox", "a=2:9,0:17,3:16")
    assert run("--images", path, "--out", tmp_path / "out", *box) == 2


def test_a_box_of_another_format_keeps_its_place(tmp_path):
    image = nibabel.Nifti1Image(voxels().T, np.diag([2.0, 3.0, 4.0, 1.0]))
    nibabel.save(image, tmp_path / "s_img.nii")
    tifffile.imwrite(tmp_path / "s_lbl.tif", (voxels() > 100).astype(np.uint8))
    names = ("--images", tmp_path / "s_img.nii", "--labels", tmp_path / "s_lbl.tif")
    assert run(*names, "--out", tmp_path / "out", "--bbox", "a=1:9,2:20,3:28") == 0
    _, cut, label = cases_in(tmp_path / "out")["s_a"]
    assert np.array_equal(cut, voxels()[1:9, 2:20, 3:28]) and np.array_equal(label, cut > 100)
    with casefile.opened(casefile.read_dataset(tmp_path / "out").cases["s_a"]) as file:
        assert file.attrs["affine"][:3, 3].tolist() == [3 * 2.0, 2 * 3.0, 1 * 4.0]


def test_a_label_may_be_that_of_the_box_alone(scroll, tmp_path, capsys):
    path, _, label = scroll
    tifffile.imwrite(tmp_path / "cube.tif", label[8:16, 8:24, 4:20])
    names = ("--images", path, "--labels", tmp_path / "cube.tif")
    assert run(*names, "--out", tmp_path / "out", "--bbox", "a=8:16,8:24,4:20") == 0
    _, image, written = cases_in(tmp_path / "out")["scroll_a"]
    assert np.array_equal(written, label[8:16, 8:24, 4:20]) and np.array_equal(written, image > 100)
    capsys.readouterr()
    assert run(*names, "--out", tmp_path / "other", "--bbox", "a=8:16,8:24,4:21") == 2
    fault = capsys.readouterr().err.splitlines()[0]
    assert fault.startswith(
        f"{tmp_path / 'cube.tif'}: expected a box within its (8, 16, 16) voxels"
    )
    assert fault.endswith("correct the box or give a label of just the box")


def test_volumes_of_other_shapes_are_a_fault_although_the_box_is_in_both(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "s_img.tif", voxels())
    tifffile.imwrite(tmp_path / "s_lbl.tif", np.pad(voxels() > 100, 1).astype(np.uint8))
    names = ("--images", tmp_path / "s_img.tif", "--labels", tmp_path / "s_lbl.tif")
    for box in ("a=1:9,2:20,3:28", "a=:20,:24,:28"):
        (fault,) = refused(capsys, tmp_path, *names, "--bbox", box)
        assert "(20, 24, 28), got (22, 26, 30); give volumes of the same voxels" in fault


def test_boxes_that_share_voxels_are_a_note_and_of_two_groups_a_fault(scroll, tmp_path, capsys):
    path, *_ = scroll
    boxes = ("--bbox", "a=0:8,0:16,:", "b=4:9,15:20,:", "c=0:8,16:24,:")
    assert run("--images", path, "--out", tmp_path / "two", *boxes[:2], boxes[3]) == 0
    assert "same slices" not in capsys.readouterr().out
    assert run("--images", path, "--out", tmp_path / "three", *boxes) == 0
    lines = "".join(capsys.readouterr().out.split("\n"))
    assert f"scroll_a and scroll_b (z 4:8, y 15:16, x 0:28 of {path})" in lines
    assert f"scroll_b and scroll_c (z 4:8, y 16:20, x 0:28 of {path})" in lines
    assert "scroll_a and scroll_c" not in lines
    apart = ("--group-from", "regex:.*")
    (fault,) = refused(capsys, tmp_path, "--images", path, *boxes, *apart)
    assert "expected no slice of an image in two cases" in fault


def test_boxes_and_what_was_prepared_before_are_compared(scroll, tmp_path, capsys):
    path, *_ = scroll
    assert run("--images", path, "--out", tmp_path / "out", "--bbox", "a=0:8,0:16,:") == 0
    assert run("--images", path, "--out", tmp_path / "out", "--bbox", "b=0:8,16:24,:") == 0
    assert "same slices" not in capsys.readouterr().out
    assert run("--images", path, "--out", tmp_path / "out") == 0  # all of it, whose group is theirs
    assert "scroll and scroll_a, there before (z 0:8 of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("boxes", "sentence"),
    [
        (["a=0:8"], "expected NAME=Z0:Z1,Y0:Y1,X0:X1, such as train=0:80,0:256,0:256"),
        (["a=0:8,0:8,-1:8"], "expected NAME=Z0:Z1,Y0:Y1,X0:X1"),
        (["a=:,:,:", "a=:,:,:4"], "expected distinct names"),
        (["a=0:8,0:25,:"], "expected a box within its (20, 24, 28) voxels (z, y, x), got 0:8,0:25"),
        (["a=8:8,:,:"], "expected a box within its (20, 24, 28) voxels (z, y, x), got 8:8,0:24"),
        (["a=0:4,:,:", "b=:,:,30:"], "got 0:20,0:24,30:28; correct the box"),
    ],
)
def test_boxes_that_cannot_be_are_refused(scroll, tmp_path, capsys, boxes, sentence):
    (fault,) = refused(capsys, tmp_path, "--images", scroll[0], "--bbox", *boxes)
    assert sentence in fault


def test_a_box_goes_neither_with_a_crop_nor_with_a_phantom(tmp_path, capsys):
    for others in (("--images", "a.tif", "--crop", "a=0:4"), ("--phantom", "scroll")):
        with pytest.raises(SystemExit, match="2"):
            run(*others, "--bbox", "a=0:8,0:8,0:8", "--out", tmp_path / "out")
        assert "--bbox goes with --images and without --crop" in capsys.readouterr().err


def test_a_small_zarr_is_prepared_and_scored_like_any_file(scroll, tmp_path):
    path, _, label = scroll
    names = ("--images", path, "--labels", f"{path}/labels/ink")
    assert run(*names, "--out", tmp_path / "out", "--crop", "a=0:8", "b=8:") == 0
    assert np.array_equal(cases_in(tmp_path / "out")["scroll_b"][2], label[8:])
    truth = np.zeros(SHAPE, np.uint8)
    truth[4:8] = 1
    add_label(other := write_zarr(tmp_path / "other.zarr", [voxels()]), "bar", [truth])
    half = write_zarr(tmp_path / "half.zarr", [truth * (np.arange(28) < 14).astype(np.uint8)])
    command = ["--pred", half, "--truth", other, "--scores", "precision", "recall"]
    assert evaluate.main([*map(str, command), "--out", str(tmp_path / "scores.csv")]) == 0
    (row, *_) = csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    assert (row["precision"], row["recall"], row["spacing"]) == ("1.0", "0.5", "4 2 2")
