"""From settings to objects: what a training script is made of.

plan = resolve(settings)                # all checks; ValueError or FileNotFoundError
patches, network = make_patches(plan), make_network(plan)
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import data
import model
import norm_mish
from monitoring import machine
from patches import augment, cache, feed
from runtime import (
    checkpoint,
    composite_loss,
    cuda,
    distributed,
    evaluator,
    outputs,
    sliding_window,
    splits,
    threads,
    validation,
)
from runtime.precision import autocast, resolve_precision
from settings import Settings
from volumes import casefile
from volumes.files import few
from volumes.volume import with_unit


@dataclass
class Plan:
    """Settings with what follows from the data. *_reason: for people; spacing: z, y, x."""

    settings: Settings
    group: distributed.Group  # the ranks that train together
    device: torch.device
    device_reason: str
    precision: str
    precision_reason: str
    dataset: casefile.Dataset
    split: splits.Split
    outputs: outputs.Outputs  # what the network tells apart
    terms: dict  # of the loss
    classes: dict  # what `composite_loss` must know of them
    spacing: tuple
    strides: list
    kernels: list
    cache_bytes: int
    cache_reason: str
    notes: list  # for people: what is not as one may think

    def autocast(self):
        """The context in which the network runs."""
        return autocast(self.device, self.precision)


def resolve(settings, group=None):
    """The `Plan` of settings, for one process or a rank of a `distributed.Group`.

    ValueError and FileNotFoundError, one sentence per fault, for what cannot be trained.
    """
    group = group or distributed.Group()
    device, device_reason = sliding_window.resolve_device(settings.run.device)
    device = distributed.device_of_rank(device, group.local_rank, group.local_size)
    precision, precision_reason = resolve_precision(settings.training.precision, device)
    dataset = casefile.read_dataset(settings.data.root, settings.data.source)
    which = settings.data.model_dump(include={"train", "validation", "test", "folds", "fold"})
    split, notes = splits.choose_cases(dataset, **which)
    named = settings.data.foreground, settings.data.regions, dataset.regions
    told_apart = outputs.choose(dataset.classes, *named)
    notes += splits.absent_regions(told_apart, validation_cases(settings, split))
    notes += cuda.notes(device, precision)
    terms = settings.terms()
    composite_loss.check_terms(terms, settings.loss.class_weights, in_training=True)
    evaluator.full_names(settings.validation.score, settings.validation.scores, told_apart)
    outputs.check_settings(told_apart, settings)
    check_skeletons(terms, split)
    notes += splits.check_sizes(settings, split)
    # All that the folds divide, so that the folds of a cross-validation train one network.
    shown = split.train + (split.validation if settings.data.folds else [])
    spacings = [data.network_spacing(c.spacing, settings.data.spacing) for c in shown]
    for case_spacing in spacings[: len(split.train)]:
        augment.elastic_range(case_spacing, settings.augment.model_dump())  # or a ValueError
    spacing = data.median_spacing(spacings)
    strides, kernels = model.fit(
        settings.sampling.patch,
        spacing,
        stages=len(settings.model.multipliers),
        strides=settings.model.strides,
        window=settings.inference.window,
    )
    available, cache_gb = machine.available(), settings.data.cache_gb
    cache_bytes = cache.default_budget(split.train, available.free, volume_names(terms))
    cache_bytes = cache_bytes if cache_gb is None else int(cache_gb * 1e9)
    if (workers := settings.training.workers) and not feed.HAS_WORKERS:
        settings.training.workers = 0
        notes.append(f"training.workers: 0 instead of {workers}, for Windows has no such workers")
    return Plan(
        settings=settings,
        group=group,
        device=device,
        device_reason=device_reason,
        precision=precision,
        precision_reason=precision_reason,
        dataset=dataset,
        split=split,
        outputs=told_apart,
        terms=terms,
        classes=loss_of_classes(settings.loss.class_weights, told_apart),
        spacing=spacing,
        strides=strides,
        kernels=kernels,
        cache_bytes=cache_bytes // group.local_size,
        cache_reason=str(available),
        notes=notes,
    )


def keep_network(plan, saved):
    """Let a run that goes on from a saved state (None: it begins) keep its strides and kernels,
    whatever the data are by now. ValueError if they do not divide the patch or the window."""
    settings = plan.settings
    if saved and "stored_spacing" not in saved["data"] and settings.postprocess.hysteresis is None:
        settings.postprocess.hysteresis = 1.0  # null was off in the versions before
    before = saved["config"]["model"] if saved else {}
    if all(before.get(k) == settings.plain()["model"][k] for k in ("multipliers", "strides")):
        strides, kernels = (
            [tuple(row) for row in saved["data"][key]] for key in ("strides", "kernels")
        )
        patch, window = settings.sampling.patch, settings.inference.window
        model.fit(patch, plan.spacing, stages=len(strides), strides=strides[1:], window=window)
        plan.strides, plan.kernels = strides, kernels


def loss_of_classes(wanted, told_apart):
    """Arguments of `composite_loss`: wanted, loss.class_weights, in the order of the regions."""
    if wanted is None:
        return {"overlapping": told_apart.overlapping, "class_weights": None}
    if not told_apart.several or (unknown := [n for n in wanted if n not in told_apart.regions]):
        got = f"got {', '.join(unknown)}" if told_apart.several else "and there is one foreground"
        raise ValueError(
            "loss.class_weights: expected names among the classes or regions that the network "
            f"tells apart ({', '.join(told_apart.regions)}), {got}"
        )
    weights = [wanted.get(name, 1.0) for name in told_apart.regions]
    return {"overlapping": told_apart.overlapping, "class_weights": weights}


def check_skeletons(terms, split):
    """ValueError that names the cases without the skeleton that a term needs."""
    for validation_only, cases in ((False, split.train), (True, split.validation)):
        needed = composite_loss.takes_skeleton(terms, validation_only=validation_only)
        if needed and (without := [case.id for case in cases if not case.skeleton]):
            raise ValueError(
                f"data.root: expected a skeleton in every case file, got none in "
                f"{few(without, 5)}; prepare these cases again without --no-skeletons, or set "
                "loss.skeleton_recall.weight to 0"
            )


def volume_names(terms):
    """What training reads of a case file."""
    skeleton = ("skeleton",) if composite_loss.takes_skeleton(terms) else ()
    return "image", "label", *skeleton


def make_patches(plan, **changes):
    """The `data.PatchDataset` of a plan.

    changes: what else it shall get than the settings say, such as foreground_share=0.0, or a cache
    other than a new one.
    """
    settings, classes = plan.settings, plan.dataset.classes
    ratio = settings.sampling.class_ratio
    arguments = {
        "foreground": data.class_weights(classes, plan.outputs.foreground, ratio),
        "skeletons": composite_loss.takes_skeleton(plan.terms),
        **settings.sampling.model_dump(include={"patch", "foreground_share", "jitter"}),
        "spacing": settings.data.spacing,
        "clip": settings.data.percentiles,
        "seed": settings.run.seed,
        "augment": settings.augment.model_dump(),
    }
    if "cache" not in changes:
        names = volume_names(plan.terms)
        arguments["cache"] = cache.VolumeCache(plan.split.train, plan.cache_bytes, names)
    return data.PatchDataset(plan.split.train, **(arguments | changes))


def make_network(plan):
    """The settings' network, on the device, in training mode."""
    network = model.build_network(
        plan.split.train[0].channels,
        plan.outputs.channels,
        strides=plan.strides,
        kernels=plan.kernels,
        settings=plan.settings.model.model_dump(),
        exclusive=plan.outputs.exclusive,
    )
    return network.to(plan.device)


def augment_batch(plan, samples):
    """(image, target, valid, skeleton) of a list of samples, on the device, each (B, C, D, H, W):
    see augment.augment_batch."""
    return augment.augment_batch(
        samples,
        plan.settings.sampling.patch,
        regions=[*plan.outputs.regions.values()],
        exclusive=plan.outputs.exclusive,
        ignore_label=plan.dataset.ignore_label,
        device=plan.device,
    )


def make_batches(plan, patches, run):
    """The `data.Batches` from the step that a `run.Run` is at to its last."""
    training = plan.settings.training
    accumulate = training.accumulate
    return data.Batches(
        patches,
        run.step * accumulate,
        run.stop_step * accumulate,
        batches_per_epoch=run.iterations * accumulate,
        batch_size=training.train_batch_size,
        workers=training.workers,
        prefetch=training.prefetch_factor,
        persistent=training.persistent_workers,
        pin=plan.device.type == "cuda",
        rank=plan.group.rank,
        ranks=plan.group.size,
        report=run.report,
        poll=run.check,
        max_excluded=plan.settings.data.max_excluded,
    )


def validation_cases(settings, split):
    """Those that are predicted in validation."""
    return split.validation[: settings.validation.max_cases]


def what_is_measured(plan):
    """What a score of validation means: plain values, which are equal where scores compare."""
    spec = evaluator.make_spec(plan)
    about = {key: getattr(spec, key) for key in ("metric", "thresholds", "sizes")}
    about |= spec.postprocess | spec.candidates
    if plan.outputs.several:
        about |= outputs.plain(plan.outputs)
    else:
        about |= {key: next(iter(about[key].values())) for key in ("thresholds", "sizes")}
        about["foreground"] = tuple(plan.outputs.foreground)
    cases = validation_cases(plan.settings, plan.split)
    fingerprints = {case.id: casefile.fingerprint(case) for case in cases}
    return about | {"tolerance": spec.tolerance, "cases": fingerprints}


def check_classes(path, before, plan):
    """ValueError if the channels of a saved state, by its metadata, are of other classes than the
    plan's: the weights may fit all the same."""
    if other := outputs.difference(outputs.of_metadata(before), plan.outputs):
        raise ValueError(
            f"{path}: expected a network for {other[1]}, got one for {other[0]}; resume with the "
            "classes it was trained on, or begin a run from it with run.init_from"
        )


def load_weights(path, networks, plan):
    """Start networks of one shape from a checkpoint's averaged weights; notes for people.

    Tensors that the file lacks, or has in another shape, stay as they are. CheckpointError if the
    file cannot be read, ValueError if no convolution fits; both leave the networks as they were.
    """
    saved, own = checkpoint.load(path), networks[0].state_dict()
    weights = saved["ema"] or saved["model"]
    fitting = {n: w for n, w in weights.items() if n in own and w.shape == own[n].shape}
    others = [
        f"{name} ({_size(name, weights)} there, {_size(name, own)} here)"
        for name in {**own, **weights}
        if name not in fitting
    ]
    listed = ", ".join(others[:10]) + f", and {len(others) - 10} more" * (len(others) > 10)
    if all(weight.ndim < 2 for weight in fitting.values()):  # biases and norms alone know nothing
        raise ValueError(
            f"run.init_from: expected a checkpoint of a network like this one, got {path}, none of "
            f"whose convolutions fits: {listed}; take the settings of model from its run"
        )
    for network in networks:
        network.load_state_dict(own | fitting)
    source = f"{Path(path).resolve()} at step {saved['loop']['step']}"  # runs/last.pt is a link
    text = f"init_from: {len(fitting)} of {len(own)} tensors loaded from {source}"
    return [text + f"; not: {listed}" * bool(others), *_other_data(path, saved, plan)]


def _size(name, weights):
    return " x ".join(map(str, weights[name].shape)) if name in weights else "none"


def _other_data(path, saved, plan):
    """Lines on what the network of a saved state saw otherwise than that of a plan will."""
    old, clip = saved["data"], plan.settings.data.clip_percentiles
    spacing = old.get("trained_spacing", plan.spacing)  # not in older versions, nor is typical
    old_clip = saved["config"]["data"]["clip_percentiles"]
    old_clip += "" if old.get("typical") else " with fill values"
    if other := outputs.difference(outputs.of_metadata(old), plan.outputs):
        yield f"init_from: the network is for {other[1]}, was for {other[0]} in {path}"
    for name, before, after in (
        ("spacing", with_unit(spacing, old["unit"]), with_unit(plan.spacing, plan.dataset.unit)),
        ("data.clip_percentiles", old_clip, clip),
    ):
        if before != after:
            yield f"init_from: {name} is {after}, was {before} in {path}"
    trained = {number for number in old.get("trained", {}).values() if number is not None}
    held_out = [case for case in plan.split.validation + plan.split.test if case.labeled]
    if known := [case.id for case in held_out if casefile.fingerprint(case) in trained]:
        yield (
            f"init_from: {path} was trained on {len(known)} validation or test cases of this run, "
            f"whose scores will be too good: {', '.join(known[:5])}" + ", ..." * (len(known) > 5)
        )


def make_validator(plan, run):
    """The `validation.Validator` of a plan and a `run.Run`."""
    settings, background = plan.settings, plan.settings.validation.background
    return validation.Validator(
        validation_cases(settings, plan.split),
        evaluator.make_spec(plan),
        background=plan.device.type == "cuda" if background is None else background,
        report=run.report,
        poll=run.check,
        progress=run.show.meanwhile,
        group=plan.group,
        spacing=settings.data.spacing,
        clip=settings.data.percentiles,
        window=settings.window_arguments() | {"remembered": run.evaluations.standing.window_fits},
        device=plan.device,
        precision=plan.precision,
    )


def check_alike(plan, about_data):
    """ValueError on all ranks if some would train otherwise than rank 0.

    about_data: the `metadata` of the plan.
    """
    settings, people = plan.settings.plain(), plan.group.people
    own = {f"{group}.{k}": v for group, some in settings.items() for k, v in some.items()}
    own |= {"run.device": plan.device.type, "training.precision": plan.precision}
    first, *others = plan.group.gather(own | {"the case files of data.root": str(about_data)})
    for rank, other in enumerate(others, 1):
        if different := [key for key in first if other.get(key) != first[key]]:
            raise ValueError(
                f"{', '.join(different)}: expected the same for all ranks, got others for rank 0 "
                f"on {people[0][0]} than for rank {rank} on {people[rank][0]}"
            )


def announce(plan, network, patches):
    """Lines for people: what was chosen, and why."""
    settings, split, group, training = plan.settings, plan.split, plan.group, plan.settings.training
    steps, most = training.max_epochs * training.train_iterations_per_epoch, training.max_steps
    stop = "" if most is None or most >= steps else f"{most} of "
    parameters = sum(p.numel() for p in network.parameters())
    return [
        f"device     {plan.device} ({plan.device_reason})",
        threads.describe(settings.run.threads, group.local_size),
        f"precision  {plan.precision} ({plan.precision_reason})",
        *([f"norm, Mish {norm_mish.fused(plan.device)[1]}"] if plan.device.type == "cuda" else []),
        f"data       {len(split.train)} train, {len(split.validation)} validation, "
        f"{len(split.test)} test cases of {settings.data.root}, spacing "
        f"{with_unit(plan.spacing, plan.dataset.unit)}",
        f"network    {parameters / 1e6:.2f} M parameters, "
        + f"strides {plan.strides[1:]} " * isinstance(network, model.UNet3D)
        + f"for patch {settings.sampling.patch}",
        *([f"classes    {plan.outputs.describe()}"] if plan.outputs.several else []),
        f"training   {stop}{steps} steps in {training.max_epochs} epochs, batch "
        f"{training.train_batch_size} x {training.accumulate}"
        + f" x {group.size} ranks" * (group.size > 1)
        + f", workers: {training.workers}",
        f"cache      {patches.cache.announce(plan.cache_reason)}",
    ]


def metadata(plan):
    """All that infer.py must know of the data, as plain values."""
    stored = [case.spacing for case in plan.split.train]
    return {
        "root": str(Path(plan.dataset.root).resolve()),
        **{key: [case.id for case in cases] for key, cases in vars(plan.split).items()},
        "channels": plan.split.train[0].channels,
        "classes": plan.dataset.classes,
        "ignore_label": plan.dataset.ignore_label,
        "unit": plan.dataset.unit,
        "foreground": plan.outputs.foreground,
        **outputs.plain(plan.outputs),
        "spacing": list(plan.settings.data.spacing),  # 0 or None: an axis as it is stored
        "measured": what_is_measured(plan),
        "typical": True,  # see data.normalisation
        "trained": {case.id: casefile.fingerprint(case) for case in plan.split.train},
        "trained_spacing": list(plan.spacing),
        "stored_spacing": [*data.median_spacing(stored)],
        "stored_range": [list(map(f, zip(*stored, strict=True))) for f in (min, max)],
        "axes": sorted({case.axes for case in plan.split.train} - {""}),
        "strides": [list(stride) for stride in plan.strides],
        "kernels": [list(kernel) for kernel in plan.kernels],
    }
