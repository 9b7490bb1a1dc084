"""Each logit replaced by the worst among its neighbors of the same class.

Only torch is needed.
"""

import math

import torch
import torch.nn.functional as F


def worst_neighbors(logits, target, valid):
    """The logit that is most wrong among a voxel and its 26 neighbors of the same class.

    logits of a foreground against the rest, target (foreground from 0.5 on) and valid (bool), each
    (B, C, D, H, W); returns that shape: the smallest in the foreground, the largest in the rest.
    Invalid voxels keep theirs and are nobody's neighbor. The gradient goes to the one voxel that a
    logit comes from.
    """
    with torch.no_grad():
        foreground = target >= 0.5
        wrong = torch.where(foreground, -logits, logits)
        place = torch.arange(logits[0, 0].numel(), device=logits.device)
        place = place.view(logits.shape[2:]).expand_as(logits)
        for mask in (valid & foreground, valid & ~foreground):
            _, worst = F.max_pool3d(wrong.where(mask, -math.inf), 3, 1, 1, return_indices=True)
            place = torch.where(mask, worst, place)
    return logits.flatten(2).gather(2, place.flatten(2)).view_as(logits)
