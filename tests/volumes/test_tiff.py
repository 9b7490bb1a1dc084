"""TIFF: voxels as viewers show them, axes, spacing with its unit, and no zeros for what is gone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from volumes import tiff
from volumes.files import read_image, read_label, voxel_count, write_volume
from volumes.volume import VolumeError

ZYX = np.random.default_rng(0).integers(0, 250, (6, 20, 24)).astype(np.uint8)
MASK = (ZYX > 200).astype(np.uint8)
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def write(path, array=ZYX, **options):
    tifffile.imwrite(path, array, **({"photometric": "minisblack"} | options))
    return path


def of_pages(path, write_page, pages=ZYX, **options):
    with tifffile.TiffWriter(path, **options) as writer:
        for index, page in enumerate(pages):
            write_page(writer, index, page)
    return path


# ---------------------------------------------------------------------------- polarity


@pytest.mark.parametrize(
    ("stored", "shown", "options"),
    [
        (255 - ZYX, ZYX, {}),
        (255 - ZYX, ZYX, {"compression": "lzw", "tile": (16, 16)}),
        (65535 - ZYX.astype(np.uint16), ZYX, {"byteorder": ">"}),
        (4095 - ZYX.astype(np.uint16), ZYX, {"bitspersample": 12}),
        (15 - ZYX // 16, ZYX // 16, {"bitspersample": 4}),
        (MASK == 0, MASK, {"software": "a scanner", "metadata": None}),
    ],
)
def test_white_is_zero_is_read_as_viewers_show_it(tmp_path, stored, shown, options):
    path = write(tmp_path / "a.tif", stored, photometric="miniswhite", **options)
    assert np.array_equal(read_label(path).array, shown)
    assert np.array_equal(read_image(path).array[0], shown)
    if stored.dtype != np.uint16 and "bitspersample" not in options:
        with Image.open(path) as picture:
            picture.seek(3)
            assert np.array_equal(np.asarray(picture), shown[3].astype(stored.dtype))


def test_pages_of_white_is_zero_one_by_one_are_turned_too(tmp_path):
    options = {"photometric": "miniswhite", "contiguous": False}
    path = of_pages(tmp_path / "a.tif", lambda tif, _, page: tif.write(255 - page, **options))
    assert np.array_equal(read_image(path).array[0], ZYX)


@pytest.mark.parametrize(
    ("array", "options", "reason"),
    [
        (MASK == 1, {"photometric": None}, "as tifffile writes any bool array"),
        (MASK, {"imagej": True, "metadata": {"axes": "ZYX"}}, "ImageJ's inverting LUT"),
        (ZYX.astype(np.float32), {}, "float32, which has no white"),
        (ZYX.astype(np.int16), {}, "int16, which has no white"),
    ],
)
def test_white_is_zero_of_doubtful_meaning_is_a_fault(tmp_path, array, options, reason):
    path = write(tmp_path / "a.tif", array, **({"photometric": "miniswhite"} | options))
    with pytest.raises(VolumeError, match=rf"a\.tif: .*WhiteIsZero, .*{reason}.*as uint8"):
        read_label(path)


def test_the_colors_of_a_palette_are_its_class_ids(tmp_path):
    pages = [Image.fromarray(page % 4).convert("P") for page in ZYX]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_label(tmp_path / "a.tif").array, ZYX % 4)


# ---------------------------------------------------------------------------- pages and axes


@pytest.mark.parametrize(
    ("write_page", "options"),
    [
        (lambda tif, i, page: tif.write(page, metadata={"slice": i}), {}),
        (lambda tif, i, page: tif.write(page[None], contiguous=False), {"bigtiff": True}),
        (lambda tif, i, page: tif.write(page), {"ome": True}),
        (lambda tif, i, page: tif.write(page, metadata=None), {}),
        (lambda tif, i, page: tif.write(page, compression="lzw" if i % 3 else None), {}),
        (lambda tif, i, page: tif.write(page, metadata=None, tile=(16, 16) if i % 2 else None), {}),
        (lambda tif, i, page: tif.write(page, metadata=None if i else {}, compression="zlib"), {}),
    ],
)
def test_pages_written_one_by_one_are_a_volume(tmp_path, write_page, options):
    path = of_pages(tmp_path / "a.tif", write_page, **options)
    assert np.array_equal(read_image(path).array[0], ZYX)
    assert voxel_count(path) == ZYX.size


def test_pages_of_pillow_are_a_volume(tmp_path):
    pages = [Image.fromarray(page > 200) for page in ZYX]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression="group4")
    assert np.array_equal(read_label(tmp_path / "a.tif").array, MASK)


@pytest.mark.parametrize(
    "odd",
    [{"compression": "lzw"}, {"compression": "zlib", "predictor": True}, {"rowsperstrip": 3},
     {"tile": (16, 16)}, {}],
)  # fmt: skip
def test_one_page_that_is_stored_in_another_way_is_read_right(tmp_path, odd):
    def write_page(tif, index, page):
        tif.write(page, metadata=None, photometric="minisblack", **(odd if index == 4 else {}))

    pages = np.concatenate([ZYX, ZYX[::-1]])  # of which tifffile compares but a few
    path = of_pages(tmp_path / "a.tif", write_page, pages)
    assert np.array_equal(read_image(path).array[0], pages)


@pytest.mark.parametrize("change", [np.uint16, lambda page: page[:9], "miniswhite"])
def test_one_page_of_another_kind_is_a_fault(tmp_path, change):
    def write_page(tif, index, page):
        photometric = change if index == 4 and isinstance(change, str) else "minisblack"
        page = change(page) if index == 4 and callable(change) else page
        tif.write(page, metadata=None, photometric=photometric)

    path = of_pages(tmp_path / "a.tif", write_page, np.concatenate([ZYX, ZYX]))
    with pytest.raises(VolumeError, match="differing shape or kind"):
        read_image(path)


def test_several_stacks_in_a_file_are_no_volume(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for part in (ZYX[:3], ZYX[3:]):
            tif.write(part, photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(VolumeError, match="several stacks"):
        read_image(tmp_path / "a.tif")


def test_pages_appended_to_a_stack_of_imagej_are_not_passed_over(tmp_path):
    path = write(tmp_path / "a.tif", imagej=True, metadata={"axes": "ZYX"})
    pages = [Image.fromarray(page) for page in ZYX[:2]]
    pages[0].save(path, save_all=True, append_images=pages[1:], append=True)
    with pytest.raises(VolumeError, match="several stacks"):
        read_image(path)


def test_a_thumbnail_and_a_pyramid_are_passed_over(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(ZYX, photometric="minisblack", subifds=1)
        tif.write(ZYX[:, ::2, ::2], photometric="minisblack", subfiletype=1)
        tif.write(ZYX[0, ::4, ::4], photometric="minisblack", subfiletype=1)
    assert np.array_equal(read_image(tmp_path / "a.tif").array[0], ZYX)


@pytest.mark.parametrize(
    ("array", "metadata"),
    [
        (ZYX[None, :, None], {"axes": "TZCYX"}),
        (ZYX[..., None], {}),
        (ZYX[None, None], {}),
        (ZYX.transpose(2, 1, 0), {"axes": "XYZ"}),
        (ZYX.transpose(1, 2, 0), {"axes": "YXZ"}),
    ],
)
def test_axes_of_one_are_left_out_and_named_axes_come_in_order(tmp_path, array, metadata):
    path = write(tmp_path / "a.tif", array, metadata=metadata)
    assert np.array_equal(read_image(path).array[0], ZYX)


def test_channels_come_first_wherever_they_stand(tmp_path):
    both = np.stack([ZYX, MASK])
    write(tmp_path / "a.tif", both.transpose(1, 2, 3, 0), metadata={"axes": "ZYXC"})
    write(tmp_path / "b.tif", both.transpose(1, 0, 2, 3), ome=True, metadata={"axes": "ZCYX"})
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(read_image(tmp_path / name).array, both), name


@pytest.mark.parametrize(
    ("shape", "options", "axes"),
    [
        ((4, 20, 30, 5), {}, "QQYX"),
        ((2, 6, 20, 30), {}, "QQYX"),
        ((2, 6, 20, 30), {"ome": True, "metadata": {"axes": "TZYX"}}, "TZYX"),
    ],
)
def test_axes_that_may_be_anything_are_a_fault_that_says_what_to_do(tmp_path, shape, options, axes):
    path = write(tmp_path / "a.tif", np.zeros(shape, np.uint8), **options)
    with pytest.raises(VolumeError, match=rf"got axes {axes}.*'CZYX'"):
        read_image(path)


# ---------------------------------------------------------------------------- spacing


def sizes(z, y, x, *units):
    named = dict(zip(("PhysicalSizeZ", "PhysicalSizeY", "PhysicalSizeX"), (z, y, x), strict=True))
    return named | {f"PhysicalSize{a}Unit": u for a, u in zip("ZYX", units, strict=False)}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (sizes(2, 0.5, 0.25), ((2.0, 0.5, 0.25), "micron")),
        (sizes(2, 0.5, 0.25, "mm", "mm", "mm"), ((2.0, 0.5, 0.25), "mm")),
        (sizes(2, 500, 250, "µm", "nm", "nm"), ((2000.0, 500.0, 250.0), "nm")),
        (sizes(2000, 500, 250, "pm", "pm", "pm"), ((2.0, 0.5, 0.25), "nm")),
        (sizes(2, 1, 1, "Mm", "m", "m"), ((2e6, 1.0, 1.0), "m")),
        (sizes(20, 5, 5, "Å", "Å", "Å"), ((2.0, 0.5, 0.5), "nm")),
        (sizes(4, 1, 1, "pixel", "pixel", "pixel"), ((4.0, 1.0, 1.0), "")),
        (sizes(1, 1, 1, "pixel", "pixel", "pixel"), (None, "")),
        ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, (None, "")),
        (sizes("two", 1, 1), (None, "")),
    ],
)
def test_ome_sizes_are_read_in_their_units(tmp_path, metadata, expected):
    volume = read_image(write(tmp_path / "a.tif", ome=True, metadata={"axes": "ZYX"} | metadata))
    assert (volume.spacing, volume.unit) == expected


@pytest.mark.parametrize(
    ("metadata", "pixels_per_unit", "expected"),
    [
        ({"spacing": 2.0, "unit": "um"}, (2, 4), ((2.0, 0.25, 0.5), "micron")),
        ({"spacing": -2.0, "unit": "\\u00B5m"}, (2, 2), ((2.0, 0.5, 0.5), "micron")),
        ({"spacing": 2.0, "unit": "nm", "zunit": "um"}, (0.1, 0.1), ((2000.0, 10.0, 10.0), "nm")),
        ({"spacing": 0.2, "unit": "cm"}, (2, 2), ((2.0, 5.0, 5.0), "mm")),
        ({"spacing": 5.0}, (1, 1), ((5.0, 1.0, 1.0), "")),
        ({"spacing": 5.0, "unit": "pixel"}, (1, 1), ((5.0, 1.0, 1.0), "")),
        ({"spacing": 1.0, "unit": "pixel"}, (1, 1), (None, "")),
        ({"unit": "um"}, (2, 2), (None, "")),
        ({"unit": "um", "spacing": "two"}, (2, 2), (None, "")),
    ],
)
def test_imagej_sizes_are_read_in_their_units(tmp_path, metadata, pixels_per_unit, expected):
    options = {"imagej": True, "resolution": pixels_per_unit}
    path = write(tmp_path / "a.tif", metadata={"axes": "ZYX"} | metadata, **options)
    volume = read_image(path)
    assert (volume.spacing, volume.unit) == expected


def test_imagej_itself_leaves_out_a_z_step_of_one(tmp_path):
    description = "ImageJ=1.53t\nimages=6\nslices=6\nunit=µm\nloop=false\n".encode("latin-1")
    options = {"metadata": None, "resolution": (2, 2), "description": description}
    volume = read_image(write(tmp_path / "a.tif", **options))
    assert (volume.spacing, volume.unit) == ((1.0, 0.5, 0.5), "micron")


def test_imagej_resolution_per_cm_is_of_the_micron_that_is_the_unit(tmp_path):
    options = {"imagej": True, "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    path = write(
        tmp_path / "a.tif", metadata={"axes": "ZYX", "spacing": 2, "unit": "um"}, **options
    )
    assert read_image(path).spacing == (2.0, 0.5, 0.5)


def test_units_of_which_only_some_are_known_are_a_fault(tmp_path):
    metadata = {"axes": "ZYX"} | sizes(2, 1, 1, "ly", "µm", "µm")
    with pytest.raises(VolumeError, match=r"a\.tif: .*known unit.*'ly', 'µm', 'µm'"):
        read_image(write(tmp_path / "a.tif", ome=True, metadata=metadata))


def test_the_voxel_size_of_lsm_is_in_metres():
    tif = SimpleNamespace(lsm_metadata={"VoxelSizeX": 5e-7, "VoxelSizeY": 5e-7, "VoxelSizeZ": 2e-6})
    spacing = tiff._spacing_and_unit("/nowhere/a.lsm", tif, None)
    assert spacing == ((2.0, 0.5, 0.5), "micron")


def test_a_spacing_without_unit_survives_writing(tmp_path):
    write_volume(tmp_path / "a.tif", ZYX, spacing=(5, 2, 1))
    assert read_image(tmp_path / "a.tif").spacing == (5.0, 2.0, 1.0)


# ---------------------------------------------------------------------------- nnU-Net's .json


@pytest.fixture
def case(tmp_path):
    """Reads image and label of a case after its `c.json` was written."""
    image, label = write(tmp_path / "c_0000.tif"), write(tmp_path / "c.tif", MASK)

    def read(content):
        (tmp_path / "c.json").write_text(content)
        return read_image(image), read_label(label)

    return read


@pytest.mark.parametrize("stated", [[5, 1, 0.5], ["5", "1", "0.5"]])
def test_nnunets_json_gives_image_and_label_their_spacing(case, stated):
    for volume in case(json.dumps({"spacing": stated})):
        assert (volume.spacing, volume.unit) == ((5.0, 1.0, 0.5), "")


@pytest.mark.parametrize(
    "content",
    ['{"spacing": [5, 1]}', '{"spacing": 5}', '{"spacing": [5, 0, 1]}', "{", "{}", "[1]",
     '{"spacing": [NaN, 1, 1]}', '{"spacing": "5 1 1"}'],
)  # fmt: skip
def test_a_wrong_json_of_nnunet_is_a_fault_that_names_it(case, content):
    with pytest.raises(VolumeError, match=r"c_0000\.tif: .*c\.json.*nnU-Net's spacing"):
        case(content)


def test_a_json_of_another_program_is_passed_over(tmp_path):
    (tmp_path / "c.json").write_text('{"shapes": []}')
    assert read_image(write(tmp_path / "c.tif")).spacing is None


def test_json_and_tiff_must_agree_up_to_a_unit(tmp_path):
    (tmp_path / "c.json").write_text('{"spacing": [5, 1, 1]}')
    metadata = {"axes": "ZYX", "unit": "mm"}
    options = {"imagej": True, "resolution": (1, 1)}
    volume = read_image(write(tmp_path / "c.tif", metadata=metadata | {"spacing": 5.0}, **options))
    assert (volume.spacing, volume.unit) == ((5.0, 1.0, 1.0), "mm")
    metres = {"axes": "ZYX", "unit": "m", "spacing": 0.005}
    options["resolution"] = (1000, 1000)
    volume = read_image(write(tmp_path / "c.tif", metadata=metres, **options))
    assert (volume.spacing, volume.unit) == ((5.0, 1.0, 1.0), "")
    path = write(tmp_path / "c.tif", metadata=metres | {"spacing": 0.002}, **options)
    with pytest.raises(VolumeError, match=r"c\.json states, 5 1 1, got \(0\.002"):
        read_image(path)


# ---------------------------------------------------------------------------- what is missing


def ome_set(folder, names, companion=None):
    """Write ZYX as an OME set of files with equal parts of it; returns the XML of all."""
    depth, height, width = ZYX.shape
    each = depth // len(names)
    blocks = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z % each}" PlaneCount="1">'
        f'<UUID FileName="{names[z // each]}">urn:uuid:{z // each}</UUID></TiffData>'
        for z in range(depth)
    )
    image = (
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
        f'SizeX="{width}" SizeY="{height}" SizeZ="{depth}" SizeC="1" SizeT="1" PhysicalSizeX="1" '
        f'PhysicalSizeY="1" PhysicalSizeZ="5"><Channel ID="C:0"/>{blocks}</Pixels></Image>'
    )
    for number, name in enumerate(names):
        content = f'<BinaryOnly MetadataFile="{companion}" UUID="c"/>' if companion else image
        xml = f'<OME xmlns="{OME}" UUID="urn:uuid:{number}">{content}</OME>'
        of_pages(
            folder / name,
            lambda tif, i, page, xml=xml: tif.write(
                page, description=None if i else xml, metadata=None, contiguous=False
            ),
            ZYX[number * each : (number + 1) * each],
        )
    return f'<OME xmlns="{OME}">{image}</OME>'


@pytest.mark.parametrize("names", [["a.tif"], ["a.tif", "b.tif"], ["a.tif", "b.tif", "c.tif"]])
def test_a_whole_ome_set_is_read_from_any_of_its_files(tmp_path, names):
    ome_set(tmp_path, names)
    for name in names:
        volume = read_image(tmp_path / name)
        assert np.array_equal(volume.array[0], ZYX)
        assert volume.spacing == (5.0, 1.0, 1.0)


@pytest.mark.parametrize("gone", [["a.tif"], ["c.tif"], ["b.tif", "c.tif"]])
def test_a_missing_file_of_an_ome_set_is_named(tmp_path, gone):
    ome_set(tmp_path, ["a.tif", "b.tif", "c.tif"])
    for name in gone:
        (tmp_path / name).unlink()
    left = next(iter(sorted(tmp_path.iterdir())))
    with pytest.raises(VolumeError, match=rf"{left.name}: .*OME set, got no {gone[0]} that"):
        read_image(left)


def test_the_companion_of_an_ome_set_is_named(tmp_path):
    xml = ome_set(tmp_path, ["a.tif", "b.tif"], companion="all.companion.ome")
    with pytest.raises(VolumeError, match=r"a\.tif: .*all\.companion\.ome.*put it back"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "all.companion.ome").write_text(xml)
    with pytest.raises(VolumeError, match=r"a\.tif: .*a part of the set in .*all\.companion\.ome"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "one.companion.ome").write_text(ome_set(tmp_path, ["c.tif"], "one.companion.ome"))
    volume = read_image(tmp_path / "c.tif")
    assert np.array_equal(volume.array[0], ZYX) and volume.spacing == (5.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", [{"ome": True}, {"imagej": True}, {}])
def test_a_page_that_the_metadata_promise_is_missed(tmp_path, kind):
    path = write(tmp_path / "a.tif", metadata={"axes": "ZYX"}, compression="lzw", **kind)
    with tifffile.TiffFile(path) as tif:
        end = tif.pages[3].offset + 2 + 12 * len(tif.pages[3].tags)  # where the next page is said
    content = bytearray(path.read_bytes())
    content[end : end + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"a\.tif: expected a whole"):
        read_image(path)


@pytest.mark.parametrize("compression", ["lzw", "jpeg"])
def test_a_page_without_voxels_is_not_read_as_zeros(tmp_path, compression):
    path = write(tmp_path / "a.tif", metadata=None, compression=compression)
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[4].tags["StripByteCounts"].valueoffset
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"a\.tif: .*page 5 of 6"):
        read_image(path)


@pytest.mark.parametrize(
    "options",
    [{"ome": True}, {"imagej": True}, {"compression": "jpeg"}, {"tile": (16, 16)},
     {"metadata": None, "compression": "zstd"}],
)  # fmt: skip
def test_a_cut_file_is_refused_unless_its_voxels_are_whole(tmp_path, options, capfd):
    path = write(tmp_path / "a.tif", **options)
    whole, voxels = path.read_bytes(), tifffile.imread(path)
    for part in np.linspace(0.05, 0.97, 12):
        path.write_bytes(whole[: int(part * len(whole))])
        try:
            assert np.array_equal(read_image(path).array[0], voxels)
            assert "imagej" in options and part > 0.5  # which states once where all pages lie
        except VolumeError as error:
            assert str(error).startswith(str(path))
    assert capfd.readouterr().err == ""  # nothing of tifffile's own


# ---------------------------------------------------------------------------- what is odd


def test_a_page_without_a_strip_is_a_fault(tmp_path):
    path = of_pages(tmp_path / "a.tif", lambda w, _, page: w.write(page, metadata=None))
    with tifffile.TiffFile(path) as tif:
        tags = [tif.pages[3].tags[name] for name in ("StripOffsets", "StripByteCounts")]
        places = [tag.valueoffset for tag in tags]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="page 4 of 6"):
        read_image(path)


def test_time_that_is_taken_for_z_and_an_orientation_are_noted(tmp_path):
    series = write(tmp_path / "t.tif", imagej=True, metadata={"axes": "TYX"})
    assert read_image(series).notes == ("its axis T of 6 is taken for z",)
    turned = write(tmp_path / "o.tif", extratags=[(274, 3, 1, 3, True)], metadata=None)
    assert read_image(turned).notes == ("its Orientation, 3, is not applied: rows as stored",)
    assert read_image(write(tmp_path / "z.tif")).notes == ()


def test_without_the_tag_of_polarity_0_is_black(tmp_path):
    path = write(tmp_path / "a.tif", metadata=None)
    with tifffile.TiffFile(path) as tif:
        places = [page.tags["PhotometricInterpretation"].offset for page in tif.pages]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 2] = (65000).to_bytes(2, "little")  # a private tag
    path.write_bytes(content)
    assert np.array_equal(read_image(path).array[0], ZYX)


@pytest.mark.parametrize("shape", [(6, 20, 1), (1, 1, 1), (6, 1, 24), (1, 20, 24)])
def test_a_mask_of_any_shape_can_be_read_back(tmp_path, shape):
    for dtype in ("u1", "f4", "i4"):
        mask = np.arange(np.prod(shape)).reshape(shape).astype(dtype) % 2
        write_volume(tmp_path / "a.tif", mask, spacing=(3, 1, 1), unit="mm")
        assert np.array_equal(read_image(tmp_path / "a.tif").array[0], mask)
