"""Processes that read: what travels, who gets what, how one that dies is known."""

import os
import signal
import time
from multiprocessing import resource_tracker

import numpy as np
import pytest
import torch

import workers
from workers import Pool, Task, WorkerError, pack, unpack

PATIENCE = 60.0  # seconds that a machine under load may take to start a process


class Reader:
    """Does what it is asked for, in the worker; `told` is what `tell` has changed."""

    def __init__(self):
        self.told = "nothing"

    def __getitem__(self, place):
        what, value = place
        if what == "die":
            os.kill(os.getpid(), value)
        if what == "memory":
            raise MemoryError
        if what == "wait":
            time.sleep(PATIENCE)
        if what == "fail":
            raise ZeroDivisionError(value)
        return {"told": self.told, "pid": os.getpid(), "value": value}

    def change(self, told):
        self.told = told


def take(pool, *numbers):
    """The samples of these tasks; AssertionError if a worker dies meanwhile."""
    found, end = {}, time.monotonic() + PATIENCE
    while not found.keys() >= set(numbers) and time.monotonic() < end:
        done, dead = pool.receive(0.5)
        assert dead == []
        found |= done
    return [found[number] for number in numbers]


def first_death(pool):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        _, dead = pool.receive(0.5)
        if dead:
            return dead[0]
    raise AssertionError("no worker died")


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.fixture(scope="module")
def pair():
    """Two workers, of which the first is the first process that multiprocessing starts here."""
    getattr(resource_tracker._resource_tracker, "_stop", lambda: None)()
    pool = Pool(Reader(), 2)
    yield pool
    pool.close()


@pytest.fixture
def started():
    pools = []

    def start(count):
        pools.append(Pool(Reader(), count))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


# ---------------------------------------------------------------------------- what travels


def test_samples_arrive_as_they_were_whatever_their_size_and_type():
    large = np.arange(6000, dtype=np.uint16).reshape(10, 20, 30)
    sent = [
        {"image": torch.from_numpy(large.astype(np.int32)), "case": "bar", "none": None},
        {"turned": large.transpose(2, 0, 1), "part": large[::2, 1:, ::-1], "empty": large[:0]},
        {"small": np.float32([1.5]), "one": torch.tensor(3), "mask": large > 7, "at": (1, 2.5)},
    ]
    back = unpack(*pack(sent))
    assert torch.equal(back[0]["image"], sent[0]["image"]) and back[0]["none"] is None
    for one, other in zip(sent[1:], back[1:], strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, np.ndarray):
                assert value.dtype == other[key].dtype and np.array_equal(value, other[key])
            else:
                assert value == other[key]


def test_every_array_begins_at_a_multiple_of_64_bytes():
    sizes = (5000, 4097, 9001)
    back = unpack(*pack([np.full(size, i, np.uint8) for i, size in enumerate(sizes)]))
    assert [array.ctypes.data % 64 for array in back] == [0, 0, 0]
    assert [(len(a), int(a.min()), int(a.max())) for a in back] == [
        (5000, 0, 0),
        (4097, 1, 1),
        (9001, 2, 2),
    ]


def test_the_descriptor_is_closed_when_its_memory_is_mapped():
    fd, size = pack(np.zeros(10_000))
    unpack(fd, size)
    with pytest.raises(OSError):
        os.fstat(fd)


# ---------------------------------------------------------------------------- who gets what


def test_each_worker_does_its_share_of_the_tasks(pair):
    for number in range(4):
        pair.submit(Task(number, [("echo", number), ("echo", -number)]))
    assert [len(worker.tasks) for worker in pair.workers] == [2, 2]
    found = take(pair, 0, 1, 2, 3)
    values = [[s["value"] for s in samples] for samples in found]
    assert values == [[0, 0], [1, -1], [2, -2], [3, -3]]
    assert {s["pid"] for samples in found for s in samples} == {w.pid for w in pair.workers}
    assert all(worker.tasks == {} and worker.resident > 10**6 for worker in pair.workers)


def test_what_all_are_told_holds_for_the_tasks_that_come_later(pair):
    pair.submit(Task(10, [("echo", 0)]))
    pair.submit(Task(11, [("echo", 0)]))
    before = take(pair, 10, 11)
    pair.tell("change", "something")
    pair.submit(Task(12, [("echo", 0)]))
    pair.submit(Task(13, [("echo", 0)]))
    assert [s["told"] for (s,) in before] == ["nothing"] * 2
    assert [s["told"] for (s,) in take(pair, 12, 13)] == ["something"] * 2


def test_signals_that_ask_a_run_to_stop_do_not_reach_workers(pair):
    for worker in pair.workers:
        for number in workers.HELD_BACK:
            os.kill(worker.pid, number)
    pair.submit(Task(20, [("echo", 0)]))
    pair.submit(Task(21, [("echo", 0)]))
    assert len(take(pair, 20, 21)) == 2


def test_what_a_dataset_raises_comes_with_its_traceback_and_the_worker_goes_on(pair):
    pair.submit(Task(30, [("fail", "seven")]))
    with pytest.raises(WorkerError, match=r"(?s)worker \d \(pid \d+\):.*ZeroDivisionError: seven"):
        take(pair, 30)
    for worker in pair.workers:
        worker.tasks.clear()
    pair.submit(Task(31, [("echo", 5)]))
    assert take(pair, 31)[0][0]["value"] == 5


# ---------------------------------------------------------------------------- who dies


def test_a_killed_worker_leaves_its_tasks_and_what_it_was_reading_to_be_done_by_others(started):
    pool = started(2)
    pool.submit(Task(0, [("echo", 0), ("die", signal.SIGKILL)]))
    pool.submit(Task(1, [("echo", 1)]))
    pool.submit(Task(2, [("echo", 2)]))
    victim = next(worker for worker in pool.workers if 0 in worker.tasks)
    kept, dead = {}, []
    end = time.monotonic() + PATIENCE
    while (not dead or 1 not in kept) and time.monotonic() < end:
        done, gone = pool.receive(0.5)
        kept, dead = kept | done, dead + gone
    assert dead == [victim] and victim.process.exitcode == -signal.SIGKILL
    assert victim.reading() == (0, 1) and sorted(victim.tasks) == [0, 2] and len(pool) == 1
    pool.submit(victim.tasks[2])
    assert take(pool, 2)[0][0]["pid"] == pool.workers[0].pid != victim.pid
    victim.send(Task(3, [("echo", 3)]))  # nobody is there; nothing happens


def test_batches_that_a_worker_had_done_are_there_after_it_was_killed(started):
    pool = started(1)
    (worker,) = pool.workers
    pool.submit(Task(0, [("echo", 7)]))
    pool.submit(Task(1, [("wait", 0)]))
    until(lambda: worker.reading() == (1, 0))
    os.kill(worker.pid, signal.SIGKILL)
    worker.process.join()
    done, dead = pool.receive(PATIENCE)
    assert done[0][0]["value"] == 7 and list(worker.tasks) == [1]
    assert dead == [worker] or pool.receive(PATIENCE) == ({}, [worker])


def test_a_worker_without_memory_ends_with_a_status_that_says_so(started):
    pool = started(1)
    pool.submit(Task(0, [("memory", 0)]))
    worker = first_death(pool)
    assert worker.process.exitcode == workers.NO_MEMORY and worker.reading() == (0, 0)


def test_a_death_is_told_in_words():
    assert workers.death(-9) == "was killed by SIGKILL"
    assert workers.death(-50) == "was killed by signal 50"
    assert workers.death(3) == "ended with exit status 3"
    assert "memory" in workers.death(workers.NO_MEMORY)


def test_the_worker_with_most_to_do_is_retired_and_its_tasks_are_given_back(started):
    pool = started(2)
    for number in range(3):
        pool.submit(Task(number, [("wait", 0)]))
    busy, other = sorted(pool.workers, key=lambda worker: -len(worker.tasks))
    back = pool.retire()
    assert [task.number for task in back] == [0, 2] and pool.workers == [other]
    assert busy.process.exitcode == -signal.SIGKILL and other.process.is_alive()
    pool.close()
    assert not other.process.is_alive() and len(pool) == 0
