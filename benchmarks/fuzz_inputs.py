"""The inputs of fuzz.py: formats, and what can be wrong or odd about them.

    item = make(folder, "nii.gz", "flip", is_label=False, chance=random.Random(0))

A fault changes the voxels before they are written, the header, or the file. It says what a script
may do with the file then: read it, refuse it, or either.
"""

import gzip
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import tifffile

SHAPE, SPACING = (6, 20, 24), (2.0, 0.5, 0.25)  # z, y, x
NIFTI = ("nii", "nii.gz")
TIFF = ("imagej", "ome", "plain", "pages", "miniswhite", "tiled", "deflate", "bigtiff", "rgb")
HDF5 = ("h5", "h5 units", "h5 axes", "h5 virtual", "h5 external", "h5 link", "h5 gzip")
ITK = ("nrrd", "nhdr", "mha", "mhd")  # which SimpleITK writes
SUFFIXES = (
    {kind: f".{kind}" for kind in ITK} | dict.fromkeys(TIFF, ".tif") | dict.fromkeys(HDF5, ".h5")
)
SUFFIXES |= {"ome": ".ome.tif", "nii": ".nii", "nii.gz": ".nii.gz"}
NIFTI_UNITS = {0: "", 1: "m", 2: "mm", 3: "micron"}
READ, REFUSE, EITHER = "read", "refuse", "either"  # what a script may do with an input
NOTED = "noted"  # refuse it, or read it with a note


@dataclass
class Input:
    """A file as it lies in its folder, and what a script must make of it."""

    path: Path
    format: str
    voxels: np.ndarray  # (D, H, W), or with more axes of one, as a viewer shows them
    spacing: tuple | None = None  # None: the file states none
    unit: str = ""
    affine: np.ndarray | None = None  # voxel x, y, z to world, as NIfTI has it
    accept: str = READ
    flipped: bool = False  # the independent reader says what is right
    dataset: str = "image"  # of HDF5


# ---------------------------------------------------------------------------- formats


def write_nifti(path, voxels, item):
    item.spacing, item.unit, item.affine = SPACING, "mm", np.diag([*SPACING[::-1], 1.0])
    item.affine[:3, 3] = 3, -4, 5
    image = nibabel.Nifti1Image(voxels.T, item.affine, dtype=voxels.dtype)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_itk(path, voxels, item):
    """An oblique and mirrored volume; packed if its first voxel is odd."""
    import SimpleITK

    cos, sin, more = np.cos(0.4), np.sin(0.4), voxels.ndim - 3
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, -1]])
    direction = np.eye(voxels.ndim)
    direction[:3, :3] = turn
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels), isVector=False)
    image.SetSpacing([*SPACING[::-1], *[1.0] * more])
    image.SetOrigin([3.0, -4.0, 5.0, *[0.0] * more])
    image.SetDirection(direction.ravel().tolist())
    SimpleITK.WriteImage(image, str(path), bool(voxels.flat[0] % 2))
    item.spacing, item.affine = SPACING, np.eye(4)
    item.affine[:3] = np.diag([-1, -1, 1]) @ np.c_[turn * SPACING[::-1], [3, -4, 5]]
    # NRRD then has a space of 4 dimensions; MetaImage tells no complex voxel from two channels.
    if (more and item.format in ("nrrd", "nhdr")) or np.iscomplexobj(voxels):
        item.accept = EITHER if item.accept == READ or item.format in ("mha", "mhd") else REFUSE


def write_tiff(path, voxels, item):
    kind, (z, y, x), axes = item.format, SPACING, "QTCZYX"[-voxels.ndim :]
    options = {"photometric": "minisblack"}
    if kind == "imagej":
        options |= {"imagej": True, "resolution": (1 / x, 1 / y)}
        options["metadata"] = {"spacing": z, "unit": "um", "axes": axes}
    elif kind == "ome":
        sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", SPACING, strict=True)}
        units = {f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}
        options |= {"ome": True, "metadata": sizes | units | {"axes": axes}}
    elif kind == "miniswhite":
        options["photometric"] = kind
        item.voxels = np.iinfo(voxels.dtype).max - voxels
    elif kind == "rgb":
        voxels, options, item.accept = np.stack([voxels] * 3, -1), {"photometric": "rgb"}, REFUSE
    more = {"tiled": {"tile": (16, 16)}, "deflate": {"compression": "zlib"}}
    options |= (more | {"bigtiff": {"bigtiff": True}}).get(kind, {})
    if kind == "pages":  # whatever they were: pages are z
        item.voxels = voxels = voxels.reshape(-1, *voxels.shape[-2:])
        item.accept = EITHER if len(voxels) > SHAPE[0] else item.accept
    for page in voxels if kind == "pages" else [voxels]:
        tifffile.imwrite(path, page, append=kind == "pages", **options)
    if kind in ("imagej", "ome"):
        item.spacing, item.unit = SPACING, "micron"


def write_hdf5(path, voxels, item):
    kind, name, beside = item.format, item.dataset, path.with_suffix(".source")
    if kind in ("h5 virtual", "h5 link"):
        with h5py.File(beside, "w") as source:
            source["voxels"] = voxels
    with h5py.File(path, "w") as file:
        if kind == "h5 virtual":
            layout = h5py.VirtualLayout(voxels.shape, voxels.dtype)
            layout[...] = h5py.VirtualSource(beside, "voxels", voxels.shape)
            file.create_virtual_dataset(name, layout)
        elif kind == "h5 link":
            file[name], item.accept = h5py.ExternalLink(beside.name, "voxels"), EITHER
        elif kind == "h5 external":
            file.create_dataset(name, data=voxels, external=str(beside))
        elif kind == "h5 gzip":
            file.create_dataset(name, data=voxels, compression="gzip", chunks=True)
        elif kind == "h5 axes":  # as ilastik writes them
            file[name] = voxels[..., None]
            axes = [{"key": key, "typeFlags": 1 if key == "c" else 2} for key in "zyxc"]
            file[name].attrs["axistags"] = json.dumps({"axes": axes})
        else:
            file[name] = voxels
        if kind == "h5 units":
            file[name].attrs.update({"spacing": SPACING, "unit": np.bytes_("micron")})
            item.spacing, item.unit = SPACING, "micron"


WRITERS = (
    dict.fromkeys(ITK, write_itk)
    | dict.fromkeys(NIFTI, write_nifti)
    | dict.fromkeys(TIFF, write_tiff)
)
WRITERS |= dict.fromkeys(HDF5, write_hdf5)

# ---------------------------------------------------------------------------- faults of voxels
# Each: function(voxels, chance) -> (voxels, what a script may do with them).


def other_dtype(voxels, chance):
    """Values that fit every dtype."""
    name = chance.choice("i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 c8 ? >i2 >u2 >f4".split())
    accept = REFUSE if name == "c8" else READ if name in "u1 i2 u2 f4 >i2 >u2 >f4" else EITHER
    return (voxels > voxels.mean() if name == "?" else voxels % 128).astype(name), accept


def with_value(*values, accept):
    def change(voxels, chance):
        voxels = voxels.astype(np.float32)
        voxels[chance.randrange(len(voxels)), 3, 5] = chance.choice(values)
        return voxels, accept

    return change


def of_scale(voxels, chance):
    binary = voxels.max() <= 1  # a label, which must be of whole numbers
    scaled = voxels.astype(np.float32) * np.float32(chance.choice((1e-14, 1e-6, 1e9, 1e20)))
    return scaled, REFUSE if binary else READ


def one_plane(voxels, chance):
    axis = chance.randrange(3)
    return voxels[tuple(slice(1) if a == axis else slice(None) for a in range(3))], EITHER


VOXELS = {
    "dtype": other_dtype,
    "nan": with_value(np.nan, np.inf, -np.inf, accept=REFUSE),
    "fill value": with_value(-3e38, 3e38, -1e4, 1e30, accept=EITHER),
    "scale": of_scale,
    "axes of one": lambda v, chance: (v[None], READ),
    "two axes of one": lambda v, chance: (v[None, None], EITHER),
    "one plane": one_plane,
    "two dimensions": lambda v, chance: (v[chance.randrange(len(v))], EITHER),
    "many dimensions": lambda v, chance: (np.tile(v, (2, 2, 1, 1, 1)), REFUSE),
    "no voxels": lambda v, chance: (v[:0] if chance.random() < 0.5 else v[:, :0], REFUSE),
}  # fmt: skip

# ---------------------------------------------------------------------------- faults of a header
# Each: function(item, chance), for NIfTI.


def patch(item, place, values, form, accept=REFUSE):
    """Write values at a place of a NIfTI header."""
    opened, item.accept = gzip.open if item.format == "nii.gz" else open, accept
    with opened(item.path, "rb") as file:
        content = bytearray(file.read())
    struct.pack_into(f"<{len(values)}{form}", content, place, *values)
    with opened(item.path, "wb") as file:
        file.write(content)


def set_unit(item, chance):
    code = chance.choice((*range(60), *range(60, 256, 13)))
    item.unit = NIFTI_UNITS.get(code & 7, "")
    patch(item, 123, [code], "B", READ if code & 7 in NIFTI_UNITS and code < 56 else EITHER)


def turn(item, chance):
    """An affine that is oblique, mirrored, sheared or permuted, with its pixdim."""
    cos, sin = np.cos(chance.uniform(0, 3)), np.sin(chance.uniform(0, 3))
    angle = np.hypot(cos, sin)
    oblique = [[cos / angle, -sin / angle, 0], [sin / angle, cos / angle, 0], [0, 0, 1]]
    sheared = [[1, chance.uniform(0.05, 0.5), 0], [0, 1, 0], [0, 0, 1]]
    matrix = chance.choice((oblique, sheared, np.diag([1, -1, 1]), np.eye(3)[[2, 0, 1]]))
    item.affine[:3, :3] = matrix @ np.diag(SPACING[::-1])
    item.spacing = tuple(np.linalg.norm(item.affine[:3, :3], axis=0)[::-1])
    patch(item, 280, item.affine[:3].ravel(), "f")
    patch(item, 252, [0], "h")  # no qform, which would say something else
    patch(item, 80, item.spacing[::-1], "f", READ)


def spoil_affine(item, chance):
    item.affine[chance.randrange(3), :3] = chance.choice((0.0, float("nan")))
    patch(item, 280, item.affine[:3].ravel(), "f")


PIXDIM, SPACINGS = (80, 84, 88), (0.0, -1.0, float("nan"), float("inf"))
DIMENSIONS = ((0,), (8,), (3, 0), (3, -5), (3, 24, 20, 7), (3, 24, 20, 32767))
HEADERS = {
    "spacing": lambda i, chance: patch(i, chance.choice(PIXDIM), [chance.choice(SPACINGS)], "f"),
    "pixdim alone": lambda i, chance: patch(i, 80, [s * 1.5 for s in SPACING[::-1]], "f", NOTED),
    "dimensions": lambda i, chance: patch(i, 40, chance.choice(DIMENSIONS), "h"),
    "unit code": set_unit,
    "affine": turn,
    "bad affine": spoil_affine,
}  # fmt: skip

# ---------------------------------------------------------------------------- faults of a file
# Each: function(item, chance).

NAMES = (
    "größe",
    "a b",
    "[x]",
    "{id}",
    "\udcf6\udcdf",
    "a'b\"",
    "-x",
    "スキャン",
    "a\nb",
    "x.y",
    "%d",
)


def cut(item, chance):
    os.truncate(item.path, chance.randrange(item.path.stat().st_size))
    item.accept = EITHER if item.accept == READ else item.accept


def flip(item, chance):
    """1 to 6 bits, also of voxels that are stored as they are."""
    content = bytearray(item.path.read_bytes())
    starts = [content.find(plane.tobytes()) for plane in item.voxels]
    most = chance.choice((min(400, len(content)), len(content)))  # where a header is, or anywhere
    for _ in range(chance.randint(1, 6)):
        content[chance.randrange(most)] ^= 1 << chance.randrange(8)
    item.path.write_bytes(content)
    item.accept, item.flipped, item.voxels = EITHER, True, item.voxels.copy()
    for plane, start in zip(item.voxels, starts, strict=True):
        if start >= 0:
            plane.flat = np.frombuffer(content, plane.dtype, plane.size, start)


def rename(item, name, odd=False):
    item.path = item.path.rename(item.path.with_name(name))
    item.accept = EITHER if odd and item.accept == READ else item.accept


def give_other_suffix(item, chance):
    others = [s for s in SUFFIXES.values() if not item.path.name.endswith(s)]
    rename(item, "scan" + chance.choice(others), odd=True)


def give_odd_name(item, chance):
    name = chance.choice(NAMES)
    rename(item, name + SUFFIXES[item.format], name in ("{id}", "\udcf6\udcdf", "a\nb"))


def add_one_of_its_id(item, chance):
    rename(item, item.path.name.replace(".ome", ""))
    names = {"scan.nii", "scan.nii.gz", "scan.tif", "scan.h5", "scan_img.tif"} - {item.path.name}
    item.path.with_name(chance.choice(sorted(names))).write_bytes(item.path.read_bytes())
    item.accept = REFUSE


def put_dangling_link(item, chance):
    """Alone or beside a whole file."""
    if chance.random() < 0.5:
        item.path.unlink()
    item.path, item.accept = item.path.with_name("gone" + SUFFIXES[item.format]), REFUSE
    item.path.symlink_to("nowhere")


def empty(item, chance):
    item.path.write_bytes(b"")
    item.accept = REFUSE


def forbid(item, chance):
    item.path.chmod(0)
    item.accept = REFUSE


def put_folder(item, chance):
    item.path.unlink()
    item.path.mkdir()
    item.accept = REFUSE


def lose_source(item, chance):
    others = [item.path.with_suffix(end) for end in (".source", ".raw", ".zraw", ".raw.gz")]
    next(path for path in others if path.exists()).unlink()
    item.accept = REFUSE


FILES = {
    "none": lambda item, chance: None,
    "cut": cut,
    "flip": flip,
    "no bytes": empty,
    "other suffix": give_other_suffix,
    "odd name": give_odd_name,
    "two of one id": add_one_of_its_id,
    "dangling link": put_dangling_link,
    "folder": put_folder,
    "source gone": lose_source,
}
if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read all
    FILES["no permission"] = forbid
FAULTS = VOXELS | HEADERS | FILES


def combinations():
    """All (format, fault) that there are; cut and flip, which differ each time, four times."""
    for kind in SUFFIXES:
        faults = [*FILES, *(HEADERS if kind in NIFTI else ())]
        faults += VOXELS if kind not in ("miniswhite", "rgb", "h5 axes") else ()
        if kind not in ("h5 virtual", "h5 external", "h5 link", "nhdr", "mhd"):
            faults.remove("source gone")
        for fault in faults:
            yield from [(kind, fault)] * (4 if fault in ("cut", "flip") else 1)


def wavy():
    """The label: a thin sheet."""
    z, y, x = np.indices(SHAPE)
    return (np.abs(y - 10 - 3 * np.sin(x / 4 + z / 3)) < 2).astype(np.uint8)


def make(folder, kind, fault, is_label, chance):
    """The `Input` of a format with a fault. None where the format cannot hold it."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(chance.randrange(2**31)).integers(0, 60, SHAPE)
    voxels = wavy() if is_label else noise + 60 * wavy()
    voxels, accept = voxels.astype(chance.choice((np.uint8, np.uint16))), READ
    if is_label and kind == "miniswhite":
        voxels = (255 * (1 - voxels)).astype(np.uint8)  # 255 means 1
    if fault in VOXELS:
        voxels, accept = VOXELS[fault](voxels, chance)
    item = Input(folder / f"scan{SUFFIXES[kind]}", kind, voxels, accept=accept)
    item.dataset = "label" if is_label else "image"
    try:
        WRITERS[kind](item.path, voxels, item)
    except Exception:  # of a library that refuses to write such voxels
        return None
    if not item.path.exists():  # pages of a stack without any
        return None
    if fault not in VOXELS:
        FAULTS[fault](item, chance)
    return item
