"""Whole-volume validation of a network in training: windows over each case, then the judge.

validator = Validator(cases, questions, background=True, ...)
validator.start(network, step)           # predicts; the judge may go on beside training
evaluation = validator.result()          # None: not yet
evaluation = validator.result(wait=True)
"""

import copy
import functools
import threading
from typing import NamedTuple

import numpy as np

import data
import workers
from monitoring import picture
from patches import intensity
from runtime import checkpoint
from runtime import evaluator as judging
from runtime import sliding_window as windows
from volumes import casefile as cases

WAIT = 1.0  # seconds from one look at the judge, and at whether the run shall leave, to the next


class Evaluation(NamedTuple):
    """What became of a validation. verdict: see `judging.judge`; None if the judge has died.

    unread: ids of the cases whose files could not be read, after they were tried again; slices: of
    the first case, see `picture.middle_slices`; None of no case.
    """

    step: int
    verdict: dict | None
    unread: list
    slices: dict | None


class Validator:
    """Validates on a list of labeled `cases.Case`, one evaluation at a time.

    questions: a `judging.Questions`; background: whether a process of its own judges; how: what
    `predict` takes. report(kind, text, **figures): see runlog.py; poll() is called after each batch
    of windows and once a second of waiting, and may raise. Close it, or the process stays.
    """

    def __init__(self, chosen, questions, *, background, report, poll, **how):
        self.chosen, self.questions, self.how = chosen, questions, how
        self.report, self.poll = report, poll
        self.background = background and bool(chosen)
        self.pool = workers.Pool(judging.Judge(questions), 1) if self.background else None
        self.pending = None

    def start(self, network, step):
        """Predict all cases with a network, and have the predictions judged."""
        training = network.training
        network.eval()
        predictions, unread, slices = [], [], None
        for case in self.chosen:
            wanted = functools.partial(self._predict, network, case, slices is None)
            try:
                predicted, first = data.read_patiently(wanted)
            except data.UNREADABLE as error:
                unread.append(case.id)
                text = f"{' '.join(str(error).split())}; this evaluation goes without it"
                self.report("case left out", text, case=case.id)
                continue
            predictions.append(predicted)
            slices = slices or first
        network.train(training)
        self.pending = Evaluation(step, None, unread, slices)
        if self.pool:
            task = workers.Task(step, [predictions])
            # A judge that is still starting takes nothing yet, and training does not wait for it.
            threading.Thread(target=self.pool.submit, args=(task,), daemon=True).start()
        else:
            self._judged(judging.judge(self.questions, predictions))

    def _predict(self, network, case, with_slices):
        how = {**self.how, "report": self.report, "progress": lambda done, total: self.poll()}
        return predict(network, case, self.questions, with_slices=with_slices, **how)

    def result(self, *, wait=False):
        """The `Evaluation` that was started, once; None while it is judged, or if none was."""
        while self.pending is not None and self.pending.verdict is None and self.pool:
            done, dead = self.pool.receive(WAIT if wait else 0)
            for (verdict,) in done.values():
                self._judged(verdict)
            if dead:
                self._died(dead[0])
                break
            if not wait:
                break
            if not done:
                self.poll()
        found = self.pending
        if found is None or (found.verdict is None and self.pool):
            return None
        self.pending = None
        return found

    def _judged(self, verdict):
        self.pending.unread.extend(verdict["unread"])
        self.pending = self.pending._replace(verdict=verdict)

    def _died(self, judge):
        self.report(
            "judge died",
            f"the process that judges (pid {judge.pid}) {workers.death(judge.process.exitcode)}: "
            f"the evaluation of step {self.pending.step} has no scores; from now on the training "
            "process judges by itself",
            pid=judge.pid,
            exitcode=judge.process.exitcode,
        )

    def roles(self):
        """{pid: name} of the process that judges, for whoever shows it."""
        return {worker.pid: "judge" for worker in self.pool.workers} if self.pool else {}

    def close(self):
        if self.pool:
            self.pool.close()


Evaluation.result = property(lambda self: self.verdict)
Validator.spec = property(lambda self: self.questions)


def predict(network, case, questions, *, spacing, clip, window, with_slices=False, **how):
    """(`judging.Predicted`, slices) of a case, slices None if not wanted.

    spacing, clip: as in `data.PatchDataset`; window: what of the settings goes to
    `windows.predict_slabs`, how: what else does. Memory: a byte a voxel beside the slab, four more
    where a validation-only term wants probabilities. cases.Unreadable if the file cannot be read.
    """
    exact = bool(questions.terms) and any(
        t.get("validation_only") for t in questions.terms.values()
    )
    found = np.empty(case.shape, np.uint8)
    probs = np.empty(case.shape, np.float32) if exact else None
    with cases.opened(case) as file:
        shown = None
        if with_slices:
            truth = cases.read_truth(file, questions.foreground, case.ignore_label)
            shown = picture.middle_slices(file["image"], truth, case.ignore_label)
        scale = data.normalisation(case.intensity, clip)
        seen = data.network_spacing(case.spacing, spacing)
        for z0, planes in windows.predict_slabs(
            network,
            file["image"],
            ratio=[w / s for w, s in zip(seen, case.spacing, strict=True)],
            normalize=functools.partial(intensity.normalise, **scale),
            **window,
            **how,
        ):
            part = slice(z0, z0 + planes.shape[1])
            found[part] = judging.levels(planes[0], questions.levels)
            if exact:
                probs[part] = planes[0]
            if shown is not None and z0 <= shown["z"] < part.stop:
                shown["probs"] = planes[0, shown["z"] - z0].copy()
    return judging.Predicted(case, found, probs), shown


def start_again(validator, network, loop, *, candidate, found, report):
    """Start the evaluation that a killed run was waiting for, of the state that was saved with it.

    network: with the averaged weights of now; loop: its "pending" is the step; candidate: the file
    that may become the best; found: the one that the run goes on from.
    """
    step, other = loop["pending"], network
    if step == loop["step"]:  # killed before that file had its second name, or gone on from another
        checkpoint.give_name(found, candidate)
    else:
        try:
            state = checkpoint.load_step(candidate, step)
        except checkpoint.CheckpointError as error:
            loop["pending"] = None
            report("evaluation lost", f"the evaluation of step {step} is lost: {error}")
            return
        other = copy.deepcopy(network)
        other.load_state_dict(state["ema"])
    validator.start(other, step)
