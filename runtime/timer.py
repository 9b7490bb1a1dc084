"""Where the time of a training step goes: waiting for data, or one of its parts.

    timer = StepTimer(device)
    timer.start()                  # also after anything that is no part of a step
    samples = next(batches); timer.mark("wait")
    logits = network(image); timer.mark("forward")
    ...
    timer.means(steps)             # {"wait": seconds per step, ...}; begins anew

On CUDA a mark is an event in the device's own queue, so that none of them makes the host wait, and
a part is the device's time for it. "wait" is then the time in which the device had nothing to do
until data came. A mark costs microseconds. Data parts of a step are of the batches that it fetches,
which are the next step's.
"""

import time

import torch

PARTS = ("wait", "transfer", "augment", "forward", "loss", "backward", "ranks", "optimizer")


class StepTimer:
    """Adds up the time between marks, by name. Not for use from several threads."""

    def __init__(self, device):
        self.on_cuda = device.type == "cuda"
        self.marks, self.spare = [], []

    def start(self):
        """The time until the next mark is its; what was before counts for nothing."""
        self.mark(None)

    def mark(self, name):
        """What happened since the last mark, or the start, belongs to `name`, one of PARTS."""
        if name is not None and name not in PARTS:
            raise ValueError(f"expected a part among {', '.join(PARTS)}, got {name}")
        if self.on_cuda:
            event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def means(self, steps):
        """Seconds per step of each part, {name: float}, since the last call; waits for the device.

        steps: how many there were. Parts without a mark are left out; {} for no steps.
        """
        if self.on_cuda and self.marks:
            self.marks[-1][1].synchronize()
        sums = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            seconds = before.elapsed_time(after) / 1e3 if self.on_cuda else after - before
            sums[name] = sums.get(name, 0.0) + seconds  # None: between the steps
        if self.on_cuda:
            self.spare += [event for _, event in self.marks[:-1]]
        del self.marks[:-1]  # the next part begins at the last mark
        return {name: sums[name] / steps for name in PARTS if name in sums} if steps else {}


def shares(means):
    """The parts as text for a progress line: percent of the step; of the small ones only wait."""
    total = sum(means.values())
    if not total:
        return ""
    shown = {n: t for n, t in means.items() if n == "wait" or t >= 0.01 * total}
    return " ".join(f"{name} {100 * t / total:.0f}%" for name, t in shown.items())
