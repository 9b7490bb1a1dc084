"""The sections of gpu_check.py: each notes its figures of one device."""

import copy
import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contenders
import gpu_steps
import gpu_verdicts as names
import training_step

import norm_mish
from patches import intensity
from runtime import build, config, sliding_window
from runtime.composite_loss import composite_loss
from runtime.microbatch import MicroBatch
from runtime.signals import CannotGoOn
from topology import distance
from volumes import casefile, phantoms

ROOT = Path(__file__).resolve().parents[1]


class Check:
    """Measurements by section, on one device."""

    def __init__(self, options, folder):
        self.small, self.device = options.small, torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.folder, self.root = folder, folder / "data"
        self.end = time.monotonic() + options.seconds
        self.file, self.results, self.failed = options.out / "gpu_check.json", {}, []
        self.shape = (16, 32, 32) if self.small else (72, 136, 136)

    def begin(self, seconds):
        """A section of so many seconds begins, with the convolutions of a run."""
        self.section_end = min(self.end, time.monotonic() + seconds)
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True

    def seconds_left(self):
        return max(1.0, self.section_end - time.monotonic())

    def note(self, section, name, value):
        self.results.setdefault(section, {})[name] = value
        text = json.dumps(self.results, indent=1, default=str)
        self.file.write_text(text + "\n", encoding="utf-8")
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

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

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


def make_data(check):
    shape, about = (60, 90, 90) if check.small else (160, 200, 200), {"affine": None}
    check.root.mkdir()
    for n in range(3):
        made = phantoms.scroll(shape, 0, n)
        about |= {"spacing": made.spacing, "unit": made.unit, "ignore_label": made.ignore_label}
        path = check.root / f"s{n}.h5"
        casefile.write_case(
            path, made.image[None], made.label, group=f"s{n}", skeleton=False, **about
        )
    casefile.write_dataset(
        check.root, classes={"background": 0, "sheet": 1}, ignore_label=made.ignore_label,
        unit=made.unit, case_ids=["s0", "s1", "s2"],
    )  # fmt: skip


def relative(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


# ---------------------------------------------------------------------------- correctness


def equal(check):
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
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
    check.note("equal", names.PATCHES, worst)
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
            abs(float(loss_there.detach().cpu() - loss.detach())),
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
    for precision in sliding_window.PRECISIONS:
        worst = float((probabilities(check.device, precision) - reference).abs().max())
        check.note("equal", f"windows {precision}: largest difference", worst)
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    check.note("equal", names.CURVES, [after_30_steps(check, p) for p in sliding_window.PRECISIONS])


def after_30_steps(check, precision):
    """The loss of a small network on the one batch that it was trained on."""
    changes = ("model.base=8", "model.dropout=0", "optim.lr=3e-3", "optim.ema=0")
    plan = check.plan(*changes, f"training.precision={precision}")
    torch.manual_seed(0)
    trainer = training_step.Trainer(plan, {name: plan.terms[name] for name in names.PLAIN_TERMS})
    image, target, valid = check.batch()
    step = functools.partial(trainer.step, lambda ticks: (image, target, valid, None))
    training_step.run_steps(step, range(4 if check.small else 30), plan.device)
    with torch.no_grad(), plan.autocast():
        return float(composite_loss(trainer.network(image), target, valid, trainer.terms)[0])


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
    try:
        for limit in names.LIMITS_GB:
            allow(limit)
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
    finally:
        allow(torch.cuda.get_device_properties(0).total_memory / 1e9)


def allow(gigabytes):
    """Let torch take no more of the GPU's memory than this."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes / total))


def tests(check):
    """Those with cuda in their names, by a Python of their own."""
    if not check.cuda:
        return check.note("tests", "not run", "they need a GPU")
    files = [
        str(path)
        for path in sorted(ROOT.glob("tests/**/test_*.py"))
        if re.search(r"def test_\w*cuda", path.read_text(encoding="utf-8"))
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", *files]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=check.seconds_left()
    )
    check.note("tests", "exit status", done.returncode)
    check.note("tests", "result", (done.stdout.strip().splitlines() or [done.stderr])[-1])
    (check.file.parent / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")


# ---------------------------------------------------------------------------- speed


def env(check):
    check.note("env", "torch", torch.__version__)
    check.note("env", "CPU cores", os.cpu_count())
    if not check.cuda:
        return
    check.note("env", "card", torch.cuda.get_device_name())
    check.note("env", "cuDNN", torch.backends.cudnn.version())
    check.note("env", "norm, Mish", norm_mish.fused(check.device)[1])
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = check.milliseconds(lambda: target.copy_(source))
    check.note("env", "copy TB/s", round(2 * source.numel() / ms / 1e9, 2))
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    check.note("env", "bf16 TFLOP/s", round(2 * 8192**3 / check.milliseconds(lambda: m @ m) / 1e9))


def inference(check):
    plan = check.plan()
    net, side = build.make_network(plan).eval(), 40 if check.small else 320
    volume = torch.randint(0, 255, (1, side, side, side), dtype=torch.uint8).numpy()
    statistics_ = {"mean": [127.0], "std": [73.0], "low": [0.0], "high": [255.0]}
    normalize = functools.partial(intensity.normalise, **statistics_)

    def seconds(function):
        function()
        check.synchronize()
        started = time.perf_counter()
        function()
        check.synchronize()
        return round(time.perf_counter() - started, 3)

    def ours(batch):
        how = {"device": check.device, "precision": plan.precision, "batch": batch}
        sliding_window.predict_volume(net, volume, check.shape, 0.25, normalize=normalize, **how)

    def theirs(batch):
        x = ((torch.from_numpy(volume).to(check.device).float() - 127) / 73)[None]
        autocast = torch.autocast(check.device.type, torch.bfloat16, enabled=check.cuda)
        with torch.inference_mode(), autocast:
            logits = sliding_window_inference(x, check.shape, batch, net, 0.25, mode="gaussian")
            return logits.float().sigmoid().cpu()

    for batch in (2, 4):
        timed = seconds(functools.partial(ours, batch))
        check.note("inference", f"ours, {batch} windows at once: s", timed)
    try:
        from monai.inferers import sliding_window_inference
    except ImportError:
        return
    for batch in (2, 4):
        timed = seconds(functools.partial(theirs, batch))
        check.note("inference", f"MONAI, {batch} windows at once: s", timed)


def terms(check):
    patch = contenders.make_patch(check.shape, check.device)
    for name, term in {**contenders.our_losses(patch), **contenders.peer_losses(patch)}.items():
        if contenders.NO_MASK not in name:

            def one(term=term):
                term(patch.logits.detach().clone().requires_grad_()).backward()

            check.note("terms", name, check.milliseconds(one, 2, 5))


# {section: (function, seconds that it may take)}
SECTIONS = {
    "env": (env, 20),
    "equal": (equal, 70),
    "ladder": (ladder, 60),
    "tests": (tests, 150),
    "train": (gpu_steps.train, 150),
    "step": (gpu_steps.step, 110),
    "inference": (inference, 70),
    "terms": (terms, 30),
}
