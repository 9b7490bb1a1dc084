import copy
import functools
import gc
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest

from patches.cache import BUDGET, PRESENT, VolumeCache, default_budget
from tests.volumes.test_boxes import BOX, HUGE, NAMES, SHAPE, STORED, check, write
from volumes import boxes

SPAWN = multiprocessing.get_context("spawn")


def held(case):
    return default_budget([case], 2**60)


# ---------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("budget", [0, 5000, HUGE])
@pytest.mark.parametrize("stored", STORED)
def test_boxes_are_what_was_written_with_any_budget(tmp_path, stored, budget):
    case, arrays = write(tmp_path, stored=stored)
    cache = VolumeCache([case], budget)
    for _ in range(2):
        check(cache, case, arrays)
        check(cache, case, arrays, names=("label",))
    check(cache, case, arrays, box=tuple(slice(0, n) for n in SHAPE))


def test_a_copy_does_not_change_what_is_kept(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], HUGE)
    for _ in range(2):
        cache.read(case, BOX, NAMES)["image"][:] = 0
    check(cache, case, arrays)


# ---------------------------------------------------------------------------- the budget


def test_what_is_kept_never_exceeds_the_budget(tmp_path):
    stored = [write(tmp_path, i, stored=s) for i, s in enumerate(["contiguous", "lzf"] * 3)]
    budget = sum(held(case) for case, _ in stored[:3])
    cache = VolumeCache([case for case, _ in stored], budget)
    for turn in range(3):
        for case, arrays in stored:
            check(cache, case, arrays)
            assert cache.counts()["bytes"] <= budget
        # First come stays: the first three cases are hits from the second turn on.
        assert cache.counts() == {
            "cases": 3,
            "bytes": budget,
            "budget": budget,
            "hits": 3 * turn,
            "misses": 6 + 3 * turn,
            "evictions": 0,
        }


def test_a_case_is_kept_whole_or_not_at_all(tmp_path):
    case, arrays = write(tmp_path)
    cache = VolumeCache([case], held(case) - 1)
    check(cache, case, arrays)
    assert cache.counts()["bytes"] == 0
    check(cache, case, arrays, names=("label",))
    assert cache.counts()["cases"] == 1


@pytest.mark.parametrize("stored", ["contiguous", "lzf"])
def test_what_is_given_back_is_gone_and_stays_gone(tmp_path, stored):
    written = [write(tmp_path, i, stored=stored) for i in range(3)]
    size = held(written[0][0])
    cache = VolumeCache([case for case, _ in written], HUGE)
    for case, arrays in written:
        check(cache, case, arrays)
    assert cache.shrink(10 * size) == 0
    assert cache.shrink(size) == 2 * size
    for case, arrays in written:
        check(cache, case, arrays)
    counts = cache.counts()
    assert (counts["cases"], counts["bytes"], counts["evictions"]) == (1, size, 2)
    assert cache.shrink(0) == size and cache.shrink(HUGE) == 0
    assert cache.counts()["budget"] == 0


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a file is Linux's")
def test_memory_given_back_returns_to_the_system(tmp_path):
    case, arrays = write(tmp_path, shape=(64, 64, 64), stored="lzf")
    cache = VolumeCache([case], HUGE)
    check(cache, case, arrays)
    before = os.fstat(cache._arena_fd).st_blocks
    assert 512 * before >= held(case)
    cache.shrink(0)
    assert os.fstat(cache._arena_fd).st_blocks == 0


def test_the_default_is_half_of_what_is_available_and_at_most_all_cases(tmp_path):
    case, _ = write(tmp_path, shape=(16, 32, 32))
    # image and label: 16 KB each, from within a page on; the skeleton is decoded: 16 KB.
    assert default_budget([case], HUGE) == (5 + 5 + 4) * 4096
    assert default_budget([case], 10_001) == 5000


@pytest.mark.parametrize("budget", [-1, math.nan])
def test_a_budget_that_is_not_0_or_more_is_refused(tmp_path, budget):
    with pytest.raises(ValueError, match=f"got {budget}"):
        VolumeCache([], budget)
    with pytest.raises(ValueError, match=f"got {budget}"):
        VolumeCache([], 0).shrink(budget)


@pytest.mark.parametrize("budget", [1e30, math.inf])
def test_a_budget_of_any_size_is_at_most_what_the_cases_hold(tmp_path, budget):
    stored = [write(tmp_path, i, stored=s) for i, s in enumerate(["contiguous", "lzf"])]
    cache = VolumeCache([case for case, _ in stored], budget)
    read_all(cache, stored, 1)
    counts = cache.counts()
    assert counts["budget"] == counts["bytes"] == sum(held(case) for case, _ in stored)


def test_the_system_is_told_to_drop_the_pages_of_mapped_volumes(tmp_path, monkeypatch):
    stored, told = [write(tmp_path, i) for i in range(2)], []
    monkeypatch.setattr(boxes, "drop_pages", lambda case, v: told.append((case.id, v.name)))
    cache = VolumeCache([case for case, _ in stored], HUGE)
    read_all(cache, stored, 1)
    assert told == []
    cache.shrink(held(stored[0][0]))
    assert sorted(told) == [("case1", "image"), ("case1", "label")]  # the skeleton is decoded


def test_a_file_that_is_cut_off_is_read_ahead_no_more_than_it_is_mapped(tmp_path):
    case, _ = write(tmp_path)
    volume = max(boxes.volumes(case).values(), key=lambda volume: volume.offset or 0)
    faults = []
    for size in (volume.offset + volume.size - 1, volume.offset):
        os.truncate(case.path, size)
        for read in (boxes.map_volume, boxes.read_ahead):
            with pytest.raises(ValueError, match=f"got {size}; the file is cut off") as fault:
                read(case, volume)
            faults.append(str(fault.value))
    assert faults[0] == faults[1] and faults[2] == faults[3]


def test_reading_leaves_no_file_open_and_none_mapped(tmp_path):
    stored = [write(tmp_path, i) for i in range(4)]
    cache = VolumeCache([case for case, _ in stored], HUGE)
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        for case, arrays in stored:
            check(cache, case, arrays, names=("image", "label"))
    assert len(os.listdir("/dev/fd")) == before
    assert cache.counts()["hits"] == 4
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert str(tmp_path) not in maps.read()


def test_descriptors_close_with_the_cache(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    before = len(os.listdir("/dev/fd"))
    cache = VolumeCache([case], HUGE)
    check(cache, case, arrays)
    del cache
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


# ---------------------------------------------------------------------------- several processes


def work(action, *arguments):
    process = SPAWN.Process(target=action, args=arguments)
    process.start()
    return process


def finish(processes):
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def read_all(cache, stored, rounds):
    for _ in range(rounds):
        for case, arrays in stored:
            check(cache, case, arrays)


def test_spawned_processes_share_what_is_kept_and_what_is_counted(tmp_path):
    stored = [write(tmp_path, i, stored=s) for i, s in enumerate(["contiguous", "gzip"])]
    cache = VolumeCache([case for case, _ in stored], HUGE)
    read_all(cache, stored, 1)  # decoded here: no worker decodes again, or it would be a miss
    finish([work(read_all, cache, stored, 5) for _ in range(3)])
    counts = cache.counts()
    assert (counts["hits"], counts["misses"]) == (3 * 5 * 2, 2)
    assert counts["bytes"] == sum(held(case) for case, _ in stored)


def check_not_inheritable(cache):
    assert not any(map(os.get_inheritable, (cache._fd, cache._arena_fd)))


def test_descriptors_are_not_inherited_by_what_a_process_runs(tmp_path):
    cache = VolumeCache([write(tmp_path, stored="lzf")[0]], HUGE)
    check_not_inheritable(cache)
    finish([work(check_not_inheritable, cache)])


def test_what_a_worker_kept_is_there_when_it_has_ended(tmp_path):
    stored = [write(tmp_path, stored="lzf")]
    cache = VolumeCache([stored[0][0]], HUGE)
    finish([work(read_all, cache, stored, 1)])
    read_all(cache, stored, 1)
    assert (cache.counts()["hits"], cache.counts()["misses"]) == (1, 1)


def test_a_cache_pickled_elsewhere_starts_empty_and_on_its_own(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], HUGE)
    check(cache, case, arrays)
    for other in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert other.counts() == {**cache.counts(), "cases": 0, "bytes": 0, "misses": 0}
        check(other, case, arrays)
        other.shrink(0)
    assert cache.counts()["bytes"] == held(case)


def hang(connection, *_):
    connection.send("filling")
    time.sleep(60)


def fill_and_hang(cache, case, connection):
    boxes.decode = functools.partial(hang, connection)
    cache.read(case, BOX, NAMES)


def test_a_worker_killed_while_it_fills_holds_up_nobody(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], held(case))
    ours, theirs = SPAWN.Pipe()
    worker = work(fill_and_hang, cache, case, theirs)
    assert ours.recv() == "filling"
    check(cache, case, arrays)  # not ours to fill, and not waited for
    assert (cache.counts()["cases"], cache.counts()["bytes"]) == (0, held(case))
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its number still lives
    check(cache, case, arrays)
    assert (cache.counts()["cases"], cache.counts()["misses"]) == (1, 2)
    check(cache, case, arrays)
    assert cache.counts()["hits"] == 1
    worker.join()


def test_the_place_of_a_killed_worker_can_be_given_back(tmp_path):
    case, _ = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], held(case))
    ours, theirs = SPAWN.Pipe()
    worker = work(fill_and_hang, cache, case, theirs)
    ours.recv()
    assert cache.shrink(0) == 0  # at work
    worker.kill()
    worker.join()
    assert cache.shrink(0) == held(case)


def lock_and_hang(cache, connection):
    with cache._locked():
        hang(connection)


def test_a_worker_killed_with_the_lock_in_hand_blocks_nobody(tmp_path):
    case, arrays = write(tmp_path)
    cache = VolumeCache([case], HUGE)
    ours, theirs = SPAWN.Pipe()
    worker = work(lock_and_hang, cache, theirs)
    ours.recv()
    killed = []
    threading.Timer(0.1, lambda: killed.append(0) or worker.kill()).start()
    check(cache, case, arrays)
    assert killed  # it was waited for until then
    worker.join()


def test_voxels_given_back_while_they_are_copied_come_from_the_file(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, stored="lzf")
    cache, copy_box = VolumeCache([case], HUGE), boxes.copy_box
    check(cache, case, arrays)

    def give_back_and_copy(*arguments):
        cache.shrink(0)
        return copy_box(*arguments)

    monkeypatch.setattr(boxes, "copy_box", give_back_and_copy)
    check(cache, case, arrays)


def test_a_copy_is_not_trusted_if_its_voxels_went_and_came_again(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, stored="lzf")
    cache, copy_box = VolumeCache([case], HUGE), boxes.copy_box
    check(cache, case, arrays)

    def copy_between(*arguments):
        monkeypatch.setattr(boxes, "copy_box", copy_box)
        cache.shrink(0)
        copied = copy_box(*arguments)
        assert not copied.any()
        set_budget(cache, HUGE)
        check(cache, case, arrays)
        return copied

    monkeypatch.setattr(boxes, "copy_box", copy_between)
    check(cache, case, arrays)
    assert cache.counts()["cases"] == 1


def set_budget(cache, budget):
    """What no caller can do: raise it again, so that what was given back is filled anew."""
    cache._header[BUDGET] = budget


def test_a_budget_lowered_while_a_case_is_filled_holds(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, stored="lzf")
    cache, decode = VolumeCache([case], HUGE), boxes.decode

    def give_back_and_decode(*arguments):
        assert cache.shrink(0) == 0
        decode(*arguments)

    monkeypatch.setattr(boxes, "decode", give_back_and_decode)
    check(cache, case, arrays)
    assert cache.counts()["bytes"] == 0


def read_until(cache, stored, stop):
    while not stop.is_set():
        read_all(cache, stored, 1)


def test_giving_back_in_a_loop_yields_no_wrong_voxels(tmp_path):
    stored = [write(tmp_path, i, shape=(16, 64, 64), stored="lzf") for i in range(2)]
    cache = VolumeCache([case for case, _ in stored], HUGE)
    stop = SPAWN.Event()
    workers = [work(read_until, cache, stored, stop) for _ in range(2)]
    while cache.counts()["hits"] == 0:
        time.sleep(0.01)
    for _ in range(100):
        cache.shrink(0)
        set_budget(cache, HUGE)
        time.sleep(0.005)
    stop.set()
    finish(workers)
    counts = cache.counts()
    assert counts["evictions"] > 10 and counts["hits"] > 10


def test_threads_of_one_process_fill_a_case_once(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, stored="lzf")
    cache, decode, calls = VolumeCache([case], HUGE), boxes.decode, []

    def slowly(*arguments):
        calls.append(arguments[1].name)
        time.sleep(0.05)
        decode(*arguments)

    monkeypatch.setattr(boxes, "decode", slowly)
    threads = [threading.Thread(target=check, args=(cache, case, arrays)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == sorted(NAMES)
    assert all(cache._state == PRESENT) and cache.counts()["misses"] == 4
