"""Classes as they are declared, and values that are not: ids stay those of the label."""

import pytest

from volumes import classes


def test_a_name_has_its_given_id_or_its_place():
    background = {"background": 0}
    assert classes.from_words(["artery", "vein"]) == background | {"artery": 1, "vein": 2}
    assert classes.from_words(["artery=7", "vein=3"]) == background | {"artery": 7, "vein": 3}
    assert classes.from_words(["artery=7", "vein"]) == background | {"artery": 7, "vein": 2}
    assert classes.from_words(["background=0", "a=b=255"]) == background | {"a=b": 255}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "a"], "--classes: expected distinct names and ids, got a a"),
        (["a=2", "b"], "--classes: expected distinct names and ids, got a=2 b"),
        (["a=3", "b=3"], "--classes: expected distinct names and ids, got a=3 b=3"),
        (["a=x"], "--classes a=x: expected NAME or NAME=ID"),
        (["a=-1"], "--classes a=-1: expected NAME or NAME=ID"),
        (["a="], "--classes a=: expected NAME or NAME=ID"),
    ],
)
def test_words_that_name_no_classes_are_one_sentence(words, sentence):
    with pytest.raises(ValueError) as caught:
        classes.from_words(words)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("declared", "regions", "ignore", "sentence"),
    [
        ({"": 1}, {}, None, "expected a name that is not empty"),
        ({" ": 1}, {}, None, "expected a name that is not empty"),
        ({"a/b": 1}, {}, None, "got 'a/b'"),
        ({"mean": 1}, {}, None, "got 'mean'"),
        ({"-x": 1}, {}, None, "got '-x'"),
        ({"_x": 1}, {}, None, "got '_x'"),
        ({"a": 1}, {"mean": (1,)}, None, "got 'mean'"),
        ({"background": 1}, {}, None, "expected background to be 0 and nothing else"),
        ({"a": 1}, {"background": (1,)}, None, "expected background to be 0 and nothing else"),
        ({"a": 0, "b": 1}, {}, None, "expected ids from 1 to 255"),
        ({"a": 256}, {}, None, "expected ids from 1 to 255"),
        ({"a": -1}, {}, None, "expected ids from 1 to 255"),
        ({"a": 1, "b": 2}, {"a": (1, 2)}, None, "got a as class 1 and as region [1, 2]"),
        ({"a": 3}, {}, 3, "--ignore-label: expected a value from 1 to 255 that is no class"),
    ],
)
def test_classes_that_cannot_be_are_one_sentence(declared, regions, ignore, sentence):
    (fault,) = classes.faults_of({"background": 0} | declared, regions, ignore)
    assert sentence in fault


def test_classes_and_regions_that_are_sound_have_no_fault():
    named = {"background": 0, "class_1": 1, "core": 255}
    assert not [*classes.faults_of(named, {"whole": (1, 255), "core": (255,)}, 4)]


# ---------------------------------------------------------------------------- dataset.json

BRAIN = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enh": 3, "ignore": 4}


def test_regions_of_nnunet_have_the_ids_of_the_files_as_classes():
    assert classes.from_labels(BRAIN, [1, 2, 3]) == (
        {"background": 0, "class_1": 1, "class_2": 2, "enh": 3},
        {"whole": (1, 2, 3), "core": (2, 3), "enh": (3,)},
        4,
    )


def test_the_id_that_a_region_is_written_with_comes_first_in_it():
    labels = {"background": 0, "whole": [1, 2, 3], "core": [3]}
    _, regions, _ = classes.from_labels(labels, [2, 3])
    assert regions == {"whole": (2, 1, 3), "core": (3,)}


def test_plain_ids_are_classes_without_regions_in_their_order():
    nnunet = {"background": 0, "vein": 7, "artery": 3, "ignore": 9}
    msd = {"0": "nothing", "7": "vein", "3": "artery"}
    expected = [("background", 0), ("vein", 7), ("artery", 3)]
    for labels, ignore in ((nnunet, 9), (msd, None)):
        named, regions, unlabeled = classes.from_labels(labels, [1, 2])
        assert (list(named.items()), regions, unlabeled) == (expected, {}, ignore)


@pytest.mark.parametrize(
    ("changes", "order", "words"),
    [
        ({"enh": []}, None, "an id that is no whole number"),
        ({"enh": "3"}, None, "an id that is no whole number"),
        ({"ignore": [4]}, None, "an id that is no whole number"),
        ({"core": [3]}, None, "two classes of one id"),
        ({"core": [1, 3, 2]}, None, "two classes of one id"),
        ({"core": [0, 3]}, None, "background or the ignore label in a region"),
        ({"core": [3, 4]}, None, "background or the ignore label in a region"),
        ({}, [1, 2], "regions_class_order [1, 2], expected one id of each of"),
        ({}, [1, 1, 3], "regions_class_order [1, 1, 3], expected one id of each of"),
    ],
)
def test_regions_that_contradict_themselves_are_one_sentence(changes, order, words):
    with pytest.raises(ValueError) as caught:
        classes.from_labels(BRAIN | changes, order)
    assert words in str(caught.value)


# ---------------------------------------------------------------------------- label values


def test_undeclared_values_are_one_sentence_with_their_files_and_a_line_to_copy():
    labels = [("a", [0, 3, 7], [3, 7]), ("b", [0, 255], []), ("c", [0, 7], [7]), ("", (), ())]
    (fault,) = classes.undeclared(labels, classes.UNNAMED, None)
    assert fault == (
        "labels: expected the values [0, 1], got also 3 in a; 7 in a, c; name every class, as in "
        "`--classes class_3=3 class_7=7 class_255=255`, or give `--classes class_3=3 class_255=255 "
        "--ignore-label 7` if 7 means unlabeled"
    )


def test_the_line_to_copy_keeps_the_names_that_were_declared():
    named = {"background": 0, "artery": 3, "old vein": 7}
    (fault,) = classes.undeclared([("f.tif", [0, 9, 255], [9])], named, 255)
    assert fault == (
        "labels: expected the values [0, 3, 7, 255], got also 9 in f.tif; name every class, as in "
        "`--classes artery=3 'old vein=7' class_9=9`"
    )


def test_a_stray_value_beside_masks_is_not_taken_for_a_class():
    labels = [("a", [0, 255], []), ("b", [0, 2], [2]), ("c", [0, 255], [])]
    (fault,) = classes.undeclared(labels, classes.UNNAMED, None)
    assert "--classes" not in fault and "other labels are masks of 0 and 255; store one" in fault


def test_numbered_objects_and_values_beyond_a_byte_get_other_advice():
    objects = [("a", [*range(30)], [*range(2, 30)])]
    (fault,) = classes.undeclared(objects, classes.UNNAMED, None)
    assert fault.endswith("in a; these look like numbered objects; store a mask of classes")
    for value in (-1, 256):
        (fault,) = classes.undeclared([("a", [0, value], [value])], classes.UNNAMED, None)
        assert f"got also {value} in a; store ids of 0 to 255" in fault


def test_classes_that_are_rare_in_a_dataset_are_listed():
    named = {"background": 0, "artery": 3, "vein": 7, "nerve": 9}
    assert [*classes.rare(named, {"a": {0, 3}, "b": {3: 50, 7: 20, "background": 9}})] == [
        "classes in no case: nerve",
        "classes in one case only: vein (b)",
    ]
    assert [*classes.rare(named, {"a": {3, 7, 9}})] == []
    assert [*classes.rare(classes.UNNAMED, {"a": {0}, "b": {0, 1}})] == []


def test_texts_of_classes_are_read_as_ids_or_names():
    known = {"artery": 3, "vein": 7}
    texts = ["vessel=artery+vein", "artery=3", "x=y=7+7"]
    assert classes.parsed(texts, known) == {"vessel": (3, 7), "artery": (3,), "x=y": (7,)}
    for text, message in {
        "artery": "--classes: expected NAME=ID, or NAME=ID+ID of a region, got artery",
        "a=vien": "artery 3, vein 7, got 'vien'; the nearest is vein",
        "a=9": "a class by its name or number, artery 3, vein 7, got '9'",
        "a=": "a class by its name or number, artery 3, vein 7, got ''",
    }.items():
        with pytest.raises(ValueError) as fault:
            classes.parsed([text], known)
        assert message in str(fault.value)
    with pytest.raises(ValueError, match="got a twice"):
        classes.parsed(["a=1", "a=2"], {})
    with pytest.raises(
        ValueError, match="the number of a class, got 'vein'; name it with --classes"
    ):
        classes.parsed(["a=vein"], {})
