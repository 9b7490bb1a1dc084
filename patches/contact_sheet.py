"""A contact sheet: one place of a volume under each transformation of the `augment` settings.

`variants` says with which settings a patch is drawn to show each transformation alone; `picture`
paints a drawn patch; `write_sheet` lays the pictures out. Plain values in, one PNG out: augment.py
reads the config and draws the patches.
"""

import itertools
import math
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

DRAWS = 3  # pictures of each transformation
BLOCKS = 3  # transformations side by side
SIDE = 200  # pixels that the longest side of a patch may take, unless its voxels are more
OUTLINE = (255, 140, 0)
HATCH = (90, 120, 190)

# Of the sheet, in pixels.
DPI = 100
GREYS = 64  # levels: in noise more are not told apart, and 250 make the file a third larger
MARGIN, GAP = 28, 6
TITLE, CAPTION, BELOW = 24, 14, 18
LETTER = 5.4  # the mean width of a letter of a caption
NARROWEST = 140  # from a picture to the next: narrower ones would leave no room for the texts


class Shown(NamedTuple):
    """A block of the sheet: the probabilities that it sets, the range that it draws from, and how
    its title tells that range. spread: whether each draw has a part of the range to itself."""

    title: str
    on: dict[str, float]
    range: str | None
    meaning: str
    spread: bool = True


SHOWN = (
    Shown("flip", {"flip": 0.5}, None, "per axis"),  # if certain, always of all three axes
    Shown("turn90", {"turn90": 1.0}, None, "in each plane of equal spacing"),
    Shown(
        "rotation",
        {"rotation": 1.0},
        "rotation_degrees",
        "{range} degrees, axes: {rotation_axes}",
    ),
    Shown("scaling", {"scaling": 1.0}, "scaling_range", "factor {range}"),
    Shown(
        "scaling per axis",
        {"scaling": 1.0, "scaling_per_axis": 1.0},
        "scaling_range",
        "three factors {range}",
        spread=False,  # three of one narrow part would hardly differ
    ),
    Shown(
        "elastic",
        {"elastic": 1.0},
        "elastic_amplitude_range",
        "RMS {range}, points {elastic_spacing:.3g} apart",
    ),
    Shown("roll", {"roll": 1.0}, None, "along z"),
    Shown("gamma", {"gamma": 1.0}, "gamma_range", "exponent {range}"),
    Shown("brightness", {"brightness": 1.0}, "brightness_range", "plus {range} std of the volume"),
    Shown("contrast", {"contrast": 1.0}, "contrast_range", "factor {range}"),
    Shown("noise", {"noise": 1.0}, "noise_range", "sigma {range} std of the volume"),
    Shown("rician", {"rician": 1.0}, "rician_range", "sigma {range} std of the volume"),
    Shown("blur", {"blur": 1.0}, "blur_range", "sigma {range} voxels of the finest axis"),
    Shown(
        "low_resolution", {"low_resolution": 1.0}, "low_resolution_range", "voxels {range} larger"
    ),
    Shown("illumination", {"illumination": 1.0}, "illumination_range", "log of the gain {range}"),
    Shown(
        "dropout",
        {"dropout": 1.0},
        "dropout_range",
        "share {range} in {dropout_boxes[0]} to {dropout_boxes[1]} boxes",
    ),
)

# ---------------------------------------------------------------------------- settings


def variants(settings):
    """The blocks of the sheet: [(title, [settings of each of `DRAWS` draws]), ...].

    settings: plain dict of the `augment` settings, every range in numbers. Each transformation is
    alone and certain. The first draw comes from the lowest part of its range, the last from the
    highest, so that both ends are seen. The title tells probability and range as they are set, so
    that the sheet also shows what the run leaves out: "off".
    """
    off = {name: 0.0 for shown in SHOWN for name in shown.on}
    blocks = []
    for shown in SHOWN:
        alone = settings | off | shown.on
        draws = [alone] * DRAWS
        if shown.range and shown.spread:
            edges = np.linspace(*settings[shown.range], DRAWS + 1).tolist()
            draws = [alone | {shown.range: part} for part in itertools.pairwise(edges)]
        blocks.append((_title(shown, settings), draws))
    return blocks


def _title(shown, settings):
    share = math.prod(settings[name] for name in shown.on)
    ends = "{:.3g} to {:.3g}".format(*settings[shown.range]) if shown.range else ""
    meaning = shown.meaning.format(range=ends, **settings)
    return f"{shown.title}: {f'p {share:g}' if share else 'off'}, {meaning}"


# ---------------------------------------------------------------------------- pictures


def middle_border(target):
    """How much border of the label the two slices of `picture` show; target (D, H, W) bool.

    Thin things have much of it, and a place inside a thick one, all foreground, has none.
    """
    cuts = [_middle(target, axis) for axis in (0, 1)]
    return int(sum((np.diff(cut, axis=a) != 0).sum() for cut in cuts for a in (0, 1)))


def grey_range(image):
    """(black, white) for all pictures of a sheet: wider than the image, so that changes are seen.

    image: the patch without augmentation, (D, H, W), normalised.
    """
    shown = np.concatenate([_middle(image, axis).ravel() for axis in (0, 1)])
    low, high = np.percentile(shown, (0.5, 99.5))
    margin = max(0.1 * (high - low), 0.5)  # of a constant patch: half a standard deviation
    return float(low - margin), float(high + margin)


def picture(image, target, valid, *, spacing, grey, outline=True):
    """The middle z slice above the middle y slice, as (h, w, 3) uint8.

    image (D, H, W) float; target, valid (D, H, W) bool; spacing z, y, x: a pixel is as long in
    every direction; grey: values of black and white. The label is outlined on its own border
    pixels, what is not valid is hatched.
    """
    enlarged = max(1, SIDE * min(spacing) // max(np.multiply(image.shape, spacing)))
    views = []
    for axis in (0, 1):
        sides = [a for a in range(3) if a != axis]
        pixels = [
            max(1, round(image.shape[a] * spacing[a] / min(spacing) * enlarged)) for a in sides
        ]
        where = np.ix_(
            *(np.arange(n) * image.shape[a] // n for n, a in zip(pixels, sides, strict=True))
        )
        cuts = [_middle(box, axis)[where] for box in (image, target & outline, valid)]
        views += [np.full((GAP, pixels[1], 3), 255, np.uint8), _paint(*cuts, grey)]
    return np.concatenate(views[1:])


def _middle(box, axis):
    return np.take(box, box.shape[axis] // 2, axis)


def _paint(image, target, valid, grey):
    """(h, w, 3) uint8 of one slice, pixel by pixel."""
    from scipy import ndimage

    low, high = grey
    shade = np.clip((image - low) / (high - low), 0, 1) * 255
    painted = np.repeat(shade[..., None], 3, axis=2)
    painted[target & ~ndimage.binary_erosion(target, border_value=1)] = OUTLINE
    painted[~valid] *= 0.5
    stripes = np.add(*np.indices(valid.shape)) % 8 < 2
    painted[~valid & stripes] = HATCH
    return painted.round().astype(np.uint8)


# ---------------------------------------------------------------------------- the sheet


def write_sheet(path, blocks, *, heading):
    """Write the PNG, under a temporary name first, then renamed.

    blocks: [(title, [(picture, caption), ...]), ...] with pictures of one shape, at most `DRAWS` in
    a block; heading: lines of text above them. ValueError names a path that cannot be written.
    """
    canvas, texts = _lay_out(blocks, heading)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _rendered(canvas, texts).save(partial, "PNG")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path}: expected a file to write, got {error.strerror or error}"
        ) from error


def _lay_out(blocks, heading):
    """The pictures on white, (h, w, 3) uint8, and the texts: (x, y, text, size, weight)."""
    high, wide, _ = blocks[0][1][0][0].shape
    step = max(wide + GAP, NARROWEST)
    across = DRAWS * step + MARGIN
    texts = [(MARGIN, MARGIN / 2 + i * 18, line, 9, "normal") for i, line in enumerate(heading)]
    top, pasted = MARGIN + len(heading) * 18, []
    for first in range(0, len(blocks), BLOCKS):
        lines = 0
        for column, (title, pictures) in enumerate(blocks[first : first + BLOCKS]):
            left = MARGIN + column * across
            texts.append((left, top, title, 9, "bold"))
            for i, (painted, caption) in enumerate(pictures):
                x, wrapped = left + i * step, textwrap.wrap(caption, int(step / LETTER))
                pasted.append((top + TITLE, x, painted))
                texts.append((x, top + TITLE + high + 3, "\n".join(wrapped), 7, "normal"))
                lines = max(lines, len(wrapped))
        top += TITLE + high + lines * CAPTION + BELOW
    canvas = np.full((top, MARGIN + BLOCKS * across, 3), 255, np.uint8)
    for y, x, painted in pasted:
        canvas[y : y + high, x : x + wide] = painted
    return canvas, texts


def _rendered(canvas, texts):
    """The sheet as a PIL image: greys and the two colours, a byte per pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    high, wide, _ = canvas.shape
    figure = Figure(figsize=(wide / DPI, high / DPI), dpi=DPI)
    for x, y, text, size, weight in texts:
        place = (x / wide, 1 - y / high)
        figure.text(*place, text, size=size, weight=weight, va="top", parse_math=False)
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    # The pictures go on beside matplotlib, pixel for pixel: all that it drew is grey on white.
    colours = np.minimum(np.asarray(drawn.buffer_rgba())[..., :3], canvas)
    index = np.round(colours[..., 0] * ((GREYS - 1) / 255)).astype(np.uint8)
    for i, colour in enumerate((OUTLINE, HATCH)):
        index[(colours == colour).all(axis=2)] = GREYS + i
    sheet = Image.fromarray(index)
    greys = np.linspace(0, 255, GREYS).round().astype(int)
    sheet.putpalette([*np.repeat(greys, 3).tolist(), *OUTLINE, *HATCH])
    return sheet
