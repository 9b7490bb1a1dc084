"""NRRD, by pynrrd: .nrrd, or a header .nhdr with its voxels in another file.

Axes are of space (domain) or of channels, which the header must tell: by its kinds, or by `none`
among its space directions. Places are stated in a space such as left-posterior-superior.
"""

import io
import math
import re
from pathlib import Path

import numpy as np

from volumes.volume import Volume, VolumeError, in_one_unit, is_spacing, sizes

WRITES_DIMENSIONS = (3, 4)
# Signs that turn x, y, z of a space into right, anterior, superior.
SPACES = {"right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
          "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
          "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1)}  # fmt: skip
FIELDS = set(  # without spaces
    "type dimension sizes encoding endian content min max oldmin oldmax datafile lineskip byteskip "
    "number sampleunits spacings thicknesses axismins axismaxs centers centerings labels units "
    "kinds space spacedimension spaceunits spaceorigin spacedirections measurementframe "
    "blocksize".split()
)
LPS = "left-posterior-superior"
OF_NO_BODY = ("", "scanner-xyz", "3d-right-handed", "3d-left-handed")
SPATIAL = ("domain", "space")
NOT_CHANNELS = ("time", "complex", "quaternion", "matrix")  # in the name of a kind


def read(path, _dataset, _role):
    """The `Volume` in a NRRD file, (D, H, W) or (C, D, H, W)."""
    import nrrd  # few read such files

    with open(path, "rb") as stream:
        fields = nrrd.read_header(stream)
        _check_text(path, stream)
        header = {key.lower().replace(" ", ""): value for key, value in fields.items()}
        data_file = str(header.get("datafile", ""))
        if data_file.startswith("LIST") or "%" in data_file:
            raise VolumeError(
                f"{path}: expected its voxels in one file, got {data_file!r}; save it as one .nrrd"
            )
        array = nrrd.read_data(fields, stream, str(path), index_order="F")
    space, channels = _axes(path, header)
    array = array.transpose(*space, *channels).reshape([array.shape[i] for i in space] + [-1])
    spacing, unit, affine, notes = _place(path, header, space)
    array = array[..., 0] if array.shape[3] == 1 else array
    return Volume(array.T, spacing, unit, affine, str(path), notes=notes)


def _check_text(path, stream):
    """VolumeError for a line that is no field of a NRRD: pynrrd drops bytes that are no text, and
    passes over a name that it does not know, be it a misspelled origin."""
    end = stream.tell()
    stream.seek(0)
    for line in stream.read(end).splitlines()[1:]:
        name = line.partition(b":")[0].replace(b" ", b"").lower().decode("latin-1")
        if not line or line.startswith(b"#") or b":=" in line:
            continue
        if not line.isascii() or name not in FIELDS:
            got = line[:60].decode("latin-1")
            raise VolumeError(
                f"{path}: expected a field of a NRRD header, got {got!r}; correct it, or fetch the "
                "file again"
            )


def count_voxels(path, _dataset):
    """Voxels of the volume, channels included, from the file's header alone."""
    import nrrd

    return math.prod(nrrd.read_header(str(path))["sizes"].tolist())


def _axes(path, header):
    """(x, y, z as axes of the file, [the axes of channels, or of length 1])."""
    lengths, kinds = header["sizes"].tolist(), header.get("kinds")
    vectors, spacings = header.get("spacedirections"), header.get("spacings")
    axes = [*range(len(lengths))]
    if kinds is not None and len(kinds) == len(axes) and not {"???", "none"} & {*kinds}:
        space = [i for i in axes if kinds[i].lower() in SPATIAL]
        odd = [k for k in kinds if any(word in k.lower() for word in NOT_CHANNELS)]
        if odd and lengths[kinds.index(odd[0])] > 1:
            raise VolumeError(
                f"{path}: expected axes of space and of channels, got one of the kind {odd[0]}; "
                "store one volume"
            )
    elif vectors is not None and len(vectors) == len(axes):
        space = [i for i in axes if np.isfinite(_vector(path, vectors[i])).all()]
    elif spacings is not None and len(spacings) == len(axes):
        space = [i for i in axes if np.isfinite(spacings[i])]
    else:
        space = axes
    if len(space) != 3:  # without a word on its axes: those of length 1 tell nothing
        space = [i for i in space if lengths[i] > 1]
    if len(space) != 3:
        raise VolumeError(
            f"{path}: expected 3 axes of space, got {len(space)} of the sizes {lengths}; name the "
            "kinds of its axes, such as `kinds: domain domain domain vector`"
        )
    channels = [i for i in axes if i not in space]
    if sum(lengths[i] > 1 for i in channels) > 1:
        raise VolumeError(f"{path}: expected one axis of channels, got the sizes {lengths}")
    return space, channels


def _vector(path, vector):
    """One of the space directions, x, y, z; NaN where it is `none`."""
    try:
        values = np.full(3, np.nan) if vector is None else np.asarray(vector, np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.shape != (3,):
        raise VolumeError(
            f"{path}: expected space directions of 3 numbers, got {vector}; correct the header"
        )
    return values


def _place(path, header, space):
    """(spacing z, y, x or None, unit, affine to right-anterior-superior or None, notes)."""
    vectors = header.get("spacedirections")
    if vectors is None:
        spacings = header.get("spacings")
        if spacings is None or not np.isfinite([spacings[i] for i in space]).any():
            return None, "", None, ()
        steps = [float(spacings[i]) for i in space][::-1]
        units = header.get("units")
        names = [units[i] for i in space][::-1] if units is not None else [""] * 3
        return *in_one_unit(path, steps, names), None, ()
    columns = np.array([_vector(path, vectors[i]) for i in space]).T
    origin = header.get("spaceorigin")
    origin = np.zeros(3) if origin is None else _vector(path, origin)
    name, notes = str(header.get("space", "")).lower(), ()
    if name not in SPACES:
        if name not in OF_NO_BODY:
            raise VolumeError(
                f"{path}: expected a space such as {LPS}, got {name!r}; correct the header"
            )
        # ITK takes it for that too.
        notes = (f"its space is {name or 'not named'}; {LPS} is taken",)
    affine = np.eye(4)
    affine[:3] = np.diag(SPACES.get(name, SPACES[LPS])) @ np.c_[columns, np.nan_to_num(origin)]
    spacing, names = sizes(affine), header.get("spaceunits")
    if not is_spacing(spacing):  # it is refused, or given by hand
        return spacing, "", None, notes
    names = {*names} if names is not None else {""}
    if len(names) > 1:
        got = ", ".join(sorted(names))
        raise VolumeError(f"{path}: expected one unit of space, got {got}; correct the header")
    converted, unit = in_one_unit(path, spacing, [*names] * 3)
    affine[:3] *= converted[0] / spacing[0]
    return converted, unit, affine, notes


def write(path, array, spacing, unit, affine, _header):
    """Write (D, H, W) or (C, D, H, W) on the grid of an affine or of a spacing."""
    import nrrd

    channels = array.ndim - 3
    header = {"kinds": ["domain"] * 3 + ["vector"] * channels, "encoding": "gzip"}
    unit = {"micron": "um"}.get(unit, unit)
    if affine is not None:
        columns = np.diag(SPACES[LPS]) @ affine[:3]
        header |= {"space": LPS, "space origin": columns[:, 3]}
        header["space directions"] = np.vstack([columns[:, :3].T, np.full((channels, 3), np.nan)])
        header |= {"space units": [unit] * 3} if unit else {}
    elif spacing is not None:
        header["spacings"] = [*spacing[::-1], *([math.nan] * channels)]
        header |= {"units": [unit] * 3 + [""] * channels} if unit else {}
    content = io.BytesIO()
    nrrd.write(content, array, header, compression_level=1, index_order="C")
    # Without the date, so that equal voxels make equal files.
    Path(path).write_bytes(re.sub(rb"# on [^\n]*\n", b"", content.getvalue(), count=1))
