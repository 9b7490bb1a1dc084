"""What a network tells apart: chosen from the classes of the data, written as ids."""

import dataclasses

import numpy as np
import pytest

from runtime import config, outputs
from runtime.outputs import Outputs, with_chosen
from settings import Settings

CLASSES = {"background": 0, "artery": 3, "vein": 7, "nerve": 1}


def test_one_class_is_one_foreground():
    one = outputs.choose({"background": 0, "sheet": 1})
    assert (one.regions, one.channels, one.exclusive) == ({"sheet": (1,)}, 1, False)
    assert outputs.choose({"background": 0}).foreground == []


def test_named_classes_are_one_foreground_together_written_as_1():
    one = outputs.choose(CLASSES, foreground=("vein", "artery"))
    assert (one.foreground, one.channels, one.several) == ([7, 3], 1, False)
    assert one.paint({"vein+artery": np.ones((1, 2, 2), bool)}).tolist() == [[[1, 1], [1, 1]]]


@pytest.mark.parametrize("foreground", [None, ()])
def test_several_classes_exclude_each_other_if_nothing_is_named(foreground):
    three = outputs.choose(CLASSES, foreground)
    assert three.regions == {"artery": (3,), "vein": (7,), "nerve": (1,)}
    assert (three.channels, three.exclusive, three.overlapping) == (4, True, False)
    assert three.written == {"artery": 3, "vein": 7, "nerve": 1}


def test_regions_are_painted_in_order_with_the_first_class_that_no_later_one_has():
    regions = {"vessel": ("artery", "vein"), "artery": ("artery",)}
    two = outputs.choose(CLASSES, regions=regions)
    assert (two.channels, two.exclusive, two.overlapping) == (2, False, True)
    assert two.foreground == [3, 7] and two.written == {"vessel": 7, "artery": 3}
    masks = {"vessel": np.array([[[1, 1, 0]]], bool), "artery": np.array([[[0, 1, 1]]], bool)}
    painted = two.paint(masks)
    assert painted.tolist() == [[[7, 3, 3]]] and painted.dtype == np.uint8
    assert "vessel (3+7, written as 7), artery (3): regions" in two.describe()


def test_regions_that_the_data_declare_hold_unless_the_settings_name_others():
    declared = {"whole": (3, 7), "vein": (7,)}
    assert outputs.choose(CLASSES, declared=declared) == Outputs(declared)
    assert outputs.choose(CLASSES, ("nerve",), declared=declared).foreground == [1]
    named = {"all": ("nerve", "vein"), "vein": ("vein",)}
    assert outputs.choose(CLASSES, None, named, declared).regions["all"] == (1, 7)


def test_a_class_is_meant_by_its_name_or_its_number():
    for foreground in (("artery", "vein"), ("3", "vein"), ("3", "7")):
        assert outputs.choose(CLASSES, foreground) == Outputs({"artery+vein": (3, 7)})
    regions = {"all": ("1", "vein"), "vein": ("7",)}
    assert outputs.choose(CLASSES, regions=regions).regions == {"all": (1, 7), "vein": (7,)}
    given = Settings.model_validate({"data": {"foreground": [3, "vein"]}}).data.foreground
    assert given == ("3", "vein")


def test_a_region_that_later_ones_cover_is_refused():
    regions = {"vessel": ("artery", "vein"), "artery": ("artery",), "vein": ("vein",)}
    with pytest.raises(ValueError, match=r"in no later one.*, got none of vessel; put it after"):
        outputs.choose(CLASSES, regions=regions)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (
            {"foreground": ("nerv",)},
            "data.foreground: expected a class by its name or number, artery",
        ),
        ({"foreground": ("2",)}, "data.foreground: .*, artery 3, vein 7, nerve 1, got '2'"),
        ({"foreground": ("background",)}, "got 'background'"),
        ({"regions": {"all": ("artery", "x")}}, "data.regions.all: .*, got 'x'"),
        ({"regions": {"mean": ("artery",), "b": ("vein",)}}, "data.regions: .*, got 'mean'"),
        ({"regions": {"a/b": ("artery",), "b": ("vein",)}}, "data.regions: .*, got 'a/b'"),
        ({"regions": {"-x": ("artery",), "b": ("vein",)}}, "data.regions: .*, got '-x'"),
        ({"regions": {" ": ("artery",), "b": ("vein",)}}, "data.regions: .*, got ' '"),
    ],
)
def test_a_name_of_no_class_or_of_no_score_is_refused(wanted, expected):
    with pytest.raises(ValueError, match=expected):
        outputs.choose(CLASSES, **wanted)


def test_a_checkpoint_tells_them_and_an_old_one_has_one_foreground():
    for some in (
        outputs.choose(CLASSES),
        outputs.choose(CLASSES, regions={"a": ("artery", "vein"), "b": ("vein",)}),
    ):
        assert outputs.of_metadata({"foreground": some.foreground, **outputs.plain(some)}) == some
    assert outputs.of_metadata({"foreground": [2, 5]}) == Outputs({"foreground": (2, 5)})


# ---------------------------------------------------------------------------- settings

SHEET, SHEETS = Outputs({"sheet": (1,)}), Outputs({"recto": (1,), "verso": (2,)})


def settings_of(threshold=None, size=None, hysteresis=None):
    post = {"min_component_voxels": size, "hysteresis": hysteresis}
    return config.build({"inference": {"threshold": threshold}, "postprocess": post})


@pytest.mark.parametrize(
    ("own", "chosen", "expected"),
    [
        (None, {}, {"recto": 0.5, "verso": 0.5}),
        (None, {"recto": 0.3, "verso": 0.6}, {"recto": 0.3, "verso": 0.6}),
        (0.4, {"recto": 0.3, "verso": 0.6}, {"recto": 0.4, "verso": 0.4}),
        ({"verso": 0.0}, {"recto": 0.3, "verso": 0.6}, {"recto": 0.3, "verso": 0.0}),
        ({"verso": 0.9}, {}, {"recto": 0.5, "verso": 0.9}),
    ],
)
def test_each_region_has_its_own_threshold_else_the_chosen_one_else_a_half(own, chosen, expected):
    settings = with_chosen(settings_of(own), {"threshold": chosen} if chosen else {}, SHEETS)
    assert settings.inference.threshold == expected
    assert settings.postprocess.min_component_voxels == {"recto": 0, "verso": 0}


def test_one_foreground_has_one_number_by_its_name_or_without():
    for own, expected in ((None, 20), (0, 0), ({"sheet": 5}, 5), ({}, 20)):
        settings = with_chosen(settings_of(size=own), {"min_component_voxels": 20}, SHEET)
        assert settings.postprocess.min_component_voxels == expected
        assert settings.inference.threshold == 0.5


def test_a_step_that_is_given_wins_over_one_that_was_taken_and_is_off_without_either():
    def post(own, chosen):
        found = with_chosen(config.build({"postprocess": own}), chosen, SHEET).postprocess
        return found.hysteresis, found.max_hole_voxels, found.closing_radius

    taken = {"hysteresis": 0.3, "max_hole_voxels": 20, "closing_radius": 1.5}
    assert post({}, {}) == (None, 0, 0.0)
    assert post({}, taken) == (0.3, 20, 1.5)
    assert post({"max_hole_voxels": 0, "closing_radius": 4.0}, taken) == (0.3, 0, 4.0)
    assert post({"hysteresis": 1.0}, taken) == (None, 20, 1.5)


def test_classes_that_exclude_each_other_have_no_threshold():
    chosen = {"min_component_voxels": {"recto": 3, "verso": 0}}
    settings = with_chosen(settings_of(), chosen, dataclasses.replace(SHEETS, exclusive=True))
    assert settings.inference.threshold is None
    assert settings.postprocess.min_component_voxels == {"recto": 3, "verso": 0}


@pytest.mark.parametrize(
    ("changes", "exclusive", "message"),
    [
        ({"threshold": 0.5}, True, "inference.threshold: expected none, .* recto, verso and the b"),
        ({"hysteresis": 0.2}, True, "postprocess.hysteresis: expected none, .* got 0.2; set it to"),
        ({"threshold": {"rekto": 0.5}}, False, "threshold: .* among recto, verso, got rekto"),
        ({"size": {"rekto": 5}}, True, "min_component_voxels: .* among recto, verso, got rekto"),
    ],
)
def test_what_prediction_cannot_do_is_one_sentence(changes, exclusive, message):
    with pytest.raises(ValueError, match=message) as caught:
        outputs.check_settings(Outputs(SHEETS.regions, exclusive), settings_of(**changes))
    assert "\n" not in str(caught.value)


def test_settings_that_name_regions_pass():
    outputs.check_settings(SHEETS, settings_of({"recto": 0.4}, {"verso": 9}, 0.2))
    outputs.check_settings(Outputs(SHEETS.regions, True), settings_of(size={"verso": 9}))


def test_the_most_probable_channel_is_the_first_of_equals():
    probs = np.random.default_rng(0).integers(0, 4, (5, 3, 6, 7)).astype(np.float32) / 4
    before = probs.copy()
    channels = outputs.most_probable(probs)
    np.testing.assert_array_equal(channels, probs.argmax(axis=0))
    np.testing.assert_array_equal(probs, before)
    assert channels.dtype == np.uint8


def test_probabilities_of_regions_need_names_of_folders():
    asked = config.build({"inference": {"save_probabilities": True}})
    for name in ("a/b", ".."):
        with pytest.raises(ValueError, match=f"folders can have, got {name}; set it to false"):
            outputs.check_settings(Outputs({"a": (1,), name: (2,)}), asked)


def test_one_foreground_is_the_same_under_its_name_or_its_ids():
    def one(name, *ids):
        return Outputs({name: ids})

    assert outputs.difference(one("artery", 1), one("artery", 3)) is None
    assert outputs.difference(one("artery", 1), one("vessel", 1)) is None
    assert outputs.difference(one("a+b", 1, 2), one("b+a", 2, 1)) is None
    assert outputs.difference(one("foreground", 1), one("vein", 2)) is None  # an older checkpoint
    words = "one foreground, artery", "one foreground, vein"
    assert outputs.difference(one("artery", 1), one("vein", 2)) == words
