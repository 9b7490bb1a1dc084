"""Patches drawn from case files: what a worker reads and ships.

A worker draws the parameters of a patch, reads the box of source voxels that it covers, in the
file's own dtype, and ships both. The device does the rest (augment.py).
"""

import itertools

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader

MAX_OPEN_FILES = 64  # per worker; a system allows a process some 1000


class PatchDataset:
    """Patches as boxes of source voxels, each a function of (seed, epoch, index) alone.

    cases: list of `Case`, all labelled; patch: voxels z, y, x; spacing: target spacing per axis,
    0 or None keeps the case's own; draw_spatial, draw_intensity, place_patch: see augment.py
    (picklable: they travel to the workers); foreground: class ids; clip: percentiles to clip
    intensities to, or None; skeletons: whether to ship the box of the stored skeleton too,
    which every case file must hold then (cases.check_skeletons).

    dataset[epoch, index] reads only the box that the patch covers and returns plain values and
    tensors: image, label and, if wanted, skeleton (the box, as stored), matrix, origin, start,
    shape (where the patch lies), intensity (what to do to it), mean, std, low, high (how to
    normalise), spacing, case.
    """

    def __init__(
        self,
        cases,
        *,
        patch,
        spacing,
        foreground,
        foreground_share,
        jitter,
        clip,
        seed,
        draw_spatial,
        draw_intensity,
        place_patch,
        skeletons=False,
    ):
        self.cases, self.patch, self.seed, self.clip = list(cases), tuple(patch), seed, clip
        self.spacing, self.foreground = spacing, tuple(foreground)
        self.foreground_share, self.jitter = foreground_share, jitter
        self.draw_spatial, self.draw_intensity = draw_spatial, draw_intensity
        self.place_patch, self.skeletons = place_patch, skeletons
        self.files = {}  # opened where they are used: no handle is carried over a spawn

    def __getstate__(self):
        return {**self.__dict__, "files": {}}

    def _file(self, case):
        if case.path not in self.files:
            if len(self.files) >= MAX_OPEN_FILES:
                self.files.pop(next(iter(self.files))).close()
            self.files[case.path] = h5py.File(case.path, "r")
        return self.files[case.path]

    def _centre(self, rng, file, case):
        """A voxel to draw around: foreground or labelled background, from the stored lists."""
        present = [c for c in self.foreground if f"foreground/{c}" in file]
        wanted = rng.random() < self.foreground_share
        if wanted and present:
            coordinates = file[f"foreground/{present[rng.integers(len(present))]}"]
        else:
            coordinates = file["background"]
        if len(coordinates) == 0:
            return np.array([rng.integers(n) for n in case.shape], float)
        return coordinates[int(rng.integers(len(coordinates)))].astype(float)

    def __getitem__(self, place):
        epoch, index = place
        # Cases take turns: each comes once before any comes twice, in an order of its own.
        turn, position = divmod(index, len(self.cases))
        order = np.random.default_rng((self.seed, epoch, turn, 0)).permutation(len(self.cases))
        case = self.cases[order[position]]
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        file = self._file(case)

        spacing = network_spacing(case.spacing, self.spacing)
        matrix, upright = self.draw_spatial(rng, case.spacing, spacing)
        voxel = self._centre(rng, file, case)
        off_centre = rng.uniform(-self.jitter, self.jitter, size=3) * np.asarray(self.patch) / 2
        origin, start, stop = self.place_patch(
            matrix, upright, voxel + matrix @ off_centre, self.patch, case.shape
        )
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        names = ("label", "skeleton") if self.skeletons else ("label",)
        return {
            "case": case.id,
            "image": torch.from_numpy(native(file["image"][(slice(None), *box)])),
            **{name: torch.from_numpy(file[name][box]) for name in names},
            "matrix": matrix,
            "origin": origin,
            "start": start,
            "shape": case.shape,
            "spacing": spacing,
            "intensity": self.draw_intensity(rng),
            **normalisation(case.intensity, self.clip),
        }


def native(array):
    """The array in a dtype that torch has: unsigned and byte-swapped integers are widened."""
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
    return array.astype(wider.get(array.dtype.name, array.dtype.newbyteorder("=")), copy=False)


def network_spacing(stored, wanted):
    """The spacing the network sees: wanted where it is given, else the stored one; z, y, x."""
    return tuple(float(w or s) for w, s in zip(wanted, stored, strict=True))


def normalisation(intensity, clip):
    """What augment.normalise needs, from a case's intensity statistics: lists per channel."""
    low, high = (intensity["percentiles"][str(float(p))] for p in clip) if clip else (None, None)
    return {"mean": intensity["mean"], "std": intensity["std"], "low": low, "high": high}


class PatchPlan:
    """Batches of (epoch, index) from batch number `first` up to `last`, over all epochs."""

    def __init__(self, first, last, *, batches_per_epoch, batch_size):
        self.first, self.last = first, last
        self.batches_per_epoch, self.batch_size = batches_per_epoch, batch_size

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        for number in range(self.first, self.last):
            epoch, batch = divmod(number, self.batches_per_epoch)
            yield [(epoch, batch * self.batch_size + i) for i in range(self.batch_size)]


def patch_batches(
    dataset, first, last, *, batches_per_epoch, batch_size, workers, prefetch, persistent, pin
):
    """Yield lists of samples for the batches first..last, read by `workers` processes.

    persistent: the workers live through all epochs and read on during validation; otherwise they
    are started anew for each epoch.
    """
    ends = range((first // batches_per_epoch + 1) * batches_per_epoch, last, batches_per_epoch)
    edges = [first, last] if persistent else [first, *ends, last]
    for a, b in itertools.pairwise(edges):
        yield from DataLoader(
            dataset,
            batch_sampler=PatchPlan(
                a, b, batches_per_epoch=batches_per_epoch, batch_size=batch_size
            ),
            collate_fn=list,  # boxes differ in size: they become a batch once they are patches
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # or the loader draws from the network's generator
            pin_memory=pin,
        )
