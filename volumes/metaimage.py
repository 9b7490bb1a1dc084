"""MetaImage: .mha, or a header .mhd with its voxels in another file, as ITK writes them.

Its header is lines `Key = value`. Read here and not by SimpleITK, which is large and gives 1 1 1
for a spacing that a file has not.
"""

import math
import zlib
from pathlib import Path

import numpy as np

from volumes.volume import Volume, VolumeError, in_one_unit, is_spacing, round_spacing

WRITES_DIMENSIONS = (3, 4)
TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
         "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
         "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
         "MET_DOUBLE": "f8"}  # fmt: skip
NAMES = {code: name for name, code in TYPES.items() if "LONG" not in name or code[1] == "8"}
MSB = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
MATRIX, OFFSET = ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin")
UNITS = {"micron": ("um", 1.0), "nm": ("um", 1e-3), "mm": ("mm", 1.0), "m": ("mm", 1e3)}  # written
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its places are left, posterior, superior
MOST_LINES = 200  # of a header


def read(path, _dataset, _role):
    """The `Volume` in a MetaImage file, (D, H, W) or (C, D, H, W)."""
    with open(path, "rb") as stream:
        fields = _header(path, stream)
        shape = _shape(path, fields)
        voxels = _voxels(path, fields, stream)
    kind = fields.get("ElementType", "")
    if kind not in TYPES:
        raise _error(path, f"ElementType of {', '.join(TYPES)}", kind or "none")
    dtype = np.dtype((">" if _is_true(_first(fields, MSB)) else "<") + TYPES[kind])
    channels = int(fields.get("ElementNumberOfChannels", 1))
    count = math.prod(shape) * channels * dtype.itemsize
    voxels = _after_header(path, voxels, int(fields.get("HeaderSize", 0)), count)
    array = np.frombuffer(voxels, dtype).reshape(*shape, channels)
    array = array[..., 0] if channels == 1 else np.moveaxis(array, -1, 0)
    return Volume(array, *_place(path, fields), str(path))


def count_voxels(path, _dataset):
    """Voxels of the volume, channels included, from the file's header alone."""
    with open(path, "rb") as stream:
        fields = _header(path, stream)
    return math.prod(_shape(path, fields)) * int(fields.get("ElementNumberOfChannels", 1))


def _error(path, expected, got):
    return VolumeError(f"{path}: expected {expected}, got {got}; save it again as .mha")


def _first(fields, keys):
    return next((fields[key] for key in keys if key in fields), "")


def _is_true(text):
    return text[:1].lower() in ("t", "1")


def _header(path, stream):
    """{key: value} of the lines up to ElementDataFile, after which voxels may follow."""
    fields = {}
    for _ in range(MOST_LINES):
        key, equals, value = stream.readline(2**16).decode("utf-8", "replace").partition("=")
        if not equals:
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields
    raise _error(path, "a header of MetaImage that names its ElementDataFile", "another file")


def _shape(path, fields):
    """(D, H, W)."""
    lengths = [int(text) for text in fields.get("DimSize", "").split()]
    if len(lengths) < 3 or min(lengths) < 1 or math.prod(lengths[3:]) != 1:
        raise _error(path, "3 dimensions, and channels in each voxel", f"DimSize {lengths}")
    return tuple(lengths[2::-1])


def _voxels(path, fields, stream):
    """The bytes of the voxels, unpacked, with what may come before them."""
    name = fields["ElementDataFile"]
    if (
        name.upper().startswith("LIST")
        or "%" in name
        or not _is_true(fields.get("BinaryData", "T"))
    ):
        raise _error(path, "binary voxels in one file", f"ElementDataFile {name}")
    packed = stream.read() if name.upper() == "LOCAL" else (Path(path).parent / name).read_bytes()
    return zlib.decompress(packed) if _is_true(fields.get("CompressedData", "")) else packed


def _after_header(path, voxels, skipped, count):
    """The last bytes of count; skipped: bytes before them, -1 for any number."""
    skipped = len(voxels) - count if skipped == -1 else skipped
    if skipped < 0 or len(voxels) - skipped != count:
        raise VolumeError(
            f"{path}: expected {count} bytes of voxels as its header says, got "
            f"{len(voxels) - max(skipped, 0)}; it may be truncated, fetch it again"
        )
    return voxels[skipped:]


def _place(path, fields):
    """(spacing z, y, x or None, unit, affine to right, anterior, superior or None)."""
    steps = _numbers(path, fields, ("ElementSpacing", "ElementSize"))
    if steps is None:
        return None, "", None
    steps, unit = steps[:3], fields.get("DistanceUnits", "").strip("?")
    if not is_spacing(steps):  # it is refused, or given by hand
        return round_spacing(steps[::-1]), "", None
    spacing, unit = in_one_unit(path, steps[::-1], [unit] * 3)
    matrix, offset = _numbers(path, fields, MATRIX), _numbers(path, fields, OFFSET)
    affine = np.diag([*steps, 1.0])
    if matrix is not None:  # row i is the direction of axis i
        affine[:3, :3] = matrix.reshape(2 * [math.isqrt(len(matrix))])[:3, :3].T * steps
    if offset is not None:
        affine[:3, 3] = offset[:3]
    affine[:3] *= spacing[2] / steps[0]  # where the unit is converted
    return spacing, unit, TO_RAS @ affine


def _numbers(path, fields, keys):
    """The numbers of the first of keys that is there, as many as DimSize asks for, or None."""
    text, dimensions = _first(fields, keys), len(fields["DimSize"].split())
    if not text:
        return None
    numbers, wanted = np.array(text.split(), float), dimensions ** (1 + (keys is MATRIX))
    if len(numbers) != wanted:
        raise _error(path, f"{wanted} numbers of {keys[0]}", text)
    return numbers


def write(path, array, spacing, unit, affine, _header):
    """Write (D, H, W) or (C, D, H, W) on the grid of an affine or of a spacing."""
    fields = {"ObjectType": "Image", "NDims": 3, "BinaryData": True, MSB[0]: False}
    fields["CompressedData"] = True
    name, factor = UNITS.get(unit, ("", 1.0))
    if affine is not None or spacing is not None:
        affine = np.diag([*spacing[::-1], 1.0]) if affine is None else TO_RAS @ affine
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        fields[MATRIX[0]] = _text((affine[:3, :3] / steps).T.ravel())
        fields[OFFSET[0]] = _text(affine[:3, 3] * factor)
        fields["ElementSpacing"] = _text(steps * factor)
    fields |= {"DistanceUnits": name} if name else {}
    fields["DimSize"] = _text(array.shape[:-4:-1])
    if array.ndim == 4:
        fields["ElementNumberOfChannels"] = len(array)
        array = np.moveaxis(array, 0, -1)
    voxels = zlib.compress(np.ascontiguousarray(array, array.dtype.newbyteorder("<")), 1)
    fields |= {"CompressedDataSize": len(voxels), "ElementType": NAMES[array.dtype.str[1:]]}
    fields["ElementDataFile"] = "LOCAL"  # the last one
    text = "".join(f"{key} = {value}\n" for key, value in fields.items())
    Path(path).write_bytes(text.encode() + voxels)


def _text(numbers):
    return " ".join(f"{number:.17g}" for number in numbers)
