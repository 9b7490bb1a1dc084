"""A volume in memory, its units, errors in sentences, and the cores: what all readers share."""

import contextlib
from dataclasses import dataclass

import numpy as np

UNITS = {"mm": "mm", "millimeter": "mm", "micron": "micron", "microns": "micron", "um": "micron",
         "µm": "micron", "μm": "micron", "\\u00b5m": "micron", "micrometer": "micron",
         "nm": "nm", "nanometer": "nm", "m": "m", "meter": "m"}  # fmt: skip
METRES = {"m": 1.0, "mm": 1e-3, "micron": 1e-6, "nm": 1e-9}  # of a unit
CONVERTED = {"km": ("m", 1e3), "Mm": ("m", 1e6), "dm": ("mm", 100.0), "cm": ("mm", 10.0),
             "centimeter": ("mm", 10.0), "in": ("mm", 25.4), "inch": ("mm", 25.4),
             "thou": ("micron", 25.4), "ft": ("mm", 304.8), "Å": ("nm", 0.1),
             "angstrom": ("nm", 0.1), "pm": ("nm", 1e-3), "fm": ("nm", 1e-6)}  # fmt: skip


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
    world as NIfTI has it, or None.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    unit: str
    affine: np.ndarray | None
    path: str


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
