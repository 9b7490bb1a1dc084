"""What benchmarks/step_costs.py counts of a step, by hand."""

import torch

from benchmarks import step_costs


def test_a_convolution_is_counted_as_by_hand():
    image = torch.empty(1, 2, 4, 4, 4, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(3, 2, 1, 1, 1, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with step_costs.Costs() as costs:
        logits = torch.nn.functional.conv3d(image, weight)
    assert costs.flops == 2 * 2 * 3 * 64  # two for each product of 2 inputs and 3 outputs
    assert costs.bytes == 2 * (128 + 6 + 192) and costs.launches == 1
    assert costs.live() == costs.peak == 2 * 192
    del logits
    assert costs.live() == 0 and costs.peak == 2 * 192


def test_an_operation_is_bound_by_memory_or_by_arithmetic():
    costs = step_costs.Costs()
    costs.add(775e12, 1, 1)
    costs.add(1, 2.97e12, 1)
    assert abs(costs.seconds["H100"] - 2) < 1e-9


def test_a_fused_norm_and_mish_takes_6_bytes_a_voxel_forward_and_10_backward():
    costs = step_costs.Costs()
    x, residual = (
        torch.empty(1, 8, 4, 4, 4, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(2)
    )
    y = step_costs.Mish.apply(x, None, costs, (3, 5), 3)
    assert costs.bytes == 6 * x.numel()
    y.backward(y.detach())
    assert costs.bytes == 16 * x.numel() and costs.launches == 6
    y = step_costs.Mish.apply(x, residual, costs, (3, 5), 3)  # which is read, too
    assert costs.bytes == 24 * x.numel()
    y.backward(y.detach())
    assert costs.bytes == 38 * x.numel()
