"""The evaluator: chooses settings on predicted volumes, then scores the predictions.

    spec = make_spec(plan)
    prediction = Prediction(case, encode(spec, probs))
    result = evaluate(spec, [prediction, ...])

A probability is stored as the number of thresholds that it reaches, one byte a voxel: every mask
that is needed can be made of that, exactly.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from runtime import composite_loss
from runtime.outputs import Outputs, most_probable, with_chosen
from runtime.own_threshold import AUTO, LEVELS, count_reached, histogram, own_threshold
from scoring import classes, metrics, postprocess
from volumes import casefile

DEFAULT_THRESHOLD = 0.5
# What is tried of each step that the settings leave open: first what changes least.
CANDIDATES = {
    "hysteresis": (0.6, 0.5, 0.4, 0.3, 0.2),  # those below the threshold
    "max_hole_voxels": (20, 100),
    "closing_radius": (1.5, 2.5),  # in voxels of the finest axis
}
CHOICES = ("threshold", "min_component_voxels", *CANDIDATES)
TRIED = ("step", "value", "cases", "before", "after", "taken")
PROOF = 0.001  # the share of a score that counts as a change of it
UNLABELED = 2  # in the truth of a region, which is 0 and 1 else


@dataclass(frozen=True)
class EvaluationSpec:
    """What is evaluated, and how; plain values."""

    metric: str  # the score that chooses; of several regions dice/artery or dice/mean
    names: tuple  # of all scores that are reported, the metric too, each with its region
    outputs: Outputs
    # The best of these are chosen for each region, the first of equals: {region: values}. Classes
    # that exclude each other have no threshold.
    thresholds: dict
    sizes: dict
    # Of `postprocess.stages_of_regions`, but for min_component_voxels.
    postprocess: dict = dataclasses.field(default_factory=dict)
    # {step: values} of the steps that are off there, and taken if they prove to help.
    candidates: dict = dataclasses.field(default_factory=dict)
    tolerance: float = 2.0  # of surfaces
    # Of `composite_loss.validation_losses`.
    terms: dict = dataclasses.field(default_factory=dict)
    class_weights: list | None = None
    foreground: float | None = None  # its share in training, for the threshold AUTO
    tile: tuple = (64, 64, 64)

    @property
    def all_thresholds(self):
        """All thresholds that masks are made at, rising; DEFAULT_THRESHOLD is always reported."""
        weak = {self.postprocess.get("hysteresis"), *self.candidates.get("hysteresis", ())} - {None}
        asked = {*sum(self.thresholds.values(), ())}
        levels = LEVELS if AUTO in asked else ()
        return tuple(sorted({*(asked - {AUTO}), *weak, *levels, DEFAULT_THRESHOLD}))

    @property
    def validation_terms(self):
        """Names of the terms of the loss that are computed in validation alone."""
        return [name for name, term in self.terms.items() if term.get("validation_only")]


@dataclass(frozen=True)
class Prediction:
    """A predicted case."""

    case: casefile.Case
    encoded: np.ndarray  # see `encode`
    probs: np.ndarray | None = None  # (K, D, H, W) float32 if a validation-only term needs them


def empty_prediction(spec, case):
    """A `Prediction` of a case whose arrays are to be filled."""
    outputs, probs = spec.outputs, None
    regions = (len(outputs.regions),) * outputs.overlapping
    if spec.validation_terms:
        probs = np.empty((outputs.channels, *case.shape), np.float32)
    return Prediction(case, np.empty((*regions, *case.shape), np.uint8), probs)


def encode(spec, probs):
    """Probabilities (K, D, H, W) in one byte a voxel and region, of which masks are made.

    Of one foreground (D, H, W) and of regions that may overlap (R, D, H, W) how many of
    all_thresholds each probability reaches; of classes that exclude each other the channel of the
    highest probability, (D, H, W). uint8.
    """
    if spec.outputs.exclusive:
        return most_probable(probs)
    counts = count_reached(probs, spec.all_thresholds)
    return counts if spec.outputs.several else counts[0]


def masks(spec, encoded, thresholds):
    """{region: mask} of what `encode` made of a volume or a slice, at {region: threshold}: of the
    regions that are asked for. Classes that exclude each other have None for a threshold."""
    numbers, outputs = {name: i for i, name in enumerate(spec.outputs.regions)}, spec.outputs
    if outputs.exclusive:
        return {name: encoded == numbers[name] + 1 for name in thresholds}
    counts = encoded if outputs.several else encoded[None]
    reached = spec.all_thresholds.index
    return {
        name: counts[numbers[name]] > reached(number_of(spec, counts[numbers[name]], t))
        for name, t in thresholds.items()
    }


def number_of(spec, counts, threshold):
    """A threshold as a number; counts: of the whole volume, as `encode` made them of its region."""
    if threshold != AUTO:
        return threshold
    levels = spec.all_thresholds
    return own_threshold(histogram(counts, levels), spec.foreground, levels)


def evaluate(spec, predictions):
    """The result for predictions of labeled cases, plain values:

        threshold, min_component_voxels   the best choices, by the mean of the metric
        hysteresis, ...    of the steps that have proven to help, see `_proven`
        tried              [{"step", "value", "cases", "before", "after", "taken"}]: what was tried
                           of them, with the mean of the metric over so many cases
        scores, cases      with these, after all of postprocess.py: means, and {case id: scores}
        steps              [{"step", "value", **mean scores}]: at the default threshold, at the
                           chosen one, and after each step of postprocess.py that is on
        unread             ids of the cases whose labels cannot be read; they do not count

    The threshold is chosen first, then, with it, the size of components, then what else proves to
    help. Without any prediction the first of the choices is the result. Several regions are chosen
    for one after the other, each by its own score; choices and values are then {region: value},
    without those of a threshold where classes exclude each other. Of what proves to help there is
    one value for all regions.
    """
    readable, unread = [], []
    for prediction in predictions:
        try:
            _read_label(prediction.case)
            readable.append(prediction)
        except casefile.Unreadable:
            unread.append(prediction.case.id)
    thresholds = {name: spec.thresholds.get(name, (None,)) for name in spec.outputs.regions}
    chosen = {name: (some[0], spec.sizes[name][0]) for name, some in thresholds.items()}
    for name, (_, size) in chosen.items():
        choices = [(threshold, size) for threshold in thresholds[name]]
        chosen[name] = _best(spec, readable, chosen, name, choices)
        choices = [(chosen[name][0], size) for size in spec.sizes[name]]
        chosen[name] = _best(spec, readable, chosen, name, choices)
    spec, tried = _proven(spec, readable, chosen)
    steps = {p.case.id: _score_steps(spec, p, chosen) for p in readable}
    told = _told(spec, chosen) | {t["step"]: t["value"] for t in tried if t["taken"]}
    return {key: value for key, value in told.items() if value is not None} | {
        "tried": tried,
        "scores": metrics.mean_scores([rows[-1][2] for rows in steps.values()]),
        "cases": {case: rows[-1][2] for case, rows in steps.items()},
        "steps": [
            {"step": rows[0][0], "value": rows[0][1]} | metrics.mean_scores([r[2] for r in rows])
            for rows in zip(*steps.values(), strict=True)
        ],
        "unread": unread,
    }


def _told(spec, chosen):
    """{what is chosen: its value, of several regions {region: value}}; None for no threshold."""
    told = {key: {n: pair[i] for n, pair in chosen.items()} for i, key in enumerate(CHOICES[:2])}
    if not spec.outputs.several:
        return {key: next(iter(values.values())) for key, values in told.items()}
    return told | {"threshold": None} if spec.outputs.exclusive else told


def _read_label(case):
    with casefile.opened(case) as file:
        return file["label"][:]


def _truth(case, label, ids):
    """The truth (D, H, W) of the classes with these ids: 0, 1 and UNLABELED."""
    truth = np.isin(label, ids).astype(np.uint8)
    if case.ignore_label is not None:
        truth[label == case.ignore_label] = UNLABELED
    return truth


def _best(spec, predictions, chosen, name, choices):
    """The (threshold, size) of a region whose mean score is best, the first of equals.

    chosen: those of all regions so far, for classes that exclude each other share the voxels.
    """
    if len(choices) == 1 or not predictions:
        return choices[0]
    sums, metric = np.zeros(len(choices)), classes.split_name(spec.metric)[0]
    others = chosen if spec.outputs.exclusive else {}
    for prediction in predictions:
        case = prediction.case
        truth = _truth(case, _read_label(case), spec.outputs.regions[name])
        for i, choice in enumerate(choices):
            *_, (_, found) = _stages(spec, prediction, others | {name: choice})
            sums[i] += _score(spec, case, found[name], truth, (metric,))[metric]
    best = np.argmin if metrics.entry(metric)[0].better == "lower" else np.argmax
    return choices[int(best(np.round(sums, 12)))]


def _proven(spec, predictions, chosen):
    """(spec with the steps of its candidates that help, what was tried: see `evaluate`).

    One step after another, in the order in which they are applied. A value is taken if the mean of
    the metric over cases gets better by more than PROOF of it, and on no case that of any region
    gets worse by more than PROOF of it: a mean may be raised by one case that a step happens to
    suit, which says little of the next volume. Of a single case its own score decides. The next
    value of a step, which changes more, is tried only if the one before was taken, and the first
    case that gets worse ends it: what does not help costs little.
    """
    metric = classes.split_name(spec.metric)[0]
    watched = full_names(metric, (), spec.outputs)[1]

    def scores(spec, prediction):
        *_, (_, found) = _stages(spec, prediction, chosen)
        spec = dataclasses.replace(spec, names=watched)
        return _scores(spec, prediction.case, found, _read_label(prediction.case))

    tried, before = [], [scores(spec, one) for one in predictions if spec.candidates]
    for step, values in spec.candidates.items() if before else ():
        if step == "hysteresis":
            known = (threshold for threshold, _ in chosen.values() if threshold != AUTO)
            highest = max(known, default=DEFAULT_THRESHOLD)
            values = [value for value in values if value < highest]
        for value in values:
            changed = dataclasses.replace(spec, postprocess=spec.postprocess | {step: value})
            after, harms = [], False
            for one, old in zip(predictions, before, strict=True):
                after.append(scores(changed, one))
                harms = any(_gain(metric, old[n], after[-1][n]) < -PROOF for n in watched)
                if harms:
                    break
            both = (before[: len(after)], after)
            means = [metrics.mean_scores(some)[spec.metric] for some in both]
            taken = not harms and _gain(metric, *means) > PROOF
            row = (step, value, len(after), *means, taken)
            tried.append(dict(zip(TRIED, row, strict=True)))
            if not taken:
                break
            spec, before = changed, after
    return spec, tried


def _gain(metric, before, after):
    """The share of a score by which another is better; negative: by which it is worse."""
    sign = -1 if metrics.entry(metric)[0].better == "lower" else 1
    return sign * (after - before) / max(abs(before), 1e-9)


def _stages(spec, prediction, chosen):
    """(step, {region: mask}) of a prediction at {region: (threshold, size)}, and after each step
    that is on."""
    weak, low = spec.postprocess.get("hysteresis"), None
    if weak is not None:
        low = masks(spec, prediction.encoded, dict.fromkeys(chosen, weak))
    return postprocess.stages_of_regions(
        masks(spec, prediction.encoded, {name: t for name, (t, _) in chosen.items()}),
        low,
        exclusive=spec.outputs.exclusive,
        spacing=prediction.case.spacing,
        min_component_voxels={name: size for name, (_, size) in chosen.items()},
        **spec.postprocess,
    )


def _score(spec, case, mask, truth, names):
    return metrics.score(mask, truth, case.spacing, UNLABELED, spec.tolerance, names=names)


def _scores(spec, case, found, label):
    """All scores of {region: mask}."""

    def of(name, names):
        truth = _truth(case, label, spec.outputs.regions[name])
        return _score(spec, case, found[name], truth, names)

    if not spec.outputs.several:
        return of(*found, spec.names)
    return metrics.by_class(spec.names, found, of)


def _score_steps(spec, prediction, chosen):
    """[(step, value, scores)] of a prediction: see `evaluate`."""
    case, label = prediction.case, _read_label(prediction.case)
    told, rows = _told(spec, chosen), []
    if any(threshold not in (None, DEFAULT_THRESHOLD) for threshold, _ in chosen.values()):
        default = {name: (DEFAULT_THRESHOLD, size) for name, (_, size) in chosen.items()}
        step, found = next(_stages(spec, prediction, default))
        rows.append((step, DEFAULT_THRESHOLD, _scores(spec, case, found, label)))
    for step, found in _stages(spec, prediction, chosen):
        value = told[step] if step in told else spec.postprocess[step]
        rows.append((step, value, _scores(spec, case, found, label)))
    if prediction.probs is not None:
        rows[-1][2].update(_validation_losses(spec, prediction, label))
    return rows


def _validation_losses(spec, prediction, label):
    """The validation-only terms of the loss."""
    case, skeleton, outputs = prediction.case, None, spec.outputs
    if composite_loss.takes_skeleton(spec.terms, validation_only=True):
        with casefile.opened(case) as file:
            skeleton = torch.from_numpy(file["skeleton"][:])
    target = np.stack([np.isin(label, ids) for ids in outputs.regions.values()])
    if outputs.exclusive:
        numbers = np.arange(1, outputs.channels, dtype=np.uint8).reshape(-1, 1, 1, 1)
        target = (target * numbers).sum(0, dtype=np.uint8, keepdims=True)
    valid = label != (-1 if case.ignore_label is None else case.ignore_label)
    return composite_loss.validation_losses(
        *map(torch.from_numpy, (prediction.probs, target, valid)),
        spec.terms,
        tile=spec.tile,
        overlapping=outputs.overlapping,
        class_weights=spec.class_weights,
        spacing=case.spacing,
        skeleton=skeleton,
    )


def is_better(score, best, metric):
    """Whether a score is better than the best so far, or either is None: no case was scored."""
    if score is None or best is None:
        return True
    return score < best if metrics.entry(metric)[0].better == "lower" else score > best


def directions(spec):
    """{score: "higher", "lower" or None}, whichever is better, for all that `evaluate` reports."""
    better = {name: metrics.entry(name)[0].better for name in spec.names}
    return better | {f"{name}_loss": "lower" for name in spec.validation_terms}


def make_spec(plan):
    """What validation asks of predictions: the `EvaluationSpec` of a `build.Plan`."""
    settings, outputs, regions = plan.settings, plan.outputs, plan.outputs.regions
    asked, post = settings.validation, settings.postprocess
    thresholds = sorted(asked.thresholds, key=lambda t: (abs(t - DEFAULT_THRESHOLD), t))
    thresholds = _per_region(settings.inference.threshold, thresholds, regions)
    sizes = _per_region(post.min_component_voxels, sorted(asked.min_component_voxels), regions)
    metric, names = full_names(asked.score, asked.scores, outputs)
    fixed = with_chosen(settings, {}, outputs).postprocess
    return EvaluationSpec(
        metric=metric,
        names=names,
        outputs=outputs,
        thresholds={} if outputs.exclusive else thresholds,
        sizes=sizes,
        postprocess=fixed.model_dump(exclude={"min_component_voxels"}),
        candidates=_candidates(plan),
        tolerance=asked.tolerance,
        terms=plan.terms,
        class_weights=plan.classes["class_weights"],
        tile=settings.sampling.patch,
    )


def _candidates(plan):
    """{step: values} of the steps that the settings of a `build.Plan` leave open."""
    steps, post = dict(CANDIDATES), plan.settings.postprocess
    finest = min((min(case.spacing) for case in plan.split.validation), default=1.0)
    steps["closing_radius"] = tuple(float(f"{finest * r:.4g}") for r in steps["closing_radius"])
    if plan.outputs.exclusive:
        del steps["hysteresis"]
    return {step: values for step, values in steps.items() if getattr(post, step) is None}


def _per_region(given, candidates, regions):
    """{region: the number that the settings give it, or else all candidates}.

    given: one number for all, {region: number}, or None.
    """
    own = given if isinstance(given, dict) else dict.fromkeys(regions, given)
    return {n: tuple(candidates) if own.get(n) is None else (own[n],) for n in regions}


def full_names(metric, names, outputs):
    """(the name of the score that chooses the best state, those of all scores), with regions.

    ValueError, a sentence, for a name of no score or region, and for a metric that cannot choose.
    """
    regions = classes.checked(outputs.regions) if outputs.several else None
    for name in (metric, *names):
        try:
            if metrics.entry(name)[0].probs:
                raise ValueError(f"expected a score of masks, got {name}, of probabilities")
            classes.full_names([name], regions)
        except ValueError as error:
            key = "validation.score" if name == metric else "validation.scores"
            raise ValueError(f"{key}: {error}") from None
    if metrics.entry(metric)[0].better is None:
        expected = "expected a score where higher or lower is better"
        raise ValueError(f"validation.score: {expected}, got {metric}, which describes a mask")
    if classes.split_name(metric)[0].partition("@")[0] in ("gap_filled", "voi_merge"):
        raise ValueError(f"validation.score: expected one that an empty mask loses, got {metric}")
    mean = outputs.several and classes.split_name(metric)[1] is None
    all_names = classes.full_names((metric, *names), regions)
    return f"{metric}/{classes.MEAN}" if mean else metric, all_names
