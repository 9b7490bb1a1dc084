"""What the prediction of a `scrolls.Scroll` will take, and what it took, for people."""

import math
import time

import numpy as np
import torch

from monitoring import machine
from monitoring.formatting import format_bytes
from runtime.chunk_cache import ChunkCache
from runtime.window_transfer import is_asynchronous


def estimate(scroll, plan, source):
    """Memory, time and bytes of the work of this process, none of whose windows is skipped.

    plan: its `columns.Stretch`es; source: the `MaskedSource`. It predicts a window to see how long
    that takes.
    """
    predictor, windows = scroll.predictor, sum(map(scroll.windows, plan))
    seconds, channels = _seconds_of_a_window(scroll), len(predictor.outputs.regions)
    area = max(math.prod(s.stop - s.start for s in one.box[1:]) for one in plan)
    depth = max(span.stop - span.start for span in scroll.spans[0])
    slab = 4 * predictor.outputs.channels * area * depth
    shard = max(
        math.prod(s.stop - s.start for s in box) for one in plan for box in one.shards.values()
    )
    # A shard that fills, one that is written, and the slab with its finished planes.
    ram = machine.resident_memory() + 2 * shard * (1 + channels) + 2 * slab
    ram += sum(cache.bytes_kept for cache in source.caches)
    figures = [f"{format_bytes(ram)} of RAM"]
    if is_asynchronous(predictor.device):
        vram = torch.cuda.max_memory_reserved(predictor.device) + slab
        figures.append(f"{format_bytes(vram)} of VRAM")
    voxels = sum(math.prod(s.stop - s.start for s in one.box) for one in plan)
    read = sum(cache.bytes_read_at_most for cache in source.caches)
    figures += [
        f"up to {windows * seconds / 3600:.2g} hours ({windows} windows of {seconds:.2g} s)",
        *([f"reads up to {format_bytes(read)}"] if read else []),
        f"writes up to {format_bytes(voxels * (1 + channels) * 8 / 7)} before compression",
    ]
    return ", ".join(figures)


def _seconds_of_a_window(scroll):
    """The time of one window; the first call of a network takes longer, and does not count."""
    predictor, volume = scroll.predictor, scroll.volume
    image = np.zeros((volume.channels, *predictor.settings.inference.window), np.uint8)
    for _ in range(2):
        started = time.perf_counter()
        list(predictor.probabilities(image, None, volume.intensity))
    return time.perf_counter() - started


def of_work(scroll, indexes, source, seconds):
    """Time, read factor and peak of memory of the work on shards of these indexes."""
    figures = [f"{len(indexes)} shards in {seconds:.1f} s"]
    if isinstance(source.image, ChunkCache):
        image, boxes = source.image, map(scroll.shard_box, indexes)
        voxels = sum(math.prod(s.stop - s.start for s in box) for box in boxes)
        share = image.decoded / (voxels * scroll.volume.channels * image.dtype.itemsize)
        figures.append(f"read factor {share:.2f} ({format_bytes(image.decoded)} decoded)")
    if peak := machine.peak_memory():
        figures.append(f"peak {format_bytes(peak)} of RAM")
    return ", ".join(figures)
