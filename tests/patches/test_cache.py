import contextlib
import copy
import gc
import math
import multiprocessing
import os
import pickle
import threading
import time

import pytest

from patches.cache import VolumeCache, default_budget
from tests.patches.test_boxes import BOX, HUGE, NAMES, SHAPE, STORED, check, write
from volumes import casefile

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


def test_where_memory_has_no_files_a_file_without_a_name_holds_what_is_read(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)  # macOS
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], HUGE)
    for _ in range(2):
        check(cache, case, arrays)
    assert cache.counts()["cases"] == 1


def test_a_copy_does_not_change_what_is_kept(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], HUGE)
    for _ in range(2):
        cache.read(case, BOX, NAMES)["image"][:] = 0
    check(cache, case, arrays)


# ---------------------------------------------------------------------------- the budget


def test_what_is_held_never_exceeds_the_budget(tmp_path):
    stored = [write(tmp_path, i, stored=s) for i, s in enumerate(["lzf", "gzip"] * 3)]
    budget = sum(held(case) for case, _ in stored[:3])
    cache = VolumeCache([case for case, _ in stored], budget)
    for turn in range(3):
        for case, arrays in stored:
            check(cache, case, arrays)
            assert cache.counts()["bytes"] <= budget
        # The same three cases stay: they are hits from the second turn on.
        assert cache.counts() == {
            "cases": 3,
            "bytes": budget,
            "budget": budget,
            "hits": 3 * turn,
            "misses": 6 + 3 * turn,
            "evictions": 0,
        }


def test_the_smallest_cases_are_held_for_that_is_where_most_reads_find_theirs(tmp_path):
    shapes = [(12, 40, 60), (6, 20, 30), (12, 40, 60), (6, 20, 30)]
    stored = [write(tmp_path, i, shape=s, stored="lzf") for i, s in enumerate(shapes)]
    cache = VolumeCache([case for case, _ in stored], 2 * held(stored[1][0]) + 1)
    read_all(cache, stored, 2)
    assert (cache.counts()["cases"], cache.counts()["hits"]) == (2, 2)


def test_plain_volumes_are_left_to_the_file_cache_of_the_system(tmp_path):
    case, arrays = write(tmp_path)
    cache = VolumeCache([case], HUGE, names=("image", "label"))
    check(cache, case, arrays, names=("image", "label"))
    assert cache.counts() | {"hits": 0} == dict.fromkeys(cache.counts(), 0)
    assert cache.counts()["hits"] == 1


def test_volumes_that_are_not_read_take_none_of_the_budget(tmp_path):
    stored = [write(tmp_path, i, stored="lzf") for i in range(2)]
    names = ("image", "label")
    budget = default_budget([case for case, _ in stored], HUGE, names)
    assert budget < sum(held(case) for case, _ in stored)
    cache = VolumeCache([case for case, _ in stored], budget, names)
    for case, arrays in stored * 2:
        check(cache, case, arrays, names=names)
    assert (cache.counts()["cases"], cache.counts()["hits"]) == (2, 2)
    check(cache, *stored[0])  # a skeleton all the same, from its file
    assert cache.counts()["bytes"] == budget


def test_what_is_given_back_is_gone_and_stays_gone(tmp_path):
    written = [write(tmp_path, i, stored="lzf") for i in range(3)]
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


def shared_bytes(cache):
    """Bytes of memory that the processes share for this cache."""
    return 512 * os.fstat(cache._fd).st_blocks


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a file is Linux's")
def test_memory_given_back_returns_to_the_system(tmp_path):
    case, arrays = write(tmp_path, shape=(64, 64, 64), stored="lzf")
    cache = VolumeCache([case], HUGE)
    check(cache, case, arrays)
    assert shared_bytes(cache) > held(case)
    cache.shrink(0)
    assert shared_bytes(cache) <= cache._header


def test_the_default_is_half_of_what_is_available_and_at_most_all_cases(tmp_path):
    case, _ = write(tmp_path, shape=(16, 32, 32))
    assert default_budget([case], HUGE) == 4 * 4096  # the skeleton; the others are not compressed
    packed, _ = write(tmp_path, 1, shape=(16, 32, 32), stored="lzf")
    assert default_budget([case, packed], HUGE) == 4 * 4 * 4096
    assert default_budget([packed], 10_001) == 5000
    names = ("image", "label")
    assert VolumeCache([case], HUGE, names).announce("free") == (
        "not needed, for the case files are not compressed"
    )
    assert VolumeCache([packed], 40_960, names).announce("free") == (
        "0.0 MB for all workers, of 0.0 MB of decoded volumes (free)"
    )


@pytest.mark.parametrize("budget", [-1, math.nan])
def test_a_budget_that_is_not_0_or_more_is_refused(tmp_path, budget):
    with pytest.raises(ValueError, match=f"got {budget}"):
        VolumeCache([], budget)
    with pytest.raises(ValueError, match=f"got {budget}"):
        VolumeCache([], 0).shrink(budget)


@pytest.mark.parametrize("budget", [1e30, math.inf])
def test_a_budget_of_any_size_is_at_most_what_the_cases_hold(tmp_path, budget):
    stored = [write(tmp_path, i, stored=s) for i, s in enumerate(["gzip", "lzf"])]
    cache = VolumeCache([case for case, _ in stored], budget)
    read_all(cache, stored, 1)
    counts = cache.counts()
    assert counts["budget"] == counts["bytes"] == sum(held(case) for case, _ in stored)


def test_reading_leaves_no_file_open_and_none_mapped(tmp_path):
    stored = [write(tmp_path, i) for i in range(4)]
    cache = VolumeCache([case for case, _ in stored], HUGE)
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        for case, arrays in stored:
            check(cache, case, arrays, names=("image", "label"))
    assert len(os.listdir("/dev/fd")) == before
    assert cache.counts()["hits"] == 8
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert str(tmp_path) not in maps.read()


def test_descriptors_close_with_the_cache(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    gc.collect()
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
    stored = [write(tmp_path, i, stored=s) for i, s in enumerate(["lzf", "gzip"])]
    cache = VolumeCache([case for case, _ in stored], HUGE)
    read_all(cache, stored, 1)  # decoded here: no worker decodes again, or it would be a miss
    finish([work(read_all, cache, stored, 5) for _ in range(3)])
    counts = cache.counts()
    assert (counts["hits"], counts["misses"]) == (3 * 5 * 2, 2)
    assert counts["bytes"] == sum(held(case) for case, _ in stored)


def check_not_inheritable(cache):
    assert not os.get_inheritable(cache._fd)


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


class HalfDecoded:
    """Stands for an open case file whose volumes are being decoded, and never will be."""

    def __init__(self, connection):
        self.connection = connection

    def __getitem__(self, name):
        return self

    def read_direct(self, volume):
        volume[0] = 7
        self.connection.send("decoding")
        time.sleep(60)


def decode_and_hang(cache, case, connection):
    casefile.opened = lambda case: contextlib.nullcontext(HalfDecoded(connection))
    cache.read(case, BOX, NAMES)


def test_a_worker_killed_while_it_decodes_holds_up_nobody_and_leaves_no_wrong_voxel(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], held(case))
    ours, theirs = SPAWN.Pipe()
    worker = work(decode_and_hang, cache, case, theirs)
    assert ours.recv() == "decoding"
    assert cache.counts()["bytes"] == 0
    worker.kill()
    worker.join()
    check(cache, case, arrays)
    assert (cache.counts()["cases"], cache.counts()["misses"]) == (1, 1)
    check(cache, case, arrays)
    assert cache.counts()["hits"] == 1


def test_a_volume_that_another_process_is_decoding_is_read_all_the_same(tmp_path):
    case, arrays = write(tmp_path, stored="lzf")
    cache = VolumeCache([case], held(case))
    ours, theirs = SPAWN.Pipe()
    worker = work(decode_and_hang, cache, case, theirs)
    assert ours.recv() == "decoding"
    for _ in range(2):
        check(cache, case, arrays)
    assert (cache.counts()["hits"], cache.counts()["misses"]) == (1, 1)
    worker.kill()
    worker.join()


def test_voxels_given_back_while_they_are_copied_come_from_the_file(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, stored="lzf")
    cache, native, copies = VolumeCache([case], HUGE), casefile.native, []
    check(cache, case, arrays)

    def give_back_and_copy(array):
        cache.shrink(0)
        copies.append(native(array))
        return copies[-1]

    monkeypatch.setattr(casefile, "native", give_back_and_copy)
    check(cache, case, arrays)
    if hasattr(os, "memfd_create"):
        assert not copies[0].any()  # as it would be if nobody looked again
    assert cache.counts()["misses"] == 2


def test_a_budget_lowered_while_a_case_is_decoded_holds(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, shape=(64, 64, 64), stored="lzf")
    cache, opened = VolumeCache([case], HUGE), casefile.opened

    def give_back_and_open(case):
        cache.shrink(0)
        return opened(case)

    monkeypatch.setattr(casefile, "opened", give_back_and_open)
    check(cache, case, arrays)
    assert cache.counts()["bytes"] == 0
    if hasattr(os, "memfd_create"):  # what was decoded after that is given back as well
        assert shared_bytes(cache) <= cache._header


def read_until(cache, stored, stop):
    while not stop.is_set():
        read_all(cache, stored, 1)


def test_giving_back_case_after_case_yields_no_wrong_voxels(tmp_path):
    stored = [write(tmp_path, i, shape=(8, 64, 64), stored="lzf") for i in range(10)]
    cache = VolumeCache([case for case, _ in stored], HUGE)
    stop, size = SPAWN.Event(), cache.counts()["budget"]
    workers = [work(read_until, cache, stored, stop) for _ in range(2)]
    while cache.counts()["hits"] < 20:
        time.sleep(0.01)
    for step in range(100, -1, -1):
        cache.shrink(size * step // 100)
        assert cache.counts()["bytes"] <= size * step // 100
        time.sleep(0.002)
    while cache.counts()["misses"] <= 20:
        time.sleep(0.01)
    stop.set()
    finish(workers)
    counts = cache.counts()
    assert (counts["bytes"], counts["evictions"]) == (0, 10) and counts["misses"] > 20


def test_threads_of_one_process_may_decode_a_case_at_once(tmp_path, monkeypatch):
    case, arrays = write(tmp_path, stored="lzf")
    cache, opened = VolumeCache([case], HUGE), casefile.opened
    together = threading.Barrier(4)

    def open_together(case):
        together.wait(30)
        return opened(case)

    monkeypatch.setattr(casefile, "opened", open_together)
    failed = []

    def read():
        try:
            check(cache, case, arrays)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (cache.counts()["bytes"], cache.counts()["misses"]) == (held(case), 4)
