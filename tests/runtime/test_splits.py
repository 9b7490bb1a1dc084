import numpy as np
import pytest

from runtime import splits
from volumes import casefile


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, group in enumerate("aabc"):
        casefile.write_case(
            folder / f"bar{number}.h5",
            np.ones((1, 4, 4, 4), np.uint8),
            np.eye(4, dtype=np.uint8)[None].repeat(4, axis=0),
            spacing=(1, 1, 1),
            unit="",
            affine=None,
            group=group,
            skeleton=False,
        )
    ids = [f"bar{number}" for number in range(4)]
    casefile.write_dataset(
        folder, classes={"background": 0, "bar": 1}, ignore_label=None, unit="", case_ids=ids
    )
    return folder


def test_folds_keep_groups_whole_and_cover_every_case(root):
    dataset = casefile.read_dataset(root)
    held_out = []
    for fold in range(3):
        split, _ = splits.choose_cases(
            dataset, train=None, validation=(), test=(), folds=3, fold=fold
        )
        groups = [{c.group for c in part} for part in (split.train, split.validation)]
        assert not groups[0] & groups[1]
        held_out += [c.id for c in split.validation]
    assert sorted(held_out) == ["bar0", "bar1", "bar2", "bar3"]


@pytest.mark.parametrize(
    "train, said",
    [
        (None, "got 4 for 3 groups; lower it, or prepare the cases with smaller groups"),
        (("a",), "got 4 for 1 group; lower it, or prepare the cases with smaller groups"),
        (("b",), "got 4 for 1 group; cut a single case by prepare.py --crop train=0:80 val=90:112"),
    ],
)
def test_more_folds_than_groups_is_a_fault_and_a_single_case_is_to_be_cut(root, train, said):
    how = {"validation": (), "test": (), "folds": 4, "fold": 0}
    with pytest.raises(ValueError, match=r"^data\.folds: expected no more folds") as error:
        splits.choose_cases(casefile.read_dataset(root), train=train, **how)
    assert str(error.value).endswith(said)


def test_cases_without_label_are_named_and_a_bracket_in_an_id_means_itself(tmp_path):
    for number, name in enumerate(("s[1]", "s1", "s2", "t")):
        about = {"spacing": (1, 1, 1), "unit": "", "affine": None, "group": name}
        image = np.ones((1, 4, 4, 4), np.uint8)
        label = None if number > 2 else image[0]
        casefile.write_case(tmp_path / f"{name}.h5", image, label, **about, skeleton=False)
    ids, classes = ["s[1]", "s1", "s2", "t"], {"background": 0, "bar": 1}
    casefile.write_dataset(tmp_path, classes=classes, ignore_label=None, unit="", case_ids=ids)
    dataset = casefile.read_dataset(tmp_path)
    how = {"train": None, "validation": (), "folds": 0, "fold": 0}
    split, notes = splits.choose_cases(dataset, test=("s[1]",), **how)
    assert [case.id for case in split.test] == ["s[1]"]
    assert [case.id for case in split.train] == ["s1", "s2"]
    assert notes[0] == "train: without label, not trained on: t"
    split, notes = splits.choose_cases(dataset, test=("s[12]", "t"), **how)
    assert [case.id for case in split.test] == ["s1", "s2", "t"]
    assert not any("without label" in note for note in notes)
