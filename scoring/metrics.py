"""Scores of a predicted mask against the truth, as numpy arrays (D, H, W).

    scores = score(prediction, truth, spacing)                       # the cheap ones
    scores = score(prediction, truth, spacing, names=["assd", "surface_dice@4", "toposcore"])
    scores = score(prediction, truth, spacing, ignore_label=2)       # 2: nobody labeled the voxel
    scores = score(prediction, truth, spacing, classes={"artery": 1, "vein": 2})
    scores = score(prediction, truth, probs=probs, names=["ece"])    # of probabilities
    parts = vesuvius_score(prediction, truth)

Scores equal their published reference implementations on the same masks, and share no code with
the losses. SCORES, at the end of the file, lists all of them.
"""

import difflib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from scoring import calibration, gaps, homology, partitions, surface
from scoring.classes import MEAN, checked, full_names, ids_of, mask_of, split_name
from scoring.masks import check_ids, checked_arrays, checked_probs, is_integer, labeled_masks

VOXEL = (1.0, 1.0, 1.0)


def score(
    prediction, truth, spacing=VOXEL, ignore_label=None, tolerance=2.0, *, names=None, classes=None,
    probs=None, threads=2,
):  # fmt: skip
    """Scores of a mask: {name: float or int} in the order of `names`, none of them NaN or infinite.

    prediction (D, H, W): bool or integers 0 and 1. truth (D, H, W): the same, and `ignore_label`
    where nobody labeled (None: nowhere). spacing (z, y, x) and tolerance (of surface_dice) share
    one unit, that of distances. names: of SCORES, also `surface_dice@4` (at that tolerance),
    `hausdorff@99` (that percentile), `ece@20` (bins), `sheet_recall@2:4` (distances above 2, up to
    4); None: DEFAULT. probs: (D, H, W) in [0, 1], of classes {name: (D, H, W)}, for the ece.

        dice, iou, precision, recall    over labeled voxels, in [0, 1]
        surface_dice                    share of both surfaces within the tolerance of the other
        hd95, hausdorff, assd           distances of the surfaces: that of 95 % of each, the
                                        largest, and the mean over both
        cldice                          harmonic mean of topology_precision and
                                        topology_sensitivity, the share of the prediction's skeleton
                                        inside of the truth and of the truth's in the prediction
        voi_split, voi_merge            bits by which the prediction cuts and joins components
        voi_score                       1 / (1 + 0.3 (split + merge))
        components, handles, cavities   Betti numbers 0, 1 and 2 of the prediction, and with _truth
                                        of the truth; foreground is 26-connected
        betti_error_0, _1, _2           by how much these numbers differ, 0 or more
        betti_matching_f1_0, _1, _2     F1 of pieces, handles and cavities at the same place, over
                                        2 x 2 x 2 tiles; foreground is 6-connected
        toposcore, vesuvius_score       see `vesuvius_score`
        sheet_recall, gap_filled        recall of truth at such distances from the next sheet, share
                                        of such gaps that is predicted; to twice the tolerance
        ece                             see `calibration`

    Voxels of ignore_label are background in both masks: where the unlabeled region cuts a
    structure, the cut is a surface of both, and the end of a skeleton.

    Both masks empty (also: no labeled voxel at all): each ratio and F1 is 1, each distance, error
    and number 0. One of them empty: ratios are 0, distances the diagonal of the volume, Betti
    errors what the other one has. VOI then sees one undivided component on the empty side, so that
    voi_score is 1 if the other is of one piece, as published. For an F1 see `homology.matching_f1`.
    A truth without such distances: sheet_recall 1, gap_filled 0.

    classes: {name: id, or several ids of a region}; regions may overlap. Both volumes then hold
    these ids, 0 for background, and the truth ignore_label, which may be 1 if no class is. Each
    class is scored as a mask of its own: {"dice/artery": ..., "dice/vein": ..., "dice/mean": ...}
    for the name dice, the mean over classes last; the name dice/artery gives that one alone.

    ValueError, before any work, for masks, options and names that are not as above, and for values
    that are no class.
    """
    if isinstance(names, str):
        raise ValueError(f"names: expected a list of names of scores, got the text {names!r}")
    entries = {name: entry(name) for name in (DEFAULT if names is None else names)}
    how = spacing, tolerance, threads
    if classes is not None:
        return _class_scores(prediction, truth, ignore_label, how, entries, classes, probs)
    full_names(entries, None)
    masks = labeled_masks(prediction, truth, ignore_label)
    labeled = None if ignore_label is None else np.asarray(truth) != ignore_label
    probs = checked_probs(probs, masks[1].shape) if of_probabilities(entries) else None
    pair = Comparison(*masks, *how, labeled, probs)
    return {name: kind.of(pair, *number) for name, (kind, number) in entries.items()}


def of_probabilities(names, classes=None):
    """The classes that have a score of probabilities among names, (None,) for one foreground."""
    wanted = [split_name(name)[1] for name in full_names(names, classes) if entry(name)[0].probs]
    return tuple(classes) if MEAN in wanted else tuple(dict.fromkeys(wanted))


def _class_scores(prediction, truth, ignore_label, how, entries, classes, probs):
    """`score` of several classes: the masks of one class at a time are in memory."""
    classes = checked(classes, ignore_label)
    prediction, truth = checked_arrays(prediction, truth, ignore_label, (0, *ids_of(classes)))
    check_ids("prediction", prediction, classes, None)
    check_ids("truth", truth, classes, ignore_label)
    labeled = None if ignore_label is None else truth != ignore_label
    kinds = {split_name(name)[0]: kind for name, kind in entries.items()}
    of_one = {
        name: checked_probs((probs or {}).get(name), truth.shape, name)
        for name in of_probabilities(entries, classes)
    }

    def score_of(name, wanted):
        masks = [mask_of(values, classes[name]) for values in (prediction, truth)]
        if labeled is not None:
            masks[0] &= labeled
        pair = Comparison(*masks, *how, labeled, of_one.get(name))
        return {base: kinds[base][0].of(pair, *kinds[base][1]) for base in wanted}

    return by_class(entries, classes, score_of)


def by_class(names, classes, score_of):
    """Scores of several classes and their means, {name: value} in the order of `full_names`.

    score_of(class, names) gives {name: value} of one class alone.
    """
    wanted = [split_name(name) for name in full_names(names, classes)]
    scores = {}
    for one in classes:
        bases = dict.fromkeys(base for base, which in wanted if which in (one, MEAN))
        for base, value in (score_of(one, bases) if bases else {}).items():
            scores[base, one] = value
    for base in [base for base, which in wanted if which == MEAN]:
        scores[base, MEAN] = float(np.mean([scores[base, one] for one in classes]))
    return {f"{base}/{which}": scores[base, which] for base, which in wanted}


def mean_scores(rows):
    """The mean over cases of each score that `score` returned: {name: float}; {} without a case."""
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}


def vesuvius_score(prediction, truth, ignore_label=2, *, threads=2):
    """The score of the Vesuvius Challenge (surface detection, 2025) and its parts, as a dict.

        score          0.30 toposcore + 0.35 surface_dice + 0.35 voi_score
        toposcore      Betti matching over 2 x 2 x 2 tiles, see `homology.toposcore`
        surface_dice   at a tolerance of 2 voxels
        voi_score, voi_split, voi_merge   see `partitions`
        counts         {dimension: (matched, predicted, true)} of the Betti matching

    Masks as for `score`, but the challenge leaves out label 2; voxels have no spacing here. Equal
    to the challenge's own package on its masks: surface_dice and voi_score to rounding, predicted
    and true counts always, matched counts but for ties (see homology.py). Nothing predicted of one
    piece, and a piece predicted of nothing, score 0.65, two empty masks 1: a lone piece counts
    nowhere in the TopoScore.
    """
    masks = labeled_masks(prediction, truth, ignore_label)
    return Comparison(*masks, VOXEL, 2.0, threads).vesuvius


class Comparison:
    """Two masks (D, H, W) bool; what scores share is computed once, when first needed.

    labeled (D, H, W) bool, None: everywhere; probs: see `score`.
    """

    def __init__(self, prediction, truth, spacing, tolerance, threads, labeled=None, probs=None):
        self.whole, self.labeled, self.probs = (prediction, truth), labeled, probs
        self.spacing = surface.checked_spacing(spacing)
        self.tolerance = surface.checked_tolerance(tolerance)
        if not is_integer(threads) or threads < 1:
            raise ValueError(f"threads: expected an integer of 1 or more, got {threads}")
        self.threads = int(threads)
        self.box = surface.bounding_box(prediction | truth)
        self.masks = prediction[self.box], truth[self.box]

    def both(self, function, *arguments):
        """[function of the prediction, of the truth]: at the same time if there are two threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(function, *arguments))

    def ratio(self, part, *wholes):
        """part / the sum of wholes; without any whole 1 if both masks are empty, else 0."""
        whole = sum(wholes)
        return part / whole if whole else float(not any(self.voxels))

    @functools.cached_property
    def voxels(self):
        """How many the prediction and the truth have, and how many both."""
        prediction, truth = self.masks
        counted = (prediction, truth, prediction & truth)
        return tuple(int(np.count_nonzero(mask)) for mask in counted)

    @functools.cached_property
    def corners(self):
        """The `surface.Corners` of prediction and truth."""
        return self.both(surface.extract, self.masks)

    @functools.cached_property
    def surfaces(self):
        return self.surfaces_at(self.spacing)

    def surfaces_at(self, spacing):
        shape = self.whole[0].shape
        return surface.SurfacePair(*self.corners, spacing, shape, threads=self.threads)

    def surface_dice(self, tolerance=None):
        return self.surfaces.dice(self.tolerance if tolerance is None else tolerance)

    @functools.cached_property
    def partition(self):
        return partitions.partition(*self.masks, threads=self.threads)

    @functools.cached_property
    def information(self):
        return self.partition.variation_of_information()

    @functools.cached_property
    def betti(self):
        """(b0, b1, b2) of the prediction and of the truth, 26-connected."""
        histograms = [corners.histogram for corners in self.corners]
        components = self.partition.predicted, self.partition.true
        return self.both(homology.betti_numbers, self.masks, (26, 26), histograms, components)

    def betti_error(self, dimension):
        return abs(self.betti[0][dimension] - self.betti[1][dimension])

    @functools.cached_property
    def matching(self):
        """{dimension: (matched, predicted, true)} over 2 x 2 x 2 tiles of the whole volume."""
        return homology.betti_matching(*self.whole, tiles=(2, 2, 2), threads=self.threads)

    @functools.cached_property
    def topology(self):
        """(topology precision, topology sensitivity) of clDice."""
        inside = map(_skeleton_inside, self.masks, self.masks[::-1])
        return tuple(self.ratio(*counts) for counts in inside)

    def cldice(self):
        precision, sensitivity = self.topology
        return 2 * precision * sensitivity / (precision + sensitivity or 1.0)

    @functools.cached_property
    def gap_widths(self):
        background = ~self.masks[1]
        if self.labeled is not None:
            background &= self.labeled[self.box]
        return gaps.gap_widths(self.masks[1], background, self.spacing)

    def sheet_recall(self, *bounds):
        return self.predicted_share(self.masks[1], *bounds, otherwise=1.0)

    def gap_filled(self, *bounds):
        return self.predicted_share(~self.masks[1], *bounds, otherwise=0.0)

    def predicted_share(self, of, low=0.0, high=None, *, otherwise):
        """Of the voxels of a mask that have a gap width in that range; `otherwise` without any."""
        near = gaps.within(self.gap_widths, low, 2 * self.tolerance if high is None else high) & of
        found, all_ = (int(np.count_nonzero(mask)) for mask in (near & self.masks[0], near))
        return found / all_ if all_ else otherwise

    def ece(self, bins=calibration.BINS):
        return calibration.expected_calibration_error(self.probs, self.whole[1], self.labeled, bins)

    @functools.cached_property
    def vesuvius(self):
        split, merge = self.information
        parts = {
            "toposcore": homology.toposcore(self.matching),
            "surface_dice": self.surfaces_at(VOXEL).dice(2.0),
            "voi_score": partitions.voi_score(split, merge),
        }
        score = 0.30 * parts["toposcore"] + 0.35 * (parts["surface_dice"] + parts["voi_score"])
        others = {"voi_split": split, "voi_merge": merge, "counts": self.matching}
        return {"score": score} | parts | others


def _skeleton_inside(mask, other):
    """(voxels of the mask's skeleton inside of `other`, voxels of that skeleton).

    clDice (Shit et al. 2021, arXiv:2003.07311) thins masks with
    scikit-image's `skeletonize`, in 3D Lee et al. 1994. That leaves nothing of some shapes of even
    thickness, such as a bar of 2 x 2 x 10; then the mask stands for its skeleton, where the
    published code divides by 0.
    """
    from skimage.morphology import skeletonize  # late: no other score needs it

    if not mask.any():
        return 0, 0
    skeleton = skeletonize(mask) > 0
    skeleton = skeleton if skeleton.any() else mask
    return int(np.count_nonzero(skeleton & other)), int(np.count_nonzero(skeleton))


def otsu_threshold(image):
    """The threshold t of Otsu (1979) that best separates image > t from image <= t, as a float.

    image: any shape, any real dtype. Exact for integers of at most 65 536 levels, else from a
    histogram of 256 bins. The lowest t of equals. A constant image gives its value: nothing is
    above it. ValueError for an empty image, or for NaN or Inf in it.
    """
    image = np.asarray(image)
    if image.size == 0 or not np.isfinite(image).all():
        raise ValueError("otsu_threshold: expected finite voxels, got none, or NaN or Inf in them")
    low, high = image.min(), image.max()
    if low == high:
        return float(low)
    exact = not np.issubdtype(image.dtype, np.floating) and int(high) - int(low) < 65_536
    levels = int(high) - int(low) + 1 if exact else 256
    width = 1.0 if exact else (float(high) - float(low)) / levels
    counts = np.zeros(levels)
    for part in np.array_split(image.reshape(-1), max(1, image.size // 1_000_000)):
        index = (part.astype(np.float64) - float(low)) / width
        counts += np.bincount(index.astype(np.int64).clip(0, levels - 1), minlength=levels)
    below = np.cumsum(counts)[:-1]
    moment = np.cumsum(counts * np.arange(levels))
    mean_gap = moment[-1] / image.size * below - moment[:-1]
    spread = mean_gap**2 / (below * (image.size - below))
    best = int(np.argmax(spread))
    return float(low) + (best * width if exact else (best + 1) * width)


@dataclass(frozen=True)
class Score:
    """A score, computed of a `Comparison`.

    cost: "cheap", "moderate" or "slow": up to about 0.5, 3 and 30 s for torn sheets of 320 x 320 x
    320 on 2 cores; those that share their work cost that once.
    """

    of: Callable
    better: str | None  # "higher", "lower", or None: it describes a mask
    cost: str
    number: str | None = None  # what may follow the name after an @
    probs: bool = False  # whether it is of probabilities


def entry(name):
    """(the `Score`, its numbers after @ as a tuple) of a name; ValueError for a name of none.

    A name such as dice/artery is that of dice.
    """
    base, at, number = split_name(name)[0].partition("@")
    kind = SCORES.get(base)
    if kind is None:
        near = SYNONYMS.get(base) or difflib.get_close_matches(base, SCORES, n=1, cutoff=0.0)[0]
        raise ValueError(f"expected the name of a score, got {name}; the nearest is {near}")
    if not at:
        return kind, ()
    if kind.number is None:
        raise ValueError(f"expected {base} without a number, got {name}")
    try:
        numbers = [float(part) for part in number.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != len(kind.number.split(":")):
        raise ValueError(f"expected {base}@{kind.number.upper()}, got {name}")
    NUMBERS[kind.number](*numbers)
    return kind, tuple(numbers)


NUMBERS = {  # what may follow an @, and what raises ValueError for a wrong one
    "tolerance": surface.checked_tolerance,
    "percentile": surface.checked_percentile,
    "bins": calibration.checked_bins,
    "low:high": gaps.check_range,
}


SYNONYMS = {"nsd": "surface_dice", "dsc": "dice", "f1": "dice", "jaccard": "iou", "asd": "assd",
            "ppv": "precision", "sensitivity": "recall", "hd": "hausdorff"}  # fmt: skip
SCORES = {
    "dice": Score(lambda c: c.ratio(2 * c.voxels[2], *c.voxels[:2]), "higher", "cheap"),
    "iou": Score(lambda c: c.ratio(c.voxels[2], *c.voxels[:2], -c.voxels[2]), "higher", "cheap"),
    "precision": Score(lambda c: c.ratio(c.voxels[2], c.voxels[0]), "higher", "cheap"),
    "recall": Score(lambda c: c.ratio(c.voxels[2], c.voxels[1]), "higher", "cheap"),
    "surface_dice": Score(Comparison.surface_dice, "higher", "cheap", "tolerance"),
    "hd95": Score(lambda c: c.surfaces.hausdorff(95.0), "lower", "moderate"),
    "hausdorff": Score(
        lambda c, p=100.0: c.surfaces.hausdorff(p), "lower", "moderate", "percentile"
    ),
    "assd": Score(lambda c: c.surfaces.assd(), "lower", "moderate"),
    "cldice": Score(Comparison.cldice, "higher", "slow"),
    "topology_precision": Score(lambda c: c.topology[0], "higher", "slow"),
    "topology_sensitivity": Score(lambda c: c.topology[1], "higher", "slow"),
    "voi_split": Score(lambda c: c.information[0], "lower", "cheap"),
    "voi_merge": Score(lambda c: c.information[1], "lower", "cheap"),
    "voi_score": Score(lambda c: partitions.voi_score(*c.information), "higher", "cheap"),
    "components": Score(lambda c: c.partition.predicted, None, "cheap"),
    "components_truth": Score(lambda c: c.partition.true, None, "cheap"),
    "handles": Score(lambda c: c.betti[0][1], None, "cheap"),
    "handles_truth": Score(lambda c: c.betti[1][1], None, "cheap"),
    "cavities": Score(lambda c: c.betti[0][2], None, "cheap"),
    "cavities_truth": Score(lambda c: c.betti[1][2], None, "cheap"),
    "betti_error_0": Score(
        lambda c: abs(c.partition.predicted - c.partition.true), "lower", "cheap"
    ),
    "betti_error_1": Score(lambda c: c.betti_error(1), "lower", "cheap"),
    "betti_error_2": Score(lambda c: c.betti_error(2), "lower", "cheap"),
    "betti_matching_f1_0": Score(lambda c: homology.matching_f1(*c.matching[0]), "higher", "slow"),
    "betti_matching_f1_1": Score(lambda c: homology.matching_f1(*c.matching[1]), "higher", "slow"),
    "betti_matching_f1_2": Score(lambda c: homology.matching_f1(*c.matching[2]), "higher", "slow"),
    "toposcore": Score(lambda c: homology.toposcore(c.matching), "higher", "slow"),
    "vesuvius_score": Score(lambda c: c.vesuvius["score"], "higher", "slow"),
    "sheet_recall": Score(Comparison.sheet_recall, "higher", "slow", "low:high"),
    "gap_filled": Score(Comparison.gap_filled, "lower", "slow", "low:high"),
    "ece": Score(lambda c, *bins: c.ece(*bins), "lower", "cheap", "bins", probs=True),
}

OF_TOLERANCE = {"surface_dice", "sheet_recall", "gap_filled"}  # without an @
DEFAULT = ("dice", "iou", "precision", "recall", "surface_dice", "components", "components_truth")
