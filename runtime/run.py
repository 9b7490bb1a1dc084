"""One run: its folder, log and saved states, why it stops, and how it ends.

run = Run(plan, patches, state, micro_batch, stop_step=1000, opened=opened)   # loads what is there
with run:                              # the folder is ours
    run.begin(batches, validator)
    while not run.why_stop():
        ...                            # a learning step; then run.step += 1
On the way out, however that comes, the state of the last whole step is saved: see ending.py.
"""

import contextlib
import math
import os
import socket
import textwrap
import time

import psutil
import yaml
from rich.console import Console

import data
from monitoring import machine, recorder
from runtime import build, checkpoint, config, ending, evaluator, folder, nonfinite, timer
from runtime.ending import DONE, FAILED, STOPPED, WRONG_INPUT, WrongInput, checked
from runtime.evaluations import BEST, Evaluations
from runtime.log import Means, ProgressLine, RunLog, read_log
from runtime.memory_guard import MemoryGuard
from runtime.precision import keep_precision
from runtime.signals import Stop, Stopped
from runtime.splits import NO_VALIDATION, changes_of_data
from volumes.processes import command_of


class Run:
    """What happens to a run between its learning steps.

    plan: a `build.Plan`; patches: the `data.PatchDataset`; state: {key of a checkpoint: network,
    averaged network, optimizer, scaler}; micro_batch: a `microbatch.MicroBatch`; stop_step: of the
    last step. opened: what `folder.open_run` gives; a state in it is loaded into all these.
    `WrongInput` if that cannot be. step: optimizer steps done; status: what the script exits with.
    """

    def __init__(self, plan, patches, state, micro_batch, *, stop_step, opened):
        self.plan, self.settings, self.patches, self.state = plan, plan.settings, patches, state
        self.group, self.micro_batch = plan.group, micro_batch
        plain = {"highlight": False, "markup": False, "emoji": False}  # a class may be "[red]"
        self.console = Console(soft_wrap=True, quiet=not self.group.first, **plain)
        self.stop_step, self.resumed_from, self.status = stop_step, None, DONE
        self.iterations = self.settings.training.train_iterations_per_epoch
        self.step, self.seconds, self.lines = 0, 0.0, None  # seconds of steps, lines of the log
        self.means, self.evaluations = Means(), Evaluations(self)
        self.skipped = nonfinite.SkippedSteps(self.settings.training.max_skipped)
        self.parts = {  # what has a state of its own, beside the network's
            "means": self.means,
            "skipped": self.skipped,
            "evaluations": self.evaluations,
            "micro_batch": micro_batch,
            "excluded": patches,
        }
        self.stop, self.versions = Stop(self.settings.training.max_hours), folder.versions()
        self.timed, self.saved_at, self.limit = 0, time.monotonic(), None
        if self.settings.run.memory_gb:
            self.limit = int(self.settings.run.memory_gb * machine.GB) // self.group.local_size
        self.log = self.saver = None  # of rank 0, which alone writes
        # What the other ranks are told next, why all of them stop, and what all of them know.
        self.news, self.agreed_stop, self.shared = {}, None, {}
        self.metadata, self.notes = build.metadata(plan), list(plan.notes)
        if patches.missing:
            missing = [n for n, i in plan.dataset.classes.items() if i in patches.missing]
            text = f"sampling: no training case has a voxel of {', '.join(missing)}"
            self.notes.append(text)
        with checked(self.group):
            build.check_alike(plan, self.metadata)
            self._open(*opened)
        self.group.from_first(self._check_not_stopped)
        self.shared = self._state_of_step()

    def _open(self, run_folder, resumed_from, saved, notes):
        self.folder, self.resumed_from = run_folder, resumed_from
        self.notes += notes
        if saved is None:
            if (path := self.settings.run.init_from) is not None:
                networks = self.state["model"], self.state["ema"]
                self.notes += build.load_weights(path, networks, self.plan)
            return
        build.check_classes(self.resumed_from, saved["data"], self.plan)
        self.notes += keep_precision(self.plan, saved["loop"].get("precision"))
        before, now = saved["loop"].get("ranks", 1), self.group.size  # none in older states
        if before != now:
            self.notes.append(
                f"resume: ranks: {now} instead of {before}; a step is now over "
                f"{self.settings.training.train_batch_size} x "
                f"{self.settings.training.accumulate} x {now} patches, and samples others"
            )
        self.notes += config.changes(saved["config"], self.settings.plain())
        self.notes += changes_of_data(saved["data"], self.metadata)
        try:
            for key, part in self.state.items():
                if saved[key] or key != "scaler":
                    part.load_state_dict(saved[key])
        except (RuntimeError, ValueError, KeyError) as error:
            *_, reason = str(error).split("\n\t")[:2]
            raise WrongInput(
                f"{self.resumed_from}: its network does not fit these settings, data and model.py "
                f"({textwrap.shorten(reason, 120)}); go on with the settings and the code of the "
                f"run: python {self.folder / 'source' / 'train.py'} --resume {self.folder}"
            ) from error
        loop = saved["loop"]
        self.step, self.seconds, self.lines = loop["step"], loop["seconds"], loop["lines"]
        for name, part in self.parts.items():
            self.notes += part.load_state_dict(loop[name]) or []
        self.notes += self.evaluations.compare(saved)
        checkpoint.set_rng_state(saved["rng"])

    def _check_not_stopped(self):
        """Raises `WrongInput` if torchrun starts a run again that has been asked to stop."""
        last = read_log(self.folder / "log.jsonl")[-1:] if folder.under_torchrun() else []
        if self.resumed_from is None or not last or last[0].get("status") != STOPPED:
            return
        # When a rank of another machine has ended, torchrun itself sends SIGTERM to those of this.
        machines = self.group.size > self.group.local_size
        if machines and last[0]["reason"].endswith("signal SIGTERM"):
            return
        if last[0]["time"] > folder.launched_at():
            wrong = WrongInput(
                f"{self.folder} was stopped ({last[0]['reason']}); that torchrun starts it again "
                f"does not change it: go on with --resume {self.folder}"
            )
            wrong.status = STOPPED
            raise wrong

    # ------------------------------------------------------------------------ beginning and end

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop)
            self.folder = self.group.from_first(lambda: self._claim_folder(stack))
            seed, commit = self.settings.run.seed, self.versions["lamina"]
            self.console.print(f"run        {self.folder}, seed {seed}, lamina {commit}")
            for line in build.announce(self.plan, self.state["model"], self.patches) + self.notes:
                self.console.print(line)
            self.show = stack.enter_context(ProgressLine(self.console, self.stop_step, self.step))
            self.guard = MemoryGuard(self.patches.cache, limit=self.limit, report=self.report)
            self.stack = stack.pop_all()
        return self

    def _claim_folder(self, stack):
        """Make the folder this run's, with log and saver; where it is."""
        try:
            self.folder = stack.enter_context(folder.claim(self.folder, self.resumed_from))
            self.stop.look_for(self.folder / "stop")
            folder.record(self.folder, yaml.safe_dump(self.settings.plain(), sort_keys=False))
            tensorboard = self.settings.monitor.tensorboard
            self.log = RunLog(self.folder, tensorboard=tensorboard, keep=self.lines, step=self.step)
        except (ValueError, FileNotFoundError) as error:
            raise WrongInput(str(error)) from error
        except OSError as error:
            wrong = WrongInput(f"run.folder: expected a folder to write to, got {error}")
            wrong.status = FAILED if checkpoint.no_room(error) else WRONG_INPUT
            raise wrong from error
        stack.callback(self.log.close)
        self.saver = self._make_saver()
        stack.callback(self.saver.close)
        return self.folder

    def _make_saver(self):
        constant = {
            "format": checkpoint.FORMAT,
            "scheduler": None,  # the learning rate is a function of the step
            "config": self.settings.plain(),
            "data": self.metadata,
            "versions": self.versions,
        }
        is_last = self.resumed_from is not None and self.resumed_from.name == "last.pt"
        return checkpoint.Saver(
            self.folder / "checkpoints",
            constant,
            self.state,
            step=self.step if is_last else None,
            before=self.log.sync,  # a state counts lines of the log
            after=lambda path: folder.link_newest(self.settings.run.folder, path.parent),
        )

    def begin(self, batches, validator):
        """Watch over these until the run ends, and write down that it begins."""
        self.batches = batches
        self.stack.callback(batches.close)
        self.stack.callback(validator.close)
        if self.group.local_rank == 0:  # of this machine
            monitor = recorder.SystemMonitor(
                self.folder,
                "system.jsonl" if self.group.first else f"system.{socket.gethostname()}.jsonl",
                seconds=self.settings.monitor.seconds,
                roles=lambda: self.group.roles() | batches.roles() | validator.roles(),
                step=lambda: self.step,
                memory_limit=self.limit and self.limit * self.group.local_size,
            )
            self.stack.enter_context(monitor)
        if self.group.first:
            self.stack.enter_context(folder.fault_file(self.folder))
        self.record(
            "start",
            pid=os.getpid(),
            host=socket.gethostname(),
            created=round(psutil.Process().create_time(), 2),
            ranks=self.group.size,
            steps=self.stop_step,
            iterations=self.iterations,
            log_every=self.settings.monitor.log_every,
            score=validator.spec.metric,
            measured=self.metadata["measured"],
            better=evaluator.directions(validator.spec),
            resumed=self.resumed_from is not None,
            versions=self.versions,
            notes=self.notes,
        )
        self.evaluations.begin(validator, self.state["ema"], self.resumed_from)

    def __exit__(self, kind, error, trace):
        with self.stack:
            if error is None:
                try:
                    self._share_news()
                    self.evaluations.finish(wait=True)
                    self.record_saved(wait=True)
                    self.record("end")
                    self._say_goodbye()
                    return False
                except BaseException as late:
                    error = late
            self.status = ending.leave(self, error)  # raises what nobody expected
        return True

    def _say_goodbye(self):
        self.console.print(f"done: step {self.step} in {self.seconds:.0f} s of training")
        best, score = self.evaluations.standing, self.evaluations.validator.spec.metric
        if best.best_score is not None:
            self.console.print(
                f"best: {score} {best.best_score:.4f} at step {best.best_step}, in best.pt"
            )
        unjudged = [NO_VALIDATION] * (not self.plan.split.validation)
        for line in [*unjudged, *data.describe_excluded(self.patches), *self.skipped.describe()]:
            self.console.print(line)
        where = self.folder / "checkpoints"
        path = next(p for p in (where / "best.pt", where / "last.pt") if p.exists())
        self.console.print(f"state in {where}; next: {command_of('infer.py')} --ckpt {path}")

    # ------------------------------------------------------------------------ between two steps

    def why_stop(self):
        """Why the run must stop now, or None; gives memory back where that is short.

        Several ranks stop together: for what all have heard of when they met last.
        """
        reason = self._reason()
        if self.group.size == 1:
            return reason
        if reason:
            self.news["stop"] = reason
        return self.agreed_stop

    def _reason(self):
        self.record_saved()
        return self.stop.reason() or self.guard.look(self.batches)

    def check(self):
        """Raises `Stopped` if there is a reason; for what takes longer than a step."""
        reason = self._reason()
        # Where a rank has ended, torchrun sends SIGTERM to the others: no reason of its own.
        self.group.word(now=bool(reason))
        if reason:
            raise Stopped(reason)

    def meet(self, results):
        """Meet the other ranks: what one knows all know, and gradients become means over ranks.

        Returns the results of a step, as means over ranks.
        """
        if self._state_of_step() != self.shared:
            self.news["state"] = self._state_of_step()
        self._share_news()
        self.shared = self._state_of_step()
        return self.group.average(self.state["model"], results)

    def _share_news(self):
        everyone = self.group.meet(self.news)
        self.news = {}
        for rank, news in enumerate(everyone):
            if "stop" in news:
                self.agreed_stop = f"rank {rank}: {news['stop']}" if rank else news["stop"]
            for kind, text, figures in news.get("reports", ()) if self.group.first else ():
                self.report(kind, f"rank {rank}: {text}", **figures)
            if "state" in news:
                for case, reason in news["state"]["excluded"].items():
                    self.batches.exclude(case, reason, report=False)
                self.micro_batch.take_smaller(news["state"]["micro_batch"])

    def _state_of_step(self):
        """What all ranks have alike, though one of them finds it out first."""
        return {
            "excluded": dict(self.patches.excluded),
            "micro_batch": self.micro_batch.state_dict(),
        }

    def skip(self, names, samples, scaler):
        """A step had no update, for these were not finite: find out why, and count it."""
        fault = nonfinite.explain(
            names,
            samples,
            self.state["model"],
            lambda samples: build.augment_batch(self.plan, samples),
            fp16_scale=scaler.get_scale() if scaler.is_enabled() else None,
            bf16=self.plan.precision == "bf16",
            gather=self.group.gather,
        )
        self.skipped.add(fault, self.report_of_all)

    def count(self, results):
        """Add the batches of a step: a list of (loss components, shares of patches)."""
        self.skipped.in_a_row = 0
        for components, shares in results:
            self.means.add(components, shares, 1 / len(results))

    def log_step(self, lr, step_timer):
        """A line of the log and of the terminal where one is due; one of the epoch at its end."""
        step, self.timed = self.step, self.timed + 1
        if all(
            step % n for n in (self.settings.monitor.log_every, self.iterations, self.stop_step)
        ):
            return
        means, seconds = self.means.take_line(), step_timer.means(self.timed)
        step_seconds, epoch = sum(seconds.values()), (step - 1) // self.iterations
        named = f"epoch {epoch + 1} of {math.ceil(self.stop_step / self.iterations)}"
        self.seconds += step_seconds * self.timed
        skipped, self.skipped.since_log, self.timed = self.skipped.since_log, 0, 0
        if not self.group.first:
            return
        self.log.write(
            "step",
            step=step,
            epoch=epoch,
            loss=means,
            lr=lr,
            skipped=skipped,
            step_seconds=round(step_seconds, 4),
            seconds={name: round(value, 6) for name, value in seconds.items()},
        )
        speed, wait = f"{step_seconds:.2f} s/step", seconds["wait"] / step_seconds
        self.show.advance(
            step,
            f"{named} loss {_numbers(means)} lr {lr:.1e} {speed}: {timer.shares(seconds)}",
            short=f"loss {means.get('total', math.nan):.3f} {speed}, wait {wait:.0%}",
        )
        if step % self.iterations == 0 and (means := self.means.take_epoch())["loss"]:
            cache = self.patches.cache.counts()
            self.log.write("epoch", step=step, epoch=epoch, **means, cache=cache)
            shares = means["patches"]
            if shares["around_foreground"] and not shares["with_foreground"]:
                text = f"no patch of {named} shows foreground, though it is sampled around it"
                self.report("no foreground", f"{text}; look at data.spacing and augment")
            self.show.print(f"{named}: shares of patches: {_numbers(means['patches'])}")

    # ------------------------------------------------------------------------ records and saving

    def record(self, event, **fields):
        """A line of the log, at the step and epoch that is now."""
        if self.group.first:
            self.log.write(event, step=self.step, epoch=self.step // self.iterations, **fields)

    def report_of_all(self, kind, text, **figures):
        """`report` of what every rank has seen."""
        if self.group.first:
            self.report(kind, text, **figures)

    def report(self, kind, text, **figures):
        """Something went wrong, and the run goes on."""
        if not self.group.first:
            self.news.setdefault("reports", []).append((kind, text, figures))
            return
        self.show.print(f"step {self.step}: {text}")
        self.record("trouble", kind=kind, text=text, **figures)

    @property
    def saved(self):
        """Whether the state of this step is saved, or on its way to the disk, by rank 0."""
        return not self.group.first or self.saver.step == self.step

    def save_due(self):
        """Whether so much time has passed since the last save that the next one is due."""
        waited, minutes = time.monotonic() - self.saved_at, self.settings.training.save_minutes
        return bool(minutes) and waited > 60 * minutes and not self.saver.busy

    def save(self, also=None):
        """Copy the state as it is, and have it written as last.pt while training goes on."""
        if not self.group.first:
            return
        if also is None and not self.plan.split.validation:
            also = BEST
        loop = {"step": self.step, "seconds": self.seconds, "lines": self.log.lines}
        loop |= {"ranks": self.group.size, "precision": self.plan.precision}
        loop["foreground"] = self.means.foreground
        loop |= {name: part.state_dict() for name, part in self.parts.items()}
        self.saver.save(loop, also)
        self.saved_at = time.monotonic()

    def record_saved(self, *, wait=False):
        """Record what was written; wait for all of it. OSError if the disk did not take it."""
        for saved in self.saver.written(wait=wait) if self.group.first else ():
            if isinstance(saved, checkpoint.CheckpointError):
                self.evaluations.best_is_lost(saved)
                continue
            seconds = round(saved.seconds, 3)
            self.record("saved", file=saved.path.name, bytes=saved.bytes, seconds=seconds)


def _numbers(values):
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())
