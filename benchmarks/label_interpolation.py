"""Why the label takes the nearest voxel: thin shapes turned at random, drawn in both ways.

    python benchmarks/label_interpolation.py

For sheets and tubes of one and two voxels, 30 random rotations each: voxels kept (1 is right) and
26-connected pieces (1 is right), with the nearest voxel and with linear weights cut at one half.
"""

import sys
from pathlib import Path

import cc3d
import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from patches import augment
from settings import Augment

SIZE, PATCH = 48, (24, 24, 24)


def shapes():
    for name, box in {
        "sheet of 1": np.s_[24],
        "sheet of 2": np.s_[24:26],
        "tube of 1": np.s_[24, 24],
        "tube of 2": np.s_[24:26, 24:26],
    }.items():
        label = np.zeros((SIZE,) * 3, np.float32)
        label[box] = 1
        yield name, label


def main():
    settings = Augment(
        flip=0.0, turn90=0.0, scaling=0.0, rotation=1.0, rotation_degrees=(-30.0, 30.0)
    ).model_dump()
    print(f"{'':12s}{'voxels: nearest':>16s}{'linear':>8s}{'pieces: nearest':>17s}{'linear':>8s}")
    for name, label in shapes():
        rng, rows = np.random.default_rng(0), []
        for _ in range(30):
            matrix = augment.sample_spatial_params(
                rng, (1, 1, 1), (1, 1, 1), patch=PATCH, settings=settings
            ).matrix
            centre = SIZE / 2 + rng.uniform(-0.5, 0.5, 3)
            place = {"offset": centre - matrix @ ((np.array(PATCH) - 1) / 2), "output_shape": PATCH}
            fine = ndimage.affine_transform(  # supersampled: the volume that is really there
                label, matrix / 3, place["offset"] - matrix @ np.full(3, 1 / 3), (72,) * 3, order=0
            )
            nearest = ndimage.affine_transform(label, matrix, order=0, **place) > 0
            linear = ndimage.affine_transform(label, matrix, order=1, **place) > 0.5
            pieces = [
                cc3d.connected_components(m, connectivity=26).max() for m in (nearest, linear)
            ]
            rows.append([nearest.sum() * 27 / fine.sum(), linear.sum() * 27 / fine.sum(), *pieces])
        a, b, c, d = np.mean(rows, axis=0)
        print(f"{name:12s}{a:16.2f}{b:8.2f}{c:17.2f}{d:8.2f}")


if __name__ == "__main__":
    main()
