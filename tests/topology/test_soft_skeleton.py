"""The soft skeleton against max pooling and autograd, on drawn shapes, and at unlabeled voxels."""

import math

import pytest
import torch
import torch.nn.functional as F

from topology.soft_skeleton import soft_skeleton

SHAPES = [(2, 1, 5, 6, 7), (1, 1, 1, 5, 6), (1, 2, 3, 3, 3), (1, 1, 1, 1, 1), (4, 4, 9)]


def pooled_skeleton(probs, iterations):
    """The same with padded max pooling, differentiated by autograd."""
    x = probs.reshape(-1, 1, *probs.shape[-3:])

    def erode(x):
        sizes = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
        pooled = [-F.max_pool3d(-x, size, 1, [n // 2 for n in size]) for size in sizes]
        return torch.minimum(torch.minimum(pooled[0], pooled[1]), pooled[2])

    skeleton = F.relu(x - F.max_pool3d(erode(x), 3, 1, 1))
    for _ in range(iterations):
        x = erode(x)
        removed = F.relu(x - F.max_pool3d(erode(x), 3, 1, 1))
        skeleton = skeleton + F.relu(removed - skeleton * removed)
    return skeleton.reshape(probs.shape)


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_pooling(shape, iterations):
    probs, weights = draw(shape)
    results = []
    for skeleton in (soft_skeleton, pooled_skeleton):
        x = probs.clone().requires_grad_()
        value = skeleton(x, iterations)
        (value * weights).sum().backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_finite_differences():
    probs, weights = draw((3, 4, 5))
    x = probs.clone().requires_grad_()
    (soft_skeleton(x, 2) * weights).sum().backward()
    for place in [(0, 0, 0), (1, 2, 3), (2, 3, 4), (1, 1, 1)]:
        values = []
        for change in (1e-3, -1e-3):
            moved = probs.clone()
            moved[place] += change
            values.append((soft_skeleton(moved, 2) * weights).sum().item())
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(x.grad[place].item(), abs=2e-3)


def test_tied_neighbours_share_one_gradient():
    # Of three values many neighbours tie. Adding a constant to all voxels changes nothing, so that
    # the gradients sum to 0, unless a tie is given to none or to several.
    probs, weights = draw((6, 7, 8))
    x = (0.2 + 0.3 * (3 * probs).floor()).requires_grad_()
    (soft_skeleton(x, 2) * weights).sum().backward()
    assert x.grad.abs().sum() > 10
    assert x.grad.sum().item() == pytest.approx(0.0, abs=1e-4)


def test_thick_bar_keeps_its_centreline():
    bar = torch.zeros(7, 7, 14)
    bar[2:5, 2:5, 1:13] = 1.0
    skeleton = soft_skeleton(bar, 3)
    assert skeleton[3, 3, 2:12].tolist() == [1.0] * 10
    assert skeleton[3, 3].sum() + 8 >= skeleton.sum()  # and at most the corners of its ends


def test_sheet_of_one_voxel_is_its_own_skeleton():
    sheet = torch.zeros(5, 6, 7)
    sheet[2] = 1.0
    assert torch.equal(soft_skeleton(sheet, 3), sheet)


def test_batch_entries_do_not_touch():
    probs, _ = draw((3, 2, 4, 5, 6))
    alone = torch.stack([torch.stack([soft_skeleton(v, 3) for v in sample]) for sample in probs])
    assert torch.equal(soft_skeleton(probs, 3), alone)


@pytest.mark.parametrize("content", [0.0, 1.0, math.nan, math.inf])
def test_invalid_voxels_neither_erode_nor_fill(content):
    # A sheet of three voxels that goes on into the unlabeled part has its middle as skeleton.
    sheet = torch.zeros(7, 8, 8)
    sheet[2:5] = 1.0
    valid = torch.ones(7, 8, 8, dtype=torch.bool)
    valid[:, :, 5:] = False
    whole = soft_skeleton(sheet, 3)
    cut = soft_skeleton(torch.where(valid, sheet, content), 3, valid)
    assert torch.equal(cut, torch.where(valid, whole, 0.0))


def test_content_of_invalid_voxels_changes_nothing_and_gets_no_gradient():
    probs, weights = draw((2, 1, 5, 6, 7))
    valid = draw((2, 1, 5, 6, 7), seed=1)[0] > 0.3
    results = []
    for content in (0.0, math.nan):
        x = torch.where(valid, probs, content).requires_grad_()
        skeleton = soft_skeleton(x, 3, valid)
        (skeleton * weights).sum().backward()
        assert bool((x.grad[~valid] == 0).all())
        assert bool((skeleton[~valid] == 0).all())
        results.append((skeleton.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_valid_is_nothing():
    x = torch.rand(3, 4, 5, requires_grad=True)
    skeleton = soft_skeleton(x, 2, torch.zeros(3, 4, 5, dtype=torch.bool))
    skeleton.sum().backward()
    assert bool((skeleton == 0).all())
    assert bool((x.grad == 0).all())


def test_only_the_probabilities_are_kept_for_the_backward_pass():
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    probs = torch.rand(6, 7, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        soft_skeleton(probs, 5)
    assert kept == [probs.shape] * 2  # and the mask of valid voxels


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(..., D, H, W\), got"):
        soft_skeleton(torch.zeros(4, 4), 3)
    with pytest.raises(ValueError, match="one shape"):
        soft_skeleton(torch.zeros(4, 4, 4), 3, torch.ones(4, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="iterations: expected 0 or more, got -1"):
        soft_skeleton(torch.zeros(4, 4, 4), -1)
