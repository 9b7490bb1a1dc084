"""What a run writes for people to look at: a log of lines, TensorBoard, and a picture.

    runs/<name>/log.jsonl       one JSON object per line, each with "event", "step" and "epoch"
    runs/<name>/tensorboard/    the same numbers as scalars
    runs/<name>/progress.png    loss parts, learning rate, scores, and a slice of a validation case

Events: "start"; "step": loss parts, lr, seconds of each part of a step, means since the line
before; "epoch": means of the loss parts over the epoch, draws (shares of its patches), cache (what
it holds, and how often it was hit since the start); "evaluation": scores, per case too; "end".
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """Appends events to log.jsonl and scalars to TensorBoard.

    resume_step: lines of later steps, written by a run that died after its last saved state, are
    taken out, so that the log tells one story. None starts a new log.
    """

    def __init__(self, folder, *, tensorboard, resume_step=None):
        self.path = Path(folder) / "log.jsonl"
        if resume_step is not None and self.path.exists():
            kept = [e for e in read_log(self.path) if e["step"] <= resume_step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(e) + "\n" for e in kept))
            os.replace(partial, self.path)
        elif resume_step is None:  # what a run left that died before it saved anything
            self.path.unlink(missing_ok=True)
            shutil.rmtree(Path(folder) / "tensorboard", ignore_errors=True)
        self.file = self.path.open("a")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self.writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=purge)

    def write(self, event, *, step, epoch, **fields):
        """One line, on disk when this returns; every number in fields also goes to TensorBoard."""
        content = {"event": event, "step": step, "epoch": epoch, **fields}
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()
        if self.writer is not None:
            for key, value in _numbers(fields):
                self.writer.add_scalar(f"{event}/{key}", value, step)

    def close(self):
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _numbers(fields, prefix=""):
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def add_parts(sums, parts, share=1.0):
    """Add to {name: (sum, count)}: a term that acts on some steps only has a count of its own."""
    for name, value in parts.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = (total + share * value, count + share)


def means_of(sums):
    """{name: mean} of what `add_parts` gathered, in the order of names, the total last."""
    names = sorted(sums, key=lambda name: (name == "total", name))
    return {name: float(sums[name][0]) / sums[name][1] for name in names}


class ProgressLine:
    """A progress bar on a terminal, plain lines elsewhere; as a context. `say` prints above it."""

    def __init__(self, console, total, done):
        self.console = console
        columns = (BarColumn(30), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(
            *columns, *times, TextColumn("{task.description}"), console=self.console
        )
        self.total = total
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.console.is_terminal:
            self.bar.stop()

    def say(self, text):
        self.console.print(text)

    def advance(self, step, text, short):
        """text: a plain line of its own; short: what a bar has room for."""
        self.bar.update(self.task, completed=step, description=short)
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.total} {text}")


def read_log(path):
    """The events of a log.jsonl; a last line cut short by a crash is left out."""
    events = []
    for line in Path(path).read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def middle_slices(image, truth, probs, ignore_label):
    """The z slice with the most foreground of a case: what `draw_progress` shows.

    image (D, H, W), truth (D, H, W) class ids, probs (D, H, W). Returns a dict of (H, W) arrays.
    """
    labelled = truth != (-1 if ignore_label is None else ignore_label)
    z = int(np.argmax(((truth > 0) & labelled).sum(axis=(1, 2))))
    return {
        "image": np.asarray(image[z], np.float32),
        "truth": (truth[z] > 0) & labelled[z],
        "labelled": labelled[z],
        "probs": np.asarray(probs[z], np.float32),
    }


def overlay(image, truth, mask, labelled):
    """(H, W, 3) picture: green found, red missed, blue false, darkened where unlabeled."""
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    picture = np.repeat(grey[..., None], 3, axis=2)
    colours = {(1, 1): (0.2, 0.9, 0.2), (1, 0): (1.0, 0.2, 0.2), (0, 1): (0.3, 0.5, 1.0)}
    for (is_truth, is_mask), colour in colours.items():
        where = (truth == is_truth) & (mask == is_mask) & labelled
        picture[where] = 0.45 * picture[where] + 0.55 * np.asarray(colour)
    picture[~labelled] *= 0.5
    return picture


def draw_progress(folder, title, slices=None, threshold=0.5):
    """Write progress.png of a run folder from its log; slices: see `middle_slices`."""
    from matplotlib.figure import Figure

    folder = Path(folder)
    events = read_log(folder / "log.jsonl")
    steps = [e for e in events if e["event"] == "step"]
    evaluations = [e for e in events if e["event"] == "evaluation" and e["scores"]]
    figure = Figure(figsize=(13, 7.5), dpi=90, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3)

    _curves(axes[0, 0], steps, lambda e: e["loss"], "loss", "loss, by term")
    _curves(axes[0, 1], steps, lambda e: {"learning rate": e["lr"]}, "", "learning rate")
    _curves(axes[0, 2], evaluations, lambda e: _shares(e["scores"]), "score", "validation")
    axes[0, 2].set_ylim(0, 1)
    for axis in axes[1]:
        axis.set_axis_off()
    if slices is not None:
        mask = slices["probs"] >= threshold
        axes[1, 0].imshow(slices["image"], cmap="gray")
        axes[1, 0].set_title("image, slice with most foreground", fontsize=9)
        axes[1, 1].imshow(slices["probs"], cmap="magma", vmin=0, vmax=1)
        axes[1, 1].set_title("probability", fontsize=9)
        axes[1, 2].imshow(overlay(slices["image"], slices["truth"], mask, slices["labelled"]))
        axes[1, 2].set_title("green found, red missed, blue false, dark unlabeled", fontsize=9)
    partial = folder / "progress.partial.png"
    figure.savefig(partial)
    os.replace(partial, folder / "progress.png")


def _shares(scores):
    """Scores of which more is better, and which share an axis from 0 to 1."""
    shares = {k: v for k, v in scores.items() if v is not None and 0 <= v <= 1}
    return {k: v for k, v in shares.items() if not k.endswith("_loss")}


def _curves(axis, events, values, ylabel, title):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    names = sorted({name for e in events for name in values(e)})
    for name in names:
        points = [(e["step"], values(e)[name]) for e in events if name in values(e)]
        marker = "." if len(points) == 1 else None  # a line of one point would not be seen
        width = 2 if name == "total" else 1
        axis.plot(*zip(*points, strict=True), label=name, lw=width, marker=marker)
    if names:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
