"""Train a network on case files made by prepare.py; one loop, from top to bottom.

    python train.py configs/quickstart.yaml
    python train.py configs/vessels.yaml data.root=/data/vessels training.train_batch_size=4
    python train.py configs/vessels.yaml tuned.yaml      # with what tune.py has decided
    python train.py configs/vessels.yaml --resume        # go on with the newest run of this name
    python train.py --resume runs/vessels-2              # go on with this run, by its own settings
    python train.py configs/vessels.yaml training.max_steps=0 run.name=untrained
    torchrun --nproc-per-node=4 train.py configs/vessels.yaml    # on four GPUs
    touch runs/vessels/stop         # ends it with its state saved, as SIGTERM, SIGUSR1, Ctrl-C do

Leaves runs/<name>/: config.yaml (all settings), source/ (the code that ran), log.jsonl,
system.jsonl, progress.png, tensorboard/, checkpoints/{last,best}.pt and the generation before.
runs/last.pt (to resume from) and runs/best.pt (to predict with: the best in validation) point to
those of the newest run. `python monitor.py runs/<name>` shows it all.

Exit status: 0 done; 1 cannot go on (the last good state stays); 2 the input is wrong (one sentence
per fault, nothing written); 75 stopped early with its state saved, run again with --resume.
"""

import argparse
import copy
import gc
import math
import os
import sys

# Threads that wait spin for microseconds only, not for milliseconds: beside other work they would
# take the cores from those they wait for. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

import data
import model
from runtime import build, checkpoint, config, cuda, distributed, folder, nonfinite, signals
from runtime.composite_loss import composite_loss
from runtime.ending import STOPPED, WRONG_INPUT, WrongInput, checked
from runtime.microbatch import MicroBatch
from runtime.optimizer import make_optimizer
from runtime.run import Run
from runtime.step_batches import StepBatches
from runtime.threads import use_threads
from runtime.timer import StepTimer
from volumes.processes import command_of, run_script


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


def main(settings, *, resume=False):
    """Train as the settings say. Returns the exit status."""
    with distributed.joined(settings.run.rank_timeout_minutes) as group:
        try:
            return train(settings, resume, group)
        except (WrongInput, distributed.Left) as error:
            if group.first:
                print(error, file=sys.stderr)
            return error.status
        finally:
            gc.collect()  # what refers to itself in a circle would stay while another run begins


def train(settings, resume, group):
    # ------------------------------------------------------------------ settings and data
    with checked(group):  # faults of settings and data are found here, before anything is written
        plan = build.resolve(settings, group)
        patches = build.make_patches(plan)
    with checked(group):
        where = settings.run.folder, settings.run.name
        opened = group.from_first(lambda: folder.open_run(*where, resume=resume))
        build.keep_network(plan, opened[2])
    optim, training, device = settings.optim, settings.training, plan.device
    iterations, accumulate = training.train_iterations_per_epoch, training.accumulate
    total_steps = training.max_epochs * iterations
    stop_step = total_steps if training.max_steps is None else min(training.max_steps, total_steps)
    use_threads(settings.run.threads, group.local_size)
    cuda.set_deterministic(settings.run.deterministic, device)
    checkpoint.seed_generators(settings.run.seed)

    # ------------------------------------------------------------------ network, optimizer
    network = build.make_network(plan)  # on the device; strides fit the patch and the spacing
    ema = copy.deepcopy(network).requires_grad_(False)  # what is evaluated; with decay 0 a copy
    optimizer = make_optimizer(network, optim, device)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
    micro_batch = MicroBatch(network, plan.autocast)  # a batch in parts, where memory is short
    schedule = optim.model_dump(
        include={"lr", "schedule", "max_lr", "warmup_steps", "final_lr_share"}
    )

    # ------------------------------------------------------------------ the run's state
    state = {"model": network, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    run = Run(plan, patches, state, micro_batch, stop_step=stop_step, opened=opened)
    del opened  # the saved state is in the network and the others by now
    if settings.model.compile:
        network.compile()  # in place: the names in the state stay as they are
    class_names = {c: n for n, c in plan.dataset.classes.items() if c in patches.classes}
    timer = StepTimer(device)

    # ------------------------------------------------------------------ loop
    # One pass more than there are steps: the state is evaluated and saved at one place, before the
    # step. So step 0 is the untrained network, and the last pass only looks.
    with run:  # the folder is ours; on the way out, however that comes, the state is saved
        batches = build.make_batches(plan, patches, run)
        step_batches = StepBatches(plan, batches, timer)
        run.begin(batches, build.make_validator(plan, run))
        network.train()
        while True:
            step = run.step
            done, epoch_begins = step >= stop_step, step % iterations == 0
            if not done and (reason := run.why_stop()):  # a signal, a stop file, time, memory
                raise signals.Stopped(reason)
            run.evaluations.finish(wait=epoch_begins)  # of one that went on beside training
            if run.evaluations.due(done):
                run.evaluations.start(ema, wait=done)  # saves first; it may become the best
            elif not run.saved and (done or epoch_begins or run.save_due()):
                run.save()
            if done or (epoch_begins and run.evaluations.out_of_patience()):
                break

            # -------------------------------------------------------------- the learning step
            lr = learning_rate(step, total_steps, **schedule)
            for weights in optimizer.param_groups:
                weights["lr"] = lr
            timer.start()
            samples_of_step = step_batches.take()  # of the first step; later ones have come before
            group.seed_step(settings.run.seed, step)
            micro_batch.start()
            while True:  # once more, with less, if the device ran out of memory
                try:
                    results = []
                    for samples in samples_of_step:
                        image, target, valid, skeleton = step_batches.on_device(samples)
                        logits = micro_batch.forward(image)  # (B, K, D, H, W), of all scales
                        timer.mark("forward")
                        loss, components = composite_loss(
                            logits, target, valid, plan.terms, **plan.classes,
                            spacing=[s["spacing"] for s in samples], skeleton=skeleton, step=step,
                            over_ranks=group.over_ranks(step, len(results)),
                        )  # fmt: skip
                        timer.mark("loss")
                        micro_batch.backward(scaler.scale(loss / accumulate))
                        timer.mark("backward")
                        shares = data.shares(samples, target, valid, class_names)
                        results.append((components, shares))
                    break
                except RuntimeError as error:
                    logits = loss = components = results = None  # they hold the activations
                    micro_batch.shrink(error, run.report)
            results = run.meet(results)  # gradients and results become means over ranks
            if group.size > 1:
                timer.mark("ranks")
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip or math.inf)
            check = nonfinite.Check([c for c, _ in results], norm)  # on its way to the host
            timer.mark("optimizer")
            step_batches.fetch_next()  # what the device does while the host waits and goes on
            broken = check.names()  # waits for the device, once in a step
            if not broken:
                scaler.step(optimizer)
                model.update_ema(ema, network, optim.ema, step)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            timer.mark("optimizer")
            run.step += 1
            # -------------------------------------------------------------- from here only looking

            if broken:
                run.skip(broken, [s for samples in samples_of_step for s in samples], scaler)
            else:
                run.count(results)
            run.log_step(lr, timer)
    return run.status


def cli(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "a YAML file with differences from the defaults; with --resume also a run folder"
    parser.add_argument("config", help=what)
    parser.add_argument("--resume", action="store_true", help="go on from the newest saved state")
    parser.add_argument("more", nargs="*", metavar="MORE.yaml | group.key=value")
    arguments = parser.parse_intermixed_args(argv)
    run = folder.run_folder_of(arguments.config) if arguments.resume else None
    try:
        settings = config.load(run / "config.yaml" if run else arguments.config, arguments.more)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    if run:
        settings.run.folder = str(run.parent)  # it may have been moved
    try:
        return main(settings, resume=run or arguments.resume)
    except KeyboardInterrupt:
        newest = run or folder.newest_run_folder(settings.run.folder, settings.run.name)
        goes_on = f"{command_of('train.py')} --resume {newest} goes on"
        print(f"interrupted: {goes_on if newest else 'nothing is saved'}")
        return STOPPED


if __name__ == "__main__":
    with signals.listening():
        run_script(cli)
