"""The training steps of peers, on a network that gives logits of all scales, finest first.

    step = nnunet_step(network, torch.float16)
    value = step(image, targets)     # the loss; targets: (B, 1, d, h, w) of 0 and 1 for each scale

Lower precision is for a GPU: on a CPU all is float32. Both set `cudnn.benchmark` and read the loss
in each step, which waits for the device, as their peers do.
"""

import torch
import torch.nn.functional as F


def monai_step(network):
    """As MONAI's tutorials train: DiceCELoss of the finest scale, AdamW, bf16, one scheduler.

    ImportError where MONAI is not installed.
    """
    from monai.losses import DiceCELoss

    torch.backends.cudnn.benchmark = True
    dice_ce = DiceCELoss(sigmoid=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    def step(image, targets):
        optimizer.zero_grad()
        with torch.autocast(image.device.type, torch.bfloat16, enabled=image.is_cuda):
            loss = dice_ce(network(image)[0], targets[0])
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return step


def nnunet_step(network, dtype):
    """As nnU-Net trains: soft Dice + BCE of all scales but the coarsest, SGD, clipped at 12.

    dtype: float16, with a loss scale, as nnU-Net has it, or bfloat16. Its network is not compiled.
    """
    torch.backends.cudnn.benchmark = True
    device = next(network.parameters()).device.type
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True
    )
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda" and dtype == torch.float16)

    def step(image, targets):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=device == "cuda"):
            logits = network(image)
            supervised = max(1, len(logits) - 1)
            pairs = zip(logits[:supervised], targets[:supervised], strict=True)
            values = [0.5**i * _dice_bce(*pair) for i, pair in enumerate(pairs)]
            loss = sum(values) / sum(0.5**i for i in range(supervised))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def _dice_bce(logits, target):
    probs, axes = torch.sigmoid(logits), (2, 3, 4)
    overlap = (probs * target).sum(axes)
    dice = (2 * overlap + 1e-5) / (probs.sum(axes) + target.sum(axes) + 1e-5)
    return F.binary_cross_entropy_with_logits(logits, target) - dice.mean()
