"""What a GPU does otherwise than a CPU: sums in any order, rounding to TF32, releases to avoid.

set_deterministic(settings.run.deterministic, device)      # before the first step
lines = notes(device, "bf16")                              # for people, none of a CPU
"""

import os
import re
from typing import NamedTuple

import torch


def set_deterministic(wanted, device):
    """Have all operations repeat bit for bit, if that is wanted; those of a CPU always do.

    An operation that cannot raises a RuntimeError that names it. Without it, cuDNN tries which of
    its convolutions is fastest: those it would choose may be 10 times slower (bf16 on an H100).
    """
    on = wanted and device.type == "cuda"
    if on:  # read when cuBLAS is first used: with several workspaces its sums vary
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if on != torch.are_deterministic_algorithms_enabled():  # setting it takes a CPU run 3 s
        torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing of ours reads any
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on


class Fault(NamedTuple):
    """Releases of torch and cuDNN, each from the first to below the second, and what is known of
    their 3D convolutions in some precisions."""

    torch: tuple
    cudnn: tuple  # as torch.backends.cudnn.version() gives it: 91002 is 9.10.2
    precisions: tuple
    text: str


ANY = (10**9,)
FAULTS = [
    # github.com/pytorch/pytorch/issues/163539, fixed by pull request 166480 (cuDNN 9.15)
    Fault(
        ((0,), (2, 9)),
        (90800, 91500),
        ("bf16", "fp16"),
        "large 3D convolutions may be wrong; install torch 2.10 or newer with cuDNN 9.15 or newer",
    ),
    # github.com/pytorch/pytorch/issues/166122 and 166643: no newer cuDNN 9 is used either
    Fault(
        ((2, 9), (2, 9, 1)),
        (90800, 100_000),
        ("bf16", "fp16"),
        "3D convolutions are several times slower and take more memory; install torch 2.10 or "
        "newer with cuDNN 9.15 or newer",
    ),
    # The same; since 2.9.1 torch looks which cuDNN is there.
    Fault(
        ((2, 9, 1), ANY),
        (90800, 91500),
        ("bf16", "fp16"),
        "3D convolutions may be several times slower and take more memory; install cuDNN 9.15 or "
        'newer: pip install "nvidia-cudnn-cu12>=9.15" (cu13 for CUDA 13)',
    ),
    # github.com/pytorch/pytorch/pull/167024
    Fault(
        ((0,), ANY),
        (91002, 91600),
        ("fp32",),
        "3D convolutions in TF32 may be wrong; install cuDNN 9.16 or newer: pip install "
        '"nvidia-cudnn-cu12>=9.16" (cu13 for CUDA 13)',
    ),
]


def notes(device, precision):
    """Lines on what a run on this device in this precision should know; none on a CPU."""
    if device.type != "cuda":
        return []
    lines = []
    if precision == "fp32" and torch.backends.cudnn.allow_tf32:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            lines.append(
                "precision: in fp32 convolutions round what they multiply to TF32 (10 bits of "
                "mantissa) and add in fp32; all else is whole fp32"
            )
    return lines + faults(torch.__version__, torch.backends.cudnn.version(), precision)


def faults(torch_version, cudnn_version, precision):
    """A line on the first of FAULTS that these releases have, or none. cudnn_version: or None."""
    release = tuple(int(number) for number in re.findall(r"\d+", torch_version)[:3])
    cudnn = cudnn_version or 0
    for (first, below), (oldest, newer), precisions, text in FAULTS:
        if first <= release < below and oldest <= cudnn < newer and precision in precisions:
            version = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
            return [f"torch {torch_version} with cuDNN {version}: {text}"]
    return []
