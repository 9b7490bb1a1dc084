"""The data sheet: what a prepared data set looks like, one block of a page for each case.

`python prepare.py ... --sheet` draws it: the slices with most foreground, the label outlined, how
the intensities are spread, and the numbers of the case.
"""

import textwrap
from pathlib import Path

import numpy as np

from volumes import atomic
from volumes.casefile import read_array
from volumes.colors import LABEL, class_color, no_formula, show_slice
from volumes.files import few
from volumes.volume import with_unit

COLUMNS, ROWS = 2, 5  # of blocks on a page
WIDTH, HEIGHT = 8.4, 3.5  # inches of a block
PLANES, BINS, SAMPLES = 12, 64, 2**18  # of a histogram: z slices that are read, bars, voxels
SLAB = 16  # planes that a compressed file unpacks together
LEGEND = (
    "Left: the z slice with most of the label (y down, x right). Center: the y slice (z down, x "
    "right). {}: border of the label. Blue: unlabeled. Gray levels go from the 0.5th to the 99.5th "
    "percentile of the case.\nRight: how many voxels have an intensity (log), of all in gray, and "
    "of each class as a line; one axis for all cases, whose last bars hold what lies beyond. Mean "
    "and deviation: of voxels that are not 0."
)


def write_sheet(dataset, folder):
    """Write sheet-1.png and on, a page for each COLUMNS x ROWS cases of a `casefile.Dataset`.

    Returns their paths. It reads every label whole, of the images some planes.
    """
    cases, each = [*dataset.cases.values()], COLUMNS * ROWS
    names = {number: name for name, number in dataset.classes.items() if number}
    levels = np.array([_gray_levels(case) for case in cases])
    limits = levels[:, 0].min(), levels[:, 1].max()  # of all cases, so that they compare
    paths = []
    for first in range(0, len(cases), each):
        paths.append(Path(folder) / f"sheet-{len(paths) + 1}.png")
        heading = f"{Path(dataset.root).name}: cases {first + 1} to "
        heading += f"{min(first + each, len(cases))} of {len(cases)}\n"
        figure = _draw(cases[first : first + each], names, heading, limits)
        with atomic.replacing(paths[-1]) as partial:
            figure.savefig(partial, format="png")
    return paths


def _draw(cases, names, heading, limits):
    """The figure of a page; names: {class id: name}; limits: intensities of the histograms."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(cases))
    rows, several = -(-len(cases) // COLUMNS), len(names) > 1
    top = 0.8 + (0.25 if several else 0) + (0.3 if columns == 1 else 0)
    size = (columns * WIDTH, rows * HEIGHT + top)
    figure = Figure(figsize=size, dpi=100)
    head, body = figure.subfigures(2, 1, height_ratios=(top, rows * HEIGHT))
    text = heading + LEGEND.format("Lines" if several else "Orange")
    text = "\n".join(textwrap.fill(line, int(15 * size[0])) for line in text.split("\n"))
    head.text(0.01, 1 - 0.1 / top, no_formula(text), fontsize=9, va="top")
    if several:
        lines = [Line2D([], [], color=class_color(index)) for index in range(len(names))]
        labels = [*map(no_formula, names.values())]
        head.legend(lines, labels, loc="lower left", ncols=8, fontsize=9, frameon=False)
    panels = body.subfigures(rows, columns, squeeze=False).flat
    for panel, case in zip(panels, cases, strict=False):
        _draw_case(panel, case, names, limits)
    return figure


def _gray_levels(case):
    """The intensities that are black and white in the slices of a case."""
    usual = case.intensity.get("typical") or case.intensity
    low, high = (usual["percentiles"][name][0] for name in ("0.5", "99.5"))
    return low, high if high > low else low + 1


def _draw_case(panel, case, names, limits):
    """A block: two slices and the histogram of a case under its numbers."""
    panel.text(0.02, 0.97, no_formula(case.id), fontsize=9, weight="bold", va="top")
    numbers, planes = _survey(case, names)
    panel.text(0.02, 0.92, no_formula(numbers), fontsize=8, va="top")
    grid = {"left": 0.02, "right": 0.97, "top": 0.76, "bottom": 0.1, "wspace": 0.06}
    axes = panel.subplots(1, 3, gridspec_kw=grid)
    for axis, ax in enumerate(axes[:2]):
        plane = (slice(None),) * axis + (planes[axis],)
        image, valid = read_array(case, "image", (0, *plane)), np.True_
        masks = np.zeros((0, *image.shape), bool)
        if case.labeled:
            label = read_array(case, "label", plane)
            masks, valid = np.array([label == i for i in names]), label != case.ignore_label
        valid = np.broadcast_to(valid, image.shape)
        aspect = case.spacing[1 - axis] / case.spacing[2]
        show_slice(ax, image.astype(np.float32), masks, valid, aspect, _gray_levels(case))
        ax.set_xlabel(f"{'zy'[axis]} = {planes[axis]}", fontsize=7)
    _draw_histogram(axes[2], case, names, limits)


def _survey(case, names):
    """(three lines on a case, [z, y] of the slices that show most of its classes, each class by
    the share of its voxels; the middle ones without)."""
    usual = case.intensity.get("typical") or case.intensity
    mean, std = (f"{usual[key][0]:.4g}" for key in ("mean", "std"))
    channels = f", channel 0 of {case.channels}" if case.channels > 1 else ""
    shape, spacing = "x".join(map(str, case.shape)), with_unit(case.spacing, case.unit)
    lines = [f"{shape} voxels of {spacing}, group {case.group}"]
    lines.append(f"{np.dtype(case.dtype)}{channels}: mean {mean}, deviation {std}")
    planes = [case.shape[0] // 2, case.shape[1] // 2]
    if not case.labeled:
        return "\n".join([*lines, "no label"]), planes
    counts, along = np.zeros(256, np.int64), [np.zeros((len(names), n)) for n in case.shape[:2]]
    for first in range(0, case.shape[0], SLAB):
        slab = read_array(case, "label", slice(first, first + SLAB))
        counts += np.bincount(slab.reshape(-1), minlength=256)
        for index, number in enumerate(names):
            mask = slab == number
            along[0][index, first : first + SLAB] = mask.sum((1, 2))
            along[1][index] += mask.sum((0, 2))
    if counts[[*names]].any():
        planes = [int(np.argmax((n / n.sum(1, keepdims=True).clip(1)).sum(0))) for n in along]
    percent = 100 * counts / counts.sum()
    shares = [f"{percent[i]:.3g} % {name}" for i, name in names.items()]
    if case.ignore_label is not None:
        shares.append(f"{percent[case.ignore_label]:.3g} % unlabeled")
    return "\n".join([*lines, few(shares, 6)]), planes


def _draw_histogram(ax, case, names, limits):
    """How the intensities of some planes are spread: of all voxels, and of each class."""
    count = min(PLANES, case.shape[0])
    planes = ((np.arange(count) + 0.5) * case.shape[0] / count).astype(int)
    step = max(1, int(np.prod(case.shape[1:])) * len(planes) // SAMPLES)
    read = [read_array(case, "image", (0, z)).reshape(-1)[::step] for z in planes.tolist()]
    values = np.concatenate(read).astype(np.float32)
    margin = 0.1 * (limits[1] - limits[0])
    edges = np.linspace(limits[0] - margin, limits[1] + margin, BINS + 1)
    if np.dtype(case.dtype).kind in "ui":  # each bar is of as many whole numbers
        width = max(1, round(edges[1] - edges[0]))
        edges = np.arange(np.floor(edges[0]) - 0.5, edges[-1] + width, width)
    values = np.clip(values, edges[0], edges[-1])
    ax.hist(values, edges, color="0.75", log=True)
    if case.labeled:
        read = [read_array(case, "label", z).reshape(-1)[::step] for z in planes.tolist()]
        label = np.concatenate(read)
        for index, number in enumerate(names):
            color = LABEL if len(names) == 1 else class_color(index)
            ax.hist(values[label == number], edges, color=color, histtype="step", log=True)
    ax.tick_params(labelsize=7)
    ax.set_yticks([])
    ax.minorticks_off()
