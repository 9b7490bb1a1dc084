import itertools
import json
import os

import pytest

from monitoring import records as history
from runtime import log as runlog

NOW = 1_700_000_000.0


def write_lines(path, events, mode="w"):
    """JSON lines as a run writes them; strings are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [e if isinstance(e, str) else json.dumps(e) + "\n" for e in events]
    with open(path, mode) as file:
        file.write("".join(lines))


def read(folder):
    run = history.History(folder)
    run.refresh(NOW)
    return run


def step(number, **fields):
    return {"event": "step", "time": NOW + number, "step": number, "epoch": 0, **fields}


def start(number=0, **fields):
    return {"event": "start", "time": NOW + number, "step": number, "epoch": 0, **fields}


def line(number, **fields):
    """One of system.jsonl."""
    return {"time": NOW + number, "host": "far", "pid": 7, "step": number, **fields}


# ---------------------------------------------------------------------------- the log


def test_steps_are_apart_from_other_events_in_their_order(tmp_path):
    end = {"event": "end", "time": NOW, "step": 3, "epoch": 0}
    write_lines(tmp_path / "log.jsonl", [start(), step(1), step(2), step(3), end])
    run = read(tmp_path)
    assert run.events == [start(), end]
    assert run.steps == run.recent == [step(1), step(2), step(3)]


def test_the_lines_that_runlog_writes_are_known_as_steps_by_their_beginning(tmp_path):
    log = runlog.RunLog(tmp_path, tensorboard=False)
    log.write("step", step=1, epoch=0, loss={"total": 0.5})
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes().startswith(history.STEP)


def test_lines_that_are_broken_are_left_out_and_one_that_is_not_whole_waits(tmp_path):
    log = tmp_path / "log.jsonl"
    broken = ["{broken\n", "\n", "[1]\n", "\0\0\n", '{"no": "event"}\n', {"event": "end"}]
    broken += [{"event": "end", "step": 1, "time": None}, {"event": "step", "step": None}]
    write_lines(log, [start(), *broken, step(1)])
    write_lines(log, ['{"event": "step", "step": 2, "ep'], mode="a")
    run = read(tmp_path)
    assert (run.events, run.steps) == ([start()], [step(1)])
    write_lines(log, ['och": 0}\n'], mode="a")
    run.refresh(NOW)
    assert [e["step"] for e in run.steps] == [1, 2]


def test_a_folder_without_files_has_no_history(tmp_path):
    run = read(tmp_path / "none")
    assert (run.events, run.steps, run.recent, list(run.lines), run.samples) == ([], [], [], [], [])
    assert (run.config, run.fault, run.fault_time, run.start) == ({}, "", None, {})


def test_only_what_is_new_is_read_and_the_clock_of_this_machine_tells_when(tmp_path):
    write_lines(tmp_path / "log.jsonl", [start(), step(1)])
    run = read(tmp_path)
    assert run.noticed is None
    run.refresh(NOW + 5)
    assert run.noticed is None
    write_lines(tmp_path / "log.jsonl", [step(2)], mode="a")
    run.refresh(NOW + 6)
    assert ([e["step"] for e in run.steps], run.noticed) == ([1, 2], NOW + 6)
    write_lines(tmp_path / "system.jsonl", [line(3)])
    run.refresh(NOW + 7)
    assert run.noticed == NOW + 7


def test_a_log_that_a_resumed_run_wrote_anew_is_read_from_its_beginning(tmp_path):
    log = tmp_path / "log.jsonl"
    write_lines(log, [start(), step(1), step(2), step(3), step(4)])
    run = read(tmp_path)
    write_lines(tmp_path / "log.partial", [start(), step(1), step(2)])
    os.replace(tmp_path / "log.partial", log)
    write_lines(log, [start(2, resumed=True), step(3, lr=0.5)], mode="a")
    run.refresh(NOW)
    assert [e["step"] for e in run.steps] == [1, 2, 3]
    assert run.steps[-1]["lr"] == 0.5
    assert [e["event"] for e in run.events] == ["start", "start"]


def test_recent_steps_and_events_are_those_since_the_last_start(tmp_path):
    stop = {"event": "stop", "time": NOW, "step": 2, "epoch": 0}
    begun = [start(), step(1), step(2), stop, start(2, pid=9), step(3)]
    write_lines(tmp_path / "log.jsonl", begun)
    run = read(tmp_path)
    assert run.start["pid"] == 9
    assert run.recent == [step(3)]
    assert run.since_start("stop", "end") == []


def test_cases_of_an_evaluation_are_not_kept(tmp_path):
    scores = {"event": "evaluation", "step": 1, "scores": {"dice": 0.5}, "cases": {"a": {}}}
    write_lines(tmp_path / "log.jsonl", [scores])
    assert read(tmp_path).events == [{"event": "evaluation", "step": 1, "scores": {"dice": 0.5}}]


def test_of_many_steps_an_even_sample_is_kept_with_the_first_and_the_newest(tmp_path):
    write_lines(tmp_path / "log.jsonl", [step(i) for i in range(5001)])
    run = read(tmp_path)
    numbers = [e["step"] for e in run.steps]
    assert numbers == [*range(0, 5001, 8)] and len(numbers) <= history.SAMPLE
    write_lines(tmp_path / "log.jsonl", [step(5001)], mode="a")
    run.refresh(NOW)
    assert [e["step"] for e in run.steps] == [*range(0, 5001, 8), 5001]
    assert [e["step"] for e in run.recent] == [*range(5001 - 99, 5002)]


# ---------------------------------------------------------------------------- system.jsonl


@pytest.fixture
def long_file(tmp_path):
    """system.jsonl of 3000 lines of unequal length, longer than the tail that is read."""
    lines = [line(i, processes=["x" * (i % 7 * 40)]) for i in range(3000)]
    write_lines(tmp_path / "system.jsonl", lines)
    assert (tmp_path / "system.jsonl").stat().st_size > 2 * history.TAIL
    return tmp_path


def test_of_a_long_file_the_end_and_an_even_sample_are_read(long_file):
    run = read(long_file)
    assert [one["step"] for one in run.lines] == [*range(2900, 3000)]
    numbers = [one["step"] for one in run.samples]
    assert numbers[0] == 0 and len(numbers) == history.SAMPLE
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    assert 2 <= min(gaps) <= max(gaps) <= 6  # 3000 / 800, by bytes


def test_every_line_of_a_short_file_is_in_the_sample_and_new_ones_follow(tmp_path):
    write_lines(tmp_path / "system.jsonl", [line(i) for i in range(20)])
    run = read(tmp_path)
    write_lines(tmp_path / "system.jsonl", [line(20)], mode="a")
    run.refresh(NOW)
    assert [one["step"] for one in run.samples] == [*range(21)]
    assert [one["step"] for one in run.lines] == [*range(21)]


@pytest.mark.parametrize("moment", [-5, 0, 1, 1234, 1234.5, 2998.5, 2999])
def test_the_first_line_since_a_moment_is_found(long_file, moment):
    found = history.first_since(long_file / "system.jsonl", NOW + moment)
    assert found["step"] == max(0, -(-moment // 1))


def test_after_the_last_line_there_is_none(long_file):
    assert history.first_since(long_file / "system.jsonl", NOW + 3000) is None
    assert history.first_since(long_file / "none", NOW) is None


def test_a_broken_stretch_does_not_hide_the_first_line_since_a_moment(tmp_path):
    good = [line(i, text="x" * 200) for i in range(400)]
    broken = ["{" + "y" * 200 + "\n"] * 100
    write_lines(tmp_path / "system.jsonl", good[:200] + broken + good[200:])
    for moment in (0, 100, 199.5, 200, 350):
        found = history.first_since(tmp_path / "system.jsonl", NOW + moment)
        assert found["step"] == -(-moment // 1)


def test_the_first_line_of_the_last_start_is_that_of_its_process(tmp_path):
    write_lines(tmp_path / "log.jsonl", [start(), start(50, pid=9, created=NOW + 40)])
    lines = [line(i, pid=7) for i in range(30)] + [line(i, pid=9) for i in range(41, 60)]
    write_lines(tmp_path / "system.jsonl", lines)
    assert read(tmp_path).first_line()["step"] == 41
    write_lines(tmp_path / "system.jsonl", lines[:30] + [line(45, pid=8)])
    assert read(tmp_path).first_line() is None


# ---------------------------------------------------------------------------- other files


def test_settings_and_the_trace_of_a_fault_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {seed: 3}\n")
    (tmp_path / "fault.txt").write_text("Fatal Python error: Bus error\n")
    os.utime(tmp_path / "fault.txt", (NOW, NOW))
    run = read(tmp_path)
    assert run.config == {"run": {"seed": 3}}
    assert (run.fault, run.fault_time) == ("Fatal Python error: Bus error\n", NOW)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "\x00"])
def test_settings_that_cannot_be_read_are_none(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "fault.txt").write_text(" \n")
    run = read(tmp_path)
    assert (run.config, run.fault, run.fault_time) == ({}, "", None)


def test_reading_writes_nothing(tmp_path):
    write_lines(tmp_path / "log.jsonl", [start(), step(1)])
    before = {path.name: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    read(tmp_path)
    assert before == {p.name: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.iterdir()]}
