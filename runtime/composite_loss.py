"""The weighted sum of loss terms: over scales, steps and ranks.

    total, parts = composite_loss(network(image), target, valid, terms, spacing=spacing, step=step)

`terms` maps a name of `losses.LOSSES` to plain settings: {"weight": w, **of the sum, **of the term}

    weight           on the steps on which the term acts; 0: it is not computed
    scales           acts on this many scales, from the finest; None: on all
    interval         acts on one step of this many
    off_step         "boundary": `losses.boundary_loss` of the finest scale stands in on the other
                     steps, with the term's weight; "nothing": they go without
    validation_only  never in training, see `validation_losses`

and everything else goes to the term's function.
"""

import difflib
import functools
import inspect
import itertools

import torch
import torch.nn.functional as F

from losses import LOSSES, boundary_loss, soft_skeletons

# What the sum itself reads of a term's settings, with its defaults.
OF_THE_SUM = {
    "weight": None,
    "scales": None,
    "interval": 1,
    "off_step": "nothing",
    "validation_only": False,
}
# What the sum hands to the terms that take it.
SHARED = ("skeletons", "skeleton", "spacing")


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
    rank=0,
):
    """The weighted sum of terms over scales: (total, parts).

    outputs is a list of logits (B, K, ...), finest first, or one tensor; target, valid and skeleton
    (the target's tubed skeleton, for `skeleton_recall`, or None) are of the finest shape, and are
    pooled to the others by `pool_target`. Terms that take `spacing` get the given one (z, y, x of
    the finest scale) times the pooling factor of each scale; soft skeletons are shared.

    scale_weights, one per output, default 1, 1/2, 1/4, ...; for each term they are divided by
    their sum over the scales on which it acts. step and rank say which terms act: see `acting`.

    parts holds each term's value, averaged over scales with these weights but without the term's
    own, `<name>_boundary` where a boundary stood in, and "total" = sum of weight * part: detached
    tensors on the device, since `.item()` would wait for it.

    ValueError for names and numbers that no term has (the nearest one is offered).
    """
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    if scale_weights is None:
        scale_weights = [0.5**i for i in range(len(outputs))]
    check_terms(terms, in_training=True)
    _check_scale_weights(scale_weights, len(outputs))
    now = acting(terms, step, rank)
    depth = max((_depth(terms[name], outputs) for name in now), default=1)
    valid = None if valid is None else valid.bool()
    scales = _scales(outputs[:depth], target, valid, spacing, skeleton)

    total, parts = 0.0, {}
    for name, acts in now.items():
        shares = scale_weights[: _depth(terms[name], outputs) if acts else 1]
        part = 0.0
        for share, scale in zip(shares, scales, strict=False):  # shares end first
            if share > 0:
                value = scale.term(name, terms[name]) if acts else scale.boundary()
                part = part + share / sum(shares) * value
        total = total + terms[name]["weight"] * part
        parts[name if acts else f"{name}_boundary"] = part.detach()
    parts["total"] = total.detach()
    return total, parts


def acting(terms, step, rank=0):
    """The terms that count in a training step: {name: True if it acts, False if a boundary does}.

    A term of interval n acts where (step + phase) is a multiple of n. Each rank and each such term
    has a phase of its own: no two of them act in one step if all intervals are multiples of one
    number, and that is at least terms times ranks. A term of weight 0, a validation-only one, and
    one between its steps that nothing stands in for, are left out.
    """
    training = _trained(terms)
    rare = [name for name, term in training.items() if term["interval"] > 1]
    phases = {name: rank * len(rare) + i for i, name in enumerate(rare)}
    acts = {
        name: (step + phases.get(name, 0)) % term["interval"] == 0
        for name, term in training.items()
    }
    return {n: on for n, on in acts.items() if on or training[n]["off_step"] == "boundary"}


def _scales(outputs, target, valid, spacing, skeleton):
    scales = []
    for logits in outputs:
        shape = logits.shape[2:]
        factors = (n / m for n, m in zip(target.shape[2:], shape, strict=True))
        at = tuple(s * factor for s, factor in zip(spacing, factors, strict=True))
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            labels = pool_target(target, valid, shape, logits.shape[1])
            tube = None if skeleton is None else pool_target(skeleton, valid, shape)[0]
        scales.append(_Scale(logits, *labels, at, tube))
    return scales


def _trained(terms):
    return {
        name: {**OF_THE_SUM, **term}
        for name, term in terms.items()
        if term["weight"] > 0 and not term.get("validation_only")
    }


def _validated(terms):
    return {name: {**OF_THE_SUM, **t} for name, t in terms.items() if t.get("validation_only")}


def takes_skeleton(terms, *, validation_only=False):
    """Whether training with these terms, or validation alone, needs the target's tubed skeleton."""
    names = _validated(terms) if validation_only else _trained(terms)
    return any("skeleton" in inspect.signature(LOSSES[name]).parameters for name in names)


class _Scale:
    """One scale of deep supervision, and what its terms share."""

    def __init__(self, logits, target, valid, spacing, skeleton):
        self.arguments = (logits, target, valid)
        self.shared = {"spacing": spacing, "skeleton": skeleton}
        self.skeletons, self.boundary_value = {}, None

    def term(self, name, term):
        takes = inspect.signature(LOSSES[name]).parameters
        numbers = {key: value for key, value in term.items() if key not in OF_THE_SUM}
        numbers |= {key: value for key, value in self.shared.items() if key in takes}
        if "skeletons" in takes:
            iterations = term.get("iterations", takes["iterations"].default)
            if iterations not in self.skeletons:
                made = soft_skeletons(*self.arguments, iterations=iterations)
                self.skeletons[iterations] = made
            numbers["skeletons"] = self.skeletons[iterations]
        return LOSSES[name](*self.arguments, **numbers)

    def boundary(self):
        if self.boundary_value is None:
            self.boundary_value = boundary_loss(*self.arguments)
        return self.boundary_value


def validation_losses(probs, target, valid, terms, *, tile, spacing=(1.0, 1.0, 1.0), skeleton=None):
    """The validation-only terms of one whole volume, {"<name>_loss": value}; {} if there are none.

    probs, target (D, H, W) float in [0, 1], valid (D, H, W) bool, skeleton (D, H, W) or None: as in
    `composite_loss`. The terms see tiles of at most `tile` voxels (z, y, x) of the volume as it is
    stored, whatever the spacing of patches is; the mean over tiles, each counted by its valid
    voxels. 0 where no voxel is valid.
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


# ---------------------------------------------------------------------------- scales


def pool_target(target, valid, shape, classes=1):
    """Target and valid of a coarser scale: (B, 1 or K, *shape) float32 in [0, 1], and bool or None.

    A cell's target is the mean over its valid voxels (0 if it has none), so that thin things stay
    visible as a share and unlabeled content stays out. A cell is valid if at least half of its
    voxels are: fewer say too little of it, all would widen the unlabeled region at every scale.
    Cells are equal blocks where `shape` divides the target's, else adaptive pooling's (they
    overlap by up to one voxel). valid None means all, and stays None. Class ids (B, 1, ...) of
    more than one of `classes` become shares (B, K, ...).
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


def _depth(term, outputs):
    scales = term.get("scales")
    return len(outputs) if scales is None else min(scales, len(outputs))


# ---------------------------------------------------------------------------- checks


def check_terms(terms, *, in_training=False):
    """ValueError in one sentence for the first setting that no term or no sum can have.

    in_training: also if some training step would have nothing to learn from.
    """
    for name, term in terms.items():
        if name not in LOSSES:
            raise ValueError(f"loss term {name!r} is unknown; {_nearest(name, list(LOSSES))}")
        own = [k for k in list(inspect.signature(LOSSES[name]).parameters)[3:] if k not in SHARED]
        for key in term:
            if key not in [*own, *OF_THE_SUM]:
                near = _nearest(key, [*own, *OF_THE_SUM])
                raise ValueError(f"loss term {name!r} has no {key!r}; {near}")
        fault = _fault({**OF_THE_SUM, **term})
        if fault:
            raise ValueError(f"loss term {name!r}: expected {fault}")
    if in_training and not any(
        term["interval"] == 1 or term["off_step"] == "boundary" for term in _trained(terms).values()
    ):
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
