import json
import math
import os
import re
import shutil
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml

import data
import model
import train
from patches import augment, transfer
from runtime import build, checkpoint, config, evaluator, timer, validation
from volumes import casefile

SHAPE = (12, 24, 24)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five cases of a bright bar in noise, in three groups; one without a label."""
    folder = tmp_path_factory.mktemp("data")
    ids = []
    for i in range(5):
        rng = np.random.default_rng(i)
        label = np.zeros(SHAPE, np.uint8)
        label[3:9, 8 + i : 11 + i, 2:22] = 1
        image = (rng.normal(60, 10, SHAPE) + 80 * label).clip(1, 255).astype(np.uint8)
        label[:, :2] = 2
        ids.append(f"bar{i}")
        casefile.write_case(
            folder / f"bar{i}.h5",
            image[None],
            None if i == 4 else label,
            spacing=(2, 1, 1),
            unit="micron",
            affine=None,
            group=("a", "a", "b", "c", "c")[i],
            ignore_label=2,
            compression="lzf",  # so that there is something for the cache to hold
        )
    casefile.write_dataset(
        folder, classes={"background": 0, "bar": 1}, ignore_label=2, unit="micron", case_ids=ids
    )
    return folder


def settings(root, tmp_path, *overrides):
    content = {
        "run": {"folder": str(tmp_path / "runs"), "name": "r", "device": "cpu", "threads": 1},
        "data": {"root": str(root), "validation": ["b"], "test": ["c"]},
        "sampling": {"patch": [8, 16, 16]},
        "model": {"base": 4, "multipliers": [1, 2], "dropout": 0.1},
        "loss": {"surface_distance": {"weight": 0.2, "scales": 1}},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "ema": 0.5},
        "training": {"max_epochs": 4, "train_iterations_per_epoch": 3, "workers": 0},
        "monitor": {"log_every": 1, "tensorboard": False, "picture": False},
        "inference": {"overlap": 0.0},
    }
    content["training"]["precision"] = "fp32"  # on every processor
    return config.build(config.apply_overrides(content, overrides))


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == kind]


def weights_of(folder):
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def same_state(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The folder of a run of four epochs with noise."""
    folder = tmp_path_factory.mktemp("straight")
    assert train.main(settings(root, folder, "augment.noise=1.0")) == 0
    return folder / "runs" / "r"


@pytest.mark.parametrize("workers", [0, 1])
def test_four_epochs_straight_equal_two_then_two_resumed_bit_for_bit(
    root, straight, tmp_path, workers
):
    changes = [f"training.workers={workers}", "augment.noise=1.0"]
    assert train.main(settings(root, tmp_path, *changes, "training.max_steps=6")) == 0
    torch.rand(7)  # whatever else draws numbers must not matter
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    folders = straight, tmp_path / "runs" / "r"
    a, b = map(weights_of, folders)
    for key in ("model", "ema", "optimizer", "rng"):
        assert same_state(a[key], b[key]), key
    assert a["loop"]["step"] == b["loop"]["step"] == 12
    assert a["loop"]["evaluations"]["best_score"] == b["loop"]["evaluations"]["best_score"]
    logs = [events(folder, "step") for folder in folders]
    assert [(e["step"], e["loss"], e["lr"]) for e in logs[0]] == [
        (e["step"], e["loss"], e["lr"]) for e in logs[1]
    ]


EVERY_TERM = [
    "loss.cldice={weight: 0.1, interval: 2, off_step: boundary}",
    "loss.morph_skeleton.weight=0.1",
    "loss.skeleton_recall.weight=0.1",
    "loss.toploss={weight: 0.05, interval: 3, window: [8, 8, 8]}",
]


def test_resuming_in_mid_epoch_equals_going_straight_with_every_term(root, tmp_path):
    changes = [*EVERY_TERM, "training.max_epochs=3"]
    assert train.main(settings(root, tmp_path / "straight", *changes)) == 0
    assert train.main(settings(root, tmp_path / "cut", *changes, "training.max_steps=4")) == 0
    assert train.main(settings(root, tmp_path / "cut", *changes), resume=True) == 0
    a, b = (weights_of(tmp_path / name / "runs" / "r") for name in ("straight", "cut"))
    assert same_state(a["model"], b["model"]) and same_state(a["ema"], b["ema"])


def test_a_run_learns_and_leaves_everything_it_promises(root, tmp_path):
    changes = [
        "training.max_epochs=5",
        "training.train_iterations_per_epoch=8",
        "optim.ema=0.9",
        "monitor.picture=true",
        "monitor.tensorboard=true",
        "validation.score=dice",
    ]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    folder = tmp_path / "runs" / "r"
    scores = [e["scores"]["dice"] for e in events(folder, "evaluation")]
    assert len(scores) == 6 and scores[0] < 0.2 and scores[-1] > 0.6
    losses = [e["loss"] for e in events(folder, "step")]
    assert set(losses[0]) == {"weighted_bce", "soft_dice", "surface_distance", "total"}
    assert losses[-1]["total"] < losses[0]["total"]
    best = checkpoint.load(folder / "checkpoints" / "best.pt")
    assert best["loop"]["evaluations"]["best_score"] == max(scores)
    assert (tmp_path / "runs" / "last.pt").resolve() == (folder / "checkpoints/last.pt").resolve()
    assert (folder / "progress.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir()) and (folder / "source" / "train.py").exists()
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["training"]["max_epochs"] == 5
    assert best["data"]["test"] == ["bar3", "bar4"] and best["data"]["ignore_label"] == 2


def test_terms_of_an_interval_are_logged_by_name_as_means_of_their_own_steps(root, tmp_path):
    assert train.main(settings(root, tmp_path, *EVERY_TERM, "training.max_epochs=2")) == 0
    folder = tmp_path / "runs" / "r"
    steps = [e["loss"] for e in events(folder, "step")]
    assert ["cldice" in parts for parts in steps] == [True, False] * 3
    assert ["cldice_boundary" in parts for parts in steps] == [False, True] * 3
    assert [i for i, parts in enumerate(steps) if "toploss" in parts] == [2, 5]  # phase 1 of 3
    first = events(folder, "epoch")[0]["loss"]
    assert first["cldice"] == pytest.approx((steps[0]["cldice"] + steps[2]["cldice"]) / 2)
    assert first["cldice_boundary"] == pytest.approx(steps[1]["cldice_boundary"])
    assert first["toploss"] == pytest.approx(steps[2]["toploss"])


def test_skeleton_spacing_and_step_reach_the_sum(root, tmp_path, monkeypatch):
    seen, real = [], train.composite_loss

    def watched(logits, target, valid, terms, **options):
        seen.append({**options, "target": target})
        return real(logits, target, valid, terms, **options)

    monkeypatch.setattr(train, "composite_loss", watched)
    changes = ["loss.skeleton_recall.weight=0.1", "training.max_epochs=1"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    assert [options["step"] for options in seen] == [0, 1, 2]
    for options in seen:
        assert options["spacing"] == [(2.0, 1.0, 1.0)] * len(options["target"])
        skeleton = options["skeleton"]
        assert skeleton.sum() > 0
        assert bool((skeleton <= options["target"]).all())


def test_validation_terms_see_labeled_voxels_and_the_stored_skeleton(root, tmp_path, monkeypatch):
    seen, real = [], evaluator.composite_loss.validation_losses

    def watched(probs, target, valid, terms, **options):
        seen.append((target, valid, options))
        return real(probs, target, valid, terms, **options)

    monkeypatch.setattr(evaluator.composite_loss, "validation_losses", watched)
    changes = ["loss.skeleton_recall.validation_only=true", "training.max_steps=0"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    ((target, valid, options),) = seen
    with h5py.File(root / "bar2.h5") as file:
        label, skeleton = file["label"][:], file["skeleton"][:]
    assert np.array_equal(target[0].numpy(), label == 1)
    assert np.array_equal(valid.numpy(), label != 2)
    assert np.array_equal(options["skeleton"].numpy(), skeleton)
    assert options["spacing"] == (2.0, 1.0, 1.0)


def test_validation_only_terms_stand_among_the_scores(root, tmp_path):
    changes = ["loss.cldice.validation_only=true", "training.max_epochs=1"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    folder = tmp_path / "runs" / "r"
    assert all(0 < e["scores"]["cldice_loss"] < 1 for e in events(folder, "evaluation"))
    assert all("cldice" not in e["loss"] for e in events(folder, "step"))


def test_accumulated_batches_have_the_gradient_of_one_large_batch(root, tmp_path):
    changes = ["model.dropout=0", "training.max_steps=1", "optim.clip=0"]
    whole = [*changes, "training.train_batch_size=4"]
    parts = [*changes, "training.train_batch_size=2", "training.accumulate=2"]
    assert train.main(settings(root, tmp_path / "a", *whole)) == 0
    assert train.main(settings(root, tmp_path / "b", *parts)) == 0
    a, b = (weights_of(tmp_path / n / "runs" / "r")["optimizer"]["state"] for n in "ab")
    # exp_avg is (1 - beta1) times the first gradient. Dice and distance are means over samples;
    # the mean over valid voxels differs by how the invalid ones fall into the batches.
    for key in a:
        assert torch.allclose(a[key]["exp_avg"], b[key]["exp_avg"], rtol=0.2, atol=2e-3)


def test_max_steps_zero_evaluates_and_saves_the_untrained_network(root, tmp_path):
    assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    folder = tmp_path / "runs" / "r"
    assert [e["step"] for e in events(folder, "evaluation")] == [0]
    assert events(folder, "step") == [] and weights_of(folder)["loop"]["step"] == 0


def test_without_validation_cases_best_follows_last(root, tmp_path, capsys):
    changes = ["data.validation=[]", "training.max_epochs=2"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    assert capsys.readouterr().out.count("NO VALIDATION: ") == 2  # first and last
    folder = tmp_path / "runs" / "r" / "checkpoints"
    assert checkpoint.load(folder / "best.pt")["loop"]["step"] == 6


def test_without_validation_cases_best_is_last_also_after_a_stop(root, tmp_path):
    changes = ["data.validation=[]", "training.max_hours=1e-9", "validation.untrained=false"]
    assert train.main(settings(root, tmp_path, *changes)) == 75
    folder = tmp_path / "runs" / "r" / "checkpoints"
    assert (folder / "best.pt").samefile(folder / "last.pt")


def test_a_run_that_ends_names_its_own_checkpoint(root, tmp_path, capsys):
    for name in ("r", "other"):
        assert train.main(settings(root, tmp_path, "training.max_steps=0", f"run.name={name}")) == 0
        best = tmp_path / "runs" / name / "checkpoints" / "best.pt"
        assert capsys.readouterr().out.endswith(f"next: python infer.py --ckpt {best}\n")


def test_a_second_run_of_one_name_never_writes_over_the_first(root, tmp_path):
    for _ in range(2):
        assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    assert (tmp_path / "runs" / "r" / "checkpoints" / "last.pt").exists()
    assert (tmp_path / "runs" / "last.pt").resolve().parents[1].name == "r-2"


def fault(capsys, settings_, **how):
    assert train.main(settings_, **how) == 2
    return capsys.readouterr().err.strip()


def test_cases_without_the_skeleton_that_a_term_needs_are_named(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "old")
    with h5py.File(tmp_path / "old" / "bar1.h5", "a") as file:
        del file["skeleton"]
    wanted = settings(tmp_path / "old", tmp_path, "loss.skeleton_recall.weight=0.1")
    text = fault(capsys, wanted)
    assert "loss.skeleton_recall" in text and "bar1" in text and "bar0" not in text
    assert not (tmp_path / "runs").exists()


def test_a_loss_without_a_term_that_always_acts_is_refused(root, tmp_path, capsys):
    none = [
        "loss.weighted_bce.weight=0",
        "loss.soft_dice.interval=2",
        "loss.surface_distance.weight=0",
    ]
    assert "acts on every step" in fault(capsys, settings(root, tmp_path, *none))
    assert not (tmp_path / "runs").exists()


def test_a_missing_dataset_says_where_data_come_from(tmp_path, capsys):
    text = fault(capsys, settings(tmp_path / "none", tmp_path))
    assert "data.root" in text and "prepare.py" in text
    assert not (tmp_path / "runs").exists()


def test_train_and_validation_sharing_a_group_is_refused(root, tmp_path, capsys):
    wrong = settings(root, tmp_path, "data.train=[bar0]", "data.validation=[bar1]")
    text = fault(capsys, wrong)
    assert "expected no group in both, got a" in text and "data.validation" in text


def test_unknown_cases_are_named_all_at_once(root, tmp_path, capsys):
    text = fault(capsys, settings(root, tmp_path, "data.test=[x1]", "data.validation=[y2]"))
    assert "data.test: no case or group is named 'x1'" in text and "'y2'" in text


def test_an_unlabeled_case_cannot_train(root, tmp_path, capsys):
    wrong = settings(root, tmp_path, "data.train=[bar4]", "data.test=[]")
    assert "case bar4 has no label" in fault(capsys, wrong)


def test_a_patch_that_no_stride_fits_is_refused(root, tmp_path, capsys):
    assert "sampling.patch [7, 7, 7]" in fault(
        capsys, settings(root, tmp_path, "sampling.patch=[7,7,7]")
    )


def test_a_device_that_is_not_there_is_refused(root, tmp_path, capsys):
    assert "run.device" in fault(capsys, settings(root, tmp_path, "run.device=cuda:9"))


def test_resume_from_a_broken_state_is_refused(root, tmp_path, capsys):
    assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    for path in (tmp_path / "runs" / "r" / "checkpoints").glob("*.pt"):
        path.write_bytes(b"broken")
    text = fault(capsys, settings(root, tmp_path), resume=True)
    assert "last.pt" in text and "\n" not in text


def test_resume_of_another_network_is_refused(root, tmp_path, capsys):
    assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    text = fault(capsys, settings(root, tmp_path, "model.base=6"), resume=True)
    run = tmp_path / "runs" / "r"
    assert "does not fit these settings, data and model.py" in text
    assert len(text.replace(str(tmp_path), "")) < 400
    assert text.strip().endswith(f"python {run}/source/train.py --resume {run}")


def test_schedules_start_peak_and_end_where_they_should():
    plain = {"lr": 1e-3, "max_lr": None, "warmup_steps": 10, "final_lr_share": 0.01}
    cosine = [train.learning_rate(s, 100, schedule="cosine", **plain) for s in range(101)]
    assert cosine[0] == pytest.approx(1e-4) and max(cosine) == cosine[10] == 1e-3
    assert cosine[100] == pytest.approx(1e-5)
    assert train.learning_rate(50, 100, schedule="constant", **plain) == 1e-3
    cycle = {**plain, "max_lr": 6e-3}
    rates = [train.learning_rate(s, 100, schedule="one_cycle", **cycle) for s in range(101)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[30] == pytest.approx(6e-3)
    assert rates[100] == pytest.approx(6e-5)
    assert all(math.isfinite(r) and r > 0 for r in rates)


def test_command_line_names_config_faults_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("training: {max_step: 3}\n")
    assert train.cli(["c.yaml"]) == 2
    assert re.search(r"c.yaml: training.max_step: .*training.max_steps", capsys.readouterr().err)
    assert train.cli(["none.yaml"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"]


def test_every_loss_part_is_logged_by_name_for_every_epoch(root, tmp_path):
    changes = ["training.max_epochs=2", "monitor.log_every=2"]  # three steps an epoch
    assert train.main(settings(root, tmp_path, *changes)) == 0
    epochs, steps = (events(tmp_path / "runs" / "r", kind) for kind in ("epoch", "step"))
    assert [e["epoch"] for e in epochs] == [0, 1] and [e["step"] for e in steps] == [2, 3, 4, 6]
    assert set(epochs[0]["loss"]) == {"weighted_bce", "soft_dice", "surface_distance", "total"}
    expected = (2 * steps[0]["loss"]["total"] + steps[1]["loss"]["total"]) / 3
    assert epochs[0]["loss"]["total"] == pytest.approx(expected)


def test_resume_with_no_state_starts_anew_and_says_so(root, tmp_path, capsys):
    assert train.main(settings(root, tmp_path, "training.max_steps=0"), resume=True) == 0
    assert "there is no saved state" in capsys.readouterr().out


def test_resume_goes_on_with_the_latest_run_of_the_name(root, tmp_path):
    for _ in range(2):
        assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    assert train.main(settings(root, tmp_path, "training.max_steps=1"), resume=True) == 0
    steps = [weights_of(tmp_path / "runs" / n)["loop"]["step"] for n in ("r", "r-2")]
    assert steps == [0, 1]


def test_resuming_past_the_stop_has_nothing_to_do(root, tmp_path):
    assert train.main(settings(root, tmp_path, "training.max_steps=4")) == 0
    assert train.main(settings(root, tmp_path, "training.max_steps=2"), resume=True) == 0
    assert weights_of(tmp_path / "runs" / "r")["loop"]["step"] == 4


def test_resume_says_which_settings_changed(root, tmp_path, capsys):
    assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0
    later = settings(root, tmp_path, "training.max_steps=1", "optim.clip=2.0")
    assert train.main(later, resume=True) == 0
    said = capsys.readouterr().out
    assert "changed: optim.clip is 2.0, was 1.0 in the saved state" in said


def test_a_crash_in_validation_loses_no_step(root, tmp_path, monkeypatch):
    def broken(*arguments, **settings):
        raise ArithmeticError

    monkeypatch.setattr(validation.sliding_window, "predict_slabs", broken)
    changes = ["validation.untrained=false", "training.max_epochs=1"]
    with pytest.raises(ArithmeticError):
        train.main(settings(root, tmp_path, *changes))
    assert weights_of(tmp_path / "runs" / "r")["loop"]["step"] == 3
    monkeypatch.undo()
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    assert [e["step"] for e in events(tmp_path / "runs" / "r", "evaluation")] == [3]


def test_a_window_that_the_strides_do_not_divide_is_refused_before_training(root, tmp_path, capsys):
    text = fault(capsys, settings(root, tmp_path, "inference.window=[15,16,16]"))
    assert "inference.window [15, 16, 16]" in text and "multiple of 2" in text


def test_a_run_folder_that_cannot_be_made_is_refused(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "run.folder" in fault(
        capsys, settings(root, tmp_path, f"run.folder={tmp_path / 'file'}")
    )


def test_a_dataset_json_of_another_tool_is_told_apart(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0}}')
    with pytest.raises(ValueError, match="another format, such as nnU-Net's"):
        casefile.read_dataset(tmp_path)


def test_every_step_says_where_its_time_went(root, tmp_path):
    assert train.main(settings(root, tmp_path, "training.accumulate=2")) == 0
    for event in events(tmp_path / "runs" / "r", "step"):
        assert list(event["seconds"]) == [part for part in timer.PARTS if part != "ranks"]
        assert sum(event["seconds"].values()) == pytest.approx(event["step_seconds"], abs=1e-4)
        assert event["seconds"]["backward"] > 0


def test_what_is_slow_is_named_and_validation_is_no_part_of_a_step(root, tmp_path, monkeypatch):
    ahead = [0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(ahead))
    monkeypatch.setattr(timer, "time", clock)

    def slower(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*arguments, **named):
            ahead.append(seconds)
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)

    slower(data.PatchDataset, "__getitem__", 1000)  # two patches, in this process
    slower(transfer, "to_device", 3000)
    slower(augment, "augment_batch", 4000)
    slower(train, "composite_loss", 5000)
    slower(model, "update_ema", 6000)
    slower(validation.Validator, "start", 10**6)
    assert train.main(settings(root, tmp_path, "training.max_steps=1")) == 0
    assert ahead.count(10**6) == 2  # before the step and after it
    (event,) = events(tmp_path / "runs" / "r", "step")
    parts = {"wait": 2000, "transfer": 3000, "augment": 4000, "forward": 0, "loss": 5000}
    parts |= {"backward": 0, "optimizer": 6000}
    assert event["seconds"] == pytest.approx(parts, abs=100)
    assert event["step_seconds"] == pytest.approx(20_000, abs=100)


def test_every_line_tells_the_time_of_its_own_steps(root, tmp_path, monkeypatch):
    update = model.update_ema
    monkeypatch.setattr(model, "update_ema", lambda *a: (time.sleep(0.1), update(*a)))
    assert train.main(settings(root, tmp_path, "training.max_steps=3")) == 0
    folder = tmp_path / "runs" / "r"
    lines = [event["seconds"]["optimizer"] for event in events(folder, "step")]
    assert len(lines) == 3 and min(lines) >= 0.1
    steps = [event["step_seconds"] for event in events(folder, "step")]
    assert weights_of(folder)["loop"]["seconds"] == pytest.approx(sum(steps), abs=1e-3)


def test_each_epoch_logs_the_share_drawn_and_what_the_cache_did(root, tmp_path):
    changes = ("sampling.foreground_share=0.75", "training.train_iterations_per_epoch=4")
    assert train.main(settings(root, tmp_path, *changes)) == 0
    for number, event in enumerate(events(tmp_path / "runs" / "r", "epoch")):
        assert event["patches"]["around_foreground"] == pytest.approx(0.75, abs=1 / 8)
        assert event["patches"]["with_foreground"] >= event["patches"]["around_foreground"]
        read = min(8 * (number + 1) + 2, 32)  # with the first batch of the next epoch
        assert event["cache"]["hits"] + event["cache"]["misses"] == read
        assert event["cache"]["cases"] == 2 and event["cache"]["misses"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_without_a_cache_has_the_weights_of_one_with(root, straight, tmp_path, workers):
    changes = ["data.cache_gb=0", f"training.workers={workers}", "augment.noise=1.0"]
    assert train.main(settings(root, tmp_path, *changes)) == 0
    assert [e["cache"]["cases"] for e in events(straight, "epoch")] == [2] * 4
    assert [e["cache"]["cases"] for e in events(tmp_path / "runs" / "r", "epoch")] == [0] * 4
    first, second = map(weights_of, (straight, tmp_path / "runs" / "r"))
    assert same_state(first["model"], second["model"])


def test_training_cases_without_a_labeled_voxel_are_refused(tmp_path, capsys):
    blank = np.full(SHAPE, 2, np.uint8)
    about = {"spacing": (1, 1, 1), "unit": "", "affine": None, "group": "a", "ignore_label": 2}
    casefile.write_case(tmp_path / "x.h5", blank[None], blank, skeleton=False, **about)
    casefile.write_dataset(
        tmp_path, classes={"background": 0, "bar": 1}, ignore_label=2, unit="", case_ids=["x"]
    )
    text = fault(capsys, settings(tmp_path, tmp_path, "data.validation=[]", "data.test=[]"))
    assert "data.train: expected cases with labeled voxels" in text
    assert not (tmp_path / "runs").exists()


def test_classes_are_drawn_by_the_ratio_and_logged_by_name(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[3:6, 4:8, 2:22], label[3:6, 14:18, 2:22] = 1, 2
    about = {"spacing": (2, 1, 1), "unit": "", "affine": None, "group": "a", "ignore_label": None}
    casefile.write_case(tmp_path / "x.h5", label[None] * 50, label, skeleton=False, **about)
    casefile.write_dataset(
        tmp_path,
        classes={"background": 0, "artery": 1, "vein": 2, "nerve": 3},
        ignore_label=None,
        unit="",
        case_ids=["x"],
    )
    changes = (
        *("data.validation=[]", "data.test=[]", "data.foreground=[artery, vein, nerve]"),
        *("sampling.class_ratio={artery: 3, vein: 1}", "sampling.foreground_share=1.0"),
        *("training.train_iterations_per_epoch=8", "training.max_epochs=1"),
        "monitor.log_every=3",  # lines of 3, 3 and 2 steps: the epoch is the mean of its batches
    )
    assert train.main(settings(tmp_path, tmp_path, *changes)) == 0
    (epoch,) = events(tmp_path / "runs" / "r", "epoch")
    assert epoch["patches"]["around_foreground"] == 1
    assert epoch["patches"]["around_artery"] == pytest.approx(0.75, abs=1 / 16)
    assert epoch["patches"]["around_vein"] == pytest.approx(0.25, abs=1 / 16)


def test_a_class_that_no_case_holds_is_said(root, tmp_path, capsys):
    content = json.loads((root / "dataset.json").read_text())
    for file in root.glob("*.h5"):
        shutil.copy(file, tmp_path)
    content["classes"]["vein"] = 5
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    named = settings(tmp_path, tmp_path, "data.foreground=[bar, vein]", "training.max_steps=0")
    assert train.main(named) == 0
    assert "no training case has a voxel of vein" in capsys.readouterr().out


def test_the_cache_keeps_what_the_setting_says(root, tmp_path):
    for number, (size, kept) in enumerate(((0, 0), (1, 2))):
        changes = (f"data.cache_gb={size}", f"run.name=k{number}", "training.max_epochs=1")
        assert train.main(settings(root, tmp_path, *changes)) == 0
        (epoch,) = events(tmp_path / "runs" / f"k{number}", "epoch")
        assert epoch["cache"]["cases"] == kept and (epoch["cache"]["budget"] > 0) == bool(kept)


def test_elastic_points_closer_than_voxels_are_refused_before_anything_is_written(
    root, tmp_path, capsys
):
    changes = ("augment.elastic_spacing=0.5", "augment.elastic_amplitude_range=[0.01,0.02]")
    text = fault(capsys, settings(root, tmp_path, *changes))
    assert "augment.elastic_spacing: expected at least a voxel, 1" in text
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------- what a score means


def resumed(root, tmp_path, capsys, *changes):
    """(lines on the best of a run resumed with changes, its standing), after one of three steps."""
    changes = [*changes, "training.max_epochs=2"]
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    lines = capsys.readouterr().out.splitlines()
    best = [line for line in lines if "the best is looked for anew" in line]
    return best, weights_of(tmp_path / "runs" / "r")["loop"]["evaluations"]


@pytest.fixture
def scored(root, tmp_path, capsys):
    """The data of a run that has done one epoch, with a best that no other can reach."""
    shutil.copytree(root, tmp_path / "data")
    one = ["validation.untrained=false", "training.max_epochs=1"]
    assert train.main(settings(tmp_path / "data", tmp_path, *one)) == 0
    path = tmp_path / "runs" / "r" / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    state["loop"]["evaluations"] |= {"best_score": 2.0, "best_step": 3}
    checkpoint.save(state, path)
    capsys.readouterr()
    return tmp_path / "data"


def test_an_unchanged_run_keeps_its_best_also_where_its_data_were_copied(scored, tmp_path, capsys):
    for case in scored.glob("*.h5"):
        os.utime(case, (1, 1))
    said, standing = resumed(scored, tmp_path, capsys)
    assert said == [] and (standing["best_score"], standing["best_step"]) == (2.0, 3)


CHANGED = {
    "validation.score=dice": "metric is dice, was surface_dice",
    "validation.tolerance=4": "tolerance is 4.0, was 2.0",
    "inference.threshold=0.5": "thresholds is (0.5,), was (0.5, 0.4, ",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_best_that_meant_something_else_does_not_count(scored, tmp_path, capsys, change):
    (said,), standing = resumed(scored, tmp_path, capsys, change)
    assert CHANGED[change] in said and standing["best_score"] <= 1
    path = tmp_path / "runs" / "r" / "checkpoints" / "best.pt"
    best = checkpoint.load(path)["loop"]["evaluations"]
    assert best["best_score"] == standing["best_score"]
    notes = events(tmp_path / "runs" / "r", "start")[-1]["notes"]
    assert said in notes


def test_a_best_of_other_labels_does_not_count(scored, tmp_path, capsys):
    with h5py.File(scored / "bar2.h5") as file:
        image, label = file["image"][:], file["label"][:]
    label[4, 12, 12] ^= 1
    about = {"spacing": (2, 1, 1), "unit": "micron", "affine": None, "group": "b"}
    casefile.write_case(scored / "bar2.h5", image, label, ignore_label=2, **about)
    (said,), standing = resumed(scored, tmp_path, capsys)
    assert "the cases or their voxels differ (bar2)" in said and standing["best_score"] <= 1


def test_a_training_case_that_has_other_voxels_by_now_is_said(scored, tmp_path, capsys):
    path = scored / "bar0.h5"
    with h5py.File(path) as file:
        image, label = 2 * file["image"][:] + 1, file["label"][:]
    about = {"spacing": (2, 1, 1), "unit": "micron", "affine": None, "group": "a"}
    casefile.write_case(path, image, label, ignore_label=2, **about)
    assert train.main(settings(scored, tmp_path, "training.max_epochs=2"), resume=True) == 0
    said = "changed: 1 training cases are others, or hold other voxels, than in the saved state"
    assert f"{said}: bar0" in capsys.readouterr().out


def test_a_case_that_was_trained_on_cannot_validate_when_a_run_goes_on(scored, tmp_path, capsys):
    moved = settings(scored, tmp_path, "data.validation=[a]", "training.max_epochs=2")
    assert train.main(moved, resume=True) == 2
    said = "data.validation: expected no case that was trained on, got bar0, bar1; begin a run"
    assert said in capsys.readouterr().err


def test_a_best_of_a_version_that_kept_no_meaning_is_told_by_its_settings(scored, tmp_path, capsys):
    path = tmp_path / "runs" / "r" / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    del state["data"]["measured"]
    checkpoint.save(state, path)
    shutil.copytree(tmp_path / "runs", tmp_path / "x" / "runs")
    said, standing = resumed(scored, tmp_path, capsys)
    assert said == [] and standing["best_score"] == 2
    (said,), standing = resumed(scored, tmp_path / "x", capsys, "validation.score=dice")
    assert "metric is dice, was surface_dice" in said and standing["best_score"] <= 1


# ---------------------------------------------------------------------------- patches of nothing


@pytest.mark.parametrize("spacing", ["[2000, 1000, 1000]", "[1e-3, 1e-3, 1e-3]", "[2, 1, 1000]"])
def test_a_spacing_of_another_unit_names_all_cases_before_the_first_step(
    root, tmp_path, capsys, spacing
):
    text = fault(capsys, settings(root, tmp_path, f"data.spacing={spacing}"))
    assert [line.split(":")[0] for line in text.splitlines()] == ["data.spacing"] * 3
    assert all(f"case {case}" in text for case in ("bar0", "bar1", "bar2"))
    assert not (tmp_path / "runs").exists()


def test_an_epoch_whose_patches_show_no_foreground_is_reported(root, tmp_path, capsys, monkeypatch):
    real = build.augment_batch

    def without(plan, samples):
        image, target, valid, skeleton = real(plan, samples)
        return image, 0 * target, valid, skeleton

    monkeypatch.setattr(build, "augment_batch", without)
    assert train.main(settings(root, tmp_path, "training.max_epochs=1")) == 0
    said = "no patch of epoch 1 of 1 shows foreground, though it is sampled around it; look at"
    assert said in capsys.readouterr().out
    (trouble,) = events(tmp_path / "runs" / "r", "trouble")
    assert trouble["kind"] == "no foreground"


def test_a_run_folder_is_resumed_with_its_own_settings_whatever_its_siblings_and_place(
    root, tmp_path, capsys
):
    for steps in (2, 5):  # r, and r-2
        assert train.main(settings(root, tmp_path, f"training.max_steps={steps}")) == 0
    (tmp_path / "runs" / "r").rename(tmp_path / "moved")
    assert train.cli(["--resume", str(tmp_path / "moved"), "training.max_steps=3"]) == 0
    assert weights_of(tmp_path / "moved")["loop"]["step"] == 3
    assert weights_of(tmp_path / "runs" / "r-2")["loop"]["step"] == 5
    assert (tmp_path / "last.pt").resolve().parents[1] == tmp_path / "moved"
    assert "changed: training.max_steps is 3, was 2" in capsys.readouterr().out
    config_file = str(tmp_path / "moved" / "config.yaml")
    assert train.cli([config_file, "--resume", "training.max_steps=4"]) == 0
    assert weights_of(tmp_path / "moved")["loop"]["step"] == 4
    assert train.cli(["--resume", str(tmp_path / "runs")]) == 2
    assert train.cli([str(tmp_path / "moved")]) == 2
    assert all("expected a config file" in e for e in capsys.readouterr().err.splitlines())
