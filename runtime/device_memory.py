"""The memory of a device: which errors say that it is full, and what a prediction then does.

    try:
        ...
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        free_memory(error, device)      # then once more, with less

Training takes less memory by `microbatch.MicroBatch`, a prediction by `WindowFit`.
"""

import contextlib
import gc
import math
import traceback

import torch

from runtime.signals import CannotGoOn

# What says that memory is full, of whoever asked for it: torch and the driver; cuBLAS and cuDNN;
# cuDNN whose convolutions find no room for their workspace; the CPU's allocator.
MESSAGES = (
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
    "No valid execution plans built",
    "can't allocate memory",
)
# No handle could be made: for want of memory, or because driver and libraries do not fit.
NO_HANDLE = ("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED")
HANDLE = 10**9  # bytes: a handle with its kernels takes some hundred MB, beside torch's cache


def out_of_memory(error):
    """Whether an exception says that a device has no memory left.

    A library that could not be initialized says so only where the driver has less than HANDLE free.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(message in text for message in NO_HANDLE):
        return free_by_driver() < HANDLE
    return any(message in text for message in MESSAGES)


def free_by_driver():
    """Bytes of the GPU in use that no process holds; infinite without one, or if it is silent."""
    with contextlib.suppress(RuntimeError):  # a GPU may answer nothing more after an error
        if torch.cuda.is_initialized():
            return torch.cuda.mem_get_info()[0]
    return math.inf


def first_line(error):
    """What an error said, for people: it may have been taken for one of memory wrongly."""
    return str(error).split("\n")[0]


def free_memory(error, device):
    """Let go of what a pass that failed has computed: the frames of its error hold it all."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()  # what refers to itself in a circle, such as an error that another one came from
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def total_memory(device):
    """Bytes of a GPU; None for a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def has_more(device, memory):
    """Whether a GPU has more than `memory` bytes, None: an unknown number."""
    total = None if memory is None else total_memory(device)
    return total is not None and total > memory


def memory_figures(device):
    """The memory of a device as text to follow its name; "" for a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.max_memory_reserved(device)
    return (
        f" ({total / 1e9:.1f} GB, this run took up to {held / 1e9:.1f}, {free / 1e9:.1f} are free)"
    )


class WindowFit:
    """How many windows go at once and where the slab lies, for a volume of some size.

    Each time the device runs out of memory it is less: half as many windows, down to one, then the
    slab on the CPU. remembered: {"DxHxW": [windows, whether on the CPU, bytes of the GPU]}, plain
    values that outlive the volume; a volume begins with what volumes of its size and smaller ones
    have needed, save on a GPU with less memory than this one has.
    """

    def __init__(self, shape, batch, device, remembered, report):
        self.key, self.device, self.report = "x".join(map(str, shape)), device, report
        self.remembered, self.batch, self.on_cpu = remembered, batch, False
        for key, (windows, on_cpu, *memory) in remembered.items():  # no memory in older states
            is_smaller = math.prod(map(int, key.split("x"))) <= math.prod(shape)
            if is_smaller and not has_more(device, *memory or [None]):
                self.batch, self.on_cpu = min(self.batch, windows), self.on_cpu or on_cpu

    @property
    def slab_device(self):
        return torch.device("cpu") if self.on_cpu else self.device

    def lower(self, error):
        """Ask for less memory after an error. Raises it if it is another one, and `CannotGoOn` if
        nothing is left that could be less."""
        if not out_of_memory(error):
            raise error
        where = (
            f"{self.device} ran out of memory{memory_figures(self.device)} in the prediction of a "
            f"volume of {self.key}"
        )
        if self.batch == 1 and self.on_cpu:
            raise CannotGoOn(
                f"{where} with one window at a time and the results on the CPU; lower "
                f"inference.window; the error was: {first_line(error)}"
            ) from error
        if self.batch > 1:
            self.batch //= 2
            what = f"{self.batch} windows at once"
        else:
            self.on_cpu, what = True, "the results on the CPU"
        self.remembered[self.key] = [self.batch, self.on_cpu, total_memory(self.device)]
        free_memory(error, self.device)
        text = f"{where}: it goes on with {what}, as will others of this size"
        self.report("cuda memory", text, windows=self.batch, on_cpu=self.on_cpu)
