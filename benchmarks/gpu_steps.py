"""The training step for gpu_check.py: in runs of train.py, and alone beside those of peers."""

import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_verdicts as names
import plain_network
import plain_steps
import training_step

from runtime import build, checkpoint, timer

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, STEPS = 4, 32  # of a training step; two of the latter have toploss
PEERS = {
    "MONAI's step, bf16": plain_steps.monai_step,
    "nnU-Net-like step, fp16": functools.partial(plain_steps.nnunet_step, dtype=torch.float16),
    "nnU-Net-like step, bf16": functools.partial(plain_steps.nnunet_step, dtype=torch.bfloat16),
}


# ---------------------------------------------------------------------------- runs of train.py


def run_training(check, name, *changes):
    """The folder of a run of train.py on configs/exp001_full.yaml."""
    given = [f"data.root={check.root}", "data.folds=0", f"run.folder={check.folder / 'runs'}"]
    given += [f"run.device={check.device.type}", f"run.name={name}", "training.max_epochs=1"]
    given += ["validation.max_cases=1", "training.save_minutes=null", "monitor.tensorboard=false"]
    given += ["monitor.picture=false", "data.validation=[s0]", "data.test=[]"]
    command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "exp001_full.yaml"]
    left = check.seconds_left()
    done = subprocess.run(
        [*command, *given, *changes], capture_output=True, text=True, timeout=left
    )
    if done.returncode:
        raise RuntimeError(f"train.py, {name}: exit {done.returncode}: {done.stderr[-600:]}")
    return check.folder / "runs" / name


def train(check):
    small = ["model.multipliers=[1,2]", "model.blocks=1", "sampling.patch=[16,32,32]"]
    small += ["training.workers=0", "monitor.log_every=1", f"model.base={2 if check.small else 8}"]
    small += ["run.threads=1"] * check.small
    resume(check, small)
    steps = 4 if check.small else 160
    iterations = f"training.train_iterations_per_epoch={steps}"
    how = small if check.small else ["monitor.log_every=8", "monitor.seconds=0.25"]
    folder = run_training(check, "full", iterations, *how)
    log, machine = (
        [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]
        for file in ("log.jsonl", "system.jsonl")
    )
    late = [e for e in log if e["event"] == "step" and e["step"] > steps // 2]
    parts = {
        name: statistics.mean(e["seconds"].get(name, 0.0) for e in late) for name in timer.PARTS
    }
    seconds = statistics.mean(e["step_seconds"] for e in late)
    check.note("train", "step seconds", round(seconds, 4))
    check.note("train", "seconds by part", {name: round(s, 4) for name, s in parts.items()})
    check.note("train", "wait share", round(parts["wait"] / seconds, 4))
    check.note("train", "last losses", late[-1]["loss"])
    check.note("train", "troubles", [e["text"] for e in log if e["event"] == "trouble"])
    gpus = [gpu for e in machine if steps // 2 < (e["step"] or 0) < steps for gpu in e["gpus"]]
    if loads := [gpu["load"] for gpu in gpus if gpu["load"] is not None]:
        check.note("train", "GPU load, percent", round(statistics.mean(loads), 1))
    check.note("train", "system, the last line", machine[-1])


def resume(check, small):
    """A run that was stopped and resumed against one that was not, with run.deterministic."""
    exact = [*small, "run.deterministic=true", "validation.untrained=false"]
    exact.append(f"training.train_iterations_per_epoch={4 if check.small else 12}")
    straight = run_training(check, "straight", *exact)
    run_training(check, "halves", *exact, f"training.max_steps={2 if check.small else 6}")
    halves = run_training(check, "halves", *exact, "--resume")
    states = [checkpoint.load(f / "checkpoints" / "last.pt") for f in (straight, halves)]
    a, b = ([*tensors([s[key] for key in ("model", "ema", "optimizer")])] for s in states)
    equal = len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    check.note("train", names.RESUMED, equal)
    check.note("train", "deterministic: tensors compared", len(a))


def tensors(content):
    """All tensors of nested dicts and lists, in order."""
    if torch.is_tensor(content):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors(value)


# ---------------------------------------------------------------------------- a step alone


def step(check):
    plan = check.plan("model.checkpointing=false")
    patches = build.make_patches(plan)
    drawn = build.augment_batch(plan, [patches[0, i] for i in range(2)])
    ticks = timer.StepTimer(plan.device)

    def ours(plan, terms=None):
        trainer = training_step.Trainer(plan, terms)
        return lambda number: trainer.step(lambda ticks: drawn, number, ticks)

    def peer(build):
        names = {"base", "multipliers", "blocks", "dropout"}
        shape = plan.settings.model.model_dump(include=names)
        network = plain_network.PlainUNet(plan.strides, plan.kernels, **shape).to(plan.device)
        take = build(network)
        image, target = drawn[0], drawn[1].float()
        with torch.no_grad(), plan.autocast():
            shapes = [logits.shape[2:] for logits in network(image)]
        targets = [F.interpolate(target, size=shape) for shape in shapes]
        return lambda number: take(image, targets)

    plain = {name: plan.terms[name] for name in names.PLAIN_TERMS}
    measure(check, names.ALL, lambda: ours(plan), profiled=True)
    measure(check, names.PLAIN, lambda: ours(plan, plain))
    for name, build_step in PEERS.items():
        measure(check, name, lambda build_step=build_step: peer(build_step), profiled=True)
    measure(check, names.RECOMPUTED, lambda: ours(check.plan("model.checkpointing=true")))


def measure(check, name, make, *, profiled=False):
    """Note the mean seconds of the training steps one(number) that make() gives, and memory."""
    warm_up, steps = (1, 2) if check.small else (WARM_UP, STEPS)
    numbers = range(17 - warm_up, 17 + steps)  # toploss acts in the last one of the warm-up
    try:
        gc.collect()
        if check.cuda:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        one = make()
        for number in numbers[:warm_up]:
            one(number)
        check.synchronize()
        figures = {"warm-up": round(time.perf_counter() - started, 1)}
        if check.cuda:
            torch.cuda.empty_cache()  # the workspaces of convolutions that were not chosen
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for number in numbers[warm_up:]:
            one(number)
        check.synchronize()
        figures["s"] = round((time.perf_counter() - started) / steps, 4)
        if check.cuda:
            figures["GB"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
            figures["GB reserved"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        check.note("step", name, figures)
        if profiled and check.cuda:
            check.note("step", f"{name}: kernels", kernels(lambda: one(numbers[-1])))
    except ImportError as error:  # a peer's package
        check.note("step", name, f"not measured: {error}")
    except Exception as error:
        check.failed.append(name)
        check.note("step", name, f"{type(error).__name__}: {str(error)[:300]}")


def kernels(function):
    """{"launches", "ms", "longest": [(ms, count, name)]} of the device's kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    rows = [
        (round(e.self_device_time_total / 1e3, 3), e.count, e.key[:70])
        for e in profiler.key_averages()
        if e.self_device_time_total > 0
    ]
    total = {"launches": sum(row[1] for row in rows), "ms": round(sum(row[0] for row in rows), 2)}
    return total | {"longest": sorted(rows, reverse=True)[:12]}
