"""Volumes found by name: patterns, Unicode, links to nothing, what is passed over."""

import os
import unicodedata
from pathlib import Path

import pytest

from volumes.files import (
    find_volumes,
    matching,
    notes_on_pairs,
    read_image,
    split_dataset,
    stem_of,
)
from volumes.volume import VolumeError

NFC, NFD = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def ids(pattern):
    return [source.id for source in find_volumes(pattern)]


@pytest.mark.parametrize("name", ["i[x]", "a*b", "{x}", "a?", "[!a]", "[z-a]"])
def test_a_folder_with_characters_of_a_pattern_is_taken_as_it_is_called(tmp_path, name):
    touch(tmp_path / name / "c_img.tif", tmp_path / name / "d_lbl.tif")
    touch(tmp_path / "ix" / "no_img.tif", tmp_path / "a1b" / "no_img.tif")
    touch(tmp_path / "ab" / "no_img.tif", tmp_path / "b" / "no_img.tif")
    assert ids(f"{tmp_path}/{name}/{{id}}_img.tif") == ["c"]
    assert ids(f"{tmp_path}/{name}/*_lbl.tif") == ["d"]
    assert ids(tmp_path / name) == ["c", "d"]


def test_a_bracket_in_a_file_name_means_itself_and_its_class(tmp_path):
    touch(tmp_path / "s[1]_a.tif", tmp_path / "s2_b.tif", tmp_path / "s3_c.tif")
    assert ids(f"{tmp_path}/s[1]_{{id}}.tif") == ["a"]
    assert ids(f"{tmp_path}/s[12]_{{id}}.tif") == ["b"]
    assert ids(f"{tmp_path}/s[!3]_{{id}}.tif") == ["b"]
    assert ids(f"{tmp_path}/s?_{{id}}.tif") == ["b", "c"]


def test_the_id_may_be_a_folder_and_stand_twice(tmp_path):
    touch(
        tmp_path / "p[1]" / "p[1]_img.tif", tmp_path / "q" / "q_img.tif", tmp_path / "q" / "r.tif"
    )
    touch(tmp_path / "s" / "other_img.tif", tmp_path / ".hidden" / ".hidden_img.tif")
    assert ids(f"{tmp_path}/{{id}}/{{id}}_img.tif") == ["p[1]", "q"]
    assert [s.path for s in find_volumes(f"{tmp_path}/{{id}}/r.tif")] == [f"{tmp_path}/q/r.tif"]


def test_a_name_is_one_in_both_forms_of_unicode(tmp_path):
    touch(tmp_path / f"{NFD}_1_img.tif")
    assert ids(f"{tmp_path}/{NFC}_{{id}}_img.tif") == ["1"]
    assert ids(tmp_path) == [f"{NFC}_1"] == [stem_of(f"{NFD}_1.tif")]
    pairs = [(NFC, f"i/{NFD}.tif", NFC, f"l/{NFC}.tif"), ("a", "i/a.tif", "a", "l/a_lbl.tif")]
    (note,) = notes_on_pairs(pairs)
    assert (
        note == f"matched though their names differ in Unicode form: i/{NFD}.tif with l/{NFC}.tif"
    )


def test_pairs_by_the_beginning_of_a_name_are_named_the_first_few_of_many():
    pairs = [(f"s{i}_t", f"s{i}_t.tif", f"s{i}", f"s{i}.tif") for i in range(7)]
    (note,) = notes_on_pairs(pairs)
    assert note.startswith("matched by the beginning of their names: s0_t.tif with s0.tif; ")
    assert note.endswith("s4_t.tif with s4.tif and 2 more")
    assert list(notes_on_pairs([("a", "a_img.tif", "a", "a_lbl.tif")])) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s[1]", ["s[1]"]),
        ("s*", ["s[1]", "s1", "s2"]),
        ("s[12]", ["s1", "s2"]),
        ("s[[]1]", ["s[1]"]),  # as glob.escape writes it
        ("*[1]", ["s[1]", "s1"]),
        (NFD, [NFC]),
        ("x", []),
    ],
)
def test_the_very_name_is_meant_before_a_pattern(pattern, expected):
    assert matching(["s[1]", "s1", "s2", NFC], pattern) == expected


def test_a_link_to_nothing_is_a_fault_that_names_it(tmp_path):
    touch(tmp_path / "a.tif", tmp_path / "p" / "q" / "img.tif")
    (tmp_path / "lost.tif").symlink_to("/nowhere/lost.tif")
    (tmp_path / "round.tif").symlink_to(tmp_path / "round.tif")
    (tmp_path / "p" / "gone").symlink_to("/nowhere")
    for text, names in (
        (tmp_path, ["lost.tif: expected a volume, got a link to /nowhere/lost.tif", "round.tif"]),
        (tmp_path / "lost.tif", ["a link to /nowhere/lost.tif"]),
        (f"{tmp_path}/l*.tif", ["lost.tif: expected a volume"]),
        (f"{tmp_path}/p/{{id}}/img.tif", ["gone: expected a folder that can be read, got a link"]),
    ):
        with pytest.raises(ValueError, match="git annex get") as caught:
            find_volumes(text)
        lines = str(caught.value).split("\n")
        assert all(name in line for name, line in zip(names, lines, strict=True))


def test_what_is_neither_file_nor_folder_is_a_fault(tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    with pytest.raises(ValueError, match=r"pipe.tif: expected a volume, got what is no file"):
        find_volumes(tmp_path)


def test_files_of_numpy_are_a_fault_that_says_where_to_read_on(tmp_path):
    touch(tmp_path / "a.npy")
    for read, path in ((find_volumes, tmp_path), (read_image, tmp_path / "a.npy")):
        with pytest.raises(VolumeError, match=r"; write arrays as HDF5 \(docs/python\.md\)$"):
            read(path)


def test_what_is_passed_over_is_one_note_and_sidecars_are_not_mentioned(tmp_path):
    touch(*(tmp_path / name for name in ("a.tif", "b.xyz", "c.XYZ", "d.abc", "IM0001")))
    touch(*(tmp_path / name for name in ("README", "x.json", "t.csv", ".hidden.xyz")))
    touch(tmp_path / "more" / "deep" / "e.tif", tmp_path / "logs" / "log.txt")
    touch(*(tmp_path / name / "0" for name in ("v.n5", "z.tif")))
    touch(*(tmp_path / name / "a.tif" for name in ("probabilities", "disagreement")))
    notes = []
    assert [s.id for s in find_volumes(tmp_path, notes)] == ["a"]
    (note,) = notes
    assert note == (
        f"{tmp_path}: passed over 1 suffixless file, e.g. IM0001; 2 .xyz files, e.g. b.xyz; "
        "1 .abc file, e.g. d.abc; 1 subfolder, e.g. more; 1 .n5 folder, e.g. v.n5; "
        "1 .tif folder, e.g. z.tif"
    )
    with pytest.raises(VolumeError, match=r"got one without any but 1 subfolder, e\.g\. deep"):
        find_volumes(tmp_path / "more")
    notes.clear()
    find_volumes(f"{tmp_path}/*.tif", notes)
    assert notes == [f"{tmp_path}/*.tif: passed over 1 .tif folder, e.g. z.tif"]


def test_a_colon_in_a_folder_or_a_file_is_no_dataset(tmp_path):
    touch(tmp_path / "set.h5:v2" / "a.tif", tmp_path / "set.h5:v2" / "b.h5", tmp_path / "x.h5:y")
    inside = f"{tmp_path}/set.h5:v2"
    assert split_dataset(f"{inside}/a.tif") == (f"{inside}/a.tif", None)
    assert split_dataset(f"{inside}/b.h5:g/a:b") == (f"{inside}/b.h5", "g/a:b")
    assert split_dataset(f"{tmp_path}/x.h5:y") == (f"{tmp_path}/x.h5:y", None)
    assert split_dataset("gone/a.h5:raw") == ("gone/a.h5", "raw")
    assert ids(inside) == ids(f"{inside}/{{id}}.*") == ["a", "b"]


def test_a_folder_that_cannot_be_read_is_a_fault(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(VolumeError, match="expected a folder that can be read, got Permission"):
        find_volumes(Path(tmp_path))


def test_a_volume_in_a_folder_that_cannot_be_entered_is_a_fault_that_says_why(
    tmp_path, monkeypatch
):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", lambda path: ["a.tif"])  # of a folder without the right x
    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(ValueError, match=r"a\.tif: expected a volume, got Permission denied"):
        find_volumes(tmp_path)
