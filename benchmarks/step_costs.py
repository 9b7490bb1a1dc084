"""What a training step of configs/exp001_full.yaml costs, counted on meta tensors, on any machine.

    python benchmarks/step_costs.py           # a quarter of a minute; prints a markdown table

FLOPs are torch's count, of convolutions and matrix products. Bytes are those of the operands, read
twice where an operation takes two passes over them; launches are torch's, cuDNN may add some.
Activations live between forward and backward; the peak is of all tensors but weights. All loss
terms are in it but toploss, a CPU's work. The network is in bf16, its update a formula.

Times are expected, not measured: each operation at the ceiling of arithmetic or of memory.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from runtime import config
from runtime.composite_loss import composite_loss

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "exp001_full.yaml"
# {card: (bytes/s, FLOP/s)}: measured, and of a card with 8 GB by its data sheet (bf16, dense)
CARDS = {"H100": (2.97e12, 775e12), "RTX 3070": (448e9, 40.6e12)}
# {operation: (kernels, arguments that are read twice)}
SEVERAL = {
    "native_batch_norm": (2, (0,)),
    "native_batch_norm_backward": (2, (0, 1)),
    "convolution_backward": (2, (0,)),
}
UPDATE = 6 + 4 + 8 + 28 + 12  # bytes of a weight: to bf16, norm, clipping, AdamW, averaged weight


class Costs(TorchDispatchMode):
    """Counts all operations of a block. peak: bytes of tensors that were made in it."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.launches = self.peak = 0
        self.seconds, self.storages = dict.fromkeys(CARDS, 0.0), {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result, packet = function(*arguments, **(named or {})), function.overloadpacket
        for x in filter(torch.is_tensor, tree_leaves(result)):
            storage = x.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.live())
        if not function.is_view and packet.__name__ not in ("empty_like", "detach"):
            kernels, twice = SEVERAL.get(packet.__name__, (1, ()))
            operands = tree_leaves((arguments, named, result, [arguments[i] for i in twice]))
            count = flop_registry.get(packet, lambda *arguments, **named: 0)
            flops = count(*arguments, **(named or {}), out_val=result)
            self.add(flops, sum(x.nbytes for x in operands if torch.is_tensor(x)), kernels)
        return result

    def add(self, flops, nbytes, kernels):
        self.flops, self.bytes = self.flops + flops, self.bytes + nbytes
        self.launches += kernels
        for card, (per_byte, per_flop) in CARDS.items():
            self.seconds[card] += max(nbytes / per_byte, flops / per_flop)

    def live(self):
        """Bytes of tensors that were made in the block and are still there."""
        self.storages = {k: (ref, n) for k, (ref, n) in self.storages.items() if not ref.expired()}
        return sum(nbytes for _, nbytes in self.storages.values())


class Mish(torch.autograd.Function):
    """Mish of x, alone or fused with norm and residual; on meta, torch would count it in pieces.

    passes: over x, forward and backward; a residual takes one more to read it, then one to read it
    and one to write its gradient. kernels: each way.
    """

    @staticmethod
    def forward(ctx, x, residual, costs, passes, kernels):
        ctx.save_for_backward(x, residual)
        ctx.about = costs, passes[1], kernels
        costs.add(0, (passes[0] + (residual is not None)) * x.nbytes, kernels)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        (x, residual), (costs, passes, kernels) = ctx.saved_tensors, ctx.about
        costs.add(0, (passes + 2 * (residual is not None)) * x.nbytes, kernels)
        inner = None if residual is None else torch.empty_like(x)
        return torch.empty_like(x), inner, None, None, None


def step(*, fused, checkpointing, batch=2):
    """(`Costs` of a step, TFLOP of its forward pass, GB of activations after it)."""
    settings, costs = config.load(CONFIG, ["data.root=."]), Costs()
    shape = settings.model.model_dump() | {"checkpointing": checkpointing}
    patch, stages = settings.sampling.patch, len(shape["multipliers"])
    strides, kernels = model.fit(patch, (1.0, 1.0, 1.0), stages=stages)
    terms = {name: term for name, term in settings.terms().items() if name != "toploss"}

    def norm_mish(x, norm, dropout=None, residual=None):
        if fused:
            return Mish.apply(x, residual, costs, (3, 5), 3)
        y = norm(x) if dropout is None else dropout(norm(x))
        return Mish.apply(y if residual is None else y + residual, None, costs, (2, 3), 1)

    no_autocast = mock.patch.object(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    with torch.device("meta"), no_autocast, mock.patch.object(model, "norm_mish", norm_mish):
        network = model.build_network(1, 1, strides=strides, kernels=kernels, settings=shape)
        network = network.bfloat16().train()
        image = torch.empty(batch, 1, *patch, dtype=torch.bfloat16)
        target, valid = torch.empty(batch, 1, *patch), torch.empty(batch, 1, *patch).bool()
        with costs:
            logits = network(image)
            forward = costs.flops / 1e12, costs.live() / 1e9
            composite_loss(logits, target, valid, terms)[0].backward()
            costs.add(0, UPDATE * sum(p.numel() for p in network.parameters()), 6)
    return costs, *forward


if __name__ == "__main__":
    head = ["step", "TFLOP (forward)", "GB moved", "launches", "activations, GB", "peak, GB"]
    head += [f"{card}: expected ms" for card in CARDS]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for checkpointing in (False, True):
        for fused in (False, True):
            costs, forward, kept = step(fused=fused, checkpointing=checkpointing)
            row = ["fused norm + Mish" if fused else "plain"]
            row[0] += ", recomputing" * checkpointing
            row += [f"{costs.flops / 1e12:.2f} ({forward:.2f})", f"{costs.bytes / 1e9:.0f}"]
            row += [str(costs.launches), f"{kept:.2f}", f"{costs.peak / 1e9:.2f}"]
            row += [f"{1e3 * seconds:.0f}" for seconds in costs.seconds.values()]
            print(f"| {' | '.join(row)} |", flush=True)
