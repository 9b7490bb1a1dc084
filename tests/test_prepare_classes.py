"""prepare.py with labels of several classes: ids, regions, phantoms, and what is refused."""

import json
import shutil

import h5py
import numpy as np
import pytest
import tifffile

import prepare
from volumes import casefile, phantoms

SHAPE = (6, 8, 16)


@pytest.fixture
def raw(tmp_path):
    """raw(name, *values) writes an image and a label with a bar of each value, as tiff."""

    def write(name, *values, folders=("i", "l"), names=("{}.tif", "{}.tif")):
        label = np.zeros(SHAPE, np.uint8)
        for place, value in enumerate(values):
            label[1:4, 2:4, 3 * place : 3 * place + 2] = value
        image = np.random.default_rng([*name.encode()]).integers(1, 200, SHAPE).astype(np.uint8)
        for array, folder, form in zip((image, label), folders, names, strict=True):
            path = tmp_path / folder / form.format(name)
            path.parent.mkdir(exist_ok=True)
            tifffile.imwrite(path, array, photometric="minisblack")
        return label

    return write


@pytest.fixture
def run(tmp_path, capsys):
    """run(*options) prepares the pairs: (exit status, what was printed, the faults)."""

    def call(*options, images="i", labels="l"):
        command = ["--images", str(tmp_path / images), "--out", str(tmp_path / "out"), *options]
        command += ["--labels", str(tmp_path / labels)] if labels else []
        status = prepare.main([*command, "--spacing", "2", "1", "1", "--workers", "1"])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()[:-1]

    return call


def stored(tmp_path, name):
    with h5py.File(tmp_path / "out" / f"{name}.h5") as file:
        return {key: file[key][:] for key in ("label", "skeleton")}, sorted(file["foreground"])


def test_ids_of_any_value_and_order_stay_those_of_the_label(raw, run, tmp_path):
    label, _ = raw("a", 7, 3, 255), raw("b", 3)
    status, out, _ = run("--classes", "vein=7", "artery=3", "--ignore-label", "255")
    assert status == 0
    dataset = casefile.read_dataset(tmp_path / "out")
    assert list(dataset.classes.items()) == [("background", 0), ("vein", 7), ("artery", 3)]
    assert (dataset.ignore_label, dataset.regions) == (255, {})
    arrays, ids = stored(tmp_path, "a")
    assert np.array_equal(arrays["label"], label) and ids == ["3", "7"]
    assert {*np.unique(label[arrays["skeleton"] > 0])} == {3, 7}
    assert "note: classes in one case only: vein (a)" in out
    assert "vein 1.56, artery 1.56" in out and "vein 0, artery 1.56" in out


def test_masks_of_0_128_and_255_are_two_classes_where_they_are_named(raw, run, tmp_path):
    label = raw("a", 128, 255)
    assert run("--classes", "grey=128", "white=255")[0] == 0
    assert np.array_equal(stored(tmp_path, "a")[0]["label"], label)
    assert casefile.read_dataset(tmp_path / "out").classes["white"] == 255


def test_a_mask_of_254_is_no_class_1_where_255_alone_is_named(raw, run, tmp_path):
    raw("a", 254)
    status, _, (fault,) = run("--classes", "vessel=255")
    assert status == 2 and f"got also 254 in {tmp_path}/l/a.tif" in fault


def test_an_undeclared_value_names_its_files_and_nothing_is_written(raw, run, tmp_path):
    for name, values in {"a": (3, 7), "b": (3, 9), "c": (7, 9)}.items():
        raw(name, *values)
    status, _, (fault,) = run("--classes", "artery=3", "vein=7")
    assert status == 2 and not (tmp_path / "out").exists()
    assert f"got also 9 in {tmp_path}/l/b.tif, {tmp_path}/l/c.tif; " in fault
    assert "`--classes artery=3 vein=7 class_9=9`" in fault and "--ignore-label 9" in fault


def test_without_names_all_values_of_the_folder_are_listed_once_with_the_line_to_copy(
    raw, run, tmp_path
):
    raw("a", 3, 7)
    raw("b", 3)
    status, _, (fault,) = run()
    assert status == 2 and not (tmp_path / "out").exists()
    command = fault.split("`")[1].split()
    assert command == ["--classes", "class_3=3", "class_7=7"]
    assert run(*command)[0] == 0
    assert casefile.read_dataset(tmp_path / "out").classes == {
        "background": 0,
        "class_3": 3,
        "class_7": 7,
    }


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ([[2]], ["--classes class_2=2", "--ignore-label 2"]),
        ([[1, 2]], ["--classes class_1=1 class_2=2", "--ignore-label 2"]),
        ([[3, 7]], ["--classes class_3=3 class_7=7", "--classes class_3=3 --ignore-label 7"]),
        (
            [[255], [2, 255]],  # no longer a mask where 255 is a class
            ["--classes class_2=2 class_255=255", "--classes class_255=255 --ignore-label 2"],
        ),
        ([[255], [2]], ["--ignore-label 2"]),
        ([[255], [2], [3]], []),
    ],
)
def test_each_line_to_copy_works_as_it_is_printed(raw, run, tmp_path, values, lines):
    for name, own in zip("abc", values, strict=False):
        raw(name, *own)
    status, _, (fault,) = run()
    assert status == 2 and fault.split("`")[1::2] == lines
    for line in lines:
        assert run(*line.split())[0] == 0
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("word", ["mean=1", "a/b=1", "=1", "background=1", "a=256", "a=1x"])
def test_a_name_or_id_that_cannot_be_is_one_sentence(raw, run, tmp_path, word):
    raw("a", 1)
    status, _, faults = run("--classes", word)
    assert status == 2 and len([f for f in faults if f.startswith(("classes:", "--classes"))]) == 1
    assert not (tmp_path / "out").exists()


def test_cases_of_the_same_classes_in_another_order_are_not_added(raw, run, tmp_path):
    raw("a", 3, 7)
    assert run("--classes", "artery=3", "vein=7")[0] == 0
    status, _, (fault,) = run("--classes", "vein=7", "artery=3")
    assert status == 2 and "expected the classes of the dataset there" in fault


# ---------------------------------------------------------------------------- nnU-Net


@pytest.fixture
def nnunet(raw, tmp_path):
    """nnunet(**description) writes a root with two cases of the ids 1 to 4."""

    def write(**description):
        root = tmp_path / "nn"
        root.mkdir(exist_ok=True)
        for name in "ab":
            folders = ("nn/imagesTr", "nn/labelsTr")
            raw(name, 1, 2, 3, 4, folders=folders, names=("{}_0000.tif", "{}.tif"))
        labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enh": 3, "ignore": 4}
        about = {"channel_names": {"0": "MR"}, "labels": labels, "regions_class_order": [1, 2, 3]}
        (root / "dataset.json").write_text(json.dumps(about | description))

    return write


def test_regions_of_nnunet_are_read_back_from_the_dataset(nnunet, run, tmp_path):
    nnunet()
    assert run(images="nn", labels=None)[0] == 0
    dataset = casefile.read_dataset(tmp_path / "out")
    assert dataset.classes == {"background": 0, "class_1": 1, "class_2": 2, "enh": 3}
    assert list(dataset.regions.items()) == [
        ("whole", (1, 2, 3)),
        ("core", (2, 3)),
        ("enh", (3,)),
    ]
    assert dataset.ignore_label == 4
    assert stored(tmp_path, "a")[1] == ["1", "2", "3"]


def test_cases_of_other_regions_are_not_added(nnunet, run, tmp_path):
    nnunet()
    run(images="nn", labels=None)
    before = (tmp_path / "out" / "dataset.json").read_text()
    names = ("--classes", "class_1", "class_2", "enh")
    status, out, (fault,) = run(*names, images="nn", labels=None)
    assert status == 2 and "expected the regions of the dataset there" in fault
    assert "note: --classes replaces the regions whole, core, enh" in out
    assert (tmp_path / "out" / "dataset.json").read_text() == before


def test_an_order_that_contradicts_the_regions_is_one_sentence(nnunet, run, tmp_path):
    nnunet(regions_class_order=[3, 1, 3])
    status, _, (fault,) = run(images="nn", labels=None)
    assert status == 2 and fault.startswith(f"{tmp_path}/nn/dataset.json: expected nnU-Net's")
    assert "regions_class_order [3, 1, 3], expected one id of each of" in fault


def test_a_dataset_with_regions_of_unknown_ids_is_refused(nnunet, run, tmp_path):
    nnunet()
    run(images="nn", labels=None)
    path = tmp_path / "out" / "dataset.json"
    content = json.loads(path.read_text())
    for ids in ([1, 9], [0, 1], []):
        path.write_text(json.dumps(content | {"regions": {"whole": ids}}))
        with pytest.raises(ValueError, match="regions of other ids than those of the classes"):
            casefile.read_dataset(tmp_path / "out")


# ---------------------------------------------------------------------------- phantoms


@pytest.mark.parametrize("kind", phantoms.CLASSES)
def test_phantoms_bring_their_classes(tmp_path, kind):
    command = ["--phantom", kind, "--cases", "1", "--shape", "10", "32", "32", "--workers", "1"]
    assert prepare.main([*command, "--out", str(tmp_path / "out")]) == 0
    dataset = casefile.read_dataset(tmp_path / "out")
    assert dataset.classes == phantoms.CLASSES[kind] and dataset.ignore_label is None
    arrays, _ = stored(tmp_path, f"{kind}_000")
    assert {*np.unique(arrays["label"])} == {*dataset.classes.values()}


def test_a_class_whose_name_looks_like_markup_is_printed_as_it_is(raw, run):
    raw("a", 3, 7)
    status, out, _ = run("--classes", "[red]artery=3", ":fire:=7")
    assert status == 0 and "[red]artery 1.56, :fire: 1.56" in out
