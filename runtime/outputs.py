"""What a network tells apart: one foreground, several classes, or regions that share classes.

    outputs = choose({"background": 0, "artery": 3, "vein": 7})
    outputs.regions, outputs.channels           # {"artery": (3,), "vein": (7,)}, 3
    outputs.paint({"artery": mask, "vein": other})

A region is a name and the ids of the classes that belong to it.
"""

import operator
from dataclasses import dataclass

import numpy as np

from runtime.own_threshold import AUTO
from settings import STEPS_OFF
from volumes import classes as label_classes


@dataclass(frozen=True)
class Outputs:
    """regions: {name: class ids}; each is a foreground channel of the network.

    exclusive: a voxel is of one region or of the background, channel 0: a softmax. Else each
    region has a sigmoid of its own.
    """

    regions: dict[str, tuple[int, ...]]
    exclusive: bool = False

    @property
    def channels(self):
        """How many the network has."""
        return len(self.regions) + self.exclusive

    @property
    def several(self):
        return len(self.regions) > 1

    @property
    def overlapping(self):
        return self.several and not self.exclusive

    @property
    def foreground(self):
        """The ids of all classes that are in a region."""
        return list(dict.fromkeys(i for ids in self.regions.values() for i in ids))

    @property
    def written(self):
        """{name: id in a mask}: 1 of one foreground; else the first class of each region that is
        in no later one, for those are painted over it. None where there is no such class."""
        if not self.several:
            return dict.fromkeys(self.regions, 1)
        rows = list(self.regions.values())
        later = [{i for ids in rows[n:] for i in ids} for n in range(1, len(rows) + 1)]
        own = [[i for i in ids if i not in others] for ids, others in zip(rows, later, strict=True)]
        return {name: next(iter(ids), None) for name, ids in zip(self.regions, own, strict=True)}

    def paint(self, masks):
        """Ids (D, H, W) uint8 of {region: bool (D, H, W)}, in the order of the regions."""
        painted = np.zeros(next(iter(masks.values())).shape, np.uint8)
        for name, number in self.written.items():
            painted[masks[name]] = number
        return painted

    def describe(self):
        """A line for people on several regions, without their names' heading."""
        kind = "one of these in each voxel" if self.exclusive else "regions that may overlap"
        rows = [
            f"{name} ({'+'.join(map(str, ids))}, written as {self.written[name]})"
            if ids != (self.written[name],)
            else f"{name} ({ids[0]})"
            for name, ids in self.regions.items()
        ]
        return f"{', '.join(rows)}: {kind}"


def choose(classes, foreground=None, regions=None, declared=None):
    """The `Outputs` for the classes {name: id} of a data set; ValueError, one sentence.

    foreground: classes that are one foreground together, by name or number; regions: {name:
    classes}, which may overlap; declared: {name: ids} of the data set's own regions. None of these:
    every class is a region, and they exclude each other.
    """
    named = {name: number for name, number in classes.items() if number != 0}
    if foreground:
        ids = _ids("data.foreground", foreground, named)
        names = {number: name for name, number in named.items()}
        return Outputs({"+".join(names[number] for number in ids): ids})
    if not regions and not declared:
        named = {name: (number,) for name, number in named.items()} or {"foreground": ()}
        return Outputs(named, exclusive=len(named) > 1)
    for name in regions or ():
        if not label_classes.is_name(name):
            raise ValueError(f"data.regions: expected {label_classes.NAME}, got {name!r}")
    own = {name: _ids(f"data.regions.{name}", of, named) for name, of in (regions or {}).items()}
    outputs = Outputs(own or declared)
    if bare := [name for name, number in outputs.written.items() if number is None]:
        raise ValueError(
            "data.regions: expected of each region a class that is in no later one, for masks are "
            f"painted in this order, got none of {', '.join(bare)}; put it after those that hold "
            "all of its classes, or leave it out"
        )
    return outputs


def _ids(key, members, named):
    """The ids of the classes of a setting, which are names or numbers."""
    if not members:
        raise ValueError(f"{key}: expected classes among {', '.join(named)}, got none")
    return tuple(dict.fromkeys(label_classes.id_of(word, named, key) for word in members))


def most_probable(probs):
    """The channel of the highest of probabilities (K, D, H, W), the first of equals: uint8."""
    best, channels = probs[0].copy(), np.zeros(probs.shape[1:], np.uint8)
    for channel, other in enumerate(probs[1:], start=1):
        np.putmask(channels, other > best, channel)
        np.maximum(best, other, out=best)
    return channels


def plain(outputs):
    """What a checkpoint holds of them."""
    regions = {name: list(ids) for name, ids in outputs.regions.items()}
    return {"regions": regions, "exclusive": outputs.exclusive}


def of_metadata(data):
    """The `Outputs` of what a checkpoint says of its data; older ones know one foreground."""
    regions = data.get("regions", {"foreground": data["foreground"]})
    return Outputs(
        {name: tuple(ids) for name, ids in regions.items()}, data.get("exclusive", False)
    )


def difference(before, now):
    """(before, now) in words where the channels of two `Outputs` do not mean the same in the same
    order; else None. One foreground is the same under its name or under its ids; older
    checkpoints do not know its name."""
    both = before, now
    words = [
        o.describe() if o.several else f"one foreground, {next(iter(o.regions))}" for o in both
    ]
    if not before.several and not now.several:
        ids = [set(each.foreground) for each in both]
        if ids[0] == ids[1] or "foreground" in before.regions:
            return None
    return tuple(words) if words[0] != words[1] else None


def check_settings(outputs, settings):
    """ValueError, a sentence per fault, for what prediction cannot do with these outputs."""
    faults = []
    for key in ("inference.threshold", "postprocess.min_component_voxels"):
        value = operator.attrgetter(key)(settings)
        named = value if isinstance(value, dict) else {}
        if unknown := [name for name in named if name not in outputs.regions]:
            faults.append(
                f"{key}: expected names among {', '.join(outputs.regions)}, got "
                f"{', '.join(unknown)}"
            )
    if settings.inference.threshold == AUTO and outputs.several and not outputs.exclusive:
        faults.append(
            f"inference.threshold: expected a number of each of {', '.join(outputs.regions)}, got "
            f"{AUTO}, which is for one foreground; give numbers, or null for what validation chose"
        )
    bad = [name for name in outputs.regions if name in (".", "..") or "/" in name]
    folders = {"save_probabilities": outputs.several, "save_disagreement": outputs.overlapping}
    for key, of_regions in folders.items():
        if bad and of_regions and getattr(settings.inference, key):
            faults.append(
                f"inference.{key}: expected names of regions that folders can have, got "
                f"{', '.join(bad)}; set it to false"
            )
    if outputs.exclusive:
        names = ", ".join(outputs.regions)
        for key in ("inference.threshold", "postprocess.hysteresis"):
            if (value := operator.attrgetter(key)(settings)) is not None:
                faults.append(
                    f"{key}: expected none, for a voxel gets the most probable of {names} and the "
                    f"background, without a threshold, got {value}; set it to null"
                )
    if faults:
        raise ValueError("\n".join(faults))


def with_chosen(settings, chosen, outputs):
    """Settings with what validation chose ({} if nothing) where they leave it open.

    Of several regions of the `Outputs` threshold and size are {region: number} then; those that
    exclude each other have no threshold. Of the steps of
    `STEPS_OFF` there is one number for all; hysteresis is None where it is off.
    """
    copy = settings.model_copy(deep=True)
    if not outputs.exclusive:
        asked = copy.inference.threshold, chosen.get("threshold"), 0.5
        copy.inference.threshold = _of_each(outputs.regions, asked)
    asked = copy.postprocess.min_component_voxels, chosen.get("min_component_voxels"), 0
    copy.postprocess.min_component_voxels = _of_each(outputs.regions, asked)
    for step, off in STEPS_OFF.items():
        own = getattr(copy.postprocess, step)
        setattr(copy.postprocess, step, chosen.get(step, off) if own is None else own)
    if copy.postprocess.hysteresis == 1:
        copy.postprocess.hysteresis = None
    return copy


def _of_each(regions, values):
    """{region: number} by the first of the values that has one for it; of one region the number.

    A value is one number for all, {region: number} or None.
    """
    numbers = {}
    for name in regions:
        own = [value.get(name) if isinstance(value, dict) else value for value in values]
        numbers[name] = next(number for number in own if number is not None)
    return numbers if len(numbers) > 1 else numbers.popitem()[1]
