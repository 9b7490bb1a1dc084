"""The network of model.py from plain layers of torch, as a peer's training step would have it.

    network = PlainUNet(plan.strides, plan.kernels, **shape)   # shape: of `model` in settings.py
    network.load_state_dict(ours.state_dict())                 # its parameters have the same names

(B, 1, D, H, W) to a list of logits (B, 1, d, h, w), finest first. NCDHW, torch's InstanceNorm3d and
Mish, nothing fused, recomputed or compiled.
"""

import itertools

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, kernel, dropout):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, kernel, padding="same", bias=False)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv2 = nn.Conv3d(outputs, outputs, kernel, padding="same", bias=False)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)
        self.dropout, self.act = nn.Dropout3d(dropout), nn.Mish()
        self.project = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        out = self.act(self.norm1(self.conv1(x)))
        out = self.dropout(self.norm2(self.conv2(out)))
        return self.act(out + self.project(x))


class PlainUNet(nn.Module):
    """strides, kernels: z, y, x of each stage, as `model.fit` gives them."""

    def __init__(self, strides, kernels, *, base, multipliers, blocks, dropout):
        super().__init__()

        def stage(inputs, outputs, kernel):
            widths = [inputs] + [outputs] * blocks
            return nn.Sequential(*(Block(*w, kernel, dropout) for w in itertools.pairwise(widths)))

        widths = [base * m for m in multipliers]
        self.stem = nn.Sequential(
            nn.Conv3d(1, base * multipliers[0], kernels[0], padding="same", bias=False),
            nn.InstanceNorm3d(base * multipliers[0], affine=True),
            nn.Mish(),
        )
        self.downs, self.encoder = nn.ModuleList([nn.Identity()]), nn.ModuleList()
        for before, stride in zip(widths, strides[1:], strict=False):
            down = nn.Conv3d(before, before, stride, stride)
            self.downs.append(down if max(stride) > 1 else nn.Identity())
        for before, width, kernel in zip([widths[0], *widths], widths, kernels, strict=False):
            self.encoder.append(stage(before, width, kernel))
        self.bottleneck = stage(widths[-1], 2 * widths[-1], kernels[-1])

        self.ups, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        below = 2 * widths[-1]
        for i in reversed(range(len(widths) - 1)):
            self.ups.append(nn.ConvTranspose3d(below, widths[i], strides[i + 1], strides[i + 1]))
            self.decoder.append(stage(2 * widths[i], widths[i], kernels[i]))
            supervised = i == 0 or max(strides[i]) > 1
            self.heads.append(nn.Conv3d(widths[i], 1, 1) if supervised else None)
            below = widths[i]

    def forward(self, x):
        skips, logits = [], []
        x = self.stem(x)
        for down, stage in zip(self.downs, self.encoder, strict=True):
            x = stage(down(x))
            skips.append(x)
        x = self.bottleneck(skips.pop())
        for up, stage, head in zip(self.ups, self.decoder, self.heads, strict=True):
            x = stage(torch.cat([up(x), skips.pop()], dim=1))
            if head is not None:
                logits.insert(0, head(x))
        return logits
