"""From a worker to the training process, and from there to the device.

    message = Outbox(keep=4).pack(samples)              # in a worker: a few bytes
    samples = unpack(message)                           # in the training process
    samples = to_device(samples, device, copy_stream(device))

A worker writes a batch to an anonymous file in memory, which the training process opens through
/proc and maps. That needs no /dev/shm, of which a container has 64 MB, and the message is so short
that it enters a pipe whole or not at all: a worker that is killed in the middle of a write leaves
no half of a message, for whose end the training process would wait for ever.
"""

import io
import mmap
import os
import pickle
from collections import deque

import numpy as np
import torch

ALIGNED = 64  # bytes: where an array begins
SMALL = 4096  # bytes: a smaller array is copied, or it would keep the memory of its whole batch


def has_memory_files():
    """Whether this process can offer anonymous files in memory to another one: Linux."""
    return hasattr(os, "memfd_create") and os.path.isdir(f"/proc/{os.getpid()}/fd")


class Outbox:
    """Packs batches in a worker, and keeps their files open until the training process has them.

    keep: batches that the training process may not have opened yet when the next one is asked for.
    Where there are no files in memory, a batch is sent as torch sends it.
    """

    def __init__(self, keep):
        self.keep, self.files, self.in_memory = keep, deque(), has_memory_files()

    def release(self):
        """Close the files that the training process has opened; call it before reading a batch."""
        while len(self.files) > self.keep:
            os.close(self.files.popleft())

    def pack(self, content):
        """A short list about plain values, numpy arrays and tensors of the CPU, in any nesting."""
        if not self.in_memory:
            return [content]
        body, arrays = io.BytesIO(), []

        def is_copied(buffer):
            small = buffer.raw().nbytes < SMALL
            if not small:
                arrays.append(buffer.raw())
            return small

        _Pickler(body, protocol=5, buffer_callback=is_copied).dump(content)
        pieces = [body.getbuffer(), *arrays]
        lengths = np.array([piece.nbytes for piece in pieces], np.int64)
        file = os.memfd_create("lamina-batch")
        self.files.append(file)
        _write(file, lengths.data, 0)
        for piece, start in zip(pieces, _starts(lengths), strict=True):
            _write(file, piece, start)
        return [f"/proc/{os.getpid()}/fd/{file}", os.fstat(file).st_ino, len(pieces)]


def unpack(message):
    """What was packed, its arrays in the memory that the worker wrote. OSError if that is gone."""
    if len(message) == 1:
        return message[0]
    path, inode, pieces = message
    file = os.open(path, os.O_RDWR)
    try:
        if os.fstat(file).st_ino != inode:  # of a later process with the same pid
            raise FileNotFoundError(f"{path}: expected a packed batch, got another file")
        # Mapped at once: a fault for every page would take longer than the copy.
        memory = memoryview(mmap.mmap(file, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE))
    finally:
        os.close(file)
    lengths = np.frombuffer(memory, np.int64, pieces)
    places = zip(_starts(lengths), lengths.tolist(), strict=True)
    body, *arrays = (memory[start : start + length] for start, length in places)
    return pickle.loads(body, buffers=arrays)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _starts(lengths):
    """Where each piece begins, behind the list of their lengths."""
    padded = -(-np.array([lengths.nbytes, *lengths]) // ALIGNED) * ALIGNED
    return np.cumsum(padded)[:-1].tolist()


def _write(file, piece, start):
    piece = memoryview(piece).cast("B")
    while piece:
        written = os.pwrite(file, piece, start)
        piece, start = piece[written:], start + written


# ---------------------------------------------------------------------------- to the device


def pin(samples):
    """The samples with their tensors in pinned memory."""
    return [{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in s.items()} for s in samples]


def copy_stream(device):
    """What `to_device` takes: a CUDA stream for copies, or None where nothing is copied."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def to_device(samples, device, stream):
    """Samples with their tensors on the device; as they are if stream is None.

    The copy, from pinned memory, starts on its own stream as soon as the host has the batch, while
    the device still computes the step before.
    """
    if stream is None:
        return samples
    current = torch.cuda.current_stream(device)

    def move(value):
        if not torch.is_tensor(value):
            return value
        moved = value.to(device, non_blocking=True)
        moved.record_stream(current)  # or its memory is given away while the step still reads it
        return moved

    with torch.cuda.stream(stream):
        moved = [{key: move(value) for key, value in sample.items()} for sample in samples]
    current.wait_stream(stream)
    return moved
