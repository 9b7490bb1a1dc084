"""A contact sheet: one patch of a case under each transformation of the `augment` settings.

Every transformation stands alone, three times: its range from the lowest third to the highest. The
title tells its probability, or that it is off. `python tune.py CONFIG --contact-sheet FILE.png`.
"""

import functools
import itertools
import textwrap
from pathlib import Path

import numpy as np
import torch

from patches import augment, intensity, resample
from patches.cache import VolumeCache
from volumes import atomic
from volumes.colors import class_color, no_formula, show_slice

PICTURES, BLOCKS = 3, 3  # of each transformation; transformations side by side
CANDIDATES = 16  # voxels of which the one with most border of the label around it is chosen
INCHES, NARROWEST = 1.8, 1.4  # the longest side of a picture; the least width, for the texts
COLUMNS = 8  # of the legend of several classes
LEGEND = (
    "Each picture: the patch's middle z slice (y down, x right), below it its middle y slice (z "
    "down, x right). {}: border of the label. Blue: not valid, that is unlabeled or outside."
)
SHOWN = {  # transformation: the setting of its range, and what the title says of it
    "flip": (None, "per axis"),
    "turn90": (None, "in each plane of equal spacing"),
    "rotation": ("rotation_degrees", "{range} degrees, axes: {rotation_axes}"),
    "scaling": ("scaling_range", "factor {range}"),
    "scaling_per_axis": ("scaling_range", "three factors {range}"),
    "elastic": ("elastic_amplitude_range", "RMS {range}, points {elastic_spacing:.3g} apart"),
    "roll": (None, "along z"),
    "gamma": ("gamma_range", "exponent {range}"),
    "brightness": ("brightness_range", "plus {range} std of the volume"),
    "contrast": ("contrast_range", "factor {range}"),
    "noise": ("noise_range", "sigma {range} std of the volume"),
    "rician": ("rician_range", "sigma {range} std of the volume"),
    "blur": ("blur_range", "sigma {range} voxels of the finest axis"),
    "low_resolution": ("low_resolution_range", "voxels {range} larger"),
    "illumination": ("illumination_range", "log of the gain {range}"),
    "dropout": ("dropout_range", "share {range} in {dropout_boxes[0]} to {dropout_boxes[1]} boxes"),
}


def write_sheet(
    path, case, settings, *, patch, spacing, scale, regions, ignore_label, seed=0, name=""
):
    """Write the PNG, on the CPU: a function of the arguments alone.

    case: a labeled `Case`; settings: plain dict of the `augment` settings; patch: voxels; spacing:
    of the patch, z, y, x; scale: mean, std, low and high for intensity.normalise; regions: {name:
    class ids}, whose borders are drawn; name: for the heading.
    """
    cache, rng = VolumeCache([case], 0), np.random.default_rng(seed)
    labels = {"regions": [*regions.values()], "ignore_label": ignore_label}
    about = {"patch": patch, "spacing": spacing, "scale": scale, "labels": labels}
    sample = functools.partial(_sample, rng, case, cache, **about)
    ids = dict.fromkeys(i for region in labels["regions"] for i in region if case.counts.get(i))
    keys = list(ids) or ["background"]
    if not case.counts.get(keys[0]):
        raise ValueError(f"case {case.id}: expected labeled voxels to show a patch of, got none")
    keys = keys if len(regions) > 1 else keys[:1]
    rows = [(key, row) for key in keys for row in rng.integers(case.counts[key], size=CANDIDATES)]
    centers = [cache.row(case, key, int(row)) for key, row in rows]
    center = max(centers, key=lambda center: _border(sample(center, None)[1]))
    image, masks, valid, _ = sample(center, None)
    blocks = [("original", [(image, 0 * masks, valid, ""), (image, masks, valid, "label")])]
    for title, variants in _variants(settings, spacing):
        blocks.append((title, [sample(center, variant) for variant in variants]))
    heading = (
        f"{name}, case {case.id}, seed {seed}: patch of {tuple(patch)} voxels of {tuple(spacing)} "
        f"{case.unit} around voxel {tuple(center.tolist())} (z, y, x)\n"
        + LEGEND.format("Lines" if len(regions) > 1 else "Orange")
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as partial:
            _draw(blocks, spacing, heading, list(regions)).savefig(partial, format="png")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path}: expected a file to write, got {reason}") from error


def _sample(rng, case, cache, center, settings, *, patch, spacing, scale, labels):
    """(image, masks, valid, caption) of a patch around a voxel; settings None: as it is stored.

    image, valid (d, h, w); masks (R, d, h, w): of each region.
    """
    spatial = augment.sample_spatial_params(
        rng, case.spacing, spacing, patch=patch, settings=settings
    )
    place = resample.place_patch(spatial, center, patch, case.shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(place.start, place.stop, strict=True))
    boxes = cache.read(case, box, ("image", "label"))
    params = intensity.sample_intensity_params(rng, settings=settings)
    sample = {"shape": case.shape, "spacing": spacing, "intensity": params}
    sample["image"] = torch.from_numpy(boxes["image"].astype(np.float32))
    sample["label"] = torch.from_numpy(boxes["label"])
    sample |= spatial._asdict() | place._asdict() | scale
    image, masks, valid, _ = augment.augment_batch([sample], patch, device="cpu", **labels)
    caption = [f"{name} {params[name]:.2f}" for name in intensity.NAMES if name in params]
    caption += [f"roll {spatial.roll}"] if spatial.roll else []
    return image[0, 0].numpy(), masks[0].numpy(), valid[0, 0].numpy(), ", ".join(caption)


def _variants(settings, spacing):
    """[(title, [settings of each picture])]: every transformation alone, then all as configured."""
    distance, amplitudes = augment.elastic_range(spacing, settings)
    settings = settings | {"elastic_spacing": distance, "elastic_amplitude_range": amplitudes}
    blocks = []
    for name, (key, text) in SHOWN.items():
        alone = settings | dict.fromkeys(SHOWN, 0.0)
        alone[name] = 0.5 if name == "flip" else 1.0  # if certain, always of all three axes
        share, variants, ends = settings[name], [alone] * PICTURES, ""
        if key is not None:
            ends = "{:.3g} to {:.3g}".format(*settings[key])
            edges = np.linspace(*settings[key], PICTURES + 1).tolist()
            variants = [alone | {key: part} for part in itertools.pairwise(edges)]
        if name == "scaling_per_axis":  # three factors of a third of the range would hardly differ
            share, variants = share * settings["scaling"], [alone | {"scaling": 1.0}] * PICTURES
        title = f"{name}: {f'p {share:g}' if share else 'off'}, {text}"
        blocks.append((title.format(range=ends, **settings), variants))
    return [*blocks, ("all as configured", [settings] * PICTURES)]


def _border(masks):
    """(masks that show, voxels of border) in the slices that are shown: thin things have much."""
    lengths = []
    for mask in masks:
        cuts = (mask[mask.shape[0] // 2], mask[:, mask.shape[1] // 2])
        edges = (np.diff(cut, axis=axis) != 0 for cut in cuts for axis in (0, 1))
        lengths.append(sum(int(edge.sum()) for edge in edges))
    return np.count_nonzero(lengths), sum(lengths)


def _draw(blocks, spacing, heading, names):
    """The figure. Black and white are wider than the original, so that changes are seen."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    original = blocks[0][1][0][0]
    low, high = np.percentile(original, (0.5, 99.5))
    margin = max(0.1 * (high - low), 0.5)  # of a constant patch: half a standard deviation
    sizes = np.multiply(original.shape, spacing)
    depth, height, width = sizes * INCHES / sizes.max()
    rows, tall = -(-len(blocks) // BLOCKS), height + depth + 0.7  # inches of a block
    wide = PICTURES * max(width, NARROWEST) + 0.3
    top = 0.6 + (0.2 * -(-len(names) // COLUMNS) if len(names) > 1 else 0)
    figure = Figure(figsize=(BLOCKS * wide, rows * tall + top), dpi=100)
    head, body = figure.subfigures(2, 1, height_ratios=(top, rows * tall))
    head.text(0.01, 1 - 0.12 / top, heading, fontsize=9, va="top", parse_math=False)
    if len(names) > 1:
        lines = [Line2D([], [], color=class_color(index)) for index in range(len(names))]
        names = [*map(no_formula, names)]
        head.legend(lines, names, loc="lower left", ncols=COLUMNS, fontsize=9, frameon=False)
    grid = {"left": 0.03, "right": 0.97, "top": 1 - 0.3 / tall, "bottom": 0.35 / tall}
    grid |= {"height_ratios": (height, depth), "hspace": 0.05, "wspace": 0.05}
    for panel, (title, pictures) in zip(body.subfigures(rows, BLOCKS).flat, blocks, strict=False):
        panel.text(0.03, 1 - 0.1 / tall, title, fontsize=9, weight="bold", va="top")
        axes = panel.subplots(2, PICTURES, gridspec_kw=grid)
        for column, (*arrays, caption) in zip(axes.T, pictures, strict=False):
            for axis, ax in enumerate(column):
                cuts = (np.take(array, array.shape[axis - 3] // 2, axis - 3) for array in arrays)
                aspect, limits = spacing[1 - axis] / spacing[2], (low - margin, high + margin)
                show_slice(ax, *cuts, aspect, limits)
            column[1].set_xlabel(textwrap.fill(caption, 26), fontsize=7)
        for ax in axes[:, len(pictures) :].flat:
            ax.axis("off")
    return figure
