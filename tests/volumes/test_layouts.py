"""Which files make a case: one of each id, what goes together said, channels without a gap."""

import json

import h5py
import numpy as np
import pytest

from volumes import layouts
from volumes.layouts import RawCase
from volumes.volume import InputErrors


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def nnunet(root, images, labels=("c",), **declared):
    """A root of two channels."""
    touch(*(root / "imagesTr" / name for name in images))
    touch(*(root / "labelsTr" / f"{name}.nii.gz" for name in labels))
    about = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "x": 1}}
    (root / "dataset.json").write_text(json.dumps(about | declared))
    return layouts.find_cases(root)


def two(name):
    return [f"{name}_0000.nii.gz", f"{name}_0001.nii.gz"]


# ---------------------------------------------------------------------------- pairs


def test_an_image_matched_by_the_beginning_of_its_name_is_noted(tmp_path):
    touch(tmp_path / "i" / "s1_t2.tif", tmp_path / "i" / "s2.tif")
    touch(tmp_path / "l" / "s1.tif", tmp_path / "l" / "s2_lbl.tif")
    layout = layouts.find_cases(tmp_path / "i", tmp_path / "l")
    assert [case.id for case in layout.cases] == ["s1", "s2"] and not layout.faults
    assert layout.notes == [
        f"matched by the beginning of their names: {tmp_path}/i/s1_t2.tif with {tmp_path}/l/s1.tif"
    ]


def test_two_images_of_one_label_are_a_fault_that_names_both(tmp_path):
    touch(tmp_path / "i" / "s1_t1.tif", tmp_path / "i" / "s1_t2.tif", tmp_path / "l" / "s1.tif")
    (fault,) = layouts.find_cases(tmp_path / "i", tmp_path / "l").faults
    assert fault.startswith("case s1: expected one file of this id, got 2")
    assert "s1_t1.tif" in fault and "s1_t2.tif" in fault


@pytest.mark.parametrize("second", ["a.nii.gz", "a_seg.tif", "a_labels_v1.nii"])
def test_two_labels_of_one_id_are_a_fault_that_names_both(tmp_path, second):
    touch(tmp_path / "i" / "a.tif", tmp_path / "l" / "a.tif", tmp_path / "l" / second)
    (fault,) = layouts.find_cases(tmp_path / "i", tmp_path / "l").faults
    assert "l/a.tif" in fault and f"l/{second}" in fault


def test_names_in_two_forms_of_unicode_are_a_pair_and_it_is_noted(tmp_path):
    touch(tmp_path / "i" / "Zoe\u0308.tif", tmp_path / "l" / "Zo\u00eb.tif")
    layout = layouts.find_cases(tmp_path / "i", tmp_path / "l")
    assert [case.id for case in layout.cases] == ["Zo\u00eb"]
    assert "though their names differ in Unicode form" in layout.notes[0]


def test_channel_files_are_one_case_in_a_plain_folder_too(tmp_path):
    touch(*(tmp_path / "i" / name for name in two("a")), tmp_path / "l" / "a.nii.gz")
    labeled, bare = layouts.find_cases(tmp_path / "i", tmp_path / "l"), tmp_path / "i"
    images = tuple(f"{bare}/{name}" for name in two("a"))
    assert labeled.cases == [RawCase("a", images, f"{tmp_path}/l/a.nii.gz", "a")]
    assert layouts.find_cases(bare).cases == [RawCase("a", images, None, "a")]


def test_the_same_note_on_one_folder_is_said_once(tmp_path):
    touch(tmp_path / "a_img.tif", tmp_path / "a_lbl.tif", tmp_path / "b.xyz")
    layout = layouts.find_cases(tmp_path, tmp_path)
    assert layout.notes == [f"{tmp_path}: passed over 1 .xyz file, e.g. b.xyz"]


# ---------------------------------------------------------------------------- nnU-Net and MSD


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (["c_0000.nii.gz", "c_0002.nii.gz"], "case c: expected channels numbered 0000, 0001"),
        ([*two("c"), "c_0001.tif"], "c_0001.nii.gz, "),
        ([*two("c"), "c_0002.nii.gz"], "expected 2 channels as in dataset.json, got 3"),
        (["c_0000.nii.gz"], "expected 2 channels as in dataset.json, got 1"),
        (["c_0001.nii.gz"], "case c: expected an image of this id"),
        ([*two("c"), "c.nii.gz"], "case c: expected one file of this id, got 2"),
    ],
)
def test_channels_that_are_missing_doubled_or_beyond_are_faults(tmp_path, images, words):
    layout = nnunet(tmp_path, [*images, *two("e")], "ce")
    assert any(words in fault for fault in layout.faults)
    assert "e" in [case.id for case in layout.cases]


def test_what_dataset_json_says_otherwise_is_noted(tmp_path):
    listed = [{"image": f"./imagesTr/{name}.nii.gz", "label": ""} for name in ("c", "gone")]
    about = {"numTraining": 5, "file_ending": ".nrrd", "training": listed}
    layout = nnunet(tmp_path, two("c") + two("e"), "ce", **about)
    path, images = tmp_path / "dataset.json", f"{tmp_path}/imagesTr"
    assert not layout.faults and [len(case.images) for case in layout.cases] == [2, 2]
    assert layout.notes == [
        f"{path}: numTraining is 5, but imagesTr holds 2 cases",
        f"{path}: file_ending is .nrrd, taken too: {images}/c_0000.nii.gz, {images}/c_0001.nii.gz, "
        f"{tmp_path}/labelsTr/c.nii.gz, {images}/e_0000.nii.gz, {images}/e_0001.nii.gz and 1 more",
        f"{path}: `training` lists 1 cases that have no file: gone",
        f"{path}: `training` does not list, taken too: e",
    ]


def test_a_root_that_says_what_is_there_gives_no_note(tmp_path):
    listed = [{"image": "./imagesTr/c_0000.nii.gz"}]
    about = {"numTraining": 1, "file_ending": ".nii.gz", "training": listed}
    assert nnunet(tmp_path, two("c"), **about).notes == []


@pytest.mark.parametrize(
    "odd",
    [
        {"training": 5, "numTraining": "1"},
        {"training": [{"label": "x"}, 3], "file_ending": None},
        {"training": {"a": 1}, "numTraining": 1},
        {"training": ["./imagesTr/c_0000.nii.gz"]},
    ],
)
def test_a_description_of_another_form_does_no_harm(tmp_path, odd):
    layout = nnunet(tmp_path, two("c"), **odd)
    assert (layout.notes, layout.faults, [case.id for case in layout.cases]) == ([], [], ["c"])


def test_labels_behind_a_link_to_nothing_are_a_fault_and_none_are_a_note(tmp_path):
    layout = nnunet(tmp_path, two("c"), labels=())
    assert layout.notes == [f"{tmp_path}: no labelsTr, so its cases are without label"]
    (tmp_path / "labelsTr").symlink_to("/nowhere")
    assert (
        "a link to /nowhere, where nothing can be opened" in layouts.find_cases(tmp_path).faults[0]
    )


def test_test_images_that_are_left_out_are_noted(tmp_path):
    touch(*(tmp_path / "imagesTs" / name for name in two("t")))
    layout = nnunet(tmp_path, two("c"))
    assert layout.notes == [f"{tmp_path}/imagesTs: passed over, --test-images adds it"]
    ids = [case.id for case in layouts.find_cases(tmp_path, test_images=True).cases]
    assert ids == ["c", "t"]


@pytest.mark.parametrize(
    ("labels", "what"),
    [({"0": "none", "1": "a", "2": "a"}, "name"), ({"background": 0, "a": 1, "b": 1}, "id")],
)
def test_two_classes_of_one_name_or_id_are_a_fault(tmp_path, labels, what):
    nnunet(tmp_path, two("c"))
    about = {"modality": {"0": "CT", "1": "PT"}, "labels": labels}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    (fault,) = layouts.find_cases(tmp_path).faults
    assert f"two classes of one {what}" in fault


# ---------------------------------------------------------------------------- Vesuvius and tables


def test_two_files_of_one_vesuvius_id_are_a_fault(tmp_path):
    touch(tmp_path / "train_images" / "1.tif", tmp_path / "train_images" / "1.nii.gz")
    touch(tmp_path / "train_labels" / "1.tif")
    (tmp_path / "train.csv").write_text("id,scroll_id\n1,7\n1,7\n")
    (fault,) = layouts.find_cases(tmp_path).faults
    assert "1.nii.gz" in fault and "1.tif" in fault
    (tmp_path / "train.csv").write_text("id,scroll_id\n1,7\n1,8\n")
    (fault,) = layouts.find_cases(tmp_path).faults
    assert fault.endswith(
        "line 3: expected one scroll_id of 1, got 8 after 7; correct one of the rows"
    )


def test_a_vesuvius_label_without_an_image_is_a_fault(tmp_path):
    touch(*(tmp_path / f"train_{kind}s" / "1.tif" for kind in ("image", "label")))
    touch(tmp_path / "train_labels" / "2.tif")
    (tmp_path / "train.csv").write_text("id,scroll_id\n1,7\n")
    faults = layouts.find_cases(tmp_path).faults
    assert any(fault.startswith("case 2: expected an image of this id") for fault in faults)


def test_two_groups_of_one_id_are_a_fault_and_one_group_twice_is_none(tmp_path):
    cases, path = [RawCase("a", ("a.tif",), None, "a")], tmp_path / "g.csv"
    path.write_text("id,p\na,1\na ,1\n")
    assert layouts.assign_groups(cases, f"csv:{path}:p", tmp_path)[0].group == "1"
    path.write_text("id,p\na,1\na,2\n")
    with pytest.raises(InputErrors, match="line 3: expected one p of a, got 2 after 1"):
        layouts.assign_groups(cases, f"csv:{path}:p", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,z,y,x\na,3,1,1\na,7,1,1\n", "line 3: expected one row of a, got two"),
        ("id,z,y,x\na,3,5,1,0\n", "line 2: expected 4 fields as in the first line, got more"),
        ("id,z,y,x,x\na,3,5,1,0\n", "expected columns of different names, got two of x"),
    ],
)
def test_a_table_that_says_two_things_is_a_fault(tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputErrors, match=words):
        layouts.read_spacings(tmp_path / "s.csv", ["a"])


def test_the_row_of_the_very_id_comes_before_a_pattern_and_a_bracket_is_one(tmp_path):
    rows = "id,z,y,x,unit\ns*,3,1,1,um\ns[1],7,1,1,\nnobody,1,1,1,mm\n"
    (tmp_path / "s.csv").write_text(rows)
    spacings, notes = layouts.read_spacings(tmp_path / "s.csv", ["s1", "s[1]", "t"])
    assert spacings == {"s1": ((3, 1, 1), "micron"), "s[1]": ((7, 1, 1), "")}
    assert notes == [f"{tmp_path / 's.csv'}: rows that name no case: nobody"]


def test_images_without_labels_are_no_folder_of_both(tmp_path):
    for name in ("a_denoised.tif", "a_labels_v1.tif", "b_denoised.tif"):
        (tmp_path / name).touch()
    layout = layouts.find_cases(tmp_path)
    (fault,) = layout.faults
    assert "files named as their labels" in fault and "a_labels_v1.tif; give --labels too" in fault
    (tmp_path / "a_denoised.tif").unlink()  # then it is nobody's label
    assert [case.id for case in layouts.find_cases(tmp_path).cases] == ["a", "b_denoised"]
    for pattern in ("{id}.tif", "{id}_labels_v1.tif"):
        assert layouts.find_cases(tmp_path / pattern).faults == []


def test_one_hdf5_file_for_images_and_labels_is_told_its_datasets(tmp_path):
    path = str(tmp_path / "f.h5")
    with h5py.File(path, "w") as file:
        file["raw"] = file["deep/membrane"] = np.ones((2, 3, 4))
    (fault,) = layouts.find_cases(path, path).faults
    assert fault.endswith(f"than {path}; the file holds deep/membrane, raw: give {path}:NAME")
    assert layouts.find_cases(f"{path}:raw", f"{path}:deep/membrane").faults == []


def test_a_root_of_nnunet_without_its_description_is_one_sentence(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    (fault,) = layouts.find_cases(tmp_path).faults
    assert "dataset.json: expected nnU-Net's" in fault and fault.endswith("got none")
