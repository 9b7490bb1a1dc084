"""The scipy backend: one call at a time over all processes, and what it says when one dies."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scipy import ndimage

from topology.distance import edt

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def lock_folder(tmp_path, monkeypatch):
    """A lock of its own for each test, and for the processes that the test starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def single(shape, *voxels):
    mask = torch.zeros(shape, dtype=torch.bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


# Replaces scipy's transform in a child by `inside()`, says "ready", and starts on a line of input.
CHILD = """
import os
import sys
import time
import torch
from scipy import ndimage
from topology.distance import edt
exact = ndimage.distance_transform_edt
def patched(*args, **kwargs):
    inside()
    return exact(*args, **kwargs)
ndimage.distance_transform_edt = patched
def say(*words):
    print(*words, flush=True)
{inside}
say("ready")
sys.stdin.readline()
edt(torch.eye(4)[None].repeat({volumes}, 1, 1, 1), backend="scipy")
"""
LOG_TIMES = """
def inside():
    start = time.monotonic()
    time.sleep(0.05)
    say("inside", start, time.monotonic())
"""
STAY = """
def inside():
    say("inside", os.getpid())
    time.sleep(60)
"""
FORK = """
def inside():
    child = os.fork()
    if child:
        say("inside", child)
    if not child or {parent_stays}:
        time.sleep(60)
"""


@contextlib.contextmanager
def children(count, inside, volumes=1):
    """Processes that have been told to call the scipy backend, all at the same time."""
    command = [sys.executable, "-c", CHILD.format(inside=inside, volumes=volumes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    try:
        for child in started:
            assert child.stdout.readline() == "ready\n"
        for child in started:
            child.stdin.write("go\n")
            child.stdin.flush()
        yield started
    finally:
        for child in started:
            child.kill()
            child.communicate()


def inside(child):
    """The pid that a child says once it is inside."""
    word, pid = child.stdout.readline().split()
    assert word == "inside"
    return int(pid)


def test_four_processes_are_never_inside_together():
    with children(4, LOG_TIMES, volumes=3) as started:
        said = "".join(child.communicate(timeout=30)[0] for child in started).splitlines()
    spans = sorted(tuple(map(float, line.split()[1:])) for line in said)
    assert len(spans) == 12
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_threads_take_turns_too(monkeypatch):
    exact, together, most = ndimage.distance_transform_edt, [], []

    def slow(*args, **kwargs):
        together.append(1)
        most.append(len(together))
        time.sleep(0.02)
        together.pop()
        return exact(*args, **kwargs)

    monkeypatch.setattr(ndimage, "distance_transform_edt", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda mask: edt(mask, backend="scipy"), torch.eye(4).repeat(4, 1, 1, 1)))
    assert most == [1, 1, 1, 1]


def test_a_living_holder_is_named_after_the_timeout_and_its_lock_is_taken_over_once_it_is_killed():
    mask = single((2, 3, 4), (0, 0, 0))
    with children(1, STAY) as (holder,):
        pid = inside(holder)
        told = rf"within 0.05 s, but process {pid} \(alive\) holds"
        with pytest.raises(TimeoutError, match=told):
            edt(mask, backend="scipy", timeout=0.05)
        holder.kill()
        with pytest.warns(RuntimeWarning, match=f"process {pid} died inside the transform"):
            result = edt(mask, backend="scipy", timeout=10)
    assert torch.equal(result, edt(mask))
    with warnings.catch_warnings():  # one death, one warning
        warnings.simplefilter("error")
        edt(mask, backend="scipy")


def test_a_lock_kept_by_the_child_of_a_dead_holder_is_told_so():
    mask = single((2, 3, 4), (0, 0, 0))
    with children(1, FORK.format(parent_stays=True)) as (holder,):
        grandchild = inside(holder)
        try:
            holder.kill()  # not waited for: its pid stays, as a zombie's
            time.sleep(0.1)
            told = rf"a child forked by process {holder.pid} \(dead\) still holds.*end that child"
            with pytest.raises(TimeoutError, match=told):
                edt(mask, backend="scipy", timeout=0.05)
        finally:
            os.kill(grandchild, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=f"process {holder.pid} died"):
            edt(mask, backend="scipy", timeout=10)


def test_a_child_forked_inside_does_not_keep_the_lock_of_a_holder_that_has_left():
    with children(1, FORK.format(parent_stays=False)) as (holder,):
        grandchild = inside(holder)
        try:
            holder.wait(30)
            result = edt(torch.eye(4)[None], backend="scipy", timeout=0.05)
            assert torch.equal(result, edt(torch.eye(4)[None]))
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_the_lock_file_is_everybody_s_and_names_only_who_is_inside(lock_folder, monkeypatch):
    path, content = lock_folder / "lamina-edt.lock", []

    def look_and_fail(*args, **kwargs):
        content.append(path.read_text())
        raise MemoryError

    before = os.umask(0o077)
    try:
        monkeypatch.setattr(ndimage, "distance_transform_edt", look_and_fail)
        for _ in range(2):
            with pytest.raises(MemoryError):
                edt(torch.eye(4)[None], backend="scipy", timeout=0.05)
    finally:
        os.umask(before)
    assert content == 2 * [str(os.getpid())]
    assert path.read_text() == ""
    assert path.stat().st_mode & 0o777 == 0o666


def test_a_lock_file_that_cannot_be_opened_is_named(lock_folder):
    path = lock_folder / "lamina-edt.lock"
    path.mkdir()
    with pytest.raises(OSError, match=f"lock file {re.escape(str(path))}, got .*backend='native'"):
        edt(torch.eye(4)[None], backend="scipy")


def test_a_system_without_file_locks_is_sent_to_the_native_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(RuntimeError, match="backend='native'"):
        edt(torch.eye(4)[None], backend="scipy")
