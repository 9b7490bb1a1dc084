"""The contact sheet: what is shown of each setting, the patches, and the picture."""

import os

import numpy as np
import pytest
from matplotlib.colors import to_hex

from patches import contact_sheet
from settings import Augment
from volumes import casefile

INTENSITY = {"gamma", "brightness", "contrast", "noise", "rician", "blur", "low_resolution"}
INTENSITY |= {"illumination", "dropout"}


def configured(**changes):
    return Augment().model_dump() | changes


def probabilities():
    """Names of the `augment` settings that are numbers from 0 to 1."""
    limits = {name: {str(m) for m in f.metadata} for name, f in Augment.model_fields.items()}
    return {name for name, bounds in limits.items() if {"Ge(ge=0)", "Le(le=1)"} <= bounds}


# ---------------------------------------------------------------------------- settings


def variants(**changes):
    """{title: settings of each picture} of all transformations, at a spacing of 1."""
    blocks = dict(contact_sheet._variants(configured(**changes), (1.0, 1.0, 1.0)))
    last = blocks.pop("all as configured")
    elastic = {"elastic_spacing": 24.0, "elastic_amplitude_range": (0.5, 1.5)}
    assert last == [configured(**elastic | changes)] * contact_sheet.PICTURES
    return blocks


def block(blocks, name):
    """The pictures of one transformation."""
    return next(pictures for title, pictures in blocks.items() if title.startswith(f"{name}: "))


def test_every_transformation_of_the_settings_has_a_block_of_its_own():
    blocks, shown = variants(), set()
    for pictures in blocks.values():
        on = [{name for name in probabilities() if one[name] > 0} for one in pictures]
        assert on[0] == on[1] == on[2]
        assert len(on[0] - {"scaling"}) == 1 or on[0] == {"scaling"}
        shown |= on[0]
    assert shown == probabilities()
    assert len(blocks) == len(probabilities())


def test_pictures_go_from_the_lowest_part_of_the_range_to_the_highest():
    parts = [one["gamma_range"] for one in block(variants(gamma_range=(0.5, 2.0)), "gamma")]
    assert parts == [(0.5, 1.0), (1.0, 1.5), (1.5, 2.0)]


def test_scaling_per_axis_samples_its_three_factors_from_the_whole_range():
    pictures = block(variants(scaling_range=(0.5, 2.0)), "scaling_per_axis")
    assert {one["scaling_range"] for one in pictures} == {(0.5, 2.0)}


def test_titles_tell_probability_and_range_as_configured():
    changes = {"gamma": 0.25, "gamma_range": (0.5, 2.0), "roll": 0.0, "dropout_boxes": (2, 3)}
    titles = list(variants(**changes, scaling=0.5, scaling_per_axis=0.5))
    assert "gamma: p 0.25, exponent 0.5 to 2" in titles
    assert "roll: off, along z" in titles
    assert "scaling_per_axis: p 0.25, three factors 0.75 to 1.33" in titles
    assert "dropout: off, share 0.01 to 0.1 in 2 to 3 boxes" in titles


def test_border_counts_thin_things_and_not_what_fills_the_patch():
    nothing, sheet = np.zeros((4, 6, 6)), np.zeros((4, 6, 6))
    assert contact_sheet._border([nothing]) == contact_sheet._border([nothing + 1]) == (0, 0)
    sheet[:, :, 2] = 1  # two sides: 6 voxels long in the z slice, 4 in the y slice
    assert contact_sheet._border([sheet]) == (1, 2 * 6 + 2 * 4)


def test_a_patch_of_two_classes_counts_before_one_with_more_border_of_one_class():
    much, little = np.zeros((2, 4, 6, 6)), np.zeros((2, 4, 6, 6))
    much[0, :, ::2] = 1
    little[0, 2, 3, 3] = little[1, 2, 3, 4] = 1
    assert contact_sheet._border(little) > contact_sheet._border(much)


# ---------------------------------------------------------------------------- patches


def curved():
    """A curved sheet; the label is made unlabeled (2) from y = 20 on."""
    z, y, x = np.indices((10, 24, 24))
    label = (np.abs(y - 12 - 4 * np.sin(x / 5) - z / 3) < 1.5).astype(np.uint8)
    label[:, 20:] = 2
    return label


def write_case(folder, label):
    rng = np.random.default_rng(0)
    image = (rng.normal(100, 10, label.shape) + 60 * (label == 1)).astype(np.uint8)[None]
    about = {"spacing": (2.0, 1.0, 1.0), "unit": "micron", "affine": None, "group": "a"}
    casefile.write_case(folder / "a.h5", image, label, ignore_label=2, skeleton=False, **about)
    return casefile.read_case(folder / "a.h5")


def write_sheet(path, case, seed=0, regions=None, **changes):
    contact_sheet.write_sheet(
        path,
        case,
        configured(**changes),
        patch=(6, 16, 16),
        spacing=case.spacing,
        scale={"mean": [100.0], "std": [20.0], "low": None, "high": None},
        regions=regions or {"label": (1,)},
        ignore_label=2,
        seed=seed,
        name="small",
    )


@pytest.fixture
def blocks_of(tmp_path, monkeypatch):
    """Function of label and settings: {title: [(image, target, valid, caption)]} of the sheet."""
    drawn = {}

    def keep(blocks, spacing, heading, names):
        drawn.update(blocks)
        raise OSError("not drawn")

    def blocks_of(label=None, **changes):
        monkeypatch.setattr(contact_sheet, "_draw", keep)
        with pytest.raises(ValueError, match="got not drawn"):
            case = write_case(tmp_path, curved() if label is None else label)
            write_sheet(tmp_path / "sheet.png", case, **changes)
        return dict(drawn)

    return blocks_of


def test_another_seed_samples_otherwise(blocks_of):
    first, other = (block(blocks_of(seed=seed), "noise") for seed in (1, 2))
    assert all((a[0] != b[0]).any() for a, b in zip(first, other, strict=True))


def test_every_transformation_changes_its_picture_whatever_is_configured(blocks_of):
    blocks = blocks_of(**dict.fromkeys(probabilities(), 0.0))
    original = blocks.pop("original")[1][0]
    assert all(np.array_equal(p[0], original) for p in blocks.pop("all as configured"))
    assert len(blocks) == len(probabilities())
    for title, pictures in blocks.items():
        assert ": off, " in title
        # The lowest part of a range may hold next to no change, three flips may be none.
        assert any((p[0] != original).mean() > 0.01 for p in pictures), title


def test_grey_value_transformations_leave_the_label_where_it_is(blocks_of):
    blocks = blocks_of()
    (_, nothing, *_), (_, target, valid, _) = blocks["original"]
    assert target.any() and not nothing.any() and not valid.all()
    for name in INTENSITY:
        for _, own_target, own_valid, caption in block(blocks, name):
            assert caption.startswith(f"{name} ")
            assert np.array_equal(own_target, target) and np.array_equal(own_valid, valid)


def test_each_region_has_a_mask_of_its_own(blocks_of):
    label = np.where(np.indices((10, 24, 24))[2] > 12, 3, 1).astype(np.uint8) * (curved() == 1)
    regions = {"whole": (1, 3), "part": (3,), "none": (7,)}
    _, (_, masks, valid, _) = blocks_of(label, regions=regions)["original"]
    whole, part, nothing = masks
    assert valid.all() and part.any() and not nothing.any()
    assert (whole > part).any() and not (part > whole).any()


def test_settings_reach_the_patches(blocks_of):
    pictures = blocks_of(gamma=0.5, gamma_range=(2.0, 2.0))["gamma: p 0.5, exponent 2 to 2"]
    assert {caption for *_, caption in pictures} == {"gamma 2.00"}


# ---------------------------------------------------------------------------- the picture


def pixels(path):
    from PIL import Image

    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        return np.asarray(sheet.convert("RGB")).astype(int)


def test_a_sheet_shows_label_and_invalid_voxels_and_is_the_same_again(tmp_path):
    case = write_case(tmp_path, curved())
    for name in ("first.png", "again.png"):
        write_sheet(tmp_path / "runs" / name, case)
    first, again = (tmp_path / "runs" / name for name in ("first.png", "again.png"))
    assert first.read_bytes() == again.read_bytes()
    assert sorted(os.listdir(first.parent)) == ["again.png", "first.png"]
    red, green, blue = np.moveaxis(pixels(first), 2, 0)
    assert ((red > 230) & (green > 120) & (green < 160) & (blue < 40)).sum() > 2_000
    assert (blue > red + 60).sum() > 20_000
    assert (red[0] == 255).all()


def test_coarse_slices_are_shown_as_thick_as_they_are():
    patch = (np.zeros((2, 4, 4)), np.zeros((1, 2, 4, 4)), np.ones((2, 4, 4), bool), "")
    figure = contact_sheet._draw([("original", [patch])], (5.0, 1.0, 2.0), "heading", ("",))
    body = figure.subfigs[1]
    (z_slice, *_), (y_slice, *_) = np.reshape(body.subfigs[0].axes, (2, contact_sheet.PICTURES))
    assert (z_slice.get_aspect(), y_slice.get_aspect()) == (0.5, 2.5)
    assert z_slice.images[0].get_array().shape == (4, 4)
    assert y_slice.images[0].get_array().shape == (2, 4)


def test_the_grey_range_is_wider_than_the_patch_even_if_that_is_constant():
    patch = (np.full((1, 3, 3), 2.0), np.zeros((1, 1, 3, 3)), np.ones((1, 3, 3), bool), "")
    figure = contact_sheet._draw([("original", [patch])], (1.0, 1.0, 1.0), "heading", ("",))
    assert figure.subfigs[1].subfigs[0].axes[0].images[0].get_clim() == (1.5, 2.5)


def test_each_class_has_the_color_of_the_legend_and_one_alone_has_none():
    masks = np.zeros((3, 2, 8, 8))
    masks[0, :, 1:6, 1:6] = masks[2, :, 2:4, 2:4] = 1  # the second is not in the patch
    patch = (np.zeros((2, 8, 8)), masks, np.ones((2, 8, 8), bool), "")
    names = ("cord", "nerve", "grey$^$")
    figure = contact_sheet._draw([("original", [patch])], (1.0, 1.0, 1.0), "heading", names)
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["cord", "nerve", r"grey\$^\$"]
    figure.draw_without_rendering()  # a ValueError where the name is read as a formula
    lines = [to_hex(line.get_color()) for line in legend.get_lines()]
    drawn = figure.subfigs[1].subfigs[0].axes[0].collections
    assert [to_hex(contour.get_edgecolor()[0]) for contour in drawn] == [lines[0], lines[2]]
    assert len(set(lines)) == 3
    alone = contact_sheet._draw([("original", [patch])], (1.0, 1.0, 1.0), "heading", ("",))
    assert not alone.subfigs[0].legends


def test_a_case_without_foreground_and_thinner_than_the_patch_has_a_sheet_too(tmp_path):
    write_sheet(tmp_path / "sheet.png", write_case(tmp_path, np.zeros((3, 1, 8), np.uint8)))
    assert (tmp_path / "sheet.png").is_file()


# ---------------------------------------------------------------------------- faults


def test_a_case_without_a_labeled_voxel_is_one_sentence(tmp_path):
    case = write_case(tmp_path, np.full((3, 8, 8), 2, np.uint8))
    with pytest.raises(ValueError, match="case a: expected labeled voxels"):
        write_sheet(tmp_path / "sheet.png", case)
    assert os.listdir(tmp_path) == ["a.h5"]


def test_a_sheet_that_cannot_be_written_is_one_sentence_and_keeps_the_one_before(
    tmp_path, monkeypatch
):
    case, path = write_case(tmp_path, curved()), tmp_path / "sheet.png"
    path.write_bytes(b"before")

    class Full:
        def savefig(self, partial, format):
            partial.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(contact_sheet, "_draw", lambda *_: Full())
    with pytest.raises(ValueError, match=r"sheet.png: expected a file to write, got No space left"):
        write_sheet(path, case)
    with pytest.raises(ValueError, match=r"expected a file to write, got File exists"):
        write_sheet(path / "sheet.png", case)
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "sheet.png"]
    assert path.read_bytes() == b"before"
