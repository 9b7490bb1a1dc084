"""The benchmark before the long run, and settings that are tried: what is measured and said."""

import json
import multiprocessing
import os

import pytest
import torch

import data
import train
import tune
from runtime import build, config, signals, timer, tuning
from tests.runtime.test_device_memory import TEXTS, card, memory_error
from tests.test_training_step import SHAPE, make_root, make_settings
from tune import Measured

__all__ = ["card"]  # a fixture

GPU_ONLY = {"transfer", "gpu_training", "gpu_inference"}


def make_plan(root, *overrides):
    return build.resolve(make_settings(root, *overrides))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(status, report, what it printed) of the benchmark on a tiny data set, train.py and all."""
    folder = tmp_path_factory.mktemp("tune")
    out = folder / "figures.json"
    before = {*make_root(folder).iterdir(), out}
    with pytest.MonkeyPatch.context() as patch, tune.console.capture() as printed:
        patch.setattr(tune, "FOLDS", 2)
        # On a GPU that others use, and with validation cases, it would measure the same.
        plan = make_plan(folder, "data.validation=[slab3]", "monitor.log_every=7")
        status = tune.benchmark(plan, steps=4, json_file=out)
    assert set(folder.iterdir()) == before  # no run folder, no partial file
    return status, json.loads(out.read_text()), printed.get()


# ---------------------------------------------------------------------------- measuring


def test_every_figure_is_measured_or_wants_a_gpu(measured):
    figures = measured[1]["figures"]
    assert figures.keys() == tune.FIGURES.keys()
    wanting = {name for name, f in figures.items() if f["verdict"] == "not measured: no GPU"}
    assert wanting == GPU_ONLY
    assert all((f["value"] is None) == (name in GPU_ONLY) for name, f in figures.items())


def test_the_figures_are_of_this_data_set(measured):
    figures = measured[1]["figures"]
    assert figures["fill"]["note"].endswith("of 3 cases held")
    assert figures["pass"]["note"] == "3 cases, 0 workers"
    assert figures["folds"]["value"] < 200
    assert 0.1 < figures["ram_training"]["value"] < 3  # a process with torch in it


def test_the_step_has_all_its_parts(measured):
    figures = measured[1]["figures"]
    parts = dict(part.split() for part in figures["step"]["note"].split(", "))
    assert list(parts) == [part for part in timer.PARTS if part != "ranks"]
    assert figures["augment"]["value"] == pytest.approx(float(parts["augment"]), abs=0.06)
    assert sum(map(float, parts.values())) == pytest.approx(figures["step"]["value"], rel=0.05)


def test_the_status_says_whether_something_is_over(measured):
    over = [name for name, f in measured[1]["figures"].items() if f["verdict"] == "over"]
    assert measured[0] == (1 if over else 0)


def test_an_epoch_pass_reads_with_the_workers_and_stops_them(tmp_path):
    plan = make_plan(make_root(tmp_path), "training.workers=1")
    patches = build.make_patches(plan)
    figure = tune.measure_pass(plan, patches)["pass"]
    # Two batches in the pass, and four before it that are not timed: two epochs of two.
    assert patches.cache.counts()["hits"] + patches.cache.counts()["misses"] == 12
    assert figure.note == "4 cases, 1 workers" and 0 < figure.value < 30
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("count", [5, 6])
def test_a_pass_samples_each_case(tmp_path, monkeypatch, count):
    plan, sampled = make_plan(make_root(tmp_path, (SHAPE,) * count)), []
    sample = data.PatchDataset.__getitem__

    def watched(patches, index):
        sampled.append(sample(patches, index)["case"])
        return sample(patches, index)

    monkeypatch.setattr(data.PatchDataset, "__getitem__", watched)
    tune.measure_pass(plan, build.make_patches(plan))
    # Three batches of two, of which one case of five is sampled twice; and before them, three that
    # are not timed.
    assert len(sampled) == 12
    assert set(sampled[:6]) == set(sampled[6:]) == {f"slab{i}" for i in range(count)}


def test_the_file_cache_forgets_each_case_before_it_is_read(tmp_path, monkeypatch):
    plan = make_plan(make_root(tmp_path))
    patches, forgotten, read = build.make_patches(plan), [], []
    fill = patches.cache.read

    def advise(file, *arguments):
        forgotten.append(os.readlink(f"/proc/self/fd/{file}"))

    def watched(case, *arguments):
        assert forgotten.count(str(case.path)) == 1
        read.append(str(case.path))
        with monkeypatch.context() as patch:  # reading may give advice of its own
            patch.setattr(os, "posix_fadvise", lambda *_: None)
            return fill(case, *arguments)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(patches.cache, "read", watched)
    tune.measure_fill(plan, patches)
    assert sorted(forgotten) == sorted(read) == sorted(str(c.path) for c in plan.split.train)


def step_line(wait, draw=0.02, step=1.0):
    seconds = {
        "wait": wait,
        "transfer": 0.004,
        "augment": draw,
        "forward": step - wait - draw - 0.004,
    }
    return {"event": "step", "seconds": seconds, "step_seconds": step}


def test_steps_of_the_warm_up_are_not_counted(tmp_path, monkeypatch):
    plan = make_plan(make_root(tmp_path), "training.accumulate=2")
    log = [step_line(9.0, step=10.0), *[step_line(wait) for wait in (0.1, 0.2, 0.3)]]
    asked = []

    def run_training(plan, steps):
        asked.append(steps)
        return log, 3e9, None

    monkeypatch.setattr(tune, "run_training", run_training)
    figures = tune.measure_training(plan, steps=15)
    assert asked == [tune.WARM_UP + 15]
    assert figures["wait"].value == pytest.approx(20)
    assert figures["step"].value == pytest.approx(1000)
    assert figures["augment"].value == pytest.approx(10)  # of each of the two batches of a step
    assert figures["ram_training"] == Measured(3.0, "1 + 0 workers")
    assert figures["transfer"] == figures["gpu_training"] == tune.NO_GPU


def on_gpu(plan):
    return type(plan)(**{**vars(plan), "device": torch.device("cuda")})


def test_the_memory_of_a_gpu_is_what_a_run_adds_to_it(tmp_path, monkeypatch):
    plan = on_gpu(make_plan(make_root(tmp_path)))
    log = [step_line(0.1), step_line(0.1)]
    monkeypatch.setattr(tune, "run_training", lambda plan, steps: (log, 3e9, 5.5e9))
    figures = tune.measure_training(plan, 5)
    assert figures["gpu_training"].value == 5.5 and figures["transfer"].value == pytest.approx(4)
    log.append({"event": "trouble", "text": "cuda ran out of memory: from now on ..."})
    assert tune.measure_training(plan, 5)["gpu_training"] == tune.NO_MEMORY


def test_a_run_that_finds_no_memory_for_prediction_is_over(card, tmp_path, monkeypatch):
    errors = [*map(memory_error, TEXTS), signals.CannotGoOn("cuda ran out of memory")]

    def no_memory(plan, report):
        raise errors.pop()

    monkeypatch.setattr(tune, "_predict_slabs", no_memory)
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    plan = on_gpu(make_plan(make_root(tmp_path)))
    while errors:
        assert tune.measure_inference(plan) == {"gpu_inference": tune.NO_MEMORY}
    errors.append(RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        tune.measure_inference(plan)
    assert tune.verdict(tune.NO_MEMORY, 7) == "over"


@pytest.mark.parametrize("where", ["train", "validation", "test"])
def test_inference_is_measured_on_the_largest_case_of_all(tmp_path, monkeypatch, where):
    # The second has the longest side, the third the most voxels.
    root = make_root(tmp_path, (SHAPE, (8, 24, 40), (20, 30, 30), SHAPE, SHAPE))
    named = [] if where == "train" else [f"data.{where}=[slab2]"]
    plan, seen = make_plan(root, *named), []

    def watched(network, image, **settings):
        seen.append((image.shape, settings["ratio"]))
        return iter(())

    monkeypatch.setattr(tune.sliding_window, "predict_slabs", watched)
    tune._predict_slabs(plan, report=None)
    assert seen == [((1, 20, 30, 30), [1, 1, 1])]


@pytest.mark.parametrize("rim", [False, True])
def test_prediction_works_as_it_is_called_also_with_several_classes(tmp_path, rim):
    reports, plan = [], make_plan(make_root(tmp_path, rim=rim))
    assert plan.outputs.channels == (3 if rim else 1)
    tune._predict_slabs(plan, report=lambda *a, **f: reports.append(a))
    assert reports == []  # nothing ran out of memory


def test_each_fold_trains_on_its_own_cases(tmp_path, monkeypatch):
    plan, sizes, cases = make_plan(make_root(tmp_path), "data.folds=4"), [5e8, 6.2e8, 2.5e8], []

    def run_training(plan, steps):
        cases.append({case.id for case in plan.split.train})
        return [], sizes[len(cases) - 1], None

    monkeypatch.setattr(tune, "run_training", run_training)
    figure = tune.measure_folds(plan)["folds"]
    assert all(len(ids) == 3 for ids in cases) and len(set.union(*cases)) == 4
    # Held against the first in both directions.
    assert figure == Measured(250.0, "each: 500, 620, 250")
    assert tune.verdict(figure, tune.FIGURES["folds"].limit) == "over"


def test_a_training_that_fails_is_named_and_the_rest_is_measured(tmp_path, monkeypatch):
    plan = make_plan(make_root(tmp_path))
    dataset = tmp_path / "dataset.json"
    dataset.rename(tmp_path / "elsewhere")
    reason = "train.py ended with exit status 2: data.root: expected"
    with pytest.raises(ValueError, match=reason) as caught:
        tune.run_training(plan, 1)

    def fail(plan, steps):
        raise caught.value

    monkeypatch.setattr(tune, "run_training", fail)
    figures = tune.measure(plan, 1)
    assert figures.keys() == tune.FIGURES.keys()
    missing = {name for name, figure in figures.items() if reason in figure.note}
    assert missing == {
        "transfer",
        "augment",
        "step",
        "wait",
        "gpu_training",
        "ram_training",
        "folds",
    }


def test_a_cache_that_holds_half_says_so(tmp_path, monkeypatch):
    plan = make_plan(make_root(tmp_path))
    patches = build.make_patches(plan)
    monkeypatch.setattr(patches.cache, "counts", lambda: {"cases": 2, "bytes": 1.5e9})
    assert tune.measure_fill(plan, patches)["fill"].note == "1.5 GB, 2 of 4 cases held"


def test_what_train_py_reports_as_trouble_is_printed(tmp_path, monkeypatch, capsys):
    log = [step_line(0.1), step_line(0.1), {"event": "trouble", "text": "worker 1 was killed"}]
    monkeypatch.setattr(tune, "run_training", lambda plan, steps: (log, 1e9, None))
    tune.measure_training(make_plan(make_root(tmp_path)), 5)
    assert "worker 1 was killed" in capsys.readouterr().out


# ---------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    "measured, limit, expected",
    [
        (Measured(4.99), 5, "ok"),
        (Measured(5.0), 5, "over"),
        (Measured(0.0), 5, "ok"),
        (tune.NO_MEMORY, 6, "over"),
        (Measured(7.0), None, ""),
        (tune.NO_GPU, 5, "not measured: no GPU"),
        (tune.NO_GPU, None, "not measured: no GPU"),
    ],
)
def test_a_verdict_follows_from_the_value_and_the_figure(measured, limit, expected):
    assert tune.verdict(measured, limit) == expected


@pytest.mark.parametrize("wait, status", [(4.9, 0), (5.1, 1)])
def test_what_is_over_comes_with_the_setting_to_turn(tmp_path, monkeypatch, capsys, wait, status):
    made_up = dict.fromkeys(tune.FIGURES, Measured(0.0)) | {"wait": Measured(wait)}
    monkeypatch.setattr(tune, "measure", lambda plan, steps: made_up)
    assert tune.benchmark(make_plan(make_root(tmp_path))) == status
    advice = [line for line in capsys.readouterr().out.splitlines() if " is over: " in line]
    assert len(advice) == status and all("training.workers" in line for line in advice)


# ---------------------------------------------------------------------------- the command line


def write_config(root):
    path = root / "tiny.yaml"
    path.write_text(f"data: {{root: {root}}}\nsampling: {{patch: [8, 16, 16]}}\n")
    return str(path)


def test_the_contact_sheet_is_of_the_first_training_case(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        tune.contact_sheet, "write_sheet", lambda *args, **kw: calls.append((args, kw))
    )
    command = [write_config(make_root(tmp_path)), "--contact-sheet", "sheet.png", "run.seed=3"]
    assert tune.cli([*command, "data.validation=[slab0]", "augment.elastic=1"]) == 0
    ((path, case, augment), keywords) = calls[0]
    assert (str(path), case.id, augment["elastic"]) == ("sheet.png", "slab1", 1)
    assert keywords["patch"] == (8, 16, 16) and keywords["spacing"] == (2, 1, 1)
    assert (*keywords["regions"].values(), keywords["ignore_label"]) == ((1,), None)
    assert keywords["scale"].keys() == {"mean", "std", "low", "high"}
    assert (keywords["seed"], keywords["name"]) == (3, "tiny")
    assert "wrote sheet.png" in capsys.readouterr().out


def test_a_wrong_data_root_is_one_sentence_and_nothing_is_written(tmp_path, capsys):
    config = write_config(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        tune.cli([config, "--benchmark", "--json", str(tmp_path / "figures.json")])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("data.root: expected")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("name", ["none/figures.json", "."])
def test_a_path_that_cannot_be_written_is_refused_before_measuring(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(tune, "measure", None)
    config = write_config(make_root(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        tune.cli([config, "--benchmark", "--json", str(tmp_path / name)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("--json: expected a file")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["none.yaml", "training.workers=2"], "none.yaml"),
        (["c.yaml", "--steps", "14"], "--steps: expected 15 or more"),
        (["c.yaml", "--benchmark", "--out", "t.yaml"], "--out: expected neither"),
        (["c.yaml", "--benchmark", "--contact-sheet", "a.png"], "not allowed with"),
        (["c.yaml", "--benchmark", "--steps", "0"], "--steps"),
        (["none.yaml", "--benchmark"], "none.yaml"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        tune.cli(arguments)
    assert exit_.value.code == 2 and named in capsys.readouterr().err


# ---------------------------------------------------------------------------- tuning

NO_MEMORY_FOR_FOUR = """
import torch
conv3d = torch.nn.functional.conv3d
def limited(image, *arguments, **keywords):
    if len(image) >= 4 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return conv3d(image, *arguments, **keywords)
torch.nn.functional.conv3d = limited
"""


def test_a_batch_that_finds_no_memory_is_taken_back_by_the_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY_FOR_FOUR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tuning, "LADDERS", dict.fromkeys(tuning.LADDERS, ()) | {tuning.BATCH: (4,)})
    config_file, out = write_config(make_root(tmp_path)), str(tmp_path / "tuned.yaml")
    for phase in ("precision", "checkpointing"):
        monkeypatch.setattr(tuning.Tuner, phase, lambda self: None)
    words = ["training.accumulate=2", "training.workers=0", "model.base=4", "run.threads=1"]
    before = {*tmp_path.iterdir()}
    assert tune.cli([config_file, *words, "--steps", "15", "--out", out]) == 0
    assert {*tmp_path.iterdir()} - before == {tmp_path / "tuned.yaml"}
    printed = capsys.readouterr().out
    (said,) = [x for x in printed.splitlines() if x.startswith("batch      train_batch_size=4")]
    assert "cpu ran out of memory" in said and said.endswith(
        "back to train_batch_size=2 accumulate=2"
    )
    kept = "training.workers=0 model.base=4 run.threads=1"
    assert f"next: python train.py {config_file} {kept} {out}" in printed
    training = config.load(config_file, [out]).training
    assert (training.train_batch_size, training.accumulate) == (2, 2)
    assert said.split(": ")[1] in (tmp_path / "tuned.yaml").read_text()


def test_the_command_to_go_on_with_names_regions_whole(tmp_path, monkeypatch, capsys):
    def measure(plan, steps, changes):
        return tuning.Trial(changes, seconds=1.0, error=0.0, wait=0.1, ram=10**9)

    monkeypatch.setattr(tuning, "measure", measure)
    config_file, out = write_config(make_root(tmp_path, rim=True)), str(tmp_path / "tuned.yaml")
    regions = "data.regions={all: [slab, rim], rim: [rim]}"
    assert tune.cli([config_file, regions, "--out", out]) == 0
    assert f"next: python train.py {config_file} '{regions}' {out}" in capsys.readouterr().out


def test_train_py_takes_what_was_decided_as_a_second_config(tmp_path, monkeypatch):
    config_file, given = write_config(tmp_path), []
    tuning.write_settings(tmp_path / "tuned.yaml", {tuning.WORKERS: 3}, [])
    monkeypatch.setattr(train, "main", lambda settings, resume: given.append((settings, resume)))
    train.cli([config_file, "--resume", str(tmp_path / "tuned.yaml"), "run.seed=5"])
    ((settings, resume),) = given
    assert (settings.training.workers, settings.run.seed, resume) == (3, 5, True)
    assert settings.sampling.patch == (8, 16, 16)


def stopped(plan, steps, changes):
    raise signals.Stopped("signal SIGTERM")


def interrupted(plan, steps, changes):
    raise KeyboardInterrupt


def failed(plan, steps, changes):
    return tuning.Trial(changes, fault="memory is short [made up]")


@pytest.mark.parametrize(
    "measure, status, text",
    [
        (stopped, 75, "stopped: signal SIGTERM"),
        (interrupted, 75, "stopped: interrupted"),
        (failed, 1, "memory is short [made up]"),
    ],
)
def test_without_a_decision_nothing_is_written(
    tmp_path, monkeypatch, capsys, measure, status, text
):
    monkeypatch.setattr(tuning, "measure", measure)
    config_file = write_config(make_root(tmp_path))
    before = {*tmp_path.iterdir()}
    assert tune.cli([config_file, "--out", str(tmp_path / "tuned.yaml")]) == status
    assert {*tmp_path.iterdir()} == before and text in capsys.readouterr().out


def test_a_file_that_is_read_is_not_written(tmp_path, capsys):
    config_file = write_config(make_root(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        tune.cli([config_file, "--out", config_file])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("--out: expected another file")
