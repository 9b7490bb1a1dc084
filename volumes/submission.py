"""The format of the Vesuvius Challenge: a zip of <id>.tif, uint8 0 and 1, a page per z slice.

    with open_submission("submission.zip") as submission:
        submission.add("1407735", mask)

(As the challenge's page on kaggle.com, surface detection 2025, describes it.) At the end of the
block each mask is read back and compared with what was added; then the file appears.
"""

import contextlib
import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tifffile

from volumes import atomic


class SubmissionError(RuntimeError):
    """A submission that is not what was to be written; the message is one sentence."""


@contextlib.contextmanager
def open_submission(path):
    """Yields a `Submission`; SubmissionError if it does not read back. Memory: two masks."""
    with atomic.replacing(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            submission = Submission(archive)
            yield submission
        expected = sorted(f"{case}.tif" for case in submission.checksums)
        with zipfile.ZipFile(partial) as archive:
            names = sorted(archive.namelist())
            if names != expected:
                raise SubmissionError(
                    f"{path}: expected the files {', '.join(expected) or 'none'}, got "
                    f"{', '.join(names) or 'none'}"
                )
            for case, checksum in submission.checksums.items():
                mask = tifffile.imread(io.BytesIO(archive.read(f"{case}.tif")))
                if mask.dtype != np.uint8 or zlib.crc32(np.ascontiguousarray(mask)) != checksum:
                    raise SubmissionError(
                        f"{path}: {case}.tif: expected the mask that was written, got another one"
                    )


class Submission:
    """The masks of a submission that is being written."""

    def __init__(self, archive):
        self.archive, self.checksums = archive, {}  # {id: CRC-32 of its mask}

    def add(self, case, mask):
        """mask (D, H, W): bool, or integers 0 and 1; else ValueError, and for a case's second."""
        mask = np.asarray(mask)
        if mask.ndim != 3 or mask.dtype.kind not in "bui" or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{case}: expected a mask (D, H, W) of 0 and 1")
        if case in self.checksums or "/" in case:
            raise ValueError(f"{case}: expected an id of one case, without slashes")
        mask, file = mask.astype(np.uint8, order="C"), io.BytesIO()
        tifffile.imwrite(file, mask, photometric="minisblack", metadata=None)
        # Without a time of day, so that equal masks are equal files.
        entry = zipfile.ZipInfo(f"{case}.tif")
        entry.external_attr = 0o644 << 16  # else nobody may read what unzip makes of it
        self.archive.writestr(entry, file.getvalue(), zipfile.ZIP_DEFLATED)
        self.checksums[case] = zlib.crc32(mask)


def submission_faults(path, regions=()):
    """What keeps a submission from being written to path, as sentences.

    regions: names of what the network tells apart.
    """
    path = Path(path)
    if len(regions) > 1:
        yield (
            f"--submission {path}: expected a network of one foreground, for such masks are of 0 "
            f"and 1, got one that tells {', '.join(regions)} apart; leave --submission out"
        )
    if path.suffix.lower() != ".zip" or path.is_dir():
        yield f"--submission {path}: expected the name of a .zip file"
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield f"--submission {path}: expected a file to write, but {parent} is no such folder"
