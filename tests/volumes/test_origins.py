"""Which checkpoint a mask was predicted with, and whether that is still the one."""

import json
import os

from volumes import origins


def checkpoint_of(path, step, content="weights"):
    path.write_text(content)
    return origins.origin(path) | {"step": step}


def masks(folder, **of):
    """{case: path} of masks that were predicted with these."""
    for case, one in of.items():
        origins.write(folder / f"{case}.tif", [one])
    return {case: folder / f"{case}.tif" for case in of}


def test_predictions_of_one_checkpoint_that_is_still_there_are_in_no_doubt(tmp_path):
    best = checkpoint_of(tmp_path / "best.pt", 4)
    assert list(origins.doubts(masks(tmp_path, a=best, b=best))) == []


def test_masks_of_other_programs_are_in_no_doubt(tmp_path):
    assert list(origins.doubts({"a": tmp_path / "a.tif"})) == []
    (tmp_path / origins.NAME).write_text('[]\n{}\nnull\n{"file": "a.ti')
    assert list(origins.doubts({"a": tmp_path / "a.tif:image"})) == []


def test_a_checkpoint_that_was_saved_anew_since_makes_predictions_stale(tmp_path):
    predictions = masks(tmp_path, a=checkpoint_of(tmp_path / "best.pt", 4))
    checkpoint_of(tmp_path / "best.pt", 8, "weights of later")
    [sentence] = origins.doubts(predictions)
    assert sentence.startswith(f"a: predicted with {tmp_path}/best.pt of step 4, which was saved")
    assert sentence.endswith(f"predict again with python infer.py --ckpt {tmp_path}/best.pt")
    os.remove(tmp_path / "best.pt")  # of which nothing is known then
    assert list(origins.doubts(predictions)) == []


def test_predictions_of_several_checkpoints_in_one_folder_are_noticed(tmp_path):
    old, new = (checkpoint_of(tmp_path / f"{name}.pt", 4) for name in ("old", "new"))
    predictions = masks(tmp_path, a=old, b=old, c=old) | masks(tmp_path, b=new)  # the later line
    predictions["d"] = tmp_path / "d.tif"
    [sentence] = origins.doubts(predictions)
    assert sentence == (
        f"predictions of several checkpoints: {tmp_path}/old.pt of step 4 (a, c); "
        f"{tmp_path}/new.pt of step 4 (b); not by infer.py (d); predict all anew with one"
    )


def test_a_line_says_the_file_and_all_checkpoints_of_an_ensemble(tmp_path):
    both = [checkpoint_of(tmp_path / f"{fold}.pt", fold) for fold in (0, 1)]
    origins.write(tmp_path / "a.nii.gz", both)
    [line] = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file": "a.nii.gz", "of": both}
    assert origins.read(tmp_path) == {"a.nii.gz": both}
