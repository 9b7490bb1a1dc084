"""What keeps a run: its records, the state that it saves, and how it leaves.

keep = Keeper(run_folder, loop, ...)
keep.record("evaluation", scores=...)     # a line of the log
keep.report("worker died", "...")         # a line of trouble, also for the terminal
keep.reason()                             # why to leave after this step, or None
keep.save("last.pt")                      # copied now, written while training goes on
status = keep.leave(error)                # in place of an end
"""

import sys
import time
import traceback

import data
from monitoring import picture
from runtime import checkpoint
from runtime import evaluator as judging
from runtime import microbatch as fitting
from runtime import signals as stopping
from runtime.memory_guard import MemoryGuard

FAILED, STOPPED = 1, 75


class Keeper:
    """Writes down what happens to a run, saves its state, and says when it must leave.

    loop: the state of the loop, by reference; log, show: a RunLog and a ProgressLine; stop: a
    `stopping.Stop`; saver: a `checkpoint.Saver`; iterations: steps of an epoch; save_minutes: from
    one save to the next, None for none within an epoch; limit: bytes of memory for the whole run or
    None; by: the score that picks best.pt; picture: whether progress.png is drawn. batches and
    parts are given once they are made: they need `report` themselves.
    """

    def __init__(
        self,
        run_folder,
        loop,
        patches,
        *,
        log,
        show,
        stop,
        saver,
        iterations,
        save_minutes,
        limit,
        by,
        picture,
    ):
        self.run_folder, self.loop, self.patches = run_folder, loop, patches
        self.log, self.show, self.stop, self.saver = log, show, stop, saver
        self.iterations, self.save_minutes = iterations, save_minutes
        self.by, self.picture = by, picture
        self.guard = MemoryGuard(patches.cache, limit=limit, report=self.report)
        self.batches = self.parts = None
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------------------ records

    def record(self, event, **fields):
        """A line of the log, at the step and epoch that is now."""
        step = self.loop["step"]
        self.log.write(event, step=step, epoch=step // self.iterations, **fields)

    def report(self, kind, text, **figures):
        """Something went wrong, and the run goes on."""
        self.show.say(f"step {self.loop['step']}: {text}")
        self.record("trouble", kind=kind, text=text, **figures)

    def evaluation(self, found):
        """Log a `validation.Evaluation`, and keep the state that it was of if that is the best.

        None is no evaluation. One without all of its scores (a case that could not be read, a judge
        that died) chooses nothing.
        """
        if found is None:
            return
        verdict = found.verdict or {"scores": {}, "cases": {}, "steps": []}
        chosen = {key: verdict[key] for key in judging.CHOICES if key in verdict}
        content = {key: verdict[key] for key in ("scores", "cases", "steps")}
        content |= {"chosen": chosen, "unread": found.unread}
        epoch = found.step // self.iterations
        self.log.write("evaluation", step=found.step, epoch=epoch, **content)
        if verdict["scores"]:
            scores = " ".join(f"{name} {value:.4g}" for name, value in verdict["scores"].items())
            self.show.say(f"evaluation of step {found.step}: {scores}")
        self.loop.update(pending=None, worse=self.loop["worse"] + 1)
        if chosen and not found.unread:
            self._choose(found.step, verdict["scores"].get(self.by), chosen)
        self.save("last.pt")
        if self.picture:
            threshold = chosen.get("threshold", judging.USUAL)
            picture.draw_progress(self.run_folder, self.run_folder.name, found.slices, threshold)

    def _choose(self, step, score, chosen):
        self.loop["chosen"] = chosen
        if judging.better(score, self.loop["best_score"], self.by):
            best = {"best_score": score, "best_step": step, "worse": 0}
            self.loop.update(best)
            changes = best | {"pending": None, "chosen": chosen}
            self.saver.promote("candidate.pt", "best.pt", step=step, changes=changes)

    # ------------------------------------------------------------------------ leaving

    def reason(self):
        """Why the run shall leave, or None; gives memory back where that is short."""
        return self.stop.reason() or self.guard.look(self.batches)

    def check(self):
        """Raises `stopping.Stopped` if there is a reason; for what takes longer than a step."""
        if reason := self.reason():
            raise stopping.Stopped(reason)

    def leave(self, error):
        """The exit status of a run that this ended; the state of its last whole step is saved.

        stopping.Stopped is 75, what a run cannot get over is 1, and of anything else the traceback
        is recorded and it is raised again.
        """
        if isinstance(error, OSError) and checkpoint.no_room(error):
            return self._leave_full_disk(error)
        if isinstance(error, MemoryError) or fitting.out_of_memory(error):
            self._record_crash(error)  # the lines tell where
            reason = str(error).split("\n")[0] or "MemoryError"
            return self._leave_as_saved(
                f"memory ran out where no step can be made smaller ({reason}); lower model.base or "
                "data.cache_gb, or end what else runs there"
            )
        if not isinstance(error, stopping.Stopped | stopping.CannotGoOn | data.TooManyExcluded):
            self._record_crash(error)
            raise error
        status = STOPPED if isinstance(error, stopping.Stopped) else FAILED
        try:
            if self.saver.step != self.loop["step"]:
                self.save("last.pt")
            self.tell_of_saved(wait=True)
            self.record("stop", reason=str(error), status=status)
        except OSError as disk:
            return self._leave_full_disk(disk)
        self._say(f"{error}; the state of step {self.loop['step']} is saved", status)
        return status

    def _leave_full_disk(self, error):
        return self._leave_as_saved(f"the disk does not take what the run writes ({error})")

    def _leave_as_saved(self, text):
        """Leave with the state that is on the disk, for no other can be saved."""
        self.saver.close()
        step = self.saver.on_disk
        text += "; no state is kept" if step is None else f"; the state of step {step} is kept"
        try:
            self.record("stop", reason=text, status=FAILED)
        except OSError:
            pass  # it says so itself
        self._say(text, FAILED)
        return FAILED

    def _record_crash(self, error):
        try:
            text = "".join(traceback.format_exception(error))
            self.record("crash", error=f"{type(error).__name__}: {error}", traceback=text)
        except OSError:
            pass  # the error itself is what counts

    def _say(self, text, status):
        where = self.run_folder / "checkpoints"
        text = f"stopped at step {self.loop['step']}: {text} in {where}; go on with --resume"
        if status == FAILED:
            print(text, file=sys.stderr, flush=True)
        else:
            self.show.say(text)

    # ------------------------------------------------------------------------ saving

    def due(self):
        """Whether so much time has passed since the last save that the next one is due."""
        waited = time.monotonic() - self.saved_at
        return bool(self.save_minutes) and waited > 60 * self.save_minutes and not self.saver.busy

    def save(self, name, also=None):
        """Copy the state as it is, and have it written while training goes on.

        also: a second name for the file.
        """
        learnt = {"part": self.parts.size, "recompute": self.parts.recompute}
        learnt |= {"excluded": self.patches.state_dict(), "lines": self.log.lines}
        self.saver.save(name, self.loop | learnt, also)
        self.saved_at = time.monotonic()

    def tell_of_saved(self, *, wait=False):
        """Record what was written; wait for all of it. OSError if the disk did not take it."""
        for written in self.saver.written(wait=wait):
            if isinstance(written, checkpoint.CheckpointError):
                self._best_is_lost(written)
                continue
            path, size, seconds = written
            self.record("saved", file=path.name, bytes=size, seconds=round(seconds, 3))

    def _best_is_lost(self, error):
        """The best state could not be kept: the one in best.pt, if any, is it again."""
        try:
            known = checkpoint.load(self.saver.folder / "best.pt")["loop"]
        except checkpoint.CheckpointError:
            known = {}
        self.loop.update({key: known.get(key) for key in ("best_score", "best_step")})
        step = self.loop["best_step"]
        kept = "there is no best.pt" if step is None else f"best.pt stays that of step {step}"
        self.report("best lost", f"the best state is not kept, {kept}: {error}")
