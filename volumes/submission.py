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
        self.path, self.checksums = Path(path), {}  # {id: CRC-32 of its mask}
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
        if case in self.checksums or "/" in case:
            raise ValueError(f"{case}: expected an id of one case, without slashes")
        mask, file = mask.astype(np.uint8, order="C"), io.BytesIO()
        tifffile.imwrite(file, mask, photometric="minisblack", metadata=None)
        self.zip.writestr(f"{case}.tif", file.getvalue())
        self.checksums[case] = zlib.crc32(mask)

    def finish(self):
        """Check what was written, and let the file appear. SubmissionError if it is not that."""
        self.zip.close()
        expected = sorted(f"{case}.tif" for case in self.checksums)
        with zipfile.ZipFile(self.partial) as archive:
            names = sorted(archive.namelist())
            if names != expected:
                raise SubmissionError(
                    f"{self.path}: expected the files {', '.join(expected) or 'none'}, got "
                    f"{', '.join(names) or 'none'}"
                )
            for case, checksum in self.checksums.items():
                mask = tifffile.imread(io.BytesIO(archive.read(f"{case}.tif")))
                if mask.dtype != np.uint8 or zlib.crc32(np.ascontiguousarray(mask)) != checksum:
                    raise SubmissionError(
                        f"{self.path}: {case}.tif: expected the mask that was written, got another"
                    )
        os.replace(self.partial, self.path)

    def __exit__(self, *_):
        self.zip.close()
        self.partial.unlink(missing_ok=True)


def submission_faults(path, cases):
    """What keeps a submission of these ids from being written to path, as sentences."""
    path = Path(path)
    if path.suffix.lower() != ".zip" or path.is_dir():
        yield f"--submission {path}: expected the name of a .zip file"
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield f"--submission {path}: expected a file to write, but {parent} is no such folder"
    for case in sorted({case for case in cases if cases.count(case) > 1}):
        yield f"--submission {path}: expected one volume of each id, got several of {case}"
