"""From the case files to the device: the order of patches, who reads them, the copy.

    batches = Batches(patches, 0, 1000, batches_per_epoch=100, batch_size=2, workers=2, prefetch=4)
    with contextlib.closing(batches):
        for samples in batches: ...

Workers (workers.py) live through all epochs and read ahead. One that dies is reported with all that
is known of its death, and the others read what it had to read. A case that cannot be read is left
out, and another one stands in. On CUDA samples are pinned, and copied on a stream of its own while
the step before still computes.
"""

import itertools
import signal
import time

import torch

import workers as worker_processes
from data import ReadFailure
from monitoring import machine
from monitoring.machine import format_bytes
from runtime.signals import CannotGoOn

WAIT = 1.0  # seconds between two looks at whether the run shall stop, while it waits for data
STALLED = 60.0  # seconds of waiting until it is said who is waited for, then twice that, ...
FAULTS = {signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
SEVERAL = 2  # workers that died of a fault while they read one case, before it is left out


class PatchPlan:
    """Batches of (epoch, index) by their number, over all epochs.

    Of `ranks` processes, each takes its part of every batch: together they draw what one process
    draws whose batches are `ranks` times as large.
    """

    def __init__(self, *, batches_per_epoch, batch_size, rank=0, ranks=1):
        self.batches_per_epoch, self.batch_size = batches_per_epoch, batch_size
        self.rank, self.ranks = rank, ranks

    def __getitem__(self, number):
        epoch, batch = divmod(number, self.batches_per_epoch)
        start = (batch * self.ranks + self.rank) * self.batch_size
        return [(epoch, start + i) for i in range(self.batch_size)]


class Batches:
    """An iterator over lists of samples for the batches first..last, read by `workers` processes.

    dataset: a `data.PatchDataset`; prefetch: batches that each worker reads ahead; persistent: the
    workers live through all epochs and read on during validation, otherwise they are started anew
    for each epoch; pin: samples go to pinned memory. Close it, or its workers stay.

    report(kind, text, **figures) is told of workers that die and of cases that are left out; at
    most a share `max_excluded` of the cases may be, else `stopping.CannotGoOn` is raised. poll() is
    called every second of waiting, and may raise.

    Every sample is a function of its place in the plan and of the cases left out by then, whoever
    reads it and whatever happened to others.
    """

    def __init__(
        self,
        dataset,
        first,
        last,
        *,
        batches_per_epoch,
        batch_size,
        workers,
        prefetch,
        persistent=True,
        pin=False,
        rank=0,
        ranks=1,
        report=lambda kind, text, **figures: None,
        poll=lambda: None,
        max_excluded=1.0,
    ):
        share = {"batch_size": batch_size, "rank": rank, "ranks": ranks}
        self.plan = PatchPlan(batches_per_epoch=batches_per_epoch, **share)
        self.dataset, self.number, self.last = dataset, first, last
        self.wanted, self.prefetch, self.persistent, self.pin = workers, prefetch, persistent, pin
        self.report, self.poll, self.max_excluded = report, poll, max_excluded
        self.ready, self.given, self.faults = {}, first, {}
        self.oom_kills = machine.oom_kills()
        self.pool = None
        self._fill()

    def __iter__(self):
        return self

    def __next__(self):
        if self.number >= self.last:
            self.close()
            raise StopIteration
        self._fill()
        samples = self._read() if not self.pool else self._wait_for(self.number)
        samples = self._settled(samples)
        self.number += 1
        return [_pinned(sample) for sample in samples] if self.pin else samples

    @property
    def workers(self):
        """The worker processes that live, as a list of `workers.Worker`."""
        return list(self.pool.workers) if self.pool else []

    def roles(self):
        """{pid: name} of the workers that live, for whoever shows them."""
        return {worker.pid: f"worker {worker.number}" for worker in self.workers}

    def drop_worker(self):
        """End one worker, for good; the others, or this process, read what it had to read."""
        self.wanted = len(self.pool) - 1
        self._give_again(self.pool.retire())

    def close(self):
        if self.pool is not None:
            self.pool.close()
            self.pool, self.ready = None, {}

    # ------------------------------------------------------------------------ reading

    def _fill(self):
        """Start the workers if they shall run, and give them what they have room for."""
        edge = self._edge()
        if self.pool is None and self.wanted and self.number < edge:
            self.pool, self.given = worker_processes.Pool(self.dataset, self.wanted), self.number
        if self.pool:
            ahead = min(edge, self.number + max(1, len(self.pool) * self.prefetch))
            for number in range(self.given, ahead):
                self.pool.submit(worker_processes.Task(number, self.plan[number]))
            self.given = max(self.given, ahead)

    def _edge(self):
        """Up to which batch these workers read."""
        per_epoch = self.plan.batches_per_epoch
        if self.persistent:
            return self.last
        if self.pool is not None and self.number == self.given and self.number % per_epoch == 0:
            self.close()
        return min(self.last, (self.number // per_epoch + 1) * per_epoch)

    def _read(self):
        """The next batch, read by this process if no worker has done it."""
        found = self.ready.pop(self.number, None)
        return found or [self.dataset[place] for place in self.plan[self.number]]

    def _wait_for(self, number):
        started, patience = time.monotonic(), STALLED
        while number not in self.ready:
            done, dead = self.pool.receive(WAIT)
            self.ready |= done
            for worker in dead:
                self._bury(worker)
            if not self.pool:
                return self._read()
            if not done:
                self.poll()
            if time.monotonic() - started > patience:
                self._tell_of_stall(number, patience)
                patience *= 2
        return self.ready.pop(number)

    def _give_again(self, tasks):
        for task in tasks:
            if self.pool:
                self.pool.submit(task)

    # ------------------------------------------------------------------------ what goes wrong

    def _settled(self, samples):
        """The samples of the next batch, with others in the place of those that are left out.

        It happens here, in the order of batches, so that it does not depend on who had read what.
        """
        settled = []
        for place, sample in zip(self.plan[self.number], samples, strict=True):
            while isinstance(sample, ReadFailure) or sample["case"] in self.dataset.excluded:
                if isinstance(sample, ReadFailure) and sample.case not in self.dataset.excluded:
                    self._leave_out(sample)
                sample = self.dataset[place]
            settled.append(sample)
        return settled

    def _leave_out(self, unread):
        count, most = len(self.dataset.excluded) + 1, len(self.dataset.cases)
        text = f"{unread.reason}; {count} of {most} training cases are left out"
        if count > self.max_excluded * most:
            raise CannotGoOn(
                f"{text}, more than the share of {self.max_excluded} that data.max_excluded allows"
            )
        try:
            self.dataset.exclude(unread.case, unread.reason)
        except ValueError as error:
            raise CannotGoOn(f"{unread.reason}; {error}") from None
        if self.pool:
            self.pool.tell("exclude", unread.case, unread.reason)
        self.report("case left out", text, case=unread.case, reason=unread.reason)

    def _bury(self, worker):
        """Report a worker's death, and have its tasks done."""
        code, reading = worker.process.exitcode, worker.reading()
        case = self._case(worker)
        self.wanted = len(self.pool)
        death = worker_processes.death(code)
        self.report(
            "worker died",
            f"{_who(worker)} {death}{self._where(worker)}; {self._circumstances(worker)}; "
            f"{self._left()} from batch {self.number}, nothing is lost",
            worker=worker.number,
            pid=worker.pid,
            exitcode=code,
            case=case,
            task=reading and reading[0],
            resident=worker.resident,
        )
        if -code in FAULTS and case is not None:
            self.faults[case] = self.faults.get(case, 0) + 1
            if self.faults[case] >= SEVERAL and case not in self.dataset.excluded:
                self._leave_out(
                    ReadFailure(case, f"case {case}: {SEVERAL} workers died reading it")
                )
        self._give_again(worker.tasks.values())

    def _left(self):
        left = len(self.pool)
        if not left:
            return "the training process reads by itself"
        return f"{left} worker goes on" if left == 1 else f"{left} workers go on"

    def _place(self, worker):
        """What a worker reads, or read when it died; None if it had nothing to do."""
        reading = worker.reading()
        if reading is None or reading[0] not in worker.tasks:
            return None
        return worker.tasks[reading[0]].places[reading[1]]

    def _case(self, worker):
        place = self._place(worker)
        return None if place is None else self.dataset.case_of(place)

    def _where(self, worker):
        place = self._place(worker)
        if place is None:
            return " before it read anything" if worker.resident is None else " between two batches"
        return f" while it read case {self._case(worker)} (epoch {place[0]}, sample {place[1]})"

    def _circumstances(self, worker):
        """Memory of it and around it, and which setting to turn."""
        held = f"it held {format_bytes(worker.resident)}, " if worker.resident else ""
        shared, killed = machine.shared_memory_free(), machine.oom_kills()
        shared = "" if shared is None else f", {format_bytes(shared)} of /dev/shm free"
        text = (
            f"{held}all processes of the run hold {format_bytes(machine.resident_memory())}; "
            f"{machine.available().reason}{shared}"
        )
        if killed is not None and killed > (self.oom_kills or 0):
            self.oom_kills = killed
            return (
                f"{text}; the kernel killed it for memory (OOM counter {killed}): lower "
                "data.cache_gb, training.prefetch_factor or training.workers"
            )
        count = "unknown" if killed is None else killed
        return f"{text}, OOM counter {count}; if memory is short, lower training.workers"

    def _tell_of_stall(self, number, seconds):
        doing = [f"{_who(w)} reads case {self._case(w)}" for w in self.workers if self._place(w)]
        self.report(
            "waiting for data",
            f"batch {number} has not come for {seconds:.0f} s: "
            + ("; ".join(doing) or "the workers are still starting"),
        )


def _who(worker):
    return f"worker {worker.number} (pid {worker.pid})"


# ---------------------------------------------------------------------------- cases left out


def excluded(dataset):
    """The cases that a dataset leaves out, for a checkpoint: {case id: [why, bytes, time]}."""
    stamps = {case.id: case.stamp for case in dataset.cases}
    return {case: [why, *stamps[case]] for case, why in dataset.excluded.items()}


def exclude_again(dataset, saved):
    """Leave out what `excluded` gave, but for files that have changed; lines for people."""
    lines = []
    for case in dataset.cases:
        if case.id in saved:
            why, *stamp = saved[case.id]
            if tuple(stamp) == tuple(case.stamp):
                dataset.exclude(case.id, why)
            else:
                lines.append(f"case {case.id}: its file has changed, it is drawn again")
    return lines + describe_excluded(dataset)


def describe_excluded(dataset):
    """A line for people for each case that a dataset leaves out."""
    return [f"left out: {why}" for why in dataset.excluded.values()]


# ---------------------------------------------------------------------------- to the device


def _pinned(sample):
    return {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in sample.items()}


def copy_stream(device):
    """What `to_device` takes: a CUDA stream of its own, or None where nothing is copied."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def to_device(samples, device, stream):
    """Samples with their tensors on the device; as they are if stream is None.

    The copy, out of pinned memory, is issued on a stream of its own as soon as the host has the
    batch, while the device still computes the step before.
    """
    if stream is None:
        return samples
    with torch.cuda.stream(stream):
        moved = [{key: _moved(value, device) for key, value in s.items()} for s in samples]
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for value in itertools.chain.from_iterable(sample.values() for sample in moved):
        if torch.is_tensor(value):  # or its memory is given away while the step still reads it
            value.record_stream(current)
    return moved


def _moved(value, device):
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value
