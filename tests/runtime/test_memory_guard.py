"""What a run gives back when memory is short, in which order, and when it leaves."""

import platform
from types import SimpleNamespace

import pytest

from monitoring import machine
from monitoring.machine import GB, MemoryLimit
from runtime import memory_guard
from runtime.memory_guard import MemoryGuard
from tests import processes


class Scene:
    """A machine of 10 GB: the cache takes 1, each worker 2, `others` the rest."""

    def __init__(self, monkeypatch, workers, others, limit=None):
        self.cached, self.others, self.trimmed, self.done = GB, others, 0, []
        self.workers = [SimpleNamespace(pid=100 + i) for i in range(workers)]
        self.now = 1000.0
        monkeypatch.setattr(
            machine, "rooms", lambda: [MemoryLimit(self.free, 10 * GB, "this machine")]
        )
        monkeypatch.setattr(machine, "resident_memory", lambda pids: self.taken)
        monkeypatch.setattr(memory_guard, "release", self.release)
        monkeypatch.setattr(memory_guard.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(memory_guard.time, "sleep", lambda seconds: self.done.append("wait"))
        self.guard = MemoryGuard(self, limit=limit, report=self.report)

    @property
    def taken(self):
        return int(self.cached + 2 * GB * len(self.workers))

    @property
    def free(self):
        return int(max(0, 10 * GB - self.taken - self.others))

    def shrink(self, keep):
        freed, self.cached = self.cached - keep, keep
        self.done.append("cache")
        return freed

    def drop_worker(self):
        self.workers.pop()
        self.done.append("worker")

    def release(self):
        self.done.append("release")
        self.others -= self.trimmed

    def report(self, kind, text, **figures):
        assert kind == "memory" and figures["limit"] > 0
        self.done.append(text)

    def look(self):
        """What the guard says a while later; what it did is in `acts`."""
        self.now += 2 * memory_guard.LOOK
        return self.guard.look(self)

    @property
    def acts(self):
        return [d for d in self.done if d in ("cache", "worker", "release", "wait")]


def test_with_room_to_spare_nothing_is_given_back(monkeypatch):
    scene = Scene(monkeypatch, workers=2, others=4 * GB)
    assert scene.look() is None and scene.done == []


def test_the_cache_goes_first_and_alone_where_that_is_enough(monkeypatch):
    scene = Scene(monkeypatch, workers=2, others=4.8 * GB)
    assert scene.look() is None and scene.acts == ["cache"]
    assert "200 MB free of 10.0 GB, this machine: the cache gives back 1.0 GB" in scene.done[1]


def test_then_as_many_workers_go_as_are_needed(monkeypatch):
    scene = Scene(monkeypatch, workers=3, others=7.2 * GB)  # 7.2 + 6: 2 must go, and the cache
    assert scene.look() is None and scene.acts == ["cache", "worker", "worker"]
    texts = [text for text in scene.done if "one worker is ended" in text]
    assert ["2 left" in texts[0], "1 left" in texts[1]] == [True, True]


def test_when_nothing_is_left_to_give_back_the_run_must_leave(monkeypatch):
    scene = Scene(monkeypatch, workers=2, others=9.8 * GB)
    reason = scene.look()
    assert scene.acts == ["cache", "worker", "worker", "release", "wait"]
    assert "200 MB free of 10.0 GB, this machine" in reason and "lower data.cache_gb" in reason
    assert "none left" in [text for text in scene.done if "one worker" in text][-1]


def test_what_python_kept_for_later_may_be_enough_to_stay(monkeypatch):
    scene = Scene(monkeypatch, workers=0, others=9.8 * GB)
    scene.trimmed = GB
    assert scene.look() is None and scene.acts == ["cache", "release", "wait"]


def test_the_cache_is_given_back_once(monkeypatch):
    scene = Scene(monkeypatch, workers=1, others=6.8 * GB)
    assert scene.look() is None and scene.acts == ["cache"]
    scene.others = 7.8 * GB
    assert scene.look() is None and scene.acts == ["cache", "worker"]


def test_the_guard_looks_once_a_second(monkeypatch):
    scene = Scene(monkeypatch, workers=2, others=4 * GB)
    assert scene.look() is None
    scene.others = 9.9 * GB
    scene.now += 0.9 * memory_guard.LOOK
    assert scene.guard.look(scene) is None and scene.done == []
    assert scene.look() is not None


def test_a_limit_of_the_run_counts_what_all_its_processes_take(monkeypatch):
    scene = Scene(monkeypatch, workers=1, others=0, limit=3.1 * GB)  # of which 3 are taken
    room = scene.guard.tightest(scene)
    assert (room.free, room.total, room.what) == (0.1 * GB, 3.1 * GB, "run.memory_gb")
    assert scene.look() is None and scene.acts == ["cache"]
    assert MemoryGuard(scene, limit=None, report=None).tightest(scene) is None


@pytest.mark.parametrize(
    "free, total, tight",
    [(0.6, 10, False), (0.4, 10, True), (1.1, 100, False), (0.9, 100, True), (0, 1, True)],
)
def test_a_twentieth_stays_free_but_no_more_than_a_gigabyte(monkeypatch, free, total, tight):
    scene = Scene(monkeypatch, workers=0, others=0)
    room = MemoryLimit(int(free * GB), total * GB, "here")
    monkeypatch.setattr(machine, "rooms", lambda: [MemoryLimit(50 * GB, 99 * GB, "there"), room])
    assert scene.guard.tightest(scene) == (room if tight else None)


def test_of_several_limits_the_one_with_least_left_is_told(monkeypatch):
    scene = Scene(monkeypatch, workers=0, others=0)
    rooms = [MemoryLimit(3 * 10**7, 10 * GB, "one"), MemoryLimit(10**7, 10 * GB, "other")]
    monkeypatch.setattr(machine, "rooms", lambda: rooms)
    assert scene.guard.tightest(scene).what == "other"


PAGES = """
import resource, sys
import torch
sys.path.insert(0, ".")
from runtime import memory_guard
memory_guard.keep_freed()
for step in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(40)]
    del tensors
    if step == 4:
        memory_guard.release()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_that_a_step_freed_is_there_for_the_next_until_it_is_released():
    pages = [int(line) for line in processes.run(["-c", PAGES]).stdout.split()]
    assert pages[0] > 30000  # 40 x 4 MiB in pages of 4 KiB
    assert max(pages[2:5]) < 5000 and pages[5] > 30000
