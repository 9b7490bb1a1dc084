"""What only a GPU can tell, in one call: a table, and gpu_check.json in --out.

    python benchmarks/gpu_check.py --out DIR [--sections env ladder ...] [--seconds 420]
    python benchmarks/gpu_check.py --small --device cpu          # a smoke test, in a minute

    env         card, versions, the two ceilings: memory traffic and bf16 arithmetic
    equal       a CPU against the GPU: patches, losses and gradients, distances, windows
    ladder      a training step under ever less memory: what it did, its gradient, memory kept
    train       train.py on configs/exp001_full.yaml: seconds of a step by part, load, resume
    step        milliseconds and memory of a step, each possible speed-up alone and together
    terms       milliseconds of each loss term, forward and backward
    inference   a volume of 320 voxels a side, beside MONAI's sliding window if it is installed

Sections run in this order, each behind its own except, and stop being begun after --seconds. The
JSON is written after each measurement, so that what comes too late costs nothing.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contenders

from patches import intensity
from runtime import build, config, sliding_window
from runtime.composite_loss import composite_loss
from runtime.microbatch import MicroBatch
from runtime.signals import CannotGoOn
from topology import distance
from volumes import casefile, phantoms

ROOT = Path(__file__).resolve().parents[1]
LIMITS_GB = (16, 12, 10, 8, 7, 6, 5, 4, 3.5, 3, 2.5)  # of the ladder


class Check:
    """Measurements by section, on one device."""

    def __init__(self, options, folder):
        self.small, self.device = options.small, torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.folder, self.root = folder, folder / "data"
        self.end = time.monotonic() + options.seconds
        self.file, self.results = options.out / "gpu_check.json", {}
        self.shape = (16, 32, 32) if self.small else (72, 136, 136)

    def note(self, section, name, value):
        self.results.setdefault(section, {})[name] = value
        self.file.write_text(json.dumps(self.results, indent=1, default=str))
        print(f"| {section} | {name} | {str(value)[:300]} |", flush=True)

    def plan(self, *changes):
        given = [f"data.root={self.root}", "data.folds=0", f"run.device={self.device.type}"]
        if self.small:
            given += ["model.base=4", "model.multipliers=[1,2]", "model.blocks=1"]
            given += ["sampling.patch=[16,32,32]"]
        path = ROOT / "configs" / "exp001_full.yaml"
        return build.resolve(config.load(path, [*given, "training.workers=0", *changes]))

    def batch(self, size=2):
        """(image, target, valid), each (size, 1, D, H, W), on the device."""
        made = [contenders.make_patch(self.shape, self.device, seed) for seed in range(size)]
        target, valid = (
            torch.cat([getattr(p, name) for p in made]) for name in ("target", "valid")
        )
        return torch.randn(target.shape, device=self.device), target, valid

    def milliseconds(self, function, warm=3, runs=10):
        """The median of several runs, by the device's own clock."""
        for _ in range(warm):
            function()
        times = []
        for _ in range(2 if self.small else runs):
            if self.cuda:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                function()
                after.record()
                after.synchronize()
                times.append(before.elapsed_time(after))
            else:
                started = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - started))
        return round(statistics.median(times), 3)


def relative(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


# ---------------------------------------------------------------------------- sections


def env(check):
    check.note("env", "torch", torch.__version__)
    check.note("env", "CPU cores", os.cpu_count())
    if not check.cuda:
        return
    check.note("env", "card", torch.cuda.get_device_name())
    check.note("env", "cuDNN", torch.backends.cudnn.version())
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = check.milliseconds(lambda: target.copy_(source))
    check.note("env", "copy TB/s", round(2 * source.numel() / ms / 1e9, 2))
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    check.note("env", "bf16 TFLOP/s", round(2 * 8192**3 / check.milliseconds(lambda: m @ m) / 1e9))


def equal(check):
    torch.backends.cudnn.allow_tf32 = False
    plan = check.plan("augment.noise=0", "augment.rician=0", "augment.illumination=0")
    patches, cpu = build.make_patches(plan), torch.device("cpu")
    worst = {"image": 0.0, "target": 0.0, "valid": 0.0}
    for i in range(4):
        samples = [patches[0, 2 * i], patches[0, 2 * i + 1]]
        here, there = (
            build.augment_batch(dataclasses.replace(plan, device=device), samples)
            for device in (cpu, check.device)
        )
        for name, a, b in zip(worst, here, there, strict=False):
            difference = (a.float() - b.cpu().float()).abs()
            worst[name] = max(
                worst[name], float(difference.max() if name == "image" else difference.sum())
            )
    check.note("equal", "patches: largest difference of image; voxels of target, valid", worst)
    a, b = (contenders.make_patch(check.shape, device) for device in (cpu, check.device))
    on_device = contenders.our_losses(b)
    for name, term in contenders.our_losses(a).items():
        if contenders.NO_MASK in name:
            continue
        pairs = []
        for patch, function in ((a, term), (b, on_device[name])):
            logits = patch.logits.clone().requires_grad_()
            loss = function(logits)
            loss.backward()
            pairs.append((loss, logits.grad))
        (loss, gradient), (loss_there, gradient_there) = pairs
        found = [
            float(loss_there.detach().cpu() - loss.detach()),
            relative(gradient_there, gradient),
        ]
        check.note("equal", f"loss {name}: value, gradient", found)
    mask, spacing = a.target > 0, (2.0, 1.0, 1.0)
    there = distance.truncated_edt(mask.to(check.device), 5.0, spacing)
    check.note(
        "equal", "truncated_edt", relative(there, distance.truncated_edt(mask, 5.0, spacing))
    )
    net = build.make_network(check.plan("model.base=8")).eval()
    volume = torch.rand(1, 40, *check.shape[1:]).numpy()

    def probabilities(device, precision):
        moved = copy.deepcopy(net).to(device)
        how = {"device": device, "precision": precision, "batch": 2}
        return torch.from_numpy(
            sliding_window.predict_volume(moved, volume, check.shape, 0.25, **how)
        )

    reference = probabilities(cpu, "fp32")
    for precision in ("fp32", "bf16", "fp16"):
        worst = float((probabilities(check.device, precision) - reference).abs().max())
        check.note("equal", f"windows {precision}: largest difference", worst)
    torch.backends.cudnn.allow_tf32 = True


def ladder(check):
    """One training step at a time, with less and less of the card's memory allowed."""
    plan = check.plan("model.checkpointing=false", "model.dropout=0")
    image, target, valid = check.batch()
    terms = {name: term for name, term in plan.terms.items() if name != "toploss"}
    torch.manual_seed(0)
    network = build.make_network(plan)

    def gradient(reports):
        network.checkpointing = False
        micro_batch = MicroBatch(network, plan.autocast)
        network.zero_grad(set_to_none=True)
        micro_batch.start()
        while True:
            try:
                logits = micro_batch.forward(image)
                loss, _ = composite_loss(logits, target, valid, terms)
                micro_batch.backward(loss)
                break
            except RuntimeError as error:
                logits = loss = None
                micro_batch.shrink(error, lambda kind, text, **figures: reports.append(figures))
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    reference = gradient([])
    check.note("ladder", "the same step twice", relative(gradient([]), reference))
    network.zero_grad(set_to_none=True)
    if not check.cuda:
        return
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    for limit in LIMITS_GB:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / total)
        reports, before = [], torch.cuda.memory_allocated()
        try:
            outcome = relative(gradient(reports), reference)
        except CannotGoOn as error:
            outcome = f"cannot go on: {str(error.__cause__)[:60]}"
        except Exception as error:
            outcome = f"NOT KNOWN AS MEMORY: {error!r}"[:200]
        network.zero_grad(set_to_none=True)
        kept = round((torch.cuda.memory_allocated() - before) / 1e9, 3)
        check.note("ladder", f"{limit} GB", [outcome, reports[-1:], f"{kept} GB kept"])
    torch.cuda.set_per_process_memory_fraction(1.0)


def train(check):
    """train.py itself, on the whole config: straight, and stopped and resumed."""
    steps = 4 if check.small else 48
    epoch = steps // 2
    given = [f"data.root={check.root}", "data.folds=0", f"run.folder={check.folder / 'runs'}"]
    given += [f"run.device={check.device.type}", f"training.train_iterations_per_epoch={epoch}"]
    given += ["training.max_epochs=2", "validation.max_cases=1", "validation.untrained=false"]
    given += ["training.save_minutes=null", "monitor.log_every=4", "monitor.seconds=1"]
    given += ["data.validation=[s0]", "data.test=[]"]
    if check.small:
        given += ["model.base=2", "model.multipliers=[1,2]", "model.blocks=1", "run.threads=1"]
        given += ["sampling.patch=[16,32,32]", "training.workers=0", "monitor.log_every=1"]

    def run(name, *more):
        script, settings = ROOT / "train.py", ROOT / "configs" / "exp001_full.yaml"
        command = [sys.executable, str(script), str(settings), *given, f"run.name={name}", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        folder = check.folder / "runs" / name
        if done.returncode:
            check.note(
                "train", f"{name}: exit {done.returncode}", (done.stdout + done.stderr)[-600:]
            )
        return folder

    def events(folder, file="log.jsonl"):
        return [json.loads(line) for line in (folder / file).read_text().splitlines()]

    folder = run("straight")
    lines = [e for e in events(folder) if e["event"] == "step"]
    late = lines[len(lines) // 2 :]
    names = late[-1]["seconds"]
    check.note("train", "step seconds, median", statistics.median(e["step_seconds"] for e in late))
    parts = {n: round(statistics.mean(e["seconds"].get(n, 0) for e in late), 4) for n in names}
    check.note("train", "seconds by part", parts)
    check.note("train", "last losses", lines[-1]["loss"])
    check.note("train", "troubles", [e["text"] for e in events(folder) if e["event"] == "trouble"])
    machine = events(folder, "system.jsonl")
    check.note("train", "system, a line of the middle", machine[len(machine) // 2])
    check.note("train", "GPU, by second", [str(e.get("gpus"))[:160] for e in machine[::8]])
    run("halves", f"training.max_steps={epoch}")
    folder = run("halves", "--resume")
    again = [e for e in events(folder) if e["event"] == "step"]
    check.note("train", "resumed: last losses", again[-1]["loss"])


def spread_norm(self, x):
    """Instance norm by a reduction that is spread over the chip, for comparison."""
    var, mean = torch.var_mean(x, dim=(2, 3, 4), keepdim=True, correction=0)
    scale = self.weight.view(1, -1, 1, 1, 1) * (var.float() + self.eps).rsqrt()
    shift = self.bias.view(1, -1, 1, 1, 1) - mean.float() * scale
    return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


def step(check):
    base = check.plan("model.checkpointing=false")
    image, target, valid = check.batch()
    full = [n for n, t in base.terms.items() if t["weight"] > 0 and n != "toploss"]
    plain = ["weighted_bce", "soft_dice"]

    def measure(
        name, terms=plain, *, dtype=torch.bfloat16, benchmark=True, last=False, norm=False,
        fused=False, checkpointing=False, compiled=False, profile=False,
    ):  # fmt: skip
        if time.monotonic() > check.end:
            return check.note("step", name, "not run, the time was over")
        torch.backends.cudnn.benchmark = benchmark
        before, x = torch.nn.InstanceNorm3d.forward, image
        try:
            if norm:
                torch.nn.InstanceNorm3d.forward = spread_norm
            net = build.make_network(base)
            net.checkpointing = checkpointing
            if last:
                net = net.to(memory_format=torch.channels_last_3d)
                x = image.to(memory_format=torch.channels_last_3d)
            if compiled:
                net.compile()
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused or None)
            chosen = {term: base.terms[term] for term in terms}

            def one():
                with torch.autocast(check.device.type, dtype=dtype, enabled=check.cuda):
                    logits = net(x)
                composite_loss(logits, target, valid, chosen, step=1)[0].backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            started = time.perf_counter()
            one()
            if check.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            result = {"first_s": round(time.perf_counter() - started, 2)}
            result["ms"] = check.milliseconds(one, 3, 8)
            if check.cuda:
                result["GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            check.note("step", name, result)
            if profile and check.cuda:
                check.note("step", f"{name}: kernels", kernels(one))
        except Exception as error:
            check.note("step", name, f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            torch.nn.InstanceNorm3d.forward = before
            if check.cuda:
                torch.cuda.empty_cache()

    measure("BCE + Dice", profile=True)
    measure("all terms but toploss", full)
    measure("all terms but toploss, checkpointing", full, checkpointing=True)
    measure("BCE + Dice, channels_last_3d", last=True)
    measure("BCE + Dice, spread norm", norm=True)
    measure("BCE + Dice, spread norm, fused AdamW", norm=True, fused=True)
    measure("BCE + Dice, channels_last_3d, spread norm", last=True, norm=True, profile=True)
    measure("BCE + Dice, fp16", dtype=torch.float16)
    if check.cuda:
        measure("compiled, spread norm", norm=True, compiled=True)
        measure("compiled, channels_last_3d", last=True, norm=True, compiled=True)
    measure("BCE + Dice, without cudnn.benchmark", benchmark=False, profile=True)


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


def terms(check):
    patch = contenders.make_patch(check.shape, check.device)
    for name, term in {**contenders.our_losses(patch), **contenders.peer_losses(patch)}.items():
        if contenders.NO_MASK not in name:

            def one(term=term):
                term(patch.logits.detach().clone().requires_grad_()).backward()

            check.note("terms", name, check.milliseconds(one, 2, 5))


def inference(check):
    plan = check.plan()
    net, side = build.make_network(plan).eval(), 40 if check.small else 320
    volume = torch.randint(0, 255, (1, side, side, side), dtype=torch.uint8).numpy()
    statistics_ = {"mean": [127.0], "std": [73.0], "low": [0.0], "high": [255.0]}
    normalize = functools.partial(intensity.normalise, **statistics_)

    def seconds(function):
        function()
        if check.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if check.cuda:
            torch.cuda.synchronize()
        return round(time.perf_counter() - started, 3)

    for batch in (2, 4):
        how = {"device": check.device, "precision": plan.precision, "batch": batch}
        ours = functools.partial(
            sliding_window.predict_volume,
            net,
            volume,
            check.shape,
            0.25,
            normalize=normalize,
            **how,
        )
        check.note("inference", f"ours, {batch} windows at once: s", seconds(ours))
    with contextlib.suppress(ImportError):
        from monai.inferers import sliding_window_inference

        def theirs(batch):
            x = ((torch.from_numpy(volume).to(check.device).float() - 127) / 73)[None]
            autocast = torch.autocast(check.device.type, torch.bfloat16, enabled=check.cuda)
            with torch.inference_mode(), autocast:
                logits = sliding_window_inference(x, check.shape, batch, net, 0.25, mode="gaussian")
                return logits.float().sigmoid().cpu()

        for batch in (2, 4):
            timed = seconds(functools.partial(theirs, batch))
            check.note("inference", f"MONAI, {batch} windows at once: s", timed)


SECTIONS = {f.__name__: f for f in (env, equal, ladder, train, step, terms, inference)}


def make_data(check):
    shape, about = (60, 90, 90) if check.small else (160, 200, 200), {"affine": None}
    check.root.mkdir()
    for n in range(3):
        made = phantoms.scroll(shape, 0, n)
        about |= {"spacing": made.spacing, "unit": made.unit, "ignore_label": made.ignore_label}
        path = check.root / f"s{n}.h5"
        casefile.write_case(path, made.image[None], made.label, group=f"s{n}", **about)
    casefile.write_dataset(
        check.root, classes={"background": 0, "sheet": 1}, ignore_label=made.ignore_label,
        unit=made.unit, case_ids=["s0", "s1", "s2"],
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        check = Check(options, Path(folder))
        make_data(check)
        for name in options.sections:
            if time.monotonic() > check.end:
                check.note(name, "not run", "the time was over")
                continue
            begun = time.monotonic()
            try:
                SECTIONS[name](check)
            except Exception:
                failed += 1
                check.note(name, "error", traceback.format_exc()[-1500:])
            check.note(name, "seconds", round(time.monotonic() - begun, 1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
