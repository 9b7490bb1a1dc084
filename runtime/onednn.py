"""Convolutions that torch would leave to slower code on a CPU, made by oneDNN."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class OneDNN(TorchFunctionMode):
    """In this context, and without gradients, float32 convolutions of a batch of one on a CPU are
    made by oneDNN.

    torch (2.13: `use_mkldnn` in aten/src/ATen/native/Convolution.cpp) decides by B, C, D and H, a
    rule made for images: where B is 1 and C x D x H at most 20480 it takes its own `slow_conv3d`,
    which needs up to five times as long. No setting and no memory format changes that. What
    torch.compile makes of a network stays as it is.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv3d:
            return _conv3d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv3d, by oneDNN where the arguments are right and as nn.Conv3d gives them."""
    sizes = padding, stride, dilation
    others = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")  # the network's own
    usual = not others and all(isinstance(size, tuple) and len(size) == 3 for size in sizes)
    if usual and _fits(input, weight, groups):
        return torch.mkldnn_convolution(input, weight, bias, *sizes, groups)
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


def _fits(input, weight, groups):
    """Whether a batch of one (1, C, D, H, W) and weights are those of a convolution in float32."""
    if input.ndim != 5 or len(input) != 1 or not input.dtype == weight.dtype == torch.float32:
        return False
    return input.shape[1] == weight.shape[1] * groups
