"""HDF5: a dataset that is named, or found by its name, with spacing in its attributes."""

from pathlib import Path

import h5py
import numpy as np

from volumes.volume import Volume, VolumeError, round_spacing, unit_of

WRITES_DIMENSIONS = (3, 4)
USUAL_NAMES = {"image": ("image",), "label": ("label", "segmentation")}  # by role
NAMES_OF_OTHERS = {"image": ("label",), "label": ("image",)}


def read(path, dataset, role):
    """The `Volume` in a dataset, (D, H, W) or (C, D, H, W); role: see `_choose`."""
    with h5py.File(path, "r") as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if _is_volume(item) else None)
        dataset = dataset or _choose(path, names, role)
        item = file.get(dataset)
        if not _is_volume(item):
            got = "none" if item is None else f"shape {getattr(item, 'shape', 'of a group')}"
            raise VolumeError(
                f"{path}:{dataset}: expected a dataset of 3 dimensions, or 4 with channels first, "
                f"got {got}; the file holds {', '.join(names) or 'no volume'}"
            )
        spacing, unit = _spacing_and_unit({**file.attrs, **item.attrs})
        return Volume(item[()], spacing, unit, file.attrs.get("affine"), path)


def _is_volume(item):
    return getattr(item, "ndim", 0) in (3, 4)


def _choose(path, names, role):
    """The dataset of an image or label if none is named: by its usual name, or as the only one."""
    usual = [name for name in USUAL_NAMES[role] if name in names]
    rest = [name for name in names if name not in NAMES_OF_OTHERS[role]]
    if usual or len(rest) == 1:
        return (usual or rest)[0]
    raise VolumeError(
        f"{path}: expected the name of a dataset as {Path(path).name}:NAME, got none; "
        f"the file holds {', '.join(names) or 'no volume'}"
    )


def _spacing_and_unit(attributes):
    """(spacing, unit) from the attributes in use: ours, ilastik's, CREMI's, `spacing_<unit>`."""
    unit = unit_of(attributes.get("unit", attributes.get("units", "")))
    known = {"spacing": unit, "element_size_um": "micron", "resolution": unit,
             "spacing_mm": "mm", "spacing_um": "micron", "spacing_nm": "nm"}  # fmt: skip
    for name, its_unit in known.items():
        value = np.asarray(attributes.get(name, ()))
        if value.shape == (3,) and value.dtype.kind in "uif":
            return round_spacing(value), its_unit
    return None, ""


def count_voxels(path, dataset):
    """Voxels of the volume, or, if no dataset is named, of the largest in the file."""
    with h5py.File(path, "r") as file:
        items = [file[dataset]] if dataset else file.values()
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
