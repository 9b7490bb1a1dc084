"""A network and its training step outside of a run, for those who measure them.

    plan = build.resolve(settings)
    trainer = training_step.Trainer(plan)
    source = training_step.batches(plan, build.make_patches(plan), 20 + 1)
    with contextlib.closing(source):                      # or the workers stay
        step = functools.partial(trainer.step, training_step.from_loader(plan, source))
        steps = training_step.run_steps(step, range(20), plan.device)

The step is that of train.py: the same parts, in the same order, under the same names; it fetches
the first batch of the next step too, so that a source has one more than the steps take. Nothing is
written.
"""

import copy
import math

import psutil
import torch

import data
from patches import transfer
from runtime import build, composite_loss, nonfinite, timer
from runtime.optimizer import make_optimizer

# ---------------------------------------------------------------------------- data


def batches(plan, patches, count, per_epoch=None):
    """`count` lists of samples as train.py's loader yields them; per_epoch: batches, None: all.

    Close it (contextlib.closing): its workers live until then.
    """
    training = plan.settings.training
    return data.Batches(
        patches,
        0,
        count,
        batches_per_epoch=per_epoch or count,
        batch_size=training.train_batch_size,
        workers=training.workers,
        prefetch=training.prefetch_factor,
        persistent=True,
        pin=plan.device.type == "cuda",
    )


def from_loader(plan, source):
    """What `Trainer.step` fetches batches with: read by workers, copied and drawn, as in a run."""
    copying = transfer.copy_stream(plan.device)

    def fetch(ticks):
        samples = next(source)
        ticks.mark("wait")
        samples = transfer.to_device(samples, plan.device, copying)
        ticks.mark("transfer")
        drawn = build.augment_batch(plan, samples)
        ticks.mark("augment")
        return drawn

    return fetch


# ---------------------------------------------------------------------------- the step


class Trainer:
    """A fresh network of a plan, with all that a run keeps beside it, and its training step.

    terms: of the loss, None: those of the settings.
    """

    def __init__(self, plan, terms=None):
        self.plan = plan
        self.terms = plan.terms if terms is None else terms
        self.network = build.make_network(plan)
        if plan.settings.model.compile:
            self.network.compile()
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = make_optimizer(self.network, plan.settings.optim, plan.device)
        self.fetched = []
        fp16 = plan.precision == "fp16"
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=fp16)

    def step(self, fetch, number, ticks):
        """Optimizer step `number` on what fetch(ticks) gives; marks its parts on the clock."""
        accumulate, components = self.plan.settings.training.accumulate, []
        for _ in range(accumulate):
            image, *truth = self.fetched.pop() if self.fetched else fetch(ticks)
            with self.plan.autocast():
                logits = self.network(image)
            ticks.mark("forward")
            loss, values = self._loss(logits, *truth, number=number)
            components.append(values)
            ticks.mark("loss")
            self.scaler.scale(loss / accumulate).backward()
            ticks.mark("backward")
        optim, weights = self.plan.settings.optim, list(self.network.parameters())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(weights, optim.clip or math.inf)
        check = nonfinite.Check(components, norm)
        ticks.mark("optimizer")
        self.fetched.append(fetch(ticks))
        if not check.names():
            self.scaler.step(self.optimizer)
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - optim.ema)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        ticks.mark("optimizer")

    def _loss(self, logits, target, valid, skeleton, *, number):
        about = {"spacing": self.plan.spacing, "skeleton": skeleton, "step": number}
        about |= self.plan.classes
        return composite_loss.composite_loss(logits, target, valid, self.terms, **about)


# ---------------------------------------------------------------------------- time


def run_steps(step, numbers, device):
    """[{part: seconds}] of step(number, ticks), one for each number; see timer.PARTS.

    Each step has a clock of its own, read when all are done, so that no step waits for one.
    """
    clocks = [timer.StepTimer(device) for _ in numbers]
    for number, ticks in zip(numbers, clocks, strict=True):
        ticks.start()
        step(number, ticks)
    return [ticks.means(1) for ticks in clocks]


# ---------------------------------------------------------------------------- memory


def resident_bytes():
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss
