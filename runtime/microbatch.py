"""Training steps and predictions that fit into the memory of the device.

    micro_batch = MicroBatch(network, autocast)
    micro_batch.start()                         # of a step
    while True:
        try:
            logits = micro_batch.forward(image)     # (B, C, D, H, W)
            micro_batch.backward(loss(logits))
            break
        except RuntimeError as error:
            logits = None                       # what still refers to the activations
            micro_batch.shrink(error, report)   # raises what is no lack of memory

Where memory is short, activations are recomputed in the backward pass first. A batch that still
does not fit goes through the network in parts, with the gradient of the whole batch,
whatever the loss: the logits of all parts are made first, without a graph; the loss and its
gradient towards the logits are those of the whole batch; then each part goes through the network
again, with a graph, to carry its share of that gradient on. Gao et al. 2021 ("Scaling deep
contrastive learning batch size under memory limited setup") do so for contrastive losses.
Averaging the gradients of parts would save a forward pass and give another gradient: most terms are
means over the valid voxels of a batch, and the topological one chooses its windows among them.
"""

import torch

from runtime.device_memory import (
    first_line,
    free_memory,
    has_more,
    memory_figures,
    out_of_memory,
    total_memory,
)
from runtime.signals import CannotGoOn


class MicroBatch:
    """Runs a network on a batch with recomputed activations, and then in parts, if the device's
    memory asks for it.

    autocast() makes the context in which the network runs. checkpointing: whether activations are
    recomputed in the backward pass though the network would keep them (it needs a network with an
    attribute `checkpointing`); size: patches in a part, None: all; memory: bytes of the GPU that
    had too little for more, None: of none. They hold for the rest of the run, and are its state.
    """

    def __init__(self, network, autocast):
        self.network, self.autocast, self.batch = network, autocast, None
        self.size, self.checkpointing, self.memory = None, False, None
        self._generators = self._logits = self._parts = None

    def state_dict(self):
        return {"size": self.size, "checkpointing": self.checkpointing, "memory": self.memory}

    def load_state_dict(self, state):
        """Take over a state, unless this GPU has more memory: then a line for people."""
        memory = state.get("memory")  # not in older states
        if memory is not None and has_more(self._device, memory):
            return [
                f"resume: this GPU has {total_memory(self._device) / 1e9:.1f} GB, and memory was "
                f"short on one of {memory / 1e9:.1f}: whole batches are tried again"
            ]
        self.size, self.checkpointing, self.memory = state["size"], state["checkpointing"], memory
        if self.checkpointing:
            self.network.checkpointing = True
        return []

    def take_smaller(self, state):
        """Take no more memory than another one with this state."""
        self.size, self.memory = (
            min((n for n in pair if n is not None), default=None)
            for pair in ((self.size, state["size"]), (self.memory, state["memory"]))
        )
        if state["checkpointing"]:
            self.network.checkpointing = self.checkpointing = True

    # ------------------------------------------------------------------------ the two passes

    def forward(self, image):
        """Logits of a batch (B, C, D, H, W), as the network gives them: a tensor or a list."""
        self.batch = len(image)
        self._parts = None
        if self.size is None or self.size >= len(image):
            with self.autocast():
                return self.network(image)
        self._parts, outputs = [], []
        for part in image.split(self.size):
            self._parts.append((part, _generators(part.device)))
            with torch.no_grad(), self.autocast():
                outputs.append(listed(self.network(part)))
        self._logits = [torch.cat(scale).requires_grad_() for scale in zip(*outputs, strict=True)]
        return self._logits if len(self._logits) > 1 else self._logits[0]

    def backward(self, loss):
        """Add the gradient of a loss of these logits to that of the weights."""
        loss.backward()
        if self._parts is None:
            return
        device, start = loss.device, 0
        after = _generators(device)
        gradients = [scale.grad for scale in self._logits]
        for part, generators in self._parts:
            _set_generators(device, generators)  # the same dropout as the first time
            with self.autocast():
                logits = listed(self.network(part))
            stop = start + len(part)
            pairs = [
                (scale, gradient[start:stop])
                for scale, gradient in zip(logits, gradients, strict=True)
                if gradient is not None  # a scale that no term looked at
            ]
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
            start = stop
        _set_generators(device, after)
        self._logits = self._parts = None

    # ------------------------------------------------------------------------ out of memory

    def start(self):
        """A step begins here: if it is done again, it draws the same random numbers."""
        self._generators = _generators(self._device)

    def shrink(self, error, report):
        """After an error of a step: take less memory from now on, and let the step begin again.

        Gradients are dropped and the generators put back. Any other error is raised as it is, and
        `CannotGoOn` if nothing is left that could be smaller. report(kind, text, **figures).
        """
        if not out_of_memory(error):
            raise error
        device = self._device
        text = f"{device} ran out of memory{memory_figures(device)}"
        _set_generators(device, self._generators)
        self.network.zero_grad(set_to_none=True)
        self._logits = self._parts = None
        free_memory(error, device)
        size = min(self.size or self.batch or 1, self.batch or 1)
        # Both cost one more forward pass, but of a batch of 2 the parts would save less.
        if not getattr(self.network, "checkpointing", True):
            self.network.checkpointing = self.checkpointing = True
            change = "activations are recomputed in the backward pass (model.checkpointing)"
        elif size > 1:
            self.size = -(-size // 2)
            change = f"batches of {self.batch} go through the network {self.size} at a time"
        else:
            raise CannotGoOn(
                f"{text} with one patch at a time and activations recomputed; lower sampling.patch "
                "or model.base, or end what else runs there; the error was: " + first_line(error)
            ) from error
        self.memory = total_memory(device)
        report(
            "cuda memory",
            f"{text}: from now on {change}, with the same gradient",
            micro_batch=self.size,
            checkpointing=self.checkpointing,
        )

    @property
    def _device(self):
        return next(self.network.parameters()).device


def nothing(*arguments, **named):
    """A report that goes nowhere."""


def listed(logits):
    """The logits of a network as a list of all scales, the finest first."""
    return list(logits) if isinstance(logits, list | tuple) else [logits]


def _generators(device):
    """States of the generators that the network draws from."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _set_generators(device, states):
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
