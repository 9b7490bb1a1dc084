"""Reports of the scores of many cases: summaries, a leaderboard, tables, pictures of the worst.

    rows = [{"case": "a", "method": "new", "dice": 0.9}, {"case": "a", "method": "old", ...}, ...]
    summary(rows, ("dice",))["new"]["dice"]      # mean, median, worst, worst_case
    leaderboard(rows, "dice")                    # the best method first, the others against it

Methods are compared case by case; intervals are of the bootstrap over cases (Efron 1979).
"""

import csv
import itertools
import statistics
import textwrap
from typing import NamedTuple

import numpy as np
from rich.table import Table

from scoring import metrics
from scoring.classes import MEAN, mask_of, split_name
from scoring.dilation import dilate
from volumes import atomic
from volumes.colors import FALSE, FOUND, MISSED, class_color, overlay, overlay_classes

FEW = 10  # cases below which such an interval is known to be too narrow


class LeaderboardRow(NamedTuple):
    """A method and its mean score; then its difference to the best method, or to the one that all
    are compared with, None of that itself."""

    method: str
    mean: float
    interval: tuple | None  # (low, high), None of fewer than 2 cases
    difference: float | None = None
    difference_interval: tuple | None = None
    ahead: int | None = None  # in how many cases
    behind: int | None = None


def methods_of(rows):
    return list(dict.fromkeys(row["method"] for row in rows))


def summary(rows, names):
    """{method: {score: {"mean", "median", "worst", "worst_case"}}} of the rows of all cases.

    The last two are None for a score that is better at neither end. Of equals the first is worst.
    """
    by_method = {m: [row for row in rows if row["method"] == m] for m in methods_of(rows)}
    return {m: {n: _summary(own, n) for n in names} for m, own in by_method.items()}


def _summary(rows, name):
    values = [row[name] for row in rows]
    end = {"higher": min, "lower": max}.get(metrics.entry(name)[0].better)
    worst = end(values) if end else None
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "worst": worst,
        "worst_case": None if worst is None else rows[values.index(worst)]["case"],
    }


def worst_first(rows, method, name):
    """The rows of a method, the worst by a score first."""
    rows = [row for row in rows if row["method"] == method]
    return sorted(rows, key=lambda row: _sign(name) * row[name])


def _sign(name):
    return -1 if metrics.entry(name)[0].better == "lower" else 1


def leaderboard(rows, name, *, against=None):
    """[`LeaderboardRow`] of all methods by the mean of a score, the best first.

    against: the method that the others are compared with; None: the best.
    """
    scores = {
        method: np.array([row[name] for row in rows if row["method"] == method], float)
        for method in methods_of(rows)
    }
    ranked = sorted(scores, key=lambda method: -_sign(name) * scores[method].mean())
    base, board = ranked[0] if against is None else against, []
    for method in ranked:
        mean, interval = float(scores[method].mean()), bootstrap_interval(scores[method])
        if method == base:
            board.append(LeaderboardRow(method, mean, interval))
            continue
        difference = scores[method] - scores[base]
        to_base = float(difference.mean()), bootstrap_interval(difference)
        gain = _sign(name) * difference
        ahead, behind = int(np.count_nonzero(gain > 0)), int(np.count_nonzero(gain < 0))
        board.append(LeaderboardRow(method, mean, interval, *to_base, ahead, behind))
    return board


def bootstrap_interval(values):
    """(low, high) of the mean of values that were sampled at random; None of fewer than 2."""
    if len(values) < 2:
        return None
    from scipy.stats import bootstrap  # late: half a second

    rng = np.random.default_rng(0)
    sampled = bootstrap(
        (values,), np.mean, n_resamples=10_000, batch=1000, method="percentile", rng=rng
    )
    low, high = sampled.confidence_interval
    return float(low), float(high)


def student_interval(values):
    """(low, high) of the mean of a few values, 95 %, by Student's t; None of fewer than 2."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(stdtrit(len(values) - 1, 0.975)) * error
    return mean - reach, mean + reach


def write_csv(path, rows):
    """A line for each dict of rows, with the keys of the first as columns."""
    how = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with atomic.replacing(path) as partial, open(partial, "w", **how) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), restval="")
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def print_scores(console, rows, names, unit, cases):
    """A row for each of rows, and of each class that names have; a line separates those after the
    first `cases`, and with several classes the cases."""
    known = {split_name(name): name for name in names}
    scores, classes = (list(dict.fromkeys(parts)) for parts in zip(*known, strict=True))
    several, methods = classes != [None], len(methods_of(rows))
    table = Table()
    for head in ["case"] + ["class"] * several + ["method"] * (methods > 1):
        table.add_column(head, no_wrap=True)
    for score in scores:
        table.add_column(_heading(score, rows[0]["tolerance"], unit), justify="right")
    for start in range(0, len(rows), methods):
        if start == cases or len(classes) > 1:
            table.add_section()
        for which, row in itertools.product(classes, rows[start : start + methods]):
            cells = (
                [row["summary"] or row["case"]]
                + [which] * several
                + [row["method"]] * (methods > 1)
            )
            found = [known.get((score, which)) for score in scores]
            table.add_row(*cells, *(name and format_score(row[name], name) for name in found))
    console.print(table)


def print_leaderboard(console, board, rank, cases):
    """A row for each `LeaderboardRow`, of so many cases, by the score named rank."""
    table = Table(title=f"leaderboard by {rank}", title_justify="left")
    table.add_column("method", no_wrap=True)
    for head in ("mean", "95 %", "to the best", "95 %", "ahead", "behind"):
        table.add_column(head, justify="right")
    for one in board:
        row = [one.method, format_score(one.mean, rank), interval_text(one.interval)]
        if one.difference is not None:
            row += [f"{one.difference:+.3f}", interval_text(one.difference_interval, "+")]
            row += [str(one.ahead), str(one.behind)]
        table.add_row(*row)
    console.print(table)
    if 1 < cases < FEW:
        console.print(f"note: intervals of {cases} cases are too narrow; {FEW} or more are needed")


def interval_text(interval, sign=""):
    """(low, high) for people; "" for None."""
    return "" if interval is None else f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"


def _heading(name, tolerance, unit):
    if name == "surface_dice":
        return f"surface dice @ {tolerance:g} {unit}".rstrip()
    return "in truth" if name == "components_truth" else name.replace("_", " ")


def format_score(value, name):
    """A score for people: counts as they are, their means to a tenth, all else to three digits."""
    if value is None:
        return ""
    if isinstance(value, int) or metrics.entry(name)[0].better is None:
        return f"{round(value, 1):g}"
    return f"{value:.3f}"


def rank_text(row, rank):
    """The score that ranks a case, and if it is a mean over classes those of the worst three."""
    score, which = split_name(rank)
    texts = [f"{rank.replace('_', ' ')} {format_score(row[rank], rank)}"]
    if which == MEAN:
        others = [name for name in row if name != rank and split_name(name)[0] == score]
        worst = sorted(others, key=lambda name: _sign(rank) * row[name])[:3]
        texts += [f"{split_name(name)[1]} {format_score(row[name], name)}" for name in worst]
    return "\n".join(texts)


class Slice(NamedTuple):
    """One z slice of a case; K is 1 without classes. Counts are of far errors."""

    z: int
    image: np.ndarray  # (H, W)
    truth: np.ndarray  # (K, H, W) bool, and the prediction
    mask: np.ndarray
    labeled: np.ndarray  # (H, W) bool
    missed: int
    false: int
    by_class: np.ndarray  # (2, K): those missed and those false of each class


def worst_slices(prediction, truth, image, spacing, *, tolerance, ignore_label, classes=None):
    """`Slice`s of a case, the worst first; those next to a chosen one are passed over.

    prediction, truth, image (D, H, W); image may be None. A voxel counts as missed if it is further
    than the tolerance from all predicted ones, as false if it is from all true ones. Where there
    is none, slices follow with most wrong voxels, then with most truth. classes: {name: ids}, each
    counted as a mask of its own.
    """
    labeled = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    regions = [(1,)] if classes is None else list(classes.values())
    how = {"labeled": labeled, "spacing": spacing, "tolerance": tolerance}
    counts = np.stack([_errors_by_slice(prediction, truth, ids, **how) for ids in regions], axis=1)
    missed, false, wrong, true = counts.sum(axis=1)  # (4, K, D)
    order = np.lexsort([-true, -wrong, -(missed + false)])
    gap, chosen = max(1, len(truth) // 20), []
    for z in map(int, order):
        if len(chosen) < _columns(classes) and all(abs(z - other) > gap for other in chosen):
            chosen.append(z)
    image = np.zeros(truth.shape, np.uint8) if image is None else image
    slices = []
    for z in chosen:
        masks = [
            np.stack([mask_of(v[z], i) for i in regions]) & labeled[z] for v in (truth, prediction)
        ]
        arrays = np.asarray(image[z], float), *masks, labeled[z]
        slices.append(Slice(z, *arrays, int(missed[z]), int(false[z]), counts[:2, :, z]))
    return slices


def _errors_by_slice(prediction, truth, ids, *, labeled, spacing, tolerance):
    """(4, D): voxels of a class in each slice that are missed, false, wrong at all, and true."""
    prediction, truth = mask_of(prediction, ids) & labeled, mask_of(truth, ids) & labeled
    missed = truth & ~dilate(prediction, tolerance, spacing)
    false = prediction & ~dilate(truth, tolerance, spacing)
    return np.array([m.sum(axis=(1, 2)) for m in (missed, false, truth ^ prediction, truth)])


def _columns(classes):
    """Slices of a case in a picture: of several classes each is drawn twice."""
    return 3 if classes is None else 2


def draw_slices(cases, *, title, tolerance, classes=None):
    """A matplotlib figure with a row for each of [(case id, its score as text, [`Slice`])].

    A slice is one panel, or the truth beside the prediction if there are classes: {name: ids}.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    height, width = cases[0][2][0].image.shape
    columns = _columns(classes) * (1 if classes is None else 2)
    size = columns * 3.6 + 0.7, len(cases) * (3.6 * height / width + 0.3) + 0.8
    figure = Figure(size, dpi=110, layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for row, (case, score, slices) in zip(axes, cases, strict=True):
        for panel in row:
            panel.set(xticks=[], yticks=[], frame_on=False)
        drawn = [panel for one in slices for panel in _panels(one, classes)]
        for panel, (heading, picture) in zip(row, drawn, strict=False):
            panel.imshow(picture, interpolation="antialiased")
            panel.set_title(heading, fontsize=9)
        row[0].set_ylabel(f"{case}\n{score}", fontsize=9)
    all_labeled = all(one.labeled.all() for _, _, slices in cases for one in slices)
    patches = _legend(classes, all_labeled)
    colors = "" if classes is None else "solid: wrong, pale: right; "
    counts = f"counts of voxels off by more than {tolerance}"
    figure.suptitle(f"{title}: the worst slices; {colors}{counts}")
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(len(patches), 8), frameon=False
    )
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name begins no formula
    return figure


def _panels(one, classes):
    """[(heading, picture)] of a `Slice`."""
    if classes is None:
        picture = overlay(one.image, one.truth[0], one.mask[0], one.labeled)
        return [(f"z {one.z}: {one.missed} missed, {one.false} false", picture)]
    panels = []
    sides = ("truth", "missed", one.truth, one.mask), ("prediction", "false", one.mask, one.truth)
    for counts, (role, kind, shown, other) in zip(one.by_class, sides, strict=True):
        most = sorted(zip(counts, classes, strict=True), key=lambda pair: -pair[0])
        far = ", ".join(f"{number} {name}" for number, name in most if number) or "nothing"
        far = textwrap.shorten(far, 42, placeholder=" ...")
        picture = overlay_classes(one.image, shown, other, one.labeled)
        panels.append((f"z {one.z}, {role}\n{kind}: {far}", picture))
    return panels


def _legend(classes, all_labeled):
    """The patches of a legend."""
    from matplotlib.patches import Patch

    colors = {"found": FOUND, "missed": MISSED, "false": FALSE}
    if classes is not None:
        colors = {name: class_color(number) for number, name in enumerate(classes)}
    if not all_labeled:
        colors["unlabeled: darker"] = "#505050"
    return [Patch(color=color, label=label) for label, color in colors.items()]
