"""Predictions of a volume into a store that are killed again and again, beside one undisturbed.

    python benchmarks/scroll_kills.py                       # 20 kills of 1 process, 20 of 3 parts
    python benchmarks/scroll_kills.py --size 192 --kills 4 --parts 3 --shard 64

A process, or one of three parts, is killed with SIGKILL at random moments, each third time when a
file is being written, and started again. At the end all files of the store must have the bytes of
the undisturbed one, but for the date. Each file by which a shard is done is noted with its inode: a
shard whose file was replaced was computed twice, and none may be. What was in work when its process
was killed had no such file. Exit status 1 if anything differs, else 0. Leaves nothing.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scrolls import ROOT, tiny_checkpoint, write_phantom


def start(options, output, part, parts):
    shard = [options.shard] * 3
    command = [sys.executable, str(ROOT / "infer.py"), "--ckpt", str(options.ckpt)]
    command += ["--input", str(options.image), "--output", str(output), f"inference.shard={shard}"]
    command += ["--part", f"{part}/{parts}"] * (parts > 1) + options.overrides
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **quiet)


def end_of(process):
    """Wait for a process that must end well."""
    errors = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"it ended by itself with {process.returncode}: {errors[-2000:]}")


def files_of(store):
    """{path within the store: path} of all files of voxels and metadata."""
    return {
        path.relative_to(store): path
        for path in sorted(store.rglob("*"))
        if path.is_file() and ".lamina" not in path.parts and not path.name.startswith(".partial_")
    }


class Watch:
    """A context that notes each file of level 0 of the probability, with which a shard is done."""

    def __init__(self, store):
        self.folder, self.inodes, self.stopped = store / "0" / "c", {}, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self):
        while not self.stopped.wait(0.02):
            self.look()

    def look(self):
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if path.is_file() and not path.name.startswith(".partial_"):
                    about = path.stat()
                    self.inodes.setdefault(path, set()).add((about.st_ino, about.st_mtime_ns))

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.look()

    @property
    def twice(self):
        return [str(path) for path, inodes in self.inodes.items() if len(inodes) > 1]


def disturbed(options, output, parts, seconds, chance):
    """Kill and start again; (kills that hit, of these how many with a file half written)."""
    hit = writes = 0
    running = {part: start(options, output, part, parts) for part in range(1, parts + 1)}
    for number in range(options.kills):
        time.sleep(chance.uniform(0, options.start + 2 * seconds / options.kills))
        part = chance.choice(sorted(running))
        process = running[part]
        while number % 3 == 2 and process.poll() is None and not any(output.rglob(".partial_*")):
            time.sleep(0.001)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
        if not alive and process.returncode:
            raise RuntimeError(f"it ended with {process.returncode}: {errors[-2000:]}")
        hit += alive
        writes += alive and any(output.rglob(".partial_*"))
        running[part] = start(options, output, part, parts)
    for process in running.values():
        end_of(process)
    end_of(start(options, output, 1, parts))  # what the last of them found locked
    return hit, writes


def without_date(path):
    content = path.read_bytes()
    if path.name == "zarr.json":
        content = json.loads(content)
        content.get("attributes", {}).get("lamina", {}).get("provenance", {}).pop("date", None)
    return content


def check(options, folder, parts, seconds):
    """The number of faults of a prediction that is killed, which are printed."""
    whole, killed = folder / "whole.zarr", folder / f"killed{parts}.zarr"
    with Watch(killed) as watch:
        hit, writes = disturbed(options, killed, parts, seconds, random.Random(options.seed))
    one, other = files_of(whole), files_of(killed)
    faults = [f"{path} in one alone" for path in one.keys() ^ other.keys()]
    common = one.keys() & other.keys()
    faults += [f"{p} differs" for p in common if without_date(one[p]) != without_date(other[p])]
    faults += [f"{path} computed twice" for path in watch.twice]
    print(
        f"{parts} process(es): {hit} kills, {writes} in mid-write; {len(one)} files, "
        f"{len(watch.inodes)} shards; undisturbed {seconds:.0f} s; "
        + ("; ".join(faults) or "all equal, no shard twice"),
        flush=True,
    )
    return len(faults)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=int, default=256)
    add("--shard", type=int, default=128)
    add("--kills", type=int, default=20)
    add("--parts", type=int, nargs="+", default=[1, 3])
    add("--start", type=float, default=4.0, help="seconds that starting takes")
    add("--seed", type=int, default=0)
    add("--ckpt", type=Path)
    add("overrides", nargs="*", metavar="group.key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options.ckpt = options.ckpt or tiny_checkpoint(folder)
        options.image = folder / "scroll.zarr"
        write_phantom(options.image, options.size)
        started = time.monotonic()
        end_of(start(options, folder / "whole.zarr", 1, 1))
        seconds = time.monotonic() - started
        faults = [check(options, folder, parts, seconds) for parts in options.parts]
    return 1 if any(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
