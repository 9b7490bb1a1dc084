"""Time and memory of all scores on torn sheets, and of the packages that define them.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --sizes 160 --rounds 3

One pair of 160 x 160 x 160 voxels and one of 320 x 320 x 320: sheets of a scroll phantom, all of
them labeled, and a prediction that lies a voxel aside, is of uneven thickness, torn elsewhere and
bridged. Each part runs in a process of its own, first once for the peak of resident memory above
what the process held before, then for the median of the rounds that begin within 5 s: of the time,
and of the processor time of all threads, which other work on the cores changes less. The
challenge's score is made of the parts surface Dice, VOI and Betti matching in 2 x 2 x 2 tiles.
Takes about 6 minutes on 2 cores. Linux; MONAI's rows need requirements-bench.txt.

Exit status 1 if a bar is missed: surface Dice five times faster than `surface-distance` 0.1 and
all scores equal to 1e-6; the Betti matching of one tile of 160 x 160 x 160 on 2 threads in 4.25 s,
a quarter of the 17 s that the challenge's C++ package takes for sheets on one core.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scoring import homology, metrics, partitions, surface
from volumes import phantoms

FASTER = 5.0
MATCHING_SECONDS = 17.0 / 4
TILE = 160  # voxels along each side of the tile that the bar is for
TOLERANCE = 2.0
ENOUGH_SECONDS = 5.0  # after which no round of a part is begun


def torn_sheets(size, seed=0):
    """(prediction, truth): two bool masks (size, size, size)."""
    shape, rng = (size,) * 3, np.random.default_rng([seed, 0, 1])
    distance, _ = phantoms._sheet_distance(shape, rng)

    def torn(grain, most):
        return phantoms.smooth_field(shape, grain, rng) > most

    half = phantoms.SHEET_HALF_THICKNESS
    truth = (distance <= half) & ~torn(13.0, 1.3)
    uneven = half + 0.5 * phantoms.smooth_field(shape, 9.0, rng)
    prediction = (np.roll(distance, 1, axis=1) <= uneven) & ~torn(9.0, 1.9)
    return prediction | torn(8.0, 2.8), truth


# ---------------------------------------------------------------------------- parts


def package_distances(prediction, truth):
    import surface_distance as package

    return package.compute_surface_distances(truth, prediction, (1.0, 1.0, 1.0))


def package_surface_dice(prediction, truth):
    import surface_distance as package

    result = package_distances(prediction, truth)
    return package.compute_surface_dice_at_tolerance(result, TOLERANCE)


def package_hd95(prediction, truth):
    import surface_distance as package

    return package.compute_robust_hausdorff(package_distances(prediction, truth), 95.0)


def monai_surface_dice(prediction, truth):
    from monai.metrics import compute_surface_dice

    masks = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))
    how = {"include_background": True, "use_subvoxels": True}  # as surface-distance defines it
    return float(compute_surface_dice(*masks, [TOLERANCE], **how))


def monai_hd95(prediction, truth):
    from monai.metrics import compute_hausdorff_distance

    masks = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))
    return float(compute_hausdorff_distance(*masks, include_background=True, percentile=95))


def package_information(prediction, truth):
    from skimage.metrics import variation_of_information

    either = prediction | truth
    labels = (ndimage.label(mask, np.ones((3, 3, 3)))[0][either] for mask in (truth, prediction))
    return tuple(map(float, variation_of_information(*labels)))


def hd95(prediction, truth, **constants):
    for name, value in constants.items():
        setattr(surface, name, value)
    return metrics.score(prediction, truth, names=["hd95"])["hd95"]


def names(*chosen):
    return lambda prediction, truth: metrics.score(prediction, truth, names=chosen)


PARTS = {
    "surface Dice": lambda p, t: metrics.score(p, t, names=["surface_dice"])["surface_dice"],
    "surface Dice, surface-distance": package_surface_dice,
    "surface Dice, MONAI": monai_surface_dice,
    "HD95": hd95,
    "HD95, k-d tree": lambda p, t: hd95(p, t, _VOXELS_PER_QUERY=0, _ROWS_PER_VOXEL=0),
    "HD95, transform": lambda p, t: hd95(p, t, _VOXELS_PER_QUERY=10**9, _ROWS_PER_VOXEL=0),
    "HD95, surface-distance": package_hd95,
    "HD95, MONAI": monai_hd95,
    "VOI": lambda p, t: partitions.partition(p, t).variation_of_information(),
    "VOI, scipy and scikit-image": package_information,
    "default scores": lambda p, t: metrics.score(p, t),
    "Betti errors": names("betti_error_0", "betti_error_1", "betti_error_2"),
    "HD95, ASSD and surface Dice": names("hd95", "assd", "surface_dice"),
    "clDice": names("cldice"),
    "sheet recall and filled gaps": names("sheet_recall", "gap_filled"),
    "calibration": lambda p, t: metrics.score(p, t, names=["ece"], probs=p.astype(np.float32)),
    "Betti matching, one tile": homology.betti_matching,
    "Betti matching, 2 x 2 x 2 tiles": lambda p, t: homology.betti_matching(p, t, tiles=(2, 2, 2)),
    "challenge score": metrics.vesuvius_score,
}
AGREE = [
    ("surface Dice", "surface Dice, surface-distance"),
    ("surface Dice", "surface Dice, MONAI"),
    ("HD95", "HD95, surface-distance"),
    ("HD95", "HD95, k-d tree"),
    ("HD95", "HD95, transform"),
    ("VOI", "VOI, scipy and scikit-image"),
]
BESIDE = [*AGREE, ("HD95", "HD95, MONAI")]  # the last counts voxels, where ours counts their area


def measure(path, part, rounds, results):
    """Puts (median seconds, peak MB, its result, median processor seconds of all threads)."""
    warnings.simplefilter("ignore")  # packages call others by names that are going away
    if part.endswith("MONAI"):
        importlib.import_module("monai.metrics")  # that memory is not the score's
    prediction, truth = np.load(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    held = psutil.Process().memory_info().rss
    result, seconds, worked = PARTS[part](prediction, truth), [], []
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    while len(seconds) < rounds and sum(seconds) < ENOUGH_SECONDS:
        started, before = time.perf_counter(), time.process_time()
        PARTS[part](prediction, truth)
        seconds.append(time.perf_counter() - started)
        worked.append(time.process_time() - before)
    median = statistics.median
    results.put((median(seconds), (peak - held) / 2**20, result, median(worked)))


def measured(path, part, rounds):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=measure, args=(str(path), part, rounds, results))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{part}: expected an exit status of 0, got {process.exitcode}")
    return results.get()


# ---------------------------------------------------------------------------- report


def compare(size, rounds, folder):
    """{part: what `measure` says} of one size, printed as it comes."""
    path = folder / f"{size}.npy"
    np.save(path, np.stack(torn_sheets(size)))
    table = {}
    print(f"\n{size} x {size} x {size}{'':20s}{'s':>9s}{'cpu s':>9s}{'MB':>8s}")
    for part in PARTS:
        if part == "Betti matching, one tile" and size > TILE:
            continue
        if part.endswith("MONAI") and importlib.util.find_spec("monai") is None:
            continue
        table[part] = measured(path, part, rounds)
        seconds, memory, result, worked = table[part]
        print(f"{part:32s}{seconds:9.3f}{worked:9.3f}{memory:8.0f}   {_short(result)}", flush=True)
    return table


def _short(result):
    if isinstance(result, dict):
        return ", ".join(f"{name} {_short(value)}" for name, value in result.items())
    if isinstance(result, tuple):
        return "/".join(map(_short, result))
    return f"{result:.4g}"


def _load():
    """Processes that ran or waited in the last minute, ours too: timings count where few did."""
    return f"{os.getloadavg()[0]:.1f}"


def missed_bars(tables):
    """What falls short, as sentences; prints the ratios."""
    missed = []
    for size, table in tables.items():
        for ours, theirs in BESIDE:
            if theirs not in table:
                print(f"{size}: {theirs} is not installed")
                continue
            ratio = table[theirs][0] / table[ours][0]
            print(f"{size}: {ours} is {ratio:.1f} times as fast as {theirs}")
            if (ours, theirs) in AGREE and not np.allclose(
                table[ours][2], table[theirs][2], rtol=0, atol=1e-6
            ):
                missed.append(f"{size}: {ours} and {theirs} differ by more than 1e-6")
        ours, theirs = AGREE[0]
        if table[theirs][0] < FASTER * table[ours][0]:
            missed.append(f"{size}: {ours} is less than {FASTER:g} times as fast as {theirs}")
    seconds = tables[TILE]["Betti matching, one tile"][0] if TILE in tables else 0.0
    print(f"Betti matching of {TILE}^3: {seconds:.2f} s, at most {MATCHING_SECONDS:g} asked")
    if seconds > MATCHING_SECONDS:
        missed.append(f"Betti matching took {seconds:.2f} s, more than {MATCHING_SECONDS:g}")
    return missed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[TILE, 2 * TILE])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"numpy {np.__version__}, {len(os.sched_getaffinity(0))} cores, load {_load()}")
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            size: compare(size, options.rounds, Path(folder)) for size in sorted(options.sizes)
        }
    print()
    missed = missed_bars(tables)
    print(f"load at the end {_load()}")
    print(*(f"missed: {sentence}" for sentence in missed), sep="\n", end="\n" if missed else "")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
