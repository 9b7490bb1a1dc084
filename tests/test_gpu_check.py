"""The check of a GPU, on a CPU; and the peers that it sets beside us."""

from pathlib import Path

import pytest
import torch

import model
from benchmarks import plain_network, plain_steps
from settings import Settings

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "benchmarks" / "gpu_check.py"
PATCH, SPACING = (16, 32, 32), (2.0, 1.0, 1.0)
SHAPE = {"base": 4, "multipliers": [1, 2, 2], "blocks": 2, "dropout": 0.15}


def make_plain():
    fit = model.fit(PATCH, SPACING, stages=3)
    return plain_network.PlainUNet(*fit, **SHAPE), fit


def test_the_plain_network_is_ours_parameter_by_parameter_and_gives_what_ours_gives():
    plain, (strides, kernels) = make_plain()
    settings = Settings().model.model_dump() | SHAPE
    ours = model.build_network(1, 1, strides=strides, kernels=kernels, settings=settings)
    plain.load_state_dict(ours.state_dict())
    image = torch.randn(2, 1, *PATCH)
    for network in (ours, plain):
        torch.manual_seed(0)  # the same dropout
        network.logits = network.train()(image)
    for a, b in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("peer", ["monai", "nnunet"])
def test_a_peers_step_learns(peer):
    torch.manual_seed(0)
    if peer == "monai":
        pytest.importorskip("monai")
        step = plain_steps.monai_step(make_plain()[0])
    else:
        step = plain_steps.nnunet_step(make_plain()[0], torch.float16)
    image = torch.randn(2, 1, *PATCH)
    targets = [(image > 0.5).float(), (torch.nn.functional.max_pool3d(image, 2) > 0.5).float()]
    values = [step(image, targets) for _ in range(12)]
    assert values[-1] < 0.9 * values[0]
