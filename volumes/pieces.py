"""Cases that are pieces of a volume: what --crop and --bbox ask for, and where pieces overlap."""

import itertools
import math
import os
import re
from dataclasses import replace

from volumes import ome_zarr
from volumes.files import few


def parse(option, texts, axes, faults):
    """{name: (first, stop) of each axis} of texts NAME=0:64,... such as --crop has; None: open.

    axes: such as "zyx". What is malformed is added to faults, each a sentence.
    """
    ends = ",".join(f"{axis}0:{axis}1" for axis in axes.upper())
    example = "train=0:80" + ",0:256" * (len(axes) - 1)
    pattern, pieces = r"([\w-]+)=" + ",".join([r"(\d*):(\d*)"] * len(axes)), {}
    for text in texts:
        match = re.fullmatch(pattern, text)
        if not match:
            faults.append(f"{option} {text}: expected NAME={ends}, such as {example}")
        elif match[1] in pieces:
            faults.append(f"{option}: expected distinct names, got {' '.join(texts)}")
        else:
            numbers = [int(end) if end else None for end in match.groups()[1:]]
            pieces[match[1]] = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    return pieces


def boxed(cases, boxes):
    """A case for every box of every case, in the group of that; all cases where boxes is empty."""
    if not boxes:
        return cases
    return [
        replace(case, id=f"{case.id}_{name}", box=tuple(slice(*ends) for ends in box))
        for case in cases
        for name, box in boxes.items()
    ]


def faults_of_crops(crops):
    """Crops that overlap, of cases whose pieces are groups of their own."""
    for (name, ((a, b),)), (other, ((c, d),)) in itertools.combinations(crops.items(), 2):
        first, stop = max(a or 0, c or 0), min(math.inf if n is None else n for n in (b, d))
        if first < stop:
            yield (
                f"--crop {name} {other}: expected ranges that do not overlap, got slice {first} in "
                "both; a network could train on what tests it"
            )


def merge_overlaps(rows, kept, faults, notes):
    """What several cases hold of one raw image: a fault where they may be split, else a note."""
    pieces = [(r["source"], r["planes"], r["case"], r["group"]) for r in rows]
    there = ", there before"
    pieces += [(c.source, c.planes, c.id + there, c.group) for c in kept if c.planes]
    apart, together, by_source = [], [], {}
    for source, *piece in pieces:
        source = source if ome_zarr.is_url(source) else os.path.realpath(source)
        by_source.setdefault(source, []).append(piece)
    for source, some in by_source.items():
        for (a, name, group), (b, other, other_group) in itertools.combinations(some, 2):
            if shared := _shared(a, b):
                named = f"{name} and {other} ({shared} of {source})"
                (together if group == other_group else apart).append(named)
    if apart:
        faults.append(
            f"dataset: expected no slice of an image in two cases, got {few(apart)}; a network "
            "could train on what tests it: give ranges of --crop or --bbox that do not overlap, "
            "one --group-from for both, or another --out; to begin anew, remove this one"
        )
    if together:
        notes.append(f"the same slices are in two cases of one group: {few(together)}")
    by_voxels = {}  # of another raw file, perhaps a copy under another name
    for row in rows:
        by_voxels.setdefault(repr(row["voxels"]), []).append(row["case"])
    for case in kept:
        by_voxels.setdefault(repr((case.shape, case.intensity)), []).append(case.id)
    if copies := [" and ".join(names) for names in by_voxels.values() if len(names) > 1]:
        notes.append(f"images of the same shape and statistics, perhaps copies: {few(copies)}")


def _shared(planes, others):
    """What two pieces share, "z 3:8" or "z 3:8, y 0:64, x 0:64"; "" for nothing.

    planes: first and stop of z, or of z, y and x, as of `Case`: an axis that is not there is whole.
    """
    shared = []
    for axis, start in zip("zyx", range(0, min(len(planes), len(others)), 2), strict=False):
        (a, b), (c, d) = planes[start : start + 2], others[start : start + 2]
        if max(a, c) >= min(b, d):
            return ""
        shared.append(f"{axis} {max(a, c)}:{min(b, d)}")
    return ", ".join(shared)
