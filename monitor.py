"""Watch a run: what it does, what its machine does, and its cause of death.

    python monitor.py runs/exp001                   # live, until Ctrl-C
    python monitor.py runs/exp001 --once            # once, as text
    python monitor.py runs/exp001 --svg view.svg    # once, as a picture

Reads the files of a run folder and writes nothing there, so that a run on another machine can be
watched through a shared folder. A path inside a run, or runs/last.pt, names the run as well. Exit
status: 0, or 2 if there is no run.
"""

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path

from rich.console import Console

from monitoring.health import RunHealth
from monitoring.panels import RunView
from monitoring.records import RunRecords
from volumes.processes import run_script
from volumes.volume import printable


def find_run(path):
    """The run folder that a path names or lies in. ValueError, a sentence, if there is none."""
    path = Path(path)
    place = path.resolve()
    for folder in (place, *place.parents[:3]):
        if _is_run(folder):
            return path if folder == place else folder
    runs = [f for f in place.iterdir() if _is_run(f)] if place.is_dir() else []
    runs.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    got = "a path without log.jsonl" if place.exists() else "nothing of that name"
    example = "runs/exp001"
    if runs:
        got = f"{len(runs)} runs, the newest first: {', '.join(run.name for run in runs[:8])}"
        example = path / runs[0].name
    raise ValueError(f"{path}: expected a run folder, got {got}; give one such as {example}")


def _is_run(folder):
    """Whether a run wrote this folder, even if it has only begun."""
    begun = (folder / "config.yaml").exists() and (folder / "checkpoints").is_dir()
    return begun or any((folder / name).exists() for name in ("log.jsonl", "system.jsonl"))


def look(health):
    """The view of a run at this moment."""
    now = time.time()
    return RunView(health.run, health.look(now), now)


def live(health, console, seconds):
    """Show a run until Ctrl-C, read anew every so many seconds; its state stays in the terminal."""
    # rich.live.Live would hide the height of the terminal from the view.
    with contextlib.suppress(KeyboardInterrupt), console.screen() as screen:
        while True:
            screen.update(look(health))
            time.sleep(seconds)
    status = health.look(time.time())
    console.print(f"{health.run.folder}: {status.state}, {status.text}")


def cli(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder, or a file in it")
    parser.add_argument("--once", action="store_true", help="print it once, and end")
    parser.add_argument("--svg", metavar="FILE", help="write it as a picture, and end")
    parser.add_argument("--width", type=int, help="characters of a line (default: the terminal's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="from one look to the next (2)")
    args = parser.parse_args(argv)
    if not args.seconds > 0 or (args.width is not None and args.width < 20):
        parser.error("expected --seconds above 0 and --width of 20 or more")
    try:
        health = RunHealth(RunRecords(find_run(args.run)))
        if args.svg:
            options = {"width": args.width or 120, "color_system": "truecolor"}
            picture = Console(file=io.StringIO(), record=True, **options)
            picture.print(look(health))
            svg = printable(picture.export_svg(title=health.run.folder.name))
            Path(args.svg).write_text(svg, encoding="utf-8")
            return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="replace")  # a terminal without these characters
    console = Console(width=args.width, highlight=False)
    if args.once or not console.is_terminal:
        console.print(look(health))
    else:
        live(health, console, args.seconds)
    return 0


if __name__ == "__main__":
    run_script(cli)
