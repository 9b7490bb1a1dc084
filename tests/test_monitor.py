import io
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

import monitor
from monitoring import health, recorder
from monitoring.records import RunRecords
from tests.monitoring.test_records import NOW, line, read, start, step, write_lines

ROOT = Path(__file__).parents[1]
WAIT = 20.0  # seconds that a thread gets for what it does at once


def lines_of(folder):
    path = folder / "system.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def monitored(folder, **changes):
    options = {"seconds": 60, "roles": lambda: {os.getpid(): "training"}, "step": lambda: 3}
    return recorder.SystemMonitor(folder, **{**options, **changes})


def look(folder):
    return monitor.look(health.RunHealth(RunRecords(folder)))


# ---------------------------------------------------------------------------- the thread


def test_a_line_is_written_at_once_and_one_at_the_end(tmp_path):
    with monitored(tmp_path):
        until(lambda: len(lines_of(tmp_path)) == 1)
    assert len(lines_of(tmp_path)) == 2


def test_lines_come_at_the_interval(tmp_path):
    with monitored(tmp_path, seconds=0.01):
        until(lambda: len(lines_of(tmp_path)) >= 5)
    times = [one["time"] for one in lines_of(tmp_path)]
    assert times == sorted(times)


def test_a_line_holds_what_a_reader_needs(tmp_path):
    with monitored(tmp_path, memory_limit=10**15):
        pass
    reading = lines_of(tmp_path)[-1]
    assert {key: reading[key] for key in ("host", "pid", "step", "seconds")} == {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": 3,
        "seconds": 60,
    }
    assert abs(reading["time"] - time.time()) < 60
    (one,) = reading["processes"]
    assert (one["pid"], one["role"]) == (os.getpid(), "training")
    assert 0 < one["rss"] < 10**12
    assert reading["rooms"][-1] == [10**15 - reading["tree"], 10**15, "run.memory_gb"]
    known = {"tree", "new_oom_kills", "swap", "shm", "disk", "load", "gpus", "cores"}
    assert known < set(reading)


def test_what_the_caller_gives_may_fail(tmp_path):
    def failing():
        raise KeyError("worker 7")

    with monitored(tmp_path, roles=failing, step=failing):
        pass
    reading = lines_of(tmp_path)[-1]
    assert (reading["processes"], reading["step"]) == ([], None)
    assert reading["tree"] > 0


def test_what_json_cannot_write_leaves_the_thread_alive(tmp_path, capfd):
    steps = iter([object(), *range(1000)])
    with monitored(tmp_path, seconds=0.01, step=lambda: next(steps)) as watch:
        until(lambda: lines_of(tmp_path))
        assert watch.thread.is_alive()
    assert lines_of(tmp_path)[0]["step"] == 0
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_takes_nothing_stops_the_lines_and_not_the_thread(tmp_path, capfd):
    folder = tmp_path / "away"
    asked = []
    with monitored(folder, seconds=0.01, step=lambda: asked.append(1)) as watch:
        until(lambda: len(asked) > 2)
        assert watch.thread.is_alive()
        folder.mkdir()  # it is back
        until(lambda: lines_of(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_no_error(tmp_path, capfd):
    (tmp_path / "system.jsonl").symlink_to("/dev/full")
    asked = []
    with monitored(tmp_path, seconds=0.01, step=lambda: asked.append(1)) as watch:
        until(lambda: len(asked) > 2)
        assert watch.thread.is_alive()
    assert capfd.readouterr() == ("", "")


def test_a_line_of_which_the_disk_takes_a_part_spoils_none_after_it(tmp_path):
    watch, path = monitored(tmp_path), tmp_path / "system.jsonl"
    watch._write({"step": 1})
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            watch._write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    watch._write({"step": 3})
    first, last = path.read_text().splitlines()
    assert (json.loads(first), json.loads(last)) == ({"step": 1}, {"step": 3})


def test_a_line_that_a_crash_cut_short_spoils_none_after_it(tmp_path):
    (tmp_path / "system.jsonl").write_text('{"step": 1}\n{"ste')
    monitored(tmp_path)._write({"step": 2})
    assert (tmp_path / "system.jsonl").read_text() == '{"step": 1}\n{"ste\n{"step": 2}\n'


def test_an_interval_must_be_above_zero(tmp_path):
    with pytest.raises(ValueError, match="above 0, got 0"):
        monitored(tmp_path, seconds=0)


def test_a_run_that_is_monitored_is_seen_alive_and_its_end_as_such(tmp_path):
    begun = start(
        host=socket.gethostname(), pid=os.getpid(), created=psutil.Process().create_time()
    )
    write_lines(tmp_path / "log.jsonl", [begun])
    with monitored(tmp_path):
        until(lambda: lines_of(tmp_path))
        shown = look(tmp_path)
        assert shown.status.state == health.RUNNING and health.pace(shown.run, shown.now).step == 3
    write_lines(tmp_path / "log.jsonl", [{"event": "end", "time": NOW, "step": 3}], mode="a")
    assert look(tmp_path).status.state == health.DONE


def test_a_run_that_ends_while_it_is_looked_at_is_not_called_dead(tmp_path, monkeypatch):
    write_lines(tmp_path / "log.jsonl", [start(host=socket.gethostname(), pid=2**22 + 5)])
    looked = []

    def gone(pid, created):
        if not looked:  # its last word comes after the log was read
            write_lines(tmp_path / "log.jsonl", [{"event": "end", "step": 3}], mode="a")
        looked.append(pid)
        return False

    monkeypatch.setattr(health, "_process_is_alive", gone)
    assert look(tmp_path).status.state == health.DONE
    assert looked == [2**22 + 5]


# ---------------------------------------------------------------------------- the script


def make_run(folder):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.pt").write_bytes(b"1")
    write_lines(folder / "log.jsonl", [start(host="far", pid=7), step(40)])
    write_lines(folder / "system.jsonl", [line(40, seconds=10)])
    return folder


def script(*arguments, cwd, **environment):
    command = [sys.executable, str(ROOT / "monitor.py"), *map(str, arguments)]
    options = {"cwd": cwd, "env": {**os.environ, **environment}, "timeout": 60}
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_once_prints_plain_text_and_ends(tmp_path):
    make_run(tmp_path / "runs" / "exp001")
    done = script("runs/exp001", "--once", "--width", 90, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("exp001") and "step 40" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 90


def test_a_terminal_without_unicode_gets_what_it_can_show(tmp_path):
    make_run(tmp_path / "exp001")
    done = script("exp001", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "step 40" in done.stdout


def test_a_path_inside_a_run_or_a_link_to_it_names_the_run(tmp_path):
    run = make_run(tmp_path / "runs" / "exp001")
    (tmp_path / "runs" / "last.pt").symlink_to("exp001/checkpoints/last.pt")
    places = (run, run / "checkpoints", run / "checkpoints" / "last.pt", run.parent / "last.pt")
    for path in places:
        assert monitor.find_run(path) == run


def fault(capsys, path):
    assert monitor.cli([str(path), "--once"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.strip().splitlines()) == 1
    return error.strip()


def test_a_folder_of_runs_is_refused_with_their_names_the_newest_first(tmp_path, capsys):
    for age, name in enumerate(("new", "middle", "old")):
        make_run(tmp_path / name)
        os.utime(tmp_path / name, (NOW - age, NOW - age))
    text = fault(capsys, tmp_path)
    assert "got 3 runs, the newest first: new, middle, old;" in text
    assert text.endswith(f"give one such as {tmp_path / 'new'}")


def test_what_is_no_run_is_refused_with_what_to_give(tmp_path, capsys):
    assert "expected a run folder" in fault(capsys, tmp_path)
    text = fault(capsys, tmp_path / "none")
    assert "got nothing of that name; give one such as runs/exp001" in text
    (tmp_path / "config.yaml").write_text("")  # a project may have one too
    assert "expected a run folder" in fault(capsys, tmp_path)


def test_a_run_that_has_only_begun_is_shown(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("training: {max_epochs: 2}\n")
    assert monitor.cli([str(tmp_path), "--once"]) == 0
    assert "nothing has been logged yet" in capsys.readouterr().out


@pytest.mark.parametrize(("reader", "lines"), [("true", 0), ("head -1", 1)])
def test_a_pipe_that_is_closed_is_no_traceback(tmp_path, reader, lines):
    make_run(tmp_path / "exp001")
    command = f"{sys.executable} {ROOT / 'monitor.py'} exp001 --once | {reader}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, lines, "")


def test_the_picture_is_a_drawing_of_the_view(tmp_path):
    make_run(tmp_path / "exp001")
    assert monitor.cli([str(tmp_path / "exp001"), "--svg", str(tmp_path / "v.svg")]) == 0
    text = (tmp_path / "v.svg").read_text()
    assert text.startswith("<svg") and "exp001" in text
    assert "40" in re.sub(r"<[^>]*>", " ", text)


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    make_run(tmp_path / "exp001")
    target = tmp_path / "none" / "v.svg"
    assert monitor.cli([str(tmp_path / "exp001"), "--svg", str(target)]) == 2
    assert str(target) in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--seconds", "0"), ("--seconds", "nan"), ("--width", "3")])
def test_numbers_that_make_no_sense_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as left:
        monitor.cli([str(make_run(tmp_path / "exp001")), *option])
    assert left.value.code == 2
    assert "expected --seconds above 0 and --width of 20 or more" in capsys.readouterr().err


def test_ctrl_c_leaves_the_terminal_as_it_was_and_the_state_in_it(tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    make_run(tmp_path / "exp001")
    monkeypatch.setattr(monitor.time, "sleep", interrupted)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, height=18, highlight=False)
    monitor.live(health.RunHealth(RunRecords(tmp_path / "exp001")), console, 2.0)
    shown, after = written.getvalue().split("\x1b[?1049l")  # back from the other screen
    assert "\x1b[?1049h" in shown and "step 40" in shown and "events" in shown
    assert "exp001: dead, ended without a last message" in after.replace("\n", " ")


def test_looking_at_a_run_writes_nothing_into_its_folder(tmp_path):
    run = make_run(tmp_path / "exp001")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    look(run)
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before
    assert read(run).steps == [step(40)]
