"""The benchmark before the long run: what it measures, and what it says of it."""

import functools
import json
import math
import multiprocessing

import pytest
import torch

import data
import tune
from runtime import build as planning
from runtime import costs, trial
from runtime import timer as clock
from runtime.costs import Measured
from tests.runtime.test_trial import SHAPE, make_root, make_settings

GPU_ONLY = {"transfer", "gpu_training", "gpu_inference"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(status, report) of the benchmark on a tiny data set."""
    folder = tmp_path_factory.mktemp("tune")
    out = folder / "figures.json"
    before = {*make_root(folder).iterdir(), out}
    status = tune.main(make_settings(folder), steps=4, out=out)
    assert set(folder.iterdir()) == before  # no run folder, no partial file
    return status, json.loads(out.read_text())


# ---------------------------------------------------------------------------- measuring


def test_every_figure_is_measured_or_wants_a_gpu(measured):
    figures = measured[1]["figures"]
    assert figures.keys() == tune.FIGURES.keys()
    wanting = {name for name, f in figures.items() if f["verdict"] == "not measured: no GPU"}
    assert wanting == GPU_ONLY
    assert all((f["value"] is None) == (name in GPU_ONLY) for name, f in figures.items())


def test_the_figures_are_of_this_data_set(measured):
    figures = measured[1]["figures"]
    assert figures["fill"]["note"].endswith("4 of 4 cases kept")
    assert figures["pass"]["note"] == "4 cases, 0 workers"
    assert figures["folds"]["value"] < 200
    assert 0.1 < figures["tree"]["value"] < 3  # this process, with torch in it


def test_the_step_has_all_its_parts_and_without_data_those_of_the_device(measured):
    seconds, figures = measured[1]["seconds"], measured[1]["figures"]
    assert tuple(seconds["real"]) == (*clock.PARTS, "step")
    assert tuple(seconds["synthetic"]) == (*clock.PARTS[3:], "step")
    real, synthetic = (figures[name]["value"] for name in ("step", "synthetic"))
    assert figures["ratio"]["value"] == pytest.approx(real / synthetic)
    assert figures["draw"]["value"] == pytest.approx(1e3 * seconds["real"]["draw"])


def test_the_status_says_whether_something_is_over(measured):
    over = [name for name, f in measured[1]["figures"].items() if f["verdict"] == "over"]
    assert measured[0] == (1 if over else 0)


def test_an_epoch_pass_reads_with_the_workers_and_stops_them(tmp_path):
    plan = planning.resolve(make_settings(make_root(tmp_path), "training.workers=1"))
    patches = planning.make_patches(plan)
    found = costs.measure_pass(plan, patches)["pass"]
    # Two batches in the pass, and four before it that are not timed: two epochs of two.
    assert patches.cache.counts()["hits"] + patches.cache.counts()["misses"] == 12
    assert found.note == "4 cases, 1 workers" and found.value < 30
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("count", [5, 6])
def test_a_pass_draws_each_case(tmp_path, monkeypatch, count):
    plan, drawn = planning.resolve(make_settings(make_root(tmp_path, (SHAPE,) * count))), []
    draw = data.PatchDataset.__getitem__

    def watched(patches, place):
        drawn.append(draw(patches, place)["case"])
        return draw(patches, place)

    monkeypatch.setattr(data.PatchDataset, "__getitem__", watched)
    costs.measure_pass(plan, planning.make_patches(plan))
    # Three batches of two, of which one case of five is drawn twice; and before them, three that
    # are not timed.
    assert len(drawn) == 12
    assert set(drawn[:6]) == set(drawn[6:]) == {f"slab{i}" for i in range(count)}


def test_the_file_cache_forgets_each_case_before_it_is_read(tmp_path, monkeypatch):
    plan = planning.resolve(make_settings(make_root(tmp_path)))
    patches, forgotten, read = planning.make_patches(plan), [], []
    fill = patches.cache.read

    def watched(case, *arguments):
        assert forgotten.count(case.path) == 1
        read.append(case.path)
        return fill(case, *arguments)

    monkeypatch.setattr(costs, "_forget_pages", forgotten.append)
    monkeypatch.setattr(patches.cache, "read", watched)
    costs.measure_fill(plan, patches)
    assert sorted(forgotten) == sorted(read) == sorted(case.path for case in plan.split.train)


def test_steps_of_the_warm_up_are_not_counted(tmp_path, monkeypatch):
    plan = planning.resolve(make_settings(make_root(tmp_path)))

    def slow_at_first(step, numbers, device):
        return [
            dict.fromkeys(clock.PARTS, 1.0) | {"wait": 99.0 if i < costs.WARM_UP else 1.0}
            for i, _ in enumerate(numbers)
        ]

    monkeypatch.setattr(trial, "run_steps", slow_at_first)
    found, details = costs.measure_training(plan, planning.make_patches(plan), steps=2)
    whole = len(clock.PARTS)
    assert details["real"]["step"] == details["synthetic"]["step"] == whole
    assert found["step"].value == 1e3 * whole and found["wait"].value == pytest.approx(100 / whole)


@pytest.mark.parametrize("where", ["train", "validation", "test"])
def test_inference_is_measured_on_the_largest_case_of_all(tmp_path, monkeypatch, where):
    # The second has the longest side, the third the most voxels.
    root = make_root(tmp_path, (SHAPE, (8, 24, 40), (20, 30, 30), SHAPE, SHAPE))
    named = [] if where == "train" else [f"data.{where}=[slab2]"]
    plan, seen = planning.resolve(make_settings(root, *named)), []

    def watched(network, image, **settings):
        seen.append((image.shape, settings["ratio"]))
        return iter(())

    monkeypatch.setattr(costs.windows, "predict_slabs", watched)
    costs.measure_inference(plan)
    assert seen == [((1, 20, 30, 30), [1, 1, 1])]


def test_accumulated_steps_are_measured_with_all_their_batches(tmp_path, monkeypatch):
    settings = make_settings(make_root(tmp_path), "training.accumulate=2")
    plan, draw, drawn = planning.resolve(settings), planning.draw, []

    def watched(*arguments):
        drawn.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(planning, "draw", watched)
    found, details = costs.measure_training(plan, planning.make_patches(plan), steps=1)
    assert len(drawn) == 2 * (costs.WARM_UP + 1) + 1  # and one for the steps without data
    assert found["draw"].value == pytest.approx(1e3 * details["real"]["draw"] / 2)
    assert found["ram_training"].value >= 0
    drawn.clear()
    costs.measure_folds(plan)
    assert len(drawn) == 2 * costs.FOLDS * costs.FOLD_STEPS


def test_inference_is_measured_before_training_leaves_its_memory_behind(tmp_path, monkeypatch):
    order = []

    def fake(name, result, *_):
        order.append(name)
        return result

    for name in ("fill", "pass", "inference", "training", "folds"):
        result = ({}, {}) if name == "training" else {}
        monkeypatch.setattr(costs, f"measure_{name}", functools.partial(fake, name, result))
    tune.measure(planning.resolve(make_settings(make_root(tmp_path))), steps=1)
    assert order == ["fill", "pass", "inference", "training", "folds"]


def test_a_cache_that_holds_half_says_so(tmp_path):
    plan = planning.resolve(make_settings(make_root(tmp_path), "data.cache_gb=0.00005"))
    fill = costs.measure_fill(plan, planning.make_patches(plan))["fill"]
    assert "2 of 4 cases kept" in fill.note


def test_a_network_that_finds_no_memory_is_over_and_the_rest_is_not_measured(
    tmp_path, monkeypatch, capsys
):
    def no_memory(plan):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(planning, "make_network", no_memory)
    settings, out = make_settings(make_root(tmp_path)), tmp_path / "figures.json"
    assert tune.main(settings, steps=1, out=out) == 1
    figures = json.loads(out.read_text())["figures"]
    for name in ("gpu_training", "gpu_inference"):
        assert (figures[name]["verdict"], figures[name]["value"]) == ("over", None)
    for name in ("step", "wait", "transfer", "folds", "ram_training"):
        assert figures[name]["verdict"] == "not measured: out of memory"
    assert "GPU memory in training is over: set model.checkpointing=true" in capsys.readouterr().out


# ---------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    "measured, limit, expected",
    [
        (Measured(4.99), 5, "ok"),
        (Measured(5.0), 5, "over"),
        (Measured(0.0), 5, "ok"),
        (Measured(math.inf), 6, "over"),
        (Measured(7.0), None, ""),
        (Measured(None, "no GPU"), 5, "not measured: no GPU"),
        (Measured(None, "no GPU"), None, "not measured: no GPU"),
    ],
)
def test_a_verdict_follows_from_the_value_and_the_figure(measured, limit, expected):
    assert tune.verdict(measured, limit) == expected


def test_folds_are_held_against_the_first_in_both_directions():
    figure = costs.fold_figure([500e6, 620e6, 250e6])
    assert figure == Measured(250.0, "after each: 500, 620, 250")
    assert tune.verdict(figure, tune.FIGURES["folds"].limit) == "over"


def test_drawing_is_told_per_batch_and_the_step_whole():
    figures = costs.step_figures(
        {"draw": 0.01, "forward": 0.03, "step": 0.044}, {"forward": 0.03, "step": 0.04}, 2
    )
    values = {name: figure.value for name, figure in figures.items()}
    assert values == pytest.approx({"draw": 5, "step": 44, "synthetic": 40, "ratio": 1.1})
    assert figures["step"].note == "forward 30.0"


def made_up(**values):
    names = {name: Measured(0.0) for name in tune.FIGURES}
    return names | {name: Measured(value) for name, value in values.items()}, {}


@pytest.mark.parametrize("wait, status", [(4.9, 0), (5.1, 1)])
def test_what_is_over_comes_with_the_setting_to_turn(tmp_path, monkeypatch, capsys, wait, status):
    monkeypatch.setattr(tune, "measure", lambda plan, steps: made_up(wait=wait))
    assert tune.main(make_settings(make_root(tmp_path))) == status
    advice = [line for line in capsys.readouterr().out.splitlines() if " is over: " in line]
    assert len(advice) == status and all("training.workers" in line for line in advice)


# ---------------------------------------------------------------------------- wrong input


def test_a_wrong_data_root_is_one_sentence_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert tune.main(make_settings(tmp_path), out=out) == 2
    assert capsys.readouterr().err.startswith("data.root: expected")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["none/figures.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(tune, "measure", None)
    assert tune.main(make_settings(make_root(tmp_path)), out=tmp_path / name) == 2
    assert capsys.readouterr().err.startswith("--out: expected a file")


def test_figures_that_json_cannot_hold_leave_no_file(tmp_path):
    with pytest.raises(ValueError):
        tune.write_json(tmp_path / "figures.json", {"value": math.nan})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["training.workers=2"], "--benchmark"),
        (["--benchmark", "c.yaml", "--steps", "0"], "--steps"),
        (["--benchmark", "none.yaml"], "none.yaml"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        tune.cli(arguments)
    assert exit_.value.code == 2 and named in capsys.readouterr().err
