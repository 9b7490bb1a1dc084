"""Run folders: where a run writes, which process holds it, and what it resumes from.

folder, path, state, notes = open_run("runs", "exp001", resume=True)
with claim(folder, path) as folder:
    record(folder, settings_text)
"""

import contextlib
import faulthandler
import glob
import itertools
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import psutil
import torch

from runtime.checkpoint import load_newest
from volumes import atomic

ROOT = Path(__file__).resolve().parents[1]  # of the project
ROOMS = (".", "volumes", "topology", "monitoring", "scoring", "patches", "runtime")


def _numbered_runs(folder, name):
    """{number: path} of runs/name (1), runs/name-2, ... that have saved state."""
    runs = {}
    for path in Path(folder).glob(f"{glob.escape(name)}*/checkpoints/[!.]*.pt"):
        run = path.parents[1]
        number = "1" if run.name == name else run.name.removeprefix(f"{name}-")
        if number.isdigit():
            runs[int(number)] = run
    return runs


def new_run_folder(folder, name):
    """A folder for a new run: one that has saved state is never written over.

    runs/name, or the number after the highest that has state: runs/name-2, runs/name-3, ...
    """
    runs = _numbered_runs(folder, name)
    return Path(folder) / (f"{name}-{max(runs) + 1}" if runs else name)


def newest_run_folder(folder, name):
    """The run of this name that has saved state, the highest number of several; None if none."""
    runs = _numbered_runs(folder, name)
    return runs[max(runs)] if runs else None


def run_folder_of(path):
    """The run folder that a path names, itself or by its config.yaml; None: it names none."""
    path = Path(path)
    folder = path.parent if path.name == "config.yaml" else path
    return folder if path.exists() and (folder / "checkpoints").is_dir() else None


def open_run(folder, name, *, resume):
    """Where a run writes, and what it resumes from: (run folder, file, state, notes).

    resume: use this run folder, or, if True, the newest run of this name that has saved state; file
    and state are None if there is none, or without resume. Where torchrun has started its processes
    again, they go on with their run in any case. notes: lines for people. Makes nothing.
    CheckpointError if there is state and none of it can be read.
    """
    newest = resume if isinstance(resume, Path) else newest_run_folder(folder, name)
    if newest and not resume and under_torchrun():
        lock = newest / "lock"
        resume = lock.exists() and lock.read_text(encoding="utf-8").endswith(_launcher())
    if not resume or newest is None:
        notes = ["resume: there is no saved state, this is a new run"] if resume else []
        return new_run_folder(folder, name), None, None, notes
    path, state, reasons = load_newest(newest / "checkpoints")
    which = "the newest state that can be read" if reasons else "the newest state"
    notes = [f"resume: {path} at step {state['loop']['step']}, {which}", *reasons]
    return newest, path, state, notes


@contextlib.contextmanager
def claim(folder, resumed_from):
    """Hold a run folder, which is made if need be, as a context: the folder. No other process can.

    A new run (resumed_from None) uses the next number if another process holds its folder, or has
    saved state there since it was chosen. The lock ends with the process, even if it is killed. A
    last.pt that could not be read when the run was resumed from another file is renamed, so that it
    is not kept as the generation before.

    ValueError if the run to resume is running, OSError if the folder cannot be made.
    """
    for path in _free_names(folder):
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        with open(path / "lock", "a+", encoding="utf-8") as lock:
            if not atomic.try_lock(lock):
                if resumed_from is None:
                    continue
                lock.seek(0)
                raise ValueError(
                    f"run.name: expected a run that no process works on, got {path}, which "
                    f"{lock.readline().strip() or 'another process'} does; wait for it or stop it"
                )
            if resumed_from is None and _has_state(path):
                continue
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{_launcher()}")
            lock.flush()
            for place in (path, path / "checkpoints"):
                atomic.remove_partial(place)
            last = path / "checkpoints" / "last.pt"
            if resumed_from is not None and resumed_from != last and last.exists():
                os.replace(last, last.with_name("last.pt.broken"))
            yield path
            return


def under_torchrun():
    """Whether torchrun has started this process; its count of restarts differs by machine."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ


def launched_at():
    """When the process began that started this one, seconds since 1970."""
    return psutil.Process(os.getppid()).create_time()


def _launcher():
    """What started this process: of torchrun the same, if it starts its processes again."""
    return f"started by process {os.getppid()} of {launched_at()}"


def _free_names(folder):
    """The folder, and those that come after it by their number."""
    yield folder
    name, dash, number = folder.name.rpartition("-")
    name, number = (name, int(number)) if dash and number.isdigit() else (folder.name, 1)
    while True:
        number += 1
        path = folder.with_name(f"{name}-{number}")
        if not _has_state(path):
            yield path


def _has_state(folder):
    return any(folder.glob("checkpoints/[!.]*.pt"))


def record(folder, settings_text):
    """Let a run folder explain itself: the resolved settings, and the source that runs."""
    (folder / "config.yaml").write_text(settings_text, encoding="utf-8")
    source = folder / "source"
    if source.resolve() == ROOT:  # this is the code that the run has kept
        return
    shutil.rmtree(source, ignore_errors=True)  # of a run that is resumed with other code
    for path in itertools.chain.from_iterable((ROOT / room).glob("*.py") for room in ROOMS):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def link_newest(runs_folder, checkpoints):
    """Point `<runs_folder>/last.pt` and best.pt at those of a run: relative links, replaced
    atomically.

    A best.pt that this run does not have yet is removed: both are of one run. Relative, so that the
    folder of runs can be moved. Copies where the file system has no links.
    """
    folder = Path(runs_folder).resolve()
    for name in ("last.pt", "best.pt"):
        target = Path(checkpoints).resolve() / name
        if not target.exists():
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic.replacing(folder / name) as partial:
            try:
                os.symlink(os.path.relpath(target, folder), partial)
            except OSError:
                shutil.copyfile(target, partial)


def _git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    return done.stdout.decode(errors="replace").strip()


def _commit():
    """Short hash of the checkout that this file lies in, "-dirty" if edited; else "unknown"."""
    try:
        edited = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet
        return "unknown"


def versions():
    """What wrote a checkpoint: strings for lamina (commit), python, torch, numpy, platform."""
    return {
        "lamina": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


@contextlib.contextmanager
def fault_file(folder):
    """In this context a signal that ends the process in mid-code (SIGSEGV, SIGBUS, SIGABRT, ...)
    leaves the lines that were running in fault.txt. Not where somebody else looks after that."""
    path = Path(folder) / "fault.txt"
    path.unlink(missing_ok=True)
    if faulthandler.is_enabled():
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
    path.unlink(missing_ok=True)
