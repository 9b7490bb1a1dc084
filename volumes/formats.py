"""The formats of volumes: one table of suffixes, each with what reads it and what writes it.

A format is a module with three functions, and one line of FORMATS for each of its suffixes:

    read(path, dataset, role) -> Volume      (D, H, W), or (C, D, H, W) with its channels
    count_voxels(path, dataset) -> int       from the header alone
    write(path, array, spacing, unit, affine, header)   in one of WRITES_DIMENSIONS dimensions

dataset and role ("image" or "label") say which volume is meant, in files that hold several. One
that need not read a whole volume for a box of it also has

    read_box(path, dataset, role, box) -> Volume        box: slices of z, y, x
"""

from dataclasses import dataclass
from types import ModuleType

from volumes import hdf5, metaimage, nifti, nrrd, ome_zarr, tiff
from volumes.volume import take_box


@dataclass(frozen=True)
class Format:
    """What reads a suffix, and the suffix that results on its images are written with: another
    where files of it are only read, "" where there is none."""

    module: ModuleType
    written_as: str

    def read(self, path, dataset, role, box):
        """The `Volume` in a file, or that of a box (slices of z, y, x) of it, None for all."""
        if box is not None and hasattr(self.module, "read_box"):
            return self.module.read_box(path, dataset, role, box)
        volume = self.module.read(path, dataset, role)
        return volume if box is None else take_box(volume, box, role)


# A header and its voxels in two files could not appear whole or not at all: they are only read.
FORMATS = {
    ".nii.gz": Format(nifti, ".nii.gz"),
    ".nii": Format(nifti, ".nii"),
    ".nrrd": Format(nrrd, ".nrrd"),
    ".nhdr": Format(nrrd, ".nrrd"),
    ".mha": Format(metaimage, ".mha"),
    ".mhd": Format(metaimage, ".mha"),
    ".tif": Format(tiff, ".tif"),
    ".tiff": Format(tiff, ".tiff"),
    ".h5": Format(hdf5, ".h5"),
    ".hdf5": Format(hdf5, ".hdf5"),
    ".zarr": Format(ome_zarr, ""),
}
# The voxels of a header of its own, `a.raw.gz` of `a.nhdr`: they are no volume by themselves.
DETACHED, HEADERS = (".raw", ".zraw", ".raw.gz", ".raw.bz2", ".gz", ".bz2"), (".mhd", ".nhdr")
# What to do about an error of a library, by its words. For all others a file may be truncated.
ADVICE = {
    "No module named": "install what reads it: pip install -r requirements.txt",
    "lock file": "another program has it open for writing; close it there, or, for a network disk "
    "that knows no locks, set HDF5_USE_FILE_LOCKING=FALSE",
    "already open for write": "its writer has it open, or died before it closed it; close it, or "
    "run h5clear -s on it",
    "COMPRESSION|lib/plugin|filter|codec": "its compression is not known here; store it with "
    "another, such as gzip in HDF5 or LZW in TIFF",
    "not a TIFF file|signature not found|not a gzip|Cannot work out|StopIteration|NRRD magic": (
        "it is empty, or of another format; check what it is"
    ),
    "Permission denied": "give yourself the right to read it",
    r"\[Errno": "see to that first, for the file may be whole",
}


def fault_of_writing(path, suffix):
    """Why no file of this name can be written, a sentence; None where one can."""
    written_as = FORMATS[suffix].written_as if suffix else ""
    if suffix and written_as == suffix:
        return None
    writable = ", ".join(s for s, one in FORMATS.items() if one.written_as == s)
    advice = f"; {suffix} is only read" if suffix else ""
    advice += f", give {written_as} instead" if written_as else ""
    return f"{path}: expected a name that ends in what can be written, {writable}{advice}"
