"""A volume in memory, its place in space, units, errors in sentences: what all readers share."""

import contextlib
import itertools
from dataclasses import dataclass, replace

import numpy as np

UNITS = {"mm": "mm", "millimeter": "mm", "micron": "micron", "microns": "micron", "um": "micron",
         "µm": "micron", "μm": "micron", "\\u00b5m": "micron", "micrometer": "micron",
         "nm": "nm", "nanometer": "nm", "m": "m", "meter": "m"}  # fmt: skip
METRES = {"m": 1.0, "mm": 1e-3, "micron": 1e-6, "nm": 1e-9}  # of a unit
CONVERTED = {"km": ("m", 1e3), "Mm": ("m", 1e6), "dm": ("mm", 100.0), "cm": ("mm", 10.0),
             "centimeter": ("mm", 10.0), "in": ("mm", 25.4), "inch": ("mm", 25.4),
             "thou": ("micron", 25.4), "ft": ("mm", 304.8), "Å": ("nm", 0.1),
             "angstrom": ("nm", 0.1), "pm": ("nm", 1e-3), "fm": ("nm", 1e-6)}  # fmt: skip
HEADER_TOLERANCE = 0.01  # relative; headers round, and affines hold float32
SAME_DIRECTION = 0.02  # of the cosines of two axes
WHITE = (254, 255)  # what imaging tools write in a mask where they mean 1
APART = 0.5  # voxels between the places of one corner by two headers, from which on it is said


class VolumeError(ValueError):
    """A volume that cannot be used; the message is one sentence that names the file."""


class InputErrors(ValueError):
    """Everything that is wrong with an input: one sentence per fault, a line each."""

    def __init__(self, *sentences):
        super().__init__("\n".join(sentences))


@contextlib.contextmanager
def collect_errors(sentences):
    """Append the lines of a ValueError or OSError to a list instead of raising it."""
    try:
        yield
    except (ValueError, OSError) as error:
        sentences += str(error).split("\n")


@dataclass(frozen=True)
class Volume:
    """Voxels and what the file says of them.

    array (C, D, H, W) of an image, (D, H, W) of a label; spacing z, y, x or None if the file
    has none; unit "mm", "micron", "nm", "m" or "" (unknown); affine (4, 4), voxel x, y, z to
    world as NIfTI has it, or None. header: of a NIfTI file, for what is written on its grid. doubt:
    a clause on the sizes that the file contradicts itself about. notes: what else is odd in it.
    whole: the shape (D, H, W) of which this is a box, () where it is no box.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    unit: str
    affine: np.ndarray | None
    path: str
    header: bytes | None = None
    doubt: str = ""
    notes: tuple[str, ...] = ()
    whole: tuple[int, ...] = ()

    def remarks(self):
        """What is odd in the file and did not keep it from being read, as clauses for notes."""
        return [*self.notes, *([f"{self.doubt}; the second is used"] if self.doubt else [])]


def printable(text):
    """A path with an escape for each byte that is no UTF-8, as files and terminals refuse those."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def unit_of(name):
    """The unit that a file names, in our spelling; "" if it is unknown."""
    name = str(name).strip().lower().replace("metre", "meter").replace("meters", "meter")
    return UNITS.get(name, "")


def in_one_unit(path, sizes, names):
    """(spacing, unit) of z, y, x sizes that are each in the unit of its own name.

    A unit that we do not write is converted. One that nobody knows, such as "pixel", leaves the
    sizes as they are, with the unit ""; VolumeError if only some of the three are unknown.
    """
    known = [CONVERTED.get(str(name).strip()) or (unit_of(name), 1.0) for name in names]
    units, unit = {unit for unit, _ in known}, known[-1][0]
    if "" in units and len({*map(str, names)}) > 1 and units != {""}:
        raise VolumeError(
            f"{path}: expected one known unit of length for z, y and x, got "
            f"{', '.join(map(repr, names))}; correct the metadata"
        )
    scale = [METRES.get(u, 1.0) / METRES.get(unit, 1.0) * factor for u, factor in known]
    return round_spacing(np.multiply(sizes, scale)), unit


def order_axes(axes, shape):
    """Which axes are channels (if there are several), z, y and x, as indexes; None if unclear.

    axes has a letter for each length of shape. Y, X and C are what they say; one other axis is z,
    whatever its letter. Axes of length 1 are left out, but for one that makes a single slice.
    """
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    long = [i for i in others if shape[i] > 1]
    channels, depth = [i for i in long if axes[i] == "C"], [i for i in long if axes[i] != "C"]
    if not depth and "Z" in axes:
        depth = [axes.index("Z")]
    elif not depth:  # C alone is z: as which some programs declare the pages of any stack
        depth, channels = channels or others[:1], []
    order = [*channels, *depth, axes.find("Y"), axes.find("X")]
    return None if -1 in order or len(depth) != 1 or len(channels) > 1 else order


def take_axes(array, order):
    """The array with the axes of `order_axes` alone: (D, H, W), or (C, D, H, W)."""
    rest = [axis for axis in range(array.ndim) if axis not in order]  # of length 1
    return array.transpose(*order, *rest).reshape([array.shape[axis] for axis in order])


def round_spacing(spacing):
    """To 6 significant digits: headers hold float32, where 0.994 reads 0.9940000176."""
    return tuple(float(f"{float(s):.6g}") for s in spacing)


def is_spacing(sizes):
    """Whether sizes (z, y, x) can be those of a voxel."""
    return all(0 < size < np.inf for size in sizes)


def with_unit(spacing, unit):
    """A spacing for people."""
    return f"{' '.join(f'{s:g}' for s in spacing)} {unit}".rstrip()


def unit_scale(unit, other):
    """How many of another unit one unit is; 1 where one of them is not known."""
    return METRES[unit] / METRES[other] if unit in METRES and other in METRES else 1.0


def doubt_of_order(shape, spacing, unit):
    """A clause where sizes seem to be x, y, z: of few slices that are much finer than x; or ""."""
    z, y, x = spacing
    if x < 2 * max(z, y) or 2 * shape[0] > min(shape[1:]):
        return ""
    meant = " ".join(f"{size:g}" for size in (x, y, z))
    return f"voxels of {with_unit(spacing, unit)}, and few slices: z comes first, is {meant} meant?"


# ---------------------------------------------------------------------------- places


def compare(volume, other, *, spacing=True, axes=True):
    """(faults, notes): what keeps the voxels of two volumes of one case from being the same places.

    A difference of shape, spacing or axes is a fault, a sentence that names both files; one of the
    origin is a note, which names none. Only what both files state is compared, other's spacing if
    it is one; 1 mm is 1000 micron. spacing: whether it is compared; axes: whether it is a fault
    that they differ, or a note.
    """
    faults, notes = [], []
    shape = volume.array.shape[-3:]
    are_cut = volume.whole and other.whole
    of, wanted = (v.whole if are_cut else v.array.shape[-3:] for v in (volume, other))
    if of != wanted:
        faults.append(
            f"{volume.path}: expected the shape of {other.path}, {wanted}, got {of}; "
            "give volumes of the same voxels"
            + " (of some slices: a folder that prepare.py --crop wrote)"
            * (of[1:] == wanted[1:])
        )
    scale = unit_scale(volume.unit, other.unit)
    stated = volume.spacing is not None and is_spacing(other.spacing or (0,))
    sizes_differ = stated and not np.allclose(
        np.multiply(volume.spacing, scale), other.spacing, rtol=HEADER_TOLERANCE, atol=0.0
    )
    if sizes_differ and spacing:
        faults.append(
            f"{volume.path}: expected the spacing of {other.path}, "
            f"{with_unit(other.spacing, other.unit)}, got {with_unit(volume.spacing, volume.unit)};"
            " correct the header that is wrong, or give --spacing Z Y X"
        )
    if volume.affine is None or other.affine is None:
        return faults, notes
    ours, theirs = np.diag([scale, scale, scale, 1.0]) @ volume.affine, other.affine
    difference = apart(ours, theirs, shape[::-1])
    if difference == "axes" and axes:
        faults.append(
            f"{volume.path}: expected the axes of {other.path}, got an affine that turns or "
            "mirrors them; bring both to one orientation, or give --spacing Z Y X if only a header "
            "is wrong"
        )
    elif difference == "axes" or (difference and not faults and not sizes_differ):
        notes.append(f"the headers differ ({difference}); they are matched voxel by voxel")
    return faults, notes


def apart(affine, other, shape_xyz):
    """What sets the places apart that two affines give to the voxels: "axes", "origin" or ""."""
    lengths = [np.linalg.norm(a[:3, :3], axis=0) for a in (affine, other)]
    ours, theirs = affine[:3, :3] / lengths[0], other[:3, :3] / lengths[1]
    if not np.allclose(ours, theirs, rtol=0.0, atol=SAME_DIRECTION):
        return "axes"
    corners = np.array([*itertools.product(*((0, n - 1) for n in shape_xyz[:3]))]).T
    corners = corners * lengths[1][:, None]
    offset = (affine[:3, 3] - other[:3, 3])[:, None]
    moved = np.linalg.solve(other[:3, :3], (ours - theirs) @ corners + offset)
    return "origin" if np.abs(moved).max() > APART else ""


def check_affine(affine, path):
    """The affine as a (4, 4) array; VolumeError where it maps no voxel to a place of its own."""
    matrix = np.zeros((4, 4))
    with contextlib.suppress(TypeError, ValueError):
        matrix = np.array(affine, np.float64)
    if matrix.shape == (3, 4):
        matrix = np.vstack([matrix, np.eye(4)[3]])
    good = (
        matrix.shape == (4, 4) and np.isfinite(matrix).all() and (matrix[3] == np.eye(4)[3]).all()
    )
    lengths = np.linalg.norm(matrix[:3, :3], axis=0) if good else np.zeros(1)
    if not lengths.all() or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-4:
        got = str(affine).replace("\n", "")
        raise VolumeError(
            f"{path}: expected an affine that can be inverted, got {got}; correct the header"
        )
    return matrix


def sizes(affine):
    """The voxel sizes z, y, x of an affine: the lengths of its columns."""
    return round_spacing(np.linalg.norm(affine[:3, :3], axis=0)[::-1])


def axes_of(affine):
    """Where the axes x, y, z of an affine run to, such as "RAS": right, anterior, superior."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orders = itertools.permutations(range(3))
    order = max(orders, key=lambda order: sum(abs(cosines[w, i]) for i, w in enumerate(order)))
    return "".join(("RL", "AP", "SI")[w][int(cosines[w, i] < 0)] for i, w in enumerate(order))


def box_within(path, box, shape, role="image"):
    """(the slices of a box with both ends, the shape that it is cut from).

    A label of just the shape of the box is that of the box alone: all of it, cut from nothing, ().
    VolumeError for a box that is empty or reaches out of shape.
    """
    ends = [
        (s.start or 0, n if s.stop is None else s.stop) for s, n in zip(box, shape, strict=True)
    ]
    if role == "label" and tuple(stop - first for first, stop in ends) == tuple(shape):
        return tuple(slice(0, n) for n in shape), ()
    if any(not 0 <= first < stop <= n for (first, stop), n in zip(ends, shape, strict=True)):
        got = ",".join(f"{first}:{stop}" for first, stop in ends)
        label = " or give a label of just the box" * (role == "label")
        raise VolumeError(
            f"{path}: expected a box within its {shape} voxels (z, y, x), got {got}; correct the "
            f"box{label}"
        )
    return tuple(slice(*pair) for pair in ends), tuple(shape)


def take_box(volume, box, role):
    """The `Volume` of a box (slices of z, y, x), at its own place; errors as of `box_within`."""
    box, whole = box_within(volume.path, box, volume.array.shape[-3:], role)
    affine = volume.affine
    if affine is not None:
        affine = crop_affine(affine, [s.start for s in box])
    return replace(volume, array=volume.array[..., *box], affine=affine, whole=whole)


def crop_affine(affine, offset_zyx):
    """The affine of a volume cut out at offset_zyx (voxels): same axes, moved origin."""
    moved = np.array(affine, np.float64)
    moved[:3, 3] += moved[:3, :3] @ np.asarray(offset_zyx, np.float64)[::-1]
    return moved


def scale_affine(affine, spacing):
    """The affine with voxels of this size (z, y, x): same axes, the same voxel at the origin."""
    factors = np.divide(spacing, sizes(affine))[::-1]
    if np.allclose(factors, 1.0, rtol=1e-4, atol=0.0):  # sizes are rounded
        return affine
    scaled = np.array(affine, np.float64)
    scaled[:3, :3] *= factors
    scaled[:3, 3] = scaled[:3, :3] @ np.linalg.solve(affine[:3, :3], affine[:3, 3])
    return scaled
