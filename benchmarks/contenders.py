"""What benchmarks/losses.py measures: a patch, our loss terms on it, and their peers.

patch = make_patch((72, 136, 136), device)
named = {**our_losses(patch), **peer_losses(patch)}     # {name: function of the logits}
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses
import settings
from runtime import composite_loss
from volumes import phantoms, skeletons

UNLABELED = 0.4
NO_MASK = ", no mask"
BASE, ALL = "weighted_bce + soft_dice", "all terms"
HAUSDORFF, SCIPY = "MONAI HausdorffDTLoss", "the same formula by scipy"
BOUNDARY, CLDICE = "MONAI BoundaryLoss", "MONAI SoftclDiceLoss"
DICE = (
    "MONAI DiceLoss, ignore_index"  # the unlabeled voxels: the one peer here that can ignore them
)


class Patch(NamedTuple):
    """Each (1, 1, D, H, W): logits, target and skeleton float32, valid bool."""

    logits: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor
    skeleton: torch.Tensor


def make_patch(shape, device, seed=0):
    """Smooth random logits, sheets of 3 voxels, 22 apart, and an unlabeled region."""
    rng = np.random.default_rng(seed)
    logits = 3.0 * phantoms.smooth_field(shape, 5, rng) - 2.0
    height = np.arange(shape[0])[:, None, None] + 6.0 * phantoms.smooth_field(shape, 40, rng)
    target = height % 22 < 3
    field = phantoms.smooth_field(shape, 24, rng)
    valid = field > np.quantile(field, UNLABELED)
    skeleton = skeletons.tubed_skeleton(target & valid)
    fields = (torch.from_numpy(x)[None, None] for x in (logits, target, valid, skeleton))
    logits, target, valid, skeleton = (field.to(device) for field in fields)
    return Patch(logits.float(), target.float(), valid, skeleton.float())


def our_losses(patch):
    """{name: function of the logits}, each also under its name + NO_MASK."""
    terms = {n: {**t, "weight": 1.0} for n, t in settings.Settings().terms().items()}
    base = {name: terms[name] for name in ("weighted_bce", "soft_dice")}

    def term(name, valid):
        own = {"skeleton": patch.skeleton} if name == "skeleton_recall" else {}
        return lambda logits: losses.LOSSES[name](logits, patch.target, valid, **own)

    def weighted_sum(terms, valid):
        return lambda logits: composite_loss.composite_loss(
            logits, patch.target, valid, terms, skeleton=patch.skeleton
        )[0]

    found = {}
    for suffix, valid in (("", patch.valid), (NO_MASK, None)):
        found |= {name + suffix: term(name, valid) for name in losses.LOSSES}
        found[BASE + suffix] = weighted_sum(base, valid)
        found[ALL + suffix] = weighted_sum(terms, valid)
    return found


def peer_losses(patch):
    """{name: function of the logits} of the peers that can be imported."""
    found = {SCIPY: lambda logits: surface_distance_by_scipy(logits, patch.target)}
    try:
        from monai.losses import BoundaryLoss, DiceLoss, HausdorffDTLoss, SoftclDiceLoss
    except ImportError:
        return found
    ignoring = torch.where(patch.valid, patch.target, 2.0)
    smooth = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
    dice, boundary = DiceLoss(sigmoid=True, ignore_index=2, **smooth), BoundaryLoss(sigmoid=True)
    hausdorff = HausdorffDTLoss(sigmoid=True, include_background=True)
    cldice = SoftclDiceLoss(iter_=3, sigmoid=True)
    return found | {
        HAUSDORFF: lambda logits: hausdorff(logits, patch.target),
        BOUNDARY: lambda logits: boundary(logits, patch.target),
        CLDICE: lambda logits: cldice(logits, patch.target),
        DICE: lambda logits: dice(logits, ignoring),
    }


def surface_distance_by_scipy(logits, target, tolerance=2.0):
    """What `losses.surface_distance_loss` computes without a mask, with scipy's transform."""

    def distance(mask):
        exact = ndimage.distance_transform_edt(~mask.cpu().numpy())
        cut = np.minimum(exact / tolerance, 1.0).astype(np.float32)
        return torch.from_numpy(cut).to(target.device)

    probs = torch.sigmoid(logits)
    with torch.no_grad():
        outside, missed = distance(target > 0.5), distance(probs > 0.5) * target
    return (outside * probs + missed * (1.0 - probs)).mean()
