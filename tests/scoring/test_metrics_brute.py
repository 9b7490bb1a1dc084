"""Every score of small random masks, with and without unlabeled voxels, by brute force.

Slow and plain definitions, which share nothing with the judge but the package's table of areas:
sets of voxels, all pairs of corners, cells counted one by one, components of scipy, and persistence
of gudhi.
"""

import itertools
import math
from collections import Counter

import gudhi
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.morphology import skeletonize
from surface_distance import lookup_tables

from scoring.metrics import SCORES, score

TOUCHING = {6: ndimage.generate_binary_structure(3, 1), 26: np.ones((3, 3, 3))}
WEIGHTS = (0.34, 0.33, 0.33)


def f1(part, *wholes, empty):
    return part / sum(wholes) if sum(wholes) else float(empty)


def overlaps(p, t):
    p, t = (set(map(tuple, np.argwhere(mask))) for mask in (p, t))
    both, empty = len(p & t), not p | t
    return {
        "dice": f1(2 * both, len(p), len(t), empty=empty),
        "iou": f1(both, len(p | t), empty=empty),
        "precision": f1(both, len(p), empty=empty),
        "recall": f1(both, len(t), empty=empty),
    }


# ---------------------------------------------------------------------------- surfaces


def surface(mask, spacing):
    """(places (N, 3), areas (N,)) of the corners whose 8 voxels are mixed."""
    table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    around, places, areas = np.pad(mask, 1), [], []
    for place in np.ndindex(*(n + 1 for n in mask.shape)):
        voxels = around[tuple(slice(i, i + 2) for i in place)].reshape(-1)
        if voxels.any() and not voxels.all():
            places.append(place)
            areas.append(table[int("".join("01"[v] for v in voxels.astype(int)), 2)])
    return np.array(places, float).reshape(-1, 3) * spacing, np.array(areas)


def distances(p, t, spacing, tolerance):
    (here, area_p), (there, area_t) = (surface(mask, spacing) for mask in (p, t))
    if not len(here) or not len(there):
        far = math.hypot(*np.multiply(p.shape, spacing)) if len(here) or len(there) else 0.0
        return {"surface_dice": float(far == 0), "hd95": far, "hausdorff": far, "assd": far}
    apart = cdist(here, there)
    away, area = (apart.min(axis=1), apart.min(axis=0)), (area_p, area_t)
    everywhere, whole = np.concatenate(away), np.concatenate(area)

    def within(share, lengths, areas):
        order = np.argsort(lengths, kind="stable")
        reached = np.cumsum(areas[order]) >= share * areas.sum() - 1e-9
        return lengths[order][np.argmax(reached)]

    return {
        "surface_dice": whole[everywhere <= tolerance].sum() / whole.sum(),
        "hd95": max(map(within, (0.95, 0.95), away, area)),
        "hausdorff": everywhere.max(),
        "assd": (everywhere * whole).sum() / whole.sum(),
    }


# ---------------------------------------------------------------------------- skeletons, components


def skeleton_scores(p, t):
    shares = []
    for mask, other in ((p, t), (t, p)):
        thin = skeletonize(mask) > 0 if mask.any() else mask
        thin = thin if thin.any() else mask
        shares.append(f1((thin & other).sum(), thin.sum(), empty=not (p | t).any()))
    mean = 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0
    return {"topology_precision": shares[0], "topology_sensitivity": shares[1], "cldice": mean}


def information(p, t):
    labels = [ndimage.label(mask, TOUCHING[26])[0][p | t].tolist() for mask in (p, t)]
    pairs, ours, theirs = Counter(zip(*labels, strict=True)), *map(Counter, labels)
    split = sum(n * math.log2(theirs[j] / n) for (_, j), n in pairs.items())
    merge = sum(n * math.log2(ours[i] / n) for (i, _), n in pairs.items())
    split, merge = (bits / max(1, len(labels[0])) for bits in (split, merge))
    return {
        "voi_split": split, "voi_merge": merge, "voi_score": 1 / (1 + 0.3 * (split + merge)),
    }  # fmt: skip


def numbers(mask, connectivity):
    """(pieces, handles, cavities); handles from the cells of the mask, counted one by one."""
    cells = set()
    for voxel in map(tuple, np.argwhere(mask)):
        if connectivity == 26:  # a closed cube: its 27 cells, at half steps
            cells |= {tuple(2 * v + d for v, d in zip(voxel, step, strict=True))
                      for step in itertools.product((-1, 0, 1), repeat=3)}  # fmt: skip
        else:  # the edges, squares and cubes that begin here and have all corners
            for along in itertools.product((0, 1), repeat=3):
                block = mask[tuple(slice(v, v + 1 + a) for v, a in zip(voxel, along, strict=True))]
                if block.size == 2 ** sum(along) and block.all():
                    cells.add(tuple(2 * v + a for v, a in zip(voxel, along, strict=True)))
    turn = 1 if connectivity == 26 else 0  # parity of the coordinate along which a cell is flat
    euler = sum((-1) ** sum((c + turn) % 2 for c in cell) for cell in cells)
    pieces = ndimage.label(mask, TOUCHING[connectivity])[1]
    cavities = ndimage.label(~np.pad(mask, 1), TOUCHING[32 - connectivity])[1] - 1
    return pieces, pieces + cavities - euler, cavities


def betti(p, t):
    found = {}
    pairs = zip(numbers(p, 26), numbers(t, 26), strict=True)
    for dim, (ours, theirs) in enumerate(pairs):
        name = ("components", "handles", "cavities")[dim]
        found |= {name: ours, f"{name}_truth": theirs, f"betti_error_{dim}": abs(ours - theirs)}
    return found


# ---------------------------------------------------------------------------- Betti matching


def deaths(first, union):
    """[Counter of the levels at which the classes of `first` die that live on in the union]."""
    level = 2.0 - union - first
    level += np.linspace(0.0, 1.0, level.size, endpoint=False).reshape(level.shape)
    pairs = gudhi.CubicalComplex(vertices=level).persistence(min_persistence=0.0)
    died = [(dim, death) for dim, (birth, death) in pairs if birth < 1 and 2 <= death < 3]
    return [Counter(death for dim, death in died if dim == d) for d in range(3)]


def matching(p, t):
    counts = np.zeros((3, 3), int)
    halves = [(slice(0, -(-n // 2)), slice(-(-n // 2), n)) for n in p.shape]
    for tile in itertools.product(*halves):
        here, there = p[tile], t[tile]
        if here.size:
            died = (deaths(mask, here | there) for mask in (here, there))
            counts[:, 0] += [(a & b).total() for a, b in zip(*died, strict=True)]
            for column, mask in ((1, here), (2, there)):
                counts[:, column] += np.array(numbers(mask, 6)) - [mask.any(), 0, 0]
    f1s = [2 * m / (a + b) if b else 0.5 / (a + 0.5) for m, a, b in counts]
    weight = [w if a or b else 0 for w, (_, a, b) in zip(WEIGHTS, counts, strict=True)]
    mean = np.average(f1s, weights=weight) if any(weight) else 1.0
    return {f"betti_matching_f1_{dim}": f1s[dim] for dim in range(3)} | {"toposcore": mean}


# ---------------------------------------------------------------------------- gaps, calibration


def ways(t, labeled, spacing):
    """(where, length) of every straight way from foreground over background to foreground."""
    inside = set(np.ndindex(*t.shape))
    for step in itertools.product((-1, 0, 1), repeat=3):
        for start in map(tuple, np.argwhere(t)) if any(step) else ():
            way = [tuple(np.add(start, step))]
            while way[-1] in inside and labeled[way[-1]] and not t[way[-1]]:
                way.append(tuple(np.add(way[-1], step)))
            if len(way) > 1 and way[-1] in inside and t[way[-1]]:
                yield [start, *way], len(way) * math.hypot(*np.multiply(step, spacing))


def between_sheets(p, t, labeled, spacing, widest):
    shortest = {}
    for way, length in ways(t, labeled, spacing):
        for voxel in way:
            shortest[voxel] = min(length, shortest.get(voxel, math.inf))
    near = [voxel for voxel, length in shortest.items() if length <= widest]
    sheets, gaps = ([p[v] for v in near if t[v] == kind] for kind in (True, False))
    return {
        "sheet_recall": np.mean(sheets) if sheets else 1.0,
        "gap_filled": np.mean(gaps) if gaps else 0.0,
    }


def calibration(probs, t, labeled):
    """The definition of Guo et al. with the foreground's probability as confidence."""
    error, values, on = 0.0, probs[labeled].astype(float), t[labeled]
    for low in range(15):
        chosen = (values * 15 >= low) & ((values * 15 < low + 1) | (low == 14))
        if chosen.any():
            gap = abs(on[chosen].mean() - values[chosen].mean())
            error += chosen.sum() / values.size * gap
    return {"ece": error}


def brute_force(prediction, truth, spacing, tolerance, ignore_label, probs):
    labeled = truth != ignore_label
    p, t = (prediction == 1) & labeled, truth == 1
    found = overlaps(p, t) | distances(p, t, spacing, tolerance) | skeleton_scores(p, t)
    found |= information(p, t) | betti(p, t) | matching(p, t)
    surface_share = distances(p, t, (1.0, 1.0, 1.0), 2.0)["surface_dice"]
    parts = 0.3 * found["toposcore"] + 0.35 * surface_share + 0.35 * found["voi_score"]
    found |= between_sheets(p, t, labeled, spacing, 2 * tolerance)
    return found | {"vesuvius_score": parts} | calibration(probs, t, labeled)


def random_pair(rng):
    """Noise or blobs, sparse to full, of which one or both may be empty; or hollow boxes."""
    if rng.random() < 0.25:
        return list(rng.random((2, 8, 8, 9)) > 0.04)
    shape = rng.integers(1, 9, 3)
    blur = rng.choice([0.0, 0.6, 1.0])
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), blur) for _ in range(2)]
    fields[1] = rng.choice([0.0, 0.6]) * fields[0] + fields[1]
    return [field > np.quantile(field, rng.choice([0.3, 0.7, 0.97, 1.0])) for field in fields]


def test_every_score_agrees_with_brute_force():
    rng, seen = np.random.default_rng(0), []
    for round_ in range(24):
        ignore_label = (None, 2, -1)[round_ % 3]
        prediction, truth = (mask.astype(np.int16) for mask in random_pair(rng))
        if ignore_label is not None:
            truth[rng.random(truth.shape) < rng.choice([0.02, 0.1, 0.4])] = ignore_label
        spacing = tuple(rng.uniform(0.3, 4.0, 3))
        options = spacing, ignore_label, rng.choice([0.0, 0.9, 2.0, 5.0])
        probs = np.clip(rng.normal(prediction, 0.6), 0, 1).astype(np.float32)
        expected = brute_force(prediction, truth, spacing, options[2], ignore_label, probs)
        found = score(prediction, truth, *options, names=SCORES, probs=probs)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
        seen.append(list(found.values()))
    assert (np.std(seen, axis=0) > 0).all(), "a score that was always the same is not tested"
