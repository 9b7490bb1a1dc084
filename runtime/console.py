"""What infer.py says of its work on volumes: progress, what came of each, and what failed."""

import contextlib
import textwrap
import time
import traceback

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.log import SECONDS_BETWEEN_LINES
from runtime.signals import CannotGoOn
from volumes.volume import VolumeError


@contextlib.contextmanager
def progress_of(volume, console):
    """{"progress": ..., "report": ...} of predict_slabs: a bar on a terminal, elsewhere a line now
    and then."""
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeRemainingColumn())
    last = time.perf_counter()

    def advance(done, total):
        nonlocal last
        bar.update(task, completed=done, total=total)
        if bar.disable and time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            console.print(f"{volume.id}: {done} of {total} windows")
            last = time.perf_counter()

    disable = bool(console.prefix) or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(volume.id)
        yield {"progress": advance, "report": lambda kind, text, **_: console.print(text)}


class PartConsole(Console):
    """A console, each line of which begins with the part that says it."""

    def __init__(self, part, **how):
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **how)
        self.prefix = f"{part}: " if part else ""

    def print(self, text):
        super().print(textwrap.indent(str(text), self.prefix))


def attempt(do, volume, place, failures, console):
    """What do() returns; None if it fails, which is said and added to failures: {id: sentence}.

    place: of the volume, such as "1/3".
    """
    try:
        return do()
    except (CannotGoOn, VolumeError, OSError) as error:
        text = str(error)
    except MemoryError as error:
        text = f"memory ran out ({error}); end what else runs there"
    except Exception as error:  # what nobody expected does not cost the other volumes
        traceback.print_exc()
        text = f"{type(error).__name__}, see above"
    failures[volume.id] = f"{volume.id}: {text}"
    console.print(f"{place} {failures[volume.id]}")
    return None


def say_done(volume, place, started, clause, console):
    """Say what came of a volume, and in what time."""
    seconds, size = time.perf_counter() - started, "x".join(map(str, volume.shape))
    console.print(f"{place} {volume.id}: {size}, {seconds:.1f} s, {clause}")
