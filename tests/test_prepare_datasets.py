"""prepare.py where a dataset is there already, and where pieces of one image are cases apart."""

import json
import shutil

import h5py
import nibabel
import numpy as np
import pytest

import prepare
from volumes import casefile

SHAPE = (8, 6, 10)


@pytest.fixture
def raw(tmp_path):
    """raw(*names, folder="raw") writes an image and a label of each name."""

    def write(*names, folder="raw"):
        for name in names:
            rng = np.random.default_rng([*name.encode()])
            image = rng.integers(1, 99, SHAPE).astype(np.uint8)
            label = np.zeros(SHAPE, np.uint8)
            label[:, 2:4, 3:5] = 1
            for kind, array in (("img", image), ("lbl", label)):
                path = tmp_path / folder / f"{name}_{kind}.nii.gz"
                path.parent.mkdir(exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array.T, np.diag([1.0, 1.0, 2.0, 1.0])), path)

    return write


@pytest.fixture
def run(tmp_path, capsys):
    """run(*options, folder="raw") prepares it: (exit status, the notes, the faults)."""

    def call(*options, folder="raw"):
        root = str(tmp_path / folder)
        command = ["--images", root, "--labels", root, "--out", str(tmp_path / "out"), *options]
        status = prepare.main([*command, "--workers", "1", "--no-skeletons"])
        out, err = capsys.readouterr()
        notes = [line[6:] for line in out.splitlines() if line.startswith("note: ")]
        return status, notes, err.splitlines()[:-1]

    return call


def ids(tmp_path):
    return sorted(casefile.read_dataset(tmp_path / "out").cases)


# ---------------------------------------------------------------------------- crops


@pytest.mark.parametrize(
    ("crops", "first"),
    [(["a=0:5", "b=3:8"], 3), (["a=:", "b=6:"], 6), (["x=0:2", "a=:6", "b=5:"], 0)],
)
def test_crops_that_overlap_are_a_fault_before_anything_is_read(raw, run, tmp_path, crops, first):
    raw("s")
    status, _, faults = run("--crop", *crops)
    assert status == 2 and not (tmp_path / "out").exists()
    assert f"expected ranges that do not overlap, got slice {first} in both" in faults[0]


def test_crops_that_touch_do_not_overlap(raw, run, tmp_path):
    raw("s")
    assert run("--crop", "b=4:", "a=:4")[::2] == (0, [])
    assert ids(tmp_path) == ["s_a", "s_b"]
    assert casefile.read_dataset(tmp_path / "out").cases["s_b"].planes == (4, 8)


def test_overlapping_crops_of_one_group_are_a_note(raw, run):
    raw("s_1")
    status, notes, _ = run("--crop", "a=0:5", "b=3:8", "--group-from", "regex:^(s)")
    assert status == 0
    (note,) = [note for note in notes if "same slices" in note]
    assert "s_1_a and s_1_b (z 3:5 of " in note


def test_a_whole_case_and_its_crops_are_not_put_in_one_dataset(raw, run, tmp_path):
    raw("s")
    assert run()[0] == 0
    status, _, (fault,) = run("--crop", "a=0:5", "b=5:8")
    assert (
        status == 2
        and "s_a and s, there before (z 0:5 of " in fault
        and "s_b and s, there before (z 5:8 of " in fault
    )
    assert ids(tmp_path) == ["s"]


def test_crops_that_are_there_and_the_whole_case_are_not_put_in_one_dataset(raw, run, tmp_path):
    raw("s")
    assert run("--crop", "a=0:5")[0] == 0
    assert run("--crop", "b=5:8")[0] == 0  # the rest of the image
    assert run()[0] == 2
    status, _, (fault,) = run("--crop", "c=4:6")
    assert (
        status == 2
        and "s_c and s_a, there before (z 4:5 of " in fault
        and "s_c and s_b, there before (z 5:6 of " in fault
    )
    assert ids(tmp_path) == ["s_a", "s_b"]


def test_one_file_under_two_ids_is_a_fault(raw, run, tmp_path):
    raw("s")
    for kind in ("img", "lbl"):
        (tmp_path / "raw" / f"new_{kind}.nii.gz").symlink_to(f"s_{kind}.nii.gz")
    status, _, (fault,) = run()
    assert status == 2 and "got new and s (z 0:8 of " in fault


def test_pieces_of_two_cases_with_one_name_are_a_fault(raw, run, tmp_path):
    raw("s", "s_t")
    status, _, faults = run("--crop", "t_a=0:4", "a=4:8")
    assert status == 2 and not (tmp_path / "out").exists()
    assert faults[0].startswith("case s_t_a: expected one case of this id, got one of ")
    assert "s_img.nii.gz and one of " in faults[0] and "s_t_img.nii.gz;" in faults[0]


@pytest.mark.parametrize(("channels", "status"), [(1, 0), (2, 2)])
def test_files_without_channel_numbers_hold_the_declared_channels(
    tmp_path, capsys, channels, status
):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "nn" / folder).mkdir(parents=True)
        image = nibabel.Nifti1Image(np.indices(SHAPE)[0].astype(np.uint8) % 2, np.eye(4))
        nibabel.save(image, tmp_path / "nn" / folder / "c.nii.gz")
    names = {str(number): "MR" for number in range(channels)}
    about = {"channel_names": names, "labels": {"background": 0, "x": 1}}
    (tmp_path / "nn" / "dataset.json").write_text(json.dumps(about))
    command = ["--images", str(tmp_path / "nn"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert prepare.main(command) == status
    said = "case c: expected 2 channels as in dataset.json, got 1 in " in capsys.readouterr().err
    assert said == (status == 2)


# ---------------------------------------------------------------------------- what was there


def test_cases_that_are_kept_and_those_whose_files_are_gone_are_said(raw, run, tmp_path):
    raw("good", "bad")
    raw("more", folder="other")
    assert run()[1] == []
    for kind in ("img", "lbl"):
        (tmp_path / "raw" / f"bad_{kind}.nii.gz").unlink()
    out = tmp_path / "out"
    gone = f"kept although their raw files are gone: bad; to drop them, remove {out} and prepare"
    _, notes, _ = run()
    assert notes[:2] == [
        f"replaced in {out}: good",
        f"kept in {out} from before, not in this run: bad",
    ]
    assert notes[2].startswith(gone) and len(notes) == 3
    _, notes, _ = run(folder="other")
    assert notes[0] == f"kept in {out} from before, not in this run: bad, good"
    assert notes[1].startswith(gone)


def test_a_case_that_is_replaced_by_one_of_another_file_is_said(raw, run, tmp_path):
    raw("s")
    raw("s", "S", folder="day2")
    run()
    _, notes, _ = run(folder="day2")
    before = tmp_path / "raw" / "s_img.nii.gz"
    assert notes[0] == f"replaced in {tmp_path / 'out'}: s (of {before} before)"
    assert notes[1].endswith("by upper and lower case: S, s")


def test_a_copy_under_another_name_is_noted(raw, run, tmp_path):
    raw("a", "b")
    for kind in ("img", "lbl"):
        shutil.copy(tmp_path / f"raw/a_{kind}.nii.gz", tmp_path / f"raw/copy_{kind}.nii.gz")
    said = "images of the same shape and statistics, perhaps copies: a and copy"
    assert run()[1] == [said]
    raw("a", folder="more")  # and again beside those that were there
    assert said in run(folder="more")[1]


def test_a_case_names_its_raw_files_in_full(raw, run, tmp_path, monkeypatch):
    raw("s")
    monkeypatch.chdir(tmp_path)
    run(folder="raw")
    assert prepare.main(["--images", "raw", "--labels", "raw", "--out", "two"]) == 0
    for folder in ("out", "two"):
        with h5py.File(tmp_path / folder / "s.h5") as file:
            assert file.attrs["source_image"] == str(tmp_path / "raw" / "s_img.nii.gz")
            assert file.attrs["source_label"] == str(tmp_path / "raw" / "s_lbl.nii.gz")


def test_a_case_file_that_is_gone_is_named_with_the_ways_out(raw, run, tmp_path):
    raw("s", "t")
    run()
    (tmp_path / "out" / "t.h5").unlink()
    status, _, (fault,) = run()
    assert status == 2 and fault.startswith(f"{tmp_path / 'out' / 't.h5'}: expected a case of ")
    assert "remove its entry there" in fault and "data.root=DIR" in fault


def test_a_dataset_behind_a_link_to_nothing_is_not_written_over(raw, run, tmp_path):
    raw("s")
    run()
    path = tmp_path / "out" / "dataset.json"
    path.rename(tmp_path / "away.json")
    path.symlink_to("/nowhere/dataset.json")
    status, _, (fault,) = run()
    assert status == 2 and f"got {path}, a link to nothing" in fault and path.is_symlink()


def test_a_dataset_that_lists_a_case_twice_is_a_fault(raw, run, tmp_path):
    raw("s", "t")
    run()
    path = tmp_path / "out" / "dataset.json"
    content = json.loads(path.read_text())
    for key, value in (("id", "s"), ("file", "s.h5")):
        twice = json.loads(json.dumps(content))
        twice["cases"][1][key] = value
        path.write_text(json.dumps(twice))
        with pytest.raises(ValueError, match="other entries than one of each id"):
            casefile.read_dataset(tmp_path / "out")


def test_notes_on_names_come_with_the_faults_that_they_may_explain(raw, run, tmp_path):
    raw("s")
    (tmp_path / "raw" / "s_img.nii.gz").rename(tmp_path / "raw" / "s_t2_img.nii.gz")
    array = np.ones((3, 3, 3), np.uint8)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "raw" / "s_lbl.nii.gz")
    status, notes, faults = run()
    assert status == 2 and "expected the shape of" in faults[0]
    assert notes[0].startswith("matched by the beginning of their names: ")


def test_cases_of_before_without_a_unit_are_named_as_what_to_prepare_again(raw, run, tmp_path):
    raw("s")
    image = nibabel.load(tmp_path / "raw" / "s_img.nii.gz")
    assert run()[0] == 0
    raw("t", folder="more")
    status, _, (fault,) = run("--unit", "micron", folder="more")
    assert status == 2 and image.header.get_xyzt_units()[0] == "unknown"
    assert fault.endswith("prepare what was there before (s) again with --unit micron")


def test_sizes_in_the_order_x_y_z_are_asked_about(tmp_path, run):
    for kind, value in (("img", 9), ("lbl", 1)):
        array = np.zeros((4, 12, 12), np.uint8)
        array[:, 3:6, 3:6] = value
        path = tmp_path / "raw" / f"s_{kind}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
    for sizes, asked in (((1, 1, 5), True), ((5, 1, 1), False), ((1, 1, 1), False)):
        status, notes, _ = run("--spacing", *map(str, sizes))
        assert status == 0
        assert asked == any("z comes first, is 5 1 1 meant?" in note for note in notes)
