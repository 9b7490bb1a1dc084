"""Why a run leaves: a signal, a file, its time; what stands after that."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime import signals
from runtime.signals import Stop
from volumes import processes


@pytest.fixture
def clock(monkeypatch):
    """The time that Stop sees; clock[0] sets it."""
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", processes.STOP_SIGNALS)
def test_a_signal_is_noted_and_does_nothing_else(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.reason() is None
        send(number)
        assert stop.reason() == f"signal {number.name}"
    assert signal.getsignal(number) is before


def test_the_first_reason_stays():
    with Stop(max_hours=1e-15) as stop:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.reason() == "signal SIGUSR1"


def test_a_second_interrupt_ends_at_once_and_the_first_does_not():
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        send(signal.SIGINT)
        assert stop.reason() == "signal SIGINT"
        send(signal.SIGTERM)  # no second one
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_under_nohup_the_end_of_the_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            send(signal.SIGHUP)
            assert stop.reason() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_there_are_no_signals_and_all_else_works(tmp_path):
    found = []

    def run():
        with Stop(max_hours=1e-15) as stop:
            found.append(stop.reason())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "training.max_hours=1e-15" in found[0]


def test_a_signal_that_came_before_is_known_to_the_stop_within():
    with Stop() as around:
        send(signal.SIGUSR1)
        with Stop() as within:
            assert within.reason() == "signal SIGUSR1"
            send(signal.SIGTERM)
            assert within.reason() == around.reason() == "signal SIGUSR1"
    with Stop() as around:
        with Stop() as within:
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # late: nothing happens
        assert within.reason() == around.reason() == "signal SIGTERM"


LATE = """
import atexit
import os
import signal
import sys
from runtime import signals as stopping
send = lambda: [os.kill(os.getpid(), n) for n in stopping.STOP_SIGNALS if n != signal.SIGINT]

class Last:
    __del__ = lambda self, send=send: send()

sys.last = Last()  # which goes when the interpreter does
atexit.register(send)
with stopping.listening():
    send()
    with stopping.Stop() as stop:
        print(stop.reason())
    send()
    sys.exit(75)
"""


def test_a_signal_that_comes_early_or_late_does_not_change_the_exit_status():
    here = Path(signals.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", LATE], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "signal SIGTERM\n"), done


# ---------------------------------------------------------------------------- time


def test_hours_are_counted_from_the_start_and_end_the_run_when_they_are_over(clock):
    stop = Stop(max_hours=2)
    clock[0] += 7200
    assert stop.reason() is None
    clock[0] += 0.1
    again = "counted anew after --resume, null: no limit"
    assert stop.reason() == f"its time is up (training.max_hours=2, {again})"


def test_without_hours_there_is_no_end(clock):
    stop = Stop()
    clock[0] += 1e9
    assert stop.reason() is None


# ---------------------------------------------------------------------------- file


def test_a_file_stops_the_run_and_is_gone_for_the_next_one(tmp_path, clock):
    stop, file = Stop(), tmp_path / "stop"
    stop.look_for(file)
    assert stop.reason() is None
    file.touch()
    clock[0] += signals.LOOK + 0.1
    assert stop.reason() == f"the file {file} was there"
    assert not file.exists() and stop.reason() is not None


def test_a_file_of_a_run_before_stops_nothing(tmp_path, clock):
    (tmp_path / "stop").touch()
    stop = Stop()
    stop.look_for(tmp_path / "stop")
    assert stop.reason() is None and not (tmp_path / "stop").exists()


def test_the_file_is_looked_for_once_a_second(tmp_path, clock):
    stop, file = Stop(), tmp_path / "stop"
    stop.look_for(file)
    stop.reason()
    file.touch()
    clock[0] += 0.9 * signals.LOOK
    assert stop.reason() is None and file.exists()
    clock[0] += 0.2 * signals.LOOK
    assert stop.reason() is not None
