"""Steps whose loss or gradient is not finite: what it was, in which case, and what is done.

Such a step changes no weight. Why it happened is looked for then, by running each sample of the
step alone: a patch that holds NaN, a network that makes one of it, or fp16, whose largest number is
65504, where fp32 has no trouble.
"""

import math
from typing import NamedTuple

import torch

from runtime.microbatch import listed
from runtime.signals import CannotGoOn

SMALLEST_SCALE = 1.0  # of the loss in fp16: below it, it is not the scale that overflows


class Fault(NamedTuple):
    """A step without an update. broken: the batch or the weights are, and not fp16 alone."""

    text: str
    broken: bool
    cases: list


class Check:
    """Whether the losses and the gradient of a step are finite, on its way from the device.

    batches: list of {name: scalar tensor}, one dict a batch; norm: of the gradient.
    """

    def __init__(self, batches, norm):
        self._names = [*(name for components in batches for name in components), "gradient"]
        tensors = [
            value.detach().float() for components in batches for value in components.values()
        ]
        values = torch.stack([*tensors, norm.float()])
        self._values = values.to("cpu", non_blocking=True)  # of CUDA to pinned memory
        self._copied = None
        if values.is_cuda:  # what is queued after this is not waited for
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def names(self):
        """Names of what is not finite: loss components, "gradient"; [] if all is well.

        Waits for the device, if it has not come so far.
        """
        if self._copied:
            self._copied.synchronize()
        values = zip(self._names, self._values.tolist(), strict=True)
        wrong = [name for name, value in values if not math.isfinite(value)]
        terms = [name for name in dict.fromkeys(wrong) if name != "total"]
        return terms or wrong[:1]


@torch.no_grad()
def explain(
    names, samples, network, augment, *, fp16_scale=None, bf16=False, gather=lambda value: [value]
):
    """The `Fault` of a step in which these were not finite.

    samples: of the whole step; augment(samples) -> (image, ...) as the step had it; network: sees
    them in fp32; fp16_scale: of the loss, None where the network does not run in fp16; bf16:
    whether it runs in that; gather: makes a list of the values of all ranks, which have samples of
    their own. Where all losses are finite in fp16, the gradient has overflown: that is no riddle,
    and nothing is run again.
    """
    overflow = fp16_scale is not None and fp16_scale >= SMALLEST_SCALE
    weights, causes = [], {}
    if not (overflow and names == ["gradient"]):
        weights, causes = _look(samples, network, augment)
    found = gather((causes, [sample["case"] for sample in samples]))
    causes = {case: cause for one, _ in found for case, cause in one.items()}
    cases = list(causes) or list(dict.fromkeys(case for _, some in found for case in some))
    what = f"{', '.join(names)} not finite"
    if weights:
        return Fault(f"{what}: the weights are not ({weights[0]}); lower optim.lr", True, cases)
    if causes:
        where = ", ".join(f"case {case}: {cause}" for case, cause in causes.items())
        return Fault(f"{what}; {where}", True, cases)
    listed = ", ".join(cases)
    if overflow:
        text = f"{what}: an overflow of fp16 at a loss scale of {fp16_scale:g}"
        return Fault(f"{text}, with the cases {listed}", False, cases)
    if bf16:
        what += " in bf16, while each sample has a finite output in fp32 (training.precision=fp32)"
    return Fault(f"{what}, with the cases {listed}, none of them alone", True, cases)


class SkippedSteps:
    """Counts steps without an update; `most` broken ones in a row are too many.

    An overflow of fp16 counts for no case and is no sign of trouble: the loss scale adapts.
    """

    def __init__(self, most):
        self.most, self.in_a_row, self.since_log, self.cases = most, 0, 0, {}

    def state_dict(self):
        return {"in_a_row": self.in_a_row, "since_log": self.since_log, "cases": self.cases}

    def load_state_dict(self, state):
        self.in_a_row, self.since_log = state["in_a_row"], state["since_log"]
        self.cases = dict(state["cases"])

    def add(self, fault, report):
        """Report a `Fault` and count it. `CannotGoOn` where there were too many."""
        report("step skipped", f"no update: {fault.text}", cases=fault.cases)
        self.since_log += 1
        self.in_a_row += fault.broken
        for case in fault.cases if fault.broken else ():
            self.cases[case] = self.cases.get(case, 0) + 1
        if self.in_a_row >= self.most:
            raise CannotGoOn(
                f"{self.most} steps in a row had no finite loss and gradient "
                f"(training.max_skipped), the last one: {fault.text}; {self.describe()[0]}"
            )

    def describe(self):
        """A line for people on the cases whose steps were without an update; none for none."""
        cases = sorted(self.cases.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{case} ({number})" for case, number in cases)
        return [f"steps without an update, by case: {listed}"] if cases else []


def _look(samples, network, augment):
    """(names of weights that are not finite, {case: what is not finite of it} if there are none)"""
    weights = [n for n, p in network.named_parameters() if not bool(p.isfinite().all())]
    devices = {p.device for p in network.parameters() if p.is_cuda}
    causes = {}
    with torch.random.fork_rng(devices):  # looking changes no later random number
        for sample in samples if not weights else []:
            if cause := _wrong(sample, network, augment):
                causes[sample["case"]] = cause
    return weights, causes


def _wrong(sample, network, augment):
    """What is not finite of a sample on its way through the network, or None."""
    image, voxel = augment([sample])[0], "x".join(str(int(n)) for n in sample["voxel"])
    if not bool(image.isfinite().all()):
        return f"the image is not (patch around voxel {voxel})"
    # By forward: a call would compile a compiled network again, for this batch and precision.
    if not all(bool(scale.isfinite().all()) for scale in listed(network.forward(image))):
        return f"the network's output is not (patch around voxel {voxel})"
    return None
