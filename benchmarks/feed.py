"""Making one patch beside the peers: rotation, scaling and an elastic field, on one CPU thread.

    python benchmarks/feed.py                # 2 minutes; prints markdown tables
    python benchmarks/feed.py --repeats 21

One volume of 160 x 320 x 320 uint8 with a label, one patch of 72 x 136 x 136. Ours is the whole
path, from the case file to image and target as float32 and valid as bool; its first half, which is
all that a worker does, stands in a row of its own. The peers start from arrays in memory, and each
is given what is fastest for it: the part of the volume that nnU-Net would cut out first, the bare
patch, or the whole volume as float32. In each round all take a turn; the table shows medians.

The second table is a volume of 61 x 512 x 512 voxels of 4.97 micron, resampled to 1 micron, beside
one that is stored at 1 micron: memory that the process gains, and time per patch of 24 x 96 x 96.
The last line is what the clock of train.py costs, which tells where the time of a step went.

Exit status 1 if a bar is missed, else 0. The peers are in requirements-bench.txt; where they are
not installed their rows say so. Leaves nothing on disk.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # read when numpy is imported

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from patches import cache, resample
from runtime import timer
from settings import Augment
from volumes import casefile, phantoms

SHAPE, PATCH = (160, 320, 320), (72, 136, 136)
CUT = (100, 190, 190)  # what nnU-Net would cut out for this patch and these angles, about
DEGREES, ZOOM = 30.0, (0.75, 1.33)
OUTLIER, COARSE, SMALL_PATCH = (61, 512, 512), 4.97, (24, 96, 96)
PEERS = {  # name: (how many times slower than the whole path, than the worker's share)
    "batchgeneratorsv2 SpatialTransform": (3, 20),
    "TorchIO RandomAffine + RandomElasticDeformation": (7, None),
    "MONAI Rand3DElasticd": (12, None),
}
PACKAGES = ("torch", "numpy", "h5py", "batchgeneratorsv2", "torchio", "SimpleITK", "monai")


# ---------------------------------------------------------------------------- ours


def our_patches(case, *, patch, spacing=(0, 0, 0)):
    """A data.PatchDataset in which every patch is turned, zoomed and bent."""
    settings = Augment(
        rotation=1.0,
        rotation_degrees=(-DEGREES, DEGREES),
        rotation_axes="all",
        scaling=1.0,
        scaling_range=ZOOM,
        elastic=1.0,
    )
    return data.PatchDataset(
        [case],
        cache=cache.VolumeCache([case], 2**30),
        patch=patch,
        spacing=spacing,
        foreground={1: 1.0},
        foreground_share=0.5,
        jitter=0.5,
        clip=None,
        seed=0,
        augment=settings.model_dump(),
    )


def make_patch(sample, patch):
    boxes = (sample["image"], sample["label"])
    return resample.resample_patch(
        *boxes, geometry=sample, patch=patch, regions=[[1]], ignore_label=2
    )


def ours(case):
    """{name: function of the round} of the whole path and of the worker's share of it."""
    patches = our_patches(case, patch=PATCH)
    return {
        "whole path": lambda number: make_patch(patches[0, number], PATCH),
        "worker's share": lambda number: patches[0, number],
    }


# ---------------------------------------------------------------------------- peers


def cut(volume, rng, shape):
    start = [int(rng.integers(0, n - s + 1)) for n, s in zip(volume.shape[1:], shape, strict=True)]
    return volume[(slice(None), *(slice(a, a + s) for a, s in zip(start, shape, strict=True)))]


def batchgenerators(image, label):
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    transform = SpatialTransform(
        PATCH,
        patch_center_dist_from_border=[n // 2 for n in PATCH],
        random_crop=True,
        p_elastic_deform=1,
        elastic_deform_scale=(0.1, 0.1),
        elastic_deform_magnitude=(0.02, 0.02),
        p_rotation=1,
        rotation=(-np.radians(DEGREES), np.radians(DEGREES)),
        p_scaling=1,
        scaling=ZOOM,
        p_synchronize_scaling_across_axes=1,
        mode_seg="nearest",
    )
    whole = image.float(), label.to(torch.int16)

    def of_a_part(number):
        parts = (cut(v, np.random.default_rng(number), CUT) for v in (image, label))
        part, mask = parts
        return transform(image=part.float(), segmentation=mask.to(torch.int16))

    return [of_a_part, lambda number: transform(image=whole[0], segmentation=whole[1])]


def torchio(image, label):
    import SimpleITK
    import torchio as tio

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    transform = tio.Compose(
        [
            tio.RandomAffine(scales=ZOOM, degrees=DEGREES, isotropic=True),
            tio.RandomElasticDeformation(num_control_points=7, max_displacement=7.5),
        ]
    )

    def of_the_bare_patch(number):
        part, mask = (cut(v, np.random.default_rng(number), PATCH) for v in (image, label))
        subject = tio.Subject(
            image=tio.ScalarImage(tensor=part.float()), label=tio.LabelMap(tensor=mask)
        )
        return transform(subject)

    return [of_the_bare_patch]


def monai(image, label):
    import monai.transforms as transforms

    transform = transforms.Rand3DElasticd(
        keys=["image", "label"],
        spatial_size=PATCH,
        sigma_range=(8, 8),
        magnitude_range=(100, 100),
        prob=1,
        rotate_range=(np.radians(DEGREES),) * 3,
        scale_range=(0.3,) * 3,
        mode=("bilinear", "nearest"),
    )
    whole = {"image": image.float(), "label": label.float()}

    def of_a_part(number):
        parts = (cut(v, np.random.default_rng(number), CUT).float() for v in (image, label))
        return transform(dict(zip(("image", "label"), parts, strict=True)))

    return [of_a_part, lambda number: transform(dict(whole))]


def peers(image, label):
    """{name: list of functions of the round, each a way to do it} of those that are installed."""
    found = {}
    for name, make in zip(PEERS, (batchgenerators, torchio, monai), strict=True):
        try:
            found[name] = make(image, label)
        except ImportError:
            found[name] = []
    return found


# ---------------------------------------------------------------------------- measuring


def medians(functions, repeats):
    """{name: seconds}, the median of `repeats` rounds in which all take a turn, after one more."""
    seconds = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function(number)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def make_case(folder, name, shape, spacing):
    phantom = phantoms.scroll(shape, seed=0)
    path = folder / f"{name}.h5"
    casefile.write_case(
        path,
        phantom.image[None],
        phantom.label,
        spacing=spacing,
        unit="micron",
        affine=None,
        group=name,
        ignore_label=2,
        skeleton=False,
    )
    return casefile.read_case(path), phantom


def compare(folder, repeats):
    """Print the table of ours and the peers; the bars that were missed, as text."""
    case, phantom = make_case(folder, "scroll", SHAPE, (1.0, 1.0, 1.0))
    image, label = (torch.from_numpy(v)[None] for v in (phantom.image, phantom.label))
    mine, theirs = ours(case), peers(image, label)
    functions = {**mine}
    for name, ways in theirs.items():
        functions |= {(name, i): way for i, way in enumerate(ways)}
    seconds = medians(functions, repeats)
    whole, share = (seconds[name] for name in mine)
    print("| one patch, one thread | ms | times our whole path | times our worker's share |")
    print("|---|---|---|---|")
    for name in mine:
        print(f"| ours, {name} | {1e3 * seconds[name]:.1f} | | |")
    missed = []
    for name, (bar, worker_bar) in PEERS.items():
        if not theirs[name]:
            print(f"| {name} | not installed | | |")
            continue
        best = min(seconds[name, i] for i in range(len(theirs[name])))
        row = (f"{1e3 * best:.0f}", f"{best / whole:.1f} (asked {bar})")
        print(f"| {name} | {row[0]} | {row[1]} | {best / share:.0f}", end="")
        print(f" (asked {worker_bar}) |" if worker_bar else " |")
        if best / whole < bar or best / share < (worker_bar or 0):
            missed.append(name)
    return missed


def outlier(folder, repeats):
    """Print what the coarse volume costs; the bars that were missed, as text."""
    native, _ = make_case(folder, "native", SHAPE, (1.0, 1.0, 1.0))
    coarse, _ = make_case(folder, "outlier", OUTLIER, (COARSE,) * 3)
    mine, its = (our_patches(c, patch=SMALL_PATCH, spacing=(1, 1, 1)) for c in (native, coarse))
    for number in range(20):
        make_patch(mine[0, number], SMALL_PATCH)
    process = psutil.Process()
    before, highest = process.memory_info().rss, 0
    for number in range(200):
        make_patch(its[0, number], SMALL_PATCH)
        highest = max(highest, process.memory_info().rss)
    gained = (highest - before) / 1e6
    seconds = medians(
        {
            "native": lambda number: make_patch(mine[0, number], SMALL_PATCH),
            "outlier": lambda number: make_patch(its[0, number], SMALL_PATCH),
        },
        10 * repeats,
    )
    ratio = seconds["outlier"] / seconds["native"]
    print(f"\n| {' x '.join(map(str, OUTLIER))} at {COARSE}, resampled to 1 | measured | asked |")
    print("|---|---|---|")
    print(f"| memory gained over 200 patches | {gained:.1f} MB | < 50 MB |")
    print(f"| ms per patch, beside a native one | {1e3 * seconds['outlier']:.1f} beside "
          f"{1e3 * seconds['native']:.1f}: {ratio:.2f} times | < 3 |")  # fmt: skip
    return ["memory of the outlier"] * (gained >= 50) + ["time of the outlier"] * (ratio >= 3)


def clock_cost(steps=20_000):
    """Seconds that the marks of one step take, and their share of the log."""
    clock = timer.StepTimer(torch.device("cpu"))
    started = time.perf_counter()
    for number in range(steps):
        clock.start()
        for part in timer.PARTS:
            clock.mark(part)
        if number % 10 == 9:
            clock.means(10)
    return (time.perf_counter() - started) / steps


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")  # of the peers
    torch.set_num_threads(1)
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; "
          f"Python {platform.python_version()}, {', '.join(versions)}\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        missed = compare(Path(folder), repeats) + outlier(Path(folder), repeats)
    print(f"\nThe clock of a step takes {1e6 * clock_cost():.1f} microseconds.")
    if missed:
        print(f"\nmissed: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
