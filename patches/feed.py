"""The batches of a run, read ahead by the workers of torch's DataLoader, which may die.

    batches = Batches(dataset, 0, 1000, batches_per_epoch=100, batch_size=2, workers=2, prefetch=4)
    with contextlib.closing(batches):
        for samples in batches: ...

A worker that dies is reported, and the DataLoader starts again with fewer workers, from the batch
that is waited for. A killed worker cannot block others: a batch is one short message (transfer.py),
and no lock is shared with the training process. Workers are spawned, ignore the signals that stop a
run, and end with the training process. A case that cannot be read is excluded.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from multiprocessing import reduction
from multiprocessing.util import Finalize
from typing import NamedTuple

import psutil
import torch
from torch.utils.data import DataLoader, get_worker_info

from monitoring import machine
from monitoring.machine import format_bytes
from patches import transfer
from volumes.processes import (
    NO_MEMORY,
    STOP_SIGNALS,
    describe_death,
    signals_blocked,
    start_worker,
)

WAIT = 1.0  # seconds between two calls of `poll` while a batch is waited for
STALLED = 60.0  # seconds of waiting after which that is reported; then after twice that, ...
DYING = 5.0  # seconds between the end of a worker's memory and that of the worker, at most
SEVERAL = 2  # workers that died of a fault while they read one case, before it is excluded
FAULTS = {getattr(signal, f"SIG{name}", None) for name in ("BUS", "SEGV", "ABRT", "FPE", "ILL")}
HAS_WORKERS = hasattr(os, "pread")  # not on Windows
FIELDS = 3  # of a worker's status: number of the batch, position of the sample, resident bytes
IDLE = -1  # instead of the number of a batch, when none is read


class ReadFailure(NamedTuple):
    """Stands for the sample of a case that cannot be read, after it was tried again."""

    case: str
    reason: str


class TooManyExcluded(Exception):
    """More cases cannot be read than the run may exclude; the message names the last one."""


class WorkerError(RuntimeError):
    """An exception in a worker that the dataset did not expect; the message is its traceback."""


class PatchPlan(NamedTuple):
    """Which samples are in a batch, by the batch's number over all epochs.

    Together `ranks` processes sample what one does with batches `ranks` times as large.
    """

    batches_per_epoch: int
    batch_size: int
    rank: int = 0
    ranks: int = 1

    def sample_indices(self, number):
        """[(epoch, index)] of batch `number`."""
        epoch, batch = divmod(number, self.batches_per_epoch)
        start = (batch * self.ranks + self.rank) * self.batch_size
        return [(epoch, start + i) for i in range(self.batch_size)]


class Batches:
    """An iterator over the batches first..last, lists of samples, read by `workers` processes.

    dataset: a `data.PatchDataset`; prefetch: batches that each worker reads ahead; persistent: the
    workers live through all epochs; pin: samples go to pinned memory. Close it, or its workers
    stay. After an exception the same batch may be asked for again.

    report(kind, text, **figures) is called when a worker dies, a case is excluded, or a batch does
    not come; poll() every second of waiting, and it may raise. `TooManyExcluded` is raised before
    more than a share `max_excluded` of the cases is excluded. A sample is a function of its index
    and of the cases excluded by then, whichever process reads it.
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
        self.plan = PatchPlan(batches_per_epoch, batch_size, rank, ranks)
        self.dataset, self.number, self.last = dataset, first, last
        self.worker_count, self.prefetch = workers, max(1, prefetch)
        self.persistent, self.pin = persistent, pin
        self.report, self.poll, self.max_excluded = report, poll, max_excluded
        self.deaths_of_fault, self.oom_kills = Counter(), machine.oom_kills()
        self._stream, self._status = None, []
        self._start()

    def __iter__(self):
        return self

    def __next__(self):
        if self.number >= self.last:
            self.close()
            raise StopIteration
        try:
            samples = self._without_excluded(self._receive())
        except BaseException:
            self.close()
            raise
        self.number += 1
        if not self.persistent and self.number % self.plan.batches_per_epoch == 0:
            self.close()
        return transfer.pin(samples) if self.pin else samples

    @property
    def workers(self):
        """The worker processes, a list, each with its pid."""
        return self._stream._workers if self._stream else []

    def roles(self):
        """{pid: name} of the workers, for whoever shows them."""
        return {worker.pid: f"worker {i}" for i, worker in enumerate(self.workers)}

    def drop_worker(self):
        """Go on with one worker fewer, for good; without any, this process reads."""
        self.close()
        self.worker_count = max(0, self.worker_count - 1)
        self._start()

    def close(self):
        """End the workers; they start again if another batch is asked for."""
        if self._stream:
            self._end_workers()
            # A worker may have been killed with the lock of this event, which torch sets last.
            self._stream._workers_done_event = threading.Event()
            self._stream = None

    def _start(self):
        """Start the workers from the next batch on, if they are to run and do not."""
        per_epoch = self.plan.batches_per_epoch
        epoch_end = (self.number // per_epoch + 1) * per_epoch
        end = self.last if self.persistent else min(self.last, epoch_end)
        while self._stream is None and self.worker_count and self.number < end:
            spawn = multiprocessing.get_context("spawn")
            self._status = spawn.RawArray("q", [IDLE, 0, 0] * self.worker_count)
            loader = DataLoader(
                _Reader(self.dataset, self.plan, self._status, self.prefetch),
                sampler=range(self.number, end),
                batch_size=None,  # what torch takes for a sample is a batch here, already packed
                collate_fn=list,
                num_workers=self.worker_count,
                prefetch_factor=self.prefetch,
                timeout=WAIT,
                multiprocessing_context=spawn,
                worker_init_fn=start_worker,
                generator=torch.Generator(),  # or the network's random state would move
            )
            others = multiprocessing.active_children()
            try:
                with _signals_for_workers():
                    self._stream = iter(loader)
                # Also when this is garbage, or Python ends: SIGTERM would not end them.
                self._end_workers = Finalize(self, _kill, (self.workers,), exitpriority=10)
            except (RuntimeError, OSError) as error:
                _kill(set(multiprocessing.active_children()).difference(others))
                self._report_death(f"a worker died or could not be started: {error}")

    def _receive(self):
        """The samples of the next batch."""
        started, patience = time.monotonic(), STALLED
        while True:
            self._start()
            if self._stream is None:
                return [self.dataset[i] for i in self.plan.sample_indices(self.number)]
            try:
                message = next(self._stream)
                (samples,) = message if len(message) == 1 else [transfer.unpack(message)]
            except (RuntimeError, OSError) as error:
                if self._any_dead(DYING if isinstance(error, OSError) else 0):
                    self._replace_workers()
                    continue
                if "timed out" not in str(error):
                    raise
            else:
                if isinstance(samples, WorkerError):
                    raise samples
                return samples
            self.poll()
            if time.monotonic() - started > patience:
                workers = enumerate(self.workers)
                readers = [f"worker {i} (pid {w.pid}) {self._reading(i)[1]}" for i, w in workers]
                text = f"batch {self.number} has not come for {patience:.0f} s"
                self.report("waiting for data", f"{text}: {'; '.join(readers)}")
                patience *= 2

    def _without_excluded(self, samples):
        """The samples of the next batch, with others in the place of those of excluded cases."""
        # Here, in the order of batches, so that it does not depend on who had read what.
        samples = list(samples)
        for i, index in enumerate(self.plan.sample_indices(self.number)):
            while True:
                if isinstance(samples[i], ReadFailure):
                    self.exclude(*samples[i])
                elif samples[i]["case"] not in self.dataset.excluded:
                    break
                samples[i] = self.dataset[index]
        return samples

    def exclude(self, case, reason, report=True):
        """Sample a case no more, if it is not excluded already."""
        if case in self.dataset.excluded:
            return
        count, most = len(self.dataset.excluded) + 1, len(self.dataset.cases)
        text = f"{reason}; {count} of {most} training cases are left out"
        if count > self.max_excluded * most:
            share = f"the share of {self.max_excluded} that data.max_excluded allows"
            raise TooManyExcluded(f"{text}, more than {share}")
        self.dataset.exclude(case, reason)
        self.close()  # the workers that start next know it
        if report:
            self.report("case left out", text, case=case, reason=reason)

    def _any_dead(self, seconds):
        """Whether a worker is dead, or dies within some seconds: its files go before it does."""
        end = time.monotonic() + seconds
        while all(worker.is_alive() for worker in self.workers) and time.monotonic() < end:
            time.sleep(0.01)
        return not all(worker.is_alive() for worker in self.workers)

    def _replace_workers(self):
        """Report the workers that have died, and end the others; fewer start next."""
        time.sleep(0.05)  # some may be dying with them
        dead = [(i, worker) for i, worker in enumerate(self.workers) if not worker.is_alive()]
        for number, worker in dead:
            case, reading, resident = self._reading(number)
            text = f"worker {number} (pid {worker.pid}) {describe_death(worker.exitcode)} {reading}"
            figures = {"worker": number, "pid": worker.pid, "exitcode": worker.exitcode}
            self._report_death(text, **figures, case=case, resident=resident or None)
            if -worker.exitcode in FAULTS and case is not None:
                self.deaths_of_fault[case] += 1
        self.close()
        for case, deaths in self.deaths_of_fault.items():
            if deaths >= SEVERAL:
                self.exclude(case, f"case {case}: {SEVERAL} workers died reading it")

    def _reading(self, number):
        """(case or None, text for people, resident bytes or 0) of what a worker reads."""
        batch, position, resident = self._status[number * FIELDS : (number + 1) * FIELDS]
        if batch == IDLE:
            return None, "while reading no case", resident
        epoch, index = self.plan.sample_indices(batch)[position]
        case = self.dataset.case_of((epoch, index))
        return case, f"while reading case {case} (epoch {epoch}, sample {index})", resident

    def _report_death(self, text, **figures):
        """Report a worker that died, with the memory of this moment, and count it out."""
        self.worker_count -= 1
        shared, kills = machine.shared_memory_free(), machine.oom_kills()
        advice = "if memory is short, lower training.workers"
        if (kills or 0) > (self.oom_kills or 0):
            self.oom_kills = kills
            settings = "data.cache_gb, training.prefetch_factor or training.workers"
            advice = f"the kernel killed it for memory; lower {settings}"
        text = (
            f"{text}; it held {format_bytes(figures.get('resident'))}, all processes of the run "
            f"hold {format_bytes(machine.resident_memory())}; {machine.available()}, "
            f"{format_bytes(shared)} of /dev/shm free, OOM counter "
            f"{'unknown' if kills is None else kills}; {advice}; workers left: "
            f"{self.worker_count}, reading goes on from batch {self.number}, nothing is lost"
        )
        self.report("worker died", text, **figures)


def _kill(processes):
    for process in processes:
        process.kill()
        process.join()


class _Reader:
    """What a worker has: it reads a batch by its number, and packs it."""

    def __init__(self, dataset, plan, status, prefetch):
        self.dataset, self.plan, self.status, self.prefetch = dataset, plan, status, prefetch
        self.files, self.in_memory = deque(), transfer.has_memory_files()
        self.spool = tempfile.TemporaryFile()

    def __getstate__(self):
        # In a file: writing more than 64 kB to the pipe of a killed worker would never end.
        state = reduction.ForkingPickler.dumps({**self.__dict__, "spool": None})
        os.pwrite(self.spool.fileno(), state, 0)
        return reduction.DupFd(self.spool.fileno()), len(state)

    def __setstate__(self, state):
        file = state[0].detach()
        self.__dict__ = pickle.loads(os.pread(file, state[1], 0))
        os.close(file)

    def __getitem__(self, number):
        worker, samples = get_worker_info().id, []
        try:
            # At most `prefetch` batches before this one may not have been unpacked yet.
            while len(self.files) > self.prefetch:
                os.close(self.files.popleft())
            for position, index in enumerate(self.plan.sample_indices(number)):
                status = (number, position, psutil.Process().memory_info().rss)
                self.status[worker * FIELDS : (worker + 1) * FIELDS] = status
                samples.append(self.dataset[index])
            message = self._pack(samples)
            self.previous = samples  # freed after the next ones are read, so that memory is reused
        except MemoryError:
            os._exit(NO_MEMORY)
        except Exception:
            text = f"worker {worker} (pid {os.getpid()}):\n{traceback.format_exc()}"
            message = self._pack(WorkerError(text))
        self.status[worker * FIELDS] = IDLE
        return message

    def _pack(self, content):
        if not self.in_memory:
            return [content]  # torch sends it its own way
        message, file = transfer.pack(content)
        self.files.append(file)
        return message


@contextlib.contextmanager
def _signals_for_workers():
    """Processes started in it have STOP_SIGNALS blocked; torch's handler of SIGCHLD is removed."""
    # That handler would raise an error in whatever line is running when a worker dies.
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        with signals_blocked(STOP_SIGNALS):
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
