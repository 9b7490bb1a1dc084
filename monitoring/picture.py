"""progress.png of a run: losses, scores, time, memory, and a slice of a validation case.

Drawn from the files of the run folder alone, of a long log from a sample. It is drawn while a run
trains, at each evaluation, so it takes well under a second.
"""

import io
import time
from pathlib import Path

import numpy as np

from monitoring import health
from monitoring.formatting import finite, format_bytes, mean
from monitoring.machine import MemoryLimit
from monitoring.records import RunRecords, few_names
from volumes import atomic
from volumes.colors import class_color, no_formula, overlay, overlay_classes

SMOOTH_FROM = 120  # points of a curve: of more, the mean over a fortieth of them is drawn too
PIXELS = 640  # of a side of a slice, about
LOG_FROM = 8.0  # times the lowest value that the highest must be for a logarithmic axis
ENOUGH = 5  # points of a score that show how it goes
MARK, TROUBLE = "#909090", "#d70000"


def draw_progress(folder, title, slices=None, threshold=0.5):
    """Write progress.png of a run folder from its files.

    slices: of one plane, "z" of "case", "image" and bool "labeled" (H, W); "truth" and "mask",
    {region: (H, W) bool}; "probs" (K, H, W), of which one foreground is drawn. threshold: of that.
    """
    from matplotlib.figure import Figure

    run = RunRecords(folder)
    run.refresh(time.time())
    rows, height = (2, 7.5) if slices is None else (3, 11.5)
    figure = Figure(figsize=(15, height), dpi=80)
    figure.subplots_adjust(0.045, 0.35 / height, 0.99, 1 - 0.9 / height, 0.16, 0.22)
    title, summary = map(no_formula, (title, _summary(run)))
    figure.text(0.045, 1 - 0.2 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(0.99, 1 - 0.15 / height, summary, fontsize=9, va="top", ha="right")
    axes = figure.subplots(rows, 3, height_ratios=(3, 3, 3.6)[:rows])
    panels = (_losses, _scores, _learning_rate, _times, _memory, _load)
    for axis, panel in zip(axes[:2].flat, panels, strict=True):
        axis.margins(y=0.3)  # for the legend
        axis.set_title(panel(axis, run), fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7.5, framealpha=0.7, ncols=2, columnspacing=0.8, loc="best")
        else:
            axis.text(0.5, 0.5, "nothing yet", transform=axis.transAxes, ha="center", color=MARK)
        _marks(axis, run)
    if slices is not None:
        _slices(axes[2], slices, threshold)
    with atomic.replacing(Path(folder) / "progress.png") as partial:
        figure.savefig(partial)


def draw_runs(folders, score):
    """The bytes of a PNG: loss and a validation score of several runs, each variant in a color of
    its own: {variant: [run folder]}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), dpi=80, layout="constrained")
    axes = figure.subplots(1, 2)
    for number, (variant, places) in enumerate(folders.items()):
        for i, folder in enumerate(places):
            run = RunRecords(folder)
            run.refresh(time.time())
            # A label that begins so is not in the legend.
            label, color = f"{'_' if i else ''}{variant}", f"C{number % 10}"
            losses = [(e["step"], (e.get("loss") or {}).get("total")) for e in run.steps]
            _curve(axes[0], losses, label, color=color)
            scores = [(step, scores.get(score)) for step, scores in run.evaluations]
            _curve(axes[1], scores, label, color=color, marker="o", ms=4)
    titles = ("loss, total", f"{score.replace('_', ' ')} of the validation cases")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(no_formula(title), fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=9)
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()


def _summary(run):
    """How far the run is, as a line, and what the marks mean."""
    pace, main = health.pace(run, time.time()), run.start.get("score")
    value, step = run.best(main)
    best = "" if value is None else f", best {main} {value:.4f} at step {step}"
    return (
        f"step {pace.step} of {pace.steps or '–'}{best}, {time.strftime('%Y-%m-%d %H:%M')}\n"
        "dashed: resumed; red triangles: trouble"
    )


def _losses(axis, run):
    for name, points in _by_name((e["step"], e.get("loss") or {}) for e in run.steps).items():
        _curve(axis, points, name, main=name == "total")
    for name, points in _by_name(run.evaluations).items():
        if name.endswith("_loss"):
            label = f"{name.removesuffix('_loss')}, validation"
            _curve(axis, points, label, ls=":", marker="o", ms=3)
    values = [y for line in axis.lines for y in line.get_ydata() if np.isfinite(y)]
    if values and 0 < LOG_FROM * min(values) < max(values):
        axis.set_yscale("log")
    return "loss, by term"


def _scores(axis, run):
    shown, main, curves = [], run.start.get("score"), _by_name(run.evaluations)
    base = f"{str(main).partition('/')[0]}/"
    of_classes = [name for name in curves if name.startswith(base) and name != f"{base}mean"]
    for name in few_names(curves, main):
        points = curves[name]
        values = [value for _, value in points if finite(value) is not None]
        if name.endswith("_loss") or not values or min(values) < 0 or max(values) > 1:
            continue  # a loss, a count, or a distance
        style = {}
        if name in of_classes:
            style = {"color": class_color(of_classes.index(name))}
        elif of_classes:  # these have all the colors
            style = {"color": "black"} if name == main else {"ls": "--"}
        _curve(axis, points, name, main=name == main, marker="o", ms=3, **style)
        # Of a curve with enough other points the untrained network sets no scale.
        trained = [v for step, v in points if step > 0 and finite(v) is not None]
        shown += trained if len(trained) >= ENOUGH else values
        value, step = run.best(name)
        if value is not None:
            axis.plot(step, value, "*", ms=13, color=axis.lines[-1].get_color())
    if shown:
        axis.set_ylim(max(-0.01, min(shown) - 0.04), min(1.01, max(shown) + 0.04))
    return "validation, the best of each starred"


def _learning_rate(axis, run):
    _curve(axis, [(event["step"], event.get("lr")) for event in run.steps], "learning rate")
    axis.ticklabel_format(axis="y", scilimits=(0, 0))
    axis.set_ylim(bottom=0)
    return "learning rate"


def _times(axis, run):
    events = [event for event in run.steps if any((event.get("seconds") or {}).values())]
    names = list(dict.fromkeys(name for event in events for name in event["seconds"]))
    if names:
        parts = [[event["seconds"].get(name) or 0.0 for event in events] for name in names]
        total = np.sum(parts, axis=0)
        labels = [f"{n} {100 * y[-1] / total[-1]:.0f} %" for n, y in zip(names, parts, strict=True)]
        axis.stackplot([event["step"] for event in events], parts, labels=labels, alpha=0.8)
        axis.set_ylim(0, 1.4 * np.percentile(total, 95))  # a slow first step must not hide others
    return "seconds per step, shares at the end"


def _memory(axis, run):
    tree = [(r.get("step"), r.get("tree")) for r in run.readings]
    _curve(axis, tree, "all processes", main=True)
    for label, role in (("training", "training"), ("largest worker", "worker")):
        sizes = [(r.get("step"), max(_of_role(r, role, "rss"), default=None)) for r in run.readings]
        _curve(axis, sizes, label)
    axis.yaxis.set_major_formatter(lambda value, position: format_bytes(value))
    axis.set_ylim(bottom=0)
    limits = [MemoryLimit(*limit) for r in run.readings[-1:] for limit in r.get("rooms") or ()]
    return f"memory; {min(limits)}" if limits else "memory"


def _load(axis, run):
    """Load and memory of the GPUs; of the CPU where there is none."""
    pairs = [(r.get("step"), gpu) for r in run.readings for gpu in r.get("gpus") or ()]
    for index in sorted({gpu["index"] for _, gpu in pairs}):
        own = [(step, gpu) for step, gpu in pairs if gpu["index"] == index]
        _curve(axis, [(step, gpu.get("load")) for step, gpu in own], f"load of GPU {index}")
        memory = [(s, 100 * g["used"] / g["total"]) for s, g in own if g.get("used") and g["total"]]
        _curve(axis, memory, f"memory of GPU {index}")
    if pairs:
        axis.set_ylim(0, 130)
        return "GPU, percent"
    for label, role in (("training", "training"), ("workers, mean", "worker")):
        loads = [(r.get("step"), mean(_of_role(r, role, "cpu"))) for r in run.readings]
        _curve(axis, loads, label)
    axis.set_ylim(bottom=0)
    return "CPU, percent of one core"


def _of_role(reading, role, key):
    """What the processes of a role have under this key."""
    processes = [p for p in reading.get("processes") or () if p["role"].startswith(role)]
    return [process[key] for process in processes if process.get(key) is not None]


def _by_name(pairs):
    """{name: [(step, value)]} of (step, {name: value}) pairs."""
    points = {}
    for step, values in pairs:
        for name, value in values.items():
            points.setdefault(name, []).append((step, value))
    return points


def _curve(axis, points, label, *, main=False, **style):
    """A line of (step, value) points with gaps where there is no number; of many, their mean."""
    points = [(step, finite(value)) for step, value in points if finite(step) is not None]
    if all(value is None for _, value in points):
        return
    x, y = np.array(points, float).T
    # A line of one point would not be seen.
    style = {"lw": 2.2 if main else 1.2, "marker": "." if len(x) == 1 else None, **style}
    if len(y) > SMOOTH_FROM:
        from scipy.ndimage import uniform_filter1d

        (faint,) = axis.plot(x, y, lw=0.6, alpha=0.3, color=style.get("color"))
        known, style["color"] = np.isfinite(y), faint.get_color()
        y = y.copy()
        y[known] = uniform_filter1d(y[known], len(y) // 40)
    axis.plot(x, y, label=no_formula(label), zorder=3 if main else 2, **style)


def _marks(axis, run):
    """Where the run was resumed, and where there was trouble; all panels show the same steps."""
    records = [*run.events, *run.steps, *run.recent_readings]
    last = max([1, *(finite(record.get("step")) or 0 for record in records)])
    axis.set_xlim(-0.02 * last, 1.02 * last)
    for event in [event for event in run.events if event["event"] == "start"][1:]:
        axis.axvline(event["step"], color=MARK, ls="--", lw=0.8, zorder=0)
    steps = [event["step"] for event in run.events if event["event"] in ("trouble", "crash")]
    where = axis.get_xaxis_transform()  # steps, and shares of the height
    axis.plot(steps, [0.03] * len(steps), "^", ms=5, color=TROUBLE, transform=where)


def _slices(axes, slices, threshold):
    """Image, probability, and how the prediction compares with the truth; of several regions
    image, truth and prediction."""
    from matplotlib.patches import Patch

    step = max(1, max(slices["image"].shape) // PIXELS)
    small = np.s_[..., ::step, ::step]
    image, labeled = slices["image"][small], slices["labeled"][small]
    truth, mask = (np.stack([*slices[key].values()])[small] for key in ("truth", "mask"))
    axes[0].imshow(image, cmap="gray")
    most = "foreground" if len(truth) == 1 else "of all classes"
    titles = [f"{no_formula(slices['case'])}, slice {slices['z']}, with most {most}"]
    if len(truth) == 1:
        shown = axes[1].imshow(slices["probs"][0][small], cmap="magma", vmin=0, vmax=1)
        bar = axes[1].figure.colorbar(shown, ax=axes[1], fraction=0.05, pad=0.02)
        bar.ax.axhline(threshold, color="white", lw=1.5)
        axes[2].imshow(overlay(image, truth[0], mask[0], labeled))
        titles.append("probability, threshold in white")
        titles.append("green: found, orange: missed, blue: false, dark: unlabeled")
    else:
        axes[1].imshow(overlay_classes(image, truth, mask, labeled))
        axes[2].imshow(overlay_classes(image, mask, truth, labeled))
        titles.append("truth; solid: missed, dark: unlabeled")
        titles.append("prediction; solid: false")
        names = enumerate(slices["truth"])
        patches = [
            Patch(color=class_color(number), label=no_formula(name)) for number, name in names
        ]
        axes[0].legend(handles=patches, fontsize=9, loc="upper right", framealpha=0.8)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_axis_off()
        axis.set_title(title, fontsize=10)
