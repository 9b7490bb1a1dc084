"""A volume in memory, its units, errors in sentences, and the cores: what all readers share."""

import contextlib
from dataclasses import dataclass

import numpy as np

UNITS = {"mm": "mm", "millimeter": "mm", "micron": "micron", "microns": "micron", "um": "micron",
         "µm": "micron", "μm": "micron", "\\u00b5m": "micron", "micrometer": "micron",
         "nm": "nm", "nanometer": "nm", "m": "m", "meter": "m"}  # fmt: skip


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


def printable(text):
    """A path with an escape for each byte that is no UTF-8, as files and terminals refuse those."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def unit_of(name):
    """The unit that a file names, in our spelling; "" if it is unknown."""
    return UNITS.get(str(name).lower(), "")


def round_spacing(spacing):
    """To 6 significant digits: headers hold float32, where 0.994 reads 0.9940000176."""
    return tuple(float(f"{float(s):.6g}") for s in spacing)
