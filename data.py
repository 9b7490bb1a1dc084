"""Patches drawn from case files: where they lie, and what a worker reads and ships.

A worker draws the parameters of a patch, reads the box of source voxels that it covers, in the
file's own dtype, and ships both. The device does the rest (augment.py, grid.py).
"""

import math
import time
from typing import NamedTuple

import numpy as np
import torch

from volumes.casefile import Unreadable

GOLDEN = (math.sqrt(5) - 1) / 2
NEAR_BORDER = 0.9  # of half the patch: how far from its middle the voxel drawn around may come
BACKGROUND = 0
PAUSES = (0.2, 1.0)  # seconds before a case file that cannot be read is tried again
UNREADABLE = (Unreadable, OSError)


class ReadFailure(NamedTuple):
    """Stands for the sample of a case that cannot be read, after it was tried again."""

    case: str
    reason: str


class PatchDataset:
    """Patches as boxes of source voxels, each a function of (seed, epoch, index) alone.

    cases: list of `Case`, all labeled; cache: a `cache.VolumeCache` of them; patch: voxels z, y,
    x; spacing: target spacing per axis, 0 or None keeps the case's own; sample_spatial_params,
    sample_intensity_params, place_patch: see augment.py, intensity.py, grid.py (picklable: they travel to
    the workers); foreground: {class id: weight}, of foreground draws each class gets its share of
    the weights, if any case has it; foreground_share: of draws that are around a foreground voxel;
    jitter: how far off-centre that voxel lies, as a share of half the patch; clip: percentiles to
    clip intensities to, or None; skeletons: whether to ship the box of the stored skeleton too,
    which every case file must hold then (cases.check_skeletons).

    dataset[epoch, index] reads only the box that the patch covers and returns plain values and
    tensors: image, label and, if wanted, skeleton (the box, as stored); matrix, control, step,
    roll, origin, start, inside, shape (grid.resample_patch); intensity (what to do to it), mean, std,
    low, high (how to normalise), spacing, case, around (the class drawn around, 0: background) and
    voxel (where).

    Foreground and background draws alternate as the share says, and within each the cases that
    have such voxels take turns, so that the share and the turns hold in every stretch of an epoch.
    ValueError if no case has a voxel to draw around. missing: classes that were asked for and that
    no case holds; the others take their share.

    A case whose file cannot be read gives `ReadFailure` instead of a sample. `exclude` draws it no
    more: another case stands in at its turns, the same one whenever and wherever it is drawn.
    """

    def __init__(
        self,
        cases,
        *,
        cache,
        patch,
        spacing,
        foreground,
        foreground_share,
        jitter,
        clip,
        seed,
        sample_spatial_params,
        sample_intensity_params,
        place_patch,
        skeletons=False,
    ):
        self.cases, self.cache, self.excluded = list(cases), cache, {}
        self.patch, self.seed, self.clip = tuple(patch), seed, clip
        self.spacing, self.jitter = spacing, jitter
        self.sample_spatial_params, self.sample_intensity_params = (
            sample_spatial_params,
            sample_intensity_params,
        )
        self.place_patch = place_patch
        self.names = ("image", "label", "skeleton") if skeletons else ("image", "label")
        self.cases_with_class = {  # the cases in which a voxel of a class can be drawn around
            class_id: [case for case in self.cases if case.counts.get(key, 0)]
            for class_id, key in {**{c: c for c in foreground}, BACKGROUND: "background"}.items()
        }
        weights = {c: w for c, w in foreground.items() if self.cases_with_class[c] and w > 0}
        self.missing = [c for c, w in foreground.items() if w > 0 and not self.cases_with_class[c]]
        self.classes, shares = list(weights), np.cumsum(list(weights.values()))
        self.class_edges = shares / shares[-1] if weights else shares
        if not weights and not self.cases_with_class[BACKGROUND]:
            raise ValueError(
                "data.train: expected cases with labeled voxels to draw patches around, got none; "
                "look at the labels that prepare.py was given"
            )
        self.foreground_share = foreground_share if weights else 0.0
        if not self.cases_with_class[BACKGROUND]:
            self.foreground_share = 1.0

    def _around(self, epoch, index):
        """(class id, case) of a draw: the class by the shares, the case by its turn."""
        phases = np.random.default_rng((self.seed, epoch, 0)).random(2)
        before, after = (
            math.floor(self.foreground_share * i + phases[0]) for i in (index, index + 1)
        )
        if after == before:
            class_id, number = BACKGROUND, index - before
        else:
            # Multiples of the golden ratio fill the unit interval evenly, at whatever count.
            point = (phases[1] + before * GOLDEN) % 1.0
            class_id = self.classes[int(np.searchsorted(self.class_edges, point, side="right"))]
            number = before
        cases_with_class = self.cases_with_class[class_id]
        turn, position = divmod(number, len(cases_with_class))
        order = np.random.default_rng((self.seed, epoch, 1, class_id, turn))
        case = cases_with_class[int(order.permutation(len(cases_with_class))[position])]
        if case.id in self.excluded:
            case = self._stand_in(epoch, index, cases_with_class)
        return class_id, case

    def _stand_in(self, epoch, index, cases_with_class):
        """Another case. Of one sequence the first that is there, so that it is still the one after
        others were left out whose turn it is not."""
        sequence = np.random.default_rng((self.seed, epoch, 3, index))
        while True:
            case = cases_with_class[int(sequence.integers(len(cases_with_class)))]
            if case.id not in self.excluded:
                return case

    def case_of(self, place):
        """Id of the case that dataset[place] reads."""
        return self._around(*place)[1].id

    def exclude(self, case_id, reason):
        """Draw this case no more. ValueError if a class or the background is then in no case."""
        self.excluded[case_id] = reason
        drawn = (*self.classes, *[BACKGROUND] * (self.foreground_share < 1))
        for class_id in drawn:
            cases_with_class = self.cases_with_class[class_id]
            if all(case.id in self.excluded for case in cases_with_class):
                what = "background" if class_id == BACKGROUND else f"class {class_id}"
                raise ValueError(
                    f"case {case_id}: no other case that can be read has {what} to draw around"
                )

    def state_dict(self):
        import loader

        return loader.excluded(self)

    def load_state_dict(self, s):
        import loader

        return loader.exclude_again(self, s)

    def describe_excluded(self):
        import loader

        return loader.describe_excluded(self)

    def _placed(self, epoch, index):
        """All of a draw but its voxels: (generator, class id, case, voxel, spacing, map, place)."""
        class_id, case = self._around(epoch, index)
        rng = np.random.default_rng((self.seed, epoch, 2, index))
        spacing = network_spacing(case.spacing, self.spacing)
        drawn = self.sample_spatial_params(rng, case.spacing, spacing, patch=self.patch)
        key = "background" if class_id == BACKGROUND else class_id
        rows = "background" if class_id == BACKGROUND else f"foreground/{class_id}"
        voxel = self.cache.row(case, rows, int(rng.integers(case.counts[key])))
        half = drawn.half_extent(self.patch)
        centre = off_centre(rng, voxel, half, case.shape, jitter=self.jitter)
        where = self.place_patch(drawn, centre, self.patch, case.shape, voxel)
        return rng, class_id, case, voxel, spacing, drawn, where

    def __getitem__(self, place):
        try:
            return read_patiently(lambda: self._sample(*place))
        except UNREADABLE as error:
            return ReadFailure(self.case_of(place), " ".join(str(error).split()))

    def _sample(self, epoch, index):
        rng, class_id, case, voxel, spacing, drawn, where = self._placed(epoch, index)
        box = tuple(slice(int(a), int(b)) for a, b in zip(where.start, where.stop, strict=True))
        boxes = self.cache.read(case, box, self.names)
        control = None if drawn.control is None else torch.from_numpy(drawn.control)
        return {
            **{name: torch.from_numpy(native(array)) for name, array in boxes.items()},
            "case": case.id,
            "around": class_id,
            "voxel": voxel,
            "matrix": drawn.matrix,
            "control": control,
            "step": drawn.step,
            "roll": drawn.roll,
            "origin": where.origin,
            "start": where.start,
            "inside": where.inside,
            "shape": case.shape,
            "spacing": spacing,
            "intensity": self.sample_intensity_params(rng),
            **normalisation(case.intensity, self.clip),
        }


def read_patiently(read):
    """What read() gives, tried again after each of PAUSES where a file cannot be read."""
    for pause in PAUSES:
        try:
            return read()
        except UNREADABLE:
            time.sleep(pause)
    return read()


def shares(samples, target, names):
    """What a batch drew, as shares of its patches: {name: number or tensor on target's device}.

    around_foreground: drawn around a foreground voxel, which is what the settings ask for;
    around_<class>: around that class, if names {class id: name} has several; with_foreground:
    target (B, 1, D, H, W) holds any.
    """
    drawn = [sample["around"] for sample in samples]
    found = {"around_foreground": sum(c != BACKGROUND for c in drawn) / len(drawn)}
    if len(names) > 1:
        found |= {f"around_{name}": drawn.count(c) / len(drawn) for c, name in names.items()}
    return found | {"with_foreground": target.flatten(1).any(dim=1).float().mean()}


def off_centre(rng, voxel, half, shape, *, jitter):
    """Where the centre of a patch goes that is drawn around a voxel: (3,) source coordinates.

    half: half the room that the patch takes along the source axes; jitter: share of it by which the
    centre may leave the voxel. Centres are then moved away from the volume's middle, in proportion,
    by up to half a patch: where patches are pushed back into the volume, its faces would get half
    as many as its inside, and so get 0.6 to 0.9 of that, the more the more patches the volume has
    room for (2 to 8 along an axis). The voxel stays within the patch.
    """
    voxel, shape = np.asarray(voxel, float), np.asarray(shape)
    centre = voxel + rng.uniform(-jitter, jitter, size=3) * half
    middle = (shape - 1) / 2
    centre = middle + (centre - middle) * (shape + 2 * half) / shape
    # At the very face of the patch, rounding to whole voxels might leave the voxel outside.
    most = min(max(jitter, NEAR_BORDER), 1 - 1e-6) * half
    return np.clip(centre, voxel - most, voxel + most)


def native(array):
    """The array in a dtype that torch has: unsigned and byte-swapped integers are widened."""
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
    return array.astype(wider.get(array.dtype.name, array.dtype.newbyteorder("=")), copy=False)


def network_spacing(stored, wanted):
    """The spacing the network sees: wanted where it is given, else the stored one; z, y, x."""
    return tuple(float(w or s) for w, s in zip(wanted, stored, strict=True))


def normalisation(intensity, clip):
    """What intensity.normalise needs, from a case's statistics: lists per channel."""
    low, high = (intensity["percentiles"][str(float(p))] for p in clip) if clip else (None, None)
    return {"mean": intensity["mean"], "std": intensity["std"], "low": low, "high": high}


def class_weights(classes, foreground, ratio):
    """{class id: weight} of foreground draws, from {class name: weight} or None (all alike).

    classes: {name: id} of the data; foreground: ids of the classes that are foreground.
    ValueError names those in ratio that are none of them, and a ratio of nothing but 0.
    """
    names = {name: number for name, number in classes.items() if number in foreground}
    unknown = [name for name in ratio or () if name not in names]
    if unknown:
        raise ValueError(
            f"sampling.class_ratio: expected foreground classes among {', '.join(names)}, got "
            f"{', '.join(unknown)}"
        )
    if ratio is None:
        return dict.fromkeys(names.values(), 1.0)
    weights = {number: float(ratio.get(name, 0.0)) for name, number in names.items()}
    if not any(weights.values()):
        raise ValueError(
            f"sampling.class_ratio: expected a weight above 0 for one of {', '.join(names)}, got "
            f"{ratio}; sampling.foreground_share=0 draws around the background alone"
        )
    return weights
