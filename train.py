"""Train a network on case files made by prepare.py, and keep everything the run needs to go on.

    python train.py configs/quickstart.yaml
    python train.py configs/vessels.yaml data.root=/data/vessels training.train_batch_size=4
    python train.py configs/vessels.yaml --resume          # goes on from the newest saved state
    python train.py configs/vessels.yaml training.max_steps=0 run.name=untrained

Leaves runs/<name>/: config.yaml (all settings), source/ (the code that ran), log.jsonl,
progress.png, tensorboard/, checkpoints/{last,best}.pt and the generation before. runs/last.pt
points to the newest run's last.pt. Exit status: 0 done, 1 the loss is not finite, 2 the input is
wrong (one sentence per fault, nothing written), 75 stopped early.
"""

import argparse
import copy
import functools
import math
import statistics
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console

import augment
import cache
import cases
import checkpoint
import clock
import composite
import config
import data
import loader
import memory
import model
import picture
import runlog
import splits
import validation
import windows

STOPPED = 75
console = Console(highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------- pure answers


def learning_rate(step, total, *, lr, schedule, max_lr, warmup_steps, final_lr_share):
    """The rate of optimiser step `step` of `total`.

    constant: lr. cosine: from lr to lr * final_lr_share. one_cycle (Smith & Topin 2018): from lr to
    max_lr over the first 30 % and down to max_lr * final_lr_share, both along cosines. The first
    warmup_steps of each are scaled down linearly.
    """
    ramp = min(1.0, (step + 1) / max(warmup_steps, 1))
    peak, rise = (max_lr, 0.3 * total) if schedule == "one_cycle" else (lr, warmup_steps)
    if schedule == "constant" or step < rise:
        share = step / max(rise, 1)
        return ramp * (lr + (peak - lr) * (1 - math.cos(math.pi * share)) / 2)
    share = (step - rise) / max(total - rise, 1)
    fall = (1 + math.cos(math.pi * share)) / 2
    return ramp * peak * (final_lr_share + (1 - final_lr_share) * fall)


# ---------------------------------------------------------------------------- the run


def main(settings, *, resume=False):
    """Train as the settings say. Returns the exit status."""

    # ------------------------------------------------------------------ settings and their checks
    optim, training = settings.optim, settings.training
    try:
        device, device_reason = windows.resolve_device(settings.run.device)
        dataset = cases.read_dataset(settings.data.root, settings.data.source)
        split, notes = splits.choose_cases(
            dataset,
            **settings.data.model_dump(include={"train", "validation", "test", "folds", "fold"}),
        )
        foreground = splits.foreground_ids(dataset.classes, settings.data.foreground)
        weights = data.class_weights(dataset.classes, foreground, settings.sampling.class_ratio)
        terms = settings.terms()
        composite.check_terms(terms, in_training=True)
        skeletons = composite.takes_skeleton(terms)
        in_validation = composite.takes_skeleton(terms, validation_only=True)
        cases.check_skeletons(split.train * skeletons + split.validation * in_validation)
        patch = settings.sampling.patch
        spacings = [data.network_spacing(c.spacing, settings.data.spacing) for c in split.train]
        spacing = tuple(map(statistics.median, zip(*spacings, strict=True)))
        augmentation = settings.augment.model_dump()
        augment.check(augmentation, spacings)
        strides, kernels = model.fit(
            patch,
            spacing,
            stages=len(settings.model.multipliers),
            strides=settings.model.strides,
            window=settings.inference.window,
        )
        free, limit = memory.available(), settings.data.cache_gb
        limit = cache.default_budget(split.train, free.bytes) if limit is None else limit * 1e9
        kept = cache.VolumeCache(split.train, int(limit))
        patches = data.PatchDataset(
            split.train,
            cache=kept,
            foreground=weights,
            skeletons=skeletons,
            **settings.patch_arguments(),
            **augment.functions(augmentation),
        )
        if patches.missing:
            notes.append(f"sampling: no training case holds a voxel of class {patches.missing}")
        run_folder, found, state, why = checkpoint.open_run(
            settings.run.folder, settings.run.name, resume=resume
        )
        notes += why
        if state is not None:
            notes += config.changes(state["config"], settings.plain())
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    precision, precision_reason = windows.resolve_precision(training.precision, device)
    torch.set_num_threads(windows.resolve_threads(settings.run.threads))
    torch.manual_seed(settings.run.seed)
    total_steps = training.max_epochs * training.train_iterations_per_epoch
    stop_step = total_steps if training.max_steps is None else min(training.max_steps, total_steps)
    iterations = training.train_iterations_per_epoch

    # ------------------------------------------------------------------ network, optimiser, state
    network = model.UNet3D(
        split.train[0].channels,
        1,
        strides=strides,
        kernels=kernels,
        **settings.model.model_dump(exclude={"strides", "compile"}),
    ).to(device)
    ema = copy.deepcopy(network).requires_grad_(False)  # what is evaluated; with decay 0 a copy
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
    )
    schedule = {"lr", "schedule", "max_lr", "warmup_steps", "final_lr_share"}
    rate_at = functools.partial(
        learning_rate, total=total_steps, **optim.model_dump(include=schedule)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = functools.partial(
        torch.autocast,
        device.type,
        dtype=windows.PRECISIONS[precision],
        enabled=precision != "fp32",
    )
    loop = {"step": 0, "evaluated_step": None, "best_score": None, "best_step": None}
    loop |= {"seconds": 0.0, "lines": 0, "epoch_parts": {}, "epoch_draws": {}}
    if state is not None:
        try:
            network.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).split("\n")[0]
            print(f"{found}: its network does not fit these settings ({reason}); resume with "
                  f"the settings in {run_folder / 'config.yaml'}", file=sys.stderr)  # fmt: skip
            return 2
        if state["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        loop |= state["loop"]
        checkpoint.set_rng_state(state["rng"])
    first_step = None if state is None else loop["step"]
    del state
    if settings.model.compile:
        network.compile()  # in place: the names in the state stay as they are

    # ------------------------------------------------------------------ the run records itself
    try:
        checkpoint.record_run(run_folder, yaml.safe_dump(settings.plain(), sort_keys=False))
    except OSError as error:
        print(f"run.folder: expected a folder to write to, got {error}", file=sys.stderr)
        return 2
    log = runlog.RunLog(
        run_folder,
        tensorboard=settings.monitor.tensorboard,
        keep=None if first_step is None else loop["lines"],
        step=loop["step"],
    )
    versions = checkpoint.versions()
    data_facts = {  # all that infer.py must know of the data
        **splits.facts(dataset, split, foreground),
        "spacing": list(settings.data.spacing),  # 0 or None: an axis is taken as it is stored
        "strides": [list(s) for s in strides],
        "kernels": [list(k) for k in kernels],
    }
    workers, prefetch, note = loader.fit_shared_memory(
        training.workers,
        training.prefetch_factor,
        batch_bytes=training.train_batch_size * patches.box_bytes(),
        free=memory.shared_memory_free(),
    )
    notes += [note] * bool(note)
    for line in [
        f"run        {run_folder}, seed {settings.run.seed}, lamina {versions['lamina']}",
        f"device     {device} ({device_reason}), {torch.get_num_threads()} CPU threads",
        f"precision  {precision} ({precision_reason})",
        f"data       {len(split.train)} train, {len(split.validation)} validation, "
        f"{len(split.test)} test cases of {settings.data.root}, spacing {spacing} {dataset.unit}",
        f"network    {model.parameter_count(network) / 1e6:.2f} M parameters, strides "
        f"{strides[1:]} for patch {patch}",
        f"training   {total_steps} steps in {training.max_epochs} epochs, batch "
        f"{training.train_batch_size} x {training.accumulate}, workers: {workers}",
        f"cache      {kept.announce()} ({free.reason})",
        *notes,
    ]:
        console.print(line)
    log.write(
        "start", step=loop["step"], epoch=loop["step"] // iterations, versions=versions, notes=notes
    )

    # ------------------------------------------------------------------ data
    batches = loader.patch_batches(
        patches,
        loop["step"] * training.accumulate,
        stop_step * training.accumulate,
        batches_per_epoch=iterations * training.accumulate,
        batch_size=training.train_batch_size,
        workers=workers,
        prefetch=prefetch,
        persistent=training.persistent_workers,
        pin=device.type == "cuda",
    )
    copying = loader.copy_stream(device)

    # ------------------------------------------------------------------ what a checkpoint holds
    constant = {
        "format": checkpoint.FORMAT,
        "scheduler": None,  # the rate is a function of the step
        "config": settings.plain(),
        "data": data_facts,
        "versions": versions,
    }
    stateful = {"model": network, "ema": ema, "optimizer": optimizer, "scaler": scaler}

    def save(name):
        state = {key: part.state_dict() for key, part in stateful.items()}
        state |= {**constant, "loop": loop | {"lines": log.lines}, "rng": checkpoint.rng_state()}
        checkpoint.save(state, run_folder / "checkpoints" / name)

    # ------------------------------------------------------------------ loop
    # One pass more than steps: state is looked at and saved at one place, before the step. So
    # step 0 is the untrained network, and the last pass only looks.
    chosen = split.validation[: settings.validation.max_cases]
    how = {
        "foreground": foreground,
        "spacing": settings.data.spacing,
        "clip": settings.data.percentiles,
        "window": settings.window_arguments(),
        "threshold": settings.inference.threshold,
        "tolerance": settings.validation.tolerance,
        "terms": terms,
        "tile": patch,
        "device": device,
        "precision": precision,
    }
    log_at = (settings.monitor.log_every, iterations, stop_step)
    sums, draws, since_log = {}, {}, 0
    ticks = clock.StepClock(device)
    drawn_classes = {c: name for name, c in dataset.classes.items() if c in patches.classes}
    network.train()
    with runlog.ProgressLine(console, stop_step, loop["step"]) as show:
        while True:
            step, epoch = loop["step"], loop["step"] // iterations
            done = step >= stop_step
            if done or step % iterations == 0:
                if step % iterations == 0 and loop["epoch_parts"]:
                    reached = runlog.means_of(loop["epoch_draws"])
                    log.write(
                        "epoch",
                        step=step,
                        epoch=epoch - 1,
                        loss=runlog.means_of(loop["epoch_parts"]),
                        draws=reached,
                        cache=kept.counts(),
                    )
                    show.say(f"epoch {epoch - 1}: shares of patches: " + _numbers(reached))
                    loop |= {"epoch_parts": {}, "epoch_draws": {}}
                on_schedule = epoch % settings.validation.every == 0
                due = done or (on_schedule if step else settings.validation.untrained)

                if step != first_step:  # a resumed step is saved already
                    save("last.pt")  # before anything that may fail
                    checkpoint.link_last(settings.run.folder, run_folder / "checkpoints/last.pt")
                if due and loop["evaluated_step"] != step:
                    scores, per_case, slices = validation.validate(ema, chosen, **how)
                    score = scores.get(settings.validation.score)
                    log.write("evaluation", step=step, epoch=epoch, scores=scores, cases=per_case)
                    if scores:
                        show.say(f"evaluation at step {step}: " + _numbers(scores))
                    if None in (score, loop["best_score"]) or score > loop["best_score"]:
                        loop |= {"best_score": score, "best_step": step}
                        save("best.pt")
                    loop["evaluated_step"] = step
                    save("last.pt")  # which knows of the best only once that is there
                    if settings.monitor.picture:
                        picture.draw_progress(
                            run_folder, run_folder.name, slices, settings.inference.threshold
                        )
            if done:
                break
            lr = rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # -------------------------------------------------------------- the learning step
            ticks.start()
            for _ in range(training.accumulate):
                samples = next(batches)
                ticks.mark("wait")
                samples = loader.to_device(samples, device, copying)
                ticks.mark("transfer")
                image, target, valid, skeleton = augment.draw_batch(
                    samples,
                    patch,
                    foreground=foreground,
                    ignore_label=dataset.ignore_label,
                    device=device,
                )
                ticks.mark("draw")
                with autocast():
                    logits = network(image)
                ticks.mark("forward")
                loss, parts = composite.composite_loss(
                    logits, target, valid, terms, spacing=spacing, skeleton=skeleton, step=step
                )
                ticks.mark("loss")
                scaler.scale(loss / training.accumulate).backward()
                ticks.mark("backward")
                runlog.add_parts(sums, parts, 1 / training.accumulate)
                runlog.add_parts(draws, data.shares(samples, target, drawn_classes))
            if optim.clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            model.update_ema(ema, network, optim.ema, step)
            ticks.mark("optimiser")
            # -------------------------------------------------------------- learnt

            loop["step"] += 1
            since_log += 1
            if any(loop["step"] % n == 0 for n in log_at):
                means = runlog.means_of(sums)  # waits for the device
                seconds = ticks.means(since_log)
                step_seconds = sum(seconds.values())
                if not all(map(math.isfinite, means.values())):
                    show.say(
                        f"step {loop['step']}: the loss is not finite ({_numbers(means)}); "
                        "the last saved state is kept; lower optim.lr, or train in fp32"
                    )
                    return 1
                loop["seconds"] += step_seconds * since_log
                for name, (_, count) in sums.items():
                    runlog.add_parts(loop["epoch_parts"], {name: means[name]}, count)
                for name, share in runlog.means_of(draws).items():
                    runlog.add_parts(loop["epoch_draws"], {name: share}, draws[name][1])
                log.write(
                    "step",
                    step=loop["step"],
                    epoch=epoch,
                    loss=means,
                    lr=lr,
                    step_seconds=round(step_seconds, 4),
                    seconds={name: round(value, 6) for name, value in seconds.items()},
                )
                show.advance(
                    loop["step"],
                    f"epoch {epoch} loss {_numbers(means)} lr {lr:.1e} {step_seconds:.2f} s/step: "
                    + clock.shares(seconds),
                    short=f"loss {means['total']:.3f} {step_seconds:.2f} s/step, "
                    f"wait {seconds['wait'] / step_seconds:.0%}",
                )
                sums, draws, since_log = {}, {}, 0

    log.write("end", step=loop["step"], epoch=loop["step"] // iterations)
    log.close()
    console.print(f"done: step {loop['step']} in {loop['seconds']:.0f} s of training")
    if loop["best_score"] is not None:
        best = f"{settings.validation.score} {loop['best_score']:.4f}"
        console.print(f"best: {best} at step {loop['best_step']}, in best.pt")
    last = Path(settings.run.folder) / "last.pt"
    console.print(f"state in {run_folder / 'checkpoints'}; next: python infer.py --ckpt {last}")
    return 0


def _numbers(values):
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())


def cli(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file with differences from the defaults")
    parser.add_argument("--resume", action="store_true", help="go on from the newest saved state")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        settings = config.load(arguments.config, arguments.overrides)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return main(settings, resume=arguments.resume)
    except KeyboardInterrupt:
        folder = checkpoint.newest_run_folder(settings.run.folder, settings.run.name)
        print("interrupted: " + (f"--resume goes on with {folder}" if folder else "nothing saved"))
        return STOPPED


if __name__ == "__main__":
    sys.exit(cli())
