"""Pairs of zarr volumes too large to be read whole: checked by the values that they hold, and
scored a block at a time.

    if is_large(pair):
        case = open_case(pair, options, names, errors)
        scores = case.scores(method, tolerance, threads)
"""

import dataclasses
import functools

import numpy as np

from scoring import block_scores, inputs, metrics
from scoring.blocks import Grid
from scoring.classes import mask_of, split_name
from volumes import files, ome_zarr, zarr_store
from volumes.volume import Volume, collect_errors

LARGE = 2**27  # voxels: 6 GB of memory if they are scored whole
MEMORY = 2e9  # bytes if by blocks, most of them for Betti matching


def is_large(pair):
    """Whether a `Pair` is of zarr volumes alone, and of more than LARGE voxels."""
    paths = [*pair.predictions.values(), pair.truth]
    zarrs = all(files.suffix_of(path) == ".zarr" for path in paths)
    return zarrs and files.voxel_count(pair.truth) > LARGE


def open_case(pair, options, names, errors):
    """The `BlockCase` of a `Pair`; None if that added to errors. names: of its scores.

    All voxels are read once, for the values that they have.
    """
    before = len(errors)
    whole = [n for n in names if split_name(n)[0].partition("@")[0] in block_scores.WHOLE]
    if whole or options.otsu:
        errors.append(
            f"{pair.truth}: expected scores that blocks add up to, of a volume of more than "
            f"{LARGE} voxels, got {', '.join(whole) or '--otsu'}; leave that out, or score boxes "
            "(prepare.py --bbox)"
        )
        return None
    volumes = {}
    for path in (*pair.predictions.values(), pair.truth):
        with collect_errors(errors):
            volumes[path] = ome_zarr.open_volume(path, role="label")
    if len(errors) > before:
        return None
    # Of volumes that do not go together the values say nothing.
    same, values = len({volume.shape for volume in volumes.values()}) == 1, {}
    for path, volume in volumes.items():
        with collect_errors(errors):
            values[path] = _values(volume) if same else np.zeros(1, volume.dtype)
    if len(errors) > before:
        return None

    def reader(path):
        stored, own = volumes[path], values[path]
        own = own.astype(np.uint8) if own.dtype == bool else own
        array = np.broadcast_to(own, (stored.shape[0], 1, 1, len(own)))
        about = stored.spacing, stored.unit, None, str(path)
        return files.as_label(Volume(array, *about, whole=stored.shape[1:]))

    plain = dataclasses.replace(options, probs=())
    masks = inputs.read(pair, plain, errors, reader)
    if masks is None:
        return None
    case = BlockCase(pair, options, names, volumes, values, masks)
    masks.notes.append("scored by blocks")
    if any("betti_matching" in n or n.startswith(("toposcore", "vesuvius")) for n in names):
        tiles = Grid(case.shape, block_scores.tile_of(case.shape)).counts
        masks.notes.append(f"Betti matching over {' x '.join(map(str, tiles))} tiles")
    return case


def _values(volume):
    """The values that a `ZarrVolume` holds, sorted."""
    values = [np.unique(volume[:, *box]) for box in Grid(volume.shape[1:]).boxes()]
    return np.unique(np.concatenate(values))


@dataclasses.dataclass
class BlockCase:
    """An opened `Pair`. masks: its `inputs.Masks`, but of the values that occur, not of voxels."""

    pair: inputs.Pair
    options: inputs.ReadOptions
    names: tuple
    volumes: dict  # {path: `ZarrVolume`}
    values: dict  # {path: what is stored where masks have their values}
    masks: inputs.Masks

    @property
    def shape(self):
        return self.volumes[self.pair.truth].shape[1:]

    def scores(self, method, tolerance, threads):
        """{name: value} of the predictions of a method."""
        how = {"spacing": self.masks.spacing, "tolerance": tolerance, "threads": threads}

        def of_class(name, wanted):
            read = self._reader(method, (self.options.classes or {None: (1,)})[name])
            probs = functools.partial(self._probs, method, name)
            pair = block_scores.BlockPair(read, self.shape, **how, probs=probs)
            return block_scores.score(pair, wanted)

        if self.options.classes is None:
            return of_class(None, self.names)
        return metrics.by_class(self.names, self.options.classes, of_class)

    def _reader(self, method, ids):
        """read(box) of a `BlockPair`, of the classes of these ids."""
        prediction, truth = self.pair.predictions[method], self.pair.truth
        predicted = self.values[prediction][np.isin(self.masks.masks[method].reshape(-1), ids)]
        true = self.values[truth][np.isin(self.masks.truth.reshape(-1), ids)]
        ignored = self.values[truth][self.masks.truth.reshape(-1) == self.options.ignore_label]

        def read(box):
            voxels = self.volumes[truth][:, *box][0]
            labeled = ~_mask_of(voxels, ignored) if len(ignored) else None
            mask = _mask_of(self.volumes[prediction][:, *box][0], predicted)
            return mask if labeled is None else mask & labeled, _mask_of(voxels, true), labeled

        return read

    def _probs(self, method, name, box):
        return zarr_store.probability(self.pair.predictions[method], name, box).array[0]


def _mask_of(voxels, values):
    return mask_of(voxels, values) if len(values) else np.zeros(voxels.shape, bool)
