"""AdamW: in one kernel on CUDA, for which a network on the CPU stands here, elsewhere as ever."""

import copy
from types import SimpleNamespace

import pytest
import torch

from runtime.optimizer import make_optimizer

SETTINGS = SimpleNamespace(lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def learnt(network, device, state=None, steps=2):
    """The optimizer after some steps, the first with this state."""
    optimizer = make_optimizer(network, SETTINGS, device)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for _ in range(steps):
        network.weight.grad = network.weight.detach().sin()
        optimizer.step()
    return optimizer


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2, bias=False)


@pytest.mark.parametrize("before", [CPU, CUDA, "an older version"])
@pytest.mark.parametrize("now", [CPU, CUDA])
def test_a_state_is_gone_on_from_wherever_it_was_written(before, now):
    straight, resumed = network(), network()
    learnt(straight, CPU, steps=4)
    state = learnt(resumed, CPU if before == "an older version" else before).state_dict()
    if before == "an older version":
        state["param_groups"][0]["fused"] = None
    optimizer = learnt(resumed, now, state)
    assert optimizer.param_groups[0]["fused"] == (now == CUDA)
    torch.testing.assert_close(resumed.weight, straight.weight)
    assert now == CUDA or before == CUDA or torch.equal(resumed.weight, straight.weight)
