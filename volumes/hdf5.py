"""HDF5: a dataset that is named, or found by its name, with spacing in its attributes."""

import contextlib
import itertools
import json
import math
import os
from pathlib import Path

import h5py
import numpy as np

from volumes.volume import (
    HEADER_TOLERANCE,
    Volume,
    VolumeError,
    in_one_unit,
    order_axes,
    take_axes,
    unit_scale,
    with_unit,
)

WRITES_DIMENSIONS = (3, 4)
USUAL_NAMES = {"image": ("image",), "label": ("label", "segmentation")}  # by role
NAMES_OF_OTHERS = {"image": ("label",), "label": ("image",)}
# By dimensions, of a dataset without ilastik's axistags; channels may come last where there is one.
USUAL_AXES = {3: "ZYX", 4: "CZYX", 5: "TCZYX"}
AXES_OF_ONE_CHANNEL_LAST = {4: "ZYXC", 5: "TZYXC"}


def read(path, dataset, role):
    """The `Volume` in a dataset, (D, H, W) or (C, D, H, W); role: see `_choose`."""
    with h5py.File(path, "r") as file:
        items = dict(_items(file))
        volumes = {name: item for name, item in items.items() if item is None or _order(item)}
        dataset = (dataset or _choose(path, volumes or items, role)).strip("/")
        item = file.get(dataset)
        if item is None and dataset in volumes:
            link = file.get(dataset, getlink=True)
            target = ":".join(filter(None, [getattr(link, "filename", ""), link.path]))
            raise VolumeError(
                f"{path}:{dataset}: expected a dataset, got a link to {target}, where there is "
                "none; put that back, or correct the link"
            )
        if not (order := _order(item)):
            got = "none" if item is None else f"shape {getattr(item, 'shape', 'of a group')}"
            if "axistags" in getattr(item, "attrs", ()):
                got += f" with axistags {_axes(item) or _texts(item.attrs['axistags'])[0][:80]}"
            raise VolumeError(
                f"{path}:{dataset}: expected a dataset of 3 dimensions, or 4 with channels first, "
                f"got {got}; the file holds {', '.join(volumes) or 'no volume'}; store one, or "
                "name its axes by axistags"
            )
        if gap := _gap(item):
            raise VolumeError(
                f"{path}:{dataset}: expected all voxels, got a dataset of which {gap}; put "
                "it back, or write the dataset again"
            )
        notes, attributes = [], {**file.attrs, **item.attrs}
        spacing, unit = _spacing_and_unit(path, attributes, item, order, notes)
        array, affine = take_axes(item[()], order), file.attrs.get("affine")
        return Volume(array, spacing, unit, affine, path, notes=tuple(notes))


def _items(group, prefix="", above=()):
    """(name, dataset) of all below a group, through links too; None where a link leads nowhere."""
    for key in group:
        try:
            item = group.get(key)
        except (OSError, RuntimeError):  # a link to itself, or to a file that cannot be opened
            item = None
        if not isinstance(item, h5py.Group):
            yield prefix + key, item
        elif item not in above:  # links can go in a circle
            yield from _items(item, f"{prefix}{key}/", (*above, item))


def advice(path):
    """A clause on the volumes to choose from in a file; "" if it is no HDF5, or damaged."""
    with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r") as file:
        names = ", ".join(name for name, item in _items(file) if _order(item))
        return f"; the file holds {names}: give {path}:NAME"
    return ""


def _choose(path, volumes, role):
    """The dataset of an image or label if none is named: by its usual name, or as the only one."""
    usual = [name for name in USUAL_NAMES[role] if name in volumes]
    rest = [name for name in volumes if name not in NAMES_OF_OTHERS[role]]
    if usual or len({volumes[name] for name in rest}) == 1:  # a link gives it a second name
        return (usual or rest)[0]
    raise VolumeError(
        f"{path}: expected the name of a dataset as {Path(path).name}:NAME, got none; "
        f"the file holds {', '.join(volumes) or 'no volume'}"
    )


def _axes(item):
    """A letter for each axis of a dataset, as ilastik's axistags say, or as is usual."""
    if "axistags" in item.attrs:
        return "".join(tag["key"] for tag in _tags(item)).upper()
    last = AXES_OF_ONE_CHANNEL_LAST.get(item.ndim) if item.shape[-1:] == (1,) else None
    return last or USUAL_AXES.get(item.ndim, "")


def _order(item):
    """The order of axes that makes a volume of a dataset (see `order_axes`), or None."""
    return order_axes(_axes(item), item.shape) if getattr(item, "ndim", 0) > 2 else None


def _tags(item):
    """The axistags of a dataset, a list of dicts with `key`; empty if they do not fit it."""
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        tags = json.loads(_texts(item.attrs["axistags"])[0])["axes"]
        if len(tags) == len({tag["key"].upper() for tag in tags}) == item.ndim:
            return tags
    return []


def _gap(item):
    """What is not there of a dataset, and would be read as fill values; "" if all is there."""
    folder, gaps = Path(item.file.filename).parent, []
    if item.is_virtual:
        sources = item.virtual_sources()
        gaps = [_gap_of_source(item, folder, *source[:3]) for source in sources]
        if sum(source.vspace.get_select_npoints() for source in sources) < item.size:
            gaps.append("a part comes from no source")
    elif item.external:
        prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(folder))
        needed = item.nbytes
        for name, offset, size in item.external:
            file, size = Path(prefix, name), min(size, needed)
            needed -= size
            if not file.is_file() or file.stat().st_size < offset + size:
                gaps.append(f"{size} bytes in {file} are missing")
    elif item.size and not item.id.get_storage_size():
        gaps = ["no voxel was ever written"]
    elif item.chunks and (missing := _chunks(item) - item.id.get_num_chunks()):
        gaps = [f"{missing} of {_chunks(item)} chunks were never written, not even with zeros"]
    return next(filter(None, gaps), "")


def _chunks(item):
    """How many chunks a dataset has, written or not."""
    return math.prod(-(-n // c) for n, c in zip(item.shape, item.chunks, strict=True))


def _gap_of_source(item, folder, part, name, dataset):
    """The same of one source of a virtual dataset."""
    places = [item.file.filename] if name == "." else [folder / name, name]
    place = next(filter(os.path.isfile, places), places[0])
    try:
        with h5py.File(place, "r") as file:
            short = file[dataset].size < part.get_select_npoints()
            return f"{place}:{dataset} is too small" if short else _gap(file[dataset])
    except (OSError, KeyError):
        return f"{place}:{dataset} is missing, or cannot be read"


def _spacing_and_unit(path, attributes, item, order, notes):
    """(spacing, unit) from the attributes in use: ours, ilastik's, CREMI's, `spacing_<unit>`.

    VolumeError where two of them differ; one that holds something else is noted.
    """
    units = _texts(attributes.get("unit", attributes.get("units", "")))
    known = {"spacing": units, "element_size_um": ["um"], "resolution": units,
             "spacing_mm": ["mm"], "spacing_um": ["um"], "spacing_nm": ["nm"]}  # fmt: skip
    found = {}
    for name, names in known.items():
        if name not in attributes:
            continue
        value = np.asarray(attributes[name])
        sizes = _of_zyx(value.reshape(-1).tolist(), order, item.ndim)
        if value.dtype.kind not in "uif":  # words, of another meaning
            continue
        if not sizes:
            notes.append(f"the attribute {name}, {value.tolist()}, is no size of z, y and x")
            continue
        names = _of_zyx(names, order, item.ndim) or names[:1] * 3
        found[name] = in_one_unit(path, sizes, names)
    for (name, (sizes, unit)), (other, (others, its_unit)) in itertools.pairwise(found.items()):
        scale = unit_scale(unit, its_unit)
        if not np.allclose(np.multiply(sizes, scale), others, rtol=HEADER_TOLERANCE, atol=0.0):
            raise VolumeError(
                f"{path}: expected one voxel size, got {with_unit(sizes, unit)} ({name}) and "
                f"{with_unit(others, its_unit)} ({other}); correct or remove one"
            )
    if found:
        return next(iter(found.values()))
    if "axistags" in item.attrs:
        tags, units = _tags(item), json.loads(_texts(attributes.get("axis_units", "{}"))[0])
        tags = [tags[axis] for axis in order[-3:]]
        if all(tag.get("resolution", 0) > 0 for tag in tags):
            sizes = [tag["resolution"] for tag in tags]
            return in_one_unit(path, sizes, [units.get(tag["key"], "") for tag in tags])
    return None, ""


def _of_zyx(values, order, dimensions):
    """Those of z, y, x among values of all axes, or of these three; [] for another number."""
    if len(values) == dimensions:
        return [values[axis] for axis in order[-3:]]
    return [values[sorted(order[-3:]).index(a)] for a in order[-3:]] if len(values) == 3 else []


def _texts(value):
    """An attribute as a list of str: text, bytes, or an array of either."""
    values = np.ravel(value).tolist()
    return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]


def count_voxels(path, dataset):
    """Voxels of the volume, or, if no dataset is named, of the largest in the file."""
    with h5py.File(path, "r") as file:
        items = [file[dataset]] if dataset else dict(_items(file)).values()
        return max(int(item.size) for item in items if isinstance(item, h5py.Dataset))


def write(path, array, spacing, unit, affine, _header):
    """Write (D, H, W) or (C, D, H, W) as the dataset `segmentation`."""
    with h5py.File(path, "w") as file:
        file.create_dataset("segmentation", data=array, compression="gzip", compression_opts=1)
        file.attrs["unit"] = unit
        if spacing is not None:
            file.attrs["spacing"] = np.asarray(spacing, np.float64)
        if affine is not None:
            file.attrs["affine"] = np.asarray(affine, np.float64)
