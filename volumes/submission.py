"""The format of the Vesuvius Challenge: a zip of <id>.tif, uint8 0 and 1, a page per z slice.

    with Submission("submission.zip") as submission:
        submission.add("1407735", mask)
        submission.finish()     # reads it back, and compares each mask with what was added

(As the challenge's page on kaggle.com, surface detection 2025, describes it.) The file appears when
it is finished, whole and checked, or not at all.
"""

import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tifffile


class SubmissionError(RuntimeError):
    """A submission that is not what was to be written; one sentence per fault, a line each."""


class Submission:
    """Writes a submission to path. Memory: two masks of one case."""

    def __init__(self, path):
        self.path, self.added = Path(path), {}
        self.partial = self.path.with_name(f".partial_{os.getpid()}_{self.path.name}")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.zip = zipfile.ZipFile(self.partial, "w", zipfile.ZIP_DEFLATED)
        return self

    def add(self, case, mask):
        """mask (D, H, W): bool, or integers 0 and 1; else ValueError, and for a case's second."""
        mask = np.asarray(mask)
        if mask.ndim != 3 or mask.dtype.kind not in "bui" or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{case}: expected a mask (D, H, W) of 0 and 1")
        if case in self.added or "/" in case:
            raise ValueError(f"{case}: expected an id of one case, without slashes")
        mask, file = mask.astype(np.uint8), io.BytesIO()
        tifffile.imwrite(file, mask, photometric="minisblack", metadata=None)
        self.zip.writestr(f"{case}.tif", file.getvalue())
        self.added[case] = mask.shape, _checksum(mask)

    def finish(self):
        """Check what was written, and let the file appear. SubmissionError if it is not that."""
        self.zip.close()
        if faults := list(check(self.partial, self.added)):
            raise SubmissionError("\n".join(f"{self.path}: {fault}" for fault in faults))
        os.replace(self.partial, self.path)

    def __exit__(self, *_):
        self.zip.close()
        self.partial.unlink(missing_ok=True)


def check(path, wanted):
    """What is wrong with a submission, as sentences; wanted: {id: (shape, CRC-32 of the mask)}."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(f"{case}.tif" for case in wanted):
            yield f"expected the files {_listed(wanted)}, got {_listed(names)}"
            return
        for case, (shape, checksum) in wanted.items():
            with archive.open(f"{case}.tif") as file:
                mask = tifffile.imread(io.BytesIO(file.read()))
            # Of one page alone the reader gives (H, W).
            if mask.size != np.prod(shape) or mask.dtype != np.uint8:
                yield f"{case}.tif: expected uint8 of {shape}, got {mask.dtype} of {mask.shape}"
            elif mask.max() > 1 or _checksum(mask.reshape(shape)) != checksum:
                yield f"{case}.tif: expected the mask that was written, got another one"


def _checksum(mask):
    return zlib.crc32(np.ascontiguousarray(mask).data)


def _listed(names):
    return ", ".join(sorted(names)) or "none"


def faults_of(path, cases):
    """What keeps a submission of these ids from being written to path, as sentences."""
    path = Path(path)
    if path.suffix.lower() != ".zip" or path.is_dir():
        yield f"--submission {path}: expected the name of a .zip file"
    there = next(p for p in path.absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield f"--submission {path}: expected a file to write, but {there} is no such folder"
    for case in sorted({case for case in cases if cases.count(case) > 1}):
        yield f"--submission {path}: expected one volume of each id, got several of {case}"
