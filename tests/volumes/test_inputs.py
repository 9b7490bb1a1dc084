"""What infer.py predicts: channel files are one volume, ids are one each, and all is said."""

import nibabel
import numpy as np
import pytest

from volumes import casefile, files
from volumes.inputs import check_inputs
from volumes.volume import InputErrors

SHAPE = (4, 6, 8)


def scan(path, value=1, spacing=(1.0, 1.0, 2.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(SHAPE, value, np.uint8)
    array[0] = 0
    image = nibabel.Nifti1Image(array.T, np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def checked(tmp_path, *texts, channels=1):
    metadata = {"spacing": [0.0] * 3, "unit": "mm", "channels": channels}
    return check_inputs([str(text) for text in texts], metadata, tmp_path, tmp_path / "out")


def faults(tmp_path, *texts, channels=1):
    with pytest.raises(InputErrors) as caught:
        checked(tmp_path, *texts, channels=channels)
    return str(caught.value).split("\n")


def test_channel_files_are_one_volume_of_so_many_channels(tmp_path):
    for name in ("a", "b_img"):
        for channel in range(3):
            scan(tmp_path / "in" / f"{name}_{channel:04d}.nii.gz", 10 * channel + 1)
    inputs, _ = checked(tmp_path, tmp_path / "in", channels=3)
    assert [(volume.id, volume.channels) for volume in inputs] == [("a", 3), ("b", 3)]
    with inputs[0].voxels() as image:
        assert image.shape == (3, *SHAPE) and image[:, 1, 0, 0].tolist() == [1, 11, 21]
    assert inputs[0].spacing == (2.0, 1.0, 1.0)
    assert inputs[0].prediction_path(tmp_path).name == "a.nii.gz"
    single = [tmp_path / "in" / f"a_{channel:04d}.nii.gz" for channel in (2, 0, 1)]
    (volume,), _ = checked(tmp_path, *single, channels=3)
    with volume.voxels() as image:  # in the order of their numbers
        assert image[:, 1, 0, 0].tolist() == [1, 11, 21]


def test_a_network_of_one_channel_takes_a_first_channel_and_ids_that_look_like_channels(tmp_path):
    scan(tmp_path / "in" / "x_0000.nii.gz")
    scan(tmp_path / "in" / "la_0001.nii.gz")
    scan(tmp_path / "in" / "la_0002.nii.gz")
    inputs, _ = checked(tmp_path, tmp_path / "in")
    assert [volume.id for volume in inputs] == ["la_0001", "la_0002", "x"]


def test_a_pattern_says_that_numbers_are_ids(tmp_path):
    for number in range(2):
        scan(tmp_path / "in" / f"t_{number:04d}.nii.gz")
    (fault,) = faults(tmp_path, tmp_path / "in")
    assert "t_0000.nii.gz, " in fault and "expected 1 channels as in training, got 2" in fault
    inputs, _ = checked(tmp_path, f"{tmp_path}/in/{{id}}.nii.gz")
    assert [volume.id for volume in inputs] == ["t_0000", "t_0001"]


def test_prepared_cases_are_never_taken_for_channels(tmp_path):
    for name in ("t_0000", "t_0001"):
        about = {"spacing": (1.0, 1.0, 1.0), "unit": "mm", "affine": None, "group": name}
        casefile.write_case(tmp_path / f"{name}.h5", np.ones((1, *SHAPE), np.uint8), **about)
    inputs, _ = checked(tmp_path, tmp_path / "t_0000.h5", tmp_path / "t_0001.h5")
    assert [(volume.id, volume.channels) for volume in inputs] == [("t_0000", 1), ("t_0001", 1)]


def test_a_missing_or_doubled_channel_is_a_fault(tmp_path):
    for number in (0, 2):
        scan(tmp_path / "gap" / f"a_{number:04d}.nii.gz")
    first = faults(tmp_path, tmp_path / "gap", channels=2)[0]
    assert first.startswith("case a: expected channels numbered 0000, 0001 and on, each once")
    assert "a_0002.nii.gz" in first
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "a_0001.nii"):
        scan(tmp_path / "twice" / name)
    first = faults(tmp_path, tmp_path / "twice", channels=3)[0]
    assert "a_0001.nii, " in first and "a_0001.nii.gz;" in first


def test_channels_of_two_grids_are_a_fault(tmp_path):
    scan(tmp_path / "in" / "a_0000.nii.gz")
    scan(tmp_path / "in" / "a_0001.nii.gz", spacing=(1.0, 1.0, 3.0))
    (fault,) = faults(tmp_path, tmp_path / "in", channels=2)
    assert "a_0001.nii.gz: expected the spacing of" in fault and "a_0000.nii.gz" in fault


def test_a_channel_without_a_spacing_takes_that_of_the_others(tmp_path):
    array = np.ones(SHAPE, np.uint8)
    files.write_volume(tmp_path / "in" / "a_0000.tif", array)
    scan(tmp_path / "in" / "a_0001.nii.gz", 5)
    (volume,), _ = checked(tmp_path, tmp_path / "in", channels=2)
    assert (volume.spacing, volume.unit) == ((2.0, 1.0, 1.0), "mm")
    with volume.voxels() as image:
        assert image[:, 1, 0, 0].tolist() == [1, 5]


def test_two_inputs_of_one_id_are_a_fault_whatever_their_format(tmp_path):
    scan(tmp_path / "in" / "a.nii.gz")
    scan(tmp_path / "in" / "a_img.nii")
    (fault,) = faults(tmp_path, tmp_path / "in")
    assert "got several of id a" in fault and "a.nii.gz" in fault and "a_img.nii;" in fault


def test_one_file_that_is_named_twice_is_one_input(tmp_path):
    path = scan(tmp_path / "in" / "a.nii.gz")
    assert len(checked(tmp_path, tmp_path / "in", path)[0]) == 1


def test_what_an_input_folder_holds_besides_is_said(tmp_path):
    scan(tmp_path / "in" / "a.nii.gz")
    scan(tmp_path / "in" / "day2" / "b.nii.gz")
    (tmp_path / "in" / "c.xyz").touch()
    _, notes = checked(tmp_path, tmp_path / "in")
    assert notes == [f"{tmp_path}/in: passed over 1 .xyz file, e.g. c.xyz; 1 subfolder, e.g. day2"]


@pytest.mark.parametrize("ids", [(3, 7), (7, 3), (3, 9)])
def test_cases_whose_labels_have_other_ids_than_the_masks_will_have_are_a_warning(tmp_path, ids):
    image = np.arange(4 * 4 * 4, dtype=np.uint8).reshape(1, 4, 4, 4)
    about = {"spacing": (1.0, 1.0, 1.0), "unit": "mm", "affine": None, "group": "a"}
    casefile.write_case(tmp_path / "set" / "a.h5", image, image[0] % 2 * np.uint8(3), **about)
    classes = {"background": 0, **dict(zip(("artery", "vein"), ids, strict=True))}
    about = {"classes": classes, "unit": "mm", "ignore_label": None}
    casefile.write_dataset(tmp_path / "set", **about, case_ids=["a"])
    metadata = {"channels": 1, "spacing": [0, 0, 0], "unit": "mm", "regions": {"a": [3], "v": [7]}}
    metadata["classes"] = {"background": 0, "artery": 3, "vein": 7}
    said = (
        f"its labels have artery {ids[0]}, vein {ids[1]}; masks will have the ids of the training"
    )
    for text in ("set", "set/a.h5"):
        _, notes = check_inputs([str(tmp_path / text)], metadata, "root", tmp_path / "out")
        expected = f"warning: {tmp_path / 'set'}: {said} data, artery 3, vein 7"
        assert notes == [expected] * (ids != (3, 7))
    one = metadata | {"regions": {"a+v": [3, 7]}}  # whose masks are of 0 and 1
    assert check_inputs([str(tmp_path / "set")], one, "root", tmp_path / "out")[1] == []


MICRON = {"spacing": [0.0] * 3, "unit": "micron", "channels": 1}
MICRON |= {"stored_spacing": [3.0, 1.0, 1.0], "axes": ["RAS"]}
SWAPPED = "they are swapped, and volumes are not turned"


def lying(path, axes="RAS", spacing=(1.0, 1.0, 3.0), unit="micron"):
    """A NIfTI file whose axes run that way, with the spacing of each."""
    affine = np.zeros((4, 4))
    for axis, letter in enumerate(axes):
        world = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[world, axis] = -spacing[axis] if letter in "LPI" else spacing[axis]
    affine[3, 3] = 1
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"axes": "LAS"}, ["run to LAS, in training to RAS: they are mirrored"]),
        ({"axes": "ARS"}, [SWAPPED]),
        ({"axes": "SAR", "spacing": (3, 1, 1)}, [SWAPPED, "another order than z, y, x?"]),
        ({"spacing": (1.9, 1.9, 3)}, []),
        ({"spacing": (3, 3, 9)}, ["3 1 1 micron; they are not resampled"]),
    ],
)
def test_axes_that_lie_otherwise_than_in_training_are_a_warning(tmp_path, changes, said):
    path = lying(tmp_path / "a.nii", **changes)
    _, notes = check_inputs([str(path)], MICRON, tmp_path, tmp_path / "out")
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert note.startswith(f"warning: {path}: ") and words in note


@pytest.mark.parametrize(("size", "said"), [(0.25, False), (4.0, False), (0.2, True), (5.0, True)])
def test_voxels_are_measured_by_all_sizes_of_training_and_their_range_is_said(tmp_path, size, said):
    mixed = MICRON | {"stored_range": [[3.0, 0.5, 1.0], [3.0, 2.0, 1.0]]}
    path = lying(tmp_path / "a.nii", spacing=(1.0, size, 3.0))
    _, notes = check_inputs([str(path)], mixed, tmp_path, tmp_path / "out")
    words = f"voxels of 3 {size:g} 1 micron, where training had 3 1 1 micron, 0.5 to 2 in y; they"
    assert [words in note for note in notes] == [True] * said


@pytest.mark.parametrize(("size", "said"), [(0.1, False), (1.9, False), (2.1, True)])
def test_only_coarser_voxels_are_far_where_finer_ones_are_resampled(tmp_path, size, said):
    finer = MICRON | {"spacing": [0.0, "1.0+", "1.0+"]}
    path = lying(tmp_path / "a.nii", spacing=(1.0, size, 3.0))
    _, notes = check_inputs([str(path)], finer, tmp_path, tmp_path / "out")
    assert ["not resampled" in note for note in notes] == [True] * said


def test_axes_in_another_order_are_said_where_the_run_resamples_too(tmp_path):
    resampled = MICRON | {"spacing": [1.0, 1.0, 1.0], "axes": []}
    path = lying(tmp_path / "a.nii", "SAR", (3, 1, 1))
    _, (note,) = check_inputs([str(path)], resampled, tmp_path, tmp_path / "out")
    assert note.endswith("had 3 1 1 micron; are its axes in another order than z, y, x?")


@pytest.mark.parametrize(
    ("spacing", "unit"),
    [((1, 1, 3), "mm"), ((0.001, 0.001, 0.003), "micron"), ((0.001, 0.001, 0.003), "unknown")],
)
@pytest.mark.parametrize("wanted", [0.0, 1.0])
def test_voxels_that_must_be_in_another_unit_than_those_of_training_are_a_fault(
    tmp_path, spacing, unit, wanted
):
    path = lying(tmp_path / "a.nii", spacing=spacing, unit=unit)
    with pytest.raises(InputErrors) as caught:
        check_inputs([str(path)], MICRON | {"spacing": [wanted] * 3}, tmp_path, tmp_path / "out")
    (fault,) = str(caught.value).split("\n")
    assert fault.startswith(f"{path}: expected voxels of about 3 1 1 micron as in training, got")
    path = lying(tmp_path / "a.nii", spacing=(0.001, 0.001, 0.003), unit="mm")  # the same in mm
    assert not check_inputs([str(path)], MICRON, tmp_path, tmp_path / "out")[1]


def with_spacing(tmp_path, path, spacing, unit="micron"):
    """What check_inputs makes of a file for a network of 3 1 1 with --spacing."""
    metadata = {"spacing": [3.0, 1.0, 1.0], "unit": unit, "channels": 1}
    return check_inputs([str(path)], metadata, tmp_path, tmp_path / "out", spacing)[0][0]


def test_a_spacing_by_hand_is_that_of_a_volume_without_one_in_the_unit_of_the_run(tmp_path):
    array = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.uint8)
    files.write_volume(tmp_path / "a.tif", array)
    with pytest.raises(InputErrors, match=r"a\.tif: expected a spacing.*got none; give one"):
        with_spacing(tmp_path, tmp_path / "a.tif", None)
    volume = with_spacing(tmp_path, tmp_path / "a.tif", [5.0, 2.0, 2.0])
    assert (volume.spacing, volume.unit) == ((5.0, 2.0, 2.0), "micron")


def test_a_spacing_by_hand_is_refused_where_the_file_states_another(tmp_path):
    path = scan(tmp_path / "a.nii", spacing=(0.001, 0.001, 0.002))  # mm
    assert with_spacing(tmp_path, path, [0.002, 0.001, 0.001], unit="mm").unit == "mm"
    with pytest.raises(InputErrors) as caught:
        with_spacing(tmp_path, path, [5.0, 1.0, 1.0])
    (fault,) = str(caught.value).split("\n")
    assert "a.nii: expected" in fault and "5 1 1 micron, got 0.002 0.001 0.001 mm" in fault


@pytest.mark.parametrize("spacing", [[0.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [float("nan"), 1.0, 1.0]])
def test_a_spacing_by_hand_is_above_0(tmp_path, spacing):
    with pytest.raises(ValueError, match="--spacing: expected three numbers above 0, got"):
        with_spacing(tmp_path, scan(tmp_path / "a.nii"), spacing)


def test_volumes_without_a_spacing_are_named_with_what_that_means(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE)
    for name in "ab":
        files.write_volume(tmp_path / f"{name}.tif", array)
    _, (note,) = checked(tmp_path, tmp_path / "a.tif", tmp_path / "b.tif")
    assert note.startswith("note: no spacing in a, b: ") and note.endswith("give --spacing Z Y X")
