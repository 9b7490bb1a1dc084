"""prepare.py end to end, in-process: what it writes, what it says, and everything it refuses."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import tifffile

import prepare
from volumes import casefile, ingest, layouts
from volumes.files import Source

SHARED = Path(os.environ.get("LAMINA_SHARED", Path(__file__).parents[2] / "shared"))
REAL = SHARED / "data"
SHAPE = (6, 8, 10)


def voxels(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(1, 200, shape).astype(np.uint8)


def mask(value=1, shape=SHAPE):
    label = np.zeros(shape, np.uint8)
    label[1:3, 2:4, 2:5] = value
    return label


def nifti(path, array, zooms=(0.5, 1.0, 2.0), unit="mm"):
    """zooms in x, y, z; array z, y, x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.T, np.diag([*zooms, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def tiff(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, photometric="minisblack", compression="lzw")
    return path


def run(*arguments):
    return prepare.main([*(str(a) for a in arguments), "--workers", "1"])


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(capsys, out, *arguments):
    """The faults of a refused command; out is as absent as it was."""
    assert run(*arguments, "--out", out) == 2
    assert not out.exists()
    return capsys.readouterr().err.strip().splitlines()


# ---------------------------------------------------------------------------- what is written


def test_a_pair_keeps_voxels_dtype_spacing_unit_and_affine(raw, out):
    image = voxels().astype(np.int16) - 100
    nifti(raw / "a_img.nii.gz", image, unit="micron")
    nifti(raw / "a_lbl.nii.gz", mask(), unit="micron")
    assert run("--images", raw, "--labels", raw, "--out", out) == 0
    dataset = casefile.read_dataset(out)
    case = dataset.cases["a"]
    assert (case.shape, case.spacing, case.unit) == (SHAPE, (2.0, 1.0, 0.5), "micron")
    assert (dataset.classes, dataset.ignore_label) == ({"background": 0, "foreground": 1}, None)
    with h5py.File(case.path) as file:
        assert file["image"].dtype == np.int16
        assert np.array_equal(file["image"][0], image)
        assert np.array_equal(file["label"], mask())
        assert np.array_equal(file.attrs["affine"], np.diag([0.5, 1, 2, 1]))
        assert file.attrs["source_label"].endswith("a_lbl.nii.gz")
    assert sorted(os.listdir(out)) == ["a.h5", "dataset.json"]


def test_a_mask_of_255_becomes_class_1_and_it_is_said(raw, out, capsys):
    tiff(raw / "i/a.tif", voxels())
    tiff(raw / "i/b.tif", voxels())
    tiff(raw / "l/a.tif", mask(255))
    tiff(raw / "l/b.tif", mask(254))
    assert run("--images", raw / "i", "--labels", raw / "l", "--out", out) == 0
    said = capsys.readouterr().out
    assert "label values {0, 255} read as classes {0, 1} (1 case: a)" in said
    assert "label values {0, 254} read as classes {0, 1} (1 case: b)" in said
    assert "note: no spacing in the file; 1 1 1 is used" in said
    for name in "ab":
        with h5py.File(out / f"{name}.h5") as file:
            assert np.array_equal(file["label"], mask())


def test_a_label_of_0_and_2_stays_unlabeled_where_2_is_ignored(raw, out):
    label = mask(2)
    tiff(raw / "a_img.tif", voxels())
    tiff(raw / "a_lbl.tif", label)
    assert run("--images", raw, "--labels", raw, "--ignore-label", 2, "--out", out) == 0
    with h5py.File(out / "a.h5") as file:
        assert np.array_equal(file["label"], label)
        assert file.attrs["ignore_label"] == 2


def test_255_stays_255_where_it_is_ignored(raw, out):
    tiff(raw / "a_img.tif", voxels())
    tiff(raw / "a_lbl.tif", mask(255))
    assert run("--images", raw, "--labels", raw, "--ignore-label", 255, "--out", out) == 0
    with h5py.File(out / "a.h5") as file:
        assert np.array_equal(file["label"], mask(255))


def test_an_empty_label_is_a_warning(raw, out, capsys):
    tiff(raw / "a_img.tif", voxels())
    tiff(raw / "a_lbl.tif", mask(0))
    assert run("--images", raw, "--labels", raw, "--out", out) == 0
    assert "the label is empty, no voxel of it is foreground (1 case: a)" in capsys.readouterr().out


def test_crops_are_cases_of_their_own_with_a_moved_affine(raw, out):
    image, label = voxels(), mask()
    label[4] = 1
    nifti(raw / "a_img.nii.gz", image)
    nifti(raw / "a_lbl.nii.gz", label)
    crops = ("--crop", "train=0:3", "test=4:")
    assert run("--images", raw, "--labels", raw, "--out", out, *crops) == 0
    dataset_cases = casefile.read_dataset(out).cases
    assert {i: case.group for i, case in dataset_cases.items()} == {
        i: i for i in ("a_train", "a_test")
    }
    with h5py.File(dataset_cases["a_test"].path) as file:
        assert np.array_equal(file["image"][0], image[4:])
        assert np.array_equal(file["label"], label[4:])
        assert file.attrs["affine"][:3, 3].tolist() == [0, 0, 8]  # 4 slices of 2 mm


def test_the_spacing_table_wins_over_the_option_and_both_over_the_header(raw, out, capsys):
    for name in ("a1", "b1"):
        nifti(raw / f"{name}_img.nii", voxels())
    table = raw / "spacing.csv"
    table.write_text("id,z,y,x,unit\na*,5,0.994,0.994,micron\n")
    options = ("--spacing", 3, 2, 1, "--unit", "micron", "--spacing-csv", table)
    assert run("--images", raw, "--out", out, *options) == 0
    dataset_cases = casefile.read_dataset(out).cases
    assert dataset_cases["a1"].spacing == (5.0, 0.994, 0.994)
    assert dataset_cases["b1"].spacing == (3.0, 2.0, 1.0)
    assert not dataset_cases["a1"].labeled
    said = capsys.readouterr().out
    assert "spacing from --spacing-csv replaces the header's (1 case: a1)" in said
    assert "spacing from --spacing replaces the header's (1 case: b1)" in said
    assert "unit micron instead of the header's mm (2 cases: a1, b1)" in said


def test_groups_come_from_the_id_or_a_table(raw, out):
    for name in ("rat1_x", "rat1_y", "rat2_x"):
        tiff(raw / f"{name}.tif", voxels())
    (raw / "train.csv").write_text("id,animal\nrat1_x,p\nrat1_y,q\nrat2_x,q\n")
    groups = {"regex:^rat\\d": ["rat1", "rat1", "rat2"], "regex:_(.)": ["x", "y", "x"]}
    groups |= {"csv:animal": ["p", "q", "q"], f"csv:{raw / 'train.csv'}:animal": ["p", "q", "q"]}
    for rule, expected in groups.items():
        assert run("--images", raw, "--out", out, "--group-from", rule) == 0
        assert [case.group for case in casefile.read_dataset(out).cases.values()] == expected


def test_cases_are_added_and_those_of_the_same_id_replaced(raw, out, capsys):
    assert run("--phantom", "scroll", "--cases", 2, "--shape", *SHAPE, "--out", out) == 0
    with h5py.File(out / "scroll_000.h5") as file:
        before = file["image"][:]
    more = ("--phantom", "scroll", "--cases", 1, "--shape", *SHAPE, "--seed", 1)
    assert run(*more, "--out", out) == 0
    assert "replaced" in capsys.readouterr().out
    dataset = casefile.read_dataset(out)
    assert sorted(dataset.cases) == ["scroll_000", "scroll_001"]
    assert dataset.ignore_label == 2
    with h5py.File(out / "scroll_000.h5") as file:
        assert not np.array_equal(file["image"], before)


def test_a_dataset_with_other_classes_is_left_as_it_was(raw, out, capsys):
    assert run("--phantom", "vessels", "--cases", 1, "--shape", *SHAPE, "--out", out) == 0
    before = (out / "dataset.json").read_text()
    other = ("--phantom", "vessels", "--cases", 2, "--shape", *SHAPE, "--classes", "vein")
    assert run(*other, "--out", out) == 2
    said = capsys.readouterr().err
    assert "expected the classes of the dataset there" in said and "; delete that folder" in said
    assert sorted(os.listdir(out)) == ["dataset.json", "vessels_000.h5"]
    assert (out / "dataset.json").read_text() == before


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
def test_compressed_cases_hold_the_same_voxels(raw, tmp_path, compression):
    tiff(raw / "a_img.tif", voxels())
    tiff(raw / "a_lbl.tif", mask())
    pairs = ("--images", raw, "--labels", raw)
    assert run(*pairs, "--out", tmp_path / "plain") == 0
    assert run(*pairs, "--out", tmp_path / "small", "--compression", compression) == 0
    with h5py.File(tmp_path / "plain/a.h5") as a, h5py.File(tmp_path / "small/a.h5") as b:
        for name in ("image", "label"):
            assert (a[name].compression, b[name].compression) == (None, compression)
            assert np.array_equal(a[name], b[name])


def test_two_workers_write_what_one_writes(tmp_path):
    arguments = ["--phantom", "scroll", "--cases", "2", "--shape", "8", "24", "24", "--out"]
    assert prepare.main([*arguments, str(tmp_path / "one"), "--workers", "1"]) == 0
    assert prepare.main([*arguments, str(tmp_path / "two"), "--workers", "2"]) == 0
    for name in ("scroll_000.h5", "scroll_001.h5"):
        with h5py.File(tmp_path / "one" / name) as a, h5py.File(tmp_path / "two" / name) as b:
            assert np.array_equal(a["image"], b["image"])
            assert np.array_equal(a["foreground/1"], b["foreground/1"])


# ---------------------------------------------------------------------------- layouts


def test_an_nnunet_root_gives_channels_classes_and_ignore_label(raw, out):
    labels = {"background": 0, "wall": 1, "lumen": 2, "ignore": 3}
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels}
    nifti(raw / "imagesTr/a_0000.nii.gz", voxels(seed=1))
    nifti(raw / "imagesTr/a_0001.nii.gz", voxels(seed=2))
    nifti(raw / "labelsTr/a.nii.gz", mask(3) | np.roll(mask(2), 4, axis=1))
    nifti(raw / "imagesTs/t_0000.nii.gz", voxels())
    nifti(raw / "imagesTs/t_0001.nii.gz", voxels())
    (raw / "dataset.json").write_text(json.dumps(description))
    assert run("--images", raw, "--out", out, "--test-images") == 0
    dataset = casefile.read_dataset(out)
    assert dataset.classes == {"background": 0, "wall": 1, "lumen": 2}
    assert dataset.ignore_label == 3
    assert {i: (c.channels, c.labeled) for i, c in dataset.cases.items()} == {
        "a": (2, True),
        "t": (2, False),
    }
    with h5py.File(out / "a.h5") as file:
        assert np.array_equal(file["image"][1], voxels(seed=2))


def test_an_msd_root_keeps_ids_that_look_like_channels(raw, out):
    for name in ("la_0001", "la_0002"):
        nifti(raw / f"imagesTr/{name}.nii.gz", voxels())
        nifti(raw / f"labelsTr/{name}.nii.gz", mask())
    description = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "atrium"}}
    (raw / "dataset.json").write_text(json.dumps(description))
    assert run("--images", raw, "--out", out) == 0
    assert sorted(casefile.read_dataset(out).cases) == ["la_0001", "la_0002"]
    assert casefile.read_dataset(out).classes == {"background": 0, "atrium": 1}


def test_a_missing_channel_is_a_fault(raw, out, capsys):
    nifti(raw / "imagesTr/a_0000.nii.gz", voxels())
    nifti(raw / "labelsTr/a.nii.gz", mask())
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}}
    (raw / "dataset.json").write_text(json.dumps(description))
    (fault, _) = refused(capsys, out, "--images", raw)
    assert fault.startswith("case a: expected 2 channels as in dataset.json, got 1")


def test_a_vesuvius_root_skips_and_lists_ids_whose_file_is_gone(raw, out, capsys):
    label = mask()
    label[4:] = 2
    for name in ("101", "102"):
        tiff(raw / f"train_images/{name}.tif", voxels())
        tiff(raw / f"train_labels/{name}.tif", label)
    (raw / "train.csv").write_text("id,scroll_id\n101,7\n102,8\n103,8\n104,8\n")
    assert run("--images", raw, "--out", out) == 0
    said = capsys.readouterr().out
    assert "lists 2 ids that have no file any more; skipped: 103, 104" in said
    dataset = casefile.read_dataset(out)
    assert dataset.ignore_label == 2
    assert {i: c.group for i, c in dataset.cases.items()} == {"101": "7", "102": "8"}


def test_an_image_goes_with_the_longest_label_id_it_begins_with():
    images = [Source("a_b_den", "1"), Source("c", "2"), Source("ab", "3")]
    labels = [Source("a", "4"), Source("a_b", "5"), Source("c", "6")]
    pairs = [(i, x and x.path, y and y.path) for i, x, y in layouts.match_pairs(images, labels)]
    assert pairs == [("a_b", "1", "5"), ("c", "2", "6"), ("ab", "3", None), ("a", None, "4")]


def test_two_named_files_are_a_pair_whatever_their_names(raw, out, capsys):
    image, label = tiff(raw / "ct.tif", voxels()), tiff(raw / "artery.tif", mask())
    advice = ", or a single pair by its two files"
    assert refused(capsys, out, "--images", raw, "--labels", raw)[0].endswith(advice)
    assert run("--images", image, "--labels", label, "--out", out) == 0
    assert list(casefile.read_dataset(out).cases) == ["ct"]


# ---------------------------------------------------------------------------- what is refused


def test_a_label_of_unlabeled_and_background_only_is_empty(raw, out, capsys):
    tiff(raw / "a_img.tif", voxels())
    tiff(raw / "a_lbl.tif", mask(2))
    assert run("--images", raw, "--labels", raw, "--ignore-label", 2, "--out", out) == 0
    assert "note: the label is empty" in capsys.readouterr().out


def test_all_faults_of_a_folder_are_named_at_once_and_nothing_is_written(raw, out, capsys):
    nan = voxels().astype(np.float32)
    nan[0, 0, :3] = np.nan
    nifti(raw / "i/good.nii.gz", voxels())
    nifti(raw / "l/good.nii.gz", mask())
    nifti(raw / "i/shape.nii.gz", voxels())
    nifti(raw / "l/shape.nii.gz", mask(shape=(6, 8, 9)))
    nifti(raw / "i/nan.nii.gz", nan)
    nifti(raw / "l/nan.nii.gz", mask())
    cut = nifti(raw / "i/cut.nii.gz", voxels((20, 30, 30)))
    cut.write_bytes(cut.read_bytes()[:-2000])
    nifti(raw / "l/cut.nii.gz", mask())
    tifffile.imwrite(raw / "i/flat.tif", np.zeros((8, 10), np.uint8))
    nifti(raw / "l/flat.nii.gz", mask())
    nifti(raw / "i/value.nii.gz", voxels())
    nifti(raw / "l/value.nii.gz", mask(7) | np.roll(mask(1), 3, axis=1))
    nifti(raw / "i/missing.nii.gz", voxels())
    nifti(raw / "l/stray.nii.gz", mask())
    nifti(raw / "i/twice.nii.gz", voxels())
    tiff(raw / "i/twice_img.tif", voxels())
    nifti(raw / "l/twice.nii.gz", mask())
    nifti(raw / "i/blank.nii.gz", voxels())
    nifti(raw / "l/blank.nii.gz", np.full(SHAPE, 2, np.uint8))
    zero = nifti(raw / "i/zero.nii", voxels())
    content = bytearray(zero.read_bytes())
    content[80:84] = np.float32(0).tobytes()  # pixdim[1]: x
    zero.write_bytes(content)
    nifti(raw / "l/zero.nii.gz", mask())
    options = ("--images", raw / "i", "--labels", raw / "l", "--ignore-label", 2)
    *faults, last = refused(capsys, out, *options)
    expected = {
        "shape.nii.gz": "expected the shape of",
        "nan.nii.gz": "3 voxels of NaN or Inf",
        "cut.nii.gz": "cannot be read",
        "flat.tif": "which is no volume",
        "value.nii.gz": "the values [0, 1, 2], got also 7 in ",
        "case missing": "expected a label of this id",
        "case stray": "expected an image of this id",
        "case twice": "expected one file of this id, got 2",
        "case blank": "expected labeled voxels",
        "zero.nii": "spacing above 0",
    }
    for name, sentence in expected.items():
        assert [fault for fault in faults if name in fault and sentence in fault], name
    assert len(faults) == len(expected)
    assert last == "10 faults in 9 cases; nothing was written"


def test_value_2_without_a_meaning_suggests_both_options(raw, out, capsys):
    tiff(raw / "a_img.tif", voxels())
    tiff(raw / "a_lbl.tif", mask(2) | np.roll(mask(1), 3, axis=1))
    (fault, _) = refused(capsys, out, "--images", raw, "--labels", raw)
    assert "got also 2" in fault
    assert "--ignore-label 2" in fault
    assert "--classes class_1=1 class_2=2" in fault


def test_headers_that_disagree_are_faults(raw, out, capsys):
    nifti(raw / "a_img.nii", voxels())
    nifti(raw / "a_lbl.nii", mask(), zooms=(0.5, 1.0, 2.1))
    nifti(raw / "b_img.nii", voxels())
    nifti(raw / "b_lbl.nii", mask(), unit="micron")
    faults = refused(capsys, out, "--images", raw, "--labels", raw)
    assert f"a_lbl.nii: expected the spacing of {raw}/a_img.nii, 2 1 0.5 mm" in faults[0]
    assert f"b_lbl.nii: expected the spacing of {raw}/b_img.nii, 2 1 0.5 mm" in faults[1]
    assert "got 2 1 0.5 micron" in faults[1]


def test_mixed_units_are_a_fault(raw, out, capsys):
    nifti(raw / "a.nii", voxels(), unit="mm")
    nifti(raw / "b.nii", voxels(), unit="micron")
    (fault, _) = refused(capsys, out, "--images", raw)
    assert fault.startswith("dataset: expected one unit in all cases")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--spacing", 0, 1, 1), "--spacing: expected three numbers above 0"),
        (("--spacing", "nan", 1, 1), "--spacing: expected three numbers above 0"),
        (("--classes", "a", "a"), "--classes: expected distinct"),
        (("--ignore-label", 1), "--ignore-label: expected a value"),
        (("--ignore-label", 300), "--ignore-label: expected a value"),
        (("--crop", "a=5"), "--crop a=5: expected NAME=Z0:Z1"),
        (("--crop", "a=0:99"), "case a: expected a range of its 6 slices, got --crop a=0:99"),
        (("--crop", "a=3:3"), "case a: expected a range of its 6 slices, got --crop a=3:3"),
        (("--crop", "a=:3", "b=200:300"), "of its 6 slices, got --crop b=200:300"),
        (("--group-from", "animal"), "--group-from animal: expected csv:COLUMN"),
        (("--group-from", "regex:("), "expected a pattern"),
        (("--group-from", "regex:zebra"), "case a: expected a group"),
        (("--group-from", "csv:gone.csv:animal"), "gone.csv: expected a readable CSV"),
        (("--group-from", "csv:animal"), "expected train.csv or one CSV file"),
        (("--spacing-csv", "gone.csv"), "gone.csv: expected a readable CSV"),
    ],
)
def test_a_bad_option_is_one_sentence(raw, out, capsys, options, sentence):
    tiff(raw / "a.tif", voxels())
    faults = refused(capsys, out, "--images", raw, *options)
    assert len(faults) == 2
    assert sentence in faults[0]


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_images_that_are_not_there_are_a_fault(tmp_path, out, capsys, path):
    (tmp_path / "empty").mkdir()
    (fault, _) = refused(capsys, out, "--images", tmp_path / path)
    assert fault.startswith(f"--images {tmp_path / path}: expected")


def test_a_bad_spacing_table_names_the_line(raw, out, capsys):
    tiff(raw / "a.tif", voxels())
    (raw / "s.csv").write_text("id,z,y,x\na,1,1,1\nb,1,zero,1\n")
    (fault, _) = refused(capsys, out, "--images", raw, "--spacing-csv", raw / "s.csv")
    assert "s.csv, line 3" in fault


def test_phantom_and_images_exclude_each_other(raw, out):
    with pytest.raises(SystemExit) as caught:
        run("--phantom", "scroll", "--images", raw, "--out", out)
    assert caught.value.code == 2


def test_a_full_disk_is_one_sentence_with_status_1(out, capsys, monkeypatch):
    def full(*_args, **_options):
        raise OSError("no space left on device")

    monkeypatch.setattr(ingest, "write_case", full)
    deep = out / "of" / "scrolls"
    assert run("--phantom", "scroll", "--cases", 1, "--shape", *SHAPE, "--out", deep) == 1
    assert "case scroll_000: OSError: no space left" in capsys.readouterr().err
    assert os.listdir(out.parent) == []


class Deadly:
    """A case whose id kills the worker process that asks for it."""

    @property
    def id(self):
        if multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return "b"


def test_a_killed_worker_is_one_sentence_that_names_a_case():
    with pytest.raises(
        prepare.Stopped, match="case b or one beside it: a worker process was killed"
    ):
        prepare.prepare_all([Deadly(), Deadly()], rules=None, workers=2)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real volumes are not in {REAL}")
def test_real_nifti_and_tiff_end_as_the_same_case_file(tmp_path):
    nifti_folder, tiff_folder = REAL / "vesselNN_nifti", REAL / "vesselNN_tiff"
    table = Path(__file__).parents[1] / "configs" / "vesselNN_spacing.csv"
    name, files = "burgess2014_noisySparseVessels", {}
    commands = {
        "nifti": (f"{nifti_folder}/{name}_img.nii.gz", f"{nifti_folder}/{name}_lbl.nii.gz"),
        "tiff": (f"{tiff_folder}/*_noisy*_denoised.tif", f"{tiff_folder}/*_noisy*_labels_v1.tif"),
    }
    for kind, (images, labels) in commands.items():
        where = ("--images", images, "--labels", labels, "--out", tmp_path / kind)
        assert run(*where, *(("--spacing-csv", table) if kind == "tiff" else ())) == 0
        files[kind] = casefile.read_case(tmp_path / kind / f"{name}.h5")
    nifti_case, tiff_case = files["nifti"], files["tiff"]
    assert (nifti_case.spacing, nifti_case.unit) == ((5.0, 0.994, 0.994), "micron")
    assert (tiff_case.spacing, tiff_case.unit) == (nifti_case.spacing, nifti_case.unit)
    with h5py.File(nifti_case.path) as a, h5py.File(tiff_case.path) as b:
        assert np.array_equal(a["image"], b["image"])
        assert np.array_equal(a["label"], b["label"])


# ---------------------------------------------------------------------------- headers that disagree


def test_a_mirrored_label_is_a_fault_and_spacing_by_hand_overrides_it(raw, out, capsys):
    nifti(raw / "a_img.nii.gz", voxels(), (1, 1, 2))
    image = nibabel.Nifti1Image(mask().T, np.diag([-1.0, 1, 2, 1]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, raw / "a_lbl.nii.gz")
    (fault, _) = refused(capsys, out, "--images", raw, "--labels", raw)
    assert f"a_lbl.nii.gz: expected the axes of {raw}/a_img.nii.gz" in fault
    assert run("--images", raw, "--labels", raw, "--spacing", 2, 1, 1, "--out", out) == 0


def test_channels_of_different_spacing_are_a_fault(raw, out, capsys):
    nifti(raw / "imagesTr/a_0000.nii.gz", voxels(), (1, 1, 2))
    nifti(raw / "imagesTr/a_0001.nii.gz", voxels(), (3, 3, 3))
    nifti(raw / "labelsTr/a.nii.gz", mask(), (1, 1, 2))
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}}
    (raw / "dataset.json").write_text(json.dumps(description))
    (fault, _) = refused(capsys, out, "--images", raw)
    assert f"a_0001.nii.gz: expected the spacing of {raw}/imagesTr/a_0000.nii.gz" in fault


def test_a_unit_that_the_header_does_not_state_converts_its_spacing(raw, out):
    nifti(raw / "a.nii.gz", voxels(), (500, 1000, 2000), unit="micron")
    assert run("--images", raw / "a.nii.gz", "--unit", "mm", "--out", out) == 0
    case = casefile.read_dataset(out).cases["a"]
    assert (case.spacing, case.unit) == ((2.0, 1.0, 0.5), "mm")


def test_a_case_without_a_row_in_the_spacing_table_is_a_fault(raw, out, capsys):
    tiff(raw / "a.tif", voxels())
    (raw / "s.csv").write_text("id,z,y,x\nb,1,1,1\n")
    table = ("--spacing-csv", raw / "s.csv")
    (fault, _) = refused(capsys, out, "--images", raw / "a.tif", *table)
    assert fault == "case a: expected a row in --spacing-csv, got none for this id"


def test_a_lone_value_that_is_not_white_is_not_read_as_a_mask(raw, out, capsys):
    nifti(raw / "a_img.nii.gz", voxels())
    nifti(raw / "a_lbl.nii.gz", mask(7))
    (fault, _) = refused(capsys, out, "--images", raw, "--labels", raw)
    assert "got also 7" in fault


@pytest.mark.parametrize(
    "arguments",
    [("--phantom", "vessels", "--group-from", "csv:x"), ("--images", ".", "--test-images")],
)
def test_options_that_would_do_nothing_are_refused(out, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments, "--out", out)


def test_a_vesuvius_root_without_any_whole_case_says_why(raw, out, capsys):
    tiff(raw / "train_images/1.tif", voxels())
    tiff(raw / "train_labels/2.tif", mask())
    (raw / "train.csv").write_text("id,scroll_id\n1,7\n2,7\n")
    assert run("--images", raw, "--out", out) == 2
    said = capsys.readouterr()
    assert "skipped: 1, 2" in said.out and "expected cases, got none" in said.err


def test_a_spacing_of_zero_in_a_header_is_one_sentence_and_nothing_else(raw, out, capfd):
    path = nifti(raw / "a.nii", voxels())
    content = bytearray(path.read_bytes())
    content[80:84] = bytes(4)  # pixdim[1], which is x
    path.write_bytes(content)
    lines = refused(capfd, out, "--images", path)
    assert len(lines) == 2 and "a.nii: expected a spacing above 0" in lines[0]


def placed(path, array, affine, unit="mm"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.T, affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)


def test_a_label_of_another_origin_is_noted_once_with_its_cases(raw, out, capsys):
    for name in "ab":
        nifti(raw / f"{name}_img.nii.gz", voxels())
        placed(
            raw / f"{name}_lbl.nii.gz",
            mask(),
            [[0.5, 0, 0, 0], [0, 1, 0, 6], [0, 0, 2, 0], [0, 0, 0, 1]],
        )
    assert run("--images", raw, "--labels", raw, "--out", out, "--no-skeletons") == 0
    note = "note: image and label: the headers differ (origin); they are matched voxel by voxel"
    assert capsys.readouterr().out.count(f"{note} (2 cases: a, b)") == 1


def test_turned_axes_are_said_where_the_spacing_is_given(raw, out, capsys):
    nifti(raw / "a_img.nii.gz", voxels())
    placed(raw / "a_lbl.nii.gz", mask(), np.diag([-0.5, 1, 2, 1]))
    arguments = ("--images", raw, "--labels", raw, "--spacing", 2, 1, 0.5, "--out", out)
    assert run(*arguments, "--no-skeletons") == 0
    assert "note: image and label: the headers differ (axes)" in capsys.readouterr().out


def test_image_and_label_in_other_units_of_one_size_are_a_pair(raw, out):
    nifti(raw / "a_img.nii.gz", voxels(), (0.5, 1, 2), "mm")
    nifti(raw / "a_lbl.nii.gz", mask(), (500, 1000, 2000), "micron")
    assert run("--images", raw, "--labels", raw, "--out", out, "--no-skeletons") == 0
    with h5py.File(out / "a.h5") as file:
        assert tuple(file.attrs["spacing"]) == (2, 1, 0.5) and file.attrs["unit"] == "mm"


@pytest.mark.parametrize("diagonal", [(-1, 1, 2), (1, -1, 2), (1, 1, -2)])
def test_a_mirrored_channel_is_a_fault_that_names_both(raw, out, capsys, diagonal):
    nifti(raw / "imagesTr/a_0000.nii.gz", voxels(), (1, 1, 2))
    placed(raw / "imagesTr/a_0001.nii.gz", voxels(), np.diag([*diagonal, 1]))
    nifti(raw / "labelsTr/a.nii.gz", mask(), (1, 1, 2))
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}}
    (raw / "dataset.json").write_text(json.dumps(description))
    (fault, _) = refused(capsys, out, "--images", raw)
    assert f"a_0001.nii.gz: expected the axes of {raw}/imagesTr/a_0000.nii.gz" in fault


def test_the_contradiction_of_a_label_or_channel_is_a_fault_too(raw, out, capsys):
    nifti(raw / "a_img.nii.gz", voxels(), (1, 1, 2))
    path = nifti(raw / "a_lbl.nii", mask(), (1, 1, 2))
    content = bytearray(path.read_bytes())
    content[80:84] = np.float32(3).tobytes()  # pixdim[1]: x
    path.write_bytes(content)
    (fault, _) = refused(capsys, out, "--images", raw, "--labels", raw)
    assert "a_lbl.nii: expected one voxel size z, y, x, got 2 1 3 mm (pixdim) and 2 1 1" in fault


# ---------------------------------------------------------------------------- images without use


def prepared(tmp_path, image, label=True):
    """(exit status of preparing one case, its case file)."""
    nifti(tmp_path / "i" / "a.nii.gz", image)
    arguments = ["--images", tmp_path / "i", "--out", tmp_path / "out"]
    if label:
        nifti(tmp_path / "l" / "a.nii.gz", mask())
        arguments += ["--labels", tmp_path / "l"]
    return run(*arguments), tmp_path / "out" / "a.h5"


@pytest.mark.parametrize("value", [0, 7])
def test_a_blank_image_with_a_label_is_a_fault_and_without_one_a_warning(tmp_path, capsys, value):
    blank = np.full(SHAPE, value, np.uint8)
    status, file = prepared(tmp_path, blank)
    (fault, _) = capsys.readouterr().err.splitlines()
    assert status == 2 and not file.exists()
    assert fault.startswith(f"case a: expected an image with contrast, got {value} in all voxels")
    status, file = prepared(tmp_path, blank, label=False)
    assert status == 0 and file.exists()
    said = capsys.readouterr().out
    assert f"note: the image is blank, {value} in all voxels (1 case: a)" in said


def test_a_blank_channel_beside_others_is_a_warning(tmp_path, capsys):
    (tmp_path / "i").mkdir()
    with h5py.File(tmp_path / "i" / "a.h5", "w") as file:
        file["image"] = np.stack([voxels(), np.zeros(SHAPE, np.uint8)])
    nifti(tmp_path / "l" / "a.nii.gz", mask())
    where = ("--images", tmp_path / "i", "--labels", tmp_path / "l", "--out", tmp_path / "out")
    assert run(*where) == 0
    assert "note: channel 1 is blank, 0 in all voxels" in capsys.readouterr().out


@pytest.mark.parametrize("fill", [-3.4e38, -1e4, 65535])
def test_a_fill_value_is_noted_and_is_not_in_the_statistics_that_training_uses(
    tmp_path, capsys, fill
):
    image = voxels().astype(np.float32)
    image[0, :4] = fill
    status, file = prepared(tmp_path, image)
    assert status == 0 and f"note: values up to {fill:g} lie far" in capsys.readouterr().out
    with h5py.File(file) as stored:
        about = json.loads(stored.attrs["intensity"])["typical"]
    assert about["std"] == [pytest.approx(image[image != np.float32(fill)].std(), rel=1e-6)]


def test_an_image_beyond_float32_is_a_fault(tmp_path, capsys):
    status, file = prepared(tmp_path, voxels() * 1e300)
    assert status == 2 and not file.exists()
    assert "case a: expected values that float32 can hold" in capsys.readouterr().err
