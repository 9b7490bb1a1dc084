"""Several processes that train one network: torchrun --nproc-per-node=N train.py CONFIG.

    with joined(minutes=30) as group:                # without torchrun: rank 0 of 1, at no cost
        settings = group.from_first(make)            # what rank 0 makes, or the error it raises
        news = group.meet(news)                      # plain values of all, where any has some
        results = group.average(network, results)    # gradients and numbers, once per step

Gradients are averaged here, after the last backward pass of a step, and not by torch's DDP while it
runs. So a step that goes through the network in parts, or again because one rank ran out of memory,
needs nothing of the others, who wait at one place.

Ranks hold the same weights, averaged weights and optimizer bit for bit, for all get the same
gradient. They differ in the patches they sample (feed.PatchPlan) and in dropout (`seed_step`).

A rank that leaves says why in the store of torchrun, which all can read, and hangs up. The others
find their connection closed, and read there why: `Left`. One that is killed, or does not answer for
so many minutes, is named by those that waited for it: also `Left`.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import signal
import socket
import time

import psutil
import torch
import torch.distributed as dist

from runtime import checkpoint

NOTICE = 3.0  # seconds in which all ranks have noticed that one is gone
LOOK = 1.0  # seconds between two looks for one that has left
FAILED = 1


class Left(Exception):
    """Another rank has left; the message says which and why, status is what it exits with.

    to_say: whether this rank must tell people, for rank 0 cannot.
    """

    def __init__(self, text, status=FAILED, to_say=False):
        super().__init__(text)
        self.status, self.to_say = status, to_say


class Group:
    """The ranks that train together; this is a group of one.

    rank of size processes; local_rank of local_size on this machine. people: [host, pid] of each.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def __init__(self):
        self.people = [[socket.gethostname(), os.getpid()]]

    @property
    def first(self):
        """Whether this is the rank that writes."""
        return self.rank == 0

    def mine(self, items):
        """This rank's share of a list that is the same on all ranks."""
        return items[self.rank :: self.size]

    def roles(self):
        """{pid: name} of the ranks of this machine and the processes that these have started."""
        return {os.getpid(): "training"}

    def seed_step(self, seed, step):
        """Start the random generators of a step: of several ranks each has numbers of its own.

        They follow from seed, step and rank, so that a resumed run need not know those of others.
        One process goes on with its own, which are in its checkpoint.
        """

    def gather(self, value):
        """[value of rank 0, of rank 1, ...] on all ranks; plain values."""
        return [value]

    def from_first(self, make):
        """What make() gives on rank 0, plain values. An exception there is raised on all ranks."""
        return make()

    def meet(self, news):
        """The news of all ranks, [] if no rank has any: a list with an entry for each rank."""
        return [news] if news else []

    def over_ranks(self, step, number):
        """A function that gives the mean over ranks of a tensor; None for a group of one.

        number: of the batch in the step. Called again for the same batch, it gives the same and no
        other rank is needed, for a step that ran out of memory begins again on one rank alone.
        """

    def average(self, network, results):
        """Replace the gradients of a network, and what its layers count, by their mean over ranks.

        results: [(components, shares)], each {name: number or scalar tensor}, of each batch of the
        step; returned as means over ranks. One collective.
        """
        return results

    def move(self, array, rank):
        """Bring the content of a numpy array of this rank to rank 0, into its own array."""

    def word(self, now=False):
        """For those that work alone for a long time: show that this rank does, once a second, and
        raise `Left` if another one has left or is seen to have ended. now: look in any case."""

    def wait_for_all(self, poll):
        """Wait until all ranks come here, however long they work, if they call `word` meanwhile.

        poll() is called while it waits, and may raise.
        """

    def leave(self, text, status):
        """Say why this rank leaves, and hang up; what it says first counts."""

    def finish(self):
        """Rank 0: all is written and said, others may end. Others: wait for that, for torchrun ends
        all processes as soon as one has failed."""


class Ranks(Group):
    """Several processes; see `Group`. minutes: how long one may not answer."""

    def __init__(self, minutes):
        super().__init__()
        self.rank, self.local_rank, self.local_size = int(os.environ["RANK"]), *local_rank()
        self.minutes, self.timeout = minutes, datetime.timedelta(minutes=minutes)
        store, _, self.size = next(dist.rendezvous("env://", timeout=self.timeout))
        self.store = self._own_part(store)
        dist.init_process_group(
            "gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=self.timeout
        )
        # Not the default group: functions of torch have that as the default of an argument, which
        # would keep its connections open.
        self.groups = {"cpu": dist.new_group(timeout=self.timeout)}
        self.known, self.looked, self.looks, self.waits = {}, time.monotonic(), 0, 0
        self.has_left = False
        self.here = {}  # the processes of ranks that can be seen, those on this machine
        self.people *= self.size  # until all have said who they are
        self.people = self.gather(self.people[self.rank])
        for rank, (host, pid) in enumerate(self.people):
            if host == socket.gethostname() and psutil.pid_exists(pid):  # not in another container
                self.here[rank] = psutil.Process(pid)

    def _own_part(self, store):
        """The part of torchrun's store that these ranks alone use.

        It may hold words of ranks that torchrun has started before, and how often it did is not the
        same on all machines. Rank 0 names a part, where the others say who they are, and use it if
        that was heard.
        """
        own = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        if self.first:
            store.set("part", own)
            others = [store.get(f"{own}/is {rank}").decode() for rank in range(1, self.size)]
            store.set(f"{own}/heard", json.dumps(others))
            return dist.PrefixStore(own, store)
        end = time.monotonic() + 60 * self.minutes
        while time.monotonic() < end:
            part = store.get("part").decode()
            store.set(f"{part}/is {self.rank}", own)
            heard = store.check([f"{part}/heard"]) and store.get(f"{part}/heard")
            if heard and own in json.loads(heard):
                return dist.PrefixStore(part, store)
            time.sleep(0.05)
        raise TimeoutError(f"rank 0 has not answered for {self.minutes:g} min")

    def roles(self):
        names = super().roles()
        for rank, process in self.here.items():
            if rank != self.rank:
                with contextlib.suppress(psutil.NoSuchProcess):
                    workers = process.children(recursive=True)
                    names |= {process.pid: f"rank {rank}"}
                    names |= {w.pid: f"rank {rank}, process {i}" for i, w in enumerate(workers)}
        return names

    def seed_step(self, seed, step):
        digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        checkpoint.seed_generators(int.from_bytes(digest[:7]))

    def gather(self, value):
        found = [None] * self.size
        self._together(dist.all_gather_object, found, value)
        return found

    def from_first(self, make):
        found = [None, None]
        if self.first:
            try:
                found = [make(), None]
            except Exception as error:
                found = [None, error]
        self._together(dist.broadcast_object_list, found, src=0)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def meet(self, news):
        any_news = torch.tensor(float(bool(news)))
        self._together(dist.all_reduce, any_news)
        return self.gather(news) if any_news else []

    def over_ranks(self, step, number):
        return functools.partial(self._mean, (step, number))

    def _mean(self, key, tensor):
        if key not in self.known:
            self.known = {k: value for k, value in self.known.items() if k[0] == key[0]}
            total = tensor.clone()
            self._together(dist.all_reduce, total, device=total.device.type)
            self.known[key] = total / self.size
        return self.known[key]

    def average(self, network, results):
        weights = [p for p in network.parameters() if p.requires_grad]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        means = [b for b in network.buffers() if b.is_floating_point()]  # of a batch norm
        tensors = [*(weight.grad for weight in weights), *means]
        numbers = [value for pair in results for part in pair for value in part.values()]
        like = torch.zeros((), device=weights[0].device)  # a copy from the host would wait for it
        numbers = [n.float() if torch.is_tensor(n) else torch.full_like(like, n) for n in numbers]
        flat = torch.cat([*(t.float().flatten() for t in tensors), torch.stack(numbers)])
        self._together(dist.all_reduce, flat, device=flat.device.type)
        *parts, numbers = (flat / self.size).split([*(t.numel() for t in tensors), len(numbers)])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        rest = iter(numbers.unbind())
        return [tuple(dict(zip(p, rest, strict=False)) for p in pair) for pair in results]

    def move(self, array, rank):
        if self.first:
            self._together(dist.recv, torch.from_numpy(array), rank)
        else:
            self._together(dist.send, torch.from_numpy(array), 0)

    def word(self, now=False):
        if not now and time.monotonic() - self.looked < LOOK:
            return
        self.looked, self.looks = time.monotonic(), self.looks + 1
        gone = [rank for rank in range(self.size) if self._is_gone(rank)]
        with contextlib.suppress(dist.DistError):
            self.store.set(f"looks/{self.rank}", str(self.looks))
            for rank in range(self.size):
                if rank != self.rank and self.store.check([f"left/{rank}"]):
                    raise Left(*json.loads(self.store.get(f"left/{rank}")))
        if gone:  # without a word
            raise self._left(gone, 0)

    def wait_for_all(self, poll):
        self.waits += 1
        key, seen = f"here {self.waits}", {}  # of a rank: its looks, and when that was new
        try:
            self.store.set(f"{key}/{self.rank}", "")
            while away := [r for r in range(self.size) if not self.store.check([f"{key}/{r}"])]:
                poll()
                for rank in away:
                    known = self.store.check([f"looks/{rank}"])
                    looks = self.store.get(f"looks/{rank}") if known else None
                    if rank not in seen or seen[rank][0] != looks:
                        seen[rank] = looks, time.monotonic()
                    waited = time.monotonic() - seen[rank][1]
                    if waited > 60 * self.minutes:
                        raise self._left([rank], waited)
                time.sleep(0.05)
        except dist.DistError as error:
            raise Left(
                f"torchrun, through which ranks find one another, has ended ({error})"
            ) from error

    def leave(self, text, status):
        with contextlib.suppress(dist.DistError):  # the store may be gone
            if not self.has_left:
                self.store.set(f"left/{self.rank}", json.dumps([text, status]))
        self.has_left = True
        self._hang_up()

    def finish(self):
        with contextlib.suppress(dist.DistError):
            if self.first:
                self.store.set("finished", "")
            end = time.monotonic() + 60 * self.minutes
            while not self.store.check(["finished"]) and time.monotonic() < end:
                if self._is_gone(0):
                    return
                time.sleep(0.02)  # less than rank 0 takes to end, and with it a store of its own

    # ------------------------------------------------------------------------ who is missing

    def _hang_up(self):
        for device, group in self.groups.items():
            if device == "cpu":
                dist.destroy_process_group(group)
            elif hasattr(group, "abort"):  # from torch 2.7 on
                group.abort()  # what waits in the device's queue would keep the state from the disk
        self.groups = {}

    def _together(self, function, *arguments, device="cpu", **named):
        if device not in self.groups:
            self.groups[device] = dist.new_group(backend="nccl", timeout=self.timeout)
        started = time.monotonic()
        try:
            function(*arguments, group=self.groups[device], **named)
        except RuntimeError as error:  # a connection was closed, or nothing came for so long
            self.word(now=True)
            waited = time.monotonic() - started
            missing = self._missing()
            raise (self._left(missing, waited) if missing else Left(str(error))) from error

    def _missing(self):
        """The ranks that do not wait for the others any more."""
        self._hang_up()  # so that all that wait come here
        end = time.monotonic() + NOTICE
        missing = [0]  # where torchrun keeps no store, that of rank 0 ends with it
        with contextlib.suppress(dist.DistError):
            self.store.set(f"waits/{self.rank}", "")
            while missing and time.monotonic() < end:
                missing = [r for r in range(self.size) if not self.store.check([f"waits/{r}"])]
                time.sleep(0.05)
        self.word(now=True)
        return missing

    def _left(self, missing, waited):
        """`Left` of these ranks; of those that have ended, if one is seen to have."""
        missing = [rank for rank in missing if self._is_gone(rank)] or missing
        others = set(range(self.size)).difference(missing)
        text = ", ".join(self._describe(rank, waited) for rank in missing)
        return Left(text, to_say=0 in missing and self.rank == min(others, default=None))

    def _describe(self, rank, waited):
        host, pid = self.people[rank]
        what = "cannot be reached any more"
        if self._is_gone(rank):
            what = "has ended"
        elif waited > 0.9 * 60 * self.minutes:
            what = f"has not answered for {waited:.0f} s"
        return f"rank {rank} (process {pid} on {host}) {what}"

    def _is_gone(self, rank):
        """Whether a rank's process is seen to have ended; on another machine it is not."""
        try:
            return rank in self.here and self.here[rank].status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def local_rank():
    """(number, count) of this rank on its machine; (0, 1) where torchrun does not say."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device_of_rank(device, number, count):
    """The device of rank `number` of `count` on this machine: of several each has a GPU of its own.

    ValueError if there are more ranks than GPUs, or the settings name one GPU for all.
    """
    if count == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"run.device: expected auto, cuda or cpu with several ranks, got {device}")
    if count > torch.cuda.device_count():
        raise ValueError(
            f"torchrun: expected a GPU for each of {count} ranks on this machine, got "
            f"{torch.cuda.device_count()}; lower --nproc-per-node"
        )
    torch.cuda.set_device(number)  # so that its generator is the one that is saved
    return torch.device("cuda", number)


@contextlib.contextmanager
def joined(minutes):
    """The group of ranks that torchrun started this process in, as a context; else a group of one.

    minutes: how long a rank may not answer before the others end.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield Group()
        return
    # While it waits for the others, torchrun must be able to end it: one of them may have died.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    group = Ranks(minutes)
    signal.signal(signal.SIGTERM, handler)
    text = ""  # in good order the others have left too
    try:
        yield group
    except BaseException as error:
        text = f"rank {group.rank}: {type(error).__name__}: {error}".rstrip(": ")
        raise
    finally:
        group.leave(text, FAILED)
        group.finish()
        dist.destroy_process_group()
