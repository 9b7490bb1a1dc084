"""The contact sheet: what is shown of each setting, the pixels, and the script end to end."""

import os

import numpy as np
import pytest
import yaml

from patches import augment, contact_sheet
from settings import Augment
from volumes import casefile as cases

ORANGE = np.array(contact_sheet.OUTLINE)
INTENSITY = {"gamma", "brightness", "contrast", "noise", "rician", "blur", "low_resolution"}
INTENSITY |= {"illumination", "dropout"}


def configured(**changes):
    elastic = {"elastic_spacing": 24.0, "elastic_amplitude_range": (0.5, 1.5)}
    return Augment().model_dump() | elastic | changes


def probabilities():
    """Names of the `augment` settings that are numbers from 0 to 1."""
    limits = {name: {str(m) for m in f.metadata} for name, f in Augment.model_fields.items()}
    return {name for name, found in limits.items() if {"Ge(ge=0)", "Le(le=1)"} <= found}


# ---------------------------------------------------------------------------- settings


def test_every_transformation_of_the_settings_has_a_block_of_its_own():
    blocks = contact_sheet.variants(configured())
    shown = set()
    for _, draws in blocks:
        assert len(draws) == contact_sheet.DRAWS
        on = [{name for name in probabilities() if draw[name] > 0} for draw in draws]
        assert on[0] == on[1] == on[2]
        assert len(on[0] - {"scaling"}) == 1 or on[0] == {"scaling"}
        shown |= on[0]
    assert shown == probabilities()
    assert len(blocks) == len(probabilities())


def test_draws_go_from_the_lowest_part_of_the_range_to_the_highest():
    blocks = dict(contact_sheet.variants(configured(gamma_range=(0.5, 2.0))))
    title = next(t for t in blocks if t.startswith("gamma"))
    parts = [draw["gamma_range"] for draw in blocks[title]]
    assert parts == [(0.5, 1.0), (1.0, 1.5), (1.5, 2.0)]


def test_scaling_per_axis_draws_its_three_factors_from_the_whole_range():
    blocks = dict(contact_sheet.variants(configured(scaling_range=(0.5, 2.0))))
    title = next(t for t in blocks if t.startswith("scaling per axis"))
    assert {draw["scaling_range"] for draw in blocks[title]} == {(0.5, 2.0)}


def test_titles_tell_probability_and_range_as_configured():
    settings = configured(gamma=0.25, gamma_range=(0.5, 2.0), roll=0.0, dropout_boxes=(2, 3))
    settings |= {"scaling": 0.5, "scaling_per_axis": 0.5}
    titles = [title for title, _ in contact_sheet.variants(settings)]
    assert "gamma: p 0.25, exponent 0.5 to 2" in titles
    assert "roll: off, along z" in titles
    assert "scaling per axis: p 0.25, three factors 0.75 to 1.33" in titles
    assert "dropout: off, share 0.01 to 0.1 in 2 to 3 boxes" in titles


# ---------------------------------------------------------------------------- pictures


def painted(image, target=None, valid=None, *, spacing=(1.0, 1.0, 1.0), **options):
    """The picture of a patch, grey from 0 to 1; enlarged is (z slice, y slice)."""
    target = np.zeros(image.shape, bool) if target is None else target
    valid = np.ones(image.shape, bool) if valid is None else valid
    whole = contact_sheet.picture(image, target, valid, spacing=spacing, grey=(0.0, 1.0), **options)
    above = round(whole.shape[1] * image.shape[1] * spacing[1] / (image.shape[2] * spacing[2]))
    return whole, whole[:above], whole[above + contact_sheet.GAP :]


def test_coarse_slices_are_shown_as_thick_as_they_are():
    # The longest side, 2 slices of 5, is 10 finest voxels: 20 pixels each.
    whole, above, below = painted(np.zeros((2, 4, 4), np.float32), spacing=(5.0, 1.0, 1.0))
    assert above.shape == (80, 80, 3)
    assert below.shape == (200, 80, 3)
    assert whole.dtype == np.uint8


def test_a_patch_of_more_voxels_than_pixels_keeps_them_all():
    _, above, below = painted(np.zeros((3, 210, 220), np.float32))
    assert above.shape == (210, 220, 3)
    assert below.shape == (3, 220, 3)


def test_middle_slices_are_shown_on_the_given_grey_range():
    image = np.zeros((3, 5, 4), np.float32)
    image[1, 0, 0] = 0.5
    image[1, 0, 1] = 2.0  # brighter than white
    image[1, 0, 2] = -1.0
    image[0, 2, 3] = 1.0  # in the middle y slice alone
    _, above, below = painted(image)  # 40 pixels per voxel
    assert above[20, 20].tolist() == [128, 128, 128]
    assert above[20, 60].tolist() == [255, 255, 255]
    assert above[20, 100].tolist() == [0, 0, 0]
    assert above[:, 120:].max() == 0
    assert below[20, 140].tolist() == [255, 255, 255]


def test_the_outline_takes_the_border_pixels_of_the_label_and_no_others():
    target = np.zeros((1, 5, 5), bool)
    target[0, 1:3, 1:4] = True  # 40 pixels per voxel
    _, above, _ = painted(np.full((1, 5, 5), 0.5, np.float32), target)
    orange = (above == ORANGE).all(axis=2)
    expected = np.zeros((200, 200), bool)
    expected[40:120, 40:160] = True
    expected[41:119, 41:159] = False
    np.testing.assert_array_equal(orange, expected)
    _, plain, _ = painted(np.full((1, 5, 5), 0.5, np.float32), target, outline=False)
    assert (plain == 128).all()


def test_a_label_that_leaves_the_patch_has_no_border_there():
    _, above, _ = painted(np.zeros((1, 5, 5), np.float32), np.ones((1, 5, 5), bool))
    assert not (above == ORANGE).all(axis=2).any()


def test_invalid_voxels_are_hatched_and_darkened_and_no_others():
    valid = np.ones((1, 4, 4), bool)
    valid[0, :, :2] = False
    _, above, _ = painted(np.full((1, 4, 4), 0.8, np.float32), valid=valid)
    colours, counts = np.unique(above[:, :100].reshape(-1, 3), axis=0, return_counts=True)
    hatched = dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True))
    assert hatched == {(102, 102, 102): 15000, contact_sheet.HATCH: 5000}
    assert (above[:, 100:] == 204).all()


def test_border_counts_thin_things_and_not_what_fills_the_patch():
    assert contact_sheet.middle_border(np.zeros((4, 6, 6), bool)) == 0
    assert contact_sheet.middle_border(np.ones((4, 6, 6), bool)) == 0
    sheet = np.zeros((4, 6, 6), bool)
    sheet[:, :, 2] = True  # two sides: 6 voxels long in the z slice, 4 in the y slice
    assert contact_sheet.middle_border(sheet) == 2 * 6 + 2 * 4


def test_the_grey_range_is_wider_than_the_slices_even_of_a_constant_patch():
    rng = np.random.default_rng(0)
    low, high = contact_sheet.grey_range(rng.uniform(-1, 1, (4, 20, 20)).astype(np.float32))
    assert low == pytest.approx(-1.5, abs=0.05)
    assert high == pytest.approx(1.5, abs=0.05)
    assert contact_sheet.grey_range(np.full((1, 3, 3), 2.0)) == (1.5, 2.5)


# ---------------------------------------------------------------------------- the script


def write_case(root, name, label):
    """A curved sheet on noise; the label is made unlabeled (2) below it."""
    rng = np.random.default_rng(len(name))
    shape = (10, 24, 24) if label is None else label.shape
    image = rng.normal(100, 10, shape)
    if label is not None:
        image += 60 * (label == 1)
    about = {"spacing": (2.0, 1.0, 1.0), "unit": "micron", "affine": None, "group": name}
    image = image.astype(np.uint8)[None]
    cases.write_case(root / f"{name}.h5", image, label, ignore_label=2, skeleton=False, **about)


def curved():
    z, y, x = np.indices((10, 24, 24))
    distance = np.abs(y - 12 - 4 * np.sin(x / 5) - z / 3)
    label = (distance < 1.5).astype(np.uint8)
    label[:, 20:] = 2
    return label


@pytest.fixture
def config_file(tmp_path):
    """A config beside a dataset: case a is labeled, b is not, c is unlabeled everywhere."""
    root = tmp_path / "data"
    root.mkdir()
    for name, label in {"a": curved(), "b": None, "c": np.full((4, 8, 8), 2, np.uint8)}.items():
        write_case(root, name, label)
    cases.write_dataset(
        root,
        classes={"background": 0, "sheet": 1},
        ignore_label=2,
        unit="micron",
        case_ids=["a", "b", "c"],
    )
    content = {
        "run": {"folder": str(tmp_path / "runs")},
        "data": {"root": str(root), "train": ["a"]},
        "sampling": {"patch": [6, 16, 16]},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(*arguments):
    return augment.cli([str(argument) for argument in arguments])


def blocks_of(monkeypatch, *arguments):
    """The blocks that the script would write."""
    kept = {}
    monkeypatch.setattr(contact_sheet, "write_sheet", lambda path, blocks, **_: kept.update(blocks))
    assert run(*arguments) == 0
    return kept


def test_the_sheet_is_written_where_the_run_would_be_and_is_its_name_printed(config_file, capsys):
    from PIL import Image

    assert run(config_file) == 0
    path = config_file.parent / "runs" / "augment_small.png"
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert os.listdir(path.parent) == [path.name]
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        wide, high = sheet.size
        colours = np.asarray(sheet.convert("RGB"))
    # 3 blocks of 3 pictures of 192 pixels: the patch is 16 voxels wide.
    assert wide == contact_sheet.MARGIN + 3 * (3 * (192 + contact_sheet.GAP) + contact_sheet.MARGIN)
    assert high > 6 * (192 + 144)
    assert (colours[0, 0] == 255).all()
    assert (colours == ORANGE).all(axis=2).sum() > 10_000


def test_the_same_config_case_and_seed_give_the_same_bytes(config_file, tmp_path):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    for out in (first, again):
        assert run(config_file, "--case", "a", "--seed", 1, "--out", out) == 0
    assert first.read_bytes() == again.read_bytes()


def test_another_seed_draws_otherwise(config_file, monkeypatch):
    first, other = (blocks_of(monkeypatch, config_file, "--seed", seed) for seed in (1, 2))
    title = next(t for t in first if t.startswith("noise"))
    for (a, _), (b, _) in zip(first[title], other[title], strict=True):
        assert (a != b).any()


def test_every_transformation_changes_its_picture_whatever_is_configured(config_file, monkeypatch):
    off = [f"augment.{name}=0" for name in probabilities()]
    blocks = blocks_of(monkeypatch, config_file, *off)
    original = blocks.pop("original")[1][0]
    configured = blocks.pop("all as configured")
    assert all(np.array_equal(picture, original) for picture, _ in configured)
    assert {caption for _, caption in configured} == {"nothing changed"}
    assert len(blocks) == len(probabilities())
    for title, pictures in blocks.items():
        assert ": off, " in title
        # The lowest part of a range may hold next to no change, three flips may be none.
        assert any((p != original).mean() > 0.01 for p, _ in pictures), title


def test_grey_value_transformations_leave_the_label_where_it_is(config_file, monkeypatch):
    blocks = blocks_of(monkeypatch, config_file)
    outline = (blocks["original"][1][0] == ORANGE).all(axis=2)
    assert outline.any()
    assert not (blocks["original"][0][0] == ORANGE).all(axis=2).any()
    seen = set()
    for title, pictures in blocks.items():
        name = title.split(":")[0]
        if name in INTENSITY:
            seen.add(name)
            for picture, caption in pictures:
                assert caption.startswith(name + "\N{NO-BREAK SPACE}")
                np.testing.assert_array_equal((picture == ORANGE).all(axis=2), outline)
    assert seen == INTENSITY


def test_overrides_reach_the_sheet(config_file, monkeypatch):
    blocks = blocks_of(monkeypatch, config_file, "augment.gamma=0.5", "augment.gamma_range=[2,2]")
    pictures = blocks["gamma: p 0.5, exponent 2 to 2"]
    assert {caption for _, caption in pictures} == {"gamma\N{NO-BREAK SPACE}2.00"}


def test_a_case_without_foreground_has_a_sheet_too(config_file, monkeypatch):
    root = config_file.parent / "data"
    write_case(root, "a", np.zeros((3, 1, 8), np.uint8))  # thinner than the patch, too
    blocks = blocks_of(monkeypatch, config_file)
    assert not (blocks["original"][1][0] == ORANGE).all(axis=2).any()


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--case", "d"], "--case: expected a case of"),
        (["--case", "b"], "--case: case b has no label"),
        (["--case", "c"], "expected cases with labeled voxels"),
        (["data.train=[b]"], "data.train: case b has no label"),
        (["data.root=nowhere"], "data.root: expected a folder made by prepare.py"),
        (["augment.gama=0.5"], "augment.gama: no such setting"),
        (["data.foreground=[vein]"], "data.foreground: expected names among sheet"),
    ],
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(
    config_file, capsys, arguments, sentence
):
    before = sorted(os.listdir(config_file.parent))
    assert run(config_file, *arguments) == 2
    written = capsys.readouterr()
    assert sentence in written.err
    assert len(written.err.splitlines()) == 1
    assert written.out == ""
    assert sorted(os.listdir(config_file.parent)) == before


def test_a_negative_seed_exits_with_2(config_file):
    with pytest.raises(SystemExit) as stop:
        run(config_file, "--seed", "-1")
    assert stop.value.code == 2


def test_a_sheet_that_cannot_be_written_is_one_sentence(config_file, capsys):
    assert run(config_file, "--out", config_file / "sheet.png") == 2
    assert f"{config_file / 'sheet.png'}: expected a file to write" in capsys.readouterr().err


def test_a_write_that_fails_keeps_the_sheet_before(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"before")
    block = ("original", [(np.zeros((10, 10, 3), np.uint8), "caption")])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(contact_sheet.os, "replace", fail)
    with pytest.raises(ValueError, match="No space left"):
        contact_sheet.write_sheet(path, [block], heading=["one line"])
    assert os.listdir(tmp_path) == ["sheet.png"]
    assert path.read_bytes() == b"before"
