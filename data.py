"""Patches sampled from case files: where they lie, and what is read of them.

    dataset = PatchDataset(cases, cache=cache, patch=(64, 128, 128), ...)
    sample = dataset[epoch, index]

A worker samples the parameters of a patch, reads the box of source voxels that the patch covers and
sends both (patches/feed.py). The device does the rest (patches/augment.py).
"""

import math
import statistics
import time

import numpy as np
import torch

from patches.augment import sample_spatial_params
from patches.feed import Batches as Batches
from patches.feed import ReadFailure, TooManyExcluded
from patches.intensity import sample_intensity_params
from patches.resample import place_patch
from volumes.casefile import Unreadable
from volumes.volume import mixed_sizes

GOLDEN = (math.sqrt(5) - 1) / 2
NEAR_BORDER = 0.9  # of half the patch: how far the center voxel may lie from the patch's middle
BACKGROUND = 0
PAUSES = (0.2, 1.0)  # seconds before a case file that cannot be read is tried again
LEAST_SEEN, FEW = 1e-3, 4  # share, voxels along an axis: see spacing_faults
LARGE = 1.5  # times the size of a volume: see padding_notes
UNREADABLE = (Unreadable, OSError)


class PatchDataset:
    """Patches as boxes of source voxels, each a function of (seed, epoch, index) alone.

    cases: list of `Case`, all labeled; cache: a `VolumeCache` of them; patch: voxels z, y, x;
    spacing: target spacing per axis, 0 or None keeps the case's own; augment: plain dict of the
    `augment` settings, None for none; foreground: {class id: weight}, the share of foreground
    patches that each class gets if any case has it; foreground_share: of patches whose center voxel
    is foreground; jitter: how far off-center that voxel lies, as a share of half the patch; clip:
    percentiles to clip intensities to, or None; skeletons: whether to read the stored skeleton too,
    which every case must have.

    dataset[epoch, index] reads only the box that the patch covers and returns plain values and
    tensors: image, label and, if wanted, skeleton (the box, as stored); the fields of `Map` and
    `Place` (patches/resample.py) and shape; intensity (what to do to it), mean, std, low, high (how
    to normalise), spacing, case, center_class (0: background) and voxel.

    Foreground and background alternate as the share says, and within each the cases that have such
    voxels take turns. ValueError if no case has a labeled voxel. missing: classes with a weight
    that no case has. A case whose file cannot be read gives `ReadFailure` instead of a sample.
    After `exclude` another case is read at its turns, the same one in every process.
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
        augment,
        skeletons=False,
    ):
        self.cases, self.cache, self.excluded = list(cases), cache, {}
        self.patch, self.seed, self.clip = tuple(patch), seed, clip
        self.spacing, self.jitter, self.augment = spacing, jitter, augment
        self.names = ("image", "label", "skeleton") if skeletons else ("image", "label")
        self.cases_with_class = {
            class_id: [case for case in self.cases if case.counts.get(key, 0)]
            for class_id, key in {**{c: c for c in foreground}, BACKGROUND: "background"}.items()
        }
        weights = {c: w for c, w in foreground.items() if self.cases_with_class[c] and w > 0}
        self.missing = [c for c, w in foreground.items() if w > 0 and not self.cases_with_class[c]]
        self.classes, sums = list(weights), np.cumsum(list(weights.values()))
        self.class_edges = sums / sums[-1] if weights else sums
        if not weights and not self.cases_with_class[BACKGROUND]:
            raise ValueError(
                "data.train: expected cases with labeled voxels to sample patches around, got "
                "none; look at the labels that prepare.py was given"
            )
        self.foreground_share = foreground_share if weights else 0.0
        if not self.cases_with_class[BACKGROUND]:
            self.foreground_share = 1.0

    def _center(self, epoch, index):
        """(class id of the center voxel, case): the class by the shares, the case by its turn."""
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
        cases = self.cases_with_class[class_id]
        turn, position = divmod(number, len(cases))
        order = np.random.default_rng((self.seed, epoch, 1, class_id, turn))
        case = cases[int(order.permutation(len(cases))[position])]
        # Instead of an excluded case the first of one sequence that is not excluded, so that it
        # stays the same case when others are excluded later.
        sequence = np.random.default_rng((self.seed, epoch, 3, index))
        while case.id in self.excluded:
            case = cases[int(sequence.integers(len(cases)))]
        return class_id, case

    def case_of(self, sample_index):
        """Id of the case that dataset[sample_index] reads."""
        return self._center(*sample_index)[1].id

    def exclude(self, case_id, reason):
        """Sample this case no more. `TooManyExcluded` if no other case has one of the classes."""
        self.excluded[case_id] = reason
        classes = self.classes if self.foreground_share == 1 else [*self.classes, BACKGROUND]
        for class_id in classes:
            if all(case.id in self.excluded for case in self.cases_with_class[class_id]):
                what = "background" if class_id == BACKGROUND else f"class {class_id}"
                raise TooManyExcluded(f"{reason}; no other case that can be read has {what}")

    def state_dict(self):
        """The excluded cases, for a checkpoint: {case id: [reason, bytes, time of its file]}."""
        cases = [case for case in self.cases if case.id in self.excluded]
        return {case.id: [self.excluded[case.id], *case.stamp] for case in cases}

    def load_state_dict(self, state):
        """Exclude the cases of a state, save those whose file has changed; lines for people."""
        changed = []
        for case in self.cases:
            reason, *stamp = state.get(case.id, (None, None))
            if tuple(stamp) == tuple(case.stamp):
                self.exclude(case.id, reason)
            elif case.id in state:
                changed.append(f"case {case.id}: its file has changed, it is sampled again")
        return changed + describe_excluded(self)

    def __getitem__(self, sample_index):
        try:
            return read_patiently(lambda: self._sample(*sample_index))
        except UNREADABLE as error:
            return ReadFailure(self.case_of(sample_index), " ".join(str(error).split()))

    def _sample(self, epoch, index):
        class_id, case = self._center(epoch, index)
        rng = np.random.default_rng((self.seed, epoch, 2, index))
        spacing = network_spacing(case.spacing, self.spacing)
        spatial = sample_spatial_params(
            rng, case.spacing, spacing, patch=self.patch, settings=self.augment
        )
        key = "background" if class_id == BACKGROUND else class_id
        voxel = self.cache.row(case, key, int(rng.integers(case.counts[key])))
        half = spatial.half_extent(self.patch)
        center = off_center(rng, voxel, half, case.shape, jitter=self.jitter)
        place = place_patch(spatial, center, self.patch, case.shape, voxel)
        box = tuple(slice(int(a), int(b)) for a, b in zip(place.start, place.stop, strict=True))
        boxes = self.cache.read(case, box, self.names)
        control = None if spatial.control is None else torch.from_numpy(spatial.control)
        return {
            **{name: torch.from_numpy(native(array)) for name, array in boxes.items()},
            "case": case.id,
            "center_class": class_id,
            "voxel": voxel,
            **spatial._asdict(),
            "control": control,
            **place._asdict(),
            "shape": case.shape,
            "spacing": spacing,
            "intensity": sample_intensity_params(rng, settings=self.augment),
            **normalisation(case.intensity, self.clip),
        }


def describe_excluded(dataset):
    """A line for people about each case that a dataset excludes."""
    return [f"left out: {reason}" for reason in dataset.excluded.values()]


def read_patiently(read):
    """What read() returns, tried again after each of PAUSES where a file cannot be read."""
    for pause in PAUSES:
        try:
            return read()
        except UNREADABLE:
            time.sleep(pause)
    return read()


def shares(samples, target, valid, names):
    """Shares of a batch's patches: {name: number or tensor on target's device}.

    around_foreground: with a foreground voxel at the center; around_<class>: of that class, if
    names {class id: name} has several; with_foreground: target (B, K, D, H, W) holds any;
    foreground: of the voxels that valid (B, 1, D, H, W) says are labeled.
    """
    centers = [sample["center_class"] for sample in samples]
    values = {"around_foreground": sum(c != BACKGROUND for c in centers) / len(centers)}
    if len(names) > 1:
        values |= {f"around_{n}": centers.count(c) / len(centers) for c, n in names.items()}
    found = (target > 0).any(dim=1, keepdim=True) & valid
    values["with_foreground"] = found.flatten(1).any(dim=1).float().mean()
    return values | {"foreground": found.sum() / valid.sum().clamp(min=1)}


def off_center(rng, voxel, half, shape, *, jitter):
    """Where the center of a patch lies that is sampled around a voxel: (3,) source coordinates.

    half: half the extent of the patch along the source axes; jitter: the share of it by which the
    center may leave the voxel. Centers are then moved away from the volume's middle, in proportion,
    by up to half a patch, for the faces would get half as many patches as the inside (so: 0.6 to
    0.9, with room for 2 to 8 patches along an axis). The voxel stays within the patch.
    """
    voxel, shape = np.asarray(voxel, float), np.asarray(shape)
    center = voxel + rng.uniform(-jitter, jitter, size=3) * half
    middle = (shape - 1) / 2
    center = middle + (center - middle) * (shape + 2 * half) / shape
    # At the very face of the patch, rounding to whole voxels might leave the voxel outside.
    most = min(max(jitter, NEAR_BORDER), 1 - 1e-6) * half
    return np.clip(center, voxel - most, voxel + most)


def native(array):
    """The array in native order and a dtype that torch has operations for: unsigned integers wider,
    save uint16, which the device makes wider (`intensity.widened`)."""
    wider = {"uint32": np.int64, "uint64": np.float64}
    return array.astype(wider.get(array.dtype.name, array.dtype.newbyteorder("=")), copy=False)


def network_spacing(stored, wanted):
    """The spacing the network sees, z, y, x: wanted where it is given, else the stored one.

    wanted: "1.6+" stands for 1.6, or the stored one where that is coarser.
    """
    pairs = zip(wanted, stored, strict=True)
    return tuple(max(float(w[:-1]), s) if isinstance(w, str) else float(w or s) for w, s in pairs)


def median_spacing(spacings):
    """The median along each axis."""
    return tuple(map(statistics.median, zip(*spacings, strict=True)))


def mixed_spacings(cases, wanted):
    """A note if the sizes of the cases' voxels differ along an axis of which none is wanted."""
    spacings = [case.spacing for case in cases]
    mixed = {i: words for i, words in mixed_sizes(spacings).items() if not wanted[i]}
    alike = [size or "null" for size in wanted]
    for i in mixed:
        alike[i] = median_spacing(spacings)[i]
    if mixed:
        yield (
            f"data.spacing: cases have voxels of {', '.join(mixed.values())}, and each is used as "
            f"stored; data.spacing=[{','.join(map(str, alike))}] samples all alike"
        )


def spacing_faults(name, shape, patch, stored, wanted, unit):
    """What keeps a patch at the wanted spacing from showing a volume: a sentence, or none.

    name, shape, stored (spacing), unit: of the volume; patch: voxels; wanted: as in
    `network_spacing`. A patch may be larger than the volume, but its voxels may not be, and
    resampling must leave a thousandth of what it would show of the volume as that is stored.
    """
    spacing = network_spacing(stored, wanted)
    axes = list(zip(shape, patch, stored, spacing, strict=True))
    thin = any(p > 1 and s != step and p * s < step for n, p, step, s in axes)
    huge = any(n >= FEW and s > n * step for n, p, step, s in axes)
    seen, unscaled = (
        math.prod(min(1.0, n * step / (p * s)) for n, p, step, s in pairs)
        for pairs in (axes, [(n, p, 1, 1) for n, p, _, _ in axes])
    )
    if not (thin or huge or seen < LEAST_SEEN * unscaled):
        return
    patch, whole = (
        " x ".join(f"{a * b:.4g}" for a, b in zip(*pair, strict=True))
        for pair in ((patch, spacing), (shape, stored))
    )
    yield (
        f"data.spacing: expected a spacing in the unit of {name}, which has voxels of "
        f"{' x '.join(f'{s:g}' for s in stored)} and a size of {whole} {unit}".rstrip()
        + f", got {list(spacing)}: a patch of {patch} "
        + ("covers less than one voxel" if thin else "is larger than the volume, all but padding")
    )


def padding_notes(cases, patch, wanted):
    """A note for each axis on which a patch is much larger than most of the cases."""
    grids = [(case.shape, case.spacing, network_spacing(case.spacing, wanted)) for case in cases]
    sizes = [[n * step / s for n, step, s in zip(*grid, strict=True)] for grid in grids]
    for axis, voxels, own in zip("zyx", patch, zip(*sizes, strict=True), strict=True):
        if voxels > LARGE * (size := statistics.median(own)):
            yield (
                f"sampling.patch: {voxels} voxels in {axis}, where most cases have {size:.0f} or "
                "less; the rest is padding"
            )


def normalisation(intensity, clip, *, typical=True):
    """What intensity.normalise needs, from a case's statistics: lists per channel.

    clip: percentiles, or None: then only fill values are clipped, if there are any. typical=False:
    as in runs that began before fill values were told from others (volumes/statistics.py).
    """
    usual = typical and intensity.get("typical")
    low, high = zip(*usual["range"], strict=True) if usual else (None, None)
    usual = usual or intensity
    if clip:
        low, high = (usual["percentiles"][str(float(p))] for p in clip)
    return {"mean": usual["mean"], "std": usual["std"], "low": low, "high": high}


def class_weights(classes, foreground, ratio):
    """{class id: weight} of foreground patches, from {class name: weight} or None (all alike).

    classes: {name: id} of the data; foreground: ids of the classes that are foreground.
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
            f"{ratio}; sampling.foreground_share=0 samples around the background alone"
        )
    return weights
