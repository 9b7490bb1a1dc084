"""Training steps as other packages take them, with the network that they are given.

Each builder returns a function step(image, targets, ticks) that takes one optimiser step and marks
its parts on a clock, or None where its package is not installed. image (B, C, D, H, W); targets:
one (B, 1, d, h, w) of 0 and 1 for each output of the network, finest first.
"""

import importlib.util

import numpy as np
import torch

MONAI, NNUNET = "MONAI, DiceCE, AdamW, AMP", "nnU-Net, DC + CE at all scales, SGD, AMP"


def monai_step(network, device):
    """The update of MONAI's SupervisedTrainer with amp, under its own loss of all scales."""
    if importlib.util.find_spec("monai") is None:
        return None
    from monai.losses import DeepSupervisionLoss, DiceCELoss

    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    return _amp_step(network, optimizer, lambda out, true: loss(out, true[0]), device, clip=None)


def nnunet_step(network, device):
    """That of nnU-Net 2's trainer: scale weights 1, 1/2, ... with none for the coarsest."""
    if importlib.util.find_spec("nnunetv2") is None:
        return None
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

    one_scale = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}
    )

    def loss(outputs, targets):
        weights = 0.5 ** np.arange(len(outputs))
        weights[-1] = 0 if len(outputs) > 1 else 1
        return DeepSupervisionWrapper(one_scale, weights / weights.sum())(outputs, targets)

    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True
    )
    return _amp_step(network, optimizer, loss, device, clip=12.0)


def _amp_step(network, optimizer, loss, device, *, clip):
    """A step in half precision on a GPU; in float32 on a CPU, where neither package has another."""
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step(image, targets, ticks):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.float16, enabled=on_gpu):
            outputs = network(image)
            ticks.mark("forward")
            value = loss(outputs, targets)
        ticks.mark("loss")
        scaler.scale(value).backward()
        ticks.mark("backward")
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        ticks.mark("optimiser")

    return step


BUILDERS = {MONAI: monai_step, NNUNET: nnunet_step}
