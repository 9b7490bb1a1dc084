"""A run: how it leaves for each kind of error, and which state is the best."""

import dataclasses
import errno
from types import SimpleNamespace

import pytest
import torch

from runtime import build, checkpoint, config, distributed, ending
from runtime import run as run_module
from runtime.evaluations import Standing
from runtime.microbatch import MicroBatch
from runtime.run import Run
from runtime.signals import CannotGoOn, Stopped
from runtime.validation import Evaluation
from tests.runtime.test_checkpoint import state_of

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


class Log:
    """A log that may be on a full disk."""

    def __init__(self):
        self.events, self.full, self.lines = [], False, 5

    def write(self, event, *, step, epoch, **fields):
        if self.full:
            raise NO_ROOM
        self.events.append({"event": event, "step": step, "epoch": epoch, **fields})

    def of(self, event):
        return [e for e in self.events if e["event"] == event]


class Saver:
    """A saver that writes when it is asked what was written; error: what comes of it then."""

    def __init__(self, folder, step):
        self.folder, self.step, self.on_disk = folder, step, step
        self.given, self.promoted, self.error, self.lost = [], [], None, []
        self.closed, self.busy = False, False

    def save(self, loop, also=None):
        self.step = loop["step"]
        self.given.append((loop, also))

    def promote(self, name, to, *, step, changes):
        self.promoted.append((name, to, step, changes))

    def written(self, *, wait=False):
        if self.error is not None:
            raise self.error
        self.on_disk, lost, self.lost = self.step, self.lost, []
        return [checkpoint.Saved(self.folder / "last.pt", 9, 0.25), *lost]

    def close(self):
        self.closed = True


class Patches:
    cache, missing, excluded = None, [], {}

    def state_dict(self):
        return {}


def made_settings(tmp_path, metric):
    """Of a run that saves at the ends of epochs of 4 steps, and draws nothing."""
    changes = [f"run.folder={tmp_path}", "run.name=r", f"validation.score={metric}"]
    changes += ["training.save_minutes=null", "training.train_iterations_per_epoch=4"]
    return config.build(config.apply_overrides({}, [*changes, "monitor.picture=false"]))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """make(step, saved) -> (run, log, saver, lines): a run at a step whose last save is older."""
    monkeypatch.setattr(build, "metadata", lambda plan: {"measured": {}, "trained": {}})

    def make(step=7, saved=5, metric="dice"):
        plan = SimpleNamespace(
            settings=made_settings(tmp_path, metric),
            notes=[],
            split=SimpleNamespace(validation=["a"]),
            group=distributed.Group(),
            device=torch.device("cpu"),
            precision="fp32",
        )
        micro_batch = MicroBatch(torch.nn.Identity(), None)
        run = Run(
            plan, Patches(), {}, micro_batch, stop_step=9, opened=(tmp_path / "r", None, None, [])
        )
        lines = []
        run.step, run.folder = step, tmp_path
        run.log, run.saver = Log(), Saver(tmp_path / "checkpoints", saved)
        run.show, run.batches = SimpleNamespace(print=lines.append), None
        run.stop = SimpleNamespace(reason=lambda: None)
        run.guard = SimpleNamespace(look=lambda batches: None)
        run.evaluations.standing = Standing(best_score=0.5, best_step=3, pending=step)
        return run, run.log, run.saver, lines

    return make


# ---------------------------------------------------------------------------- leaving


def test_a_stopped_run_saves_its_last_whole_step_and_says_how_to_go_on(made, capsys):
    run, log, saver, lines = made()
    assert ending.leave(run, Stopped("signal SIGTERM")) == 75
    ((loop, also),) = saver.given
    assert (loop["step"], loop["lines"], loop["excluded"], also) == (7, 5, {}, None)
    assert loop["micro_batch"] == {"size": None, "checkpointing": False, "memory": None}
    assert [e["event"] for e in log.events] == ["saved", "stop"]  # a stop that is told is saved
    assert log.of("stop") == [
        {"event": "stop", "step": 7, "epoch": 1, "reason": "signal SIGTERM", "status": 75}
    ]
    (text,) = lines
    assert "stopped at step 7: signal SIGTERM; the state of step 7 is saved" in text
    assert (
        text.endswith(f"go on with: python train.py --resume {run.folder}")
        and capsys.readouterr().err == ""
    )


def test_a_state_that_is_saved_already_is_not_saved_again(made):
    run, log, saver, _ = made(step=5, saved=5)
    assert ending.leave(run, Stopped("enough")) == 75
    assert saver.given == [] and log.of("stop")[0]["reason"] == "enough"


def test_a_run_that_cannot_go_on_is_saved_and_tells_so_on_the_error_output(made, capsys):
    run, log, saver, lines = made()
    assert ending.leave(run, CannotGoOn("all is NaN")) == 1
    assert saver.given[0][0]["step"] == 7 and log.of("stop")[0]["status"] == 1
    error = capsys.readouterr().err
    assert "all is NaN" in error and len(error.splitlines()) == 1 and lines == []


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG]
)
def test_a_disk_that_takes_nothing_is_one_sentence_with_the_state_that_is_kept(
    made, capsys, number
):
    run, log, saver, _ = made()
    assert ending.leave(run, OSError(number, "told by the disk")) == 1
    assert saver.given == [] and saver.closed  # nothing more is tried, what was begun is waited for
    error = capsys.readouterr().err
    assert "told by the disk" in error and "the state of step 5 is kept" in error
    assert len(error.splitlines()) == 1 and log.of("stop")[0]["status"] == 1


@pytest.mark.parametrize("why", [Stopped("signal SIGTERM"), CannotGoOn("all is NaN")])
def test_a_disk_that_is_full_when_the_run_leaves_keeps_the_state_before(made, capsys, why):
    run, log, saver, _ = made()
    saver.error = NO_ROOM
    log.full = True  # nor has the log any room
    assert ending.leave(run, why) == 1
    error = capsys.readouterr().err
    assert "the state of step 5 is kept" in error and len(error.splitlines()) == 1


def test_a_full_disk_before_anything_was_saved_says_that_nothing_is_kept(made, capsys):
    run, _, _, _ = made(step=0, saved=None)
    assert ending.leave(run, NO_ROOM) == 1
    assert "no state is kept in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError()]
)
def test_memory_that_runs_out_beside_the_network_is_one_sentence(made, capsys, error):
    run, log, saver, _ = made()
    assert ending.leave(run, error) == 1
    told = capsys.readouterr().err
    assert "memory ran out" in told and "the state of step 5 is kept" in told
    assert len(told.splitlines()) == 1 and saver.given == [] and saver.closed
    assert log.of("crash") and log.of("stop")[0]["status"] == 1  # the lines, and the last word


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("what"), KeyboardInterrupt(), OSError(errno.ENOENT, "gone")]
)
def test_what_nobody_expected_is_recorded_with_its_lines_and_raised(made, error):
    run, log, saver, _ = made()
    with pytest.raises(type(error)) as caught:
        try:
            raise error
        except BaseException as raised:
            ending.leave(run, raised)
    assert caught.value is error and saver.given == []
    (crash,) = log.of("crash")
    assert crash["error"].startswith(type(error).__name__) and "test_run.py" in crash["traceback"]


def test_a_crash_on_a_full_disk_is_still_the_crash(made):
    run, log, _, _ = made()
    log.full = True
    with pytest.raises(ZeroDivisionError):
        ending.leave(run, ZeroDivisionError("what"))


def test_a_best_state_that_was_lost_does_not_keep_a_run_from_leaving_with_its_state(made):
    run, log, saver, _ = made()
    saver.lost = [checkpoint.CheckpointError("candidate.pt: gone")]
    assert ending.leave(run, Stopped("enough")) == 75
    assert [e["event"] for e in log.events] == ["saved", "trouble", "stop"]


# ---------------------------------------------------------------------------- the best


def finished(run, *results):
    """Let the evaluations of a run end with these, one after another."""
    for result in results:
        spec = SimpleNamespace(metric=run.settings.validation.score)
        run.evaluations.validator = SimpleNamespace(result=lambda wait, r=result: r, spec=spec)
        run.evaluations.finish(wait=True)


def scored(score, step=6, unread=(), name="dice"):
    result = {"scores": {name: score}, "cases": {}, "steps": [], "tried": [], "threshold": 0.4}
    return Evaluation(step, result | {"min_component_voxels": 10}, list(unread), None)


def test_a_better_score_makes_the_state_that_was_evaluated_the_best(made):
    run, log, saver, lines = made()
    finished(run, scored(0.6))
    chosen = {"threshold": 0.4, "min_component_voxels": 10}
    standing = Standing(best_score=0.6, best_step=6, chosen=chosen)
    assert run.evaluations.standing == standing
    changes = {"evaluations": dataclasses.asdict(standing)}
    assert saver.promoted == [("candidate.pt", "best.pt", 6, changes)]
    assert saver.given[0][0]["evaluations"]["best_step"] == 6
    (event,) = log.of("evaluation")
    assert (event["step"], event["epoch"], event["chosen"]) == (6, 1, chosen)
    assert "evaluation of step 6: dice 0.6" in lines[0]


@pytest.mark.parametrize("score", [0.5, 0.4])
def test_a_score_that_is_no_better_is_counted_and_its_choice_is_used(made, score):
    run, _, saver, _ = made()
    finished(run, scored(score), scored(score))
    standing = run.evaluations.standing
    assert saver.promoted == [] and (standing.best_step, standing.without_better) == (3, 2)
    assert standing.pending is None and standing.chosen["threshold"] == 0.4


def test_where_less_is_better_less_is_the_best(made):
    run, _, saver, _ = made(metric="assd")
    finished(run, scored(0.6, name="assd"))
    assert saver.promoted == []
    finished(run, scored(0.4, name="assd"))
    assert run.evaluations.standing.best_score == 0.4 and len(saver.promoted) == 1


def test_an_evaluation_that_lacks_a_case_or_its_scores_chooses_nothing(made):
    run, log, saver, _ = made()
    finished(run, scored(0.9, unread=["bar2"]), Evaluation(6, None, [], None))
    standing = run.evaluations.standing
    assert saver.promoted == [] and standing.best_score == 0.5
    assert standing.chosen == {} and standing.pending is None
    assert [e["unread"] for e in log.of("evaluation")] == [["bar2"], []]
    assert [e["scores"] for e in log.of("evaluation")] == [{"dice": 0.9}, {}]


def test_no_evaluation_is_no_line(made):
    run, log, saver, _ = made()
    finished(run, None)
    assert log.events == [] and saver.given == []


@pytest.mark.parametrize("kept", [4, None])
def test_a_best_state_that_was_lost_gives_its_place_back_to_the_one_in_the_file(made, kept):
    run, log, saver, lines = made()
    if kept is not None:
        best = {"step": kept, "evaluations": {"best_step": kept, "best_score": 0.3}}
        checkpoint.save(state_of(kept, loop=best), saver.folder / "best.pt")
    saver.lost = [checkpoint.CheckpointError("candidate.pt: gone")]
    run.check()
    assert run.evaluations.standing.best_step == kept
    assert run.evaluations.standing.best_score == (None if kept is None else 0.3)
    (trouble,) = log.of("trouble")
    assert (
        trouble["kind"] == "best lost" and "candidate.pt: gone" in trouble["text"] == lines[0][8:]
    )
    expected = "there is no best.pt" if kept is None else "best.pt stays that of step 4"
    assert expected in trouble["text"]


# ---------------------------------------------------------------------------- when to save


def test_a_save_is_due_when_its_minutes_have_passed_and_none_is_under_way(made, monkeypatch):
    run, _, saver, _ = made()
    now = [run.saved_at]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    assert not run.save_due()
    now[0] += 1e6
    assert not run.save_due()  # save_minutes is None
    run.settings.training.save_minutes = 10
    assert run.save_due()
    saver.busy = True
    assert not run.save_due()
    saver.busy = False
    run.save()
    now[0] += 599
    assert not run.save_due()
    now[0] += 2
    assert run.save_due()


def test_a_reason_is_that_to_stop_or_that_of_the_memory(made):
    run, _, _, _ = made()
    run.check()
    run.guard = SimpleNamespace(look=lambda batches: "memory is short")
    with pytest.raises(Stopped, match="memory is short"):
        run.check()
    run.stop = SimpleNamespace(reason=lambda: "signal SIGTERM")
    assert run.why_stop() == "signal SIGTERM"
