"""Run state on disk: written whole or not at all, read without running code from the file.

    save(state, "runs/exp001/checkpoints/last.pt")     # the file before stays as last.previous.pt
    path, state, reasons = load_newest("runs/exp001/checkpoints")

    saver = Saver("runs/exp001/checkpoints", ...)      # while training goes on
    saver.save(loop)                                   # as last.pt
    saver.written()                                    # what is done; raises what went wrong

A checkpoint is a dict of tensors and plain values (None, bool, int, float, str, and dicts, lists
and tuples of them) with the keys in KEYS. Whatever else a caller puts in is refused when it is
saved, because no reader with `weights_only=True` would give it back. The file is a zip archive
with a checksum (CRC-32) of each tensor and of the rest. Torch writes them and does not look at
them; here they are checked whenever it is read.
"""

import errno
import os
import pickle
import random
import shutil
import time
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runtime.device_memory import out_of_memory
from volumes import atomic

FORMAT, FORMAT_1 = "lamina-checkpoint-2", "lamina-checkpoint-1"
CHANGING = ("model", "ema", "optimizer", "scheduler", "scaler", "loop", "rng")
KEYS = ("format", *CHANGING, "config", "data", "versions")
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


def give_name(path, name):
    """Give the file at path another name too, at no cost; a copy where there are no hard links."""
    link = path.with_name(path.name + ".link")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:
            shutil.copyfile(path, link)
        os.replace(link, name)
    finally:
        link.unlink(missing_ok=True)  # rename does nothing between two names of one file


class Saved(NamedTuple):
    """What was written: the file, its bytes, and the seconds that it took."""

    path: Path
    bytes: int
    seconds: float


def save(state, path):
    """Write a checkpoint; the file that was there stays as `<stem>.previous.pt`. Returns `Saved`.

    state is a dict with all of KEYS; "format" is filled in. At every moment, also if the process
    or the machine stops half-way, a readable file lies at `path` or under the previous name
    (given that one did before). Peak disk use: three generations.

    Raises ValueError for keys that are missing or unknown, TypeError for values that are neither
    tensors nor plain, OSError if the disk does not take it; none of these touches the files that
    are there.
    """
    path, started = Path(path), time.perf_counter()
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
    with atomic.replacing(path) as partial:
        size = _write(state, partial)
        if _is_archive(path):  # a truncated file would push out the last good generation
            give_name(path, previous_path(path))
    return Saved(path, size, time.perf_counter() - started)


def _write(state, path):
    """Write a file; how many bytes it has."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # The archive is short of the bytes that the disk did not take, which torch says.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return file.tell()


def no_room(error):
    """Whether an OSError says that the disk is full, read-only or broken, or a file too large."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
    return error.errno in known


def snapshot(value):
    """A copy of nested state whose tensors lie on the CPU: what is saved while training goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, snapshot(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(snapshot, value))
    return value


class Saver:
    """Writes the state of a run on a thread of its own while training goes on, one file at a time.

    folder: of the files; constant: what does not change, by KEYS; stateful: {key: object with
    state_dict()}. On that thread before() is called before each file, and after(path) when a new
    last.pt lies there. step: of the state in last.pt, None if there is none; afterwards that of the
    newest state given to `save`, while on_disk is that of the newest one written.
    """

    def __init__(self, folder, constant, stateful, *, step, before, after):
        self.folder, self.constant, self.stateful = Path(folder), constant, stateful
        self.step, self.on_disk, self.before, self.after = step, step, before, after
        self.thread, self.pending = ThreadPoolExecutor(1, "saver"), []

    def save(self, loop, also=None):
        """Copy the state as it is now, and write it as last.pt while training goes on.

        also: a second name for the file, until something else gets that name.
        """
        state = snapshot({key: part.state_dict() for key, part in self.stateful.items()})
        state |= {**self.constant, "loop": snapshot(loop), "rng": rng_state()}
        self.step = loop["step"]
        paths = self.folder / "last.pt", also and self.folder / also
        self.pending.append(self.thread.submit(self._write, state, *paths))

    def promote(self, name, to, *, step, changes):
        """Write the state of a step, in file `name`, as `to`, with changes to its loop."""
        paths = self.folder / name, self.folder / to
        self.pending.append(self.thread.submit(self._promote, *paths, step, changes))

    @property
    def busy(self):
        return any(not future.done() for future in self.pending)

    def written(self, *, wait=False):
        """`Saved` of each file that was written since the last call, a CheckpointError in the
        place of one that could not be promoted; wait: for all of them.

        Raises what went wrong with the first of them; those after it are not written.
        """
        results = []
        while self.pending and (wait or self.pending[0].done()):
            future = self.pending.pop(0)
            if future.exception() is not None:
                for later in self.pending:
                    later.cancel()
                self.pending = []
            results.append(future.result())
        return results

    def close(self):
        """Wait for the files. Errors that nobody has asked for are dropped."""
        self.thread.shutdown()

    def _write(self, state, path, also):
        self.before()
        saved = save(state, path)
        if also is not None:
            give_name(path, also)
        self.on_disk = state["loop"]["step"]
        self.after(path)
        return saved

    def _promote(self, path, to, step, changes):
        try:
            state = load_step(path, step)
        except CheckpointError as error:
            return error
        state["loop"] |= changes
        return save(state, to)


# ---------------------------------------------------------------------------- reading


def _refuse(path, got, advice="give one of train.py, such as runs/NAME/checkpoints/best.pt"):
    return CheckpointError(f"{path}: expected a Lamina checkpoint, got {got}; {advice}")


def load(path):
    """The state that `save` wrote, its tensors on the CPU.

    Every checksum is looked at first. Reads with `weights_only=True`: code in the file is never
    run. CheckpointError, one sentence, for a file that is missing, empty, truncated, damaged,
    foreign or from another version.
    """
    path = Path(path)
    _check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refuse(path, "a file with other than tensors and plain values (not run)") from error
    # Damaged bytes make the reader raise nearly anything; all of it means the same here.
    except Exception as error:
        if isinstance(error, MemoryError) or out_of_memory(error):
            raise
        raise _refuse(path, f"one that cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise _refuse(path, f"a {type(state).__name__}")
    found = state.get("format")
    if found not in (FORMAT, FORMAT_1):
        got = "a file of tensors without a format" if found is None else f"format {found!r}"
        raise _refuse(path, got, f"this version reads {FORMAT!r} as written by train.py")
    if missing := sorted(set(KEYS) - set(state)):
        raise _refuse(path, f"one without {', '.join(missing)}", "write it again with train.py")
    return _upgraded(state) if found == FORMAT_1 else state


def _upgraded(state):
    """A state of the first format as one of this."""
    loop, settings = state["loop"], state["config"]
    names = ("best_score", "best_step", "evaluated_step", "pending", "chosen", "window_fits")
    evaluations = {name: loop[name] for name in names} | {"without_better": loop["worse"]}
    line = {"loss": loop["sums"], "patches": loop["draws"]}
    epoch = {"loss": loop["epoch_parts"], "patches": loop["epoch_draws"]}
    settings["data"]["max_excluded"] = settings["data"].pop("max_left_out")
    for term in settings["loss"].values():
        term["off_step"] = term.pop("between")
    new = {name: loop[name] for name in ("step", "seconds", "lines", "skipped")} | {
        "means": {"line": line, "epoch": epoch},
        "evaluations": evaluations,
        "micro_batch": {"size": loop["part"], "checkpointing": loop["recompute"]},
        "excluded": loop["left_out"],
    }
    return state | {"format": FORMAT, "loop": new}


def load_step(path, step):
    """`load`; a CheckpointError, too, if the state is not that of this step."""
    state = load(path)
    if state["loop"]["step"] != step:
        raise _refuse(path, f"the state of step {state['loop']['step']}", f"that of {step} is gone")
    return state


def _is_archive(path):
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of an end that is nearly one
        return False


def _check_file(path):
    """CheckpointError unless there is a whole archive whose bytes are those that were written."""
    if path.is_dir():
        raise _refuse(path, "a folder")
    if not path.exists():
        gone = f"a link to {os.readlink(path)}, which is gone" if path.is_symlink() else None
        raise _refuse(path, gone or "no such file")
    if not os.access(path, os.R_OK):
        raise _refuse(path, "a file that may not be read", "change its permissions")
    if not _is_archive(path):
        got = "a truncated file or one of another kind" if path.stat().st_size else "an empty file"
        raise _refuse(path, got)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise _refuse(path, f"one that cannot be read ({type(error).__name__})") from error
    if damaged is not None:
        raise _refuse(path, f"one whose bytes have changed since (checksum of {damaged})")


def load_newest(folder):
    """(path, state, reasons) of the newest state that can be read in a `checkpoints` folder.

    That is last.pt, else the generation before it or, if that cannot be read either or is older,
    best.pt or the one before that, which are whole states too. reasons: a sentence for each newer
    file that cannot be read. CheckpointError with all of them if none can.
    """
    last, best = Path(folder) / "last.pt", Path(folder) / "best.pt"
    try:
        return last, load(last), []
    except CheckpointError as error:
        reasons = [str(error)]
    found = []
    for path in (previous_path(last), best, previous_path(best)):
        try:
            found.append((path, load(path)))
        except CheckpointError as error:
            reasons += [str(error)] * path.exists()
    if not found:
        raise CheckpointError("; and ".join(reasons))
    return *max(found, key=lambda pair: pair[1]["loop"]["step"]), reasons


# ---------------------------------------------------------------------------- what a run stands on


def seed_generators(seed):
    """Start the generators of python, numpy (the global one) and torch from a seed >= 0."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state():
    """State of the generators of python, numpy (the global one) and torch, as plain values.

    Where the process uses CUDA, that of the current device too: asking others, or asking in a run
    on the CPU, would open a context.
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
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state):
    """Put back what `rng_state` gave; the CUDA part is skipped in a run on the CPU."""
    random.setstate(state["python"])
    legacy = state["numpy"]
    keys = legacy["keys"].cpu().numpy().astype(np.uint32)
    rest = (legacy["position"], legacy["has_gauss"], legacy["cached"])
    np.random.set_state(("MT19937", keys, *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"].cpu())
