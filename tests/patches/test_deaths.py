"""Batches whose workers die, are dropped, or find a case that cannot be read: none is lost, none
comes twice, and each death is reported with what is known. Without processes."""

import copy
import random
import signal

import pytest

import data
from data import ReadFailure, TooManyExcluded
from monitoring import machine
from patches import feed
from tests.patches.test_feed import check_same
from tests.test_data import HUGE, SHAPES, patches, write


class Worker:
    """A process that does not run."""

    def __init__(self, number):
        self.pid, self.exitcode = 100 + number, None

    def is_alive(self):
        return self.exitcode is None

    def kill(self):
        self.exitcode = self.exitcode or -signal.SIGKILL

    def join(self):
        pass


class Loader:
    """A DataLoader, and its iterator, that reads what is asked for when it is asked for.

    script(loader), if given, is called before each batch, and may kill workers.
    """

    script = None

    def __init__(self, reader, *, sampler, num_workers, **_):
        self.reader, self.numbers, self.status = reader, list(sampler), reader.status
        self.dataset = copy.copy(reader.dataset)  # a worker has its own
        self.dataset.excluded = dict(reader.dataset.excluded)
        self._workers = [Worker(number) for number in range(num_workers)]

    def __iter__(self):
        return self

    def __next__(self):
        if self.script:
            self.script()
        if any(not worker.is_alive() for worker in self._workers):
            raise RuntimeError("DataLoader worker (pid(s) 100) exited unexpectedly")
        number = self.numbers.pop(0)
        return [[self.dataset[i] for i in self.reader.plan.sample_indices(number)]]

    def reads(self, number, batch, position=0):
        """A worker reads a sample of a batch."""
        self.status[3 * number : 3 * number + 3] = [batch, position, 40 * 10**6]

    def kill(self, number, code=-signal.SIGKILL):
        self._workers[number].exitcode = code


@pytest.fixture
def stored(tmp_path):
    return [write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)]


@pytest.fixture
def made(stored, monkeypatch):
    """make(script, ...) -> (batches, loaders, reports)."""

    def make(script=None, *, last=8, count=3, dataset=None, **how):
        loaders, reports = [], []

        class Scripted(Loader):
            def __init__(self, *arguments, **named):
                super().__init__(*arguments, **named)
                loaders.append(self)

        Scripted.script = script
        monkeypatch.setattr(feed, "DataLoader", Scripted)
        batches = data.Batches(
            dataset or whole(stored),
            0,
            last,
            batches_per_epoch=4,
            batch_size=2,
            workers=count,
            prefetch=2,
            report=lambda kind, text, **figures: reports.append((kind, text, figures)),
            **how,
        )
        return batches, loaders, reports

    return make


def whole(stored):
    """A dataset with everything in its samples."""
    return patches(stored, budget=HUGE, skeletons=True)


def undisturbed(stored, last=8):
    dataset = whole(stored)
    plan = feed.PatchPlan(batches_per_epoch=4, batch_size=2)
    return [[dataset[index] for index in plan.sample_indices(number)] for number in range(last)]


# ---------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("persistent", [True, False])
def test_no_batch_is_lost_or_comes_twice_whoever_dies_whenever(made, stored, seed, persistent):
    chance = random.Random(seed)

    def script(loader):
        if chance.random() < 0.4:
            loader.kill(chance.randrange(len(loader._workers)))

    batches, _, reports = made(script, persistent=persistent)
    check_same(undisturbed(stored), list(batches))
    assert 0 < len(reports) <= 3 and {kind for kind, *_ in reports} == {"worker died"}


def test_a_death_is_reported_with_signal_case_memory_and_setting(made, monkeypatch):
    monkeypatch.setattr(machine, "resident_memory", lambda pids=None: 900 * 10**6)
    monkeypatch.setattr(machine, "oom_kills", lambda: 0)
    monkeypatch.setattr(machine, "shared_memory_free", lambda: 64 * 10**6)

    def script(loader):
        if len(loader._workers) == 3:
            loader.reads(1, batch=1)
            loader.kill(1, -signal.SIGSEGV)
        elif len(loader._workers) == 2:
            loader.kill(0)

    batches, _, reports = made(script)
    next(batches)
    kind, text, figures = reports[0]
    case = batches.dataset.case_of((0, 2))  # the first sample of batch 1
    assert kind == "worker died" and figures["case"] == case
    assert (figures["worker"], figures["pid"], figures["exitcode"]) == (1, 101, -11)
    assert figures["resident"] == 40 * 10**6
    for part in (
        "worker 1 (pid 101) was killed by SIGSEGV",
        f"while reading case {case} (epoch 0, sample 2)",
        "it held 40 MB, all processes of the run hold 900 MB",
        "64 MB of /dev/shm free, OOM counter 0",
        "lower training.workers; workers left: 2, reading goes on from batch 0, nothing is lost",
    ):
        assert part in text
    assert "while reading no case" in reports[1][1] and "workers left: 1" in reports[1][1]


def test_a_death_is_described_in_words():
    assert feed.describe_death(-9) == "was killed by SIGKILL"
    assert feed.describe_death(-50) == "was killed by signal 50"
    assert feed.describe_death(3) == "ended with exit status 3"
    assert "memory" in feed.describe_death(feed.NO_MEMORY)


def test_when_the_kernel_counts_a_kill_for_memory_that_is_said_once(made, monkeypatch):
    kills = iter([3, 4, 4])  # at the start, at each death
    monkeypatch.setattr(machine, "oom_kills", lambda: next(kills))
    batches, _, reports = made(lambda loader: len(loader._workers) > 1 and loader.kill(0))
    next(batches)
    first, second = (text for _, text, _ in reports)
    assert "OOM counter 4; the kernel killed it for memory" in first
    assert "lower data.cache_gb, training.prefetch_factor or training.workers" in first
    assert "OOM counter 4; if memory is short" in second and "the kernel" not in second


def test_when_all_workers_die_at_once_the_training_process_reads_all(made, stored):
    def script(loader):
        for number in range(3):
            loader.kill(number)

    batches, loaders, reports = made(script)
    check_same(undisturbed(stored), list(batches))
    assert len(loaders) == 1 and len(reports) == 3  # and no worker is started again
    assert all("while reading no case" in text for _, text, _ in reports)
    assert "workers left: 0, reading goes on from batch 0" in reports[-1][1]


def test_a_worker_that_dies_while_it_is_started_is_reported(made, stored, monkeypatch):
    class Dies:
        def __iter__(self):
            raise BrokenPipeError("Broken pipe")

    batches, loaders, reports = made(count=0)
    batches.worker_count = 2
    monkeypatch.setattr(feed, "DataLoader", lambda *arguments, **named: Dies())
    check_same(undisturbed(stored), list(batches))
    assert [kind for kind, *_ in reports] == ["worker died", "worker died"] and not loaders
    assert (
        "Broken pipe" in reports[0][1]
        and "workers left: 1, reading goes on from batch 0" in reports[0][1]
    )


# ---------------------------------------------------------------------------- dropped


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_that_are_dropped_leave_their_batches_to_the_others(made, stored, persistent):
    batches, loaders, reports = made(persistent=persistent)
    seen = [next(batches)]
    for left in (2, 1, 0):
        batches.drop_worker()
        assert len(batches.workers) == left == len(batches.roles())
        seen.append(next(batches))
    seen += list(batches)
    check_same(undisturbed(stored), seen)
    assert reports == [] and len(loaders) == 3  # and not started again for the next epoch
    assert all(not worker.is_alive() for loader in loaders for worker in loader._workers)


def test_workers_of_one_epoch_end_with_it_and_others_read_the_next(made, stored):
    batches, loaders, _ = made(persistent=False)
    seen = [next(batches) for _ in range(4)]
    assert batches.workers == [] and loaders[0].numbers == []
    check_same(undisturbed(stored), seen + list(batches))
    assert len(loaders) == 2 and loaders[1].reader.plan == batches.plan


def test_waiting_polls_and_reports_who_is_waited_for(made, monkeypatch):
    now, polls = [0.0], []

    def poll():
        polls.append(1)
        now[0] += 40
        if len(polls) == 5:
            raise InterruptedError

    def script(loader):
        loader.reads(0, batch=0)
        raise RuntimeError("DataLoader timed out after 1.0 seconds")

    monkeypatch.setattr(feed.time, "monotonic", lambda: now[0])
    batches, _, reports = made(script, poll=poll)
    with pytest.raises(InterruptedError):
        next(batches)
    case = batches.dataset.case_of((0, 0))
    (one, *_) = [text for kind, text, _ in reports if kind == "waiting for data"]
    start = "batch 0 has not come for 60 s: worker 0 (pid 100) while reading case "
    assert one.startswith(f"{start}{case} (epoch 0, sample 0); worker 1 (pid 101) while reading no")
    assert len(reports) == 2  # after 60 seconds, and after 120


def test_workers_may_be_dropped_while_a_batch_is_waited_for(made, stored):
    def script(loader):
        raise RuntimeError("DataLoader timed out after 1.0 seconds")

    batches, loaders, _ = made(script, count=2)
    batches.poll = batches.drop_worker
    check_same(undisturbed(stored), list(batches))
    assert [len(loader._workers) for loader in loaders] == [2, 1]


def test_a_batch_that_ended_in_an_exception_may_be_asked_for_again(made, stored):
    def script(loader):
        if len(loaders) == 1 and len(loader.numbers) == 6:
            raise ZeroDivisionError

    batches, loaders, _ = made(script)
    seen = [next(batches), next(batches)]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    check_same(undisturbed(stored), seen + list(batches))


# ---------------------------------------------------------------------------- cases left out


class Broken(data.PatchDataset):
    """A dataset of which one case cannot be read from a batch on."""

    broken = "case1"

    def __getitem__(self, index):
        if self.case_of(index) == self.broken:
            return ReadFailure(self.broken, f"case {self.broken}: cut short")
        return super().__getitem__(index)


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
    with pytest.raises(TooManyExcluded, match=r"cut short; 1 of 3 .* than the share of 0\.3"):
        list(batches)
    assert reports == [] and batches.dataset.excluded == {}


def test_a_case_in_which_workers_die_of_a_fault_is_left_out_after_the_second(made, stored):
    deaths = []

    def script(loader):
        indices = loader.reader.plan.sample_indices(loader.numbers[0])
        cases = [loader.dataset.case_of(index) for index in indices]
        if len(deaths) < 2 and "case0" in cases:
            deaths.append(1)
            loader.reads(0, loader.numbers[0], cases.index("case0"))
            loader.kill(0, -signal.SIGBUS)

    batches, _, reports = made(script)
    seen = [(batch, "case0" in batches.dataset.excluded) for batch in batches]
    kinds = [kind for kind, *_ in reports]
    assert len(seen) == 8 and kinds == ["worker died", "worker died", "case left out"]
    assert reports[2][2]["case"] == "case0" and "2 workers died reading it" in reports[2][1]
    after = [sample["case"] for batch, excluded in seen if excluded for sample in batch]
    assert len(after) > 4 and "case0" not in after


def test_a_killed_worker_is_no_fault_of_its_case(made):
    def script(loader):
        loader.reads(0, loader.numbers[0])
        loader.kill(0)

    batches, _, reports = made(script)
    list(batches)
    assert [kind for kind, *_ in reports] == ["worker died"] * 3
    assert batches.dataset.excluded == {}


def test_cases_left_out_stay_so_when_a_run_is_resumed_unless_their_file_has_changed(stored):
    dataset, other = (whole(stored) for _ in range(2))
    dataset.exclude("case0", "case case0: cut short")
    dataset.exclude("case1", "case case1: cut short")
    state = dataset.state_dict()
    assert state["case0"] == ["case case0: cut short", *stored[0].stamp]
    state["case1"][1] += 1  # bytes
    lines = other.load_state_dict(state)
    assert list(other.excluded) == ["case0"]
    assert lines == [
        "case case1: its file has changed, it is sampled again",
        "left out: case case0: cut short",
    ]
