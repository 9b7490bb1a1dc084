"""From a worker to the training process, and from there to the device.

    message, file = pack(samples)  # in a worker, which closes the file some batches later
    samples = unpack(message)      # in the training process
    samples = to_device(samples, device, copy_stream(device))

A worker writes a batch to an anonymous file in memory, which the training process opens through
/proc and maps: /dev/shm, small in containers, is not needed. The message enters a pipe whole or not
at all, so that a worker killed in the middle of a write leaves no half of one to wait for.
"""

import io
import mmap
import os
import pickle

import numpy as np
import torch

ALIGNED = 64  # bytes: where an array begins
SMALL = 4096  # bytes: a smaller array is copied, or it would keep the memory of its whole batch


def has_memory_files():
    """Whether this process can offer anonymous files in memory to another one: Linux."""
    return hasattr(os, "memfd_create") and os.path.isdir(f"/proc/{os.getpid()}/fd")


def pack(content):
    """(message, file) of plain values, numpy arrays and tensors of the CPU, in any nesting.

    The file must stay open until the message has been unpacked.
    """
    body, arrays = io.BytesIO(), []

    def is_copied(buffer):
        small = buffer.raw().nbytes < SMALL
        if not small:
            arrays.append(buffer.raw())
        return small

    pickler = pickle.Pickler(body, protocol=5, buffer_callback=is_copied)
    pickler.dispatch_table = {torch.Tensor: lambda tensor: (torch.from_numpy, (tensor.numpy(),))}
    pickler.dump(content)
    pieces = [body.getbuffer(), *arrays]
    lengths = np.array([piece.nbytes for piece in pieces], np.int64)
    file = os.memfd_create("lamina-batch")
    for piece, start in zip([lengths.data, *pieces], [0, *_starts(lengths)], strict=True):
        piece = memoryview(piece).cast("B")
        while piece:
            written = os.pwrite(file, piece, start)
            piece, start = piece[written:], start + written
    return [f"/proc/{os.getpid()}/fd/{file}", os.fstat(file).st_ino, len(pieces)], file


def unpack(message):
    """What was packed, its arrays in the memory that the worker wrote. OSError if that is gone."""
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


def _starts(lengths):
    """Where each piece begins, behind the list of their lengths."""
    padded = -(-np.array([lengths.nbytes, *lengths]) // ALIGNED) * ALIGNED
    return np.cumsum(padded)[:-1].tolist()


def pin(samples):
    """The samples with their tensors in pinned memory."""
    return _with_tensors(samples, torch.Tensor.pin_memory)


def copy_stream(device):
    """What `to_device` takes: a CUDA stream for copies, or None where nothing is copied."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def to_device(samples, device, stream):
    """Samples, copied from pinned memory beside the step before; as they are if stream is None."""
    if stream is None:
        return samples
    current = torch.cuda.current_stream(device)

    def move(value):
        moved = value.to(device, non_blocking=True)
        moved.record_stream(current)  # or its memory is given away while the step still reads it
        return moved

    with torch.cuda.stream(stream):
        moved = _with_tensors(samples, move)
    current.wait_stream(stream)
    return moved


def _with_tensors(samples, change):
    return [{k: change(v) if torch.is_tensor(v) else v for k, v in s.items()} for s in samples]
