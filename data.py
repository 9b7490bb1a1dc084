"""Case files, and the patches that are drawn from them.

One HDF5 file per case holds everything that training needs, in the source's own dtype:

    image               (C, D, H, W)   source dtype
    label               (D, H, W)      uint8 class ids, if the case is labelled
    foreground/<class>  (N, 3) int32   voxel coordinates of that class, at most 20 000
    background          (N, 3) int32   the same of labelled background
    attributes          spacing (z, y, x), unit, affine, ignore_label (-1: none), intensity (JSON),
                        source_image, source_label, group

`dataset.json` beside them lists cases, groups and classes.
"""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader

DATASET_FILE = "dataset.json"
MAX_COORDINATES = 20_000
PERCENTILES = (0.5, 1.0, 5.0, 50.0, 95.0, 99.0, 99.5)
IGNORE_NONE = -1  # HDF5 attributes know no None


# ---------------------------------------------------------------------------- case files


@dataclass(frozen=True)
class Case:
    """What is known of a case without reading its voxels. spacing and shape are z, y, x."""

    id: str
    path: str
    group: str
    shape: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float]
    unit: str
    labelled: bool
    ignore_label: int | None
    intensity: dict


@dataclass(frozen=True)
class Dataset:
    """The content of `dataset.json`: classes maps a name to its id, background (0) included."""

    root: str
    classes: dict[str, int]
    ignore_label: int | None
    unit: str
    cases: dict[str, Case]


def sample_coordinates(label, class_id, rng, most=MAX_COORDINATES):
    """Up to `most` voxel coordinates of one class, without repeats: (N, 3) int32, sorted.

    Dense classes are found by rejection, so that no index array of the volume's size is made.
    """
    flat = label.reshape(-1)
    count = int(np.count_nonzero(flat == class_id))
    if count > 20 * most:
        share = count / flat.size
        found = np.empty(0, np.int64)
        while found.size < most:
            trial = rng.integers(0, flat.size, size=int(1.2 * most / share))
            found = np.unique(np.concatenate([found, trial[flat[trial] == class_id]]))
        chosen = rng.choice(found, most, replace=False)
    else:
        chosen = np.flatnonzero(flat == class_id)
        if chosen.size > most:
            chosen = rng.choice(chosen, most, replace=False)
    return np.stack(np.unravel_index(np.sort(chosen), label.shape), axis=1).astype(np.int32)


def intensity_statistics(image):
    """Mean, std and percentiles of the non-zero finite voxels, per channel, as lists.

    image (C, D, H, W). A channel without such a voxel gets mean 0, std 1 and percentiles 0.
    """
    out = {"mean": [], "std": [], "percentiles": {str(p): [] for p in PERCENTILES}}
    for channel in image:
        values = channel[channel != 0]
        empty = values.size == 0
        out["mean"].append(0.0 if empty else float(values.mean(dtype=np.float64)))
        out["std"].append(1.0 if empty else float(values.std(dtype=np.float64)))
        cuts = np.zeros(len(PERCENTILES)) if empty else np.percentile(values, PERCENTILES)
        for p, cut in zip(PERCENTILES, cuts, strict=True):
            out["percentiles"][str(p)].append(float(cut))
    return out


def write_case(
    path,
    image,
    label=None,
    *,
    spacing,
    unit,
    affine,
    group,
    ignore_label=None,
    source_image="",
    source_label="",
    seed=0,
):
    """Write one case file whole: under a temporary name first, then renamed.

    image (C, D, H, W) any real dtype; label (D, H, W) class ids or None; spacing z, y, x;
    affine (4, 4) voxel x, y, z to world as NIfTI has it, or None.
    """
    path = Path(path)
    rng = np.random.default_rng(seed)
    partial = path.with_name(path.name + ".partial")
    try:
        with h5py.File(partial, "w") as file:
            # Contiguous and uncompressed: a box is then a strided read from the page cache.
            file.create_dataset("image", data=image)
            if label is not None:
                label = np.ascontiguousarray(label, dtype=np.uint8)
                file.create_dataset("label", data=label)
                present = np.flatnonzero(np.bincount(label.reshape(-1), minlength=256))
                for class_id in (c for c in present if c not in (0, ignore_label)):
                    coordinates = sample_coordinates(label, class_id, rng)
                    file.create_dataset(f"foreground/{class_id}", data=coordinates)
                file.create_dataset("background", data=sample_coordinates(label, 0, rng))
            file.attrs["spacing"] = np.asarray(spacing, np.float64)
            file.attrs["unit"] = unit
            if affine is not None:
                file.attrs["affine"] = np.asarray(affine, np.float64)
            file.attrs["ignore_label"] = IGNORE_NONE if ignore_label is None else ignore_label
            file.attrs["intensity"] = json.dumps(intensity_statistics(image))
            file.attrs["source_image"] = str(source_image)
            file.attrs["source_label"] = str(source_label)
            file.attrs["group"] = group
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_case(path):
    """The `Case` of a case file. ValueError if the file is not one."""
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            channels, *shape = file["image"].shape
            ignore = int(file.attrs["ignore_label"])
            return Case(
                id=path.stem,
                path=str(path),
                group=str(file.attrs["group"]),
                shape=tuple(shape),
                channels=channels,
                spacing=tuple(float(s) for s in file.attrs["spacing"]),
                unit=str(file.attrs["unit"]),
                labelled="label" in file,
                ignore_label=None if ignore == IGNORE_NONE else ignore,
                intensity=json.loads(file.attrs["intensity"]),
            )
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a case file written by prepare.py, got one that cannot be read as "
            f"such ({error}); prepare this case again"
        ) from error


def write_dataset(root, *, classes, ignore_label, unit, case_ids):
    """Write `dataset.json` for the case files `<id>.h5` that stand in root."""
    root = Path(root)
    cases = [read_case(root / f"{case_id}.h5") for case_id in sorted(case_ids)]
    content = {
        "format": "lamina-dataset-1",
        "classes": classes,
        "ignore_label": ignore_label,
        "unit": unit,
        "groups": sorted({case.group for case in cases}),
        "cases": [
            {
                "id": case.id,
                "file": f"{case.id}.h5",
                "group": case.group,
                "shape": case.shape,
                "channels": case.channels,
                "spacing": case.spacing,
                "labelled": case.labelled,
            }
            for case in cases
        ],
    }
    partial = root / (DATASET_FILE + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, root / DATASET_FILE)


def read_dataset(root):
    """The `Dataset` in a folder made by prepare.py; FileNotFoundError if there is none."""
    root = Path(root)
    path = root / DATASET_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"data.root: expected a folder made by prepare.py with a {DATASET_FILE}, got {root}; "
            "make one with `python prepare.py --images PATH --labels PATH --out DIR`, or a "
            "synthetic one with `python prepare.py --phantom scroll --out DIR`"
        )
    try:
        content = json.loads(path.read_text())
        ids = [entry["id"] for entry in content["cases"]]
        files = [root / entry["file"] for entry in content["cases"]]
        classes, ignore, unit = content["classes"], content["ignore_label"], content["unit"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what prepare.py writes, got {error!r}") from error
    cases = {i: read_case(file) for i, file in zip(ids, files, strict=True)}
    return Dataset(str(root), classes, ignore, unit, cases)


# ---------------------------------------------------------------------------- patches


class PatchDataset:
    """Patches as boxes of source voxels, each a function of (seed, epoch, index) alone.

    cases: list of `Case`, all labelled; patch: voxels z, y, x; spacing: target spacing per axis,
    0 or None keeps the case's own; draw_spatial, draw_intensity, place_patch: see augment.py
    (picklable: they travel to the workers); foreground: class ids; clip: percentiles to clip
    intensities to, or None.

    dataset[epoch, index] reads only the box that the patch covers and returns plain values and
    tensors: image and label (the box, as stored), matrix, origin, start, shape (where the patch
    lies), intensity (what to do to it), mean, std, low, high (how to normalise), spacing, case.
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
    ):
        self.cases, self.patch, self.seed, self.clip = list(cases), tuple(patch), seed, clip
        self.spacing, self.foreground = spacing, tuple(foreground)
        self.foreground_share, self.jitter = foreground_share, jitter
        self.draw_spatial, self.draw_intensity = draw_spatial, draw_intensity
        self.place_patch = place_patch
        self.files = {}  # opened where they are used: no handle is carried over a spawn

    def __getstate__(self):
        return {**self.__dict__, "files": {}}

    def _file(self, case):
        if case.path not in self.files:
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
        return {
            "case": case.id,
            "image": torch.from_numpy(native(file["image"][(slice(None), *box)])),
            "label": torch.from_numpy(file["label"][box]),
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
            pin_memory=pin,
        )
