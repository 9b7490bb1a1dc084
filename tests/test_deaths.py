"""Batches whose workers die, are dropped, or find a case that cannot be read: none is lost, none
comes twice, and each death is told with what is known. Without processes."""

import random
import signal
from types import SimpleNamespace

import pytest

import data
import loader
import workers
from data import ReadFailure
from monitoring import machine
from runtime.signals import CannotGoOn
from tests.test_data import HUGE, SHAPES, patches, write
from tests.test_loader import check_same


class Worker:
    """A worker that reads when the pool says so."""

    def __init__(self, dataset, number):
        self.dataset, self.number, self.pid, self.tasks = dataset, number, 100 + number, {}
        self.process, self.at, self.resident = SimpleNamespace(exitcode=None), None, None

    def reading(self):
        return self.at

    def begin(self, index=0):
        """Start to read the oldest task, if there is one."""
        if self.tasks:
            self.at, self.resident = (next(iter(self.tasks)), index), 40 * 10**6

    def do(self):
        self.begin(1)
        number = next(iter(self.tasks))
        return number, [self.dataset[place] for place in self.tasks.pop(number).places]


class Pool:
    """workers.Pool without processes. script(pool) -> what `receive` gives, by its methods."""

    def __init__(self, dataset, count, script):
        self.workers, self.script = [Worker(dataset, i) for i in range(count)], script
        self.submitted, self.closed = [], False

    def __len__(self):
        return len(self.workers)

    def submit(self, task):
        self.submitted.append(task.number)
        min(self.workers, key=lambda w: len(w.tasks)).tasks[task.number] = task

    def tell(self, method, *arguments):
        for worker in self.workers:
            getattr(worker.dataset, method)(*arguments)

    def receive(self, timeout):
        return self.script(self)

    def retire(self):
        worker = max(self.workers, key=lambda w: len(w.tasks))
        self.workers.remove(worker)
        return list(worker.tasks.values())

    def close(self):
        self.closed, self.workers = True, []

    def some_work(self, chance=None):
        busy = [worker for worker in self.workers if worker.tasks]
        worker = chance.choice(busy) if chance else busy[0]
        return dict([worker.do()]), []

    def death(self, worker, code):
        worker.begin()
        worker.process.exitcode = code
        self.workers.remove(worker)
        return {}, [worker]


@pytest.fixture
def stored(tmp_path):
    return [write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)]


@pytest.fixture
def made(stored, monkeypatch):
    """make(script, ...) -> (batches, pools, reports)."""

    def make(script=Pool.some_work, *, last=8, count=3, dataset=None, **how):
        dataset = dataset or whole(stored)
        pools, reports = [], []

        def pool(given, wanted):
            pools.append(Pool(given, wanted, script))
            return pools[-1]

        monkeypatch.setattr(workers, "Pool", pool)
        batches = loader.Batches(
            dataset,
            0,
            last,
            batches_per_epoch=4,
            batch_size=2,
            workers=count,
            prefetch=2,
            report=lambda kind, text, **figures: reports.append((kind, text, figures)),
            **how,
        )
        return batches, pools, reports

    return make


def whole(stored):
    """A dataset that draws with everything in its samples."""
    return patches(stored, budget=HUGE, skeletons=True)


def undisturbed(stored, last=8):
    dataset = whole(stored)
    plan = loader.PatchPlan(batches_per_epoch=4, batch_size=2)
    return [[dataset[place] for place in plan[number]] for number in range(last)]


# ---------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("persistent", [True, False])
def test_no_batch_is_lost_or_comes_twice_whoever_dies_whenever(made, stored, seed, persistent):
    chance = random.Random(seed)

    def script(pool):
        if chance.random() < 0.25:
            return pool.death(chance.choice(pool.workers), -signal.SIGKILL)
        return pool.some_work(chance)

    batches, _, reports = made(script, persistent=persistent)
    check_same(undisturbed(stored), list(batches))
    assert 0 < len(reports) <= 3 and {kind for kind, *_ in reports} == {"worker died"}


def test_a_death_tells_the_signal_the_case_the_memory_and_the_setting(made, monkeypatch):
    monkeypatch.setattr(machine, "resident_memory", lambda pids=None: 900 * 10**6)
    monkeypatch.setattr(machine, "oom_kills", lambda: 0)
    monkeypatch.setattr(machine, "shared_memory_free", lambda: 64 * 10**6)
    batches, pools, reports = made()
    expected = batches.dataset.case_of((0, 2))  # the first sample of batch 1, of worker 1
    for worker in (pools[0].workers[1], pools[0].workers[0]):
        batches._bury(pools[0].death(worker, -signal.SIGSEGV)[1][0])
    kind, text, figures = reports[0]
    assert kind == "worker died" and figures["case"] == expected
    assert (figures["worker"], figures["pid"], figures["exitcode"]) == (1, 101, -11)
    assert (figures["task"], figures["resident"]) == (1, 40 * 10**6)
    for part in (
        "worker 1 (pid 101) was killed by SIGSEGV",
        f"while it read case {expected} (epoch 0, sample 2)",
        "it held 40 MB, all processes of the run hold 900 MB",
        "64 MB of /dev/shm free, OOM counter 0",
        "lower training.workers; 2 workers go on from batch 0, nothing is lost",
    ):
        assert part in text
    assert "1 worker goes on" in reports[1][1]


def test_when_the_kernel_counts_a_kill_for_memory_that_is_said_once(made, monkeypatch):
    kills = iter([3, 4, 4])  # at the start, at each death
    monkeypatch.setattr(machine, "oom_kills", lambda: next(kills))
    batches, pools, reports = made()
    for _ in range(2):
        batches._bury(pools[0].death(pools[0].workers[0], -signal.SIGKILL)[1][0])
    first, second = (text for _, text, _ in reports)
    assert "the kernel killed it for memory (OOM counter 4)" in first
    assert "lower data.cache_gb, training.prefetch_factor or training.workers" in first
    assert "OOM counter 4; if memory is short" in second and "the kernel" not in second


def test_when_all_workers_die_at_once_the_training_process_reads_all(made, stored):
    def script(pool):
        dead, pool.workers = pool.workers, []
        for worker in dead:
            worker.process.exitcode = -signal.SIGKILL
        return {}, dead

    batches, pools, reports = made(script)
    check_same(undisturbed(stored), list(batches))
    assert len(pools) == 1 and len(reports) == 3  # and nobody is started again
    assert all("before it read anything" in text for _, text, _ in reports)
    assert "the training process reads by itself from batch 0" in reports[-1][1]


def test_what_a_worker_had_sent_before_it_died_is_not_read_again(made, stored):
    seen = []

    def script(pool):
        if not seen:
            seen.append(1)
            done, _ = pool.some_work()
            return done, pool.death(pool.workers[0], -signal.SIGKILL)[1]
        return pool.some_work()

    batches, pools, _ = made(script)
    check_same(undisturbed(stored), list(batches))
    assert pools[0].submitted.count(0) == 1  # batch 0 had arrived
    assert all(pools[0].submitted.count(n) <= 2 for n in range(8))


# ---------------------------------------------------------------------------- dropped


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_that_are_dropped_leave_their_batches_to_the_others(made, stored, persistent):
    batches, pools, reports = made(persistent=persistent)
    found = [next(batches)]
    for left in (2, 1, 0):
        batches.drop_worker()
        assert len(batches.workers) == left == len(batches.roles())
        found.append(next(batches))
    found += list(batches)
    check_same(undisturbed(stored), found)
    assert reports == [] and len(pools) == 1  # not started again for the next epoch


def test_workers_of_one_epoch_end_with_it_and_others_read_the_next(made, stored):
    batches, pools, _ = made(persistent=False)
    check_same(undisturbed(stored), list(batches))
    assert [pool.closed for pool in pools] == [True, True]
    assert [sorted(pool.submitted) for pool in pools] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_no_worker_reads_further_ahead_than_it_is_told(made):
    batches, pools, _ = made(last=100)
    assert sorted(pools[0].submitted) == list(range(6))  # 3 workers, 2 batches each
    next(batches)
    next(batches)
    assert max(pools[0].submitted) == 6


def test_waiting_asks_whether_to_leave_and_tells_who_is_waited_for(made, monkeypatch):
    now, polls = [0.0], []

    def poll():
        polls.append(1)
        now[0] += 40
        if len(polls) == 5:
            raise InterruptedError

    def script(pool):
        pool.workers[0].begin()
        return {}, []

    monkeypatch.setattr(loader.time, "monotonic", lambda: now[0])
    batches, _, reports = made(script, poll=poll)
    with pytest.raises(InterruptedError):
        next(batches)
    case = batches.dataset.case_of((0, 0))
    (one, *_) = [text for kind, text, _ in reports if kind == "waiting for data"]
    assert one == f"batch 0 has not come for 60 s: worker 0 (pid 100) reads case {case}"
    assert len(reports) == 2  # after 60 seconds, and after 120


# ---------------------------------------------------------------------------- cases left out


class Broken(data.PatchDataset):
    """A dataset of which one case cannot be read from a batch on."""

    broken = "case1"

    def __getitem__(self, place):
        if self.case_of(place) == self.broken:
            return ReadFailure(self.broken, f"case {self.broken}: cut short")
        return super().__getitem__(place)


@pytest.fixture
def broken(stored):
    """What makes such datasets."""

    def make():
        dataset = whole(stored)
        dataset.__class__ = Broken
        return dataset

    return make


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_stands_in_for_a_case_does_not_depend_on_who_reads(made, broken, count):
    alone = list(made(dataset=broken(), count=0)[0])
    batches, _, reports = made(dataset=broken(), count=count)
    check_same(alone, list(batches))
    assert [(kind, figures["case"]) for kind, _, figures in reports] == [("case left out", "case1")]
    assert "cut short; 1 of 3 training cases are left out" in reports[0][1]
    assert all(sample["case"] != "case1" for batch in alone for sample in batch)


def test_every_other_sample_is_the_one_that_it_would_have_been(made, stored, broken):
    expected, found = undisturbed(stored), list(made(dataset=broken(), count=0)[0])
    pairs = [
        (a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True)
    ]
    kept = [(a, b) for a, b in pairs if a["case"] != "case1"]
    assert 0 < len(kept) < len(pairs)
    check_same([[a] for a, _ in kept], [[b] for _, b in kept])


def test_more_cases_than_allowed_stop_the_run(made, broken):
    batches, _, reports = made(dataset=broken(), count=0, max_excluded=0.3)  # one of three is more
    with pytest.raises(CannotGoOn, match=r"cut short; 1 of 3 .* than the share of 0\.3"):
        list(batches)
    assert reports == [] and batches.dataset.excluded == {}


def test_a_case_in_which_workers_die_of_a_fault_is_left_out_after_the_second(made, stored):
    deaths = []

    def script(pool):
        reading = [w for w in pool.workers if w.tasks]
        for worker in reading:
            worker.begin()
            place = worker.tasks[worker.at[0]].places[0]
            if len(deaths) < 2 and worker.dataset.case_of(place) == "case0":
                deaths.append(worker.number)
                return pool.death(worker, -signal.SIGBUS)
        return pool.some_work()

    batches, _, reports = made(script)
    found = [(batch, "case0" in batches.dataset.excluded) for batch in batches]
    kinds = [kind for kind, *_ in reports]
    assert len(found) == 8 and kinds == ["worker died", "worker died", "case left out"]
    assert reports[2][2]["case"] == "case0" and "2 workers died reading it" in reports[2][1]
    after = [sample["case"] for batch, excluded in found if excluded for sample in batch]
    assert len(after) > 4 and "case0" not in after


def test_a_killed_worker_is_no_fault_of_its_case(made):
    def script(pool):
        return pool.death(pool.workers[0], -signal.SIGKILL)

    batches, _, reports = made(script)
    list(batches)
    assert {kind for kind, *_ in reports} == {"worker died"} and batches.dataset.excluded == {}


def test_cases_left_out_stay_so_when_a_run_is_resumed_unless_their_file_has_changed(stored):
    dataset, other = (whole(stored) for _ in range(2))
    dataset.exclude("case0", "case case0: cut short")
    dataset.exclude("case1", "case case1: cut short")
    saved = loader.excluded(dataset)
    assert saved["case0"] == ["case case0: cut short", *stored[0].stamp]
    saved["case1"][1] += 1  # bytes
    lines = loader.exclude_again(other, saved)
    assert list(other.excluded) == ["case0"]
    assert lines == [
        "case case1: its file has changed, it is drawn again",
        "left out: case case0: cut short",
    ]
