"""The loss terms.

Every term is `<name>_loss(logits, target, valid=None, *, ...) -> scalar float32`:

    logits   (B, 1, D, H, W)   any float dtype; the arithmetic is float32
    target   (B, 1, D, H, W)   float in [0, 1] (soft at coarse scales) or bool
    valid    (B, 1, D, H, W)   bool, True where the voxel is labeled; None: everywhere

One channel of logits is a foreground against the rest, by a sigmoid. K > 1 channels are classes by
a softmax, 0 the background; target is then (B, 1, ...) class ids (K and above: of no class) or
(B, K, ...) shares, and a term is the mean over the foreground classes, with `class_weights` (one
number for each of them, None: all alike) the weighted mean.

In an invalid voxel the gradient is exactly 0, and neither its logit nor its target, whatever they
hold, can change the value. Without any valid voxel a term is 0, its gradient is 0 and backward
still works. Only `toploss_loss`, and distances by another backend than `native`, wait for the
device; `start_homology` lets other terms go on meanwhile. Nothing is changed in place.

To add a term: write the function below, name it in `LOSSES`, and its settings in settings.py. The
file needs topology/ beside it and nothing else of this project.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from topology.distance import edt, truncated_edt
from topology.neighbors import worst_neighbors
from topology.persistence import boxes_of, losses_of_plans, plan
from topology.soft_skeleton import soft_skeleton

NEVER = -1e4  # a logit whose sigmoid is 0 in float32, and its slope too
ITERATIONS = 3  # of a soft skeleton


def _masked(logits, target, valid, fill=0.0):
    """logits and target as float32 (B, K, D, H, W), `fill` and 0 where invalid; valid as bool.

    By `where` before any arithmetic: a product with a mask would let infinity and NaN through.
    """
    given = [x for x in (logits, target, valid) if x is not None]
    places = {(len(x), *x.shape[2:]) for x in given if x.ndim == 5}
    fits = len(places) == 1 and all(x.ndim == 5 for x in given)
    fits = fits and target.shape[1] in (1, logits.shape[1])
    if not fits or (valid is not None and valid.shape[1] != 1):
        raise ValueError(
            "expected logits, target and valid of one shape (B, 1, D, H, W), or logits (B, K, ...) "
            f"of K classes, got {', '.join(str(tuple(x.shape)) for x in given)}"
        )
    if target.shape[1] < logits.shape[1]:
        classes = torch.arange(logits.shape[1], device=target.device)
        target = target == classes.view(1, -1, 1, 1, 1)
    logits, target = logits.float(), target.float()
    if valid is None:
        return logits, target, torch.ones_like(logits[:, :1], dtype=torch.bool)
    valid = valid.bool()
    return torch.where(valid, logits, fill), torch.where(valid, target, 0.0), valid


def _foreground(logits, target, valid):
    """(probs, target, valid) of the foreground classes, each (B, C, D, H, W), 0 where invalid."""
    if logits.shape[1] == 1:
        logits, target, valid = _masked(logits, target, valid, fill=NEVER)
        return torch.sigmoid(logits), target, valid
    logits, target, valid = _masked(logits, target, valid)
    probs = torch.where(valid, torch.softmax(logits, 1)[:, 1:], 0.0)
    return probs, target[:, 1:], valid.expand_as(probs)


def _weighted(values, class_weights):
    """Values (B, C, ...) times the weights of the C classes, scaled so that their mean is 1."""
    if class_weights is None:
        return values
    if len(class_weights) != values.shape[1] or not min(class_weights) > 0:
        raise ValueError(
            f"class_weights: expected {values.shape[1]} positive numbers, one for each foreground "
            f"class, got {list(class_weights)}"
        )
    weights = _class_weights(tuple(class_weights), values.device)
    return values * weights.view(-1, *[1] * (values.ndim - 2))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # it is kept for training too
def _class_weights(class_weights, device):
    """Kept, for a copy to the device would wait for it in every step."""
    weights = torch.tensor(class_weights, dtype=torch.float32, device=device)
    return weights / weights.mean()


def _mean_per_sample(values, valid, class_weights=None):
    """The mean of (B, C) values over the samples that have a valid voxel; 0 if none has."""
    labeled = valid.flatten(2).any(2)
    values = torch.where(labeled, _weighted(values, class_weights), 0.0)
    return values.sum() / labeled.sum().clamp(min=1)


def _positive(name, value):
    if value is None or not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def weighted_bce_loss(logits, target, valid=None, *, positive_weight=1.0, class_weights=None):
    """Binary cross-entropy, foreground voxels counted `positive_weight` times.

    A mean over valid voxels with the weights 1 + (positive_weight - 1) * target, divided by their
    sum: the size of the loss stays, and a soft target stays the optimum. In nats, >= 0. Of K
    classes: their cross-entropy, in which a voxel of a foreground class counts `positive_weight`
    times the weight of its class, whose mean over classes is 1.
    """
    _positive("positive_weight", positive_weight)
    logits, target, valid = _masked(logits, target, valid)
    if logits.shape[1] == 1:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        entropy = -(target * torch.log_softmax(logits, 1)).sum(1, keepdim=True)
    extra = _extra_weights(target, positive_weight, class_weights)
    weights = torch.where(valid, 1.0 + extra, 0.0)
    return (entropy * weights).sum() / weights.sum().clamp(min=1e-12)


def _extra_weights(target, positive_weight=1.0, class_weights=None):
    """By how much each voxel counts more than 1 in `weighted_bce_loss`, (B, 1, D, H, W)."""
    foreground = target[:, -max(1, target.shape[1] - 1) :]  # all but the background, if it is there
    if class_weights is None:
        return (positive_weight - 1.0) * foreground.sum(1, keepdim=True)
    return (positive_weight * _weighted(foreground, class_weights) - foreground).sum(
        1, keepdim=True
    )


def soft_dice_loss(logits, target, valid=None, *, smooth=1e-5, batch=False, class_weights=None):
    """1 - soft Dice, (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), sums over valid voxels.

    V-Net's (Milletari et al. 2016) with plain instead of squared sums in the denominator. The mean
    over samples with a valid voxel; `batch=True`: one Dice over all voxels of the batch, steadier
    where many patches hold little foreground. In [0, 1].

    Empty target: 0 if the prediction is empty too, else close to 1 with next to no gradient
    (smooth / sum(p)^2): such patches need another term, or `batch=True`.
    """
    _positive("smooth", smooth)
    probs, target, valid = _foreground(logits, target, valid)
    if batch:
        probs, target, valid = (x.movedim(1, 0).flatten(1, 2)[None] for x in (probs, target, valid))
    return _mean_per_sample(1.0 - _dice(probs, target, smooth), valid, class_weights)


def _dice(probs, target, smooth=1e-5):
    overlap, p, t = (x.flatten(2).sum(2) for x in (probs * target, probs, target))
    return (2.0 * overlap + smooth) / (p + t + smooth)


def worst_neighbor_loss(logits, target, valid=None, *, class_weights=None):
    """Cross-entropy and soft Dice, half each, of logits that `worst_neighbors` has replaced.

    One wrong voxel makes its whole neighborhood wrong, so that a gap or a speck of one voxel counts
    as much as what is around it. After SCNP (2026, arXiv 2603.18671), there in place of all other
    terms. The mean over samples with a valid voxel; >= 0.
    """
    logits, target, valid = _masked(logits, target, valid)
    if (classes := logits.shape[1]) > 1:  # each against the rest
        rest = [torch.cat((logits[:, :c], logits[:, c + 1 :]), 1) for c in range(1, classes)]
        rest = torch.stack([others.logsumexp(1) for others in rest], 1)
        logits, target, valid = logits[:, 1:] - rest, target[:, 1:], valid.expand_as(rest)
    worst = worst_neighbors(logits, target, valid)
    entropy = F.binary_cross_entropy_with_logits(worst, target, reduction="none")
    entropy = torch.where(valid, entropy, 0.0).flatten(2).sum(2) / valid.flatten(2).sum(2).clamp(1)
    loss = entropy + 1.0 - _dice(torch.where(valid, worst.sigmoid(), 0.0), target)
    return 0.5 * _mean_per_sample(loss, valid, class_weights)


def soft_skeletons(logits, target, valid=None, *, iterations=ITERATIONS):
    """The soft skeletons of the prediction and of the target, without gradient; (B, C, D, H, W)."""
    probs, target, valid = _foreground(logits, target, valid)
    with torch.no_grad():
        target_skeleton = soft_skeleton(target, iterations, valid)
    return soft_skeleton(probs, iterations, valid), target_skeleton


def cldice_loss(
    logits, target, valid=None, *, iterations=ITERATIONS, smooth=1.0, skeletons=None,
    class_weights=None,
):  # fmt: skip
    """1 - soft centreline Dice (clDice, Shit et al. 2021), per sample.

    The harmonic mean of the share of the prediction's skeleton that lies in the target, and of the
    target's skeleton that lies in the prediction: (sum(s_p t) + smooth) / (sum(s_p) + smooth) and
    (sum(s_t p) + smooth) / (sum(s_t) + smooth), sums over valid voxels. In [0, 1]; `smooth` is in
    voxels. `iterations`: at least the radius of the thickest structure, in voxels. skeletons: of
    `soft_skeletons` with these iterations; None: computed here.

    Empty target: 0 if the prediction has no skeleton (it is empty, or thicker than the iterations
    can erode), else close to 1 with little gradient.
    """
    _positive("smooth", smooth)
    if skeletons is None:
        skeletons = soft_skeletons(logits, target, valid, iterations=iterations)
    probs, target, valid = _foreground(logits, target, valid)
    precision = _share_inside(skeletons[0], target, smooth)
    sensitivity = _share_inside(skeletons[1], probs, smooth)
    cldice = 2.0 * precision * sensitivity / (precision + sensitivity)
    return _mean_per_sample(1.0 - cldice, valid, class_weights)


def _share_inside(skeleton, mask, smooth):
    """(B, C): the share of a skeleton that lies in a mask."""
    inside, whole = (skeleton * mask).flatten(2).sum(2), skeleton.flatten(2).sum(2)
    return (inside + smooth) / (whole + smooth)


def morph_skeleton_loss(
    logits, target, valid=None, *, iterations=ITERATIONS, skeletons=None, class_weights=None
):
    """Mean over valid voxels of |soft skeleton of the prediction - that of the target|, in [0, 1].

    iterations, skeletons: as in `cldice_loss`. The value is small, since few voxels are skeleton.
    Empty target: the mean of the prediction's skeleton.
    """
    if skeletons is None:
        skeletons = soft_skeletons(logits, target, valid, iterations=iterations)
    _, _, valid = _foreground(logits, target, valid)
    differences = _weighted((skeletons[0] - skeletons[1]).abs(), class_weights)
    return differences.sum() / valid.sum().clamp(min=1)


def skeleton_recall_loss(
    logits, target, valid=None, *, smooth=1.0, skeleton=None, class_weights=None
):
    """1 - the share of the target's tubed skeleton that is predicted, per sample, in [0, 1].

    (sum(p k) + smooth) / (sum(k) + smooth) over valid voxels (Kirchhoff et al. 2024). skeleton:
    k, (B, 1, D, H, W), as prepare.py makes it, cut to the target of each class; None: the target's
    soft skeleton, dilated by two voxels and cut to the target. Empty skeleton: 0. It rewards recall
    alone: use it beside a term that punishes too much foreground.
    """
    _positive("smooth", smooth)
    probs, target, valid = _foreground(logits, target, valid)
    with torch.no_grad():
        if skeleton is None:
            thin = soft_skeleton(target, ITERATIONS, valid)
            tube = F.max_pool3d(thin, 5, stride=1, padding=2) * target
        else:
            if skeleton.shape != (len(logits), 1, *logits.shape[2:]):
                raise ValueError(
                    f"skeleton: expected (B, 1, D, H, W) as of the logits {tuple(logits.shape)}, "
                    f"got {tuple(skeleton.shape)}"
                )
            tube = torch.minimum(torch.where(valid, skeleton.float(), 0.0), target)
    return _mean_per_sample(1.0 - _share_inside(tube, probs, smooth), valid, class_weights)


def surface_distance_loss(
    logits, target, valid=None, *, tolerance=2.0, spacing=(1.0, 1.0, 1.0), backend="native",
    class_weights=None,
):  # fmt: skip
    """Probability far from the target, and target far from the prediction, up to a tolerance.

    mean(min(d_target / tolerance, 1) * p) + mean(min(d_pred / tolerance, 1) * target * (1 - p)),
    means over valid voxels, in [0, 2]. d_target is the distance to the target's foreground
    (target > 0.5), d_pred that to the prediction's (p > 0.5); both are constants, so the gradient
    lowers p away from the target and raises it on target that the prediction does not reach.
    tolerance and spacing (z, y, x; one, or a list of one for each sample) share one unit. backend:
    see `topology.distance.edt`; native needs the truncated distance only. After the boundary loss
    (Kervadec et al. 2019), bounded so that no far voxel outweighs the rest.

    An unlabeled voxel is foreground of neither: a surface inside the unlabeled region attracts
    nothing. Empty target: the mean of p. Empty prediction: the second term is the mean of
    target * (1 - p). A thin structure averaged to a coarse scale falls under 0.5 and is then empty
    here: let this term act on the finest scales only.
    """
    _positive("tolerance", tolerance)
    probs, target, valid = _foreground(logits, target, valid)

    def distance(mask):
        if isinstance(spacing[0], tuple):
            parts = zip(mask.split(1), spacing, strict=True)
            return torch.cat([distance_at(part, one) for part, one in parts])
        return distance_at(mask, spacing)

    def distance_at(mask, spacing):
        if backend == "native":
            return truncated_edt(mask, tolerance, spacing)
        return edt(mask, spacing, backend).clamp_(max=tolerance)

    with torch.no_grad():
        missed = distance(probs > 0.5).mul_(target)
        slope = distance(target > 0.5).sub_(missed)
        slope, missed = _weighted(slope, class_weights), _weighted(missed, class_weights)
    # Where invalid, target and probs are 0, and so is the gradient of probs.
    total = (slope * probs).sum() + missed.sum()
    return total / (tolerance * valid.count_nonzero().clamp(min=1))


def boundary_loss(logits, target, valid=None, *, smooth=1.0, class_weights=None):
    """How much the boundaries differ: sum |dp - dt| / (sum |dp| + sum |dt| + smooth), in [0, 1].

    d is the difference of two valid neighbours along an axis, so that the edge of the unlabeled
    region is no boundary; sums over the three axes, per sample. Cheap: it can replace an expensive
    term on the steps between those on which that acts.
    """
    _positive("smooth", smooth)
    probs, target, valid = _foreground(logits, target, valid)
    differs = total = 0.0
    for axis in (2, 3, 4):
        n = probs.shape[axis] - 1
        both = valid.narrow(axis, 0, n) & valid.narrow(axis, 1, n)
        dp, dt = (torch.where(both, x.diff(dim=axis), 0.0) for x in (probs, target))
        differs = differs + (dp - dt).abs().flatten(2).sum(2)
        total = total + (dp.abs() + dt.abs()).flatten(2).sum(2)
    return _mean_per_sample(differs / (total + smooth), valid, class_weights)


def toploss_loss(
    logits, target, valid=None, *, window=(48, 48, 48), windows=2, homology=None,
    class_weights=None,
):  # fmt: skip
    """Persistent homology of the probabilities against the target's Betti numbers, in [0, 1.5].

    The mean of `losses_of_plans` (Hu et al. 2019) over windows of the batch. Windows of `window`
    voxels (z, y, x; less where the volume is smaller) cover each volume; those `windows` of the
    whole batch, and of all classes, with the largest sum of |p - target| are used, each with the
    weight of its class. Components, loops and hollows that the target lacks are removed, those that
    the prediction lacks are restored, through the few critical voxels that decide them; see
    persistence.py for unlabeled voxels. homology: of `start_homology` with the same arguments;
    None: computed here.

    Without an error in any window: 0. On the CPU: about 0.1 s for 48 voxels cubed.
    """
    if homology is None:
        homology = start_homology(logits, target, valid, window=window, windows=windows)
    probs, _, _ = _foreground(logits, target, valid)
    weights = _weighted(torch.ones_like(probs[:, :, 0, 0, 0]), class_weights).flatten()
    probs = probs.flatten(0, 1)
    worst, plans = homology.result()
    if not worst:
        return probs.sum() * 0.0
    losses = losses_of_plans([probs[box] for box in worst], plans)
    return (losses * torch.stack([weights[number] for number, *_ in worst])).mean()


@torch.no_grad()
def start_homology(logits, target, valid=None, *, window=(48, 48, 48), windows=2):
    """Begin what `toploss_loss` computes on the host, in threads; a Future for its `homology`."""
    if windows < 1 or len(window) != 3 or min(window) < 1:
        raise ValueError(
            f"toploss: expected windows >= 1 and a window of three sizes >= 1, "
            f"got {windows} and {window}"
        )
    probs, target, valid = (x.flatten(0, 1) for x in _foreground(logits, target, valid))
    boxes = [(i, *box) for i in range(len(probs)) for box in boxes_of(probs.shape[1:], window)]
    errors = (probs - target).abs()
    sums = torch.stack([errors[box].sum() for box in boxes])
    sums = sums.nan_to_num(nan=math.inf)  # NaN must reach the loss
    # Whole volumes: which windows are needed is known on the device alone so far.
    copies = [x.to("cpu", non_blocking=True) for x in (sums, probs, target > 0.5, valid)]
    copied = torch.cuda.current_stream(probs.device).record_event() if probs.is_cuda else None
    threads = torch.get_num_threads()

    def homology():
        if copied:
            copied.synchronize()
        sums, *volumes = (x.numpy() for x in copies)
        worst = sorted(range(len(boxes)), key=lambda i: -sums[i])[:windows]
        worst = [boxes[i] for i in worst if sums[i] > 0]
        return worst, plan([[x[box] for x in volumes] for box in worst], threads)

    thread = ThreadPoolExecutor(1)
    future = thread.submit(homology)
    thread.shutdown(wait=False)  # it ends with its work
    return future


LOSSES = {
    "weighted_bce": weighted_bce_loss,
    "soft_dice": soft_dice_loss,
    "cldice": cldice_loss,
    "morph_skeleton": morph_skeleton_loss,
    "surface_distance": surface_distance_loss,
    "skeleton_recall": skeleton_recall_loss,
    "toploss": toploss_loss,
    "worst_neighbor": worst_neighbor_loss,
}

PER_VOXEL = ("weighted_bce", "morph_skeleton", "surface_distance")  # means over valid voxels


def batch_weight(name, logits, target, valid, settings):
    """What a batch counts for a term if the mean over batches is to be that of one batch of all.

    A scalar tensor: its valid voxels for a term that is a mean over these, with their weights in
    the case of `weighted_bce`; else the samples that have a valid voxel. Then exact, but for
    `toploss` and `soft_dice` with `batch`, which are no mean of what they are on parts of a batch.
    """
    _, target, valid = _masked(logits, target, valid)
    if name not in PER_VOXEL:
        return valid.flatten(1).any(1).sum().float()
    if name != "weighted_bce":
        return valid.sum().float()
    how = {key: settings[key] for key in ("positive_weight", "class_weights") if key in settings}
    return valid.sum() + _extra_weights(target, **how).sum()


# The keyword argument that comes from the caller and not from the settings, where there is one.
FROM_CALLER = {
    "cldice": "skeletons",
    "morph_skeleton": "skeletons",
    "surface_distance": "spacing",
    "skeleton_recall": "skeleton",
    "toploss": "homology",
}
