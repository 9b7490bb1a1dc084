"""Which skeleton serves tubes and sheets: four ways to thin, on phantoms and real volumes.

    python benchmarks/tubed_skeleton.py

Prints one row per volume and way of thinning, and takes some 20 seconds on one core. `near`:
share of the label's voxels within 2 voxels of the skeleton; `tube`: share that the tube of radius 2
covers (by spacing); pieces, 26-connected, of label, skeleton and tube; `lost`: pieces of the label
without a voxel of skeleton; seconds per million voxels. The real volumes are looked for in the
folder that LAMINA_SHARED names, or in ../shared, and are left out where that is absent.

What to look for: on sheets `near` should be 1, whichever way they face; on a thick rod `tube`
should be small (the whole rod is no skeleton); nothing may be lost.
"""

import os
import sys
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
from scipy import ndimage
from skimage.morphology import skeletonize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from volumes import phantoms, skeletons

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = Path(os.environ.get("LAMINA_SHARED", SHARED)) / "data"
RADIUS = 2


def slices(mask, axes):
    return np.logical_or.reduce([skeletons._thin_slices(mask, axis) for axis in axes])


WAYS = {
    "volume (Lee)": lambda mask: skeletonize(mask) > 0,
    "slices along z": lambda mask: slices(mask, (0,)),
    "slices, any axis": lambda mask: slices(mask, (0, 1, 2)),
    "slices, two axes": skeletons.thin,
}


def rod(radius, size=49):
    """A straight round rod, oblique to all axes."""
    way = np.array((1, 0.3, 0.2)) / np.linalg.norm((1, 0.3, 0.2))
    places = np.moveaxis(np.indices((size,) * 3), 0, -1) - size // 2
    return (places**2).sum(-1) - (places @ way) ** 2 <= radius**2


def sheet(size=49):
    """A sheet of 3 voxels that faces z, but for a small tilt."""
    z, y, _ = np.indices((size,) * 3)
    return np.abs(z - size // 2 - 0.1 * (y - size // 2)) <= 1.5


def volumes():
    """Yield (name, mask (D, H, W) bool, spacing)."""
    for radius in (1.5, 4, 8):
        yield f"rod of radius {radius}", rod(radius), (1.0, 1.0, 1.0)
    yield "sheet facing z", sheet(), (1.0, 1.0, 1.0)
    for name, shape in (("scroll", (96, 160, 160)), ("vessels", (40, 160, 160))):
        made = phantoms.PHANTOMS[name](shape)
        yield f"phantom {name}", made.label == 1, made.spacing
    for path in sorted(REAL.glob("vesselNN_nifti/*_lbl.nii.gz")):
        image = nibabel.load(path)
        mask = np.asarray(image.dataobj).T > 0
        yield path.name.split("_")[1], mask, tuple(map(float, image.header.get_zooms()[::-1]))
    for path in REAL.glob("fibsem_membrane/*.h5"):
        with h5py.File(path) as file:
            yield "membrane", file["membrane"][:] > 0, (1.0, 1.0, 1.0)
    for path in REAL.glob("totalseg_pulmonary/pulmonary_artery.nii.gz"):
        yield "pulmonary artery", np.asarray(nibabel.load(path).dataobj).T > 0, (1.0, 1.0, 1.0)


def pieces(mask):
    return ndimage.label(mask, np.ones((3, 3, 3)))


def row(mask, spacing, labels, count, way):
    start = time.perf_counter()
    skeleton = WAYS[way](mask)
    seconds = time.perf_counter() - start
    near = skeletons._within(skeleton, mask, RADIUS, (1.0, 1.0, 1.0))
    tube = skeletons._within(skeleton, mask, RADIUS * min(spacing), spacing)
    lost = count - np.unique(labels[skeleton]).size
    return (
        f"{way:18s}{near.sum() / mask.sum():6.3f}{tube.sum() / mask.sum():7.3f}"
        f"{count:8d}{pieces(skeleton)[1]:10d}{pieces(tube)[1]:6d}{lost:6d}"
        f"{1e6 * seconds / mask.size:12.3f}"
    )


def main():
    print(
        f"{'':20s}{'':18s}{'near':>6s}{'tube':>7s}{'pieces':>8s}{'skeleton':>10s}{'tube':>6s}",
        end="",
    )
    print(f"{'lost':>6s}{'s/Mvoxel':>12s}")
    for name, mask, spacing in volumes():
        labels, count = pieces(mask)
        for way in WAYS:
            print(f"{name:20s}{row(mask, spacing, labels, count, way)}", flush=True)


if __name__ == "__main__":
    main()
