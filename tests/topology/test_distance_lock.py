"""The scipy backend: one call at a time over all processes, and what it says when one dies."""

import contextlib
import errno
import fcntl
import itertools
import os
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

from tests.processes import FORKED
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


# Calls `inside()` before scipy's transform.
CHILD = """
import os
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
edt(torch.eye(4)[None], backend="scipy")
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
def child(inside):
    """A process that calls the scipy backend."""
    command = [sys.executable, "-c", CHILD.format(inside=inside)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def inside(started):
    """The pid that a child says once it is inside."""
    word, pid = started.stdout.readline().split()
    assert word == "inside"
    return int(pid)


def call(folder, together, spans):
    """Transform three volumes; (start, end) of each goes into a queue."""
    exact, tempfile.tempdir = ndimage.distance_transform_edt, folder

    def timed(*args, **kwargs):
        start = time.monotonic()
        time.sleep(0.05)
        result = exact(*args, **kwargs)
        spans.put((start, time.monotonic()))
        return result

    ndimage.distance_transform_edt = timed
    together.wait()
    edt(torch.eye(4).repeat(3, 1, 1, 1), backend="scipy")


def test_four_processes_are_never_inside_together(lock_folder):
    together, spans = FORKED.Barrier(4, timeout=60), FORKED.SimpleQueue()
    about = str(lock_folder), together, spans
    callers = [FORKED.Process(target=call, args=about, daemon=True) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert caller.exitcode == 0
    taken = sorted(spans.get() for _ in range(12))
    assert spans.empty()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))


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
    with child(STAY) as holder:
        pid = inside(holder)
        with pytest.raises(TimeoutError, match=f"within 0.05 s, but process {pid} holds the lock"):
            edt(mask, backend="scipy", timeout=0.05)
        holder.kill()
        with pytest.warns(RuntimeWarning, match=f"process {pid} died inside the transform"):
            result = edt(mask, backend="scipy", timeout=10)
    assert torch.equal(result, edt(mask))
    with warnings.catch_warnings():  # one death, one warning
        warnings.simplefilter("error")
        edt(mask, backend="scipy")


def test_a_child_forked_inside_does_not_keep_the_lock_of_a_holder_that_died():
    with child(FORK.format(parent_stays=True)) as holder:
        grandchild = inside(holder)
        try:
            holder.kill()  # not waited for: its pid stays, as a zombie's
            with pytest.warns(RuntimeWarning, match=f"process {holder.pid} died"):
                edt(single((2, 3, 4), (0, 0, 0)), backend="scipy", timeout=10)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_a_child_forked_inside_does_not_keep_the_lock_of_a_holder_that_has_left():
    with child(FORK.format(parent_stays=False)) as holder:
        grandchild = inside(holder)
        try:
            holder.wait(30)
            result = edt(torch.eye(4)[None], backend="scipy", timeout=0.05)
            assert torch.equal(result, edt(torch.eye(4)[None]))
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_the_lock_file_names_only_the_process_inside(lock_folder, monkeypatch):
    path, content = lock_folder / f"lamina-edt-{os.getuid()}.lock", []

    def look_and_fail(*args, **kwargs):
        content.append(path.read_text())
        raise MemoryError

    monkeypatch.setattr(ndimage, "distance_transform_edt", look_and_fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            edt(torch.eye(4)[None], backend="scipy", timeout=0.05)
    assert content == 2 * [str(os.getpid())]
    assert path.read_text() == ""


# ---------------------------------------------------------------------------- without a lock


def assert_it_goes_on_without_a_lock(named):
    mask = torch.eye(4).repeat(3, 1, 1, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert torch.equal(edt(mask, backend="scipy"), edt(mask))
    (warning,) = caught  # said once for three volumes
    assert "edt backend 'scipy': no lock (" in str(warning.message)
    assert named in str(warning.message) and "backend='native'" in str(warning.message)


def test_a_lock_file_that_cannot_be_opened_is_named_and_done_without(lock_folder):
    path = lock_folder / f"lamina-edt-{os.getuid()}.lock"
    path.mkdir()
    assert_it_goes_on_without_a_lock(str(path))


def test_a_folder_that_cannot_be_written_to_is_done_without(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/sys/kernel")  # not even root can write there
    assert_it_goes_on_without_a_lock("/sys/kernel")


def test_a_folder_without_locks_is_done_without(monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert_it_goes_on_without_a_lock("No locks available")


def test_an_error_inside_is_not_taken_for_a_missing_lock(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("of the transform")

    monkeypatch.setattr(ndimage, "distance_transform_edt", fail)
    with pytest.raises(OSError, match="of the transform"):
        edt(torch.eye(4)[None], backend="scipy")
