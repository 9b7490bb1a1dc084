"""Processes that read batches of samples, each at the end of a socket of its own.

    pool = Pool(dataset, 2)
    pool.submit(Task(7, [(epoch, index), ...]))
    done, dead = pool.receive(timeout=1.0)    # {7: samples}, and workers that are no more

A worker answers a task with a few bytes and the descriptor of a piece of memory that holds the
samples. The descriptor is in the socket from then on: it does not matter whether the worker still
lives when it is taken out. Nothing is shared with other workers, so that one that is killed holds
no lock, leaves no half of a message to others, and is seen to be gone at once. Torch's DataLoader
has one queue for all, a lock around it, /dev/shm below it (64 MB in a container), and a signal
handler that raises in whatever line is running: see benchmarks/workers.py.

Workers are spawned, so that no handle, lock or thread of the training process is copied into them.
Signals that ask a run to stop do not reach them; they end when the training process does.
"""

import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import traceback
from multiprocessing import connection, reduction, resource_tracker
from typing import NamedTuple

import numpy as np
import psutil
import torch

from monitoring import machine

ANSWER = struct.Struct("<qqq")  # kind, number of the task, bytes of memory
DONE, FAILED = range(2)
NUMBER, INDEX, RESIDENT = range(3)  # of a worker's status, which both sides see
ALIGNED = 64  # bytes: where an array begins
SMALL = 4096  # bytes: arrays below stay among the pickled bytes
NO_MEMORY = 12  # exit status of a worker whose allocation failed
HELD_BACK = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


class Task(NamedTuple):
    """A batch to read: its number, and what the dataset is asked for."""

    number: int
    places: list


class WorkerError(RuntimeError):
    """An exception in a worker that the dataset did not expect; the message is its traceback."""


class Pool:
    """Worker processes that read from a dataset.

    dataset[place] gives a sample: plain values, numpy arrays and torch tensors, in dicts and lists.
    It is pickled for each worker when that is started.
    """

    def __init__(self, dataset, count):
        self.workers = [Worker(dataset, number) for number in range(count)]

    def __len__(self):
        return len(self.workers)

    def submit(self, task):
        """Give a task to the worker that has fewest; it is done when `receive` says so."""
        worker = min(self.workers, key=lambda w: len(w.tasks))
        worker.tasks[task.number] = task
        worker.send(task)

    def tell(self, method, *arguments):
        """Call a method of every worker's dataset before the tasks that are submitted later."""
        for worker in self.workers:
            worker.send((method, arguments))

    def receive(self, timeout):
        """({number: samples} that have arrived, [workers that have died, their tasks not done]).

        Waits for the first of them, `timeout` seconds at most. WorkerError if reading raised.
        """
        channels = {worker.channel: worker for worker in self.workers}
        done, dead = {}, []
        for channel in connection.wait(channels, timeout):
            worker = channels[channel]
            arrived, ended = worker.receive()
            done |= arrived
            if ended:
                worker.process.join()
                self.workers.remove(worker)
                dead.append(worker)
        return done, dead

    def retire(self):
        """Take out the worker with most to do, at once; its tasks that are not done."""
        worker = max(self.workers, key=lambda w: len(w.tasks))
        self.workers.remove(worker)
        worker.kill()
        return list(worker.tasks.values())

    def close(self):
        for worker in self.workers:
            worker.kill()
        self.workers = []


class Worker:
    """One process, seen from the training process. tasks: {number: Task} that it has not done."""

    def __init__(self, dataset, number):
        self.number, self.tasks = number, {}
        spawn = multiprocessing.get_context("spawn")
        self.channel, theirs = multiprocessing.Pipe()
        self.socket = socket.socket(fileno=os.dup(self.channel.fileno()))
        page = machine.anonymous_file(mmap.PAGESIZE, "lamina-worker")
        self.status = np.frombuffer(mmap.mmap(page, mmap.PAGESIZE), np.int64, 3)
        self.process = spawn.Process(
            target=_work, args=(theirs, _Inherited(page), dataset), daemon=True
        )
        # What is held back here is held back in the child for good: a signal for the whole group
        # of processes is for the training process to answer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            # multiprocessing's tracker, if it is not there yet, lets SIGINT and SIGTERM through.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(page)
        # Where memory runs out, the kernel shall take this one and not the one that trains.
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/oom_score_adj", "w") as file:
            file.write("500")

    @property
    def pid(self):
        return self.process.pid

    @property
    def resident(self):
        """Bytes of its memory when it last began to read, None if it never did."""
        return int(self.status[RESIDENT]) or None

    def reading(self):
        """What it reads, or last read: (task number, index in the task); None before the first."""
        return tuple(map(int, self.status[:2])) if self.resident else None

    def send(self, message):
        try:
            self.channel.send(message)
        except OSError:  # it is dead; `receive` finds out
            pass

    def receive(self):
        """({number: samples} that have arrived, whether it is gone)."""
        done = {}
        while True:
            try:
                answer, fd = _receive_answer(self.socket)
            except BlockingIOError:
                return done, False
            except ConnectionResetError:  # it died with tasks that it had not taken out
                return done, True
            if not answer:
                return done, True
            kind, number, size = ANSWER.unpack(answer)
            content = unpack(fd, size)
            if kind == FAILED:
                raise WorkerError(f"worker {self.number} (pid {self.pid}):\n{content}")
            done[number] = content
            self.tasks.pop(number)

    def kill(self):
        self.process.kill()  # it holds nothing that anyone waits for
        self.process.join()
        self.channel.close()
        self.socket.close()


def death(code):
    """What an exit status says of how a worker ended, for people: "was killed by SIGKILL"."""
    if code == NO_MEMORY:
        return "could not get the memory it asked for"
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # one of the many without a name
        return f"was killed by signal {-code}"


def _receive_answer(channel):
    """(bytes, descriptor) of one answer; empty if the other end is gone.

    Not by socket.recv_fds, which in Python 3.11 drops the flags that it is given.
    """
    room = socket.CMSG_LEN(np.dtype(np.intc).itemsize)
    flags = socket.MSG_DONTWAIT | getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    answer, ancillary, _, _ = channel.recvmsg(ANSWER.size, room, flags)
    return answer, int(np.frombuffer(ancillary[0][2], np.intc)[0]) if ancillary else None


class _Inherited:
    """A file descriptor that travels to a spawned process."""

    def __init__(self, fd):
        self.fd = fd

    def __getstate__(self):
        return reduction.DupFd(self.fd)

    def __setstate__(self, duplicate):
        self.fd = duplicate.detach()


# ---------------------------------------------------------------------------- in the worker


def _work(channel, page, dataset):
    """Answer tasks until the training process is gone."""
    torch.set_num_threads(1)
    status = np.frombuffer(mmap.mmap(page.fd, mmap.PAGESIZE), np.int64, 3)
    answers = socket.socket(fileno=os.dup(channel.fileno()))
    try:
        while True:
            message = channel.recv()
            if not isinstance(message, Task):
                method, arguments = message
                getattr(dataset, method)(*arguments)
                continue
            kind, content = _read(dataset, message, status)
            fd, size = pack(content)
            socket.send_fds(answers, [ANSWER.pack(kind, message.number, size)], [fd])
            os.close(fd)
    except (EOFError, OSError):  # the training process has ended, or has done with this one
        pass


def _read(dataset, task, status):
    process, samples = psutil.Process(), []
    try:
        for index, place in enumerate(task.places):
            status[NUMBER], status[INDEX] = task.number, index
            status[RESIDENT] = process.memory_info().rss
            samples.append(dataset[place])
    except MemoryError:
        os._exit(NO_MEMORY)
    except Exception:
        return FAILED, traceback.format_exc()
    return DONE, samples


# ---------------------------------------------------------------------------- what travels


class _Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def pack(content):
    """(descriptor, bytes) of memory that holds plain values, arrays and tensors of the CPU."""
    arrays, body = [], bytearray()

    class Body:
        write = staticmethod(body.extend)

    def stays(buffer):
        if buffer.raw().nbytes < SMALL:
            return True
        arrays.append(buffer.raw())
        return False

    _Pickler(Body, protocol=5, buffer_callback=stays).dump(content)
    lengths = np.array([len(arrays), len(body), *(a.nbytes for a in arrays)], np.int64)
    size, places = _layout(lengths)
    fd = machine.anonymous_file(size, "lamina-batch")
    for place, piece in zip(places, [lengths.data, body, *arrays], strict=True):
        _write(fd, memoryview(piece).cast("B"), place)
    return fd, size


def unpack(fd, size):
    """What was packed; closes the descriptor. Arrays and tensors lie in that memory."""
    try:
        # Mapped at once: a fault for every page would take longer than the copy.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        memory_map = mmap.mmap(fd, size, flags)
    finally:
        os.close(fd)
    count = int(np.frombuffer(memory_map, np.int64, 1)[0])
    lengths = np.frombuffer(memory_map, np.int64, 2 + count)
    _, (_, body, *starts) = _layout(lengths)
    view = memoryview(memory_map)
    arrays = [view[a : a + int(n)] for a, n in zip(starts, lengths[2:], strict=True)]
    return pickle.loads(view[body : body + int(lengths[1])], buffers=arrays)


def _layout(lengths):
    """(bytes in all, [start of the lengths, of the pickled bytes, of each array])."""
    sizes = [8 * len(lengths), *map(int, lengths[1:])]
    starts = [0]
    for size in sizes[:-1]:
        starts.append(-(-(starts[-1] + size) // ALIGNED) * ALIGNED)
    return starts[-1] + sizes[-1], starts


def _write(fd, piece, place):
    while piece:
        written = os.pwrite(fd, piece, place)
        piece, place = piece[written:], place + written
