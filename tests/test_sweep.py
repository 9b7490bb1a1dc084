"""Sweeps: what a file asks for, the ledger, runs that fail or are killed, and the comparison."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import sweep
from runtime import build, comparison, config, jobs
from runtime.outputs import Outputs
from scoring import report
from tests.test_training_step import make_root
from volumes.classes import parsed

ROOT, FORK = Path(__file__).parents[1], multiprocessing.get_context("fork")
TINY = {  # as few settings as a run of the real scripts needs
    "run": {"device": "cpu", "threads": 1},
    "sampling": {"patch": [8, 16, 16]},
    "model": {"base": 4, "multipliers": [1, 2]},
    "optim": {"lr": 1e-2, "warmup_steps": 0},
    "training": {"max_epochs": 1, "train_iterations_per_epoch": 2, "workers": 0},
    "validation": {"untrained": False},
    "monitor": {"tensorboard": False, "picture": False, "log_every": 1},
}
TINY["training"]["precision"] = "fp32"  # on every processor


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture
def base(tmp_path):
    """The config of tiny runs on four cases."""
    root = tmp_path / "data"
    root.mkdir()
    return write(tmp_path / "base.yaml", TINY | {"data": {"root": str(make_root(root))}})


def write_sweep(base, **content):
    folder = str(Path(base).parent / "runs")
    content = {"config": base, "settings": {"run.folder": folder}, **content}
    return write(Path(base).parent / "small.yaml", content)


# ---------------------------------------------------------------------------- what is asked for


def test_variants_times_folds_times_seeds_in_this_order(base):
    variants = {"bce": None, "cldice": {"loss.cldice.weight": 0.2}}
    folder, listed = jobs.expand(write_sweep(base, variants=variants, folds=2, seeds=[0, 7]))
    assert folder == Path(base).parent / "runs" / "small"
    assert [job.name for job in listed] == [
        f"{variant}_fold{fold}_seed{seed}"
        for variant in ("bce", "cldice")
        for fold in (0, 1)
        for seed in (0, 7)
    ]
    job = listed[7]
    assert (job.index, job.settings.run.seed, job.settings.loss.cldice.weight) == (7, 7, 0.2)
    assert (job.settings.data.folds, job.settings.data.fold) == (2, 1)
    assert listed[3].settings.loss.cldice.weight == 0
    # What train.py is given on its command line means the same.
    assert config.load(base, jobs.overrides(job.changes)).plain() == job.settings.plain()


def test_a_grid_is_every_combination_each_with_a_name_for_a_folder(base):
    grid = {"optim.lr": [1e-3, 0.01], "optim.schedule": ["cosine", "constant"]}
    _, listed = jobs.expand(write_sweep(base, grid=grid))
    assert [job.name for job in listed] == [
        f"lr-{lr}_schedule-{schedule}_seed0"
        for lr in ("0.001", "0.01")
        for schedule in ("cosine", "constant")
    ]
    assert [job.settings.optim.lr for job in listed] == [1e-3, 1e-3, 0.01, 0.01]


def names_of(base, **grid):
    _, listed = jobs.expand(write_sweep(base, grid=grid))
    return [job.name.removesuffix("_seed0") for job in listed]


def test_keys_of_a_grid_that_end_alike_are_named_in_full(base):
    keys = {"model.dropout": [0.1], "augment.dropout": [0.1, 0.2], "optim.lr": [0.01]}
    assert names_of(base, **keys) == [
        f"model.dropout-0.1_augment.dropout-{share}_lr-0.01" for share in (0.1, 0.2)
    ]
    keys = {"loss.cldice.weight": [0.1], "loss.toploss.weight": [0.1]}
    assert names_of(base, **keys) == ["cldice.weight-0.1_toploss.weight-0.1"]


def test_values_of_a_grid_whose_names_would_be_one_or_too_long_get_short_names_each(base):
    assert names_of(base, **{"data.root": ["a/b", "a b", "a-b"]}) == [
        "root-a-b", "root-a-b+", "root-a-b++",
    ]  # fmt: skip
    assert names_of(base, **{"data.root": ["x" * 500 + "1", "x" * 500 + "2"]}) == [
        f"root-{'x' * 30}", f"root-{'x' * 30}+",
    ]  # fmt: skip


def test_a_date_among_the_values_is_a_text(base):
    path = write_sweep(base)
    Path(path).write_text(f"{Path(path).read_text()}\ngrid: {{data.root: [2024-01-31]}}\n")
    _, (job,) = jobs.expand(path)
    assert job.name == "root-2024-01-31_seed0" and job.settings.data.root == "2024-01-31"
    jobs.Ledger(Path(base).parent / "ledger.jsonl").append({"settings": job.changes})


def test_without_variants_folds_and_seeds_it_is_one_run_of_the_config(base):
    _, (job,) = jobs.expand(write_sweep(base))
    assert (job.name, job.fold, job.settings.data.folds) == ("base_seed0", None, 0)


FAULTS = {
    "key": ({"variant": {}}, ["variant: no such setting; the nearest valid key is variants"]),
    "settings": (
        {"settings": {"optim.rl": 1}, "variants": {"a": None, "b": None}},
        ["optim.rl: no such setting; the nearest valid key is optim.lr"],
    ),
    "variants": (
        {"variants": {"a": None, "b": {"optim.lr": -1}, "c": {"model.bse": 4}}},
        [
            "variants.b: optim.lr: expected a number greater than 0, got -1",
            "variants.c: model.bse: no such setting; the nearest valid key is model.base",
        ],
    ),
    "group": ({"variants": {"a": {"optim": {}}}}, ["optim={}: expected group.key=value"]),
    "seed": ({"settings": {"run.seed": 3}}, ["settings: run.seed comes from seeds"]),
    "folder": ({"grid": {"run.folder": ["a"]}}, ["grid: run.folder comes from settings"]),
    "both": ({"variants": {"a": None}, "grid": {"optim.lr": [1]}}, ["grid: expected either this"]),
    "name": ({"variants": {"a b": None}}, ["variants: expected names of letters"]),
    "empty": ({"grid": {"optim.lr": []}}, ["grid: expected one value or more"]),
    "twice": ({"grid": {"optim.lr": [1.0, 1.0]}}, ["grid: expected one value or more"]),
    "run folder": (
        {"settings": {"run.folder": None}},
        ["run.folder: expected a valid string, got None"],
    ),
    "seeds": ({"seeds": [1, 1], "folds": 1}, ["seeds: expected each once", "folds: expected 2"]),
    "type": ({"folds": "two"}, ["folds: expected a valid integer, got 'two'"]),
    "config": ({"config": "nowhere.yaml"}, ["nowhere.yaml: expected a config file in YAML"]),
    "no config": ({"config": ""}, ["config: expected the config file of the runs, got none"]),
    "groups": (
        {"folds": 5},
        ["data.folds: expected no more folds than groups in data.train, got 5 for 4 groups"],
    ),
    "one group": (
        {"folds": 3, "settings": {"data.train": ["slab0"]}},
        ["expected no more folds than groups in data.train, got 3 for 1 group; cut a single case"],
    ),
    "held out": ({}, ["folds: expected labeled cases that a run is not trained on, got none"]),
    "cases": (
        {"folds": 2, "variants": {"a": None, "b": {"data.train": ["slab[0-2]"]}}},
        ["variants.b: data: expected the held-out cases of a, got"],
    ),
    "data": (
        {"folds": 2, "variants": {"a": None, "b": {"data.root": "none"}}},
        ["variants.b: data.root: expected a folder made by prepare.py"],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_a_sentence_and_nothing_is_written(base, capsys, case):
    content, sentences = FAULTS[case]
    path = write_sweep(base, **content)
    before = set(Path(base).parent.rglob("*"))
    assert sweep.main([path]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert sweep.main([path, "--print"]) == 2
    assert capsys.readouterr().err.strip().split("\n") == lines
    assert len(lines) == len(sentences)
    for line, sentence in zip(lines, sentences, strict=True):
        assert sentence in line
    assert set(Path(base).parent.rglob("*")) == before


def test_a_sweep_does_not_write_into_the_folder_of_a_run(base, capsys):
    path = write_sweep(base, seeds=[0])
    (Path(base).parent / "runs" / "small" / "checkpoints").mkdir(parents=True)
    assert sweep.main([path]) == 2
    assert "small.yaml: expected a name of its own, got that of a run" in capsys.readouterr().err


def test_the_sweeps_that_come_with_lamina_are_valid():
    counts = {}
    for path in (ROOT / "configs/sweeps").glob("*.yaml"):
        with contextlib.chdir(ROOT):
            counts[path.stem] = len(jobs.expand(path)[1])
    assert counts == {"animals": 3, "folds": 4, "losses": 12}


# ---------------------------------------------------------------------------- comparison


def scored(variant, place, **cases):
    return variant, place, [{"case": c, "dice": v, "hd95": 1 - v} for c, v in cases.items()]


RUNS = [
    scored("old", (0, 0), a=0.4, b=0.6),  # mean 0.5
    scored("old", (1, 0), c=0.7),
    scored("old", (0, 1), a=0.5, b=0.7),  # 0.6
    scored("old", (1, 1), c=0.8),
    scored("new", (0, 0), a=0.5, b=0.7),  # 0.6: + 0.1
    scored("new", (1, 0), c=0.9),  # + 0.2
    scored("new", (0, 1), a=0.8, b=1.0),  # 0.9: + 0.3
    scored("new", (1, 1), c=0.4),  # - 0.4
]


def test_means_deviations_and_paired_differences_are_those_of_hand():
    old, new = comparison.compare(RUNS, "dice", "old")
    assert (old.variant, old.runs, old.cases, old.difference) == ("old", 4, 3, None)
    assert old.mean == pytest.approx((0.5 + 0.7 + 0.6 + 0.8) / 4)
    assert old.deviation == pytest.approx((0.05 / 3) ** 0.5)  # squares 0.0225 and 0.0025, twice
    assert (new.pairs, new.difference) == (4, pytest.approx(0.05))
    # Deviations from 0.05: 0.05, 0.15, 0.25, -0.45; t of 3 degrees of freedom is 3.182446.
    reach = 3.182446 * (0.29 / 3) ** 0.5 / 2
    assert (new.low, new.high) == pytest.approx((0.05 - reach, 0.05 + reach), abs=1e-6)


def test_all_cases_together_are_compared_by_their_means_over_seeds():
    old, new = comparison.compare(RUNS, "dice", "old")
    assert old.case_mean == pytest.approx((0.45 + 0.65 + 0.75) / 3)
    assert new.case_difference == pytest.approx((0.2 + 0.2 - 0.1) / 3)
    assert (new.ahead, new.behind) == (2, 1)
    assert -0.101 < new.case_low < new.case_difference < new.case_high < 0.201


def test_lower_is_ahead_where_lower_is_better():
    new = comparison.compare(RUNS, "hd95", "old")[1]
    assert new.difference == pytest.approx(-0.05) and (new.ahead, new.behind) == (2, 1)


def test_a_run_without_its_pair_counts_for_its_own_variant_only():
    _, new = comparison.compare([*RUNS[:2], *RUNS[4:]], "dice", "old")
    assert (new.runs, new.pairs, new.difference) == (4, 2, pytest.approx(0.15))
    assert new.case_difference == pytest.approx((0.1 + 0.1 + 0.2) / 3)


def test_runs_of_other_cases_are_no_pair():
    _, new = comparison.compare([*RUNS[:2], RUNS[4], scored("new", (1, 0), d=0.9)], "dice", "old")
    assert (new.runs, new.pairs, new.difference) == (2, 1, pytest.approx(0.1))


def test_one_run_has_no_deviation_and_one_pair_no_interval():
    old, new = comparison.compare([RUNS[0], RUNS[4]], "dice", "old")
    assert old.deviation is None and new.difference == pytest.approx(0.1)
    assert (new.low, new.high) == (None, None)


def test_without_the_first_variant_there_is_nothing_to_compare_with():
    (new,) = comparison.compare(RUNS[4:], "dice", "old")
    assert new.difference is None and new.pairs == 0
    assert comparison.compare([], "dice", "old") == []


def test_each_held_out_case_is_shown_with_its_fold_group_and_mean_over_seeds():
    groups = {"a": "x", "b": "x", "c": "y"}
    heads, texts = comparison.held_out_table(RUNS, ["dice", "hd95"], groups)
    assert heads == ["fold", "group", "case", "dice, old", "dice, new"]
    assert texts == [
        ["0", "x", "a", "0.450", "0.650"],
        ["0", "x", "b", "0.650", "0.850"],
        ["1", "y", "c", "0.750", "0.650"],
    ]


def test_of_one_variant_all_scores_are_shown_and_nothing_that_compares():
    runs = [scored("old", (None, 0), a=0.4, b=0.6)]
    rows = [row for name in ("dice", "hd95") for row in comparison.compare(runs, name, "old")]
    heads, texts = comparison.held_out_table(runs, ["dice", "hd95"], {})
    assert heads == ["case", "dice", "hd95"] and texts[0] == ["a", "0.400", "0.600"]
    heads, texts = next(comparison.tables(rows, ["dice", "hd95"]))
    assert heads == ["variant", "runs", "dice", "all cases"]
    assert texts == [["old", "1", "0.500", "0.500 of 2"]]
    (note,) = comparison.notes(rows, folds=False, choosing=False)
    assert "each run counts alike" in note and "differences" not in note


def test_a_leaderboard_against_a_method_keeps_its_order():
    rows = [
        {"case": case, "method": method, "dice": value}
        for method, values in {"a": (0.2, 0.4), "b": (0.6, 0.6), "c": (0.1, 0.3)}.items()
        for case, value in zip("xy", values, strict=True)
    ]
    standings = report.leaderboard(rows, "dice", against="a")
    assert [one.method for one in standings] == ["b", "a", "c"]
    assert [one.difference for one in standings] == [pytest.approx(0.3), None, pytest.approx(-0.1)]


# ---------------------------------------------------------------------------- ledger


def line(name, status="done", **more):
    figures = dict.fromkeys(["reason", "seconds", "peak_memory", "peak_gpu_memory"])
    return {"run": name, "status": status, "scores": {}, **figures, **more}


def append_many(path, name):
    for number in range(40):
        jobs.Ledger(path).append(line(f"{name}{number}", pad="x" * 5000))


def test_processes_append_whole_lines_side_by_side(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"run": "cut sh')  # by a kill
    writers = [FORK.Process(target=append_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert jobs.Ledger(path).entries().keys() == {f"{n}{i}" for n in "ab" for i in range(40)}
    assert len(path.read_bytes().splitlines()) == 81


def test_the_last_whole_line_of_a_run_counts(tmp_path):
    ledger = jobs.Ledger(tmp_path / "ledger.jsonl")
    assert ledger.entries() == {}
    for entry in (line("a", "failed"), line("b"), line("a"), {"run": "a", "status": "failed"}):
        ledger.append(entry)
    assert {name: entry["status"] for name, entry in ledger.entries().items()} == {
        "a": "done",
        "b": "done",
    }


# ---------------------------------------------------------------------------- runs


# It writes what train.py leaves, and does what a file beside it says: exit, die, or wait.
TRAIN = """
import json, os, sys, time, yaml
from pathlib import Path
settings = yaml.safe_load(open(sys.argv[1]))
for text in sys.argv[3:]:
    key, _, value = text.partition("=")
    group, name = key.split(".")
    settings[group][name] = json.loads(value)
here, name = Path(__file__).parent, settings["run"]["name"]
run = Path(settings["run"]["folder"], name)
with open(here / "begun", "a") as file:
    print(name, file=file)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "checkpoints" / "last.pt").touch()
(run / "config.yaml").write_text(yaml.safe_dump(settings))
steps = [dict(event="step", step=n, step_seconds=0.5) for n in (2, 3)]
(run / "log.jsonl").write_text("".join(json.dumps(event) + "\\n" for event in steps))
(run / "system.jsonl").write_text('{"tree": 5}\\n{"tree": 8}\\n{"tree": 6}\\n')
do = here / name
if do.exists():
    exec(do.read_text())
"""
INFER = "import sys; assert sys.argv[1] == '--ckpt'"
EVALUATE = """
import json, sys
from pathlib import Path
words = sys.argv
name, out = words[2].split("=")[0], Path(words[words.index("--out") + 1])
option = "--classes" if "--classes" in words else "--foreground"
cases = words[words.index("--cases") + 1 : words.index(option)]
classes = [word.split("=")[0] for word in words[words.index(option) + 1 :] if "=" in word]
first = words[words.index("--scores") + 1 : words.index("--rank")]
if classes:
    first = [f"{name}/{which}" for name in first for which in (*classes, "mean")]
value = 0.75 if name.startswith("b") else 0.5
about = dict(method=name, tolerance=float(words[words.index("--tolerance") + 1]))
rows = [dict(case=case) | about | dict.fromkeys(first, value) for case in cases]
out.write_text(json.dumps(dict(cases=rows)))
out.with_name(name + ".png").write_bytes(b"a picture")
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with scripts that do next to nothing in place of the real ones."""
    place = tmp_path / "scripts"
    place.mkdir()
    texts = {"train": TRAIN, "infer": INFER, "evaluate": EVALUATE}
    for name, text in texts.items():
        (place / f"{name}.py").write_text(text)
    monkeypatch.setattr(sweep, "ROOT", place)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    return place


@pytest.fixture
def two_by_two(base):
    return write_sweep(base, variants={"a": None, "b": {"optim.lr": 0.1}}, folds=2)


def begun(scripts):
    path = scripts / "begun"
    return path.read_text().split() if path.exists() else []


def ledger_of(path):
    return jobs.Ledger(jobs.expand(path)[0] / "ledger.jsonl").entries()


SCORES = ["surface_dice", "dice", "precision", "recall", "components", "components_truth"]
NAMES = ["a_fold0_seed0", "a_fold1_seed0", "b_fold0_seed0", "b_fold1_seed0"]


def test_a_failed_run_is_recorded_and_tried_again_the_others_are_not(scripts, two_by_two, capsys):
    (scripts / NAMES[1]).write_text("print('first'); sys.exit('no room')")
    (scripts / NAMES[2]).write_text("os.kill(os.getpid(), 9)")
    two_faults = r"print('a: wrong\nb: wrong', file=sys.stderr); sys.exit(2)"
    (scripts / NAMES[3]).write_text(two_faults)
    assert sweep.main([two_by_two]) == 1
    entries = ledger_of(two_by_two)
    assert [entries[name]["status"] for name in NAMES] == ["done", "failed", "failed", "failed"]
    assert entries[NAMES[3]]["reason"] == ("train.py ended with exit status 2: a: wrong; b: wrong")
    assert entries[NAMES[1]]["reason"] == "train.py ended with exit status 1: no room"
    assert entries[NAMES[2]]["reason"] == "train.py was killed by SIGKILL"
    assert "1 of 4 runs done" in capsys.readouterr().out
    for name in NAMES[1:]:
        (scripts / name).unlink()
    assert sweep.main([two_by_two]) == 0
    assert begun(scripts) == [*NAMES, *NAMES[1:]]
    assert sweep.main([two_by_two, "--jobs", "2"]) == 0 and len(begun(scripts)) == 7


def test_a_line_of_the_ledger_says_what_a_run_was_and_came_to(scripts, two_by_two):
    assert sweep.main([two_by_two, "--index", "3"]) == 0
    (entry,) = ledger_of(two_by_two).values()
    assert entry.pop("time") == pytest.approx(time.time(), abs=60)
    changes = {"optim.lr": 0.1, "data.folds": 2, "data.fold": 1, "run.seed": 0}
    assert changes.items() <= entry.pop("settings").items()
    assert entry == {
        "run": NAMES[3], "index": 3, "variant": "b", "fold": 1, "seed": 0, "status": "done",
        "reason": None, "scores": dict.fromkeys(SCORES, 0.75), "seconds": 1.5, "peak_memory": 8,
        "peak_gpu_memory": None, "groups": {"slab1": "slab1", "slab3": "slab3"},
    }  # fmt: skip


def test_a_run_that_stops_stops_the_sweep_which_then_goes_on(scripts, two_by_two, capsys):
    (scripts / NAMES[1]).write_text("print('time is up'); sys.exit(75)")
    # Of an array job one run alone is to go on; as many at a time as before.
    for options in (["--index", "1", "--jobs", "2"], []):
        assert sweep.main([two_by_two, *options]) == 75
        last = capsys.readouterr().out.strip().split("\n")[-1]
        words = " ".join([two_by_two, *options])
        assert last == (
            f"stopped: {NAMES[1]} stopped: time is up; go on with: python sweep.py {words}"
        )
    assert begun(scripts) == [NAMES[1], *NAMES[:2]]
    status = {name: entry["status"] for name, entry in ledger_of(two_by_two).items()}
    assert status == {NAMES[0]: "done", NAMES[1]: "stopped"}
    (scripts / NAMES[1]).unlink()
    assert sweep.main([two_by_two]) == 0
    assert begun(scripts) == [NAMES[1], *NAMES[:2], *NAMES[1:]]


def test_a_signal_to_the_sweep_is_handed_on_to_the_run(scripts, two_by_two):
    code = "import signal; signal.signal(15, lambda *_: sys.exit(75)); os.kill(os.getppid(), 15)"
    (scripts / NAMES[0]).write_text(f"{code}; time.sleep(30)")
    began = time.monotonic()
    assert sweep.main([two_by_two]) == 75 and time.monotonic() - began < 20
    (entry,) = ledger_of(two_by_two).values()
    assert (entry["status"], entry["reason"]) == ("stopped", "signal SIGTERM")


def test_a_killed_sweep_leaves_no_run_to_be_done_twice(scripts, two_by_two):
    """Its run goes on alone; the next sweep waits for that, and then goes on with it."""
    wait = "while not (here / 'free').exists():\n    time.sleep(0.01)"
    (scripts / NAMES[0]).write_text(f"(here / 'alone').touch()\n{wait}")
    process = FORK.Process(target=sweep.main, args=([two_by_two],))
    process.start()
    deadline = time.monotonic() + 60
    while not (scripts / "alone").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and ledger_of(two_by_two) == {}
    threading.Timer(0.5, (scripts / "free").touch).start()
    assert sweep.main([two_by_two]) == 0
    assert sorted(begun(scripts)) == sorted([*NAMES, NAMES[0]])
    assert [e["status"] for e in ledger_of(two_by_two).values()] == ["done"] * 4


def test_what_another_process_does_comes_last_and_is_not_done_again(scripts, two_by_two):
    place, (job, *_) = jobs.expand(two_by_two)
    (place / "output").mkdir(parents=True)
    with open(place / "output" / job.name, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=sweep.main, args=([two_by_two],))
        thread.start()
        deadline = time.monotonic() + 60
        while len(ledger_of(two_by_two)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert thread.is_alive() and begun(scripts) == NAMES[1:]
        (place / job.name / "checkpoints").mkdir(parents=True)
        (place / job.name / "checkpoints" / "last.pt").touch()
        cases = (place / NAMES[2] / "scores.json").read_text().replace(NAMES[2], job.name)
        (place / job.name / "scores.json").write_text(cases)
        (place / job.name / f"{job.name}.png").touch()
        entry = ledger_of(two_by_two)[NAMES[2]] | {"run": job.name}
        jobs.Ledger(place / "ledger.jsonl").append(entry)
    thread.join()
    assert begun(scripts) == NAMES[1:]
    assert "4 of 4 runs done" in (place / "report.html").read_text()


def test_the_printed_commands_give_the_same_ledger(scripts, two_by_two, capsys):
    assert sweep.main([two_by_two, "--print"]) == 0
    commands = [line.split() for line in capsys.readouterr().out.strip().split("\n")]
    expected = [sys.executable, str(scripts / "sweep.py"), two_by_two, "--index"]
    assert commands == [[*expected, str(index)] for index in range(4)]
    for command in reversed(commands):
        assert sweep.main(command[2:]) == 0
    by_index = ledger_of(two_by_two)
    folder = jobs.expand(two_by_two)[0]
    table = (folder / "table.csv").read_text()  # the last of them wrote it
    folder.rename(folder.with_name("by_index"))
    assert sweep.main([two_by_two, "--jobs", "2"]) == 0
    whole = ledger_of(two_by_two)
    for entries in (by_index, whole):
        for entry in entries.values():
            entry.pop("time")
    assert whole == by_index and (folder / "table.csv").read_text() == table
    capsys.readouterr()
    assert sweep.main([two_by_two, "--print"]) == 0 and capsys.readouterr().out == ""
    assert sweep.main([two_by_two, "--index", "4"]) == 2
    assert "--index: expected 0 to 3, got 4" in capsys.readouterr().err


def test_a_run_goes_on_only_with_the_settings_and_cases_that_it_began_with(
    scripts, two_by_two, capsys
):
    assert sweep.main([two_by_two, "--index", "2"]) == 0
    text = Path(two_by_two).read_text()
    Path(two_by_two).write_text(text.replace("0.1", "0.2"))
    assert sweep.main([two_by_two]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert "variants.b" in line and "changed: optim.lr is 0.2, was 0.1" in line
    assert begun(scripts) == [NAMES[2]]
    Path(two_by_two).write_text(text)
    scores = jobs.expand(two_by_two)[0] / NAMES[2] / "scores.json"
    scores.write_text(scores.read_text().replace("slab0", "slab9"))
    assert sweep.main([two_by_two]) == 2
    assert "held-out cases that it began with" in capsys.readouterr().err
    scores.write_text(scores.read_text().replace("slab9", "slab0"))
    Path(two_by_two).write_text(text.replace("settings:", "settings:\n  run.threads: 2"))
    assert sweep.main([two_by_two]) == 0 and len(begun(scripts)) == 4


def test_a_run_whose_folder_was_removed_is_done_again(scripts, two_by_two):
    assert sweep.main([two_by_two, "--index", "0"]) == 0
    shutil.rmtree(jobs.expand(two_by_two)[0] / NAMES[0])
    assert sweep.main([two_by_two, "--index", "0"]) == 0
    assert begun(scripts) == [NAMES[0]] * 2


ROW = {"case": "slab0", "tolerance": 2.0, **dict.fromkeys(SCORES, 0.5)}
ROWS = [{}, ROW | {"dice": "1"}, ROW | {"dice": None}, ROW | {"tolerance": 3.0}]
DAMAGED = ["", "[1]", "{}", '{"cases": []}', '{"cases": [{"case": "sl', "\xff"]


@pytest.mark.parametrize("text", DAMAGED + [json.dumps({"cases": [row]}) for row in ROWS])
def test_scores_that_are_damaged_or_others_are_none(two_by_two, text):
    _, (job, *_) = jobs.expand(two_by_two)
    folder = Path(job.settings.run.folder, job.name)
    assert job.cases() is None
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.pt").touch()
    assert job.cases() is None
    (folder / "scores.json").write_text(json.dumps({"cases": [ROW]}))
    assert job.cases() == [ROW]
    (folder / "scores.json").write_bytes(text.encode("latin-1"))
    assert job.cases() is None


def test_a_run_whose_scores_are_damaged_is_named_and_scored_again(scripts, two_by_two, capsys):
    assert sweep.main([two_by_two]) == 0
    place, (job, *_) = jobs.expand(two_by_two)
    path = place / job.name / "scores.json"
    whole = path.read_text()
    path.write_text(whole[:30])
    capsys.readouterr()
    assert sweep.main([two_by_two, "--report"]) == 0
    reason = "its scores.json is gone, damaged or of other scores; start the sweep again"
    assert f"{job.name} failed: {reason}" in capsys.readouterr().out
    assert reason in (place / "report.html").read_text() and begun(scripts) == NAMES
    assert sweep.main([two_by_two]) == 0
    assert path.read_text() == whole and begun(scripts) == [*NAMES, job.name]


def test_what_scores_a_run_may_change_and_the_run_is_then_scored_again(scripts, base):
    """The first variant says how all are scored: another one may come first."""
    variants = {"a": None, "b": {"validation.tolerance": 3.0, "validation.scores": ["hd95"]}}
    assert sweep.main([write_sweep(base, variants=variants, folds=2)]) == 0
    variants = dict(reversed(variants.items()))
    path = write_sweep(base, variants=variants, folds=2)
    assert sweep.main([path]) == 0
    assert begun(scripts) == [*NAMES, *NAMES[2:], *NAMES[:2]]
    assert {tuple(entry["scores"]) for entry in ledger_of(path).values()} == {
        ("surface_dice", "hd95")
    }


def test_a_run_whose_settings_are_gone_is_one_sentence(scripts, two_by_two, capsys):
    assert sweep.main([two_by_two, "--index", "0"]) == 0
    folder = jobs.expand(two_by_two)[0] / NAMES[0]
    (folder / "config.yaml").unlink()
    assert sweep.main([two_by_two]) == 2
    assert capsys.readouterr().err == (
        f"variants.a: {folder / 'config.yaml'}: expected a config file in YAML, got: No such file "
        f"or directory; delete {folder} to do the run again\n"
    )


def test_a_ledger_that_cannot_be_read_is_one_sentence(two_by_two, capsys):
    path = jobs.expand(two_by_two)[0] / "ledger.jsonl"
    path.mkdir(parents=True)
    assert sweep.main([two_by_two, "--print"]) == 2
    assert capsys.readouterr().err == f"[Errno 21] Is a directory: '{path}'\n"


def test_a_run_that_began_from_other_weights_does_not_go_on(scripts, base, capsys):
    variants = {"a": None, "b": {"run.init_from": "old.pt"}}
    assert sweep.main([write_sweep(base, variants=variants, folds=2)]) == 0
    variants["b"] = {"run.init_from": "new.pt"}
    assert sweep.main([write_sweep(base, variants=variants, folds=2)]) == 2
    assert "changed: run.init_from is new.pt, was old.pt" in capsys.readouterr().err


def test_a_killed_evaluation_is_a_failed_run_and_made_again(scripts, two_by_two):
    script = scripts / "evaluate.py"
    text = script.read_text()
    script.write_text(f"{text}import os; os.kill(os.getpid(), 9)")  # its file is there
    assert sweep.main([two_by_two, "--index", "0"]) == 1
    (entry,) = ledger_of(two_by_two).values()
    assert (entry["status"], entry["reason"]) == ("failed", "evaluate.py was killed by SIGKILL")
    script.write_text(text)
    assert sweep.main([two_by_two, "--index", "0"]) == 0
    assert ledger_of(two_by_two)[NAMES[0]]["status"] == "done"


def test_a_full_disk_is_one_sentence_and_the_sweep_then_goes_on(
    scripts, two_by_two, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "append_line", full)
        assert sweep.main([two_by_two]) == 1
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert "the sweep cannot go on ([Errno 28] No space left on device)" in line
    assert ledger_of(two_by_two) == {} and begun(scripts) == NAMES[:1]
    assert sweep.main([two_by_two]) == 0 and len(ledger_of(two_by_two)) == 4


def test_a_run_whose_line_was_cut_is_looked_at_again(scripts, two_by_two):
    assert sweep.main([two_by_two]) == 0
    path = jobs.expand(two_by_two)[0] / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert len(ledger_of(two_by_two)) == 3
    assert sweep.main([two_by_two]) == 0
    assert begun(scripts) == [*NAMES, NAMES[3]] and len(ledger_of(two_by_two)) == 4


def test_a_sweep_that_was_killed_with_all_its_runs_goes_on(scripts, two_by_two):
    for name in NAMES[:2]:
        (scripts / name).write_text("(here / f'{name}.waits').touch(); time.sleep(60)")

    def begin():
        os.setsid()
        sweep.main([two_by_two, "--jobs", "2"])

    process = FORK.Process(target=begin)
    process.start()
    deadline = time.monotonic() + 60
    while len([*scripts.glob("*.waits")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    for name in NAMES[:2]:
        (scripts / name).unlink()
    assert sweep.main([two_by_two, "--jobs", "2"]) == 0
    assert sorted(begun(scripts)) == sorted([*NAMES[:2], *NAMES])
    assert [e["status"] for e in ledger_of(two_by_two).values()] == ["done"] * 4


XARGS = "xargs -r -P2 -d '\\n' -n1 sh -c"  # as the docs have it


@pytest.mark.skipif(not shutil.which("xargs"), reason="this system has no xargs")
def test_printed_commands_work_in_xargs_with_a_space_in_a_path(scripts, base, capsys):
    (scripts / "sweep.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sweep; from pathlib import Path\n"
        "sweep.ROOT = Path(__file__).parent; sys.exit(sweep.main())"
    )
    assert XARGS in (ROOT / "docs/sweeps.md").read_text() and XARGS in sweep.__doc__
    path = Path(write_sweep(base, folds=2)).rename(Path(base).parent / "a small one's.yaml")
    assert sweep.main([str(path), "--print"]) == 0
    subprocess.run(
        XARGS, shell=True, input=capsys.readouterr().out, text=True, check=True, timeout=300
    )
    entries = ledger_of(path)
    assert [entry["status"] for entry in entries.values()] == ["done"] * 2
    assert "2 of 2 runs done" in (jobs.expand(path)[0] / "report.html").read_text()


SEEN = """
print(repr(os.environ.get("CUDA_VISIBLE_DEVICES", "unset")), file=open(here / "gpus", "a"))
"""
GPUS = {  # CUDA_VISIBLE_DEVICES and the count of GPUs: which ones the runs of --jobs 3 get
    "two": (None, 2, ["0", "1", "0"]),
    "of the shell": ("5,GPU-7a, 3,-1,2", 3, ["5", "GPU-7a", " 3"]),
    "one": (None, 1, ["0"] * 3),
    "hidden": ("", 0, [""] * 3),
    "none": (None, 0, ["unset"] * 3),
}


@pytest.mark.parametrize("case", GPUS)
def test_runs_at_one_time_get_a_gpu_each(scripts, base, monkeypatch, case):
    outer, count, expected = GPUS[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    path = write_sweep(base, settings={
        "run.folder": str(Path(base).parent / "runs"), "run.device": "auto", "data.train": ["*"],
    }, folds=2, seeds=[0, 1, 2])  # fmt: skip
    # Each waits for the two others, so that three go on at one time.
    wait = "while len(open(here / 'gpus').readlines()) < 3:\n    time.sleep(0.01)"
    for seed in range(3):
        (scripts / f"base_fold0_seed{seed}").write_text(SEEN + wait)
    assert sweep.main([path, "--jobs", "3"]) == 0
    gpus = map(eval, (scripts / "gpus").read_text().split("\n")[:3])
    assert sorted(gpus) == sorted(expected)


def test_a_run_whose_device_is_given_is_given_no_gpu(scripts, two_by_two, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (scripts / NAMES[0]).write_text(SEEN)
    assert sweep.main([two_by_two, "--index", "0"]) == 0
    assert (scripts / "gpus").read_text() == "'unset'\n"
    assert "on GPU" not in capsys.readouterr().out


# ---------------------------------------------------------------------------- report


def test_the_page_has_all_tables_and_pictures_and_needs_nothing_else(scripts, two_by_two, capsys):
    (scripts / NAMES[3]).write_text("sys.exit('<no> room')")
    assert sweep.main([two_by_two]) == 1
    folder = jobs.expand(two_by_two)[0]
    text = (folder / "report.html").read_text()
    assert text.count("<table>") == 4 and text.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text
    assert "+0.250" in text and "train.py ended with exit status 1: &lt;no&gt; room" in text
    assert all(f"<td>{name}</td>" in text for name in NAMES)
    assert "<td>0</td><td>slab0</td><td>slab0</td><td>0.500</td><td>0.750</td>" in text
    assert "<td>1</td><td>slab1</td><td>slab1</td><td>0.500</td></tr>" not in text  # b has failed
    assert "on the cases that it is scored by" in text
    assert text.count("each case counts alike, predicted by the runs that did not see it</p>") == 1
    header, first, second, *_ = (folder / "table.csv").read_text().splitlines()
    assert header.startswith("variant,score,runs,mean,deviation,pairs,difference,low,high")
    assert first.startswith("a,surface_dice,2,0.5,0.0,0,")
    assert second.startswith("b,surface_dice,1,0.75,,1,0.25,,,2,0.75,0.25,0.25,0.25,2,0")
    capsys.readouterr()
    (folder / "report.html").unlink()
    assert sweep.main([two_by_two, "--report"]) == 0
    assert (folder / "report.html").read_text() == text and len(begun(scripts)) == 4


@pytest.fixture
def of_classes(tmp_path):
    """The config of tiny runs on four cases of two classes."""
    root = tmp_path / "classes"
    root.mkdir()
    content = {"root": str(make_root(root, rim=True))}
    return write(tmp_path / "classes.yaml", TINY | {"data": content})


def test_several_classes_are_compared_by_their_means_and_by_the_main_score_of_each(
    scripts, of_classes, capsys
):
    path = write_sweep(of_classes, variants={"a": None, "b": {"optim.lr": 0.1}}, folds=2)
    assert sweep.main([path]) == 0
    text = capsys.readouterr().out
    assert "b_fold1_seed0 done: surface_dice/mean 0.7500" in text
    names = ["surface_dice/mean", "surface_dice/slab", "surface_dice/rim"]
    names += [f"{name}/mean" for name in SCORES[1:]]
    assert list(ledger_of(path)["a_fold0_seed0"]["scores"]) == names
    folder, (job, *_) = jobs.expand(path)
    page = (folder / "report.html").read_text()
    for name in names:
        assert f"<th>{name.replace('_', ' ')}</th>" in page
    assert sweep.main([path, "--report"]) == 0 and len(begun(scripts)) == 4
    rows = [{name: 0.5 for name in job.cases()[0] if name != "dice/mean"} | {"tolerance": 2.0}]
    (job.folder / "scores.json").write_text(json.dumps({"cases": rows}))
    assert job.cases() is None


def test_evaluate_is_told_the_ids_of_every_region():
    regions = {"vessel": (3, 7), "artery": (3,)}
    option, *texts = sweep.classes_of(Outputs(regions))
    assert option == "--classes" and texts == ["vessel=3+7", "artery=3"]
    assert parsed(texts, {}) == regions
    assert sweep.classes_of(Outputs({"vessel": (3, 7)})) == ("--foreground", 3, 7)


def test_variants_that_tell_other_classes_apart_are_refused(of_classes, tmp_path, capsys):
    variants = {"all": None, "one": {"data.foreground": ["rim"]}}
    variants["same"] = {"data.regions": {"slab": ["slab"], "rim": ["rim"]}}  # with sigmoids
    variants["swapped"] = {"data.regions": {"slab": ["rim"], "rim": ["slab"]}}
    assert sweep.main([write_sweep(of_classes, variants=variants, folds=2)]) == 2
    faults = [
        f"variants.{name}: data: expected the classes of all, slab 1, rim 2, got {got}; scores of "
        "others do not compare"
        for name, got in (("one", "rim 2"), ("swapped", "slab 2, rim 1"))
    ]
    assert capsys.readouterr().err.splitlines() == faults
    assert not (tmp_path / "runs").exists()


def test_a_report_before_any_run_is_one_sentence(two_by_two, capsys):
    assert sweep.main([two_by_two, "--report"]) == 2
    assert "expected runs of it in" in capsys.readouterr().err


def test_each_case_is_predicted_by_the_real_run_that_did_not_see_it(base, capsys):
    """train.py, infer.py and evaluate.py as they are, for one of two folds."""
    path = write_sweep(base, folds=2)
    assert sweep.main([path, "--index", "1"]) == 0, capsys.readouterr()
    folder, (_, job) = jobs.expand(path)
    run, plan = folder / "base_fold1_seed0", build.resolve(job.settings)
    ids = [case.id for case in plan.split.validation]
    assert sorted(os.listdir(run / "predictions")) == ["predictions.jsonl"] + [
        f"{i}.nii.gz" for i in ids
    ]
    assert [row["case"] for row in job.cases()] == ids and len(ids) == 2
    (entry,) = ledger_of(path).values()
    mean = sum(row["surface_dice"] for row in job.cases()) / 2
    assert entry["scores"]["surface_dice"] == pytest.approx(mean)
    assert entry["seconds"] > 0 and 1e8 < entry["peak_memory"] < 3e9
    assert sweep.main([path, "--report"]) == 0
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 2


def test_what_a_script_says_is_printed_as_it_is(capsys):
    sweep.console.print("case.h5:label: expected [red]")
    assert capsys.readouterr().out == "case.h5:label: expected [red]\n"
