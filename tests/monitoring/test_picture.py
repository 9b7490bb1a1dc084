import json
import re
import warnings

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from monitoring import picture
from tests.monitoring.test_health import GB, event
from tests.monitoring.test_records import line, start, step, write_lines
from volumes.colors import class_color, overlay_classes

TITLES = ("loss", "validation", "learning rate", "seconds per step", "memory", "CPU")


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """Draws the run in tmp_path, and gives {first word of the title: axes}; whole: as a file."""
    drawn, save = [], Figure.savefig

    def kept(figure, path):
        drawn.append(figure)
        path.write_bytes(b"")

    def draw(whole=False, **options):
        monkeypatch.setattr(Figure, "savefig", save if whole else kept)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as those of numpy on NaN
            picture.draw_progress(tmp_path, "exp001", **options)
        if whole:
            return None
        result = [axis for axis in drawn[-1].axes if axis.get_title(loc="left")]
        return {re.split("[ ,;]", axis.get_title(loc="left"))[0]: axis for axis in result}

    return draw


def curve(axis, label):
    """{x: y} of the line with this label, without gaps."""
    (result,) = [one for one in axis.lines if one.get_label() == label]
    pairs = zip(result.get_xdata(), result.get_ydata(), strict=True)
    return {float(x): float(y) for x, y in pairs if np.isfinite(y)}


def texts(axis):
    legend = axis.get_legend()
    result = [text.get_text() for text in axis.texts]
    return result + ([text.get_text() for text in legend.get_texts()] if legend else [])


def process(role, rss, cpu=None):
    return {"pid": 1, "role": role, "rss": rss, "pss": None, "cpu": cpu}


# ---------------------------------------------------------------------------- what is drawn


def test_losses_are_drawn_by_name_with_gaps_where_they_were_not_finite(tmp_path, panels):
    losses = [{"total": 4.0, "cldice": 2.0}, {"total": None, "cldice": None}, {"total": 1.0}]
    log = [step(10 * (i + 1), loss=loss) for i, loss in enumerate(losses)]
    write_lines(tmp_path / "log.jsonl", [start(), *log])
    axis = panels()["loss"]
    assert curve(axis, "total") == {10: 4.0, 30: 1.0}
    assert curve(axis, "cldice") == {10: 2.0}
    (total,) = [line for line in axis.lines if line.get_label() == "total"]
    assert list(np.isnan(total.get_ydata())) == [False, True, False]
    assert axis.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 0.1, 0.05], "log"),
        ([1.0, 0.5, 0.2], "linear"),
        ([1.0, 0.0, 0.05], "linear"),  # a zero would be left out
        ([-1.0, 10.0, 0.05], "linear"),
        ([1.0], "linear"),
    ],
)
def test_the_axis_is_one_of_logarithms_where_losses_span_much(tmp_path, panels, values, scale):
    log = [step(i, loss={"total": value}) for i, value in enumerate(values)]
    write_lines(tmp_path / "log.jsonl", log)
    axis = panels()["loss"]
    assert axis.get_yscale() == scale
    low, high = axis.get_ylim()
    assert low <= min(values) and max(values) < high


def test_a_term_of_few_steps_is_a_line_without_gaps(tmp_path, panels):
    losses = [{"total": 1.0, "toploss": 2.0}, {"total": 1.0}, {"total": 1.0, "toploss": 4.0}]
    log = [step(i, loss=loss) for i, loss in enumerate(losses)]
    write_lines(tmp_path / "log.jsonl", log)
    (term,) = [one for one in panels()["loss"].lines if one.get_label() == "toploss"]
    assert (list(term.get_xdata()), list(term.get_ydata())) == ([0, 2], [2.0, 4.0])


def test_a_noisy_loss_has_its_running_mean(tmp_path, panels):
    log = [step(i, loss={"total": 2.0 + (-1) ** i}) for i in range(400)]
    write_lines(tmp_path / "log.jsonl", log)
    mean = curve(panels()["loss"], "total")
    assert len(mean) == 400
    assert all(abs(mean[i] - 2.0) < 0.11 for i in range(20, 380))  # of 10 values


def test_scores_are_drawn_with_the_best_of_the_one_that_chooses(tmp_path, panels):
    scores = [(0, 0.0), (10, 0.8), (20, 0.9), (30, 0.7), (40, 0.8), (50, 0.8)]
    log = [
        event(
            "evaluation",
            s,
            scores={"dice": v, "components": 12, "cldice_loss": 0.3, "recall": None},
        )
        for s, v in scores
    ]
    write_lines(tmp_path / "log.jsonl", [start(score="dice", better={"dice": "higher"}), *log])
    result = panels()
    axis = result["validation"]
    assert curve(axis, "dice") == dict(scores)
    (star,) = [one for one in axis.lines if one.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (20, 0.9)
    assert "components" not in texts(axis) and "cldice_loss" not in texts(axis)
    assert axis.get_ylim() == pytest.approx((0.66, 0.94))  # not for the untrained network
    write_lines(tmp_path / "log.jsonl", [start(score="dice", better={"dice": "higher"}), *log[:5]])
    assert panels()["validation"].get_ylim() == pytest.approx((-0.01, 0.94))  # of so few, for all
    assert curve(result["loss"], "cldice, validation") == {step: 0.3 for step, _ in scores}


def test_of_classes_the_mean_of_each_score_is_drawn_and_the_main_one_of_each_class_in_its_color(
    tmp_path, panels
):
    values = {"artery": 0.8, "vein": 0.6, "mean": 0.7}
    scores = {f"{name}/{which}": v for name in ("dice", "recall") for which, v in values.items()}
    log = [event("evaluation", step, scores=scores) for step in (10, 20)]
    write_lines(tmp_path / "log.jsonl", [start(score="dice/mean", better={}), *log])
    axis = panels()["validation"]
    assert texts(axis) == ["dice/artery", "dice/vein", "dice/mean", "recall/mean"]
    drawn = {one.get_label(): to_rgb(one.get_color()) for one in axis.lines}
    assert drawn["dice/artery"] == class_color(0) and drawn["dice/vein"] == class_color(1)
    assert drawn["dice/mean"] == (0, 0, 0)


def test_the_learning_rate_is_drawn(tmp_path, panels):
    write_lines(tmp_path / "log.jsonl", [step(10, lr=0.004), step(20, lr=0.002), step(30)])
    assert curve(panels()["learning"], "learning rate") == {10: 0.004, 20: 0.002}


def test_parts_of_a_step_are_stacked_to_its_length(tmp_path, panels):
    parts = [{"wait": 1.0, "forward": 2.0, "loss": 1.0}, {"wait": 2.0, "forward": 2.0, "loss": 4.0}]
    log = [step(10 * (i + 1), seconds=seconds) for i, seconds in enumerate(parts)]
    write_lines(tmp_path / "log.jsonl", log)
    axis = panels()["seconds"]
    assert texts(axis) == ["wait 25 %", "forward 25 %", "loss 50 %"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axis.collections]
    assert tops == [2.0, 4.0, 8.0]


def machine(number, tree, **changes):
    rooms = [[40 * GB, 64 * GB, "memory of this machine"], [4 * GB, 16 * GB, "cgroup limit"]]
    processes = [process("training", 4 * GB, 150.0), process("worker 0", GB, 40.0)]
    processes.append(process("worker 1", 2 * GB, 60.0))
    return line(number, tree=tree * GB, rooms=rooms, processes=processes, gpus=[], **changes)


def test_memory_is_drawn_with_the_tightest_limit_in_the_title(tmp_path, panels):
    write_lines(tmp_path / "system.jsonl", [machine(10, 8), machine(20, 12)])
    axis = panels()["memory"]
    assert curve(axis, "all processes") == {10: 8 * GB, 20: 12 * GB}
    assert curve(axis, "training") == {10: 4 * GB, 20: 4 * GB}
    assert curve(axis, "largest worker") == {10: 2 * GB, 20: 2 * GB}
    title = "memory; 4.0 GB free of 16.0 GB, cgroup limit"
    assert axis.yaxis.get_major_formatter()(8 * GB) == "8.0 GB"
    assert (axis.get_title(loc="left"), axis.get_ylim()[0]) == (title, 0)


def test_without_a_gpu_the_cpu_is_drawn(tmp_path, panels):
    write_lines(tmp_path / "system.jsonl", [machine(10, 8), machine(20, 8)])
    axis = panels()["CPU"]
    assert curve(axis, "training") == {10: 150.0, 20: 150.0}
    assert curve(axis, "workers, mean") == {10: 50.0, 20: 50.0}


def test_load_and_memory_of_each_gpu_are_drawn_in_percent(tmp_path, panels):
    gpus = [{"index": 0, "used": 20 * GB, "total": 80 * GB, "load": 97}]
    gone = [{"index": 0, "used": None, "total": None, "load": None}]
    lines = [{**machine(10, 8), "gpus": gpus}, {**machine(20, 8), "gpus": gone}, machine(30, 8)]
    write_lines(tmp_path / "system.jsonl", lines)
    axis = panels()["GPU"]
    assert curve(axis, "load of GPU 0") == {10: 97.0}
    assert curve(axis, "memory of GPU 0") == {10: 25.0}


def test_resumes_and_troubles_are_marked_at_their_steps_in_every_panel(tmp_path, panels):
    trouble = event("trouble", 15, kind="worker died", text="it died")
    log = [start(), step(10), trouble, start(12, resumed=True), step(20), event("crash", 20)]
    write_lines(tmp_path / "log.jsonl", log)
    for axis in panels().values():
        dashed = [one.get_xdata()[0] for one in axis.lines if one.get_linestyle() == "--"]
        (triangles,) = [one for one in axis.lines if one.get_marker() == "^"]
        assert (dashed, list(triangles.get_xdata())) == ([12], [15, 20])
        assert axis.get_xlim() == pytest.approx((-0.4, 20.4))


# ---------------------------------------------------------------------------- runs with little


def test_one_point_is_seen_as_one(tmp_path, panels):
    write_lines(tmp_path / "log.jsonl", [start(), step(5, loss={"total": 0.5}, lr=0.1)])
    result = panels()
    assert [one.get_marker() for one in result["loss"].lines[:1]] == ["."]
    assert result["learning"].lines[0].get_marker() == "."
    panels(whole=True)
    assert (tmp_path / "progress.png").stat().st_size > 10_000


@pytest.mark.parametrize("log", [[], [start()], [event("evaluation", 0, scores={})]])
def test_panels_without_anything_to_draw_say_so(tmp_path, panels, log):
    write_lines(tmp_path / "log.jsonl", log)
    result = panels()
    assert (
        tuple(re.split("[,;]", axis.get_title(loc="left"))[0] for axis in result.values()) == TITLES
    )
    assert [axis.texts[0].get_text() for axis in result.values()] == ["nothing yet"] * 6


def test_a_log_of_nulls_is_drawn(tmp_path, panels):
    nothing = {"loss": {"total": None}, "lr": None, "seconds": {"wait": None}, "step_seconds": None}
    scores = event("evaluation", 1, scores={"dice": None})
    write_lines(tmp_path / "log.jsonl", [start(), step(1, **nothing), scores])
    write_lines(tmp_path / "system.jsonl", [line(1, tree=None, rooms=[], processes=[], gpus=[])])
    panels(whole=True)
    assert (tmp_path / "progress.png").stat().st_size > 10_000


def test_a_log_that_is_cut_short_is_drawn_to_its_last_whole_line(tmp_path, panels):
    lines = [step(1, loss={"total": 1.0}), step(2, loss={"total": 2.0})]
    write_lines(tmp_path / "log.jsonl", [*lines, json.dumps(step(3, loss={"total": 3.0}))[:40]])
    assert curve(panels()["loss"], "total") == {1: 1.0, 2: 2.0}


# ---------------------------------------------------------------------------- slices


def slices(height=40, width=60):
    truth = np.zeros((height, width), bool)
    truth[10:20] = True
    probs = np.where(np.roll(truth, 5, axis=0), 0.75, 0.25).astype(np.float32)
    labeled = np.ones_like(truth)
    labeled[:, : width // 2] = False
    image = np.arange(height * width, dtype=np.float32).reshape(height, width)
    masks = {"truth": {"bar": truth}, "mask": {"bar": probs >= 0.5}}
    about = {"case": "a$", "z": 7, "image": image, "labeled": labeled}
    return {**about, "probs": probs[None], **masks}


def test_the_picture_is_wide_enough_to_read_and_has_a_row_more_with_slices(tmp_path, panels):
    write_lines(tmp_path / "log.jsonl", [start(), step(1, loss={"total": 1.0})])
    panels(whole=True)
    with Image.open(tmp_path / "progress.png") as without:
        assert without.size == (1200, 600)
    panels(whole=True, slices=slices())
    with Image.open(tmp_path / "progress.png") as drawn:
        assert drawn.size == (1200, 920)
        assert len(np.unique(np.asarray(drawn)[650:900, 900:1100, :3].reshape(-1, 3), axis=0)) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "progress.png"]


def test_a_slice_of_classes_shows_truth_and_prediction_in_a_color_for_each_with_a_legend(
    tmp_path, panels, monkeypatch
):
    given = slices()
    artery, vein = given["truth"]["bar"], np.roll(given["truth"]["bar"], 20, axis=0)
    given["truth"] = {"artery": artery, "vein": vein}
    given["mask"] = {"artery": artery | vein, "vein": vein & False}
    drawn = []
    monkeypatch.setattr(
        Axes, "imshow", lambda axis, shown, **how: drawn.append((axis, np.asarray(shown)))
    )
    panels(slices=given)
    (image, plain), (_, truth), (_, prediction) = drawn
    assert plain.ndim == 2 and texts(image) == ["artery", "vein"]
    both = [given[key] for key in ("image", "labeled")]
    masks = [np.stack([*given[key].values()]) for key in ("truth", "mask")]
    assert np.array_equal(truth, overlay_classes(both[0], *masks, both[1]))
    assert np.array_equal(prediction, overlay_classes(both[0], *masks[::-1], both[1]))


def test_names_of_classes_that_look_like_formulas_are_drawn(tmp_path, panels):
    given = slices()
    for key in ("truth", "mask"):
        given[key] = dict.fromkeys(("$a^$", "b$"), given[key]["bar"])
    log = [event("evaluation", 10, scores={"dice/$a^$": 0.8, "dice/b$": 0.6, "dice/mean": 0.7})]
    write_lines(tmp_path / "log.jsonl", [start(score="dice/$a^$", better={}), *log])
    panels(whole=True, slices=given)  # else matplotlib's ValueError, which would end the run
    assert (tmp_path / "progress.png").stat().st_size > 10000
    picture.draw_runs({"$v^$": [tmp_path]}, "dice/$a^$")


def test_a_large_slice_is_drawn(tmp_path, panels):
    panels(whole=True, slices=slices(1500, 900))
    with Image.open(tmp_path / "progress.png") as drawn:
        assert drawn.size == (1200, 920)
