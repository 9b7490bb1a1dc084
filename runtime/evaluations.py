"""When a run evaluates its network, what comes of that, and which state is its best.

Predictions are made in the training process, and may be scored beside training (validation.py). So
the state that is being evaluated is kept as candidate.pt: a second name for the same bytes, which
becomes best.pt when its scores are the best so far.
"""

import copy
import dataclasses
from dataclasses import dataclass, field

from monitoring import picture
from monitoring.records import few_names
from runtime import checkpoint, evaluator
from runtime.own_threshold import AUTO

CANDIDATE, BEST = "candidate.pt", "best.pt"


def differences(before, now):
    """What differs between two of `build.what_is_measured`, as clauses, in the keys of both."""
    both = [key for key in before.keys() & now.keys() if before[key] != now[key]]
    clauses = [f"{k} is {now[k]}, was {before[k]}" for k in sorted(both) if k != "cases"]
    if "cases" in both:
        old, new = before["cases"], now["cases"]
        # None: a file that could not be read, of which nothing is known.
        changed = [
            case
            for case in sorted(old.keys() | new.keys())
            if old.get(case) != new.get(case) and None not in (old.get(case, 0), new.get(case, 0))
        ]
        clauses += [f"the cases or their voxels differ ({', '.join(changed)})"] * bool(changed)
    return clauses


@dataclass
class Standing:
    """What the evaluations of a run have come to; plain values, saved with every state."""

    best_score: float | None = None
    best_step: int | None = None
    without_better: int = 0  # evaluations since that step
    evaluated_step: int | None = None  # newest step that was evaluated
    pending: int | None = None  # the same while its scores are still awaited
    chosen: dict = field(default_factory=dict)  # for prediction, by the newest evaluation
    window_fits: dict = field(default_factory=dict)  # see sliding_window.WindowFit


class Evaluations:
    """Those of a `run.Run`, whose log, saver and `save` it uses; a part of its state."""

    def __init__(self, run):
        self.run, self.settings, self.standing = run, run.settings.validation, Standing()
        self.validator = None

    def state_dict(self):
        return dataclasses.asdict(self.standing)

    def load_state_dict(self, state):
        self.standing = Standing(**state)

    def compare(self, saved):
        """Forget the best of a saved state if scores mean something else by now: lines on that."""
        asked = saved["config"]["validation"]
        older = {"metric": asked["score"], "tolerance": asked["tolerance"]}
        before = saved["data"].get("measured", older)  # not in states of older versions
        changed = differences(before, self.run.metadata["measured"])
        if not changed:
            return []
        self.standing.best_score = self.standing.best_step = self.standing.evaluated_step = None
        self.standing.without_better = 0
        return [f"resume: the best is looked for anew, for in validation {'; '.join(changed)}"]

    def begin(self, validator, network, resumed_from):
        """Use this `validation.Validator`; evaluate again what a killed run was evaluating.

        network: the averaged one; resumed_from: the file that the run goes on from, or None.
        """
        self.validator, step = validator, self.standing.pending
        if step is None:
            return
        candidate = self.run.folder / "checkpoints" / CANDIDATE
        if step == self.run.step:  # it may have been killed before the file had that name
            self.run.group.from_first(lambda: checkpoint.give_name(resumed_from, candidate))
            validator.start(network, step, self.run.means.foreground)
            return
        try:
            weights = self.run.group.from_first(
                lambda: checkpoint.load_step(candidate, step)["ema"]
            )
        except checkpoint.CheckpointError as error:
            self.standing.pending = None
            text = f"the evaluation of step {step} is lost: {error}"
            self.run.report_of_all("evaluation lost", text)
            return
        network = copy.deepcopy(network)
        network.load_state_dict(weights)
        validator.start(network, step, self.run.means.foreground)

    def due(self, done):
        """Whether the network is evaluated before this step; done: there is no further step."""
        step = self.run.step
        epoch, within = divmod(step, self.run.iterations)
        due = done or (within == 0 and epoch % self.settings.every == 0)
        if step == 0 and not done:
            due = self.settings.untrained
        return due and self.standing.evaluated_step != step

    def start(self, network, *, wait):
        """Save the state and evaluate its network; wait: until it is scored."""
        self.standing.evaluated_step = self.standing.pending = self.run.step
        self.run.save(also=CANDIDATE)
        self.validator.start(network, self.run.step, self.run.means.foreground)
        if wait or not self.validator.background:
            self.finish(wait=True)

    def finish(self, *, wait):
        """Log the evaluation that was started, if it is scored, and keep its state if it is best.

        An evaluation without all of its scores (a case that could not be read, an evaluator that
        died) chooses nothing.
        """
        evaluation = self.validator.result(wait=wait)
        if evaluation is None:
            return
        run, step = self.run, evaluation.step
        result = evaluation.result or {"scores": {}, "cases": {}, "steps": [], "tried": []}
        chosen = {key: result[key] for key in evaluator.CHOICES if key in result}
        shown = {key: result[key] for key in ("scores", "cases", "steps", "tried")}
        run.log.write(
            "evaluation",
            step=step,
            epoch=step // run.iterations,
            **shown,
            chosen=chosen,
            unread=evaluation.unread,
        )
        if result["scores"]:
            names = few_names(result["scores"], self.validator.spec.metric)
            scores = " ".join(f"{name} {result['scores'][name]:.4g}" for name in names)
            run.show.print(f"evaluation of step {step}: {scores}")
        self.standing.pending = None
        self.standing.without_better += 1
        if chosen and not evaluation.unread:
            self.standing.chosen = chosen
            score = result["scores"].get(self.validator.spec.metric)
            if evaluator.is_better(score, self.standing.best_score, self.settings.score):
                best = {"best_score": score, "best_step": step, "without_better": 0}
                self.standing = dataclasses.replace(self.standing, **best)
                changes = {"evaluations": self.state_dict()}
                run.saver.promote(CANDIDATE, BEST, step=step, changes=changes)
        run.save()
        if run.settings.monitor.picture:
            slices = evaluation.slices and self._with_masks(evaluation.slices, chosen)
            threshold = chosen.get("threshold", evaluator.DEFAULT_THRESHOLD)
            if threshold == AUTO and slices:
                threshold = slices[AUTO]
            picture.draw_progress(run.folder, run.folder.name, slices, threshold)

    def _with_masks(self, slices, chosen):
        """Slices with "mask", {region: (H, W) bool} at the thresholds that were chosen."""
        spec, default = self.validator.spec, evaluator.DEFAULT_THRESHOLD
        thresholds = chosen.get("threshold", default)
        if not isinstance(thresholds, dict):
            thresholds = slices[AUTO] if thresholds == AUTO else thresholds
            thresholds = dict.fromkeys(spec.outputs.regions, thresholds)
        encoded = evaluator.encode(spec, slices["probs"])
        return slices | {"mask": evaluator.masks(spec, encoded, thresholds)}

    def best_is_lost(self, error):
        """The best state could not be kept: the one in best.pt, if any, is it again."""
        try:
            saved = checkpoint.load(self.run.saver.folder / BEST)
            best = saved["loop"]["evaluations"]
            before = (saved["data"] or {}).get("measured")
            if before and differences(before, self.run.metadata["measured"]):
                best = {}
        except checkpoint.CheckpointError:
            best = {}
        step = best.get("best_step")
        self.standing.best_score, self.standing.best_step = best.get("best_score"), step
        kept = f"there is no {BEST}" if step is None else f"{BEST} stays that of step {step}"
        self.run.report("best lost", f"the best state is not kept, {kept}: {error}")

    def out_of_patience(self):
        """Whether as many evaluations as validation.patience allows brought nothing better."""
        worse = self.run.group.from_first(lambda: self.standing.without_better)
        if not 0 < self.settings.patience <= worse:
            return False
        self.run.show.print(f"no better {self.settings.score} in {worse} evaluations")
        return True
