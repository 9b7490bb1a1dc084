"""The worst neighbor of each voxel against a loop over all of them."""

import itertools

import torch

from losses import worst_neighbor_loss
from topology.neighbors import worst_neighbors

SHAPE = (2, 2, 4, 5, 6)


def draw():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator)
    return logits, target, torch.rand(SHAPE, generator=generator) > 0.3


def test_each_voxel_gets_the_most_wrong_of_its_valid_neighbors_of_the_same_class():
    logits, target, valid = draw()
    found, same = worst_neighbors(logits, target, valid), target >= 0.5
    for voxel in itertools.product(*map(range, SHAPE)):
        box = (*voxel[:2], *(slice(max(i - 1, 0), i + 2) for i in voxel[2:]))
        among = logits[box][valid[box] & (same[box] == same[voxel])]
        extremum = torch.amin if same[voxel] else torch.amax
        expected = extremum(among) if valid[voxel] else logits[voxel]
        assert found[voxel] == expected


def test_the_gradient_is_that_of_the_voxels_that_were_picked():
    logits, target, valid = draw()
    logits.requires_grad_()
    worst = worst_neighbors(logits, target, valid)
    worst.sum().backward()
    picked = worst.detach().flatten(2)[..., None] == logits.detach().flatten(2)[..., None, :]
    assert torch.equal(logits.grad.flatten(2), picked.sum(2).float())  # how often each was


def test_a_gap_of_one_voxel_costs_more_than_by_cross_entropy_and_dice():
    target = torch.zeros(1, 1, 5, 5, 9)
    target[..., 2, 2, :] = 1
    gap = (target * 2 - 1) * 8
    gap[..., 2, 2, 4] = -8.0
    there, wide = (worst_neighbor_loss(x, target) for x in ((target * 2 - 1) * 8, gap))
    assert there < 1e-2
    assert wide > 1e-1
    gap.requires_grad_()
    worst_neighbor_loss(gap, target).backward()
    assert gap.grad.abs().argmax() == 2 * 45 + 2 * 9 + 4  # all three voxels of the gap pull there
