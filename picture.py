"""progress.png of a run: loss parts, learning rate, scores, and a slice of a validation case."""

import os
from pathlib import Path

import numpy as np

from runlog import read_log


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
