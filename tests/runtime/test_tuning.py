"""The plan by which settings are tried: what is tried, what is kept, and why."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

from monitoring import machine
from runtime import config, signals, tuning
from runtime.tuning import (
    ACCUMULATE,
    BATCH,
    CHECKPOINTING,
    KEYS,
    PRECISION,
    PREFETCH,
    WORKERS,
    ShortRun,
    Trial,
)

CPU, CUDA, GB = torch.device("cpu"), torch.device("cuda"), 10**9
NO_MEMORY = "cuda ran out of memory (made up)"


def make_plan(*overrides, device=CPU):
    settings = config.build(config.apply_overrides({}, overrides))
    asked, split = settings.training.precision, SimpleNamespace(train=[])
    precision = "fp32" if asked == "auto" else asked
    return SimpleNamespace(settings=settings, split=split, device=device, precision=precision)


def decide(*overrides, seconds=lambda s: 1.0, fault=lambda s: "", error=0.0, device=CPU):
    """(tuner, what it said) of settings whose step takes seconds({key: value}) here."""
    plan, said = make_plan("training.workers=0", *overrides, device=device), []

    def measure(changes):
        values = tuner.config | changes
        if reason := fault(values):
            return Trial(changes, fault=reason)
        return Trial(changes, seconds=seconds(values), error=error, wait=0.1, ram=GB)

    tuner = tuning.Tuner(plan, measure, said.append)
    tuner.decide()
    return tuner, said


def tried(tuner, key):
    """The values of a setting in the order of the trials, without those that did not change it."""
    return [trial.changes[key] for trial, _ in tuner.rows if key in trial.changes]


def line(said, title):
    (found,) = [text for text in said if text.startswith(title)]
    return found


# ---------------------------------------------------------------------------- phases


def test_a_phase_goes_up_while_it_helps_and_goes_back_where_it_does_not():
    times = {0: 1.0, 1: 0.8, 2: 0.6, 4: 0.6, 6: 0.1}
    tuner, said = decide("training.train_batch_size=1", seconds=lambda s: times[s[WORKERS]])
    assert tuner.decided[WORKERS] == 2 and 6 not in tried(tuner, WORKERS)
    assert said[2].startswith("workers    workers=2: step 0.600 s") and "25.0% less" in said[2]
    assert said[3].endswith("no gain: 0.0% more time, noise 2.0%; back to workers=2")


def test_where_more_does_not_help_less_is_tried():
    times = {0: 0.9, 1: 0.5, 2: 0.7, 4: 1.0, 6: 1.1}
    tuner, _ = decide(
        "training.workers=4", "training.train_batch_size=1", seconds=lambda s: times[s[WORKERS]]
    )
    assert tuner.decided[WORKERS] == 1
    assert list(dict.fromkeys(tried(tuner, WORKERS))) == [6, 2, 1, 0]


@pytest.mark.parametrize(
    "gain, error, taken", [(0.10, 0.01, True), (0.10, 0.05, False), (0.015, 0.0, False)]
)
def test_only_a_gain_above_the_noise_is_kept(gain, error, taken):
    # Two standard errors of the difference: 0.028 and 0.141; at least 0.02.
    tuner, said = decide(seconds=lambda s: 1 - gain * (s[WORKERS] > 0), error=error)
    assert (tuner.decided[WORKERS] > 0) == taken
    assert f"{gain:.1%} less time" in line(said, "workers    workers=1")


def test_a_machine_that_was_busy_at_first_makes_no_gain():
    times = iter([1.0])
    tuner, said = decide(seconds=lambda s: next(times, 0.7))
    assert tuner.best.changes == {} and tuner.rows[1][1] == "repeated"
    assert "no gain: 0.0%" in line(said, "workers    workers=1")


@pytest.mark.parametrize(
    "batch, accumulate, expected",
    [(1, 4, [2, 4]), (2, 1, [1]), (2, 2, [4]), (4, 1, [2, 1]), (8, 1, [4, 2, 1]), (3, 1, [1])],
)
def test_a_step_keeps_its_patches_whatever_the_batch(batch, accumulate, expected):
    ahead = {n: i for i, n in enumerate(expected)}  # each is better than the one before
    tuner, _ = decide(
        f"training.train_batch_size={batch}",
        f"training.accumulate={accumulate}",
        seconds=lambda s: 1 - 0.1 * ahead.get(s[BATCH], -1),
    )
    assert list(dict.fromkeys(tried(tuner, BATCH))) == expected
    sizes = {s[BATCH] * s[ACCUMULATE] for s in (tuner.config | t.changes for t, _ in tuner.rows)}
    assert sizes == {batch * accumulate}
    assert {key for trial, _ in tuner.rows for key in trial.changes} <= {*KEYS}  # no learning rate


def test_a_batch_that_would_change_training_is_named():
    assert decide()[1][2].endswith("learning rate stay, so not with batches of 4")
    assert decide("training.accumulate=2")[1][2].endswith("learning rate stay")


def test_steps_of_one_patch_have_no_other_batches():
    tuner, said = decide("training.train_batch_size=1")
    assert "not tried: a step is of 1" in line(said, "batch") and BATCH not in tuner.decided


def test_a_batch_without_memory_is_taken_back_and_tried_with_recomputation():
    def fault(settings):
        return NO_MEMORY if settings[BATCH] == 4 and not settings[CHECKPOINTING] else ""

    split = ["training.train_batch_size=2", "training.accumulate=2"]
    slow, said = decide(*split, fault=fault)
    kept = {WORKERS: 0, BATCH: 2, ACCUMULATE: 2, PRECISION: "auto", CHECKPOINTING: False}
    assert slow.decided == kept
    failed = line(said, "batch      train_batch_size=4")
    assert failed.endswith(f"{NO_MEMORY}; back to train_batch_size=2 accumulate=2")
    fast, _ = decide(*split, fault=fault, seconds=lambda s: 4 / s[BATCH])
    assert fast.decided == kept | {BATCH: 4, ACCUMULATE: 1, CHECKPOINTING: True}


def test_settings_without_memory_give_way_to_slower_ones_that_fit():
    tuner, said = decide(
        "training.train_batch_size=4",
        fault=lambda s: NO_MEMORY if s[BATCH] > 1 else "",
        seconds=lambda s: 9.0,
    )
    assert tuner.best.fault == "" and tuner.decided[BATCH] == 1
    assert NO_MEMORY in said[0] and NO_MEMORY in line(said, "batch      train_batch_size=2")
    assert "taken: these settings work" in line(said, "batch      train_batch_size=1")


def test_where_one_patch_does_not_fit_recomputation_is_tried():
    tuner, _ = decide(fault=lambda s: "" if s[CHECKPOINTING] else NO_MEMORY)
    assert tuner.best.fault == "" and tuner.decided[CHECKPOINTING] is True
    assert tuner.decided[BATCH] == 2


def test_recomputation_is_tried_with_smaller_batches_where_none_fits_without():
    tuner, _ = decide(
        "training.train_batch_size=4",
        fault=lambda s: "" if s[CHECKPOINTING] and s[BATCH] <= 2 else NO_MEMORY,
    )
    assert tuner.best.fault == "" and (tuner.decided[BATCH], tuner.decided[ACCUMULATE]) == (2, 2)


def test_where_nothing_works_the_best_has_the_fault():
    tuner, said = decide(fault=lambda s: NO_MEMORY)
    assert tuner.best.fault == NO_MEMORY and NO_MEMORY in said[-1]


def test_reading_ahead_is_tried_with_workers_alone():
    _, said = decide()
    assert "not tried: without workers" in line(said, "prefetch")
    tuner, _ = decide("training.workers=1", seconds=lambda s: 8 / s[PREFETCH])
    assert tuner.decided[PREFETCH] == 8
    assert tried(decide("training.workers=1")[0], PREFETCH) == [8]  # less would save no time


def test_fp32_gives_way_to_what_the_device_is_fast_at(monkeypatch):
    monkeypatch.setattr(tuning, "resolve_precision", lambda *_: ("bf16", "made up"))
    times = {"fp32": 1.0, "bf16": 0.5}
    asked = {"seconds": lambda s: times[s[PRECISION]], "device": CUDA}
    tuner, _ = decide("training.precision=fp32", **asked)
    assert tuner.decided[PRECISION] == "bf16"
    tuner, said = decide("training.precision=bf16", **asked)
    assert PRECISION not in tuner.decided and "bf16 is already" in line(said, "precision")
    tuner, said = decide("training.precision=fp32", **asked | {"device": CPU})
    assert tuner.value(PRECISION) == "bf16" and "precision=bf16" in line(said, "precision")


def test_recomputation_is_given_up_where_it_is_not_needed():
    slower = {"seconds": lambda s: 1 + 0.3 * s[CHECKPOINTING]}
    assert decide("model.checkpointing=true", **slower)[0].decided[CHECKPOINTING] is False
    tuner, said = decide(**slower)
    assert CHECKPOINTING not in tuner.decided and "memory is not short" in line(said, "recompute")


# ---------------------------------------------------------------------------- a trial


def reading(free=9 * GB, **changes):
    gpu = {"index": 0, "name": "made up", "used": 1 * GB, "total": 10 * GB, "load": 50}
    return {"rooms": [[free, 10 * GB, "cgroup limit"]], "tree": GB, "gpus": [gpu | changes]}


@pytest.mark.parametrize(
    "run, device, fault",
    [
        (ShortRun("train.py was killed by SIGKILL", [], []), CPU, "train.py was killed by SIGKILL"),
        (ShortRun("", [], [reading()]), CUDA, ""),
        (ShortRun("", [], [reading(), reading(free=GB // 4)]), CPU, "cgroup limit"),
        (ShortRun("", [], [reading(used=9.9 * GB)]), CUDA, "memory of the GPU"),
        (ShortRun("", [], [reading(used=9.9 * GB, index=1)]), CUDA, ""),
        (ShortRun("", [], [reading(used=None, total=None)]), CUDA, ""),
        (ShortRun("", [], [{"tree": None}]), CUDA, ""),
    ],
)
def test_a_failure_or_little_memory_is_a_fault(run, device, fault):
    text = tuning.fault_of(run, device)
    assert fault in text and (fault != "") == (text != "")


@pytest.mark.parametrize(
    "kind, is_fault",
    [("cuda memory", True), ("memory", True), ("worker died", True), ("case left out", False)],
)
def test_troubles_of_memory_are_faults(kind, is_fault):
    run = ShortRun("", [{"event": "trouble", "kind": kind, "text": "made up"}], [])
    assert tuning.fault_of(run, CPU) == ("made up" if is_fault else "")


def step_line(step, seconds, wait=0.1):
    return {"event": "step", "step": step, "step_seconds": seconds, "seconds": {"wait": wait}}


def test_steps_that_batches_read_before_could_speed_up_are_not_measured(monkeypatch):
    asked = []

    def run_training(plan, steps, changes):
        asked.append((steps, changes))
        log = [step_line(n, 9.0) for n in (5, 10, 15)]
        return ShortRun("", log + [step_line(20, 1.0), step_line(25, 2.0), step_line(30, 3.0)], [])

    monkeypatch.setattr(tuning, "run_training", run_training)
    overrides = ["training.workers=2", "training.prefetch_factor=4", "training.accumulate=2"]
    plan = make_plan(*overrides)
    trial = tuning.measure(plan, 15, {})
    assert asked == [(30, {})]  # 5, and 2 x 2 x 4 / 2 = 8 of reading ahead, are 15 in lines of 5
    assert (trial.seconds, trial.wait) == (2.0, pytest.approx(0.05))
    assert trial.error == pytest.approx(1 / 3**0.5)  # of the mean of 1, 2, 3, whose deviation is 1
    assert tuning.measure(plan, 15, {WORKERS: 0}).seconds == pytest.approx(24 / 5)
    assert asked[1] == (20, {WORKERS: 0})


def test_a_run_without_lines_of_steps_is_a_fault(monkeypatch):
    monkeypatch.setattr(tuning, "run_training", lambda *_: ShortRun("", [], []))
    assert "no times" in tuning.measure(make_plan(), 15, {}).fault


# ---------------------------------------------------------------------------- a run of train.py


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(code, overrides): what is left of a run of some Python code in place of train.py."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(tuning, "TRAIN", tmp_path / "code.py")

    def run(code, *overrides):
        tuning.TRAIN.write_text(f"import os, pathlib, signal, sys, time\n{code}\n")
        try:
            return tuning.run_training(make_plan(*overrides), 3)
        finally:
            assert list(temporary.iterdir()) == []

    return run


def test_regions_are_tried_in_their_order(run):
    """By which they are painted, and by which channels are theirs."""
    code = "text = pathlib.Path(sys.argv[1]).read_text(); print(text.split('regions:')[1].split())"
    failure = run(f"{code}; sys.exit(2)", "data.regions={vessel: [a, v], artery: [a]}").failure
    assert "['vessel:', '-', 'a', '-', 'v', 'artery:', '-', 'a'," in failure


def test_a_kill_is_named(run):
    assert run("os.kill(os.getpid(), signal.SIGKILL)") == ShortRun(
        "train.py was killed by SIGKILL", [], []
    )


def test_a_kill_by_the_kernel_is_named(run, monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr(machine, "oom_kills", lambda: next(counts))
    failure = run("os.kill(os.getpid(), signal.SIGKILL)").failure
    assert failure == "train.py was killed by SIGKILL, by the kernel, for memory ran out"


def test_the_last_line_or_the_log_says_why_a_run_failed(run):
    failure = run("print('a'); print('wrong', file=sys.stderr); print(); sys.exit(2)").failure
    assert failure == "train.py ended with exit status 2: wrong"
    log = '{"event": "stop", "step": 1, "reason": "memory is short"}'
    code = "folder = pathlib.Path(sys.argv[1]).parent / 'trial'; folder.mkdir()\n"
    code += f"(folder / 'log.jsonl').write_text({log!r} + chr(10)); print('more'); sys.exit(75)"
    assert run(code).failure == "train.py ended with exit status 75: memory is short"


@pytest.mark.parametrize(
    "name, error", [("SIGTERM", signals.Stopped), ("SIGINT", KeyboardInterrupt)]
)
def test_a_signal_ends_the_run_and_leaves_no_folder(run, tmp_path, name, error):
    """SIGINT comes twice, to a run that does not end for SIGTERM."""
    said = tmp_path / "pid"
    code = f"said = pathlib.Path({str(said)!r})\nsaid.write_text(str(os.getpid()))\n"
    if name == "SIGINT":
        code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        code += "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.5)\n"
    code += f"os.kill(os.getppid(), signal.{name})\ntime.sleep(20)\nsaid.write_text('slept')"
    with pytest.raises(error):
        run(code)
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)


# ---------------------------------------------------------------------------- what is written


def test_what_is_written_is_a_second_config_with_its_reasons(tmp_path):
    first, path = tmp_path / "first.yaml", tmp_path / "tuned.yaml"
    first.write_text("training: {workers: 1, max_epochs: 3}\n")
    decided = {WORKERS: 2, PRECISION: "bf16", CHECKPOINTING: True}
    tuning.write_settings(path, decided, ["workers: 1.2 s", "two\nlines: [a"])
    assert path.read_text().startswith("# workers: 1.2 s\n# two lines: [a\ntraining:\n")
    settings = config.load(first, [str(path)])
    assert (settings.training.workers, settings.training.max_epochs) == (2, 3)
    assert settings.training.precision == "bf16" and settings.model.checkpointing
    assert settings.run.name == "first"
