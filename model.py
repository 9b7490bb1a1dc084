"""The network: a residual 3D U-Net with deep supervision, and the strides that fit it to the data.

Encoder stages of residual blocks (He et al. 2016) with instance norm and Mish, a bottleneck of
twice the deepest width at the deepest resolution, a decoder with skip connections (Çiçek et al.
2016), and one head per decoder stage for deep supervision. Strides and kernels follow the patch
and the spacing (the rule of Isensee et al. 2021, nnU-Net): an axis whose voxels are long is not
halved, nor convolved, until the other axes have caught up.
"""

import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from norm_mish import norm_mish

SMALLEST_AXIS = 4  # voxels that a halving must leave, or instance norm has nothing to average
PRIOR = 0.1  # probability of foreground of an untrained network (Lin et al. 2017)
LONGEST_ODD_AXIS = 24  # an axis that cannot be halved further may be this long at the bottleneck


def derive_strides(patch, spacing, stages):
    """The strides that fit a network of `stages` stages to a patch: one (z, y, x) per stage.

    patch: voxels z, y, x; spacing: of those voxels. The first stride is (1, 1, 1). An axis is
    halved where it is even, keeps at least 4 voxels, and its voxels are at most twice as long as
    the shortest of the axes that could be halved. ValueError where nothing can be halved, or a long
    axis stays odd, with the nearest sizes.
    """
    patch_name = f"sampling.patch {list(patch)}"
    size, length = list(patch), [float(s) for s in spacing]
    strides = [(1, 1, 1)]
    for stage in range(1, stages):
        able = [n % 2 == 0 and n // 2 >= SMALLEST_AXIS for n in size]
        shortest = min((s for s, a in zip(length, able, strict=True) if a), default=0)
        step = tuple(2 if a and s <= 2 * shortest else 1 for a, s in zip(able, length, strict=True))
        if stage == 1 and max(step) == 1:
            raise ValueError(
                f"{patch_name}: expected at least one axis that can be halved (even, and at least "
                f"{2 * SMALLEST_AXIS} voxels), got none; multiples of 8 fit best"
            )
        size = [n // s for n, s in zip(size, step, strict=True)]
        length = [v * s for v, s in zip(length, step, strict=True)]
        strides.append(step)
    for axis, n, whole in zip("zyx", size, patch, strict=True):
        if n > LONGEST_ODD_AXIS and n % 2:
            fit = 8 if whole < 128 else 16
            below, above = whole // fit * fit, -(-whole // fit) * fit
            raise ValueError(
                f"{patch_name}: no stride fits axis {axis}: {whole} voxels can be halved only down "
                f"to {n}, which is odd; the nearest sizes that fit are {below} and {above}"
            )
    return strides


def derive_kernels(patch, spacing, strides):
    """Kernel sizes z, y, x per stage: 1 along an axis until its voxels are at most twice as long
    as the shortest, and 3 from there on; 1 along an axis of one voxel."""
    length, wide = np.asarray(spacing, float), np.zeros(3, bool)
    thick, kernels = np.asarray(patch) > 1, []
    for stride in strides:
        length = length * stride
        wide |= thick & (length <= 2 * length[thick].min(initial=np.inf))
        kernels.append(tuple(3 if w else 1 for w in wide))
    return kernels


def fit(patch, spacing, *, stages, strides=None, window=None):
    """(strides, kernels) of a network for a patch and its spacing; strides: derived if None.

    window: of prediction, None: the patch. ValueError if patch or window do not divide.
    """
    strides = [(1, 1, 1), *strides] if strides else derive_strides(patch, spacing, stages)
    check_divides("sampling.patch", patch, strides, at_least=SMALLEST_AXIS)
    check_divides("inference.window", window or patch, strides)
    return strides, derive_kernels(patch, spacing, strides)


def check_divides(name, size, strides, at_least=1):
    """ValueError unless the product of the strides divides a size (z, y, x) that has this name."""
    for axis, n, factor in zip("zyx", size, np.prod(strides, axis=0), strict=True):
        if n % factor or (n // factor < at_least and factor > 1):
            raise ValueError(
                f"{name} {list(size)}: no stride fits axis {axis}: expected a multiple of "
                f"{factor}, the product of the strides, of at least {at_least * factor}, got {n}"
            )


class ResidualBlock(nn.Module):
    """conv - norm - Mish - conv - norm - dropout, plus the input, Mish."""

    def __init__(self, inputs, outputs, kernel, dropout):
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.conv1 = nn.Conv3d(inputs, outputs, kernel, padding=padding, bias=False)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv2 = nn.Conv3d(outputs, outputs, kernel, padding=padding, bias=False)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)
        self.dropout = nn.Dropout3d(dropout) if dropout else None
        self.project = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        out = norm_mish(self.conv1(x), self.norm1)
        return norm_mish(self.conv2(out), self.norm2, self.dropout, self.project(x))


def _blocks(count, inputs, outputs, kernel, dropout):
    widths = [inputs] + [outputs] * count
    return nn.Sequential(
        *(ResidualBlock(a, b, kernel, dropout) for a, b in itertools.pairwise(widths))
    )


class UNet3D(nn.Module):
    """Residual 3D U-Net: (B, in_channels, D, H, W) to logits (B, out_channels, D, H, W).

    base, multipliers: width of each encoder stage is base x multiplier; the bottleneck has twice
    the last. blocks: residual blocks per stage. strides, kernels: as `derive_strides` and
    `derive_kernels` give them.
    In training with deep_supervision, forward returns a list of logits, finest first, one per
    decoder stage that changes resolution; otherwise one tensor. D, H, W must be multiples of the
    product of the strides: ValueError otherwise.
    checkpointing: activations of each block are recomputed in the backward pass. exclusive: the
    channels are classes by a softmax, 0 the background; else each is a foreground by a sigmoid.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        base,
        multipliers,
        blocks,
        strides,
        kernels,
        dropout=0.0,
        deep_supervision=True,
        checkpointing=False,
        exclusive=False,
    ):
        super().__init__()
        widths = [base * m for m in multipliers]
        self.downsampling = [math.prod(along) for along in zip(*strides, strict=True)]  # z, y, x
        self.deep_supervision, self.checkpointing = deep_supervision, checkpointing
        padding = tuple(k // 2 for k in kernels[0])
        # Normed before the first sum, so that brightness and contrast end here.
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, widths[0], kernels[0], padding=padding, bias=False),
            nn.InstanceNorm3d(widths[0], affine=True),
        )
        self.downs, self.encoder = nn.ModuleList(), nn.ModuleList()
        for i, (width, stride, kernel) in enumerate(zip(widths, strides, kernels, strict=True)):
            before = widths[max(i - 1, 0)]
            self.downs.append(
                nn.Identity() if max(stride) == 1 else nn.Conv3d(before, before, stride, stride)
            )
            self.encoder.append(_blocks(blocks, before, width, kernel, dropout))
        self.bottleneck = _blocks(blocks, widths[-1], 2 * widths[-1], kernels[-1], dropout)

        self.ups, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        below = 2 * widths[-1]
        for i in reversed(range(len(widths) - 1)):  # to the resolution of encoder stage i
            self.ups.append(nn.ConvTranspose3d(below, widths[i], strides[i + 1], strides[i + 1]))
            self.decoder.append(_blocks(blocks, 2 * widths[i], widths[i], kernels[i], dropout))
            supervised = i == 0 or (deep_supervision and max(strides[i]) > 1)
            self.heads.append(nn.Conv3d(widths[i], out_channels, 1) if supervised else None)
            below = widths[i]
        self.apply(_initialise)
        for head in filter(None, self.heads):
            nn.init.normal_(head.weight, std=0.01)
            sharing = out_channels - 1 if exclusive else 1  # classes that share the prior
            nn.init.constant_(head.bias, math.log(PRIOR / (1 - PRIOR) / sharing))
            nn.init.zeros_(head.bias[: int(exclusive)])

    def _run(self, stage, x):
        recompute = self.checkpointing and self.training
        for block in stage:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def forward(self, x):  # (B, C, D, H, W)
        for axis, n, factor in zip("DHW", x.shape[2:], self.downsampling, strict=True):
            if n % factor:
                raise ValueError(f"{axis}: expected a multiple of {factor} voxels, got {n}")
        skips = []
        convolution, norm = self.stem
        x = norm_mish(convolution(x), norm)
        for down, stage in zip(self.downs, self.encoder, strict=True):
            x = self._run(stage, down(x))
            skips.append(x)
        x = self._run(self.bottleneck, skips.pop())
        logits = []
        for up, stage, head in zip(self.ups, self.decoder, self.heads, strict=True):
            x = self._run(stage, torch.cat([up(x), skips.pop()], dim=1))
            if head is not None and (self.training or not skips):
                logits.insert(0, head(x))
        return logits if self.training and self.deep_supervision else logits[0]


def build_network(in_channels, out_channels, *, strides, kernels, settings, exclusive=False):
    """The network of a run, on the CPU; for another one, build it here.

    settings: {name: value} of the group `model` of settings.py. strides and kernels: see `fit`;
    whatever the network is, patches must be multiples of the product of the strides. exclusive:
    whether the channels are classes by a softmax.
    """
    names = ("base", "multipliers", "blocks", "dropout", "deep_supervision", "checkpointing")
    shape = {name: settings[name] for name in names}
    shape |= {"strides": strides, "kernels": kernels, "exclusive": exclusive}
    return UNet3D(in_channels, out_channels, **shape)


def _initialise(module):
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def update_ema(ema, network, decay, step):
    """Move the averaged weights towards the network's; the decay grows over the first steps.

    Buffers, such as the running statistics of a batch norm, are those of the network.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
    for averaged, buffer in zip(ema.buffers(), network.buffers(), strict=True):
        averaged.copy_(buffer)
