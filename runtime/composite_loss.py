"""The weighted sum of loss terms: over scales and steps.

    logits = network(image)
    total, components = composite_loss(logits, target, valid, terms, spacing=spacing, step=step)

`terms` maps a name of `losses.LOSSES` to settings; all but these go to the term's function:

    weight           on the steps on which the term acts; 0: it is not computed
    scales           acts on this many scales, from the finest; None: on all
    interval         acts on one step of this many
    off_step         "boundary": `losses.boundary_loss` of the finest scale replaces it on the other
                     steps, with the term's weight; "nothing": no replacement
    validation_only  never in training, see `validation_losses`
"""

import difflib
import functools
import itertools

import torch
import torch.nn.functional as F

from losses import (
    FROM_CALLER,
    ITERATIONS,
    LOSSES,
    batch_weight,
    boundary_loss,
    soft_skeletons,
)

DEFAULTS = {
    "weight": None,
    "scales": None,
    "interval": 1,
    "off_step": "nothing",
    "validation_only": False,
}


def composite_loss(
    outputs,
    target,
    valid,
    terms,
    *,
    scale_weights=None,
    spacing=(1.0, 1.0, 1.0),
    skeleton=None,
    step=0,
    over_ranks=None,
):
    """The weighted sum of terms over scales: (total, components).

    outputs is a list of logits (B, K, ...), finest first, or one tensor; target, valid and skeleton
    (the target's tubed skeleton, for `skeleton_recall`, or None) are of the finest shape, and are
    pooled to the others by `pool_target`. The spacing (z, y, x of the finest scale; one, or a list
    of one for each sample) is multiplied by the pooling factor of each scale; soft skeletons are
    shared by the terms of a scale.

    scale_weights, one per output, default 1, 1/2, 1/4, ...; for each term they are divided by
    their sum over the scales on which it acts. step says which terms act: see `acting`.

    over_ranks(weights) gives the mean over ranks of a tensor. With it, the mean over ranks of what
    they get is the loss of one batch of all their samples: see `losses.batch_weight`.

    components holds each term's value, averaged over scales but without the term's own weight,
    `<name>_boundary` where a boundary replaced it, and "total" = sum of weight * component:
    detached tensors on the device, since `.item()` would wait for it.

    ValueError for names and numbers that no term has (the nearest one is offered).
    """
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    if scale_weights is None:
        scale_weights = [0.5**i for i in range(len(outputs))]
    check_terms(terms, in_training=True)
    _check_scale_weights(scale_weights, len(outputs))
    acts_now = acting(terms, step)
    depths = {name: terms[name].get("scales") or len(outputs) for name in acts_now}
    valid = None if valid is None else valid.bool()
    finest = outputs[: max(depths.values(), default=1)]
    scales = [_pooled(logits, target, valid, spacing, skeleton) for logits in finest]

    parts = {}  # of each term: (its share, scale) of the scales on which it acts
    for name, acts in acts_now.items():
        shares = scale_weights[: depths[name] if acts else 1]
        pairs = zip(shares, scales, strict=False)  # shares end first
        parts[name] = [(share / sum(shares), scale) for share, scale in pairs if share > 0]
    if over_ranks is not None:
        parts = _weighted(parts, acts_now, terms, over_ranks)

    total, components = 0.0, {}
    for name, acts in acts_now.items():
        component = 0.0
        for share, scale in parts[name]:
            value = scale.term(name, terms[name]) if acts else scale.boundary()
            component = component + share * value
        total = total + terms[name]["weight"] * component
        components[name if acts else f"{name}_boundary"] = component.detach()
    components["total"] = total.detach()
    return total, components


def acting(terms, step):
    """The terms that count in a training step: {name: True if it acts, False if a boundary does}.

    A term of interval n acts where (step + phase) is a multiple of n. Each such term has a phase
    of its own: no two of them act in one step if all intervals are multiples of one number, and
    there are no more such terms than that. A term of weight 0, a validation-only one, and one that
    nothing replaces between its steps, are left out.
    """
    trained = _trained(terms)
    rare = [name for name, term in trained.items() if term["interval"] > 1]
    result = {}
    for name, term in trained.items():
        phase = rare.index(name) if name in rare else 0
        acts = (step + phase) % term["interval"] == 0
        if acts or term["off_step"] == "boundary":
            result[name] = acts
    return result


def _trained(terms):
    terms = {name: {**DEFAULTS, **term} for name, term in terms.items()}
    return {n: t for n, t in terms.items() if t["weight"] > 0 and not t["validation_only"]}


def _validated(terms):
    return {name: term for name, term in terms.items() if term.get("validation_only")}


def takes_skeleton(terms, *, validation_only=False):
    """Whether training with these terms, or validation alone, needs the target's tubed skeleton."""
    used = _validated(terms) if validation_only else _trained(terms)
    return any(FROM_CALLER.get(name) == "skeleton" for name in used)


def _pooled(logits, target, valid, spacing, skeleton):
    """The `_Scale` of these logits, from target, valid, spacing and skeleton of the finest one."""
    shape = logits.shape[2:]
    factors = [n / m for n, m in zip(target.shape[2:], shape, strict=True)]
    spacings = spacing if isinstance(spacing[0], tuple) else [spacing]
    spacings = [tuple(s * f for s, f in zip(one, factors, strict=True)) for one in spacings]
    spacing = spacings if len(set(spacings)) > 1 else spacings[0]
    with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
        pooled = pool_target(target, valid, shape, logits.shape[1])
        tube = None if skeleton is None else pool_target(skeleton, valid, shape)[0]
    return _Scale(logits, *pooled, spacing, tube)


def _weighted(parts, acts_now, terms, over_ranks):
    """Parts of terms whose shares say, too, how much this batch counts beside those of others."""
    with torch.no_grad():
        weights = torch.stack(
            [
                batch_weight(name if acts_now[name] else "boundary", *scale.arguments, terms[name])
                for name, pairs in parts.items()
                for _, scale in pairs
            ]
        )
        means = over_ranks(weights).clamp(min=torch.finfo(weights.dtype).tiny)
        factors = iter((weights / means).unbind())
    return {n: [(share * next(factors), s) for share, s in pairs] for n, pairs in parts.items()}


class _Scale:
    """One scale of deep supervision, and what its terms share."""

    def __init__(self, logits, target, valid, spacing, skeleton):
        self.arguments = (logits, target, valid)
        self.spacing, self.skeleton = spacing, skeleton
        self.skeletons = functools.cache(functools.partial(soft_skeletons, *self.arguments))
        self.boundary = functools.cache(functools.partial(boundary_loss, *self.arguments))

    def term(self, name, settings):
        keywords = {key: value for key, value in settings.items() if key not in DEFAULTS}
        argument = FROM_CALLER.get(name)
        if argument == "skeletons":
            keywords[argument] = self.skeletons(iterations=settings.get("iterations", ITERATIONS))
        elif argument is not None:
            keywords[argument] = getattr(self, argument)
        return LOSSES[name](*self.arguments, **keywords)


def validation_losses(probs, target, valid, terms, *, tile, spacing=(1.0, 1.0, 1.0), skeleton=None):
    """The validation-only terms of one whole volume, {"<name>_loss": value}; {} if there are none.

    probs, target (D, H, W) float in [0, 1], valid (D, H, W) bool, skeleton (D, H, W) or None: as in
    `composite_loss`. The mean over tiles of at most `tile` voxels (z, y, x) of the volume as it is
    stored, weighted by their valid voxels. 0 where no voxel is valid.
    """
    wanted = _validated(terms)
    if not wanted:
        return {}
    check_terms(wanted)
    sums, weight = dict.fromkeys(wanted, 0.0), 0
    steps = [range(0, n, size) for n, size in zip(probs.shape, tile, strict=True)]
    for corner in itertools.product(*steps):
        box = tuple(slice(a, a + size) for a, size in zip(corner, tile, strict=True))
        count = int(valid[box].sum())
        if count:
            logits = torch.logit(probs[box].float(), eps=1e-6)
            tube = None if skeleton is None else skeleton[box][None, None]
            arguments = (x[None, None] for x in (logits, target[box], valid[box]))
            scale = _Scale(*arguments, spacing, tube)
            for name, term in wanted.items():
                sums[name] += count * float(scale.term(name, term))
            weight += count
    return {f"{name}_loss": value / max(weight, 1) for name, value in sums.items()}


def pool_target(target, valid, shape, classes=1):
    """Target and valid of a coarser scale: (B, 1 or K, *shape) float32 in [0, 1], and bool or None.

    A cell's target is the mean over its valid voxels (0 if it has none), so that thin things stay
    visible as a share. A cell is valid if at least half of its voxels are: to ask for all would
    widen the unlabeled region at every scale. Cells are equal blocks where `shape` divides the
    target's, else adaptive pooling's (they overlap by up to one voxel). valid None means all, and
    stays None. Class ids (B, 1, ...) of more than one of `classes` become shares (B, K, ...).
    """
    if target.shape[1] < classes:
        ids = torch.arange(classes, device=target.device)
        target = target == ids.view(1, -1, 1, 1, 1)
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


def check_terms(terms, *, in_training=False):
    """ValueError in one sentence for the first setting that no term or no sum can have.

    in_training: also if some training step would have no term.
    """
    for name, term in terms.items():
        if name not in LOSSES:
            raise ValueError(f"loss term {name!r} is unknown; {_nearest(name, list(LOSSES))}")
        known = [*(LOSSES[name].__kwdefaults__ or {}), *DEFAULTS]
        for key in term:
            if key not in known or key == FROM_CALLER.get(name):
                raise ValueError(f"loss term {name!r} has no {key!r}; {_nearest(key, known)}")
        fault = _fault({**DEFAULTS, **term})
        if fault:
            raise ValueError(f"loss term {name!r}: expected {fault}")
    trained = _trained(terms).values() if in_training else ()
    if in_training and not any(t["interval"] == 1 or t["off_step"] == "boundary" for t in trained):
        raise ValueError(
            "loss: expected at least one term with a weight above 0 that acts on every step "
            "(interval 1, or off_step: boundary), got none"
        )


def _fault(term):
    """What was expected of a term's settings and what is there, or None."""
    if term["weight"] is None or not term["weight"] >= 0:
        return f"a weight of 0 or more, got {term['weight']}"
    for key in ("scales", "interval"):
        if term[key] is not None and term[key] < 1:
            return f"{key} of 1 or more, got {term[key]}"
    if term["off_step"] not in ("nothing", "boundary"):
        return f"off_step to be nothing or boundary, got {term['off_step']!r}"
    if term["off_step"] == "boundary" and term["interval"] == 1:
        return "an interval above 1 with off_step: boundary, got 1, and then no step lies between"
    if term["validation_only"] and term["interval"] > 1:
        return f"no interval with validation_only, which is never trained, got {term['interval']}"
    return None


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}? (known: {', '.join(known)})"


def _check_scale_weights(scale_weights, outputs):
    if len(scale_weights) != outputs or min(scale_weights) < 0 or not scale_weights[0] > 0:
        raise ValueError(
            f"scale_weights: expected {outputs} numbers, one per output, none below 0 and the "
            f"first above 0, got {list(scale_weights)}"
        )
