"""Synthetic volumes with a known truth: `scroll` (sheets) and `vessels` (tubes) of one class,
`arteries_veins` (two kinds of tubes and a nerve) and `spinal_cord` (one thing inside another).

Each is a pure function of (shape, seed, index), for any shape, and hard for a threshold: the
brightness drifts by as much as the structure stands out, and blobs of another shape are as
bright as the structure. What is torn or missing is so in the image and in the label alike.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

UNLABELED = 2

# Scroll: lengths in voxels, brightness in gray levels.
PITCH = (20.0, 24.0)
SHEET_HALF_THICKNESS = 1.5
CLOSEST = 4.0  # between the middles of two sheets in contact
SHEET_CONTRAST = 50.0

# Vessels: lengths in micron. A voxel is thicker than a capillary.
VESSEL_SPACING = (3.0, 1.0, 1.0)
RADIUS = (1.0, 3.0)
STEP = 1.0
VOLUME_PER_TREE = 180_000.0  # cubic micron
MOST_POINTS = 1200  # of a tree; each costs some 20 microseconds to paint
VESSEL_CONTRAST = 100.0
VEIN_RADIUS, VEIN_BRIGHTNESS = (2.0, 4.5), 0.5  # wider than arteries, and darker
NERVE_BRIGHTNESS, BEADS = 1.6, 9.0  # the distance of two swellings

# Spinal cord: lengths in voxels.
CORD_RADIUS = (10.0, 13.0)
CORD, CORD_CONTRAST = {"tissue": 0.45, "fluid": 0.1, "white": 1.0, "grey": 0.65}, 110.0

# The classes of the kinds that have several.
CLASSES = {
    "arteries_veins": {"background": 0, "artery": 1, "vein": 2, "nerve": 3},
    "spinal_cord": {"background": 0, "white": 1, "grey": 2},
}


@dataclass(frozen=True)
class Phantom:
    """image (D, H, W) uint8; label (D, H, W) uint8: 0, ids of CLASSES, else 1; 2 is unlabeled in a
    scroll."""

    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]
    unit: str
    ignore_label: int | None


def smooth_field(shape, length, rng):
    """Smooth noise (D, H, W) float32 of mean 0 and variance 1; length: its grain in voxels.

    A cubic B-spline with random coefficients `length` apart, so that its cost does not grow
    with `length`. length is one number or z, y, x.
    """
    lengths = np.broadcast_to(np.asarray(length, np.float64), 3)
    weights = [_bspline_weights(n, step) for n, step in zip(shape, lengths, strict=True)]
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for axis, weight in enumerate(weights):
        field = np.moveaxis(np.tensordot(weight, field, axes=(1, axis)), 0, axis)
    return field


def _bspline_weights(size, step):
    """(size, knots) float32: rows of cubic B-spline values with unit sum of squares."""
    knots = np.arange(-1, math.ceil((size - 1) / step) + 2)
    t = np.abs(np.arange(size)[:, None] / step - knots)
    inner = 2 / 3 - t**2 + t**3 / 2
    outer = np.clip(2 - t, 0, None) ** 3 / 6
    weights = np.where(t < 1, inner, outer)
    return (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)


def _grid(shape):
    return np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)


def _noise(shape, rng, white, correlated):
    """White noise plus noise of a grain of about two voxels; both given as standard deviations."""
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.0)
    grain *= correlated / (float(grain.std()) or 1.0)  # 0: of one voxel
    return grain + white * rng.standard_normal(shape, dtype=np.float32)


def _as_uint8(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------- scroll


def scroll(shape, seed=0, index=0):
    """Wavy, touching, torn sheets as in a CT of a rolled papyrus, with an unlabeled region.

    Sheets are level sets of the distance from a tilted axis, displaced smoothly; the label is
    the sheet, 3 voxels thick, wherever it is not torn.
    """
    rng = np.random.default_rng([seed, index, 1])
    distance, middle = _sheet_distance(shape, rng)
    torn = smooth_field(shape, 13.0, rng) > rng.uniform(1.1, 1.5)
    sheet = np.where(torn, 0, np.clip(SHEET_HALF_THICKNESS + 0.5 - distance, 0, 1))
    label = ((distance <= SHEET_HALF_THICKNESS) & ~torn).astype(np.uint8)

    dust = _grains(shape, rng, (2.0, 4.2), (0.8, 1.3), middle > 0.5)  # in the gaps between sheets
    brightness = 1 + 0.18 * smooth_field(shape, 18.0, rng)
    bright = SHEET_CONTRAST * np.maximum(sheet * brightness, dust)
    drift = 36.0 * smooth_field(shape, max(shape) / 2.5, rng)
    image = 90.0 + drift + ndimage.gaussian_filter(bright, 0.8) + _noise(shape, rng, 15.0, 7.0)

    label[_unlabeled(shape, rng)] = UNLABELED
    return Phantom(_as_uint8(image), label, (1.0, 1.0, 1.0), "", UNLABELED)


def _sheet_distance(shape, rng):
    """(distance to the nearest sheet in voxels, how far between sheets from 0 to 1)."""
    z, y, x = _grid(shape)
    # The axis lies outside most volumes and is nearly z, as for a scroll that stands upright.
    angle, tilt = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25, size=2)
    away = rng.uniform(0.6, 1.6) * max(shape[1:])
    dy = y - shape[1] / 2 + away * math.sin(angle) + tilt[0] * z
    dx = x - shape[2] / 2 + away * math.cos(angle) + tilt[1] * z
    pitch = rng.uniform(*PITCH)
    radius = np.sqrt(dy**2 + dx**2) + 0.27 * pitch * smooth_field(shape, 26.0, rng)
    slope = np.sqrt(sum(g**2 for g in np.gradient(radius)))
    phase = (radius / pitch + rng.uniform(0, 2)) % 2

    # Sheets come in pairs at phase `shift` and `1 - shift`: where shift grows they meet.
    most = (1 - CLOSEST / pitch) / 2
    shift = most * np.clip(0.3 + 0.75 * smooth_field(shape, 24.0, rng), 0, 1)
    offset = np.minimum.reduce([np.abs(phase - s) for s in (shift, 1 - shift, 2 + shift)])
    offset = np.minimum(offset, np.abs(phase + 1 + shift))
    distance = offset * pitch / np.maximum(slope, 0.5)
    return distance, np.clip(offset * 2, 0, 1)


def _unlabeled(shape, rng):
    """Mask of 25 to 55 % of the voxels behind one smooth boundary."""
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction) * max(shape)
    ramp = sum(d * c for d, c in zip(direction, _grid(shape), strict=True))
    field = ramp + 0.12 * smooth_field(shape, max(shape) / 3, rng)
    return field < np.quantile(field, rng.uniform(0.27, 0.53))


# ---------------------------------------------------------------------------- vessels


def vessels(shape, seed=0, index=0):
    """Branching trees of thin, winding, tapering tubes on an anisotropic grid, in micron.

    The label holds every voxel that a tube passes through, so a capillary between two slices
    stays in one piece. The blobs (cell bodies) are as bright as tubes and are background.
    """
    rng = np.random.default_rng([seed, index, 2])
    tubes = _trees(shape, rng, RADIUS)
    label = (tubes > 0).astype(np.uint8)
    return Phantom(_two_photon(tubes, rng), label, VESSEL_SPACING, "micron", None)


def arteries_veins(shape, seed=0, index=0):
    """As `vessels`: arteries (1), wider and darker veins (2), and a thin, beaded, bright nerve (3).

    Where two of them meet, the later class has the voxel.
    """
    rng = np.random.default_rng([seed, index, 3])
    arteries = _trees(shape, rng, RADIUS)
    veins = VEIN_BRIGHTNESS * _trees(shape, rng, VEIN_RADIUS)
    nerve = np.zeros(shape, np.float32)
    for point, radius in _fiber(np.array(shape) * VESSEL_SPACING, rng):
        _paint_ball(nerve, point / VESSEL_SPACING, radius, NERVE_BRIGHTNESS, VESSEL_SPACING)
    tubes, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    for class_id, canvas in enumerate((arteries, veins, nerve), start=1):
        tubes, label[canvas > 0] = np.where(canvas > 0, canvas, tubes), class_id
    return Phantom(_two_photon(tubes, rng), label, VESSEL_SPACING, "micron", None)


def _two_photon(tubes, rng):
    """The image (D, H, W) uint8 of tubes, given as brightness, with cell bodies between them."""
    shape, size = tubes.shape, np.array(tubes.shape) * VESSEL_SPACING
    bodies = np.zeros(shape, np.float32)
    for _ in range(max(1, round(float(size.prod()) / 40_000))):
        center, bright = rng.uniform(0, np.array(shape) - 1), rng.uniform(0.6, 1.2)
        _paint_ball(bodies, center, rng.uniform(3.5, 6.0), bright, VESSEL_SPACING)
    bright = ndimage.gaussian_filter(np.maximum(tubes, bodies), (0.7, 0.8, 0.8))
    gain = np.exp(0.32 * smooth_field(shape, np.array(size.max() / 2.5) / VESSEL_SPACING, rng))
    haze = 24.0 * np.exp(0.5 * smooth_field(shape, np.array(30.0) / VESSEL_SPACING, rng))
    light = gain * (haze + VESSEL_CONTRAST * bright)
    return _as_uint8(rng.poisson(np.maximum(light, 0) / 5.0) * 5.0 + _noise(shape, rng, 3.0, 2.0))


def _trees(shape, rng, radii):
    """Brightness (D, H, W) float32 of branching tubes, 0 between them; radii: least and largest."""
    size, tubes = np.array(shape) * VESSEL_SPACING, np.zeros(shape, np.float32)
    for _ in range(max(1, round(float(size.prod()) / VOLUME_PER_TREE))):
        for point, radius, brightness in _tree(size, rng, radii):
            _paint_ball(tubes, point / VESSEL_SPACING, radius, brightness, VESSEL_SPACING)
    return tubes


def _fiber(size, rng):
    """The points of a winding line through the volume, as (position z, y, x in micron, radius)."""
    length, (away, winds) = float(np.hypot(*size[1:])), rng.uniform(0, 2 * math.pi, 2)
    along = np.array([0.1, math.sin(away), math.cos(away)])
    for step in np.arange(-length / 2, length / 2, STEP):
        sideways = 0.06 * length * math.sin(winds + 6 * step / length)
        position = size / 2 + step * along + sideways * np.array([0, along[2], -along[1]])
        yield position, 1.0 + 0.8 * max(0.0, math.cos(2 * math.pi * step / BEADS))


def _tree(size, rng, radii):
    """The points of one tree as (position z, y, x in micron, radius, brightness)."""
    # Not too near the border: a tree that leaves at once would leave a thin volume empty.
    start = size * rng.uniform(0.15, 0.85, size=3)
    points, open_ends, direction = [], [], _direction(rng)
    for way in (direction, -direction):
        radius = rng.uniform(radii[1] - 1.0, radii[1])
        open_ends.append((start, way, radius, rng.uniform(0.7, 1.2)))
    while open_ends and len(points) < MOST_POINTS:
        position, way, radius, brightness = open_ends.pop()
        for _ in range(int(rng.uniform(25, 70) / STEP)):
            points.append((position, radius, brightness))
            way = way + 0.16 * rng.standard_normal(3) * (0.5, 1, 1)
            way /= np.linalg.norm(way)
            position = position + STEP * way
            radius = max(radii[0], radius * (1 - 0.003 * STEP))
            if ((position < 0) | (position >= size)).any():
                break
        else:
            open_ends += _children(position, way, radius, brightness, rng, radii[0])
    return points


def _children(position, way, radius, brightness, rng, thinnest):
    """Where a branch ends inside the volume: none if it is thin enough, else two."""
    if radius <= thinnest * 1.02 and rng.uniform() < 0.6:
        return []
    sideways = np.cross(way, _direction(rng))
    sideways /= max(float(np.linalg.norm(sideways)), 1e-6)
    children = []
    for sign, share in ((1, rng.uniform(0.75, 0.95)), (-1, rng.uniform(0.55, 0.8))):
        turned = way + sign * rng.uniform(0.3, 0.9) * sideways
        thinner = max(thinnest, radius * share)
        fainter = float(np.clip(brightness * rng.uniform(0.75, 1.15), 0.5, 1.2))
        children.append((position, turned / np.linalg.norm(turned), thinner, fainter))
    return children


def _direction(rng):
    """A unit vector z, y, x, flattened in z: vessels run mostly within the plane."""
    way = rng.standard_normal(3) * (0.5, 1, 1)
    return way / max(float(np.linalg.norm(way)), 1e-6)


# ---------------------------------------------------------------------------- spinal cord


def spinal_cord(shape, seed=0, index=0):
    """A bent tube along z of white matter (1) with grey matter (2) in it, shaped like a butterfly.

    Around it is dark fluid, then tissue with blobs as bright as white matter. The horns of the grey
    matter are two voxels thin at their ends.
    """
    rng = np.random.default_rng([seed, index, 4])
    z, y, x = _grid(shape)
    radius, turns = rng.uniform(*CORD_RADIUS), rng.uniform(0, 2 * math.pi, 2)
    bend = rng.uniform(0.5, 1.0, 2) * np.array(shape[1:]) * 0.12
    dy = y - shape[1] / 2 - bend[0] * np.sin(z / 30 + turns[0])
    dx = x - shape[2] / 2 - bend[1] * np.sin(z / 22 + turns[1])
    angle = rng.uniform(-0.4, 0.4)
    across = np.abs(dx * math.cos(angle) - dy * math.sin(angle)) / radius  # 0: the middle, 1: side
    down = (dx * math.sin(angle) + dy * math.cos(angle)) / (0.8 * radius)  # -1: front, 1: back
    uneven = 0.05 * smooth_field(shape, 12.0, rng)
    away = np.hypot(across, down) + uneven
    horns = np.abs(across - 0.28 - 0.2 * down**2) < 0.16 - 0.11 * down + uneven / 2
    grey = horns & (np.abs(down + 0.05) < 0.7) | (across < 0.35) & (np.abs(down) < 0.11)
    grey &= away < 0.8  # two voxels of white around it

    label = np.where(grey, 2, away < 1).astype(np.uint8)
    blobs = _grains(shape, rng, (2.5, 6.0), (0.7, 1.2))
    tissue, fluid, white, dark = CORD.values()
    light = np.where(away < 1.35, fluid, np.maximum(tissue, blobs))
    light = np.where(label == 2, dark, np.where(label == 1, white, light))
    gain = np.exp(0.25 * smooth_field(shape, max(shape) / 2.5, rng))
    image = 20.0 + CORD_CONTRAST * gain * ndimage.gaussian_filter(light, 0.7)
    return Phantom(
        _as_uint8(image + _noise(shape, rng, 9.0, 5.0)), label, (1.0, 1.0, 1.0), "", None
    )


# ---------------------------------------------------------------------------- drawing


def _grains(shape, rng, radii, brightness, where=True):
    """Balls with middles in a mask `where`, as bright as the structure; radii in voxels."""
    grains, where = np.zeros(shape, np.float32), np.broadcast_to(where, shape)
    for _ in range(max(2, math.prod(shape) // 2600)):
        center, radius = rng.uniform(0, np.array(shape) - 1), rng.uniform(*radii)
        if where[tuple(center.astype(int))]:
            _paint_ball(grains, center, radius, rng.uniform(*brightness), (1.0, 1.0, 1.0))
    return grains


def _paint_ball(canvas, center, radius, value, spacing):
    """Raise canvas to value inside a ball, in place.

    center in voxels, radius and spacing in units. A voxel counts as reached where the ball
    touches its slab in z beyond the in-plane voxel size.
    """
    slab = (spacing[0] - spacing[1]) / 2
    reach = (radius + np.array([slab, 0, 0])) / spacing
    low = np.maximum(np.ceil(center - reach), 0).astype(int)
    high = np.minimum(np.floor(center + reach) + 1, canvas.shape).astype(int)
    if (low >= high).any():
        return
    axes = zip(low, high, center, spacing, strict=True)
    away = [np.abs(np.arange(a, b, dtype=np.float32) - np.float32(c)) * s for a, b, c, s in axes]
    z, y, x = np.ix_(*away)
    inside = np.maximum(z - slab, 0) ** 2 + y**2 + x**2 <= radius**2
    part = canvas[tuple(map(slice, low, high))]
    np.maximum(part, np.float32(value) * inside, out=part)


PHANTOMS = {
    "scroll": scroll,
    "vessels": vessels,
    "arteries_veins": arteries_veins,
    "spinal_cord": spinal_cord,
}
