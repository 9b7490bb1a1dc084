import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from monitoring import health
from tests.monitoring.test_records import NOW, line, read, start, step, write_lines

HERE = socket.gethostname()
GB = 10**9


@pytest.fixture(autouse=True)
def machine_was_never_restarted(monkeypatch):
    monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)


def event(name, number=0, **fields):
    return {"event": name, "time": NOW + number, "step": number, "epoch": 0, **fields}


def run_of(folder, log=(), system=()):
    write_lines(folder / "log.jsonl", log)
    if system:
        write_lines(folder / "system.jsonl", system)
    return read(folder)


def status(run, seconds):
    """At so many seconds after NOW."""
    return health.RunHealth(run).status(NOW + seconds)


FAR = {"host": "far", "pid": 7, "created": NOW - 3}


# ---------------------------------------------------------------------------- states


def test_a_run_whose_last_event_is_its_end_is_done(tmp_path):
    run = run_of(tmp_path, [start(**FAR), step(1), event("end", 90)])
    result = status(run, 10**6)
    assert (result.state, result.notes) == (health.DONE, ())
    assert "step 90" in result.text


def test_a_run_that_left_early_says_why_and_how_to_go_on(tmp_path):
    saved = event("saved", 80, file="checkpoints/last.pt", seconds=1.0, bytes=1)
    stop = event("stop", 90, reason="interrupted", status=75)
    result = status(run_of(tmp_path / "r", [start(**FAR), saved, stop]), 10**6)
    assert result.state == health.STOPPED and result.text.startswith("interrupted, at step 90")
    (advice,) = result.notes
    assert advice.startswith(f"python train.py --resume {tmp_path / 'r'} goes on")
    assert "step 80" in advice


def test_a_crash_is_shown_with_its_error_and_where_it_was_raised(tmp_path):
    trace = 'Traceback\n  File "a.py", line 1, in f\n  File "b.py", line 9, in g\nKeyError: 1\n'
    crash = event("crash", 5, error="KeyError: 1", traceback=trace)
    result = status(run_of(tmp_path, [start(**FAR), crash]), 10**6)
    assert result.state == health.CRASHED and result.text.startswith("KeyError: 1, at step 5")
    assert result.notes[0] == 'raised in File "b.py", line 9, in g'
    assert result.notes[1] == "no state was saved: start it again"


def test_the_end_of_an_earlier_start_says_nothing_of_the_last(tmp_path):
    log = [start(**FAR), event("stop", 5, reason="interrupted"), start(6, **FAR)]
    assert status(run_of(tmp_path, log, [line(6, seconds=10)]), 9).state == health.RUNNING


def test_a_process_that_is_killed_turns_a_running_run_into_a_dead_one(tmp_path):
    text = "print(1, flush=True)\nimport time\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    child.stdout.readline()
    created = psutil.Process(child.pid).create_time()
    run = run_of(tmp_path, [start(host=HERE, pid=child.pid, created=created)])
    watch = health.RunHealth(run)
    assert watch.status(NOW + 1).state == health.RUNNING
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while watch.status(NOW + 1).state == health.RUNNING and time.monotonic() < deadline:
        time.sleep(0.01)  # a zombie from now on, since nobody has waited for it
    zombie = watch.status(NOW + 1)
    child.wait()
    child.stdout.close()
    for result in (zombie, watch.status(NOW + 2)):
        assert result.state == health.DEAD and f"no process {child.pid} on {HERE}" in result.text
        assert result.notes[0] == "killed from outside (SIGKILL), or the machine went down"


def test_another_process_with_the_same_pid_is_not_the_run(tmp_path):
    created = psutil.Process().create_time()
    for offset, state in ((0.0, health.RUNNING), (1.5, health.RUNNING), (-60.0, health.DEAD)):
        log = [start(host=HERE, pid=os.getpid(), created=created + offset)]
        assert status(run_of(tmp_path / str(offset), log), 1).state == state


def test_a_process_that_is_not_seen_but_writes_is_alive(tmp_path):
    # In a container that has the name of its machine, processes have other numbers.
    run = run_of(tmp_path, [start(host=HERE, pid=2**22 + 5)], [line(0, pid=2**22 + 5)])
    watch = health.RunHealth(run)
    assert watch.status(NOW + 1).state == health.DEAD
    write_lines(tmp_path / "system.jsonl", [line(3, pid=2**22 + 5)], mode="a")
    run.refresh(NOW + 3)
    assert watch.status(NOW + 3).state == health.RUNNING


@pytest.mark.parametrize(("silence", "state"), [(59, "running"), (61, "dead")])
def test_a_run_on_another_machine_is_dead_after_three_intervals_and_30_s(tmp_path, silence, state):
    run = run_of(tmp_path, [start(**FAR)], [line(100, seconds=10)])
    assert status(run, 100 + silence).state == state


def test_a_dead_run_on_another_machine_says_for_how_long(tmp_path):
    run = run_of(tmp_path, [start(**FAR)], [line(100, seconds=10)])
    assert status(run, 100 + 240).text == "ended without a last message; last line 4 min ago"


def test_lines_of_the_log_are_signs_of_life_too(tmp_path):
    # A disk that was full for a while leaves system.jsonl behind.
    run = run_of(tmp_path, [start(**FAR), step(500)], [line(100, seconds=10)])
    assert status(run, 520).state == health.RUNNING


def test_a_line_that_comes_in_counts_whatever_clock_its_machine_has(tmp_path):
    run = run_of(tmp_path, [start(**FAR)], [line(0, seconds=10)])
    assert status(run, 3600).state == health.DEAD
    write_lines(tmp_path / "system.jsonl", [line(10, seconds=10)], mode="a")
    run.refresh(NOW + 3600)
    assert status(run, 3601).state == health.RUNNING


def test_a_clock_that_is_ahead_is_reported_and_not_a_sign_of_life(tmp_path):
    result = status(run_of(tmp_path, [start(**FAR)], [line(7200, seconds=10)]), 0)
    assert result == (health.UNKNOWN, "the clock of far is 2 h 00 min ahead", ())


def test_without_times_or_a_process_the_state_is_unknown(tmp_path):
    assert status(read(tmp_path), 0) == (health.UNKNOWN, "nothing has been logged yet", ())
    old = {"event": "start", "step": 0, "epoch": 0}  # neither time, nor host, nor process
    result = status(run_of(tmp_path, [old, {"event": "step", "step": 10}]), 0)
    assert result == (
        health.UNKNOWN,
        "no line has a time; how long silence is normal is not known",
        (),
    )
    result = status(run_of(tmp_path, [start(), step(10)]), 3600)
    assert (
        result.state == health.UNKNOWN and "how long silence is normal is not known" in result.text
    )


# ---------------------------------------------------------------------------- cause of death


def causes(folder, *lines, log=()):
    """Of a run on another machine with these last lines of system.jsonl."""
    run = run_of(folder, [start(**FAR), *log], lines)
    cause = status(run, 10**6)
    assert cause.state == health.DEAD
    return cause.notes[:-1]  # without what to do


def test_memory_near_the_tightest_limit_means_the_oom_killer(tmp_path):
    rooms = [[60 * GB, 128 * GB, "memory of this machine"], [1.5 * GB, 32 * GB, "cgroup limit"]]
    (cause,) = causes(tmp_path, line(9, seconds=10, tree=30 * GB, rooms=rooms))
    assert cause.startswith("probably the kernel's OOM killer: 30.5 GB of 32.0 GB were used")
    assert "cgroup limit" in cause and "30.0 GB of 32.0 GB by this run" in cause
    assert "training.workers" in cause and "data.cache_gb" in cause


def test_a_limit_of_the_run_itself_is_none_that_the_kernel_kills_for(tmp_path):
    rooms = [[60 * GB, 128 * GB, "memory of this machine"], [0, 8 * GB, "run.memory_gb"]]
    cause = causes(tmp_path, line(9, seconds=10, tree=9 * GB, rooms=rooms))
    assert cause == ("killed from outside (SIGKILL), or the machine went down",)


def test_oom_kills_since_the_start_mean_the_oom_killer(tmp_path):
    (cause,) = causes(tmp_path / "a", line(9, seconds=10, new_oom_kills=2))
    assert cause == "the kernel's OOM killer: processes of this cgroup killed since the start: 2"
    (cause,) = causes(tmp_path / "b", line(9, seconds=10, new_oom_kills=0))
    assert cause == "killed from outside (SIGKILL), or the machine went down"


def test_the_trace_of_a_fault_comes_first_if_it_is_of_this_start(tmp_path):
    text = (
        "Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n"
        '  File "wait.py", line 3 in wait\n\nCurrent thread 0x2 (most recent call first):\n'
        '  File "model.py", line 12 in forward\n  File "train.py", line 3 in main\n'
    )
    (tmp_path / "fault.txt").write_text(text)
    os.utime(tmp_path / "fault.txt", (NOW + 5, NOW + 5))
    (cause,) = causes(tmp_path, line(9, seconds=10))
    assert cause == (
        'Fatal Python error: Segmentation fault, in File "model.py", line 12 in forward (fault.txt)'
    )
    os.utime(tmp_path / "fault.txt", (NOW - 500, NOW - 500))
    assert "SIGKILL" in causes(tmp_path, line(9, seconds=10))[0]


def test_a_full_disk_and_a_full_gpu_are_reported(tmp_path):
    gpus = [
        {"index": 0, "used": 70 * GB, "total": 80 * GB},
        {"index": 1, "used": 79.5 * GB, "total": 80 * GB},
        {"index": 2, "used": None, "total": None},
    ]
    disk, gpu = causes(tmp_path, line(9, seconds=10, disk=[GB, 1000 * GB], gpus=gpus))
    assert disk == "the disk was full: 1.0 GB of 1.0 TB were free"
    assert gpu == "memory of GPU 1 was full: 79.5 GB of 80.0 GB"


def test_a_machine_that_was_restarted_since_is_the_cause_before_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "boot_time", lambda: NOW + 50)
    lines = [line(9, pid=2**22 + 5, host=HERE, oom_kills=1)]
    run = run_of(tmp_path, [start(host=HERE, pid=2**22 + 5)], lines)
    (cause, _) = status(run, 100).notes
    assert cause.startswith("the machine went down: it was started at")


# ---------------------------------------------------------------------------- pace


PLAN = {"steps": 300, "iterations": 100, **FAR}


def steady(first, last, seconds=2.0):
    """Lines of every tenth step, at so many seconds per step."""
    lines = [step(s, step_seconds=seconds) for s in range(first, last + 1, 10)]
    return [{**e, "time": NOW + e["step"] * seconds} for e in lines]


def at(name, seconds, number, **fields):
    return {**event(name, number, **fields), "time": NOW + seconds}


def test_what_is_left_is_the_steps_that_are_left_at_the_present_rate(tmp_path):
    run = run_of(tmp_path, [start(**PLAN), *steady(10, 50)])
    pace = health.pace(run, NOW + 100)
    assert (pace.step, pace.steps) == (50, 300)
    assert (pace.epoch, pace.epochs, pace.step_seconds, pace.between_epochs) == (
        1,
        3,
        2.0,
        None,
    )
    assert (pace.epoch_left, pace.run_left) == (100.0, 500.0)
    later = health.pace(run, NOW + 106)  # 3 steps further, if all is well
    assert (later.epoch_left, later.run_left) == (94.0, 494.0)


def test_evaluations_count_once_for_each_end_of_an_epoch_ahead(tmp_path):
    ends = [at("epoch", 200, 100), at("saved", 201, 100), at("evaluation", 230, 100)]
    ends.append(at("saved", 231, 100))
    log = [start(**PLAN), *steady(10, 100), *ends]
    for late in steady(110, 150):
        log.append({**late, "time": late["time"] + 31})
    pace = health.pace(run_of(tmp_path, log), NOW + 331)
    assert (pace.between_epochs, pace.epoch_left) == (31.0, 100.0)
    assert pace.run_left == 150 * 2.0 + 2 * 31


def test_while_an_evaluation_runs_it_is_counted_as_ahead(tmp_path):
    first = [at("epoch", 200, 100), at("evaluation", 231, 100)]
    log = [start(**PLAN), *steady(10, 100), *first]
    log += [{**late, "time": late["time"] + 31} for late in steady(110, 200)]
    log.append(at("epoch", 431, 200))
    pace = health.pace(run_of(tmp_path, log), NOW + 431 + 10)
    assert pace.run_left == 100 * 2.0 + 2 * 31 - 10
    assert pace.epoch == 3


def test_a_run_that_stands_still_comes_no_nearer_to_its_end(tmp_path):
    run = run_of(tmp_path, [start(**PLAN, log_every=10), *steady(10, 50)])
    late = [health.pace(run, NOW + 100 + seconds) for seconds in (10, 20, 30, 3000)]
    assert [one.run_left for one in late] == [490.0, 480.0, 480.0, 480.0]
    assert [one.epoch_left for one in late] == [90.0, 80.0, 80.0, 80.0]


def test_the_last_epoch_is_full_and_not_the_next_one_begun(tmp_path):
    pace = health.pace(run_of(tmp_path, [start(**PLAN), *steady(10, 300)]), NOW + 600)
    assert (pace.epoch, pace.epochs, pace.run_left) == (3, 3, 0.0)


def test_between_two_lines_of_the_log_system_jsonl_has_the_step(tmp_path):
    run = run_of(tmp_path, [start(**PLAN), *steady(10, 50)], [line(58)])
    pace = health.pace(run, NOW + 116)
    assert (pace.step, pace.run_left) == (58, 484.0)


def test_the_rate_is_the_mean_of_the_last_20_lines_without_the_first(tmp_path):
    slow = [step(10, step_seconds=60.0)]
    assert health.step_seconds(run_of(tmp_path / "a", [start(), *slow])) == 60.0
    few = [*slow, step(20, step_seconds=1.0), step(30, step_seconds=3.0)]
    assert health.step_seconds(run_of(tmp_path / "b", [start(), *few])) == 2.0
    many = [step(i, step_seconds=5.0) for i in range(30)]
    many += [step(30 + i, step_seconds=1.0 + i % 2) for i in range(20)]
    assert health.step_seconds(run_of(tmp_path / "c", [start(), *many])) == 1.5
    assert health.step_seconds(run_of(tmp_path / "d", [start()])) is None


def test_without_a_plan_or_a_time_nothing_is_promised(tmp_path):
    old = {"event": "step", "step": 30, "step_seconds": 1.0}
    pace = health.pace(run_of(tmp_path, [old]), NOW)
    assert (pace.step, pace.steps, pace.run_left, pace.epoch_left) == (30, None, None, None)
    assert health.pace(read(tmp_path / "none"), NOW).step == 0


# ---------------------------------------------------------------------------- damaged values


FIELDS = "host pid created steps iterations log_every time score better".split()
FIGURES = "host pid seconds step tree rooms disk gpus processes new_oom_kills time".split()
DAMAGED = [
    "x",
    "",
    [],
    {},
    [["x"]],
    ["x", 1],
    [1, None, 2],
    -1,
    0.5,
    float("nan"),
    1e30,
    None,
    True,
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=repr)
@pytest.mark.parametrize("host", ["far", HERE])
def test_a_value_of_another_type_than_the_run_writes_raises_nothing(tmp_path, damaged, host):
    log, reading = start(**{**PLAN, "host": host}, log_every=10), line(50, seconds=10)
    cases = [({**log, field: damaged}, reading) for field in FIELDS]
    cases += [(log, {**reading, "disk": [5, 9], field: damaged}) for field in FIGURES]
    for number, (begin, last) in enumerate(cases):
        run = run_of(tmp_path / str(number), [begin, *steady(10, 50)], [last])
        assert health.RunHealth(run).status(NOW + 10**6).text
        assert health.pace(run, NOW + 200).step == pytest.approx(50, abs=1) or damaged == 1e30
