"""Train a network on case files made by prepare.py, and keep everything the run needs to go on.

    python train.py configs/quickstart.yaml
    python train.py configs/vessels.yaml data.root=/data/vessels training.train_batch_size=4
    python train.py configs/vessels.yaml --resume          # goes on from the newest saved state
    python train.py configs/vessels.yaml training.max_steps=0 run.name=untrained
    touch runs/vessels/stop         # leaves with its state saved, as on SIGTERM, SIGUSR1, Ctrl-C

Leaves runs/<name>/: config.yaml (all settings), source/ (the code that ran), log.jsonl,
system.jsonl, progress.png, tensorboard/, checkpoints/{last,best}.pt and the generation before.
runs/last.pt points to the newest run's last.pt. `python monitor.py runs/<name>` shows it all.

Exit status: 0 done; 1 it cannot go on (one sentence, the last good state stays); 2 the input is
wrong (one sentence per fault, nothing written); 75 stopped early with its state saved, run again
with --resume.
"""

import argparse
import contextlib
import copy
import functools
import gc
import math
import os
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console

import data
import model
from monitoring import memory, recorder
from patches import transfer
from runtime import build as planning
from runtime import checkpoint, config, nonfinite, validation
from runtime import composite_loss as composite
from runtime import folder as runs
from runtime import log as runlog
from runtime import microbatch as fitting
from runtime import run as keeping
from runtime import signals as stopping
from runtime import sliding_window as windows
from runtime import timer as clock

DONE, FAILED, WRONG_INPUT, STOPPED = 0, keeping.FAILED, 2, keeping.STOPPED
console = Console(file=runlog.Output(), highlight=False, soft_wrap=True)


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
    try:
        with contextlib.ExitStack() as stack:
            return _train(settings, resume, stack)
    finally:
        gc.collect()  # what refers to each other there would stay while another run begins


def _train(settings, resume, stack):
    # ------------------------------------------------------------------ settings and their checks
    optim, training = settings.optim, settings.training
    try:
        plan = planning.settle(settings)
        patches = planning.make_patches(plan)
        run_folder, found, state, notes = runs.open_run(
            settings.run.folder, settings.run.name, resume=resume
        )
    except (ValueError, FileNotFoundError) as error:
        return _complain(error)
    device, resumed = plan.device, state is not None
    notes += plan.notes
    if patches.missing:
        notes.append(f"sampling: no training case holds a voxel of class {patches.missing}")
    torch.set_num_threads(windows.resolve_threads(settings.run.threads))
    checkpoint.seed_generators(settings.run.seed)
    stop = stack.enter_context(stopping.Stop(training.max_hours))
    iterations = training.train_iterations_per_epoch
    total_steps = training.max_epochs * iterations
    stop_step = total_steps if training.max_steps is None else min(training.max_steps, total_steps)

    # ------------------------------------------------------------------ network, optimiser, state
    network = planning.make_network(plan)
    ema = copy.deepcopy(network).requires_grad_(False)  # what is evaluated; with decay 0 a copy
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
    )
    schedule = {"lr", "schedule", "max_lr", "warmup_steps", "final_lr_share"}
    rate_at = functools.partial(
        learning_rate, total=total_steps, **optim.model_dump(include=schedule)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
    loop = {
        "step": 0,
        "seconds": 0.0,  # of steps
        "lines": math.inf,  # of training in the log
        # Since the last line of the log, and since the epoch began: see runlog.add_parts.
        **{"sums": {}, "draws": {}, "epoch_parts": {}, "epoch_draws": {}},
        # pending: the step whose evaluation is under way; worse: evaluations since the best one;
        # chosen: what the last one chose for prediction
        **{"evaluated_step": None, "pending": None, "best_score": None, "best_step": None},
        **{"worse": 0, "chosen": {}},
        "skipped": {"in_a_row": 0, "since_log": 0, "cases": {}},  # steps without an update
        "excluded": {},  # what PatchDataset.state_dict gives
        # What the device's memory has taught: see fitting.py.
        **{"part": None, "recompute": False, "window_fits": {}},
    }
    if resumed:
        notes += config.changes(state["config"], settings.plain())
        try:
            network.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            *_, reason = str(error).split("\n\t")[:2]
            return _complain(
                f"{found}: its network does not fit these settings ({reason}); resume with the "
                f"settings in {run_folder / 'config.yaml'}"
            )
        if state["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        loop |= state["loop"]
        notes += patches.load_state_dict(loop["excluded"])
        checkpoint.set_rng_state(state["rng"])
    del state
    if settings.model.compile:
        network.compile()  # in place: the names in the state stay as they are

    # ------------------------------------------------------------------ the run records itself
    try:
        run_folder = stack.enter_context(runs.claim(run_folder, found))
        stop.look_for(run_folder / "stop")
        runs.record(run_folder, yaml.safe_dump(settings.plain(), sort_keys=False))
        log = runlog.RunLog(
            run_folder,
            tensorboard=settings.monitor.tensorboard,
            keep=loop["lines"] if resumed else None,
            step=loop["step"],
        )
    except ValueError as error:
        return _complain(error)
    except OSError as error:
        status = FAILED if checkpoint.no_room(error) else WRONG_INPUT
        return _complain(f"run.folder: expected a folder to write to, got {error}", status)
    stack.callback(log.close)
    versions = runs.versions()
    console.print(f"run        {run_folder}, seed {settings.run.seed}, lamina {versions['lamina']}")
    for line in [*planning.announce(plan, network, patches), *notes]:
        console.print(line)

    # ------------------------------------------------------------------ what keeps the run
    show = runlog.ProgressLine(console, stop_step, loop["step"])
    limit = settings.run.memory_gb and int(settings.run.memory_gb * memory.GB)
    saver = checkpoint.Saver(
        run_folder / "checkpoints",
        {
            "format": checkpoint.FORMAT,
            "scheduler": None,  # the rate is a function of the step
            "config": settings.plain(),
            "data": planning.data_facts(plan),
            "versions": versions,
        },
        {"model": network, "ema": ema, "optimizer": optimizer, "scaler": scaler},
        step=loop["step"] if resumed and found.name == "last.pt" else None,
        before=log.sync,  # a state counts lines of the log
        after=lambda path: runs.link_last(settings.run.folder, path),
    )
    stack.callback(saver.close)
    keep = keeping.Keeper(
        run_folder,
        loop,
        patches,
        log=log,
        show=show,
        stop=stop,
        saver=saver,
        iterations=iterations,
        save_minutes=training.save_minutes,
        limit=limit,
        by=settings.validation.score,
        picture=settings.monitor.picture,
    )
    keep.parts = parts = fitting.Parts(
        network,
        autocast=plan.autocast,
        report=keep.report,
        size=loop["part"],
        recompute=loop["recompute"],
    )
    keep.batches = batches = data.Batches(
        patches,
        loop["step"] * training.accumulate,
        stop_step * training.accumulate,
        batches_per_epoch=iterations * training.accumulate,
        batch_size=training.train_batch_size,
        workers=training.workers,
        prefetch=training.prefetch_factor,
        persistent=training.persistent_workers,
        pin=device.type == "cuda",
        report=keep.report,
        poll=keep.check,
        max_excluded=settings.data.max_excluded,
    )
    stack.callback(batches.close)
    stack.enter_context(
        recorder.SystemMonitor(
            run_folder,
            seconds=settings.monitor.seconds,
            roles=lambda: {os.getpid(): "training"} | batches.roles() | validator.roles(),
            step=lambda: loop["step"],
            memory_limit=limit,
        )
    )
    stack.enter_context(runs.fault_file(run_folder))

    # ------------------------------------------------------------------ the learning step
    drawn_classes = {c: n for n, c in plan.dataset.classes.items() if c in patches.classes}
    copying = transfer.copy_stream(device)
    ticks = clock.StepClock(device)

    def learn(samples):
        """Add the gradient of a batch; its loss parts, and shares of what was drawn."""
        samples = transfer.to_device(samples, device, copying)
        ticks.mark("transfer")
        image, target, valid, skeleton = planning.draw(plan, samples)
        ticks.mark("draw")
        logits = parts.forward(image)
        ticks.mark("forward")
        loss, found = composite.composite_loss(
            logits,
            target,
            valid,
            plan.terms,
            spacing=plan.spacing,
            skeleton=skeleton,
            step=loop["step"],
        )
        ticks.mark("loss")
        parts.backward(scaler.scale(loss / training.accumulate))
        ticks.mark("backward")
        return found, data.shares(samples, target, drawn_classes)

    # ------------------------------------------------------------------ loop
    # One pass more than steps: state is looked at and saved at one place, before the step. So
    # step 0 is the untrained network, and the last pass only looks.
    validator = planning.make_validator(
        plan, remembered=loop["window_fits"], report=keep.report, poll=keep.check
    )
    stack.callback(validator.close)

    patience = settings.validation.patience
    log_at = (settings.monitor.log_every, iterations, stop_step)
    timed = 0  # steps on the clock
    network.train()
    stack.enter_context(show)
    try:
        keep.record(
            "start",
            **runs.process_info(),
            steps=stop_step,
            iterations=iterations,
            log_every=settings.monitor.log_every,
            resumed=resumed,
            versions=versions,
            notes=notes,
        )
        if loop["pending"] is not None:  # of a run that was killed while the judge was at work
            files = {"candidate": saver.folder / "candidate.pt", "found": found}
            validation.start_again(validator, ema, loop, **files, report=keep.report)
        while True:
            step, epoch = loop["step"], loop["step"] // iterations
            done = step >= stop_step
            reason = None if done else keep.reason()
            at_epoch = step % iterations == 0
            if at_epoch and loop["epoch_parts"]:
                means, reached = runlog.take_epoch(loop)
                content = {"loss": means, "draws": reached, "cache": patches.cache.counts()}
                log.write("epoch", step=step, epoch=epoch - 1, **content)
                show.say(f"epoch {epoch - 1}: shares of patches: " + _numbers(reached))
            if not reason:  # what the judge says of the last evaluation is known before the next
                keep.evaluation(validator.result(wait=at_epoch))
            due = done or (at_epoch and (step // iterations) % settings.validation.every == 0)
            if step == 0 and not done:
                due = settings.validation.untrained
            due = due and not reason and loop["evaluated_step"] != step
            if due:
                loop |= {"evaluated_step": step, "pending": step}
                keep.save("last.pt", also="candidate.pt")
            elif step != saver.step and (done or at_epoch or reason or keep.due()):
                keep.save("last.pt")
            keep.tell_of_saved()
            if reason:
                raise stopping.Stopped(reason)
            if due:
                validator.start(ema, step)
            if done or not validator.background:
                keep.evaluation(validator.result(wait=True))
            saver.release()
            if at_epoch and 0 < patience <= loop["worse"]:
                show.say(f"no better {settings.validation.score} in {loop['worse']} evaluations")
                break
            if done:
                break
            lr = rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # -------------------------------------------------------------- the learning step
            ticks.start()
            taken = [next(batches) for _ in range(training.accumulate)]
            ticks.mark("wait")
            for attempt in parts.attempts():  # again in smaller parts if they took too much memory
                with attempt:
                    learnt = [learn(samples) for samples in taken]
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip or math.inf)
            faults = nonfinite.find([found for found, _ in learnt], norm)  # waits for the device
            if not faults:
                scaler.step(optimizer)
                model.update_ema(ema, network, optim.ema, step)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ticks.mark("optimiser")
            # -------------------------------------------------------------- learnt

            loop["step"] += 1
            timed += 1
            if faults:
                fault = nonfinite.explain(
                    faults,
                    [sample for samples in taken for sample in samples],
                    network,
                    functools.partial(planning.draw, plan),
                    fp16_scale=scaler.get_scale() if scaler.is_enabled() else None,
                )
                nonfinite.note(fault, loop["skipped"], training.max_skipped, keep.report)
            else:
                loop["skipped"]["in_a_row"] = 0
                for found, drawn in learnt:
                    runlog.add_parts(loop["sums"], found, 1 / training.accumulate)
                    runlog.add_parts(loop["draws"], drawn)
            if any(loop["step"] % n == 0 for n in log_at):
                means = runlog.take_means(loop)  # waits for the device
                seconds = ticks.means(timed)
                step_seconds = sum(seconds.values())
                loop["seconds"] += step_seconds * timed
                log.write(
                    "step",
                    step=loop["step"],
                    epoch=epoch,
                    loss=means,
                    lr=lr,
                    skipped=loop["skipped"]["since_log"],
                    step_seconds=round(step_seconds, 4),
                    seconds={name: round(value, 6) for name, value in seconds.items()},
                )
                show.advance(
                    loop["step"],
                    f"epoch {epoch} loss {_numbers(means)} lr {lr:.1e} {step_seconds:.2f} s/step: "
                    + clock.shares(seconds),
                    short=f"loss {means.get('total', math.nan):.3f} {step_seconds:.2f} s/step, "
                    f"wait {seconds['wait'] / step_seconds:.0%}",
                )
                loop["skipped"]["since_log"] = timed = 0
        keep.evaluation(validator.result(wait=True))
        keep.tell_of_saved(wait=True)
        keep.record("end")
    except BaseException as error:
        return keep.leave(error)
    console.print(f"done: step {loop['step']} in {loop['seconds']:.0f} s of training")
    if loop["best_score"] is not None:
        best = f"{settings.validation.score} {loop['best_score']:.4f}"
        console.print(f"best: {best} at step {loop['best_step']}, in best.pt")
    for line in [*data.describe_excluded(patches), *nonfinite.tell_of(loop["skipped"])]:
        console.print(line)
    last = Path(settings.run.folder) / "last.pt"
    console.print(f"state in {run_folder / 'checkpoints'}; next: python infer.py --ckpt {last}")
    return DONE


def _numbers(values):
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())


def _complain(text, status=WRONG_INPUT):
    print(text, file=sys.stderr)
    return status


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
        return _complain(error)
    try:
        return main(settings, resume=arguments.resume)
    except KeyboardInterrupt:
        folder = runs.newest_run_folder(settings.run.folder, settings.run.name)
        print("interrupted: " + (f"--resume goes on with {folder}" if folder else "nothing saved"))
        return STOPPED


if __name__ == "__main__":
    with stopping.listening():
        sys.exit(cli())
