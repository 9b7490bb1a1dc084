"""The batches of training steps, each step's fetched before it begins.

    step_batches = StepBatches(plan, batches, timer)
    while training:
        samples_of_step = step_batches.take()
        for samples in samples_of_step:
            image, target, valid, skeleton = step_batches.on_device(samples)
            ...                          # forward, loss, backward
        step_batches.fetch_next()        # the device is busy still
        ...                              # wait for the device, and make the step

So the device has the next batch to work on while the host waits for it and goes on.
"""

import itertools

from patches import transfer
from runtime import build, device_memory


class StepBatches:
    """The batches of step after step, `training.accumulate` of them in each.

    plan: a `build.Plan`; batches: an iterator over lists of samples; timer: a `StepTimer`, which
    gets the marks "wait", "transfer" and "augment". No random number is drawn from the generators
    of the network: a sample holds the seed of all its augmentation.
    """

    def __init__(self, plan, batches, timer):
        self.plan, self.batches, self.timer = plan, batches, timer
        self.copy_stream = transfer.copy_stream(plan.device)
        self._next = self._fault = self._made = None

    def take(self):
        """The samples of each batch of the step that begins; raises what kept them from coming."""
        if self._fault is not None:
            raise self._fault
        if self._next is None:
            self._fetch()
        samples_of_step, self._next = self._next, None
        return samples_of_step

    def on_device(self, samples):
        """(image, target, valid, skeleton) of a batch: see `build.augment_batch`.

        Not made again as long as no other batch is asked for.
        """
        if self._made is None or self._made[0] is not samples:
            moved = transfer.to_device(samples, self.plan.device, self.copy_stream)
            self.timer.mark("transfer")
            self._made = samples, build.augment_batch(self.plan, moved)
            self.timer.mark("augment")
        return self._made[1]

    def fetch_next(self):
        """Fetch the batches of the next step, if there is one, and begin to make the first.

        The step that goes on must not be lost for what fails here: it is raised when the next step
        asks for its batches.
        """
        try:
            self._fetch()
        except Exception as error:
            self._fault = error
            return
        try:
            for samples in self._next[:1]:
                self.on_device(samples)
        except Exception as error:  # on_device is asked for this batch again
            device_memory.free_memory(error, self.plan.device)

    def _fetch(self):
        accumulate = self.plan.settings.training.accumulate
        try:
            self._next = list(itertools.islice(self.batches, accumulate))
        finally:
            self.timer.mark("wait")  # every step has this part
