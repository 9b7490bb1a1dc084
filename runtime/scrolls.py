"""Predict a volume that need not fit into memory: box by box into a store of shards on disk.

    scroll = open_scroll(predictor, volume, output, mask=None, bbox=None)
    scroll.work(part, progress, say)

Every voxel has the bits of `sliding_window.predict_volume`, save where the input is masked (see
runtime/masked_source.py): there it is 0, in the probability and in the mask. Windows in which all
is masked are not predicted.
"""

import contextlib
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import columns, own_threshold, parts, scroll_figures
from runtime.chunk_cache import ChunkCache
from runtime.folder import versions
from runtime.masked_source import MaskedSource
from runtime.own_threshold import AUTO, LEVELS
from runtime.signals import CannotGoOn
from runtime.sliding_window import network_ratio
from runtime.window_axis import window_spans
from runtime.window_transfer import is_asynchronous
from scoring import block_postprocess
from volumes import ome_zarr, origins, zarr_store
from volumes.files import few, read_label, split_dataset, suffix_of
from volumes.volume import VolumeError, box_within

CHUNK = 128  # voxels of a chunk of a store, on each axis
# Bits of the codes that a mask is made from later. Above them: the levels that are reached.
LOW, MASKED, LEVEL = 1, 2, 2
FREE = ("batch", "cache_gb")  # settings of inference that change no voxel but for rounding
LATE = 2  # rows that are read before the planes of one come back from a GPU


# ---------------------------------------------------------------------------- opening


def open_all(predictor, inputs, stored, output, arguments):
    """The `Scroll` of each `Input` whose prediction is stored; inputs: those that are predicted
    whole. ValueError, a line for each fault; before one is made, nothing is written."""
    alone = len(stored) == 1 and not inputs
    fits = {"mask": alone, "bbox": alone, "submission": not stored}
    for name, does in fits.items():
        if getattr(arguments, name) and not does:
            wanted = "masks in files" if name == "submission" else "one prediction, in a .zarr"
            got = few([str(volume.prediction_path(output)) for volume in (*stored, *inputs)])
            raise ValueError(f"--{name}: expected {wanted}, got {got}; leave it out")
    box = arguments.bbox and parse_box(arguments.bbox)
    how = {"mask": arguments.mask, "bbox": box}
    return [open_scroll(predictor, volume, output, **how) for volume in stored]


def parse_box(texts):
    """Three slices, as of `--bbox Z0:Z1 Y0:Y1 X0:X1`."""
    return [_slice(text) for text in texts]


def _slice(text):
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise ValueError(f"--bbox: expected Z0:Z1 Y0:Y1 X0:X1, such as 0:512 : 100:900, got {text}")
    return slice(*(int(end) if end else None for end in match.groups()))


def open_scroll(predictor, volume, output, *, mask=None, bbox=None):
    """The `Scroll` of an `Input` whose prediction goes into a store, which is made, or gone on
    with. mask: path of a volume of the same voxels; bbox: three slices, None for all.

    ValueError, a line for each fault: of the mask, the box, settings that a store cannot have, or
    of a store that was begun with something else.
    """
    settings, shape = predictor.settings, volume.shape
    box, _ = box_within(f"--bbox of {volume.path}", bbox or (slice(None),) * 3, shape)
    inference = settings.inference
    shard = tuple(inference.shard)
    chunk = tuple(min(CHUNK, size) for size in shard)
    if any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise ValueError(
            f"inference.shard: expected multiples of {CHUNK}, or less than {CHUNK}, got "
            f"{list(shard)}; give such ones"
        )
    if inference.save_disagreement:
        raise ValueError(
            f"inference.save_disagreement: expected false for {volume.prediction_path(output)}, "
            "which holds probabilities and a mask; set it to false"
        )
    ratio = network_ratio(volume.spacing, predictor.metadata["spacing"])
    windows = (inference.window, inference.overlap, ratio)
    spans = window_spans(shape, *windows, predictor.device)
    mask_voxels = None if mask is None else _open_mask(mask, volume)
    scroll = Scroll(predictor, volume, spans, ratio, box, mask_voxels)
    spacing = volume.spacing or (1.0, 1.0, 1.0)
    corner = zip(volume.offset, box, spacing, strict=True)
    scroll.store = zarr_store.create(
        volume.prediction_path(output),
        scroll.size,
        predictor.outputs.written,
        spacing=volume.spacing,
        unit=volume.unit,
        offset=[place + s.start * step for place, s, step in corner],
        shard=shard,
        chunk=chunk,
        provenance=scroll.provenance(mask),
        post=scroll.is_later,
    )
    return scroll


def _open_mask(path, volume):
    """The voxels (1, D, H, W) of a mask volume, which are sliced; VolumeError."""
    file, _ = split_dataset(path)
    is_zarr = suffix_of(file) == ".zarr"
    mask = ome_zarr.open_volume(path, role="label") if is_zarr else read_label(path).array[None]
    if tuple(mask.shape) != (1, *volume.shape):
        raise VolumeError(
            f"{path}: expected a mask of the voxels of {volume.path}, {volume.shape}, got shape "
            f"{tuple(mask.shape[1:])} and {mask.shape[0]} channels; give one of the same level"
        )
    return mask


# ---------------------------------------------------------------------------- prediction


@dataclass
class Scroll:
    """A volume whose prediction goes into a store.

    spans: of the windows on each axis; box: what of the volume is predicted, three slices; mask:
    the voxels of the mask volume, or None.
    """

    predictor: object
    volume: object
    spans: list
    ratio: tuple
    box: tuple
    mask: object
    store: object = None

    @property
    def size(self):
        return [s.stop - s.start for s in self.box]

    @property
    def is_later(self):
        """Whether the mask is made when all is predicted, from codes."""
        settings = self.predictor.settings
        steps = settings.postprocess.model_dump()
        return settings.inference.threshold == AUTO or any(
            any(v.values()) if isinstance(v, dict) else v for v in steps.values()
        )

    def shard_box(self, index):
        """The box of a shard in voxels of the volume."""
        return tuple(
            slice(s.start + whole.start, s.stop + whole.start)
            for s, whole in zip(self.store.box(index), self.box, strict=True)
        )

    def provenance(self, mask):
        """What decides the voxels of the store, as JSON has it, and which version wrote it."""
        predictor, settings = self.predictor, self.predictor.settings.plain()
        members = {}
        for number, one in enumerate(predictor.members, start=1):
            about = {key: getattr(one, key) for key in ("run", "step", "weights", "config")}
            about["sha256_of_weights"] = parts.fingerprint([], [one.network])
            members[str(number)] = about
        inference = {key: v for key, v in settings["inference"].items() if key not in FREE}
        grid, made_by = {"window": [], "starts": []}, versions()
        for spans, own in zip(self.spans, self.box, strict=True):
            there = columns.touching(spans, own)
            grid["window"].append(max(span.stop - span.start for span in there))
            grid["starts"].append([span.start - own.start for span in there])
        return {
            "commit": made_by["lamina"],
            "torch": made_by["torch"],
            "device": predictor.device.type,
            "precision": predictor.how["precision"],
            "input": _absolute(self.volume.path),
            "mask": mask and _absolute(mask),
            "box": [[s.start, s.stop] for s in self.box],
            "checkpoint": members,
            "inference": inference,
            "postprocess": settings["postprocess"],
            "normalization": {"percentiles": predictor.how["clip"], **self.volume.intensity},
            "grid": grid | {"ratio": list(map(float, self.ratio))},
        }

    # ------------------------------------------------------------------------ the work of a part

    def share(self, part):
        """The indexes of the shards that a part predicts, in order."""
        return columns.share(self.store.grid, self.shard_box, self.spans, part)

    def work(self, part, how, say):
        """Predict the shards of a part that are missing, and complete the store where no other's is
        missing; a clause on what was done, None if something is missing still.

        how: progress and report of `predict_slabs`; say(line): to people.
        """
        missing = {*self.store.missing()}
        own = [index for index in self.share(part) if index in missing]
        clause = self._predict(own, how, say) if own else "it was there"
        is_old = not own and zarr_store.open_store(self.store.path).description["complete"]
        return f"{clause}, {self.store.path}" if is_old or self._complete() else None

    def waits_for(self, part):
        """A clause on the shards that are missing, and on the parts that predict them."""
        missing, count = {*self.store.missing()}, part.count if part else 1
        if not missing:
            return "waits for its mask, which another process makes"
        owners = [n for n in range(count) if missing & {*self.share(parts.Part(n, count))}]
        names = ", ".join(f"part {n + 1}/{count}" for n in owners) if part else "another process"
        return f"waits for {len(missing)} of {math.prod(self.store.grid)} shards, of {names}"

    def _predict(self, indexes, how, say):
        started, device = time.perf_counter(), self.predictor.device
        late = LATE if is_asynchronous(device) else 0
        plan = columns.plan(self.spans, self.volume.shape, self.shard_box, indexes, late)
        with (
            self.volume.voxels() as voxels,
            contextlib.closing(self._source(voxels, plan)) as source,
        ):
            say(f"estimate   {scroll_figures.estimate(self, plan, source)}")
            done, total = 0, sum(map(self.windows, plan))
            with Writer() as writer:
                for source.stretch, stretch in enumerate(plan):

                    def progress(count, _, before=done):
                        how["progress"](before + count, total)

                    self._predict_stretch(stretch, source, writer, how | {"progress": progress})
                    done += self.windows(stretch)
            seconds = time.perf_counter() - started
            return scroll_figures.of_work(self, indexes, source, seconds)

    def windows(self, stretch):
        """How many windows are predicted for a stretch, if none is skipped."""
        areas = zip(self.spans[1:], stretch.box[1:], strict=True)
        return len(stretch.needed) * math.prod(len(columns.touching(*one)) for one in areas)

    def _source(self, voxels, plan):
        budget = int(self.predictor.settings.inference.cache_gb * 1e9)
        both = [
            ChunkCache(one, plan, most) if isinstance(one, ome_zarr.ZarrVolume) else one
            for one, most in ((voxels, budget), (self.mask, 0))
        ]
        return MaskedSource(*both, self.spans[0])

    def _predict_stretch(self, stretch, source, writer, how):
        """Predict those of its shards that no other process holds, and hold them meanwhile."""
        about, locks = (source, self.volume.spacing, self.volume.intensity), contextlib.ExitStack()
        try:
            free = [i for i in stretch.shards if locks.enter_context(self.store.lock(i))]
            for run in columns.plan(self.spans, self.volume.shape, self.shard_box, free):
                where = {"rows": run.rows, "box": run.box[1:], "skip": source.skip}
                slabs = self.predictor.probabilities(*about, **where, **how)
                self._fill(slabs, run.shards, source, writer)
            writer.submit(locks.close)
        except BaseException:
            locks.close()
            raise

    def _fill(self, slabs, shards, source, writer):
        """Put finished planes into their shards, and let each be written as soon as it is whole."""
        waiting = iter(shards.items())
        index, box = next(waiting)
        arrays, z = None, box[0].start
        for z0, probs in slabs:
            stop = min(z0 + probs.shape[1], max(b[0].stop for b in shards.values()))
            while z < stop:
                if arrays is None:
                    arrays = self._empty(box)
                planes = slice(z, min(stop, box[0].stop))
                part = probs[:, planes.start - z0 : planes.stop - z0]
                there = slice(planes.start - box[0].start, planes.stop - box[0].start)
                self._finish(
                    part, source.masked((planes, *box[1:])), [a[..., there, :, :] for a in arrays]
                )
                z = planes.stop
                if z == box[0].stop:
                    writer.submit(self._write, index, arrays)
                    arrays = None
                    index, box = next(waiting, (None, box))

    def _empty(self, box):
        """Arrays of a shard to fill: the probabilities, and the mask or the codes of it."""
        size, channels = [s.stop - s.start for s in box], len(self.predictor.outputs.regions)
        second = (channels, *size) if self.is_later else size
        return np.empty((channels, *size), np.uint8), np.empty(second, np.uint8)

    def _finish(self, probs, masked, arrays):
        """Fill planes of a shard from probabilities (K, d, h, w)."""
        predictor, (probability, second) = self.predictor, arrays
        regions = probs[int(predictor.outputs.exclusive) :]
        for own, target in zip(regions, probability, strict=True):
            np.rint(own * np.float32(255), out=target, casting="unsafe")
        if self.is_later:
            high, low = predictor.reached(probs)
            for name, target in zip(high, second, strict=True):
                np.left_shift(high[name], LEVEL, out=target, casting="unsafe", dtype=np.uint8)
                if name in low:
                    target |= low[name] * np.uint8(LOW)
        else:
            second[:] = predictor.outputs.paint(predictor.thresholded(probs))
        if masked is not None:
            probability[:, masked] = 0
            second[..., masked] = MASKED if self.is_later else 0

    def _write(self, index, arrays):
        try:
            self.store.write(index, arrays[0], **{"raw" if self.is_later else "mask": arrays[1]})
        except OSError as error:
            raise CannotGoOn(str(error)) from error

    # ------------------------------------------------------------------------ completing

    def _complete(self):
        """Make the mask from the codes once no shard is missing, and say in the store that it is
        complete; whether it is. One process does this, and goes on where another was killed."""
        if self.store.missing():
            return False
        if self.store.missing(mask=True):
            with self.store.hold("mask") as free:
                if not free:
                    return False
                self._postprocess()
        if not self.store.finish():
            return False
        origins.write(self.store.path, [member.origin for member in self.predictor.members])
        return True

    def _postprocess(self):
        import zarr

        predictor, folder = self.predictor, self.store.path / ".lamina" / "steps"
        folder.mkdir(exist_ok=True)
        codes = zarr.open_array(self.store.path / zarr_store.RAW / "0", mode="r")
        names = predictor.outputs.regions

        def raw(box):
            return np.reshape(codes[..., *box], (len(names), *(s.stop - s.start for s in box)))

        level = 0
        if predictor.settings.inference.threshold == AUTO:
            level = LEVELS.index(self._own_threshold(raw))

        def read(box):
            pairs = [*zip(names, raw(box), strict=True)]
            high = {name: own >> LEVEL > level for name, own in pairs}
            return high, {name: own & LOW > 0 for name, own in pairs}

        how = {"exclusive": predictor.outputs.exclusive, "spacing": self.volume.spacing}
        how |= predictor.settings.postprocess.model_dump()
        masks = block_postprocess.postprocessed(read, self.size, folder, **how)
        for index in self.store.missing(mask=True):
            box = self.store.box(index)
            painted = predictor.outputs.paint(masks(box))
            painted[raw(box)[0] == MASKED] = 0  # steps may have filled it
            self.store.write_mask(index, painted)

    def _own_threshold(self, raw):
        """That of the volume without what is masked; raw(box): the codes."""
        counts = 0
        for index in np.ndindex(self.store.grid):
            (codes,) = raw(self.store.box(index))
            for plane in codes:
                counts += own_threshold.histogram([plane[plane & MASKED == 0] >> LEVEL])
        return self.predictor.own_threshold(counts)


class Writer:
    """A thread that does one task while the next is made ready; a context that waits for it."""

    def __enter__(self):
        self._pool, self._task = ThreadPoolExecutor(1, "writer"), None
        return self

    def submit(self, do, *arguments):
        """Do this when the task before is done, whose error is raised here."""
        if self._task is not None:
            self._task.result()
        self._task = self._pool.submit(do, *arguments)

    def __exit__(self, kind, *_):
        self._pool.shutdown()
        if kind is None and self._task is not None:
            self._task.result()


def _absolute(path):
    return str(path) if ome_zarr.is_url(path) else str(Path(path).absolute())
