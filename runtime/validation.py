"""Whole-volume validation of a network in training: windows over each case, then the evaluator.

validator.start(network, step)           # predicts; the evaluator may run during training
evaluation = validator.result()          # None: not yet
"""

import contextlib
import dataclasses
import functools
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import torch

import data
from runtime import distributed, evaluator, sliding_window
from runtime.own_threshold import AUTO
from scoring import parallel
from volumes import casefile
from volumes.processes import STOP_SIGNALS
from volumes.statistics import clip_fill

POLL_SECONDS = 1.0  # while waiting for the evaluator, from one look and call of poll to the next


class Evaluation(NamedTuple):
    """The outcome of a validation."""

    step: int
    result: dict | None  # see `evaluator.evaluate`; None if its process died
    unread: list  # ids of the cases whose files could not be read, even when tried again
    slices: dict | None  # of the first case, see `middle_slices`; None without a case


class Validator:
    """Validates on a list of labeled `casefile.Case`, one evaluation at a time.

    background: whether a process of its own evaluates, as it always does with several ranks: these
    share out the cases, and rank 0 evaluates all. how: arguments of `predict`. report(kind, text,
    **figures) records trouble; poll() is called after each batch of windows and once a second
    of waiting, and may raise; progress(text) gets what it does. Close it, or the process stays.
    """

    def __init__(self, cases, spec, *, background, report, poll, progress, group=None, **how):
        self.cases, self.spec, self.how = cases, spec, how
        self.report, self.poll, self.progress = report, poll, progress
        self.group = group or distributed.Group()
        self.background = (background or self.group.size > 1) and bool(cases)
        self.process = self.pool = self.future = self.pending = None
        self.stack = contextlib.ExitStack()

    def start(self, network, step, foreground=None):
        """Predict all cases with a network, and have the predictions evaluated.

        foreground: its share in training so far, see `own_threshold`.
        """
        if foreground is not None:
            self.spec = dataclasses.replace(self.spec, foreground=foreground)
        if self.background and self.pool is None and self.group.first:
            # A process group that is asked to stop: this process answers, and ends the evaluator.
            worker = parallel.worker_process(STOP_SIGNALS)
            self.pool, self.process = self.stack.enter_context(worker)
        how, now = self.how | {"report": self.report}, f"evaluation of step {step}"
        training = network.training
        network.eval()
        predictions, unread, slices = {}, [], None
        for number, case in enumerate(cases := self.group.mine(self.cases), start=1):
            place = f"{now}: case {number}/{len(cases)}"
            how["progress"] = functools.partial(self._advance, place)
            how["with_slices"] = slices is None
            read = functools.partial(predict, network, case, self.spec, **how)
            try:
                prediction, case_slices = data.read_patiently(read)
            except data.UNREADABLE as error:
                unread.append(case.id)
                text = f"{' '.join(str(error).split())}; this evaluation goes without it"
                self.report("case left out", text, case=case.id)
                continue
            predictions[case.id] = prediction
            slices = slices or case_slices
        network.train(training)
        self.group.wait_for_all(self.poll)
        unread = [case for some in self.group.gather(unread) for case in some]
        predictions = self._brought_together(predictions, unread)
        if not self.group.first:
            return
        self.pending = Evaluation(step, None, unread, slices)
        if self.background:
            try:
                self.future = self.pool.submit(_evaluate_in_worker, self.spec, predictions)
            except BrokenProcessPool as error:  # the process has died since the last evaluation
                self.future = futures.Future()
                self.future.set_exception(error)
        else:
            self.progress(f"{now}: scoring")
            self._complete(evaluator.evaluate(self.spec, predictions))

    def _advance(self, place, done, total):
        self.progress(f"{place}, {done / total:.0%}")
        self.poll()

    def _brought_together(self, predictions, unread):
        """The predictions of all ranks on rank 0, in the order of the cases."""
        found = []
        for number, case in enumerate(self.cases):
            owner, prediction = number % self.group.size, predictions.get(case.id)
            if case.id in unread:
                continue
            if self.group.first and owner:
                prediction = evaluator.empty_prediction(self.spec, case)
            for array in (prediction.encoded, prediction.probs) if prediction and owner else ():
                if array is not None:
                    self.group.move(array, owner)
            found.append(prediction)
        return found

    def result(self, *, wait=False):
        """The `Evaluation` that was started, once; None while it runs, or if none was started.

        wait: until it is done; all ranks wait together.
        """
        while wait and not self.group.from_first(lambda: self._is_done(POLL_SECONDS)):
            self.poll()
        if not self._is_done(0):
            return None
        if self.future is not None:
            self._receive(self.future)
            self.future = None
        evaluation, self.pending = self.pending, None
        return evaluation

    def _is_done(self, seconds):
        """Whether no evaluation runs, after so many seconds at most."""
        return self.future is None or bool(futures.wait([self.future], timeout=seconds).done)

    def _receive(self, future):
        try:
            self._complete(future.result())
        except (BrokenProcessPool, MemoryError) as error:
            cause = parallel.cause_of_death(error, self.pool, self.process)
            pid = self.process.pid
            instead = (
                "another process evaluates"
                if self.group.size > 1
                else "training evaluates by itself"
            )
            text = (
                f"the evaluator process (pid {pid}) {cause}: the evaluation of step "
                f"{self.pending.step} has no scores; from now on {instead}"
            )
            self.report("evaluator died", text, pid=pid, exitcode=self.process.exitcode)
            self.background = self.group.size > 1
            self.close()

    def _complete(self, result):
        unread = [*self.pending.unread, *result["unread"]]
        self.pending = self.pending._replace(result=result, unread=unread)

    def roles(self):
        """{pid: name} of the evaluator process, for displays."""
        return {self.process.pid: "evaluator"} if self.process else {}

    def close(self):
        """End the evaluator process."""
        self.stack.close()
        self.process = self.pool = None


def _evaluate_in_worker(spec, predictions):
    torch.set_num_threads(1)  # the cores are for training
    return evaluator.evaluate(spec, predictions)


def predict(network, case, spec, *, spacing, clip, window, with_slices=False, **how):
    """(`evaluator.Prediction`, slices) of a case; slices None if not wanted.

    spacing, clip: as in `data.PatchDataset`; window: arguments of `sliding_window.predict_slabs`
    that come from the settings, how: its others. casefile.Unreadable if a file cannot be read.
    """
    prediction, slices = evaluator.empty_prediction(spec, case), None
    with casefile.opened(case) as file:
        if with_slices:
            slices = middle_slices(file["image"], file["label"][:], spec.outputs, case.ignore_label)
            slices["case"] = case.id
            slices["image"] = clip_fill(slices["image"], case.intensity)
        arguments = network, file["image"], case.spacing, case.intensity
        how |= {"channels": spec.outputs.channels, "exclusive": spec.outputs.exclusive}
        how |= {"wanted": spacing, "clip": clip}
        for z0, planes in sliding_window.predict_case(*arguments, **window, **how):
            part = slice(z0, z0 + planes.shape[1])
            prediction.encoded[..., part, :, :] = evaluator.encode(spec, planes)
            if prediction.probs is not None:
                prediction.probs[:, part] = planes
            if slices is not None and z0 <= slices["z"] < part.stop:
                slices["probs"] = planes[:, slices["z"] - z0].copy()
    if slices is not None and (AUTO,) in spec.thresholds.values():
        slices[AUTO] = evaluator.number_of(spec, prediction.encoded, AUTO)
    return prediction, slices


def middle_slices(image, label, outputs, ignore_label):
    """The z slice that shows most of the regions of a case, as a dict of (H, W) arrays, and "z";
    "truth" is {region: (H, W) bool}.

    image (C, D, H, W), an array or dataset, of which one slice is read; label (D, H, W) class ids;
    outputs: an `outputs.Outputs`.
    """
    labeled = label != (-1 if ignore_label is None else ignore_label)
    truth = {n: np.isin(label, ids) & labeled for n, ids in outputs.regions.items()}
    counts = [mask.sum(axis=(1, 2)) for mask in truth.values()]
    z = int(np.argmax(sum(count / max(1, count.sum()) for count in counts)))
    image = np.asarray(image[0, z], np.float64)
    shown = {name: mask[z] for name, mask in truth.items()}
    return {"z": z, "image": image, "truth": shown, "labeled": labeled[z]}
