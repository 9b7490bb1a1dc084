"""From the case files to the device: the order of patches, the workers, the copy.

Workers are spawned, so that no handle, lock or thread of the training process is copied into them;
they live through all epochs and read ahead. On CUDA their samples are pinned and copied on a stream
of its own while the step before still computes.
"""

import itertools

import torch
from torch.utils.data import DataLoader


class PatchPlan:
    """Batches of (epoch, index) from batch number `first` up to `last`, over all epochs.

    Of `ranks` processes, each takes its part of every batch: together they draw what one process
    draws whose batches are `ranks` times as large.
    """

    def __init__(self, first, last, *, batches_per_epoch, batch_size, rank=0, ranks=1):
        self.first, self.last = first, last
        self.batches_per_epoch, self.batch_size = batches_per_epoch, batch_size
        self.rank, self.ranks = rank, ranks

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        for number in range(self.first, self.last):
            epoch, batch = divmod(number, self.batches_per_epoch)
            start = (batch * self.ranks + self.rank) * self.batch_size
            yield [(epoch, start + i) for i in range(self.batch_size)]


def patch_batches(
    dataset,
    first,
    last,
    *,
    batches_per_epoch,
    batch_size,
    workers,
    prefetch,
    persistent,
    pin,
    rank=0,
    ranks=1,
):
    """Yield lists of samples for the batches first..last, read by `workers` processes.

    persistent: the workers live through all epochs and read on during validation; otherwise they
    are started anew for each epoch.
    """
    ends = range((first // batches_per_epoch + 1) * batches_per_epoch, last, batches_per_epoch)
    edges = [first, last] if persistent else [first, *ends, last]
    share = {"batch_size": batch_size, "rank": rank, "ranks": ranks}
    for a, b in itertools.pairwise(edges):
        yield from DataLoader(
            dataset,
            batch_sampler=PatchPlan(a, b, batches_per_epoch=batches_per_epoch, **share),
            collate_fn=list,  # boxes differ in size: they become a batch once they are patches
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # or the loader draws from the network's generator
            pin_memory=pin,
        )


def fit_shared_memory(workers, prefetch, *, batch_bytes, free):
    """(workers, prefetch, note) whose batches fit into the shared memory that they travel through.

    batch_bytes: of a batch on its way, at most; free: bytes of /dev/shm, or None if unknown. A
    container often has 64 MB there, and a worker that finds it full dies of a bus error that names
    nothing. note: what was lowered and why, or "".
    """
    if not workers or free is None:
        return workers, prefetch, ""
    room = int(0.8 * free / max(batch_bytes, 1))  # batches
    # One is with the training step; each worker has up to `prefetch` ready or in the making.
    fitting = min(workers, max(room - 1, 0))
    fewer = min(prefetch, (room - 1) // fitting) if fitting else prefetch
    if (fitting, fewer) == (workers, prefetch):
        return workers, prefetch, ""
    note = (
        f"workers: {fitting} with prefetch {fewer} instead of {workers} with {prefetch}: /dev/shm "
        f"has {free / 1e6:.0f} MB left and a batch takes up to {batch_bytes / 1e6:.0f} MB of it; "
        "give the container more (docker run --shm-size=8g)"
    )
    return fitting, fewer, note


def copy_stream(device):
    """What `to_device` takes: a CUDA stream of its own, or None where nothing is copied."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def to_device(samples, device, stream):
    """Samples with their tensors on the device; as they are if stream is None.

    The copy, out of pinned memory, is issued on a stream of its own as soon as the host has the
    batch, while the device still computes the step before.
    """
    if stream is None:
        return samples
    with torch.cuda.stream(stream):
        moved = [{key: _moved(value, device) for key, value in s.items()} for s in samples]
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for value in itertools.chain.from_iterable(sample.values() for sample in moved):
        if torch.is_tensor(value):  # or its memory is given away while the step still reads it
            value.record_stream(current)
    return moved


def _moved(value, device):
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value
