"""Run state on disk: written whole or not at all, read without running code from the file.

    save(state, "runs/exp001/checkpoints/last.pt")     # the file before stays as last.previous.pt
    path, reason = find_newest("runs/exp001/checkpoints")
    state = load(path)

A checkpoint is a dict of tensors and plain values (None, bool, int, float, str, and dicts, lists
and tuples of them) with the keys in KEYS. Whatever else a caller puts in is refused when it is
saved, because no reader with `weights_only=True` would give it back.
"""

import os
import pickle
import platform
import random
import shutil
import subprocess
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch

FORMAT = "lamina-checkpoint-1"
KEYS = (
    "format",
    "model",
    "ema",
    "optimizer",
    "scheduler",
    "scaler",
    "loop",
    "rng",
    "config",
    "data",
    "versions",
)
PLAIN = (type(None), bool, int, float, str)
MAPPINGS = (dict, OrderedDict, Counter)  # state_dict() and the milestones of a schedule


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the message is one sentence for the user."""


# ---------------------------------------------------------------------------- writing


def _foreign(value, where):
    """Places in nested state that hold anything but tensors and plain values, as sentences."""
    # By type, not isinstance: numpy's float64 is a float, but no reader here accepts its pickle.
    if type(value) in MAPPINGS:
        keys = [f"{where}: a key of type {type(k).__name__}" for k in value if type(k) not in PLAIN]
        return keys + [f for k, v in value.items() for f in _foreign(v, f"{where}.{k}")]
    if type(value) in (list, tuple):
        return [f for i, v in enumerate(value) for f in _foreign(v, f"{where}[{i}]")]
    if isinstance(value, torch.Tensor) or type(value) in PLAIN:
        return []
    return [f"{where}: {type(value).__name__}"]


def previous_path(path):
    """Where the generation before `path` lies: last.pt -> last.previous.pt."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _sync_folder(folder):
    """Make renames in a folder survive a power cut."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep_previous(path):
    """Give the file at path the name of the generation before, too, if it is a whole one.

    A second name for the same bytes costs nothing and leaves `path` in place all the time. A
    truncated file is not kept: it would push out the last good generation.
    """
    if not zipfile.is_zipfile(path):
        return
    link = path.with_name(path.name + ".link")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous_path(path))
    except OSError:  # a file system without hard links: then the name moves
        os.replace(path, previous_path(path))
    finally:
        link.unlink(missing_ok=True)  # rename is a no-op between two names of one file


def save(state, path):
    """Write a checkpoint; the file that was there stays as `<stem>.previous.pt`.

    state is a dict with all of KEYS; "format" is filled in. At every moment, also if the process
    or the machine stops half-way, a readable file lies at `path` or under the previous name
    (given that one did before). Peak disk use: three generations.

    Raises ValueError for keys that are missing or unknown, TypeError for values that are neither
    tensors nor plain, OSError or RuntimeError if the disk does not take it; none of these touches
    the files that are there.
    """
    path = Path(path)
    state = {**state, "format": FORMAT}
    if set(state) != set(KEYS):
        missing, extra = sorted(set(KEYS) - set(state)), sorted(set(state) - set(KEYS))
        raise ValueError(f"{path}: checkpoint state lacks {missing} and has unknown {extra}")
    if foreign := _foreign(state, "state"):
        raise TypeError(
            f"{path}: expected tensors and plain values in a checkpoint, got "
            f"{'; '.join(foreign[:5])}; turn these into tensors, numbers or strings"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _keep_previous(path)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def link_last(runs_folder, run_checkpoint):
    """Point `<runs_folder>/last.pt` at a run's checkpoint: a relative link, replaced atomically.

    Relative, so that the folder of runs can be moved. A copy where the file system has no links.
    """
    folder, target = Path(runs_folder).resolve(), Path(run_checkpoint)
    target = target.parent.resolve() / target.name
    partial = folder / "last.pt.partial"
    partial.unlink(missing_ok=True)
    try:
        try:
            os.symlink(os.path.relpath(target, folder), partial)
        except OSError:
            shutil.copyfile(target, partial)
        os.replace(partial, folder / "last.pt")
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(folder)


# ---------------------------------------------------------------------------- reading


def _refuse(path, got, advice="give a file that train.py wrote, such as runs/last.pt"):
    return CheckpointError(f"{path}: expected a Lamina checkpoint, got {got}; {advice}")


def _read(path, map_location, mmap=False):
    """The checked content of a checkpoint file; with mmap tensors stay on disk until touched."""
    if path.is_dir():
        raise _refuse(path, "a folder")
    if not path.exists():
        gone = f"a link to {os.readlink(path)}, which is gone" if path.is_symlink() else None
        raise _refuse(path, gone or "no such file")
    if not os.access(path, os.R_OK):
        raise _refuse(path, "a file that may not be read", "change its permissions")
    if not zipfile.is_zipfile(path):
        got = "a truncated file or one of another kind" if path.stat().st_size else "an empty file"
        raise _refuse(path, got)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refuse(path, "a file with other than tensors and plain values (not run)") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Damaged bytes make the reader raise nearly anything; all of it means the same here.
    except Exception as error:
        raise _refuse(path, f"one that cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise _refuse(path, f"a {type(state).__name__}")
    found = state.get("format")
    if found != FORMAT:
        got = "a file of tensors without a format" if found is None else f"format {found!r}"
        raise _refuse(path, got, f"this version reads {FORMAT!r} as written by train.py")
    if missing := sorted(set(KEYS) - set(state)):
        raise _refuse(path, f"one without {', '.join(missing)}", "write it again with train.py")
    return state


def load(path, map_location="cpu"):
    """The state that `save` wrote, its tensors on map_location.

    Reads with `weights_only=True`: code in the file is never run. CheckpointError, one sentence,
    for a file that is missing, empty, truncated, damaged, foreign or from another version.
    """
    return _read(Path(path), map_location)


def find_newest(folder):
    """(path, reason) of the newest readable generation in a run's `checkpoints` folder.

    `last.pt` with reason None, else `last.previous.pt` with a sentence on what is wrong with
    `last.pt`; CheckpointError with both sentences if neither can be read. Reads the structure of
    a file, not its tensors.
    """
    last = Path(folder) / "last.pt"
    try:
        _read(last, "cpu", mmap=True)
        return last, None
    except CheckpointError as error:
        reason = str(error)
    try:
        _read(previous_path(last), "cpu", mmap=True)
    except CheckpointError as error:
        raise CheckpointError(f"{reason}; and {error}") from error
    return previous_path(last), reason


# ---------------------------------------------------------------------------- run folders


def _numbered_runs(folder, name):
    """{number: path} of runs/name (1), runs/name-2, ... that have saved state."""
    found = {}
    for path in Path(folder).glob(f"{name}*/checkpoints/*.pt"):
        run = path.parents[1]
        number = "1" if run.name == name else run.name.removeprefix(f"{name}-")
        if number.isdigit():
            found[int(number)] = run
    return found


def new_run_folder(folder, name):
    """A folder for a new run: one that has saved state is never written over.

    runs/name, or the number after the highest that has state: runs/name-2, runs/name-3, ...
    """
    found = _numbered_runs(folder, name)
    return Path(folder) / (f"{name}-{max(found) + 1}" if found else name)


def newest_run_folder(folder, name):
    """The run of this name that has saved state, the highest number of several; None if none."""
    found = _numbered_runs(folder, name)
    return found[max(found)] if found else None


def open_run(folder, name, *, resume):
    """Where a run writes, and what it goes on from: (run folder, file, state, notes).

    resume: take the newest run of this name that has saved state; file and state are None where
    there is none, or without resume. notes: lines that say what was found. Makes nothing.
    CheckpointError if there is state and none of it can be read.
    """
    newest = newest_run_folder(folder, name)
    if not resume or newest is None:
        notes = ["resume: no state is there to go on from, this is a new run"] * resume
        return new_run_folder(folder, name), None, None, notes
    found, why = find_newest(newest / "checkpoints")
    state = load(found)
    notes = [f"resume: {found} at step {state['loop']['step']}"] + [why] * (why is not None)
    return newest, found, state, notes


def record_run(folder, settings_text):
    """Make a run folder that explains itself: the resolved settings, and the source that runs."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(settings_text)
    (folder / "source").mkdir(exist_ok=True)
    for path in Path(__file__).resolve().parent.glob("*.py"):
        shutil.copy2(path, folder / "source" / path.name)


# ---------------------------------------------------------------------------- what a run stands on


def rng_state():
    """State of the generators of python, numpy (the global one) and torch, as plain values.

    On CUDA that of the current device only: asking the others would open a context on each.
    """
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state):
    """Put back what `rng_state` gave; the CUDA part is skipped where there is no CUDA."""
    random.setstate(state["python"])
    legacy = state["numpy"]
    keys = legacy["keys"].cpu().numpy().astype(np.uint32)
    rest = (legacy["position"], legacy["has_gauss"], legacy["cached"])
    np.random.set_state(("MT19937", keys, *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _git(*arguments):
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


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
