import json
import os
import tracemalloc

import pytest

from monitoring import records
from runtime import log as runlog

NOW = 1_700_000_000.0


def write_lines(path, events, mode="w"):
    """JSON lines as a run writes them; strings are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [e if isinstance(e, str) else json.dumps(e) + "\n" for e in events]
    with open(path, mode) as file:
        file.write("".join(lines))


def read(folder):
    run = records.RunRecords(folder)
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
    assert run.steps == run.recent_steps == [step(1), step(2), step(3)]


def test_the_lines_that_runlog_writes_are_known_as_steps_by_their_beginning(tmp_path):
    log = runlog.RunLog(tmp_path, tensorboard=False)
    log.write("step", step=1, epoch=0, loss={"total": 0.5})
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes().startswith(records.STEP)


def test_lines_that_are_broken_are_left_out_and_one_that_is_not_whole_waits(tmp_path):
    log = tmp_path / "log.jsonl"
    broken = ["{broken\n", "\n", "[1]\n", "\0\0\n", '{"no": "event"}\n', {"event": "end"}]
    broken += [{"event": "end", "step": 1, "time": None}, {"event": "step", "step": None}]
    broken += ["[" * 100_000 + "\n", {"event": "end", "step": 1, "time": 1e20}]
    write_lines(log, [start(), *broken, step(1)])
    write_lines(log, ['{"event": "step", "step": 2, "ep'], mode="a")
    run = read(tmp_path)
    assert (run.events, run.steps) == ([start()], [step(1)])
    write_lines(log, ['och": 0}\n'], mode="a")
    run.refresh(NOW)
    assert [e["step"] for e in run.steps] == [1, 2]


def test_a_folder_without_files_has_no_history(tmp_path):
    run = read(tmp_path / "none")
    assert (run.events, run.steps, run.recent_steps) == ([], [], [])
    assert (run.readings, run.recent_readings, run.reading) == ([], [], {})
    assert run.start == {}


def test_only_what_is_new_is_read_and_the_clock_of_this_machine_tells_when(tmp_path):
    write_lines(tmp_path / "log.jsonl", [start(), step(1)])
    run = read(tmp_path)
    assert run.growth_time is None
    run.refresh(NOW + 5)
    assert run.growth_time is None
    write_lines(tmp_path / "log.jsonl", [step(2)], mode="a")
    run.refresh(NOW + 6)
    assert ([e["step"] for e in run.steps], run.growth_time) == ([1, 2], NOW + 6)
    write_lines(tmp_path / "system.jsonl", [line(3)])
    run.refresh(NOW + 7)
    assert run.growth_time == NOW + 7


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
    assert run.recent_steps == [step(3)]
    assert run.since_start("stop", "end") == []


def test_cases_of_an_evaluation_are_not_kept(tmp_path):
    scores = {"event": "evaluation", "step": 1, "scores": {"dice": 0.5}, "cases": {"a": {}}}
    write_lines(tmp_path / "log.jsonl", [scores])
    assert read(tmp_path).events == [{"event": "evaluation", "step": 1, "scores": {"dice": 0.5}}]


def test_of_many_steps_an_even_sample_is_kept_with_the_first_and_the_newest(tmp_path):
    write_lines(tmp_path / "log.jsonl", [step(i) for i in range(5001)])
    run = read(tmp_path)
    numbers = [e["step"] for e in run.steps]
    assert numbers == [*range(0, 5001, 8)] and len(numbers) <= records.SAMPLE
    write_lines(tmp_path / "log.jsonl", [step(5001)], mode="a")
    run.refresh(NOW)
    assert [e["step"] for e in run.steps] == [*range(0, 5001, 8), 5001]
    assert [e["step"] for e in run.recent_steps] == [*range(5001 - 99, 5002)]


# ---------------------------------------------------------------------------- system.jsonl


@pytest.fixture
def long_file(tmp_path):
    """system.jsonl of 3000 lines of unequal length."""
    lines = [line(i, processes=["x" * (i % 7 * 40)]) for i in range(3000)]
    write_lines(tmp_path / "system.jsonl", lines)
    return tmp_path


def test_of_a_long_file_the_end_and_an_even_sample_are_read(long_file):
    run = read(long_file)
    assert [one["step"] for one in run.recent_readings] == [*range(2900, 3000)]
    assert [one["step"] for one in run.readings] == [*range(0, 3000, 4), 2999]


def test_every_line_of_a_short_file_is_in_the_sample_and_new_ones_follow(tmp_path):
    write_lines(tmp_path / "system.jsonl", [line(i) for i in range(20)])
    run = read(tmp_path)
    write_lines(tmp_path / "system.jsonl", [line(20)], mode="a")
    run.refresh(NOW)
    assert [one["step"] for one in run.readings] == [*range(21)]
    assert [one["step"] for one in run.recent_readings] == [*range(21)]


def test_the_last_reading_is_that_of_the_process_that_was_started_last(tmp_path):
    write_lines(tmp_path / "log.jsonl", [start(), start(50, pid=9)])
    write_lines(tmp_path / "system.jsonl", [line(40, pid=7), line(60, pid=9), line(61, pid=7)])
    assert read(tmp_path).reading == line(60, pid=9)
    write_lines(tmp_path / "log.jsonl", [start(70, pid=11)], mode="a")
    assert read(tmp_path).reading == {}


def test_a_long_log_is_read_in_bounded_memory(tmp_path):
    text = json.dumps(step(1, loss={"total": 0.5}, pad="x" * 1000)) + "\n"
    with open(tmp_path / "log.jsonl", "w") as file:
        for _ in range(40):
            file.write(text * 1000)  # 40 MB in all
    run = records.RunRecords(tmp_path)
    tracemalloc.start()
    run.refresh(NOW)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(run.steps) == 625 and peak < 10e6


# ---------------------------------------------------------------------------- scores


def test_the_log_says_of_each_score_which_end_is_better(tmp_path):
    values = [(0, 0.1, 9.0), (10, 0.8, 2.0), (20, None, 3.0), (30, 0.7, None)]
    scores = [(s, {"dice": dice, "hd95": hd, "components": 3.0}) for s, dice, hd in values]
    log = [{"event": "evaluation", "step": s, "scores": one} for s, one in scores]
    log.append({"event": "evaluation", "step": 40, "scores": {}})
    better = {"dice": "higher", "hd95": "lower", "components": None}
    write_lines(tmp_path / "log.jsonl", [start(better=better), *log])
    run = read(tmp_path)
    assert run.evaluations == scores
    assert (run.best("dice"), run.best("hd95")) == ((0.8, 10), (2.0, 10))
    assert run.best("components") == run.best("x") == (None, None)


def test_an_untrained_network_has_the_best_of_the_main_score_alone(tmp_path):
    scores = [(0, {"dice": 0.5, "precision": 1.0}), (9, {"dice": 0.4, "precision": 0.6})]
    better = {"dice": "higher", "precision": "higher"}
    log = [{"event": "evaluation", "step": step, "scores": one} for step, one in scores]
    write_lines(tmp_path / "log.jsonl", [start(better=better, score="dice"), *log])
    assert read(tmp_path).best("dice") == (0.5, 0)  # it is in best.pt
    assert read(tmp_path).best("precision") == (0.6, 9)


def test_without_that_in_the_log_no_score_is_called_the_best(tmp_path):
    log = [{"event": "evaluation", "step": 0, "scores": {"dice": 0.5}}]
    write_lines(tmp_path / "log.jsonl", [start(), *log])
    assert read(tmp_path).best("dice") == (None, None)


def test_reading_writes_nothing(tmp_path):
    write_lines(tmp_path / "log.jsonl", [start(), step(1)])
    before = {path.name: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    read(tmp_path)
    assert before == {p.name: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.iterdir()]}


@pytest.mark.parametrize("change, best", [({"tolerance": 4.0}, (0.6, 20)), ({}, (0.8, 0))])
def test_the_best_is_that_since_a_score_means_what_it_does_now(tmp_path, change, best):
    scores = [
        {"event": "evaluation", "step": s, "scores": {"dice": d}} for s, d in ((0, 0.8), (20, 0.6))
    ]
    measured = {"metric": "dice", "tolerance": 2.0}
    first = start(better={"dice": "higher"}, score="dice", measured=measured)
    again = start(better={"dice": "higher"}, score="dice", measured=measured | change)
    write_lines(tmp_path / "log.jsonl", [first, scores[0], again, scores[1]])
    assert read(tmp_path).best("dice") == best


def test_of_several_classes_few_scores_are_shown():
    several = [f"{name}/{which}" for name in ("dice", "recall") for which in ("a", "b", "mean")]
    assert records.few_names(several, "dice/mean") == [*several[:3], "recall/mean"]
    assert records.few_names(several, "recall/b") == ["dice/mean", *several[3:]]
    asked = ["dice/mean", "assd/a", "cldice_loss"]  # of a score without a mean what was asked for
    assert records.few_names(asked, "dice/mean") == asked
    assert records.few_names(["dice", "recall"], "dice") == ["dice", "recall"]
    assert records.few_names(["dice"], None) == ["dice"]
