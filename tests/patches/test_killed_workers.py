"""Worker processes that are killed, fail, or outlive a run: what the training process sees."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from patches import feed, transfer
from patches.feed import Batches
from volumes import processes

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds that a machine under load may take


class Samples:
    """A dataset of two cases; samples of 1 MB that are a function of (epoch, index).

    events: {(epoch, index): what happens there in a worker, as often as `times` says}; folder:
    where the times are counted.
    """

    def __init__(self, folder=None, events=None, times=1):
        self.cases = [SimpleNamespace(id=name) for name in ("even", "odd")]
        self.folder, self.events, self.times, self.excluded = folder, events or {}, times, {}

    def __getitem__(self, index):
        event = self.events.get(index)
        if event and torch.utils.data.get_worker_info() and self._happens(event):
            if event == "mid-write":
                os.pwrite = die_in_mid_write
            elif event == "memory":
                raise MemoryError
            elif event == "bug":
                raise ZeroDivisionError("seven")
            else:
                os.kill(os.getpid(), event)
        numbers = np.random.default_rng(index).integers(0, 255, 10**6, dtype=np.uint8)
        return {"case": self.case_of(index), "index": index, "image": torch.from_numpy(numbers)}

    def _happens(self, event):
        for time_number in range(self.times):
            with contextlib.suppress(FileExistsError):
                (self.folder / f"{event}{time_number}").touch(exist_ok=False)
                return True
        return False

    def case_of(self, index):
        odd = index[1] % 2 and "odd" not in self.excluded
        return self.cases[int(odd)].id

    def exclude(self, case, reason):
        self.excluded[case] = reason


def die_in_mid_write(file, piece, start):
    os.kill(os.getpid(), signal.SIGKILL if start else 0)
    return len(piece)


@pytest.fixture
def made():
    """make(dataset, ...) -> (batches, reports)."""
    streams = []

    def make(dataset=None, *, last=12, workers=2, **how):
        reports = []
        how = {"batches_per_epoch": 6, "batch_size": 2, "prefetch": 2, **how}
        batches = Batches(
            dataset or Samples(),
            0,
            last,
            workers=workers,
            report=lambda kind, text, **figures: reports.append((kind, text, figures)),
            **how,
        )
        streams.append(batches)
        return batches, reports

    yield make
    for batches in streams:
        batches.close()


def check(batches, seen, first=0):
    """These batches are what the dataset gives by itself."""
    for number, samples in enumerate(seen, first):
        for index, sample in zip(batches.plan.sample_indices(number), samples, strict=True):
            expected = batches.dataset[index]
            assert sample["index"] == index and sample["case"] == expected["case"]
            assert torch.equal(sample["image"], expected["image"])


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


# ---------------------------------------------------------------------------- kills


def test_workers_killed_at_random_moments_lose_no_batch(made):
    chance = random.Random(0)
    batches, reports = made(last=60, workers=2)

    def kill_now_and_then():
        while len(killed) < 2 and not stop.wait(chance.uniform(0.5, 3)):
            workers = batches.workers
            if workers:
                killed.append(chance.choice(workers).pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    killed, stop, seen = [], threading.Event(), []
    thread = threading.Thread(target=kill_now_and_then)
    thread.start()
    try:
        for samples in batches:
            seen.append(samples)
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join()
    assert len(seen) == 60
    check(batches, seen)
    assert {figures["exitcode"] for _, _, figures in reports if figures} <= {-signal.SIGKILL}


def test_workers_that_are_all_killed_leave_the_reading_to_the_training_process(made):
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    batches, reports = made()
    seen = [next(batches)]
    assert signal.getsignal(signal.SIGCHLD) == handler and len(batches.roles()) == 2
    for worker in batches.workers:
        os.kill(worker.pid, signal.SIGKILL)
    seen += list(batches)
    check(batches, seen)
    assert len(seen) == 12 and [kind for kind, *_ in reports] == ["worker died"] * 2
    assert "was killed by SIGKILL" in reports[0][1] and "it held" in reports[0][1]
    assert "workers left: 0" in reports[1][1] and batches.workers == []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_killed_in_the_middle_of_a_write_loses_no_batch(made, tmp_path):
    batches, reports = made(Samples(tmp_path, {(0, 7): "mid-write"}))
    seen = list(batches)
    check(batches, seen)
    ((kind, text, figures),) = reports
    assert kind == "worker died" and figures["case"] == "odd" and len(seen) == 12
    assert "while reading case odd (epoch 0, sample 7)" in text and "workers left: 1" in text


def test_a_worker_may_be_killed_while_it_is_started_with_much_to_be_told(made):
    def kill_the_first():
        before = set(psutil.Process().children())
        while not (workers := spawned() - before):
            time.sleep(0.01)
        workers.pop().kill()

    def spawned():
        return {c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())}

    dataset = Samples()
    dataset.much = os.urandom(10**6)  # more than a pipe has room for
    thread = threading.Thread(target=kill_the_first)
    thread.start()
    batches, reports = made(dataset, last=4)
    thread.join()
    check(batches, list(batches))
    assert [kind for kind, *_ in reports] == ["worker died"]


def test_a_worker_killed_with_a_lock_of_torch_does_not_block_the_end(made):
    batches, _ = made(workers=1)
    next(batches)
    batches._stream._workers_done_event._cond.acquire()  # as a worker does for a moment
    ended = threading.Thread(target=batches.close, daemon=True)
    ended.start()
    ended.join(PATIENCE)
    assert not ended.is_alive()


def test_two_workers_that_die_of_a_fault_in_one_case_exclude_it(made, tmp_path):
    batches, reports = made(Samples(tmp_path, {(0, 5): signal.SIGSEGV}, times=2), workers=3)
    seen = list(batches)
    assert [kind for kind, *_ in reports] == ["worker died", "worker died", "case left out"]
    assert "SIGSEGV" in reports[0][1] and "2 workers died reading it; 1 of 2" in reports[2][1]
    assert list(batches.dataset.excluded) == ["odd"] and len(seen) == 12
    assert {sample["case"] for samples in seen[2:] for sample in samples} == {"even"}


def test_a_worker_without_memory_is_reported_and_the_others_go_on(made, tmp_path):
    batches, reports = made(Samples(tmp_path, {(0, 6): "memory"}))
    check(batches, list(batches))
    ((_, text, figures),) = reports
    assert figures["exitcode"] == feed.NO_MEMORY and "could not get the memory" in text


# ---------------------------------------------------------------------------- other endings


def test_a_bug_in_a_worker_is_raised_with_its_traceback(made, tmp_path):
    batches, reports = made(Samples(tmp_path, {(0, 3): "bug"}), workers=1)
    seen = [next(batches)]
    with pytest.raises(feed.WorkerError, match=r"(?s)worker \d \(pid \d+\):.*ZeroDivisionError: s"):
        next(batches)
    check(batches, seen + list(batches))  # the same batch can be asked for again
    assert reports == []


def test_signals_that_ask_a_run_to_stop_do_not_reach_workers(made):
    batches, reports = made(workers=1)
    seen = [next(batches)]
    for worker in batches.workers:
        for number in processes.STOP_SIGNALS:
            os.kill(worker.pid, number)
    check(batches, seen + list(batches))
    assert reports == []


def test_closing_leaves_nothing_open(made):
    made(last=2, workers=1)[0].close()  # what multiprocessing opens once
    processes = set(psutil.Process().children())
    before, threads = descriptors(), threading.active_count()
    batches, _ = made()
    next(batches)
    assert descriptors() > before and threading.active_count() > threads
    batches.drop_worker()
    assert len(batches.workers) == 1
    check(batches, [next(batches)], first=1)
    batches.close()
    assert set(psutil.Process().children()) == processes
    # Fewer, where what an earlier test left to the garbage collector has gone meanwhile.
    until(lambda: descriptors() <= before and threading.active_count() <= threads)


def test_without_files_in_memory_batches_are_sent_as_torch_sends_them(made, monkeypatch):
    monkeypatch.setattr(transfer, "has_memory_files", lambda: False)
    batches, _ = made(last=4, workers=1)
    seen = list(batches)
    check(batches, seen)
    assert len(seen) == 4


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
if __name__ == "__main__":
    from tests.patches.test_killed_workers import Batches, Samples, check
    how = dict(batches_per_epoch=20, batch_size=8, workers={workers}, prefetch=4)
    batches = Batches(Samples(), 0, 20, **how)
    if not {begin}:
        print(*[worker.pid for worker in batches.workers], flush=True)
        time.sleep(600)
    seen = [next(batches)]
    print(*[worker.pid for worker in batches.workers], flush=True)
    {rest}
"""


@pytest.fixture
def script(tmp_path):
    """make(rest, prefix) -> a process that has started workers, and printed their pids."""
    processes = []

    def make(rest, prefix="", begin=True, workers=1):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(root=str(ROOT), rest=rest, begin=begin, workers=workers))
        command = f"{prefix} exec {sys.executable} {path}"
        start = ["unshare", "--mount"] if prefix else []
        out = {"stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*start, "sh", "-c", command], **out))
        return processes[-1]

    yield make
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("begin", [True, False], ids=["at work", "still starting"])
def test_workers_end_when_the_training_process_is_killed(script, begin):
    process = script("time.sleep(600)", begin=begin, workers=2)
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    until(lambda: not any(w.is_running() and w.status() != "zombie" for w in workers))


def test_a_script_that_forgets_to_close_ends_all_the_same(script):
    process = script("raise SystemExit(7)")
    assert process.wait(PATIENCE) == 7


def test_a_container_with_4_mb_of_shared_memory_is_enough(script):
    mounting = "mount -t tmpfs -o size=4m tmpfs /dev/shm &&"
    trial = ["unshare", "--mount", "sh", "-c", f"{mounting} true"]
    with contextlib.suppress(OSError):
        if subprocess.run(trial, capture_output=True).returncode == 0:
            process = script("check(batches, [*seen, *batches]); print('all')", mounting, workers=2)
            assert process.communicate(timeout=PATIENCE)[0].split()[-1] == "all"
            return
    pytest.skip("this user may not mount a small /dev/shm")
