"""The zip of masks that the Vesuvius Challenge expects."""

import io
import zipfile

import numpy as np
import pytest
import tifffile

from volumes import submission


def mask_of(seed, shape=(5, 6, 7)):
    return (np.random.default_rng(seed).random(shape) < 0.3).astype(np.uint8)


def test_a_submission_holds_a_tiff_of_zeros_and_ones_per_id(tmp_path):
    masks = {"17": mask_of(0), "204": mask_of(1, (1, 6, 7)) == 1, "9": mask_of(2) * 0}
    with submission.open_submission(tmp_path / "new" / "s.zip") as archive:
        for case, mask in masks.items():
            archive.add(case, mask)
        assert not (tmp_path / "new" / "s.zip").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.zip"]
    with zipfile.ZipFile(tmp_path / "new" / "s.zip") as opened:
        assert opened.namelist() == ["17.tif", "204.tif", "9.tif"]
        for case, mask in masks.items():
            with tifffile.TiffFile(io.BytesIO(opened.read(f"{case}.tif"))) as tif:
                assert len(tif.pages) == len(mask)  # one for each z
                array = tif.asarray().reshape(mask.shape)
            assert array.dtype == np.uint8
            assert (array == mask).all()


def test_after_an_error_the_file_is_the_one_before(tmp_path):
    (tmp_path / "s.zip").write_text("the one before")
    with pytest.raises(KeyError), submission.open_submission(tmp_path / "s.zip") as archive:
        archive.add("1", mask_of(0))
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["s.zip"]
    assert (tmp_path / "s.zip").read_text() == "the one before"


@pytest.mark.parametrize(
    ("case", "mask"),
    [
        ("1", mask_of(0) * 255),
        ("1", mask_of(0).astype(np.float32)),
        ("1", mask_of(0)[0]),
        ("a/1", mask_of(0)),
        ("0", mask_of(0)),
    ],
    ids=["white", "float", "flat", "slash", "twice"],
)
def test_what_is_no_mask_of_a_new_case_is_refused(tmp_path, case, mask):
    with submission.open_submission(tmp_path / "s.zip") as archive:
        archive.add("0", mask_of(1))
        with pytest.raises(ValueError, match=f"{case}: expected"):
            archive.add(case, mask)


def test_a_file_that_reads_back_otherwise_is_refused(tmp_path):
    def finished(change):
        with submission.open_submission(tmp_path / "s.zip") as archive:
            archive.add("1", mask_of(0))
            change(archive)

    other = io.BytesIO()
    tifffile.imwrite(other, mask_of(5), photometric="minisblack")
    with pytest.raises(submission.SubmissionError, match=r"got 1\.tif, 2\.tif"):
        finished(lambda archive: archive.archive.writestr("2.tif", other.getvalue()))
    with pytest.raises(submission.SubmissionError, match=r"1\.tif: expected the mask that was"):
        finished(lambda archive: archive.checksums.update({"1": 0}))
    assert not (tmp_path / "s.zip").exists()


def test_names_and_ids_are_checked_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = {
        str(tmp_path / "s.tif"): "expected the name of a .zip file",
        str(tmp_path / "file" / "s.zip"): "is no such folder",
    }
    for path, words in wrong.items():
        (fault,) = submission.submission_faults(path)
        assert words in fault
    assert list(submission.submission_faults(tmp_path / "new" / "s.zip")) == []
