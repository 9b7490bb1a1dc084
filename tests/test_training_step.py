"""The training step outside of a run, and how its time and memory are taken."""

import contextlib
import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from benchmarks import training_step
from runtime import build, checkpoint, config, timer
from volumes import casefile

CPU = torch.device("cpu")
SHAPE = (12, 24, 24)
ALONE = tuple(part for part in timer.PARTS if part != "ranks")  # of one process


def make_root(folder, shapes=(SHAPE,) * 4, rim=False):
    """Cases of a slab of foreground in noise, each in a group of its own.

    rim: whether one end of the slab is of a second class.
    """
    ids = [f"slab{i}" for i in range(len(shapes))]
    about = {"spacing": (2, 1, 1), "unit": "micron", "affine": None}
    for i, (case_id, shape) in enumerate(zip(ids, shapes, strict=True)):
        label = np.zeros(shape, np.uint8)
        label[4:7] = 1
        label[4:7, :, 20:] += rim
        noise = np.random.default_rng(i).integers(1, 99, (1, *shape))
        image = (noise + 100 * label).astype(np.uint8)
        casefile.write_case(folder / f"{case_id}.h5", image, label, group=case_id, **about)
    classes = {"background": 0, "slab": 1} | ({"rim": 2} if rim else {})
    casefile.write_dataset(folder, classes=classes, ignore_label=None, unit="micron", case_ids=ids)
    return folder


def make_settings(root, *overrides):
    content = {
        "run": {"name": "r", "folder": str(root / "runs"), "device": "cpu", "threads": 1},
        "data": {"root": str(root)},
        "sampling": {"patch": [8, 16, 16]},
        "model": {"base": 4, "multipliers": [1, 2]},
        "optim": {"lr": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "training": {"max_epochs": 1, "train_iterations_per_epoch": 3, "workers": 0},
        "validation": {"untrained": False},
        "monitor": {"tensorboard": False, "picture": False},
    }
    content["training"]["precision"] = "fp32"  # on every processor
    return config.build(config.apply_overrides(content, overrides))


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


# ---------------------------------------------------------------------------- the step


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.accumulate=2", "optim.clip=0", "loss.toploss={weight: 0.1, interval: 2}"],
        ["data.spacing=[1,1,1]", "loss.surface_distance.weight=0.5"],
        ["loss.skeleton_recall.weight=0.5"],
        ["data.foreground=[slab,rim]", "sampling.class_ratio={rim: 1}"],
    ],
    ids=["plain", "accumulated", "resampled", "skeletons", "classes"],
)
def test_the_weights_after_some_steps_are_those_of_the_run(tmp_path, changes):
    root = make_root(tmp_path, rim="data.foreground=[slab,rim]" in changes)
    for path in root.glob("*.h5"):
        with casefile.h5py.File(path, "a") as file:
            file["skeleton"][:, :12] = 0  # unlike the one that the loss would make of the target
    settings = make_settings(root, "loss.toploss.window=[8,8,8]", *changes)
    assert train.main(settings) == 0
    trained = checkpoint.load(root / "runs" / "r" / "checkpoints" / "last.pt")["model"]

    torch.manual_seed(settings.run.seed)
    plan = build.resolve(settings)
    trainer = training_step.Trainer(plan)
    count = 3 * settings.training.accumulate
    source = training_step.batches(plan, build.make_patches(plan), count + 1, per_epoch=count)
    step = functools.partial(trainer.step, training_step.from_loader(plan, source))
    training_step.run_steps(step, range(3), CPU)
    assert all(torch.equal(w, trained[n]) for n, w in trainer.network.state_dict().items())


def test_a_step_marks_its_parts_and_one_without_data_has_no_data_parts(root):
    plan = build.resolve(make_settings(root))
    patches, trainer = build.make_patches(plan), training_step.Trainer(plan)
    with contextlib.closing(training_step.batches(plan, patches, 2 + 1)) as source:
        step = functools.partial(trainer.step, training_step.from_loader(plan, source))
        real = training_step.run_steps(step, range(2), CPU)
    drawn = build.augment_batch(plan, [patches[0, 0]])
    synthetic = training_step.run_steps(
        functools.partial(trainer.step, lambda ticks: drawn), [0], CPU
    )
    assert [tuple(step) for step in real] == [ALONE] * 2
    assert [tuple(step) for step in synthetic] == [ALONE[3:]]


def test_averaged_weights_move_with_the_network(root):
    plan = build.resolve(make_settings(root, "optim.ema=0.5"))
    trainer = training_step.Trainer(plan)
    before = copy.deepcopy(trainer.ema.state_dict())
    drawn = build.augment_batch(plan, [build.make_patches(plan)[0, 0]])
    training_step.run_steps(functools.partial(trainer.step, lambda ticks: drawn), [0], CPU)
    after = trainer.network.state_dict()
    for name, average in trainer.ema.state_dict().items():
        torch.testing.assert_close(average, (before[name] + after[name]) / 2)


def test_draws_around_background_take_each_case_once(root):
    plan = build.resolve(make_settings(root))
    patches = build.make_patches(plan, foreground_share=0.0)
    assert sorted(patches[0, i]["case"] for i in range(4)) == [f"slab{i}" for i in range(4)]


# ---------------------------------------------------------------------------- time


def test_every_step_gets_its_number_and_a_time_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: sum(seen)))

    def step(number, ticks):
        seen.append(number)
        ticks.mark("forward")

    taken = [step["forward"] for step in training_step.run_steps(step, range(3, 6), CPU)]
    assert seen == [3, 4, 5] and taken == seen
