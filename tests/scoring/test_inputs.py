"""Predictions, truths and images are matched by id; what is not the same name is said."""

import numpy as np
import pytest

from scoring import inputs
from volumes import casefile, files

MASK = np.zeros((4, 6, 8), np.uint8)
MASK[1:3, 2:4, 2:6] = 1


def masks(folder, *names, spacing=(2.0, 1.0, 1.0)):
    for name in names:
        files.write_volume(folder / name, MASK, spacing=spacing, unit="mm")
    return folder


def match(pred, truth, images=None, only=()):
    """(ids, errors, notes) of one method, or of several if pred is a dict."""
    errors, notes = [], []
    predictions = list(pred.items()) if isinstance(pred, dict) else [("m", str(pred))]
    pairs, _ = inputs.match(predictions, str(truth), images, errors, notes, only=only)
    return [pair.id for pair in pairs], errors, notes


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    return tmp_path / "p", tmp_path / "t"


def test_a_match_by_the_beginning_of_a_name_is_noted_with_both_files(folders):
    pred, truth = folders
    masks(pred, "s1_t2.tif", "s2-b.tif", "s3.tif")
    masks(truth, "s1.tif", "s2.tif", "s3.tif")
    ids, errors, notes = match(pred, truth)
    assert (ids, errors) == (["s1", "s2", "s3"], [])
    assert notes == [
        f"matched by the beginning of their names: {pred}/s1_t2.tif with {truth}/s1.tif; "
        f"{pred}/s2-b.tif with {truth}/s2.tif"
    ]


@pytest.mark.parametrize("second", ["case_1_new.tif", "case_1-2.nii.gz", "case_1_pred.tif"])
def test_two_predictions_of_one_truth_are_an_error_that_names_both(folders, second):
    pred, truth = folders
    masks(pred, "case_1.tif", second)
    masks(truth, "case_1.tif")
    ids, errors, _ = match(pred, truth)
    assert ids == [] and len(errors) == 1
    assert f"{pred}/case_1.tif" in errors[0] and f"{pred}/{second}" in errors[0]


def test_two_truths_of_one_id_are_an_error_that_names_both(folders):
    pred, truth = folders
    masks(pred, "a.tif")
    masks(truth, "a_lbl.tif", "a_mask.nii.gz")
    _, errors, _ = match(pred, truth)
    assert len(errors) == 1 and "a_lbl.tif" in errors[0] and "a_mask.nii.gz" in errors[0]


def test_a_prediction_of_a_dataset_by_the_beginning_of_its_name_is_noted(folders, tmp_path):
    pred, root = folders
    for name in ("s1", "s1_t2"):
        about = {"spacing": (2.0, 1.0, 1.0), "unit": "mm", "affine": None, "group": name}
        casefile.write_case(root / f"{name}.h5", MASK[None], MASK, **about)
    about = {"classes": {"background": 0, "foreground": 1}, "ignore_label": None, "unit": "mm"}
    casefile.write_dataset(root, **about, case_ids=["s1", "s1_t2"])
    masks(pred, "s1_t2_b.tif")  # of s1_t2, the longer beginning
    ids, errors, notes = match(pred, root)
    assert (ids, errors) == (["s1_t2"], [])
    assert f"{pred}/s1_t2_b.tif with {root}/s1_t2.h5" in notes[0]
    assert notes[1] == "truth without a prediction, not scored: s1"


def test_predictions_of_nnunet_beside_its_dataset_json_are_scored(folders):
    pred, truth = folders
    masks(pred, "a.nii.gz")
    masks(truth, "a.nii.gz")
    for text, errors in (('{"labels": {"background": 0, "x": 1}}', 0), ("broken", 1)):
        (pred / "dataset.json").write_text(text)
        assert len(match(pred, truth)[1]) == errors


def test_two_files_are_a_pair_without_a_note_and_a_folder_of_one_with_one(folders):
    pred, truth = folders
    masks(pred, "x.tif")
    masks(truth, "y.tif")
    assert match(pred / "x.tif", truth / "y.tif") == (["x"], [], [])
    ids, errors, notes = match(pred, truth / "y.tif")
    assert (ids, errors) == (["x"], [])
    assert notes == [f"the only prediction, x, is scored by {truth}/y.tif"]


def test_names_in_two_forms_of_unicode_are_matched_and_it_is_noted(folders):
    pred, truth = folders
    masks(pred, "Zoe\u0308.tif", "b.tif")
    masks(truth, "Zo\u00eb.tif", "b.tif")
    ids, errors, notes = match(pred, truth)
    assert (ids, errors) == (["Zo\u00eb", "b"], [])
    assert len(notes) == 1 and notes[0].startswith("matched though their names differ in Unicode")


def test_cases_are_chosen_by_their_very_name_first(folders):
    pred, truth = folders
    for folder in (pred, truth):
        masks(folder, "s[1].tif", "s1.tif", "s2.tif")
    assert match(pred, truth, only=["s[1]"])[0] == ["s[1]"]
    assert match(pred, truth, only=["s[12]"])[0] == ["s1", "s2"]
    assert match(pred, truth, only=["s?"])[0] == ["s1", "s2"]


def test_what_is_left_out_of_a_folder_is_noted_once(folders):
    pred, truth = folders
    masks(pred, "a.tif")
    masks(truth, "a_lbl.tif", "b.tif")
    (pred / "c.xyz").touch()
    (truth / "old").mkdir()
    masks(truth / "old", "a.tif")
    ids, errors, notes = match({"m": str(pred), "n": str(pred)}, truth)
    assert (ids, errors) == (["a"], [])
    assert notes == [
        f"{pred}: passed over 1 .xyz file, e.g. c.xyz",
        f"{truth}: passed over 1 subfolder, e.g. old",
        f"{truth}: not named as labels, left out: {truth}/b.tif",
    ]


def test_a_folder_of_probability_maps_alone_holds_no_prediction(folders):
    pred, truth = folders
    masks(pred, "a_probs.tif", "b_probs.tif")
    masks(truth, "a.tif")
    _, errors, _ = match(pred, truth)
    assert f"expected one prediction or more, got only {pred}/a_probs.tif, " in errors[0]


def test_links_to_nothing_are_errors_a_line_each(folders):
    pred, truth = folders
    masks(pred, "a.tif")
    masks(truth, "a.tif")
    for name in ("b.tif", "c.tif"):
        (pred / name).symlink_to("/nowhere")
    _, errors, _ = match(pred, truth)
    assert [error.split(":")[0] for error in errors] == [f"{pred}/b.tif", f"{pred}/c.tif"]


def test_a_dataset_behind_a_link_to_nothing_is_an_error(folders):
    pred, truth = folders
    masks(pred, "a.tif")
    masks(truth, "a.tif")
    (truth / "dataset.json").symlink_to("/nowhere")
    _, errors, _ = match(pred, truth)
    assert len(errors) == 1 and f"got {truth}/dataset.json, a link to nothing" in errors[0]


# ---------------------------------------------------------------------------- spacing


def read(pred, truth, **options):
    errors = []
    pair = inputs.Pair("a", pred, str(truth), None)
    return inputs.read(pair, inputs.ReadOptions(**options), errors), errors


def test_where_the_spacing_comes_from_is_noted_in_every_combination(tmp_path):
    with_one, none = tmp_path / "with.nii.gz", tmp_path / "none.tif"
    masks(tmp_path, "with.nii.gz")
    files.write_volume(none, MASK)
    of_none = "no file has a spacing: tolerance and distances are in voxels (--spacing)"
    of_prediction = "the truth has no spacing, that of the prediction is used (--spacing)"
    of_hand = f"{with_one} states 2 1 1 mm, --spacing is used"
    for pred, truth, option, expected in (
        (none, none, None, (of_none, (1, 1, 1), "voxels")),
        (with_one, none, None, (of_prediction, (2, 1, 1), "mm")),
        (none, with_one, None, ("", (2, 1, 1), "mm")),
        (with_one, none, (5, 1, 1), (of_hand, (5, 1, 1), "")),
        (none, none, (5, 1, 1), ("", (5, 1, 1), "")),
    ):
        case, errors = read({"m": str(pred)}, truth, spacing=option, check_spacing=option is None)
        assert errors == [] and ("".join(case.notes), case.spacing, case.unit) == expected


def test_predictions_of_two_spacings_are_an_error_where_the_truth_has_none(tmp_path):
    masks(tmp_path, "m.nii.gz")
    masks(tmp_path, "n.nii.gz", spacing=(7.0, 1.0, 1.0))
    files.write_volume(tmp_path / "t.tif", MASK)
    pred = {name: str(tmp_path / f"{name}.nii.gz") for name in "mn"}
    case, errors = read(pred, tmp_path / "t.tif")
    assert case is None and "n.nii.gz: expected the spacing of" in errors[0]
    case, errors = read(pred, tmp_path / "t.tif", spacing=(5, 1, 1), check_spacing=False)
    assert errors == [] and case.spacing == (5, 1, 1)
