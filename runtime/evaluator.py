"""The evaluator: chooses settings on predicted volumes, then scores the predictions.

    spec = EvaluationSpec(metric="surface_dice", names=("dice",), thresholds=(0.4, 0.5))
    prediction = Prediction(case, threshold_counts(probs, spec.all_thresholds))
    result = evaluate(spec, [prediction, ...])

A probability is stored as the number of thresholds that it reaches, one byte a voxel: every mask
that is needed can be made of that, exactly.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from runtime import composite_loss
from scoring import metrics, postprocess
from volumes import casefile

DEFAULT_THRESHOLD = 0.5
CHOICES = ("threshold", "min_component_voxels")


@dataclass(frozen=True)
class EvaluationSpec:
    """What is evaluated, and how; plain values."""

    metric: str  # the score that chooses
    names: tuple  # further scores that are reported
    # The best of these are chosen, the first of equals.
    thresholds: tuple = (DEFAULT_THRESHOLD,)
    sizes: tuple = (0,)
    # As in `postprocess.stages`.
    hysteresis: float | None = None
    max_hole_voxels: int = 0
    closing_radius: float = 0.0
    foreground: tuple = (1,)  # classes of the truth
    tolerance: float = 2.0  # of surfaces
    # Of `composite_loss.validation_losses`.
    terms: dict = dataclasses.field(default_factory=dict)
    tile: tuple = (64, 64, 64)

    @property
    def all_thresholds(self):
        """All thresholds that masks are made at, rising; DEFAULT_THRESHOLD is always reported."""
        weak = () if self.hysteresis is None else (self.hysteresis,)
        return tuple(sorted({*self.thresholds, *weak, DEFAULT_THRESHOLD}))

    @property
    def validation_terms(self):
        """Names of the terms of the loss that are computed in validation alone."""
        return [name for name, term in self.terms.items() if term.get("validation_only")]


@dataclass(frozen=True)
class Prediction:
    """A predicted case."""

    case: casefile.Case
    counts: np.ndarray  # (D, H, W) uint8: see `threshold_counts`
    probs: np.ndarray | None = None  # (D, H, W) float32 if a validation-only term needs them


def threshold_counts(probs, thresholds):
    """How many of the thresholds, which rise, each probability reaches: uint8 of the same shape."""
    counts = np.zeros(probs.shape, np.uint8)
    for threshold in thresholds:
        counts += probs >= threshold
    return counts


def evaluate(spec, predictions):
    """The result for predictions of labeled cases, plain values:

        threshold, min_component_voxels   the best choices, by the mean of the metric
        scores, cases      with these, after all of postprocess.py: means, and {case id: scores}
        steps              [{"step", "value", **mean scores}]: at the default threshold, at the
                           chosen one, and after each step of postprocess.py that is on
        unread             ids of the cases whose labels cannot be read; they do not count

    The threshold is chosen first, then, with it, the size of components. Without any prediction
    the first of the choices is the result.
    """
    readable, unread = [], []
    for prediction in predictions:
        try:
            _read_truth(spec, prediction.case)
            readable.append(prediction)
        except casefile.Unreadable:
            unread.append(prediction.case.id)
    threshold, _ = _best(spec, readable, [(t, spec.sizes[0]) for t in spec.thresholds])
    threshold, size = _best(spec, readable, [(threshold, size) for size in spec.sizes])
    steps = {p.case.id: _score_steps(spec, p, threshold, size) for p in readable}
    return {
        "threshold": threshold,
        "min_component_voxels": size,
        "scores": metrics.mean_scores([rows[-1][2] for rows in steps.values()]),
        "cases": {case: rows[-1][2] for case, rows in steps.items()},
        "steps": [
            {"step": rows[0][0], "value": rows[0][1]} | metrics.mean_scores([r[2] for r in rows])
            for rows in zip(*steps.values(), strict=True)
        ],
        "unread": unread,
    }


def _read_truth(spec, case):
    with casefile.opened(case) as file:
        return casefile.read_truth(file, spec.foreground, case.ignore_label)


def _best(spec, predictions, settings):
    """The (threshold, size) whose mean score is best, the first of equals."""
    if len(settings) == 1 or not predictions:
        return settings[0]
    sums = np.zeros(len(settings))
    for prediction in predictions:
        truth = _read_truth(spec, prediction.case)
        for i, setting in enumerate(settings):
            *_, (_, mask) = _stages(spec, prediction, *setting)
            sums[i] += _scores(spec, prediction.case, mask, truth, (spec.metric,))[spec.metric]
    best = np.argmin if metrics.entry(spec.metric)[0].better == "lower" else np.argmax
    return settings[int(best(np.round(sums, 12)))]


def _stages(spec, prediction, threshold, size):
    """(name, mask) of a prediction at a threshold and after each step that is on."""
    counts, thresholds = prediction.counts, spec.all_thresholds
    high, weak = counts > thresholds.index(threshold), spec.hysteresis
    low = None if weak is None else counts > thresholds.index(weak)
    return postprocess.stages(
        high,
        low,
        spacing=prediction.case.spacing,
        hysteresis=weak,
        min_component_voxels=size,
        max_hole_voxels=spec.max_hole_voxels,
        closing_radius=spec.closing_radius,
    )


def _scores(spec, case, mask, truth, names):
    how = (case.spacing, case.ignore_label, spec.tolerance)
    return metrics.score(mask, truth, *how, names=names)


def _score_steps(spec, prediction, threshold, size):
    """[(step, value, scores)] of a prediction: see `evaluate`."""
    case, truth = prediction.case, _read_truth(spec, prediction.case)
    names = dict.fromkeys((spec.metric, *spec.names))
    values = dataclasses.asdict(spec)
    values |= {postprocess.BEFORE: threshold, "min_component_voxels": size}
    rows = []
    if threshold != DEFAULT_THRESHOLD:
        step, mask = next(_stages(spec, prediction, DEFAULT_THRESHOLD, size))
        rows.append((step, DEFAULT_THRESHOLD, _scores(spec, case, mask, truth, names)))
    for step, mask in _stages(spec, prediction, threshold, size):
        rows.append((step, values[step], _scores(spec, case, mask, truth, names)))
    if prediction.probs is not None:
        rows[-1][2].update(_validation_losses(spec, prediction, truth))
    return rows


def _validation_losses(spec, prediction, truth):
    """The validation-only terms of the loss."""
    case, skeleton = prediction.case, None
    if composite_loss.takes_skeleton(spec.terms, validation_only=True):
        with casefile.opened(case) as file:
            skeleton = torch.from_numpy(file["skeleton"][:])
    valid = truth != (-1 if case.ignore_label is None else case.ignore_label)
    tensors = map(torch.from_numpy, (prediction.probs[None], (truth == 1)[None], valid))
    return composite_loss.validation_losses(
        *tensors, spec.terms, tile=spec.tile, spacing=case.spacing, skeleton=skeleton
    )


def is_better(score, best, metric):
    """Whether a score is better than the best so far, or either is None: no case was scored."""
    if score is None or best is None:
        return True
    return score < best if metrics.entry(metric)[0].better == "lower" else score > best


def directions(spec):
    """{score: "higher", "lower" or None}, whichever is better, for all that `evaluate` reports."""
    better = {name: metrics.entry(name)[0].better for name in (spec.metric, *spec.names)}
    return better | {f"{name}_loss": "lower" for name in spec.validation_terms}


def check(metric, names):
    """ValueError, a sentence, for a name of no score, and for a metric that cannot choose."""
    for name in (metric, *names):
        try:
            metrics.entry(name)
        except ValueError as error:
            key = "validation.score" if name == metric else "validation.scores"
            raise ValueError(f"{key}: {error}") from None
    if metrics.entry(metric)[0].better is None:
        expected = "expected a score where higher or lower is better"
        raise ValueError(f"validation.score: {expected}, got {metric}, which describes a mask")
