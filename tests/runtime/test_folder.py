"""Run folders: which one a run gets, who holds it, what it goes on from, what it leaves."""

import faulthandler
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from runtime import checkpoint
from runtime import folder as runs
from runtime.folder import claim, link_newest, new_run_folder, newest_run_folder, open_run
from tests.runtime.test_checkpoint import state_of
from volumes import atomic

HOLD = """
import fcntl
import sys
import time
with open(sys.argv[1], "a+") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write("process 7 on moon"); lock.flush()
    print("held", flush=True)
    time.sleep(60)
"""


def with_state(folder, *steps, name="last.pt"):
    """A run folder that has saved these steps."""
    for step in steps:
        checkpoint.save(state_of(step), folder / "checkpoints" / name)
    return folder


@pytest.fixture
def held(tmp_path):
    """hold(folder): another process holds that run."""
    processes = []

    def hold(folder):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", HOLD, str(folder / "lock")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------- names


def test_a_new_run_gets_the_number_after_the_highest_that_has_state(tmp_path):
    assert new_run_folder(tmp_path, "r") == tmp_path / "r"
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)  # nothing saved: nothing to lose
    assert new_run_folder(tmp_path, "r") == tmp_path / "r"
    with_state(tmp_path / "r", 1)
    assert new_run_folder(tmp_path, "r") == tmp_path / "r-2"
    with_state(tmp_path / "r-11", 1)
    with_state(tmp_path / "r-9", 1)
    assert new_run_folder(tmp_path, "r") == tmp_path / "r-12"
    assert newest_run_folder(tmp_path, "r") == tmp_path / "r-11"


def test_runs_of_other_names_are_none_of_this_one(tmp_path):
    for name in ("run", "r-old", "r-2b", "other"):
        with_state(tmp_path / name, 1)
    assert newest_run_folder(tmp_path, "r") is None
    assert new_run_folder(tmp_path, "r") == tmp_path / "r"


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "lr=[1e-3]"])
def test_a_name_with_signs_of_patterns_is_a_name(tmp_path, name):
    with_state(tmp_path / "a1", 1)
    with_state(tmp_path / name, 3)
    assert newest_run_folder(tmp_path, name) == tmp_path / name
    assert new_run_folder(tmp_path, name) == tmp_path / f"{name}-2"


# ---------------------------------------------------------------------------- what is gone on from


def test_without_resume_a_run_goes_on_from_nothing(tmp_path):
    with_state(tmp_path / "r", 1)
    assert open_run(tmp_path, "r", resume=False) == (tmp_path / "r-2", None, None, [])


def test_resume_takes_the_newest_state_and_says_which(tmp_path):
    with_state(tmp_path / "r", 9)
    folder = with_state(tmp_path / "r-2", 3, 4)
    found_folder, path, state, (note,) = open_run(tmp_path, "r", resume=True)
    assert (found_folder, path) == (folder, folder / "checkpoints" / "last.pt")
    assert state["loop"]["step"] == 4 and "at step 4, the newest state" in note


def test_resume_without_state_is_a_new_run_that_says_so(tmp_path):
    folder, path, state, (note,) = open_run(tmp_path, "r", resume=True)
    assert (folder, path, state) == (tmp_path / "r", None, None) and "new run" in note
    assert os.listdir(tmp_path) == []  # nothing is made before all is checked


def test_resume_from_an_older_generation_says_why(tmp_path):
    folder = with_state(tmp_path / "r", 3, 4)
    (folder / "checkpoints" / "last.pt").write_bytes(b"half")
    _, path, state, notes = open_run(tmp_path, "r", resume=True)
    assert path.name == "last.previous.pt" and state["loop"]["step"] == 3
    assert "that can be read" in notes[0] and "last.pt: expected" in notes[1]


# ---------------------------------------------------------------------------- who holds it


def test_a_run_that_another_process_holds_cannot_be_resumed(tmp_path, held):
    folder = with_state(tmp_path / "r", 1)
    other = held(folder)
    last = folder / "checkpoints" / "last.pt"
    with pytest.raises(ValueError, match=r"no process works on.*process 7 on moon.*stop it"):
        claim(folder, last).__enter__()
    other.kill()
    other.wait()  # the lock of a process that is killed ends with it
    with claim(folder, last) as found:
        assert found == folder and f"process {os.getpid()}" in (folder / "lock").read_text()
    with claim(folder, last):
        pass


def test_a_new_run_beside_one_that_has_not_saved_yet_takes_the_next_number(tmp_path, held):
    held(tmp_path / "r")
    with_state(tmp_path / "r-2", 1)
    with claim(tmp_path / "r", None) as folder:
        assert folder == tmp_path / "r-3"


def test_a_new_run_never_takes_a_folder_in_which_state_was_saved_meanwhile(tmp_path):
    folder, *_ = open_run(tmp_path, "r", resume=False)
    with_state(folder, 5)  # by a run that began and ended since
    with claim(folder, None) as found:
        assert found == tmp_path / "r-2"
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["loop"]["step"] == 5


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    folder = with_state(tmp_path / "r", 1)
    (folder / "checkpoints" / ".partial_7_last.pt").write_bytes(b"half")
    (folder / ".partial_7_log.jsonl").write_bytes(b"half")
    with claim(folder, folder / "checkpoints" / "last.pt"):
        assert os.listdir(folder / "checkpoints") == ["last.pt"]
        assert sorted(os.listdir(folder)) == ["checkpoints", "lock"]


def test_what_a_killed_process_had_begun_to_write_is_no_state(tmp_path):
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    (tmp_path / "r" / "checkpoints" / ".partial_7_last.pt").write_bytes(b"half")
    assert runs.newest_run_folder(tmp_path, "r") is None


def test_a_state_that_could_not_be_read_is_put_aside_and_takes_no_generation(tmp_path):
    folder = with_state(tmp_path / "r", 1, 2) / "checkpoints"
    (folder / "last.pt").write_bytes(b"half")
    with claim(tmp_path / "r", folder / "last.previous.pt"):
        with_state(tmp_path / "r", 3)
    assert checkpoint.load(folder / "last.previous.pt")["loop"]["step"] == 1
    assert (folder / "last.pt.broken").read_bytes() == b"half"


# ---------------------------------------------------------------------------- what it leaves


def test_a_run_keeps_its_settings_and_the_code_that_runs(tmp_path):
    runs.record(tmp_path, "run: {name: r}\n")
    assert (tmp_path / "config.yaml").read_text() == "run: {name: r}\n"
    source = tmp_path / "source"
    for name in ("train.py", "losses.py", "scoring/metrics.py", "volumes/__init__.py"):
        assert (source / name).read_bytes() == (runs.ROOT / name).read_bytes()
    assert not (source / "tests").exists()
    (source / "old.py").touch()
    runs.record(tmp_path, "run: {name: r}\n")
    assert not (source / "old.py").exists()  # of other code


def test_a_run_that_is_resumed_by_its_own_source_keeps_it(tmp_path, monkeypatch):
    runs.record(tmp_path, "")
    monkeypatch.setattr(runs, "ROOT", (tmp_path / "source").resolve())
    runs.record(tmp_path, "again\n")
    assert (tmp_path / "source" / "train.py").exists()
    assert (tmp_path / "config.yaml").read_text() == "again\n"


def test_where_there_are_no_links_the_last_state_is_a_copy(tmp_path, monkeypatch):
    def no_link(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", no_link)
    path = with_state(tmp_path / "r", 6) / "checkpoints" / "last.pt"
    link_newest(tmp_path, path.parent)
    link_newest(tmp_path, path.parent)
    assert not (tmp_path / "last.pt").is_symlink()
    assert checkpoint.load(tmp_path / "last.pt")["loop"]["step"] == 6
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "r"]


def test_the_links_to_the_best_and_the_last_state_are_of_one_run(tmp_path):
    old, new = (with_state(tmp_path / name, 6) / "checkpoints" for name in ("old", "new"))
    (old / "best.pt").write_bytes(b"")
    link_newest(tmp_path, old)
    assert os.readlink(tmp_path / "best.pt") == "old/checkpoints/best.pt"
    link_newest(tmp_path, new)  # which has not been validated
    assert os.readlink(tmp_path / "last.pt") == "new/checkpoints/last.pt"
    assert not os.path.lexists(tmp_path / "best.pt")


CRASH = """
import ctypes
import sys
from runtime import folder as runs
with runs.fault_file(sys.argv[1]):
    ctypes.string_at(0)
"""


def test_a_process_that_ends_in_mid_code_leaves_its_lines(tmp_path):
    (tmp_path / "fault.txt").write_text("of a run before")
    here = runs.ROOT
    done = subprocess.run([sys.executable, "-c", CRASH, tmp_path], cwd=here, capture_output=True)
    assert done.returncode < 0
    text = (tmp_path / "fault.txt").read_text()
    assert "Segmentation fault" in text and "string_at" in text and "run before" not in text


def test_a_run_that_ends_by_itself_leaves_no_fault(tmp_path):
    before = faulthandler.is_enabled()
    faulthandler.disable()
    try:
        with runs.fault_file(tmp_path):
            assert (tmp_path / "fault.txt").exists() and faulthandler.is_enabled()
        assert os.listdir(tmp_path) == [] and not faulthandler.is_enabled()
    finally:
        if before:
            faulthandler.enable()


# ---------------------------------------------------------------------------- other systems


def test_without_fcntl_the_lock_of_windows_holds_a_run(tmp_path, monkeypatch):
    places = []

    def locking(handle, mode, count):
        places.append((os.lseek(handle, 0, os.SEEK_CUR), mode, count))
        if len(places) == 2:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic, "fcntl", None)
    windows = SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    run = with_state(tmp_path / "r", 1)
    with claim(run, run / "checkpoints" / "last.pt"):
        text = (run / "lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=f"got {run}, which process {os.getpid()} on"):
            with claim(run, run / "checkpoints" / "last.pt"):
                pass
    assert places == [(atomic.LOCKED_BYTE, 2, 1)] * 2 and len(text) < atomic.LOCKED_BYTE


def test_where_there_are_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with claim(tmp_path / "r", None) as folder:
        assert folder == tmp_path / "r"
