"""What settings and data settle before anything large is made.

plan = settle(settings)                 # all checks; ValueError or FileNotFoundError
patches, network = make_patches(plan), make_network(plan)
"""

import functools
import statistics
from dataclasses import dataclass

import torch

import data
import model
from monitoring import memory
from patches import augment, cache
from runtime import composite_loss as composite
from runtime import evaluator, splits, validation
from runtime import sliding_window as windows
from settings import Settings
from volumes import casefile as cases


@dataclass(frozen=True)
class Plan:
    """What is settled. *_reason: for people; spacing: z, y, x."""

    settings: Settings
    device: torch.device
    device_reason: str
    precision: str
    precision_reason: str
    dataset: cases.Dataset
    split: splits.Split
    foreground: list  # class ids
    terms: dict  # of the loss
    spacing: tuple
    strides: list
    kernels: list
    cache_bytes: int
    cache_reason: str
    notes: list  # for people: what is not as one may think

    @property
    def autocast(self):
        """Makes the context in which the network runs."""
        lower = windows.PRECISIONS[self.precision]
        return functools.partial(
            torch.autocast, self.device.type, dtype=lower, enabled=lower is not None
        )


def settle(settings):
    """The `Plan` of settings.

    ValueError and FileNotFoundError, one sentence per fault, for what cannot be trained.
    """
    device, device_reason = windows.resolve_device(settings.run.device)
    precision, precision_reason = windows.resolve_precision(settings.training.precision, device)
    dataset = cases.read_dataset(settings.data.root, settings.data.source)
    which = settings.data.model_dump(include={"train", "validation", "test", "folds", "fold"})
    split, notes = splits.choose_cases(dataset, **which)
    terms = settings.terms()
    composite.check_terms(terms, in_training=True)
    evaluator.check(settings.validation.score, settings.validation.scores)
    skeletons = composite.takes_skeleton(terms)
    in_validation = composite.takes_skeleton(terms, validation_only=True)
    cases.check_skeletons(split.train * skeletons + split.validation * in_validation)
    spacings = [data.network_spacing(c.spacing, settings.data.spacing) for c in split.train]
    augment.check(settings.augment.model_dump(), spacings)
    spacing = tuple(map(statistics.median, zip(*spacings, strict=True)))
    strides, kernels = model.fit(
        settings.sampling.patch,
        spacing,
        stages=len(settings.model.multipliers),
        strides=settings.model.strides,
        window=settings.inference.window,
    )
    free, wanted = memory.available(), settings.data.cache_gb
    kept = cache.default_budget(split.train, free.bytes) if wanted is None else int(wanted * 1e9)
    return Plan(
        settings=settings,
        device=device,
        device_reason=device_reason,
        precision=precision,
        precision_reason=precision_reason,
        dataset=dataset,
        split=split,
        foreground=splits.foreground_ids(dataset.classes, settings.data.foreground),
        terms=terms,
        spacing=spacing,
        strides=strides,
        kernels=kernels,
        cache_bytes=kept,
        cache_reason=free.reason,
        notes=notes,
    )


def make_patches(plan, **changes):
    """The `data.PatchDataset` of a plan.

    changes: what else it shall get than the settings say, such as foreground_share=0.0, or a cache
    other than a new one.
    """
    classes, ratio = plan.dataset.classes, plan.settings.sampling.class_ratio
    arguments = {
        "foreground": data.class_weights(classes, plan.foreground, ratio),
        "skeletons": composite.takes_skeleton(plan.terms),
        **plan.settings.patch_arguments(),
        **augment.functions(plan.settings.augment.model_dump()),
    }
    if "cache" not in changes:
        arguments["cache"] = cache.VolumeCache(plan.split.train, plan.cache_bytes)
    return data.PatchDataset(plan.split.train, **(arguments | changes))


def make_network(plan, outputs=1):
    """The settings' network for this many output channels, on the device, in training mode."""
    shape = plan.settings.model.model_dump(exclude={"strides", "compile"})
    channels = plan.split.train[0].channels
    network = model.UNet3D(channels, outputs, strides=plan.strides, kernels=plan.kernels, **shape)
    return network.to(plan.device)


def draw(plan, samples):
    """(image, target, valid, skeleton) of a list of samples, on the device: augment.augment_batch."""
    return augment.augment_batch(
        samples,
        plan.settings.sampling.patch,
        foreground=plan.foreground,
        ignore_label=plan.dataset.ignore_label,
        device=plan.device,
    )


def evaluation_spec(plan):
    """What validation evaluates: an `evaluator.EvaluationSpec`."""
    settings = plan.settings
    asked, post = settings.validation, settings.postprocess
    threshold, size = settings.inference.threshold, post.min_component_voxels
    usual_first = sorted(asked.thresholds, key=lambda t: (abs(t - evaluator.DEFAULT_THRESHOLD), t))
    return evaluator.EvaluationSpec(
        metric=asked.score,
        names=asked.scores,
        thresholds=tuple(usual_first) if threshold is None else (threshold,),
        sizes=tuple(sorted(asked.min_component_voxels)) if size is None else (size,),
        hysteresis=post.hysteresis,
        max_hole_voxels=post.max_hole_voxels,
        closing_radius=post.closing_radius,
        foreground=tuple(plan.foreground),
        tolerance=asked.tolerance,
        terms=plan.terms,
        tile=settings.sampling.patch,
    )


def make_validator(plan, *, remembered, report, poll):
    """The `validation.Validator` of a plan. remembered: see fitting.WindowFit."""
    settings = plan.settings
    wanted = settings.validation.background
    return validation.Validator(
        plan.split.validation[: settings.validation.max_cases],
        evaluation_spec(plan),
        background=plan.device.type == "cuda" if wanted is None else wanted,
        report=report,
        poll=poll,
        spacing=settings.data.spacing,
        clip=settings.data.percentiles,
        window=settings.window_arguments() | {"remembered": remembered},
        device=plan.device,
        precision=plan.precision,
    )


def announce(plan, network, patches):
    """Lines for people: what was settled, and why."""
    settings, split = plan.settings, plan.split
    training = settings.training
    steps = training.max_epochs * training.train_iterations_per_epoch
    return [
        f"device     {plan.device} ({plan.device_reason}), {torch.get_num_threads()} CPU threads",
        f"precision  {plan.precision} ({plan.precision_reason})",
        f"data       {len(split.train)} train, {len(split.validation)} validation, "
        f"{len(split.test)} test cases of {settings.data.root}, spacing {plan.spacing} "
        f"{plan.dataset.unit}",
        f"network    {model.parameter_count(network) / 1e6:.2f} M parameters, strides "
        f"{plan.strides[1:]} for patch {settings.sampling.patch}",
        f"training   {steps} steps in {training.max_epochs} epochs, batch "
        f"{training.train_batch_size} x {training.accumulate}, workers: {training.workers}",
        f"cache      {patches.cache.announce()} ({plan.cache_reason})",
    ]


def data_facts(plan):
    """All that infer.py must know of the data, as plain values."""
    return {
        **splits.facts(plan.dataset, plan.split, plan.foreground),
        "spacing": list(plan.settings.data.spacing),  # 0 or None: an axis as it is stored
        "strides": [list(stride) for stride in plan.strides],
        "kernels": [list(kernel) for kernel in plan.kernels],
    }
