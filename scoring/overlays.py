"""Pictures of where a mask is wrong: slices of a case, missed and false voxels in their colours.

    sheet("worst.png", [("scroll_008", "surface_dice 0.91", slices), ...], title="quickstart")

A thin mask is wrong by a voxel nearly everywhere along its border, and no one minds. The worst
slices are those with most voxels that are wrong by more than a tolerance.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from monitoring import picture

COLUMNS = 3  # slices of a case


class Slice(NamedTuple):
    """One z slice of a case: (H, W) arrays, the last three bool, and voxels that are far wrong."""

    z: int
    image: np.ndarray
    truth: np.ndarray
    mask: np.ndarray
    labeled: np.ndarray
    missed: int
    false: int


def worst_slices(prediction, truth, image, spacing, *, tolerance, ignore_label, count=COLUMNS):
    """`Slice`s of a case, the worst first; those next to a chosen one are passed over.

    prediction, truth, image (D, H, W); image may be None. A missed voxel is further than the
    tolerance from all predicted ones, a false one from all true ones, in the unit of the spacing.
    Where nothing is, slices follow with most voxels that are wrong at all, then with most truth.
    """
    labeled = truth != (-1 if ignore_label is None else ignore_label)
    prediction, truth = (prediction == 1) & labeled, (truth == 1) & labeled
    missed = truth & _further(prediction, tolerance, spacing)
    false = prediction & _further(truth, tolerance, spacing)
    per_slice = [m.sum(axis=(1, 2)) for m in (missed | false, truth ^ prediction, truth)]
    order = np.lexsort([-counts for counts in reversed(per_slice)])
    gap, chosen = max(1, len(truth) // 20), []
    for z in map(int, order):
        if len(chosen) < count and all(abs(z - other) > gap for other in chosen):
            chosen.append(z)
    return [
        Slice(
            z,
            np.zeros(truth.shape[1:], np.float32) if image is None else np.asarray(image[z], float),
            truth[z],
            prediction[z],
            labeled[z],
            int(missed[z].sum()),
            int(false[z].sum()),
        )
        for z in chosen
    ]


def _further(mask, tolerance, spacing):
    """Whether each voxel is further than the tolerance from all of the mask's."""
    import torch  # late, with what is built on it: a second

    from topology.distance import truncated_edt

    if tolerance == 0:
        return ~mask
    beyond = tolerance * 1.001  # so that what is just as far as the tolerance is no further
    found = truncated_edt(torch.from_numpy(mask), beyond * 1.001, spacing)
    return (found > beyond).numpy()


def sheet(path, cases, *, title, tolerance):
    """Write a PNG with a row for each of [(case id, what its score is, [`Slice`])].

    tolerance: with its unit, for people.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = cases[0][2][0].image.shape
    side = 3.6
    size = COLUMNS * side + 0.7, len(cases) * (side * height / width + 0.3) + 0.8
    figure = Figure(size, dpi=110)
    axes = figure.subplots(len(cases), COLUMNS, squeeze=False)
    for row, (case, score, slices) in zip(axes, cases, strict=True):
        for panel in row:
            panel.axis("off")
        for panel, found in zip(row, slices, strict=False):
            shown = picture.overlay(found.image, found.truth, found.mask, found.labeled)
            panel.imshow(shown, interpolation="antialiased")
            panel.set_title(f"z {found.z}: {found.missed} missed, {found.false} false", fontsize=9)
        row[0].text(
            *(-0.03, 0.5, f"{case}\n{score}"),
            transform=row[0].transAxes,
            rotation=90,
            ha="right",
            va="center",
            fontsize=9,
        )
    named = (("found", picture.FOUND), ("missed", picture.MISSED), ("false", picture.FALSE))
    if not all(found.labeled.all() for _, _, slices in cases for found in slices):
        named += (("unlabeled: darker", "#505050"),)
    patches = [Patch(color=colour, label=label) for label, colour in named]
    figure.suptitle(f"{title}: the worst slices; counts of voxels off by more than {tolerance}")
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False)
    figure.tight_layout(rect=(0.02, 0.3 / figure.get_figheight(), 1, 1))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
