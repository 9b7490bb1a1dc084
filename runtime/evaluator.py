"""What validation makes of predicted volumes: settings are chosen on them, then all is scored.

    questions = Questions(by="surface_dice", names=("dice", "surface_dice"), thresholds=(0.4, 0.5))
    predicted = Predicted(case, levels(probs, questions.levels))
    verdict = judge(questions, [predicted, ...])

A probability is kept as the number of thresholds that it reaches, one byte a voxel: every mask that
is asked for can be made of that, exactly. `Judge` hands it to a process of its own (workers.Pool),
so that a GPU trains on meanwhile.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from runtime import composite_loss as composite
from scoring import metrics, postprocess
from volumes import casefile as cases

USUAL = 0.5  # the threshold where none was chosen
CHOICES = ("threshold", "min_component_voxels")


@dataclass(frozen=True)
class Questions:
    """What is asked of predictions; plain values.

    by: the score that chooses; names: those that are reported besides; thresholds, sizes: of which
    the best are chosen, in the order of preference among equals; hysteresis, max_hole_voxels,
    closing_radius: as in `postprocess.stages`; foreground, tolerance: of truth and surfaces;
    terms, tile: of `composite.validation_losses`.
    """

    by: str
    names: tuple
    thresholds: tuple = (USUAL,)
    sizes: tuple = (0,)
    hysteresis: float | None = None
    max_hole_voxels: int = 0
    closing_radius: float = 0.0
    foreground: tuple = (1,)
    tolerance: float = 2.0
    terms: dict = dataclasses.field(default_factory=dict)
    tile: tuple = (64, 64, 64)

    @property
    def levels(self):
        """All thresholds that masks are made at, rising: USUAL is reported as what was before."""
        weak = () if self.hysteresis is None else (self.hysteresis,)
        return tuple(sorted({*self.thresholds, *weak, USUAL}))


@dataclass(frozen=True)
class Predicted:
    """A predicted case. levels (D, H, W) uint8, see `levels`; probs (D, H, W) float32 if a
    validation-only term of the loss needs them, else None."""

    case: cases.Case
    levels: np.ndarray
    probs: np.ndarray | None = None


def levels(probs, thresholds):
    """How many of the thresholds, which rise, each probability reaches: uint8 of the same shape."""
    found = np.zeros(probs.shape, np.uint8)
    for threshold in thresholds:
        found += probs >= threshold
    return found


class Judge:
    """judge[predictions] is the verdict on them: what a worker process reads from."""

    def __init__(self, questions):
        self.questions = questions

    def __getitem__(self, predictions):
        return judge(self.questions, predictions)


def judge(questions, predictions):
    """The verdict on predictions of labeled cases, plain values:

        threshold, min_component_voxels   the best of those asked for, by the mean of the score
        scores, cases      at these, after all of postprocess.py: means, and {case id: scores}
        steps              [{"step", "value", **mean scores}]: at the usual threshold, at the chosen
                           one, and after each step of postprocess.py that is on
        unread             ids of the cases whose labels cannot be read, which count nowhere

    The threshold is chosen first, then, at it, the size of components. Of no prediction: no scores,
    and the first of the choices.
    """
    truths = _Truths(questions)
    predictions = [one for one in predictions if truths.can_read(one.case)]
    threshold = _best(
        questions, predictions, truths, questions.thresholds, lambda t: (t, questions.sizes[0])
    )
    size = _best(questions, predictions, truths, questions.sizes, lambda n: (threshold, n))
    found = {
        one.case.id: _all_scores(questions, truths, one, threshold, size) for one in predictions
    }
    return {
        "threshold": threshold,
        "min_component_voxels": size,
        "scores": metrics.mean_scores([steps[-1][2] for steps in found.values()]),
        "cases": {case: steps[-1][2] for case, steps in found.items()},
        "steps": _mean_steps(list(found.values())),
        "unread": truths.unread,
    }


class _Truths:
    """Reads truths one after another; those that cannot be read are named."""

    def __init__(self, questions):
        self.questions, self.unread = questions, []

    def can_read(self, case):
        try:
            self.read(case)
        except cases.Unreadable:
            self.unread.append(case.id)
            return False
        return True

    def read(self, case):
        with cases.opened(case) as file:
            return cases.read_truth(file, self.questions.foreground, case.ignore_label)


def _best(questions, predictions, truths, choices, setting):
    """The choice whose mean score is best, the first of equals."""
    if len(choices) == 1 or not predictions:
        return choices[0]
    sums = np.zeros(len(choices))
    for one in predictions:
        truth = truths.read(one.case)
        for i, choice in enumerate(choices):
            *_, (_, mask) = _stages(questions, one, *setting(choice))
            sums[i] += _scores(questions, one, mask, truth, (questions.by,))[questions.by]
    sign = -1 if metrics.entry(questions.by)[0].better == "lower" else 1
    return choices[int(np.argmax(np.round(sign * sums, 12)))]


def _stages(questions, one, threshold, size):
    """(name, mask) of a prediction at a threshold and after each step that is on."""

    def above(number):
        return one.levels > questions.levels.index(number)

    weak = questions.hysteresis
    return postprocess.stages(
        above(threshold),
        None if weak is None else above(weak),
        spacing=one.case.spacing,
        hysteresis=weak,
        min_component_voxels=size,
        max_hole_voxels=questions.max_hole_voxels,
        closing_radius=questions.closing_radius,
    )


def _scores(questions, one, mask, truth, names):
    ignored = one.case.ignore_label
    return metrics.score(
        mask, truth, one.case.spacing, ignored, questions.tolerance, names=tuple(names)
    )


def _all_scores(questions, truths, one, threshold, size):
    """[(step, value, scores)] of a prediction: see `judge`."""
    truth = truths.read(one.case)
    names = dict.fromkeys((questions.by, *questions.names))
    values = {
        postprocess.BEFORE: threshold,
        "hysteresis": questions.hysteresis,
        "min_component_voxels": size,
        "max_hole_voxels": questions.max_hole_voxels,
        "closing_radius": questions.closing_radius,
    }
    found = []
    if threshold != USUAL:
        _, mask = next(_stages(questions, one, USUAL, size))
        found.append((postprocess.BEFORE, USUAL, _scores(questions, one, mask, truth, names)))
    for step, mask in _stages(questions, one, threshold, size):
        found.append((step, values[step], _scores(questions, one, mask, truth, names)))
    found[-1][2].update(_losses(questions, one, truth))
    return found


def _losses(questions, one, truth):
    """The validation-only terms of the loss, {} if there are none."""
    if one.probs is None:
        return {}
    tube = None
    if composite.takes_skeleton(questions.terms, validation_only=True):
        with cases.opened(one.case) as file:
            tube = torch.from_numpy(file["skeleton"][:])
    ignored = -1 if one.case.ignore_label is None else one.case.ignore_label
    volumes = (one.probs, truth == 1, truth != ignored)
    return composite.validation_losses(
        *map(torch.from_numpy, volumes),
        questions.terms,
        tile=questions.tile,
        spacing=one.case.spacing,
        skeleton=tube,
    )


def _mean_steps(found):
    """[{"step", "value", **scores}] from [(step, value, scores)] of each case."""
    means = []
    for step in zip(*found, strict=True):
        name, value, _ = step[0]
        means.append({"step": name, "value": value, **metrics.mean_scores([s[2] for s in step])})
    return means


def better(score, best, by):
    """Whether a score is better than the best one before, either of which may be None.

    None, where there is no case to be scored: every state is then the best.
    """
    if score is None or best is None:
        return True
    return score < best if metrics.entry(by)[0].better == "lower" else score > best


def check(by, names):
    """ValueError, a sentence, for names that are of no score, and for one that cannot choose."""
    for key, name in [("validation.score", by), *(("validation.scores", name) for name in names)]:
        try:
            metrics.entry(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    if metrics.entry(by)[0].better is None:
        raise ValueError(
            f"validation.score: expected a score of which more or less is better, got {by}, which "
            "describes a mask"
        )


DEFAULT_THRESHOLD = USUAL


def EvaluationSpec(metric, **how):
    return Questions(by=metric, **how)


is_better = better


def directions(spec):
    return {}
