"""The log of a run: whole lines, one story, on a disk that takes no more and in a terminal that
nobody reads."""

import errno
import io
import json
import math

import pytest
from rich.console import Console

from runtime import log as runlog
from runtime.log import RunLog, read_log


def start(folder, **how):
    return RunLog(folder, tensorboard=False, **how)


def steps_of(folder):
    return [(e["event"], e["step"]) for e in read_log(folder / "log.jsonl")]


@pytest.fixture
def five(tmp_path):
    """A log of a start, four steps, and a trouble after the third."""
    log = start(tmp_path)
    log.write("start", step=0, epoch=0)
    for step in (1, 2, 3, 4):
        log.write("step", step=step, epoch=0, loss={"total": step / 4})
        if step == 3:
            log.write("trouble", step=3, epoch=0, text="something")
    log.close()
    return tmp_path


# ---------------------------------------------------------------------------- lines


def test_numbers_that_json_does_not_know_are_null_at_any_depth(tmp_path):
    log = start(tmp_path)
    log.write("step", step=1, epoch=0, loss={"a": math.nan, "b": [math.inf, 1.5]}, lr=-math.inf)
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    event = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert event["loss"] == {"a": None, "b": [None, 1.5]} and event["lr"] is None


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    log = start(tmp_path)
    log.write("start", step=0, epoch=0)
    assert steps_of(tmp_path) == [("start", 0)]
    log.close()


def test_only_lines_of_training_are_counted(five):
    log = start(five, keep=4, step=4)
    assert log.lines == 4
    log.write("saved", step=4, epoch=0)
    log.write("evaluation", step=4, epoch=0)
    log.write("epoch", step=4, epoch=0)
    log.close()
    assert log.lines == 6


def test_a_new_log_holds_nothing_of_the_one_before(five):
    (five / "tensorboard").mkdir()
    log = start(five)
    log.close()
    assert log.lines == 0 and steps_of(five) == [] and not (five / "tensorboard").exists()


# ---------------------------------------------------------------------------- resumed


def test_lines_of_training_after_the_state_go_and_the_history_stays(five):
    log = start(five, keep=2, step=2)
    log.write("step", step=3, epoch=0)
    log.close()
    assert log.lines == 3
    assert steps_of(five) == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("trouble", 3),
        ("step", 3),
    ]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_is_taken_out_when_the_run_is_resumed(five, cut):
    path = five / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    log = start(five, keep=4, step=4)
    log.write("step", step=5, epoch=0)
    log.close()
    whole = [("start", 0), ("step", 1), ("step", 2), ("step", 3), ("trouble", 3)]
    last = [("step", 4)] if cut == 1 else []  # it lacks but the end of its line
    assert steps_of(five) == [*whole, *last, ("step", 5)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("damage", [b"\x00\x00\x00", b"\xff\xfe\x80", b"12", b"[1]", b'{"a": 1}'])
def test_a_damaged_line_is_taken_out_and_the_others_stay(five, damage):
    path = five / "log.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[2:]]))
    log = start(five, keep=4, step=4)
    log.close()
    assert [e["event"] for e in read_log(path)] == [
        "start",
        "step",
        "step",
        "step",
        "trouble",
        "step",
    ]
    assert log.lines == 4


def test_a_log_that_is_gone_begins_anew(tmp_path):
    log = start(tmp_path, keep=7, step=7)
    log.write("step", step=8, epoch=0)
    log.close()
    assert log.lines == 1 and steps_of(tmp_path) == [("step", 8)]


# ---------------------------------------------------------------------------- a full disk


class Full(io.FileIO):
    """A file that takes a few bytes more, and then none."""

    room = 10

    def write(self, content):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = min(self.room, len(content)), 0
        return super().write(content[:taken])


def test_what_a_full_disk_took_of_a_line_is_taken_back(five):
    log = start(five, keep=4, step=4)
    log.file.close()
    log.file = Full(five / "log.jsonl", "a+b")
    before = (five / "log.jsonl").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        log.write("step", step=5, epoch=0)
    assert (five / "log.jsonl").read_bytes() == before and log.lines == 4
    log.close()


def test_a_line_that_is_taken_in_pieces_is_whole(five, monkeypatch):
    log = start(five, keep=4, step=4)
    real = log.file.write

    class Pieces:
        seek, read, close = log.file.seek, log.file.read, log.file.close
        write = staticmethod(lambda content: real(content[:7]))

    log.file = Pieces
    log.write("step", step=5, epoch=0)
    log.close()
    assert steps_of(five)[-1] == ("step", 5)


# ---------------------------------------------------------------------------- means


def test_a_term_that_acts_on_some_steps_is_the_mean_of_those():
    means = runlog.Means()
    for components in ({"total": 2.0, "a": 1.0}, {"total": 4.0}, {"total": 6.0, "a": 3.0}):
        means.add(components, {}, 1.0)
    line = means.take_line()
    assert line == {"a": 2.0, "total": 4.0} and list(line)[-1] == "total"


def test_the_epoch_is_the_mean_over_its_steps_however_lines_divide_them():
    means = runlog.Means()
    for values in ([1.0, 2.0, 3.0], [10.0]):  # a line of three steps, and one of one
        for value in values:
            means.add({"total": value}, {"share": value / 10}, 1.0)
        means.take_line()
    again = runlog.Means()  # as in a run that is resumed here
    again.load_state_dict(means.state_dict())
    epoch = again.take_epoch()
    assert epoch["loss"] == {"total": pytest.approx(4.0)}
    assert epoch["patches"] == {"share": pytest.approx(0.4)}
    assert again.take_line() == {} and again.take_epoch() == {"loss": {}, "patches": {}}


# ---------------------------------------------------------------------------- a terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_said_stands_in_the_output_once(capsys, terminal):
    console = Console(force_terminal=terminal)
    with runlog.ProgressLine(console, 2, 0) as show:
        show.print("a sentence")
    assert capsys.readouterr().out.count("a sentence") == 1


def test_what_takes_long_is_a_line_now_and_then_and_beside_the_bar_on_a_terminal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    show = runlog.ProgressLine(Console(file=out), 2, 0)
    for second in range(31):
        clock[0] = float(second)
        show.meanwhile(f"case {second}")
    assert out.getvalue().split("\n") == ["case 11", "case 22", ""]
    for terminal in (False, True):
        show = runlog.ProgressLine(Console(file=out, force_terminal=terminal), 2, 0)
        show.advance(1, "a line of its own", short="of the step")
        show.meanwhile("case 1")
        assert show.bar.tasks[0].description == "case 1"
        show.print("scores")
        assert show.bar.tasks[0].description == "of the step"
