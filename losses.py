"""The loss terms, and their weighted sum over the scales of deep supervision.

Every term is `<name>_loss(logits, target, valid=None, **numbers) -> scalar float32`:

    logits   (B, 1, D, H, W)   any float dtype; the arithmetic is float32 whatever autocast says
    target   (B, 1, D, H, W)   float in [0, 1] (soft at coarse scales) or bool
    valid    (B, 1, D, H, W)   bool, True where the voxel is labelled; None: everywhere

An invalid voxel does not exist for a term: its gradient is exactly 0, and neither its logit nor its
target, whatever they hold, can change the value. Without any valid voxel a term is 0, its gradient
is 0 and backward still works. Nothing here waits for the device.

To add a term: write the function below, decorate it, name it in `LOSSES`.
"""

import difflib
import functools
import inspect

import torch
import torch.nn.functional as F

from distance import truncated_edt

# What composite_loss itself reads of a term's settings; the rest goes to the function.
_SHARED_KEYS = ("weight", "scales")


def _masked_float32(loss):
    """Hand a term float32 logits and target that are 0 where invalid, and a bool `valid`.

    The replacement is a `where` before any arithmetic: a product with a mask would let an infinite
    or NaN content through, in the value and in the gradient.
    """

    @functools.wraps(loss)
    def wrapped(logits, target, valid=None, **numbers):
        shapes = [tuple(x.shape) for x in (logits, target, valid) if x is not None]
        if logits.ndim != 5 or logits.shape[1] != 1 or len(set(shapes)) != 1:
            raise ValueError(
                f"{loss.__name__}: expected logits, target and valid of one shape "
                f"(B, 1, D, H, W), got {', '.join(map(str, shapes))}"
            )
        with torch.autocast(logits.device.type, enabled=False):
            logits, target = logits.float(), target.float()
            if valid is None:
                return loss(logits, target, torch.ones_like(logits, dtype=torch.bool), **numbers)
            valid = valid.bool()
            logits = torch.where(valid, logits, 0.0)
            return loss(logits, torch.where(valid, target, 0.0), valid, **numbers)

    return wrapped


def _positive(name, value):
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


# ---------------------------------------------------------------------------- terms


@_masked_float32
def weighted_bce_loss(logits, target, valid=None, *, positive_weight=1.0):
    """Binary cross-entropy, foreground voxels counted `positive_weight` times.

    A mean over valid voxels with the weights 1 + (positive_weight - 1) * target, divided by their
    sum: the weight moves the balance of the classes and leaves the size of the loss alone, and a
    soft target stays the optimum. In nats, >= 0.
    """
    _positive("positive_weight", positive_weight)
    weights = torch.where(valid, 1.0 + (positive_weight - 1.0) * target, 0.0)
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight=weights, reduction="sum")
    return entropy / weights.sum().clamp(min=1e-12)


@_masked_float32
def soft_dice_loss(logits, target, valid=None, *, smooth=1e-5, batch=False):
    """1 - soft Dice, (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), sums over valid voxels.

    From V-Net (Milletari et al. 2016) with plain instead of squared sums in the denominator. One
    Dice per sample, then the mean over the samples that have a valid voxel; `batch=True`: one Dice
    over all voxels of the batch, steadier where many patches hold little foreground. In [0, 1].

    Empty target: 0 if the prediction is empty too, else close to 1 with next to no gradient (of
    the order of smooth / sum(p)^2): such patches are taught by another term, or by `batch=True`.
    """
    _positive("smooth", smooth)
    probs = torch.where(valid, torch.sigmoid(logits), 0.0)
    axes = (0, 1, 2, 3, 4) if batch else (1, 2, 3, 4)
    overlap = (probs * target).sum(axes)
    dice = (2.0 * overlap + smooth) / (probs.sum(axes) + target.sum(axes) + smooth)
    counts = valid.any() if batch else valid.flatten(1).any(1)
    return torch.where(counts, 1.0 - dice, 0.0).sum() / counts.sum().clamp(min=1)


@_masked_float32
def surface_distance_loss(logits, target, valid=None, *, tolerance=2.0, spacing=(1.0, 1.0, 1.0)):
    """Probability far from the target, and target far from the prediction, up to a tolerance.

    mean(min(d_target / tolerance, 1) * p) + mean(min(d_pred / tolerance, 1) * target * (1 - p)),
    means over valid voxels, in [0, 2]. d_target is the distance to the target's foreground
    (target > 0.5), d_pred that to the prediction's (p > 0.5); both are constants, so the gradient
    lowers p away from the target and raises it on target that the prediction does not reach.
    tolerance and spacing (z, y, x) share one unit. In the spirit of the boundary loss (Kervadec
    et al. 2019), bounded so that no far voxel outweighs the rest.

    An unlabeled voxel is foreground of neither side: a surface that goes on inside the unlabeled
    region attracts nothing, and the labelled voxels beside it are as far as the labelled surface.
    Empty target: the mean of p. Empty prediction: the second term is the mean of target * (1 - p).

    A thin structure averaged to a coarse scale falls under 0.5 and is then empty here: let this
    term act on the finest scales only.
    """
    _positive("tolerance", tolerance)
    with torch.no_grad():
        to_target = truncated_edt(target > 0.5, tolerance, spacing).div_(tolerance)
        # The logit of an invalid voxel is 0, so that it is no foreground here either.
        to_pred = truncated_edt(logits > 0.0, tolerance, spacing).div_(tolerance)
        outside = torch.where(valid, to_target, 0.0)
        missed = to_pred.mul_(target)
    probs = torch.sigmoid(logits)
    return (outside * probs + missed * (1.0 - probs)).sum() / valid.sum().clamp(min=1)


# ---------------------------------------------------------------------------- deep supervision


def pool_target(target, valid, shape):
    """Target and valid of a coarser scale: (B, 1, *shape) float32 in [0, 1], and bool or None.

    A cell's target is the mean over its valid voxels (0 if it has none), so that thin things stay
    visible as a share and unlabeled content stays out. A cell is valid if at least half of its
    voxels are: fewer say too little of it, all would widen the unlabeled region at every scale.
    Cells are equal blocks where `shape` divides the target's, else adaptive pooling's (they
    overlap by up to one voxel). valid None means all, and stays None.
    """
    fine = tuple(target.shape[2:])
    if fine == tuple(shape):
        return target.float(), valid
    if all(n % m == 0 for n, m in zip(fine, shape, strict=True)):
        factor = tuple(n // m for n, m in zip(fine, shape, strict=True))
        pool = functools.partial(F.avg_pool3d, kernel_size=factor)
    else:
        pool = functools.partial(F.adaptive_avg_pool3d, output_size=tuple(shape))
    if valid is None:
        return pool(target.float()), None
    share = pool(valid.float())
    total = pool(torch.where(valid, target.float(), 0.0))
    coarse = torch.where(share > 0, total / share.clamp(min=1e-12), 0.0).clamp_(max=1.0)
    return coarse, share > 0.5 - 1e-6  # averaging may round a half down


def composite_loss(outputs, target, valid, terms, *, scale_weights=None, spacing=(1.0, 1.0, 1.0)):
    """The weighted sum of terms over scales: (total, parts).

    outputs is a list of logits (B, 1, ...), finest first, or one tensor; target and valid are of
    the finest shape, and are pooled to the others by `pool_target`. terms maps a name of `LOSSES`
    to {"weight": w, "scales": n, **numbers}: the term acts on the n finest scales (None or absent:
    all), its numbers go to the function. A term whose function takes `spacing` gets the given one
    (z, y, x of the finest scale) times the pooling factor of each scale.

    scale_weights, one per output, default 1, 1/2, 1/4, ...; for each term they are divided by
    their sum over the scales on which it acts. parts holds each term's value, averaged over scales
    with these weights but without the term's own, and "total" = sum of weight * part: detached
    tensors on the device, since `.item()` would wait for it. A term of weight 0 is not computed
    and is not in parts.

    ValueError for names and numbers that no term has (the nearest one is offered).
    """
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    if scale_weights is None:
        scale_weights = [0.5**i for i in range(len(outputs))]
    _check_terms(terms, scale_weights, len(outputs))
    active = {name: term for name, term in terms.items() if term["weight"] > 0}
    depth = max(_depth(term, outputs) for term in active.values())
    with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
        scales = [pool_target(target, valid, out.shape[2:]) for out in outputs[:depth]]

    total, parts = 0.0, {}
    for name, term in active.items():
        shares = scale_weights[: _depth(term, outputs)]
        part = 0.0
        for share, logits, scale in zip(shares, outputs, scales, strict=False):  # shares end first
            if share > 0:
                value = _at_scale(name, term, logits, *scale, target, spacing)
                part = part + share / sum(shares) * value
        total = total + term["weight"] * part
        parts[name] = part.detach()
    parts["total"] = total.detach()
    return total, parts


def _depth(term, outputs):
    scales = term.get("scales")
    return len(outputs) if scales is None else min(scales, len(outputs))


def _at_scale(name, term, logits, target, valid, finest, spacing):
    numbers = {key: value for key, value in term.items() if key not in _SHARED_KEYS}
    if "spacing" in inspect.signature(LOSSES[name]).parameters:
        shapes = zip(spacing, finest.shape[2:], logits.shape[2:], strict=True)
        numbers.setdefault("spacing", tuple(s * n / m for s, n, m in shapes))
    return LOSSES[name](logits, target, valid, **numbers)


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}? (known: {', '.join(known)})"


def _check_terms(terms, scale_weights, outputs):
    if len(scale_weights) != outputs or min(scale_weights) < 0 or not scale_weights[0] > 0:
        raise ValueError(
            f"scale_weights: expected {outputs} numbers, one per output, none below 0 and the "
            f"first above 0, got {list(scale_weights)}"
        )
    for name, term in terms.items():
        if name not in LOSSES:
            raise ValueError(f"loss term {name!r} is unknown; {_nearest(name, list(LOSSES))}")
        known = list(inspect.signature(LOSSES[name]).parameters)[3:] + list(_SHARED_KEYS)
        for key in term:
            if key not in known:
                raise ValueError(f"loss term {name!r} has no {key!r}; {_nearest(key, known)}")
        if not term.get("weight", -1) >= 0:
            got = term.get("weight")
            raise ValueError(f"loss term {name!r}: expected a weight of 0 or more, got {got}")
        scales = term.get("scales")
        if scales is not None and scales < 1:
            raise ValueError(f"loss term {name!r}: expected scales of 1 or more, got {scales}")
    if not any(term["weight"] > 0 for term in terms.values()):
        raise ValueError("loss: expected at least one term of a weight above 0, got none")


LOSSES = {
    "weighted_bce": weighted_bce_loss,
    "soft_dice": soft_dice_loss,
    "surface_distance": surface_distance_loss,
}
