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
    start_homology,
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
    overlapping=False,
    class_weights=None,
    spacing=(1.0, 1.0, 1.0),
    skeleton=None,
    step=0,
    over_ranks=None,
):
    """The weighted sum of terms over scales: (total, components).

    outputs is a list of logits (B, K, ...), finest first, or one tensor; target, valid and skeleton
    (the target's tubed skeleton, for `skeleton_recall`, or None) are of the finest shape, and are
    pooled to the others by `pool_target`. Several channels are classes, as in losses.py. If they
    are overlapping regions, target has as many, and a term is the mean over regions of what it is
    for one foreground. class_weights: of classes or regions, None: all alike. The spacing (z, y, x
    of the finest scale; one, or a list of one for each sample) is multiplied by the pooling factor
    of each scale; soft skeletons are shared by the terms of a scale.

    The scales weigh 1, 1/2, 1/4, ..., for each term divided by the sum over the scales on which it
    acts. step says which terms act: see `acting`.

    over_ranks(weights) gives the mean over ranks of a tensor. With it, the mean over ranks of what
    they get is the loss of one batch of all their samples: see `losses.batch_weight`.

    components holds each term's value, averaged over scales but without the term's own weight,
    `<name>_boundary` where a boundary replaced it, and "total": detached, and on the device.

    ValueError for names and numbers that no term has (the nearest one is offered).
    """
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    check_terms(terms, class_weights, in_training=True)
    acts_now = acting(terms, step)
    depths = {name: terms[name].get("scales") or len(outputs) for name in acts_now}
    how = (target, valid, spacing, skeleton, overlapping, class_weights)
    scales = [_pooled(logits, *how) for logits in outputs[: max(depths.values(), default=1)]]
    parts = {
        name: _parts(scales[: depths[name] if acts else 1], class_weights)
        for name, acts in acts_now.items()
    }
    if over_ranks is not None:
        parts = _weighted(parts, acts_now, terms, over_ranks)

    for name, acts in acts_now.items():
        for _, scale in parts[name] if acts else ():
            scale.start(name, terms[name])
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


def _pooled(logits, target, valid, spacing, skeleton, overlapping, class_weights):
    """The `_Scale`s of these logits, from target, valid, spacing and skeleton of the finest one:
    one, or of overlapping regions one for each."""
    shape, valid = logits.shape[2:], None if valid is None else valid.bool()
    factors = [n / m for n, m in zip(target.shape[2:], shape, strict=True)]
    spacings = spacing if isinstance(spacing[0], tuple) else [spacing]
    spacings = [tuple(s * f for s, f in zip(one, factors, strict=True)) for one in spacings]
    spacing = spacings if len(set(spacings)) > 1 else spacings[0]
    with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
        tube = None if skeleton is None else pool_target(skeleton, valid, shape)[0]
        target, valid = pool_target(target, valid, shape, logits.shape[1])
    if not overlapping:
        return [_Scale(logits, target, valid, spacing, tube, class_weights)]
    pairs = zip(logits.split(1, 1), target.split(1, 1), strict=True)
    return [_Scale(*pair, valid, spacing, tube) for pair in pairs]


def _parts(scales, class_weights):
    """[(share, `_Scale`)] of the scales and regions on which a term acts; shares add up to 1."""
    regions = len(scales[0])
    weights = class_weights if class_weights and regions > 1 else [1.0] * regions
    halves = [0.5**i for i in range(len(scales))]
    return [
        (a / sum(halves) * (b / sum(weights)), scale)
        for a, of_regions in zip(halves, scales, strict=True)
        for b, scale in zip(weights, of_regions, strict=True)
    ]


def _weighted(parts, acts_now, terms, over_ranks):
    """Parts of terms whose shares say, too, how much this batch counts beside those of others."""
    with torch.no_grad():
        weights = torch.stack(
            [
                batch_weight(
                    name if acts_now[name] else "boundary",
                    *scale.arguments,
                    terms[name] | scale.weighting,
                )
                for name, pairs in parts.items()
                for _, scale in pairs
            ]
        )
        means = over_ranks(weights).clamp(min=torch.finfo(weights.dtype).tiny)
        factors = iter((weights / means).unbind())
    return {n: [(share * next(factors), s) for share, s in pairs] for n, pairs in parts.items()}


class _Scale:
    """One scale of deep supervision, and what its terms share."""

    def __init__(self, logits, target, valid, spacing, skeleton, class_weights=None):
        self.arguments = (logits, target, valid)
        self.spacing, self.skeleton = spacing, skeleton
        self.weighting = {} if class_weights is None else {"class_weights": class_weights}
        self.skeletons = functools.cache(functools.partial(soft_skeletons, *self.arguments))
        boundary = functools.partial(boundary_loss, *self.arguments, **self.weighting)
        self.boundary = functools.cache(boundary)

    def start(self, name, settings):
        """Begin what a term computes on the host, while the device goes on with other terms."""
        if FROM_CALLER.get(name) == "homology":
            how = {key: settings[key] for key in ("window", "windows") if key in settings}
            self.homology = start_homology(*self.arguments, **how)

    def term(self, name, settings):
        keywords = {key: value for key, value in settings.items() if key not in DEFAULTS}
        keywords |= self.weighting
        argument = FROM_CALLER.get(name)
        if argument == "skeletons":
            keywords[argument] = self.skeletons(iterations=settings.get("iterations", ITERATIONS))
        elif argument is not None:
            keywords[argument] = getattr(self, argument)
        return LOSSES[name](*self.arguments, **keywords)


def validation_losses(
    probs,
    target,
    valid,
    terms,
    *,
    tile,
    overlapping=False,
    class_weights=None,
    spacing=(1.0, 1.0, 1.0),
    skeleton=None,
):
    """The validation-only terms of one whole volume, {"<name>_loss": value}; {} if there are none.

    probs (K, D, H, W) and target (1 or K, D, H, W) float in [0, 1] or class ids, valid (D, H, W)
    bool, skeleton (D, H, W) or None, the rest: as in `composite_loss`. The mean over tiles of at
    most `tile` voxels (z, y, x) of the volume as it is stored, weighted by their valid voxels. 0
    where no voxel is valid.
    """
    wanted = _validated(terms)
    if not wanted:
        return {}
    check_terms(wanted, class_weights)
    acting = {
        name: term | {"weight": 1.0, "validation_only": False} for name, term in wanted.items()
    }
    sums, weight = dict.fromkeys(wanted, 0.0), 0
    steps = [range(0, n, size) for n, size in zip(valid.shape, tile, strict=True)]
    for corner in itertools.product(*steps):
        box = (..., *(slice(a, a + size) for a, size in zip(corner, tile, strict=True)))
        count = int(valid[box].sum())
        if count:
            p = probs[box].float()
            logits = torch.logit(p, eps=1e-6) if overlapping or len(p) == 1 else p.clamp(1e-6).log()
            _, components = composite_loss(
                logits[None], target[box][None], valid[box][None, None], acting,
                overlapping=overlapping, class_weights=class_weights, spacing=spacing,
                skeleton=None if skeleton is None else skeleton[box][None, None],
            )  # fmt: skip
            for name in wanted:
                sums[name] += count * float(components[name])
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


def check_terms(terms, class_weights=None, *, in_training=False):
    """ValueError in one sentence for the first setting that no term or no sum can have.

    class_weights: None, if terms need not take any; in_training: also if some training step would
    have no term.
    """
    for name, term in terms.items():
        if name not in LOSSES:
            raise ValueError(f"loss term {name!r} is unknown; {_nearest(name, list(LOSSES))}")
        known = [*(LOSSES[name].__kwdefaults__ or {}), *DEFAULTS]
        for key in term:
            if key not in known or key in (FROM_CALLER.get(name), "class_weights"):
                raise ValueError(f"loss term {name!r} has no {key!r}; {_nearest(key, known)}")
        used = term.get("weight") or term.get("validation_only")
        if class_weights and used and "class_weights" not in known:
            raise ValueError(
                f"loss.class_weights: expected terms that take it, got {name}; add the keyword "
                "class_weights to its function in losses.py, or leave one of the two out"
            )
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
