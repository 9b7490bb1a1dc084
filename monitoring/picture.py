"""progress.png of a run: losses, scores, time, memory, and a slice of a validation case.

Drawn from the files of the run folder alone, of a long log from a sample. It is drawn while a run
trains, at each evaluation, so it takes well under a second.
"""

import os
import time
from pathlib import Path

import numpy as np

from monitoring.health import best_score, better_end, evaluations, pace
from monitoring.records import History

GB = 1e9
POINTS = 120  # of a curve: of more than these the mean over a fortieth of them is drawn too
PIXELS = 640  # of a side of a slice, at most
HEADROOM = 1.4  # of the highest value: legends stand above the curves
LOG_FROM = 8.0  # times the lowest value that the highest must be for an axis of logarithms
PARTS = {
    "wait": "#d70000",
    "transfer": "#d75f00",
    "draw": "#b8860b",
    "forward": "#0087d7",
    "loss": "#8a5fd0",
    "backward": "#5f87af",
    "optimiser": "#808080",
}
FOUND, MISSED, FALSE = "#009e73", "#e0520e", "#56b4e9"  # told apart by colour-blind eyes too
MARK, TROUBLE = "#909090", "#d70000"


def middle_slices(image, truth, ignore_label):
    """The z slice with the most foreground of a case: what `draw_progress` shows, but for "probs".

    image (C, D, H, W), an array or dataset, of which one slice is read; truth (D, H, W) class ids.
    Returns a dict of (H, W) arrays, and "z".
    """
    labeled = truth != (-1 if ignore_label is None else ignore_label)
    z = int(np.argmax(((truth > 0) & labeled).sum(axis=(1, 2))))
    return {
        "z": z,
        "image": np.asarray(image[0, z], np.float32),
        "truth": (truth[z] > 0) & labeled[z],
        "labeled": labeled[z],
    }


def overlay(image, truth, mask, labeled):
    """(H, W, 3) picture: FOUND, MISSED and FALSE in their colours, darkened where unlabeled."""
    from matplotlib.colors import to_rgb

    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    picture = np.repeat(grey[..., None], 3, axis=2)
    for is_truth, is_mask, colour in ((1, 1, FOUND), (1, 0, MISSED), (0, 1, FALSE)):
        where = (truth == is_truth) & (mask == is_mask) & labeled
        picture[where] = 0.35 * picture[where] + 0.65 * np.asarray(to_rgb(colour))
    picture[~labeled] *= 0.5
    return picture


def draw_progress(folder, title, slices=None, threshold=0.5):
    """Write progress.png of a run folder from its files; slices: see `middle_slices`."""
    from matplotlib.figure import Figure

    run = History(folder)
    run.refresh(time.time())
    rows, height = (2, 7.5) if slices is None else (3, 11.5)
    figure = Figure(figsize=(15, height), dpi=80)
    sides = {"left": 0.045, "right": 0.99, "wspace": 0.16, "hspace": 0.22}
    figure.subplots_adjust(**sides, top=1 - 0.9 / height, bottom=0.35 / height)
    figure.text(0.045, 1 - 0.2 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(0.99, 1 - 0.15 / height, _facts(run), fontsize=9, va="top", ha="right")
    axes = figure.subplots(rows, 3, height_ratios=(3, 3, 3.6)[:rows])
    panels = (_losses, _scores, _rates, _times, _memories, _loads)
    for axis, panel in zip(axes[:2].flat, panels, strict=True):
        panel(axis, run)
        _marks(axis, run)
    if slices is not None:
        _slices(axes[2], slices, threshold)
    partial = Path(folder) / "progress.partial.png"
    figure.savefig(partial)
    os.replace(partial, Path(folder) / "progress.png")


def _facts(run):
    """How far the run is, as a line."""
    done = pace(run, time.time())
    texts = [f"step {done.step}" + (f" of {done.steps}" if done.steps else "")]
    chooses = (run.config.get("validation") or {}).get("score")
    value, step = best_score(run, chooses or "")
    texts += [f"best {chooses} {value:.4f} at step {step}"] if value is not None else []
    texts.append(time.strftime("%Y-%m-%d %H:%M"))
    return ", ".join(texts) + "\ndashed: resumed; red triangles: trouble"


# ---------------------------------------------------------------------------- what was learnt


def _losses(axis, run):
    parts = [(event.get("step"), event.get("loss") or {}) for event in run.steps]
    scores, curves = evaluations(run), []
    for name in sorted(_names(parts), key=lambda name: (name == "total", name)):  # above others
        curves.append(_series((step, loss[name]) for step, loss in parts if name in loss))
        _curve(axis, *curves[-1], name, width=2.2 if name == "total" else 1.2)
    for name in sorted(name for name in _names(scores) if name.endswith("_loss")):
        curves.append(_series((step, one.get(name)) for step, one in scores))
        label = f"{name.removesuffix('_loss')}, validation"
        axis.plot(*curves[-1], ls=":", marker="o", ms=3, lw=1.2, label=label)
    _scale(axis, [y for _, y in curves])
    _finish(axis, "loss, by term", "no step logged yet", "upper right")


def _names(pairs):
    """All keys of the dicts of (step, dict) pairs."""
    return {name for _, values in pairs for name in values}


def _scale(axis, curves):
    """The axis of curves: of logarithms if they span much, and zeros, which have none, are few."""
    values = np.concatenate([*curves, np.zeros(0)])
    values = values[np.isfinite(values)]
    above = values[values > 0]
    if len(above) and len(above) >= 0.95 * len(values) and above.max() > LOG_FROM * above.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_round_number)
        axis.yaxis.set_minor_formatter(_round_number)
    low, high = axis.get_ylim()
    more = HEADROOM - 1  # of the height, for the legend
    logarithmic = axis.get_yscale() == "log"
    axis.set_ylim(low, high * (high / low) ** more if logarithmic else high + more * (high - low))


def _round_number(value, position=None):
    """The label of a tick of a logarithmic axis: 1, 2 and 5 times powers of ten."""
    text = f"{value:.0e}"
    return f"{value:g}" if text[0] in "125" else ""


def _scores(axis, run):
    scores, shown = evaluations(run), [np.zeros(0)]
    chooses = (run.config.get("validation") or {}).get("score")
    for name in sorted(name for name in _names(scores) if not name.endswith("_loss")):
        x, y = _series((step, one.get(name)) for step, one in scores)
        known = y[np.isfinite(y)]
        if not len(known) or known.min() < 0 or known.max() > 1:  # a count
            continue
        width = 2.2 if name == chooses else 1.2
        axis.plot(x, y, lw=width, marker="o", ms=3, label=name)
        shown.append(y[x > 0] if np.any(x > 0) else y)  # the untrained network sets no scale
        if name == chooses:
            best = (np.nanargmin if better_end(name) == "lower" else np.nanargmax)(y)
            axis.plot(x[best], y[best], "*", ms=13, color=axis.lines[-1].get_color())
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if len(values):
        axis.set_ylim(max(0.0, values.min() - 0.04), min(1.01, values.max() + 0.04))
    title = "validation" + f", best {chooses} starred" * bool(chooses)
    _finish(axis, title, "no evaluation yet", "lower right")


def _rates(axis, run):
    x, y = _series((event.get("step"), event.get("lr")) for event in run.steps)
    axis.plot(x, y, lw=1.5, marker=_marker(y))
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:.1e}" if value else "0")
    axis.set_ylim(bottom=0)
    _finish(axis, "learning rate", "no step logged yet")


# ---------------------------------------------------------------------------- where time went


def _times(axis, run):
    steps = [e for e in run.steps if any((e.get("seconds") or {}).values())]
    x = np.array([e.get("step") for e in steps], float)
    bottom = np.zeros(len(x))
    total = np.array([sum(filter(None, e["seconds"].values())) for e in steps])
    for name in PARTS:
        y = np.array([e["seconds"].get(name) or 0.0 for e in steps])
        if not y.any():
            continue
        label = f"{name} {100 * y[-1] / total[-1]:.0f} %"
        axis.fill_between(x, bottom, bottom + y, color=PARTS[name], label=label, lw=0)
        if len(x) == 1:
            axis.bar(x, y, bottom=bottom, color=PARTS[name])
        bottom = bottom + y
    if len(x):  # a first step that took a minute must not hide all others
        _from_zero(axis, np.percentile(total, 95))
    _finish(axis, "seconds per step, shares at the end", "no step logged yet", "upper left", 4)


# ---------------------------------------------------------------------------- the machine


def _memories(axis, run):
    lines = _broken(run.samples)
    curves = {
        "all processes": ("#0087d7", [line.get("tree") for line in lines]),
        "training": ("#8a5fd0", [_largest(line, "training") for line in lines]),
        "largest worker": ("#b8860b", [_largest(line, "worker") for line in lines]),
    }
    for name, (colour, values) in curves.items():
        x, y = _series(zip([line.get("step") for line in lines], values, strict=True))
        if np.any(np.isfinite(y)):
            width = 2.2 if name == "all processes" else 1.2
            axis.plot(x, y / GB, label=name, color=colour, lw=width, marker=_marker(y))
    _limit(axis, run.samples[-1:])
    _from_zero(axis, axis.dataLim.y1)
    _finish(axis, "memory, GB", "no system.jsonl", "upper left")


def _limit(axis, last):
    """The tightest limit of the last line; where it is far above the curves only in words."""
    rooms = [room for line in last for room in line.get("rooms") or ()]
    if not rooms:
        return
    free, total, what = min(rooms, key=lambda room: room[0])
    label = f"{total / GB:.1f} GB, {what} ({free / GB:.1f} free)"
    style = {"color": TROUBLE, "ls": "-.", "lw": 1.2}
    if total / GB < 3 * axis.get_ylim()[1]:
        axis.axhline(total / GB, label=label, **style)
    else:
        axis.plot([], [], label=f"above: {label}", **style)


def _largest(line, role):
    """Bytes of the largest process of a role, None if there is none."""
    found = [one for one in line.get("processes") or () if one["role"].startswith(role)]
    return max((one["rss"] for one in found if one.get("rss") is not None), default=None)


def _broken(lines):
    """Lines of system.jsonl with an empty one wherever another process goes on."""
    found = []
    for line in lines:
        if found and line.get("pid") != found[-1].get("pid"):
            found.append({"pid": line.get("pid")})
        found.append(line)
    return found


def _loads(axis, run):
    """Load and memory of the GPUs; of the CPU where there is none."""
    lines = _broken(run.samples)
    steps = [line.get("step") for line in lines]
    gpus = sorted({gpu["index"] for line in lines for gpu in line.get("gpus") or ()})
    curves = {}
    for index in gpus:
        ones = [_gpu(line, index) for line in lines]
        curves[f"load of GPU {index}"] = [one.get("load") for one in ones]
        held = [_percent(one.get("used"), one.get("total")) for one in ones]
        curves[f"memory of GPU {index}"] = held
    if not gpus:
        curves["training"] = [_busy(line, "training") for line in lines]
        curves["workers, mean"] = [_busy(line, "worker") for line in lines]
    for name, values in curves.items():
        x, y = _series(zip(steps, values, strict=True))
        if np.any(np.isfinite(y)):
            _curve(axis, x, y, name, width=1.2)
    _from_zero(axis, 100 if gpus else axis.dataLim.y1)
    if gpus:
        axis.set_yticks(range(0, 101, 20))
    title = "GPU, percent" if gpus else "CPU, percent of one core"
    _finish(axis, title, "no system.jsonl", "upper left")


def _gpu(line, index):
    return next((gpu for gpu in line.get("gpus") or () if gpu["index"] == index), {})


def _percent(part, total):
    return 100 * part / total if part is not None and total else None


def _busy(line, role):
    found = [one for one in line.get("processes") or () if one["role"].startswith(role)]
    found = [one["cpu"] for one in found if one.get("cpu") is not None]
    return sum(found) / len(found) if found else None


# ---------------------------------------------------------------------------- axes


def _series(pairs):
    """(steps, values) as arrays of (step, value) pairs; None is NaN, which leaves a gap."""
    pairs = np.array([*pairs], float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _curve(axis, x, y, label, width):
    """A line; of many points faint, below their running mean."""
    if len(y) <= POINTS:
        axis.plot(x, y, lw=width, label=label, marker=_marker(y))
        return
    (faint,) = axis.plot(x, y, lw=0.6, alpha=0.3)
    axis.plot(x, _running_mean(y, len(y) // 40), lw=width, label=label, color=faint.get_color())


def _running_mean(y, width):
    """Mean over `width` values around each, of those that are finite."""
    known = np.isfinite(y)
    kernel = np.ones(2 * (width // 2) + 1)
    sums = np.convolve(np.where(known, y, 0.0), kernel, "same")
    counts = np.convolve(known.astype(float), kernel, "same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _marker(y):
    return "." if np.isfinite(y).sum() == 1 else None  # a line of one point would not be seen


def _from_zero(axis, highest):
    """An axis from 0 that leaves a legend room above the highest value."""
    if np.isfinite(highest) and highest > 0:
        axis.set_ylim(0, HEADROOM * highest)


def _finish(axis, title, otherwise, legend="best", columns=2):
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    axis.tick_params(which="both", labelsize=8)
    if axis.get_legend_handles_labels()[0]:
        spaces = {"columnspacing": 0.8, "handlelength": 1.2, "handletextpad": 0.4}
        axis.legend(fontsize=7.5, framealpha=0.7, ncols=columns, loc=legend, **spaces)
    elif not any(len(line.get_xdata()) for line in axis.lines):
        axis.text(0.5, 0.5, otherwise, transform=axis.transAxes, ha="center", color=MARK)


def _marks(axis, run):
    """Where the run was resumed, and where there was trouble; all panels show the same steps."""
    steps = [e.get("step") or 0 for e in (*run.events, *run.steps)]
    last = max([*steps, *(line.get("step") or 0 for line in run.lines)], default=0)
    axis.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    for event in [e for e in run.events if e["event"] == "start"][1:]:
        axis.axvline(event.get("step") or 0, color=MARK, ls="--", lw=0.8, zorder=0)
    at = [e.get("step") or 0 for e in run.events if e["event"] in ("trouble", "crash")]
    where = axis.get_xaxis_transform()  # steps, and shares of the height
    axis.plot(at, [0.03] * len(at), "^", ms=5, color=TROUBLE, transform=where)


def _slices(axes, slices, threshold):
    """Image, probability, and what of the truth was found."""
    from matplotlib.patches import Patch

    mask = slices["probs"] >= threshold
    picture = overlay(slices["image"], slices["truth"], mask, slices["labeled"])
    axes[0].imshow(_shrunk(slices["image"]), cmap="gray")
    shown = axes[1].imshow(_shrunk(slices["probs"]), cmap="magma", vmin=0, vmax=1)
    bar = axes[1].figure.colorbar(shown, ax=axes[1], fraction=0.05, pad=0.02)
    bar.ax.axhline(threshold, color="white", lw=1.5)
    axes[2].imshow(_shrunk(picture))
    titles = ("image, the slice with most foreground", "probability, threshold in white", "")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_axis_off()
        axis.set_title(title, fontsize=10)
    names = {"found": FOUND, "missed": MISSED, "false": FALSE}
    patches = [Patch(color=colour, label=name) for name, colour in names.items()]
    patches.append(Patch(color="#303030", label="dark: unlabeled"))
    axes[2].legend(
        handles=patches,
        fontsize=8,
        loc="lower center",
        ncols=4,
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )


def _shrunk(array):
    """An array (H, W, ...) of at most PIXELS a side: the means of blocks."""
    factor = -(-max(array.shape[:2]) // PIXELS)
    height, width = (size // factor for size in array.shape[:2])
    blocks = array[: height * factor, : width * factor]
    return blocks.reshape(height, factor, width, factor, *array.shape[2:]).mean(axis=(1, 3))
