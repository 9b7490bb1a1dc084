"""A network and its training step outside of a run, for those who measure them.

    setup = trial.settle(settings)                        # the checks of train.py; nothing large
    trainer, source = trial.Trainer(setup), trial.batches(setup, trial.make_patches(setup), 20)
    with contextlib.closing(source):                      # or the workers stay
        step = functools.partial(trainer.step, trial.from_loader(setup, source))
        steps = trial.run_steps(step, range(20), setup.device)
    trial.medians(steps), trial.wait_share(steps)

The step is that of train.py: the same parts, in the same order, under the same names. Nothing is
written.
"""

import copy
import dataclasses
import statistics
import threading
from dataclasses import dataclass

import psutil
import torch

import augment
import cache
import cases
import clock
import composite
import data
import loader
import memory
import model
import splits
import windows
from settings import Settings

SAMPLED_EVERY = 0.02  # seconds between two looks at the resident memory


# ---------------------------------------------------------------------------- what is settled first


@dataclass(frozen=True)
class Setup:
    """What settings and data settle before anything large is made. spacing: z, y, x."""

    settings: Settings
    device: torch.device
    precision: str
    dataset: cases.Dataset
    split: splits.Split
    foreground: list  # class ids
    terms: dict  # of the loss
    spacing: tuple
    strides: list
    kernels: list
    cache_bytes: int
    workers: int
    prefetch: int
    notes: list  # for people: what differs from the settings, and why


def settle(settings):
    """The `Setup` of settings.

    ValueError and FileNotFoundError as in train.py, one sentence per fault.
    """
    device, _ = windows.resolve_device(settings.run.device)
    dataset = cases.read_dataset(settings.data.root, settings.data.source)
    which = settings.data.model_dump(include={"train", "validation", "test", "folds", "fold"})
    split, notes = splits.choose_cases(dataset, **which)
    terms = settings.terms()
    composite.check_terms(terms, in_training=True)
    skeletons = composite.takes_skeleton(terms)
    in_validation = composite.takes_skeleton(terms, validation_only=True)
    cases.check_skeletons(split.train * skeletons + split.validation * in_validation)
    spacings = [data.network_spacing(c.spacing, settings.data.spacing) for c in split.train]
    augment.check(settings.augment.model_dump(), spacings)
    spacing = tuple(statistics.median(axis) for axis in zip(*spacings, strict=True))
    strides, kernels = _fit(settings, spacing)
    setup = Setup(
        settings=settings,
        device=device,
        precision=windows.resolve_precision(settings.training.precision, device)[0],
        dataset=dataset,
        split=split,
        foreground=splits.foreground_ids(dataset.classes, settings.data.foreground),
        terms=terms,
        spacing=spacing,
        strides=strides,
        kernels=kernels,
        cache_bytes=_cache_bytes(split.train, settings.data.cache_gb),
        workers=settings.training.workers,
        prefetch=settings.training.prefetch_factor,
        notes=notes,
    )
    return _with_fitting_workers(setup)


def _fit(settings, spacing):
    stages, strides = len(settings.model.multipliers), settings.model.strides
    window, patch = settings.inference.window, settings.sampling.patch
    return model.fit(patch, spacing, stages=stages, strides=strides, window=window)


def _cache_bytes(chosen, cache_gb):
    if cache_gb is None:
        return cache.default_budget(chosen, memory.available().bytes)
    return int(cache_gb * 1e9)


def _with_fitting_workers(setup):
    """The setup with as many workers as shared memory has room for."""
    batch_bytes = make_patches(setup).box_bytes() * setup.settings.training.train_batch_size
    free = memory.shared_memory_free()
    workers, prefetch, note = loader.fit_shared_memory(
        setup.workers, setup.prefetch, batch_bytes=batch_bytes, free=free
    )
    notes = [*setup.notes, note] if note else setup.notes
    return dataclasses.replace(setup, workers=workers, prefetch=prefetch, notes=notes)


# ---------------------------------------------------------------------------- data


def make_patches(setup, **changes):
    """The `data.PatchDataset` of a setup.

    changes: what else it shall get than the settings say, such as foreground_share=0.0, or a cache
    other than a new one.
    """
    classes, ratio = setup.dataset.classes, setup.settings.sampling.class_ratio
    arguments = {
        "foreground": data.class_weights(classes, setup.foreground, ratio),
        "skeletons": composite.takes_skeleton(setup.terms),
        **setup.settings.patch_arguments(),
        **augment.functions(setup.settings.augment.model_dump()),
    }
    if "cache" not in changes:
        arguments["cache"] = cache.VolumeCache(setup.split.train, setup.cache_bytes)
    return data.PatchDataset(setup.split.train, **(arguments | changes))


def batches(setup, patches, count, per_epoch=None):
    """`count` lists of samples as train.py's loader yields them; per_epoch: batches, None: all.

    Close it (contextlib.closing): its workers live until then.
    """
    return loader.patch_batches(
        patches,
        0,
        count,
        batches_per_epoch=per_epoch or count,
        batch_size=setup.settings.training.train_batch_size,
        workers=setup.workers,
        prefetch=setup.prefetch,
        persistent=True,
        pin=setup.device.type == "cuda",
    )


def draw(setup, samples):
    """(image, target, valid, skeleton) of a list of samples, on the device."""
    return augment.draw_batch(
        samples,
        setup.settings.sampling.patch,
        foreground=setup.foreground,
        ignore_label=setup.dataset.ignore_label,
        device=setup.device,
    )


def from_loader(setup, source):
    """What `Trainer.step` fetches batches with: read by workers, copied and drawn, as in a run."""
    copying = loader.copy_stream(setup.device)

    def fetch(ticks):
        samples = next(source)
        ticks.mark("wait")
        samples = loader.to_device(samples, setup.device, copying)
        ticks.mark("transfer")
        drawn = draw(setup, samples)
        ticks.mark("draw")
        return drawn

    return fetch


# ---------------------------------------------------------------------------- the step


def make_network(setup, outputs=1):
    """The settings' network for this many output channels, on the device, in training mode."""
    shape = setup.settings.model.model_dump(exclude={"strides", "compile"})
    channels = setup.split.train[0].channels
    network = model.UNet3D(
        channels, outputs, strides=setup.strides, kernels=setup.kernels, **shape
    ).to(setup.device)
    if setup.settings.model.compile:
        network.compile()
    return network


class Trainer:
    """A fresh network of a setup, with all that a run keeps beside it, and its training step.

    terms: of the loss, None: those of the settings.
    """

    def __init__(self, setup, terms=None):
        self.setup, optim = setup, setup.settings.optim
        self.terms = setup.terms if terms is None else terms
        self.network = make_network(setup)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
        )
        fp16 = setup.precision == "fp16"
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=fp16)

    def step(self, fetch, number, ticks):
        """Optimiser step `number` on what fetch(ticks) gives; marks its parts on the clock."""
        accumulate = self.setup.settings.training.accumulate
        for _ in range(accumulate):
            image, *truth = fetch(ticks)
            with autocast(self.setup):
                logits = self.network(image)
            ticks.mark("forward")
            loss = self._loss(logits, *truth, number=number)
            ticks.mark("loss")
            self.scaler.scale(loss / accumulate).backward()
            ticks.mark("backward")
        self._update()
        ticks.mark("optimiser")

    def _loss(self, logits, target, valid, skeleton, *, number):
        about = {"spacing": self.setup.spacing, "skeleton": skeleton, "step": number}
        return composite.composite_loss(logits, target, valid, self.terms, **about)[0]

    def _update(self):
        optim, weights = self.setup.settings.optim, list(self.network.parameters())
        self.scaler.unscale_(self.optimizer)
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(weights, optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - optim.ema)


def autocast(setup):
    """The context in which the network of a setup runs."""
    lower = windows.PRECISIONS[setup.precision]
    return torch.autocast(setup.device.type, dtype=lower, enabled=lower is not None)


# ---------------------------------------------------------------------------- time


def run_steps(step, numbers, device):
    """[{part: seconds}] of step(number, ticks), one for each number; see clock.PARTS.

    Each step has a clock of its own, read when all are done, so that no step waits for one.
    """
    clocks = [clock.StepClock(device) for _ in numbers]
    for number, ticks in zip(numbers, clocks, strict=True):
        ticks.start()
        step(number, ticks)
    return [ticks.means(1) for ticks in clocks]


def medians(steps):
    """{part: median seconds}, and "step": that of the steps as a whole; {} for no steps."""
    if not steps:
        return {}
    parts = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return parts | {"step": statistics.median(sum(step.values()) for step in steps)}


def wait_share(steps):
    """The share of all steps' time, 0 to 1, in which they waited for data; 0 for no steps."""
    total = sum(sum(step.values()) for step in steps)
    return sum(step.get("wait", 0.0) for step in steps) / total if total else 0.0


# ---------------------------------------------------------------------------- memory, load


def resident_bytes():
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


class Sampler:
    """Calls read() every `interval` seconds on a thread of its own while the block runs.

    values: what it gave, the first from the start of the block and the last from its end.
    """

    def __init__(self, read, interval):
        self.read, self.interval, self.values = read, interval, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self._stop.wait(self.interval):
            self.values.append(self.read())

    def __enter__(self):
        self.values.append(self.read())
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self.values.append(self.read())


class PeakMemory:
    """The most memory that a block took, known after it.

    ram: bytes by which the resident memory of this process grew; gpu, reserved: bytes of live
    tensors, and those that torch held for them, what was there before included; None on a CPU.
    """

    def __init__(self, device):
        self.device, self.gpu, self.reserved = device, None, None
        self._sampler = Sampler(resident_bytes, SAMPLED_EVERY)

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self._sampler.__enter__()
        return self

    def __exit__(self, *error):
        self._sampler.__exit__(*error)
        self.ram = max(self._sampler.values) - self._sampler.values[0]
        if self.device.type == "cuda":
            self.gpu = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
