"""Volumes: names and ids, what every format carries, and one sentence for what cannot be read."""

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from volumes import casefile, files
from volumes.files import case_id, find_volumes, read_image, read_label, write_volume
from volumes.formats import Format
from volumes.volume import Volume, VolumeError, crop_affine, scale_affine

SHARED = Path(os.environ.get("LAMINA_SHARED", Path(__file__).parents[3] / "shared"))
REAL = SHARED / "data"


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 200, (6, 4, 5)).astype(np.uint8)


def make_nifti(path, array, zooms=(1.0, 1.0, 1.0), unit="mm"):
    image = nibabel.Nifti1Image(array, np.diag([*zooms, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_img.nii.gz", "a"),
        ("a_lbl.nii.gz", "a"),
        ("a_0000.nii.gz", "a"),
        ("a_img_0000.tif", "a"),
        ("a_labels_v1.tif", "a"),
        ("a_label_underSegmented.tif", "a"),
        ("t1w_seg-manual.nii.gz", "t1w"),
        ("t2s_gmseg_manual.nii.gz", "t2s"),
        ("a-seg.tif", "a"),
        ("A_Mask.TIFF", "A"),
        ("a_pred.h5", "a"),
        ("a_raw.h5:volumes/raw", "a"),
        ("case_0001.tif", "case_0001"),
        ("scroll_000.h5", "scroll_000"),
        ("mouse_label_01.tif", "mouse_label_01"),
        ("a_BM4D_denoised.tif", "a_BM4D_denoised"),
        ("_img.tif", "_img"),
        ("v1.2_img.tif", "v1.2"),
    ],
)
def test_case_id_drops_suffix_channel_and_words_of_role(name, expected):
    assert case_id(f"some/folder_seg/{name}") == expected


@given(st.text("ab_-0.imgsel", min_size=1, max_size=20))
def test_case_id_of_a_case_id_is_itself(name):
    once = case_id(f"{name}.tif")
    assert once != ""
    assert case_id(f"{once}.tif") == once


def test_a_folder_gives_its_volumes_and_nothing_else(tmp_path):
    for name in ("b.tif", "a_img.nii.gz", "notes.txt", "._a.tif"):
        (tmp_path / name).touch()
    assert [s.id for s in find_volumes(tmp_path)] == ["a", "b"]


def test_the_id_stands_where_the_pattern_says(tmp_path):
    for name in ("x1_den.tif", "x2_den.tif", "x1_labels_v1.tif", "x2_label_thin.tif"):
        (tmp_path / name).touch()
    images = find_volumes(f"{tmp_path}/{{id}}_den.tif")
    labels = find_volumes(f"{tmp_path}/{{id}}_label*.tif")
    assert [s.id for s in images] == [s.id for s in labels] == ["x1", "x2"]


def test_a_glob_may_name_a_dataset(tmp_path):
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).touch()
    sources = find_volumes(f"{tmp_path}/*.h5:raw")
    assert [s.path for s in sources] == [f"{tmp_path}/a.h5:raw", f"{tmp_path}/b.h5:raw"]


@pytest.mark.parametrize("text", ["nowhere", "empty", "*.tif", "{id}.tif"])
def test_naming_no_volume_is_one_sentence(tmp_path, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="expected") as caught:
        find_volumes(tmp_path / text)
    assert str(tmp_path / text) in str(caught.value)


# ---------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", [".tif", ".nii.gz", ".nii", ".h5"])
def test_what_is_written_is_read_back_with_spacing_and_unit(tmp_path, voxels, suffix):
    path = tmp_path / f"deep/a{suffix}"
    write_volume(path, voxels, spacing=(5, 0.994, 0.5), unit="micron")
    back = read_label(path)
    assert np.array_equal(back.array, voxels)
    assert (back.spacing, back.unit) == ((5.0, 0.994, 0.5), "micron")
    assert os.listdir(path.parent) == [path.name]


def test_a_mask_is_written_as_uint8_lzw_with_one_page_per_z(tmp_path, voxels):
    write_volume(tmp_path / "a.tif", voxels > 100)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert len(tif.pages) == 6
        assert tif.pages[0].compression.name == "LZW"
        assert tif.pages[0].dtype == np.uint8


def test_probabilities_keep_their_dtype(tmp_path, voxels):
    probs = (voxels / 255).astype(np.float32)
    for name in ("a.tif", "a.nii.gz", "a.h5"):
        write_volume(tmp_path / name, probs)
        assert np.array_equal(read_image(tmp_path / name).array[0], probs), name


def test_nifti_voxel_x_y_z_is_array_z_y_x(tmp_path):
    array = np.zeros((2, 3, 4), np.int16)
    array[1, 2, 3] = -7
    path = make_nifti(tmp_path / "a.nii.gz", array, zooms=(0.1, 0.2, 0.3), unit="micron")
    volume = read_image(path)
    assert volume.array.shape == (1, 4, 3, 2)
    assert volume.array[0, 3, 2, 1] == -7
    assert volume.array.dtype == np.int16
    assert (volume.spacing, volume.unit) == ((0.3, 0.2, 0.1), "micron")


def test_nifti_channels_come_first(tmp_path):
    array = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    volume = read_image(make_nifti(tmp_path / "a.nii", array))
    assert volume.array.shape == (5, 4, 3, 2)
    assert volume.array[4, 3, 2, 1] == array[1, 2, 3, 4]


def test_nifti_with_a_scale_is_float32(tmp_path, voxels):
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii")
    assert volume.array.dtype == np.float32
    assert np.ptp(volume.array) > 0


def test_a_spacing_of_zero_in_the_header_is_not_made_one(tmp_path, voxels):
    path = make_nifti(tmp_path / "a.nii", voxels)
    raw = bytearray(path.read_bytes())
    raw[88:92] = np.float32(0).tobytes()  # pixdim[3]: z
    path.write_bytes(raw)
    assert read_image(path).spacing == (0.0, 1.0, 1.0)


def test_a_sheared_affine_survives_writing(tmp_path, voxels):
    affine = np.array(
        [
            [-0.5, 0, 0.01, 76.9],
            [0, 0.4986, 0.5616, -82.2],
            [0, -0.0374, 7.479, -12.5],
            [0, 0, 0, 1],
        ]
    )
    write_volume(tmp_path / "a.nii.gz", voxels, spacing=(7.5, 0.5, 0.5), unit="mm", affine=affine)
    back = read_image(tmp_path / "a.nii.gz")
    assert np.allclose(back.affine, affine, atol=1e-5)
    assert np.allclose(back.spacing, (7.5, 0.5, 0.5), atol=1e-3)


def test_nanometres_become_microns_in_nifti(tmp_path, voxels):
    write_volume(tmp_path / "a.nii", voxels, spacing=(10, 20, 30), unit="nm")
    back = read_image(tmp_path / "a.nii")
    assert (back.spacing, back.unit) == ((0.01, 0.02, 0.03), "micron")


def test_the_origin_of_a_crop_moves_along_its_axes():
    affine = np.array([[0, 2.0, 0, 10], [3.0, 0, 0, 20], [0, 0, 5.0, 30], [0, 0, 0, 1]])
    moved = crop_affine(affine, (1, 2, 3))
    # Voxel x, y, z = 0 of the crop is voxel 3, 2, 1 of the whole.
    assert np.allclose(moved[:, 3], affine @ (3, 2, 1, 1))
    assert np.array_equal(moved[:, :3], affine[:, :3])


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"spacing": (3, 2, 1), "unit": "um"}, ((3.0, 2.0, 1.0), "micron")),
        ({"element_size_um": (3, 2, 1)}, ((3.0, 2.0, 1.0), "micron")),
        ({"resolution": (40, 4, 4), "unit": "nm"}, ((40.0, 4.0, 4.0), "nm")),
        ({"spacing_nm": (8, 8, 8)}, ((8.0, 8.0, 8.0), "nm")),
        ({"spacing": (3, 2)}, (None, "")),
        ({}, (None, "")),
    ],
)
def test_hdf5_spacing_attributes(tmp_path, voxels, attributes, expected):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = voxels
        file["raw"].attrs.update(attributes)
    volume = read_image(tmp_path / "a.h5")
    assert (volume.spacing, volume.unit) == expected


def test_several_datasets_are_listed_and_none_is_guessed(tmp_path, voxels):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"], file["volumes/other"] = voxels, voxels
    with pytest.raises(VolumeError, match="raw, volumes/other"):
        read_image(tmp_path / "a.h5")
    assert read_image(f"{tmp_path / 'a.h5'}:volumes/other").array.shape == (1, 6, 4, 5)


def test_the_image_of_a_case_file_is_never_its_label(tmp_path, voxels):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = voxels[None]
    assert read_image(tmp_path / "a.h5").array.shape == (1, 6, 4, 5)
    with pytest.raises(VolumeError, match="expected the name of a dataset"):
        read_label(tmp_path / "a.h5")


def test_whole_floats_are_a_label_and_fractions_are_not(tmp_path, voxels):
    good = make_nifti(tmp_path / "a.nii", (voxels > 99).astype(np.float32))
    assert set(np.unique(read_label(good).array)) == {0, 1}
    assert read_label(good).array.dtype == np.int32
    for bad in (0.5, np.nan, np.inf):
        array = np.zeros((3, 4, 5), np.float32)
        array[1, 1, 1] = bad
        with pytest.raises(VolumeError, match="whole numbers"):
            read_label(make_nifti(tmp_path / "b.nii", array))


def test_another_format_is_a_module_and_a_line_of_the_table(tmp_path, voxels, monkeypatch):
    npy = SimpleNamespace(
        WRITES_DIMENSIONS=(3,),
        read=lambda path, dataset, role: Volume(np.load(path), (3.0, 2.0, 1.0), "mm", None, path),
        write=lambda path, array, *_: np.save(path, array),
        count_voxels=lambda path, dataset: np.load(path).size,
    )
    monkeypatch.setitem(files.FORMATS, ".npy", Format(npy, ".npy"))
    write_volume(tmp_path / "a_img.npy", voxels)
    (source,) = find_volumes(tmp_path)
    assert (source.id, files.voxel_count(source.path)) == ("a", voxels.size)
    volume = read_image(source.path)
    assert np.array_equal(volume.array[0], voxels) and volume.spacing == (3.0, 2.0, 1.0)
    (tmp_path / "a_img.npy").write_bytes(b"cut")
    with pytest.raises(VolumeError, match=r"a_img\.npy: expected a whole \.npy file"):
        read_image(source.path)


# ---------------------------------------------------------------------------- faults


def test_a_truncated_nifti_is_one_sentence_that_names_it(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 30)).astype(np.uint8)
    path = make_nifti(tmp_path / "a.nii.gz", array)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: expected a whole \.nii\.gz file") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Extension size:UserWarning")
@pytest.mark.parametrize("name", ["a.tif", "a.nii", "a.nii.gz", "a.h5"])
def test_a_file_of_another_kind_is_a_volume_error(tmp_path, name):
    for content in (b"", b"no volume at all" * 40, gzip.compress(b"nothing")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolumeError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (PermissionError(13, "Permission denied"), "give yourself the right to read it"),
        (BlockingIOError(11, "unable to lock file"), "another program has it open for writing"),
        (OSError(5, "Input/output error"), "the file may be whole"),
        (ValueError("<COMPRESSION.JBIG: 34661> not supported"), "compression is not known"),
        (EOFError(), "it may be truncated, fetch it again"),
        (ValueError("buffer is smaller than requested size"), "it may be truncated"),
    ],
)
@pytest.mark.parametrize("name", ["a filter.tif", "a.nii", "a.h5"])
def test_a_file_is_called_truncated_only_where_it_may_be(
    tmp_path, monkeypatch, name, error, advice
):
    def fail(*_args, **_options):
        raise error

    for one in files.FORMATS.values():
        monkeypatch.setattr(one.module, "read", fail)
    (tmp_path / name).touch()
    with pytest.raises(VolumeError) as caught:
        read_image(tmp_path / name)
    assert advice in str(caught.value) and name in str(caught.value)
    assert ("truncated" in str(caught.value)) == ("truncated" in advice)


@pytest.mark.parametrize(
    ("shape", "got"), [((20, 30), "one page"), ((20, 30, 3), "color"), ((4, 20, 30, 3), "color")]
)
def test_a_tiff_without_z_is_no_volume(tmp_path, shape, got):
    color = "rgb" if shape[-1] == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), photometric=color)
    with pytest.raises(VolumeError, match=f"got {got}.*no volume"):
        read_image(tmp_path / "a.tif")


def test_a_tiff_with_pages_of_two_sizes_is_no_volume(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(np.zeros((5, 20, 30), np.uint8))
        tif.write(np.zeros((5, 10, 30), np.uint8))
    with pytest.raises(VolumeError, match="differing shape"):
        read_image(tmp_path / "a.tif")


def test_dots_per_inch_are_no_spacing(tmp_path, voxels):
    tifffile.imwrite(tmp_path / "a.tif", voxels, resolution=(72, 72), resolutionunit="INCH")
    assert read_image(tmp_path / "a.tif").spacing is None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, voxels, monkeypatch):
    write_volume(tmp_path / "a.tif", voxels)

    def full(*_args, **_options):
        raise OSError("no space left")

    monkeypatch.setattr(tifffile, "imwrite", full)
    with pytest.raises(OSError, match="no space"):
        write_volume(tmp_path / "a.tif", 1 + voxels)
    assert os.listdir(tmp_path) == ["a.tif"]
    assert np.array_equal(read_label(tmp_path / "a.tif").array, voxels)


@pytest.mark.parametrize(("name", "shape"), [("a.png", (2, 3, 4)), ("a.tif", (3, 4))])
def test_a_volume_that_no_format_holds_is_refused(tmp_path, name, shape):
    with pytest.raises(VolumeError, match=name):
        write_volume(tmp_path / name, np.zeros(shape, np.uint8))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real volumes are not in {REAL}")
def test_real_nifti_and_tiff_hold_the_same_voxels():
    name = "burgess2014_noisySparseVessels"
    nifti = read_image(REAL / "vesselNN_nifti" / f"{name}_img.nii.gz")
    tiff = read_image(REAL / "vesselNN_tiff" / f"{name}_BM4D_denoised.tif")
    assert np.array_equal(nifti.array, tiff.array)
    assert (nifti.spacing, nifti.unit) == ((5.0, 0.994, 0.994), "micron")
    assert tiff.spacing is None


def test_a_tiff_cut_between_its_pages_is_refused(tmp_path):
    pages = np.random.default_rng(0).integers(0, 255, (20, 16, 16)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in pages:  # data before directory, as other writers do
            writer.write(page, photometric="minisblack", contiguous=False, metadata=None)
    whole = (tmp_path / "a.tif").read_bytes()
    assert files.read_image(tmp_path / "a.tif").array.shape == (1, 20, 16, 16)
    (tmp_path / "b.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VolumeError, match=r"b\.tif"):
        files.read_image(tmp_path / "b.tif")


def test_a_mask_of_one_slice_is_read_back(tmp_path):
    mask = np.eye(5, dtype=np.uint8)[None]
    files.write_volume(tmp_path / "a.tif", mask)
    assert np.array_equal(files.read_label(tmp_path / "a.tif").array, mask)


def test_an_affine_in_nanometres_is_written_in_microns(tmp_path):
    affine = np.diag([10.0, 10.0, 20.0, 1.0])
    mask = np.ones((2, 3, 4), np.uint8)
    files.write_volume(tmp_path / "a.nii.gz", mask, spacing=(20, 10, 10), unit="nm", affine=affine)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert np.allclose(image.affine, np.diag([0.01, 0.01, 0.02, 1.0]))
    assert image.header.get_xyzt_units()[0] == "micron"


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3), "x"])
def test_an_affine_in_hdf5_that_cannot_be_inverted_is_a_fault(tmp_path, voxels, affine):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = voxels
        file.attrs["affine"] = affine
    with pytest.raises(VolumeError, match=r"a\.h5: expected an affine that can be inverted"):
        read_image(tmp_path / "a.h5")


def test_an_affine_alone_states_the_spacing(tmp_path, voxels):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = voxels
        file.attrs["affine"] = [[0, 2.0, 0, 1], [-0.5, 0, 0, 2], [0, 0, 3, 3]]
    assert read_image(tmp_path / "a.h5").spacing == (3, 2, 0.5)


def test_a_scaled_affine_keeps_its_axes_and_the_voxel_at_the_origin():
    affine = np.array([[0, 2.0, 0, 10], [-3.0, 0, 0, 21], [0, 0, 5.0, 30], [0, 0, 0, 1]])
    scaled = scale_affine(affine, (10, 2, 6))  # z, y, x were 5, 2, 3
    assert np.allclose(scaled, [[0, 2, 0, 10], [-6, 0, 0, 42], [0, 0, 10, 60], [0, 0, 0, 1]])
    origin = np.linalg.solve(affine, (0, 0, 0, 1))
    assert np.allclose(scaled @ origin, (0, 0, 0, 1))
    assert scale_affine(affine, (5, 2, 3)) is affine


# ---------------------------------------------------------------------------- names of other bytes


@pytest.fixture
def latin(tmp_path):
    """A folder called gr\\xf6, in Latin-1, where the file system accepts such a name."""
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/gr\xf6")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    return tmp_path / "gr\udcf6"


def test_names_that_are_no_utf8_are_all_named_with_what_to_do(latin, voxels):
    for name in ("a.tif", "ö.tif", "b\udcfc.tif", "\udcdf.tif"):
        tifffile.imwrite(latin / name, voxels, photometric="minisblack")
    for text in (latin, str(latin / "*.tif"), str(latin / "{id}.tif")):
        with pytest.raises(VolumeError) as fault:
            find_volumes(text)
        assert str(fault.value).startswith(
            "b\\udcfc.tif, \\udcdf.tif: expected names of files in UTF-8"
        )
        assert str(fault.value).endswith("rename them")
    with pytest.raises(VolumeError, match=r"^b\\udcfc.tif: expected"):
        find_volumes(latin / "b\udcfc.tif")


def test_a_folder_whose_name_is_no_utf8_is_read(latin, voxels):
    tifffile.imwrite(latin / "ö.tif", voxels, photometric="minisblack")
    (source,) = find_volumes(latin)
    assert source.id == "ö"
    assert np.array_equal(read_image(source.path).array[0], voxels)
    case = latin / "case.h5"
    about = {"spacing": (1, 1, 1), "unit": "", "affine": None, "group": "ö"}
    casefile.write_case(case, voxels[None], **about, source_image=source.path)
    with h5py.File(case) as file:
        assert file.attrs["source_image"].endswith("gr\\udcf6/ö.tif")
        assert np.array_equal(file["image"][0], voxels)


@pytest.mark.parametrize("suffix", [".nii.gz", ".tif", ".h5"])
def test_an_empty_folder_that_is_called_like_a_volume_is_named(tmp_path, suffix):
    (tmp_path / f"scan{suffix}").mkdir()
    with pytest.raises(VolumeError, match=rf"but 1 \{suffix} folder, e.g. scan\{suffix}; check"):
        find_volumes(tmp_path)
