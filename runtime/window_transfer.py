"""Voxels on their way to a GPU and probabilities on their way back, while it computes.

    for job, box in read_ahead(read, jobs, 3):       # a thread reads the next three
        ...
    later = to_host(planes)                          # begins to copy
    array = later()                                  # waits for the copy

A copy from or to pinned memory goes on while the host does other things. torch keeps such memory
until the copies that were begun from it are done, and gives it to the next tensor of that size.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch


def is_asynchronous(device):
    """Whether a device computes what it was given while the host does other things."""
    return torch.device(device).type == "cuda"


def read_ahead(read, jobs, most):
    """(job, read(job)) in order, made by a thread that is up to `most` ahead; 0: no thread.

    An error of read is raised here, with its own traceback. Closed early, it waits for the one
    job that is being read.
    """
    if not most:
        for job in jobs:
            yield job, read(job)
        return
    pool, waiting = ThreadPoolExecutor(1, thread_name_prefix="windows"), deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(read, job)))
            if len(waiting) > most:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def to_host(planes):
    """Begin to copy planes (K, d, H, W) to the host; a function that waits and gives the array.

    Their memory may be overwritten at once by what is issued later on the same stream.
    """
    if not is_asynchronous(planes.device):
        array = planes.numpy().copy()
        return lambda: array
    host = torch.empty(planes.shape, dtype=planes.dtype, pin_memory=True)
    for channel, source in zip(host, planes, strict=True):  # each lies in one piece: no copy first
        channel.copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(planes.device))

    def wait():
        copied.synchronize()
        return host.numpy()

    return wait
