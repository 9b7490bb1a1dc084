"""One checkpoint, or several whose probabilities are averaged: asked together.

settings, line = joint_settings(members, ["inference.flips=true"])
metadata = joint_metadata(members)
"""

import functools
import statistics
from operator import attrgetter

import torch

import model
from runtime import config, outputs, parts
from runtime.own_threshold import AUTO, LEVELS, count_reached, histogram, own_threshold
from runtime.sliding_window import network_ratio, predict_case
from runtime.window_axis import window_rows
from scoring import postprocess
from settings import STEPS_OFF
from volumes.files import split_dataset
from volumes.volume import InputErrors, VolumeError, collect_errors

ALIKE = ("inference.window", "inference.overlap", "inference.flips")
STEPS = tuple(f"postprocess.{step}" for step in STEPS_OFF)  # alike where one is given


# All else that a config holds was decided by training and comes from the checkpoint.
DEVICE_KEYS = ("run.device", "run.threads", "run.deterministic", "training.precision")
SETTABLE = ("inference.", "postprocess.", "data.root", *DEVICE_KEYS)


# ---------------------------------------------------------------------------- putting together


def joint_settings(members, overrides):
    """(settings, line) of all members with overrides; ValueError names every fault, a line each:
    also keys that training has decided.

    All that an ensemble does must be the same for its members, but for what validation chose; how
    it runs (device, windows at once) is said by the first. line: for people, None of one member.
    """
    faults, overridden = [], {text.partition("=")[0] for text in overrides}
    # A key may go on below a setting: data.regions.vessel.
    known = tuple(f"{key}." for key in config.valid_keys())
    keys = {key for key in overridden if f"{key}.".startswith(known)}
    if fixed := sorted(key for key in keys if not key.startswith(SETTABLE)):
        sentence = (
            f"expected a setting of inference (those under {', '.join(SETTABLE)}), got one that "
            "training has decided; leave it out"
        )
        faults += [f"{key}: {sentence}" for key in fixed]
        overrides = [text for text in overrides if text.partition("=")[0] not in fixed]
    each, given = [], set()
    told_apart = outputs.of_metadata(members[0].data)
    for member in members:
        with collect_errors(faults):
            settings = config.build(config.apply_overrides(member.config, overrides))
            outputs.check_settings(told_apart, settings)
            given |= {key for key in STEPS if attrgetter(key)(settings) is not None}
            settings = outputs.with_chosen(settings, member.chosen, told_apart)
            settings.inference.window = settings.inference.window or settings.sampling.patch
            strides = member.data["strides"]
            model.check_divides("inference.window", settings.inference.window, strides)
            each.append(settings)
    if faults:
        raise InputErrors(*dict.fromkeys(faults))
    for key in (*ALIKE, *sorted(given)):
        values = {}
        for member, settings in zip(members, each, strict=True):
            values.setdefault(attrgetter(key)(settings), member.path)
        if len(values) > 1:
            got = ", ".join(f"{value} ({path})" for value, path in values.items())
            faults.append(f"{key}: expected one for all checkpoints, got {got}; give {key}=VALUE")
    faults += _auto_faults(members, [settings.inference.threshold for settings in each])
    joint, clauses = each[0], []
    if joint.inference.save_disagreement and len(members) == 1 and not joint.inference.flips:
        faults.append(
            "inference.save_disagreement: expected predictions that can differ, got one network "
            "without flips; give inference.flips=true or several checkpoints, or set it to false"
        )
    if faults:
        raise InputErrors(*faults)
    for key, join in CHOSEN.items():
        group, name = key.split(".")
        values = [attrgetter(key)(settings) for settings in each]
        if all(value == STEPS_OFF.get(name) for value in values):  # None: the threshold of classes
            continue
        if any(value != values[0] for value in values):
            setattr(getattr(joint, group), name, join(values))
        clauses.append(
            f"{name} {in_words(attrgetter(key)(joint))} of {', '.join(map(in_words, values))}"
        )
    line = f"ensemble   mean of {len(members)} networks' probabilities; {'; '.join(clauses)}"
    return joint, line if len(members) > 1 else None


def _auto_faults(members, thresholds):
    """A sentence if the threshold is auto and not all members can have it."""
    unknown = [member.path for member in members if member.foreground is None]
    if AUTO in thresholds and (unknown or set(thresholds) != {AUTO}):
        got = f"none in {', '.join(unknown)}" if unknown else ", ".join(map(str, thresholds))
        yield (
            "inference.threshold: auto needs the share of foreground in training, and counts for "
            f"all checkpoints, got {got}; give inference.threshold=NUMBER"
        )


def _mean(values, digits=None):
    """Of numbers, or of {region: number}."""
    if isinstance(values[0], dict):
        return {name: _mean([value[name] for value in values], digits) for name in values[0]}
    return round(statistics.mean(values), digits)


def _middle_hysteresis(values):
    middle = statistics.median_high(1.0 if value is None else value for value in values)
    return None if middle == 1 else middle


# How an ensemble puts together what validation chose for each model. By the mean threshold
# mean(probs) >= mean(thresholds) where models lie above their own by more than others lie below.
# A step is on if more than half of the models took it, at the middle value, the weaker of two.
CHOSEN = {
    "inference.threshold": functools.partial(_mean, digits=4),
    "postprocess.min_component_voxels": _mean,
    "postprocess.hysteresis": _middle_hysteresis,
    "postprocess.max_hole_voxels": statistics.median_low,
    "postprocess.closing_radius": statistics.median_low,
}


def in_words(value):
    """A number, or {region: number}, as YAML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {number}' for name, number in value.items())}}}"
    return str(value)


def joint_metadata(members):
    """What the first run knows of its data; test and validation cases are those of all runs."""
    first, *others = [member.data for member in members]
    cases = {
        key: [case for case in first[key] if all(case in other[key] for other in others)]
        for key in ("test", "validation")
    }
    return first | cases


# ---------------------------------------------------------------------------- prediction


class Predictor:
    """Predicts an `Input` by the members, of which there may be one.

    settings: theirs together; metadata: what they know of their data.
    """

    def __init__(self, members, settings, metadata, device, precision):
        self.members, self.settings, self.metadata = members, settings, metadata
        self.outputs = outputs.of_metadata(metadata)
        self.device = device
        self.networks = [member.network.to(device) for member in members]
        # remembered: what memory the volumes before have needed, for all that follow.
        self.how = {"device": device, "precision": precision, "remembered": {}}
        self.how |= {"wanted": metadata["spacing"], "clip": settings.data.percentiles}
        self.how["typical"] = metadata.get("typical", False)  # not in those of older versions
        self.how |= {"channels": self.outputs.channels, "exclusive": self.outputs.exclusive}
        self.how |= settings.window_arguments()
        self.how["disagreement"] = settings.inference.save_disagreement

    def rows(self, volume):
        """(rows, windows in each) that a volume is predicted by."""
        ratio = network_ratio(volume.spacing, self.metadata["spacing"])
        inference = self.settings.inference
        return window_rows(volume.shape, inference.window, inference.overlap, ratio)

    def slabs(self, volume, **how):
        """Finished slabs in order: (z0, {layer: (d, H, W)}); how: arguments of predict_slabs."""
        with volume.voxels() as image:
            about = (image, volume.spacing, volume.intensity)
            for z0, probs in self.probabilities(*about, **how):
                layers = self._layers(probs)
                del probs  # while the next slab is made
                yield z0, layers

    def probabilities(self, image, spacing, intensity, **how):
        """What `predict_case` yields of an image that is seen as a volume of these is."""
        return predict_case(self.networks, image, spacing, intensity, **self.how, **how)

    def thresholded(self, probs):
        """{region: mask (D, H, W) bool} of probabilities (K, D, H, W). A threshold that is auto is
        that of these voxels."""
        layers = self._layers(probs)
        self.settle_threshold(layers)
        return self.regions_of(layers, "high")

    def reached(self, probs):
        """({region: how many thresholds (one, or LEVELS where it is auto) a voxel reaches, uint8 or
        bool}, {region: whether that of hysteresis, if it is on}) of probabilities (K, d, h, w)."""
        layers = self._layers(probs)
        if "reached" in layers:
            high = dict.fromkeys(self.outputs.regions, layers["reached"])
        else:
            high = self.regions_of(layers, "high")
        return high, self.regions_of(layers, "low")

    def _layers(self, probs):
        """The layers of a slab (K, d, H, W) of `predict_slabs`. Of each region, see `_layer`:

        high: bool, above the threshold; where that is auto, reached in its place: uint8, see
        `own_threshold`; low: bool, above that of hysteresis, if there is one; probabilities and
        disagreement: float32, if inference.save_... asks for them. Of classes that exclude each
        other there is one disagreement, and one layer, classes, in place of high and low: uint8,
        see `outputs.most_probable`.
        """
        inference, hysteresis = self.settings.inference, self.settings.postprocess.hysteresis
        layers, exclusive = {}, self.outputs.exclusive
        if inference.save_disagreement:
            for name, own in zip(self._disagreeing, probs[self.outputs.channels :], strict=True):
                layers[self._layer("disagreement", name)] = own
            probs = probs[: self.outputs.channels]
        if exclusive:
            layers["classes"] = outputs.most_probable(probs)
        for name, own in zip(self.outputs.regions, probs[int(exclusive) :], strict=True):
            if not exclusive:
                threshold = inference.threshold
                threshold = threshold[name] if self.outputs.several else threshold
                if threshold == AUTO:
                    layers["reached"] = count_reached(own)
                else:
                    layers[self._layer("high", name)] = own >= threshold
            if hysteresis is not None:
                layers[self._layer("low", name)] = own >= hysteresis
            if inference.save_probabilities:
                layers[self._layer("probabilities", name)] = own
        return layers

    def _layer(self, kind, region):
        return f"{kind}/{region}" if self.outputs.several and region else kind

    @property
    def _disagreeing(self):
        """The regions that have a disagreement of their own, or "" for one of all together."""
        return [""] if self.outputs.exclusive else self.outputs.regions

    def regions_of(self, whole, kind):
        """Take {region: (D, H, W)} of one kind out of whole layers, see `_layers`; {} if there are
        none. The one disagreement of exclusive classes is that of the region ""."""
        if kind == "high" and self.outputs.exclusive:
            classes = whole.pop("classes")
            return {name: classes == i for i, name in enumerate(self.outputs.regions, start=1)}
        names = self._disagreeing if kind == "disagreement" else self.outputs.regions
        layers = {name: self._layer(kind, name) for name in names}
        return {name: whole.pop(layer) for name, layer in layers.items() if layer in whole}

    def own_threshold(self, counts):
        """The threshold of a volume with this `histogram`."""
        return own_threshold(counts, statistics.mean(one.foreground for one in self.members))

    def settle_threshold(self, whole):
        """Put the layer high in place of reached; the threshold in words, "" where it is known."""
        if "reached" not in whole:
            return ""
        reached = whole.pop("reached")
        threshold = self.own_threshold(histogram(reached))
        whole["high"] = reached > LEVELS.index(threshold)
        return f"threshold {threshold}, "

    def masks(self, volume, whole):
        """{region: mask (D, H, W) bool} of a volume, taken out of its whole layers."""
        post, exclusive = self.settings.postprocess.model_dump(), self.outputs.exclusive
        self.settle_threshold(whole)
        layers = self.regions_of(whole, "high"), self.regions_of(whole, "low")
        how = {"exclusive": exclusive, "spacing": volume.spacing}
        return postprocess.apply_to_regions(*layers, **how, **post)

    @functools.cached_property
    def digits(self):
        """What tells the weights and settings that decide a prediction from others."""
        settings = self.settings.plain()
        values = [settings[key] for key in ("inference", "postprocess")]
        values += [settings["run"][key] for key in ("threads", "deterministic")]
        values += [self.device.type, self.how["precision"], str(torch.__version__)]
        values += [[member.config, member.data] for member in self.members]
        return parts.fingerprint(values, self.networks)

    def fingerprint(self, volume):
        """What tells the prediction of a volume from that of other weights, settings or voxels."""
        paths = [volume.path] if volume.is_case else volume.sources
        try:
            stamps = [parts.stamp(split_dataset(path)[0]) for path in paths]
        except OSError as error:
            raise VolumeError(f"expected a volume that can be read, got {error}") from error
        about = (volume.shape, volume.spacing, volume.intensity, stamps)
        return parts.fingerprint([self.digits, *about])
