"""Persistence against gudhi, hand-drawn topology, hand-computed losses, and invalid voxels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from topology.persistence import betti_numbers, diagrams, losses_of_plans, plan

SEEDS = pytest.mark.parametrize("seed", range(5))


def smooth_probs(seed, shape=(6, 7, 8), dtype=torch.float64):
    """A window of distinct probabilities with a few classes in every dimension, and a label."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 1, *(n + 2 for n in shape), generator=generator, dtype=dtype)
    field, other = F.avg_pool3d(noise, 3, 1)[:, 0] * 4
    return torch.sigmoid(field), field + other > 0.5


def random_valid(seed, shape=(6, 7, 8), share=0.3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 100)) > share


def as_sets(found):
    """Sorted (birth, death) rows of each dimension, of positive persistence."""
    pairs = [np.stack([d.births, d.deaths], axis=1) for d in found]
    return [np.array(sorted(map(tuple, p[p[:, 0] < p[:, 1]]))).reshape(-1, 2) for p in pairs]


def gudhi_sets(levels):
    """The same from gudhi: what is born or dies at 2 dropped, what is endless cut at 1."""
    gudhi = pytest.importorskip("gudhi", reason="gudhi is the reference and is not installed")
    cubes = gudhi.CubicalComplex(vertices=levels)
    cubes.compute_persistence(homology_coeff_field=2, min_persistence=0)
    sets = []
    for dimension in range(3):
        pairs = np.asarray(cubes.persistence_intervals_in_dimension(dimension)).reshape(-1, 2)
        pairs = pairs[(pairs != 2).all(axis=1)]
        pairs[np.isinf(pairs)] = 1.0
        sets.append(np.array(sorted(map(tuple, pairs))).reshape(-1, 2))
    return sets


# ---------------------------------------------------------------------------- diagrams


@SEEDS
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_diagrams_equal_those_of_gudhi(seed, share):
    probs, _ = smooth_probs(seed)
    valid = random_valid(seed, share=share)
    levels = np.where(valid, 1 - probs.numpy(), 2.0)
    for ours, reference in zip(as_sets(diagrams(probs, valid)), gudhi_sets(levels), strict=True):
        np.testing.assert_array_equal(ours, reference)


@SEEDS
def test_critical_voxels_hold_the_levels_of_birth_and_death(seed):
    probs, _ = smooth_probs(seed)
    valid = random_valid(seed)
    levels = 1 - probs.numpy().ravel()
    endless = 0
    for found in diagrams(probs, valid):
        dies = found.death_voxels >= 0
        endless += np.count_nonzero(~dies)
        np.testing.assert_array_equal(levels[found.birth_voxels], found.births)
        np.testing.assert_array_equal(levels[found.death_voxels[dies]], found.deaths[dies])
        assert valid.numpy().ravel()[found.birth_voxels].all()
    assert endless == 1


def test_endless_component_dies_at_the_level_of_an_empty_prediction():
    pieces, loops, hollows = diagrams(np.full((2, 3, 4), 0.25))
    assert pieces.births == [0.75] and pieces.deaths == [1.0] and pieces.death_voxels == [-1]
    assert len(loops.births) == len(hollows.births) == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 4, 5), (4, 1, 5)])
def test_axes_of_one_voxel_are_windows_too(shape):
    probs = np.random.default_rng(0).random(shape)
    for ours, reference in zip(as_sets(diagrams(probs)), gudhi_sets(1 - probs), strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_diagrams_of_a_window_without_a_valid_voxel_are_empty():
    for found in diagrams(np.ones((3, 3, 3)), np.zeros((3, 3, 3), bool)):
        assert all(len(part) == 0 for part in found)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan, math.inf])
def test_values_that_are_no_probabilities_are_refused(wrong):
    probs = np.full((2, 2, 2), 0.5)
    probs[1, 1, 1] = wrong
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\].*sigmoid"):
        diagrams(probs)
    valid = np.isfinite(probs) & (probs == 0.5)
    assert len(diagrams(probs, valid)[0].births) == 1  # content of an invalid voxel is free


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3, 3), (0, 3, 3)])
def test_windows_of_another_rank_or_empty_ones_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(D, H, W\).*got \("):
        diagrams(np.zeros(shape))


# ---------------------------------------------------------------------------- Betti numbers


def draw(*boxes, shape=(7, 7, 7)):
    """A mask of boxes given as (slices, value), drawn one after another."""
    mask = np.zeros(shape, dtype=bool)
    for box, value in boxes:
        mask[box] = value
    return mask


INNER = slice(2, 5)
BAR = ((3, 3, slice(1, 6)), True)
SHEET = ((3,), True)
BALL = ((slice(1, 6),) * 3, True)
DRAWN = {
    "bar": (draw(BAR), (1, 0, 0)),
    "broken bar": (draw(BAR, ((3, 3, 3), False)), (2, 0, 0)),
    "ring": (draw(((3, slice(1, 6), slice(1, 6)), True), ((3, INNER, INNER), False)), (1, 1, 0)),
    "hollow ball": (draw(BALL, ((INNER,) * 3, False)), (1, 0, 1)),
    "ball pierced once": (draw(BALL, ((INNER,) * 3, False), ((1, 3, 3), False)), (1, 0, 0)),
    "bars that touch by an edge": (
        draw(((3, 3, slice(1, 6)), True), ((4, 4, slice(1, 6)), True)),
        (2, 0, 0),
    ),
    "sheet with a pinhole": (draw(SHEET, ((3, 3, 3), False)), (1, 1, 0)),
    "sheet": (draw(SHEET), (1, 0, 0)),
    "one voxel": (draw(((3, 3, 3), True)), (1, 0, 0)),
    "empty": (draw(), (0, 0, 0)),
    "full": (draw(((), True)), (1, 0, 0)),
}


@pytest.mark.parametrize("mask, betti", DRAWN.values(), ids=DRAWN)
def test_betti_numbers_of_hand_drawn_geometry(mask, betti):
    assert betti_numbers(mask) == betti


@SEEDS
def test_betti_numbers_count_the_classes_that_are_born_at_0(seed):
    _, mask = smooth_probs(seed)
    for share in (0.0, 0.1, 0.4):
        valid = random_valid(seed, share=share)
        reference = gudhi_sets(np.where(valid, 1.0 - mask.numpy(), 2.0))
        assert betti_numbers(mask, valid) == tuple(int((p[:, 0] == 0).sum()) for p in reference)


def test_sheet_whose_hole_is_unlabeled_throughout_has_no_loop():
    valid = np.ones((7, 7, 7), dtype=bool)
    valid[:, 2:5, 2:5] = False
    for content in (False, True):
        assert betti_numbers(draw(SHEET, ((3, INNER, INNER), content)), valid) == (1, 0, 0)


def test_ball_whose_inside_is_unlabeled_has_no_hollow():
    valid = draw(((), True), ((INNER,) * 3, False))
    assert betti_numbers(draw(BALL, ((INNER,) * 3, False)), valid) == (1, 0, 0)


def test_loop_around_unlabeled_voxels_that_background_can_close_costs_nothing_if_predicted():
    valid = draw(((), True), ((3, 3, 3), False))
    mask = draw(SHEET)
    assert betti_numbers(mask, valid) == (1, 1, 0)
    assert loss_of(mask, mask, valid) == 0


def test_bars_in_regions_that_only_unlabeled_voxels_join_count_once():
    valid = draw(((), True), ((slice(None), slice(None), 3), False))
    assert betti_numbers(draw(BAR), valid) == (1, 0, 0)


# ---------------------------------------------------------------------------- loss, by hand


def topological_losses(windows):
    """Of (probs, target, valid), tensors."""
    arrays = [
        (p.detach().numpy(), (t > 0.5).numpy(), np.ones(p.shape, bool) if v is None else v.numpy())
        for p, t, v in windows
    ]
    return losses_of_plans([probs for probs, _, _ in windows], plan(arrays, 2))


def topological_loss(probs, target, valid=None):
    return topological_losses([(probs, target, valid)])[0]


def loss_of(probs, target, valid=None):
    """The loss of arrays, as a float."""
    valid = None if valid is None else torch.as_tensor(valid)
    probs = torch.as_tensor(np.asarray(probs, dtype=np.float32))
    return float(topological_loss(probs, torch.as_tensor(np.asarray(target)), valid))


@pytest.mark.parametrize("mask", [m for m, _ in DRAWN.values()], ids=DRAWN)
def test_loss_of_a_perfect_prediction_is_zero(mask):
    assert loss_of(mask, mask) == 0


def test_blob_on_an_empty_label_costs_half_its_squared_peak():
    probs = torch.zeros(5, 5, 5)
    probs[2, 2, 1:4] = torch.tensor([0.5, 0.8, 0.6])
    probs.requires_grad_()
    loss = topological_loss(probs, torch.zeros(5, 5, 5))
    loss.backward()
    assert loss.item() == pytest.approx(0.8**2 / 2)
    assert probs.grad[2, 2, 2].item() == pytest.approx(0.8)
    assert probs.grad.count_nonzero() == 1


def test_gap_in_a_bar_costs_the_diagonal_and_is_pulled_up():
    target = torch.zeros(1, 3, 7)
    target[0, 1, 1:6] = 1
    probs = target * torch.tensor([0, 1.0, 0.9, 0.2, 0.8, 0.7, 0])
    probs.requires_grad_()
    loss = topological_loss(probs, target)
    loss.backward()
    # Endless piece: (0, 1). Second piece: born at 1 - 0.8, joined at 1 - 0.2. Two classes count.
    assert loss.item() == pytest.approx(0.6**2 / 2 / 2)
    assert probs.grad[0, 1, 3].item() == pytest.approx(-0.6 / 2)
    assert probs.grad[0, 1, 4].item() == pytest.approx(0.6 / 2)
    assert probs.grad.count_nonzero() == 2


def test_faint_wanted_classes_are_pulled_to_full_persistence():
    target = torch.zeros(1, 3, 7)
    target[0, 1, 1:3] = target[0, 1, 4:6] = 1
    probs = target * torch.tensor([0, 0.9, 0.8, 0, 0.7, 0.6, 0])
    probs[0, 1, 3] = 0.4  # a bridge that should not be
    # Two pieces in the label: births 0.1 and 0.3 to 0, the death 0.6 of the second to 1.
    wanted = 0.1**2 + 0.3**2 + 0.4**2
    assert float(topological_loss(probs, target)) == pytest.approx(wanted / 2)


def test_class_without_a_point_costs_one_half_each():
    ring, ball = DRAWN["ring"][0], DRAWN["hollow ball"][0]
    full = draw(((), True))
    assert loss_of(full, ring) == pytest.approx(0.5 / 2)
    assert loss_of(full, ring | np.roll(ring, 3, axis=0)) == pytest.approx(0.5 * 3 / 4)
    assert loss_of(full, ball) == pytest.approx(0.5 / 2)


def test_empty_prediction_of_a_label_costs_the_birth_of_its_component():
    bar = DRAWN["bar"][0]
    assert loss_of(draw(), bar) == pytest.approx(1.0)  # born at 1 and not at 0
    assert loss_of(draw(), draw()) == 0


# ---------------------------------------------------------------------------- gradient and valid


@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_finite_differences(seed):
    probs, target = smooth_probs(seed, shape=(4, 5, 5))
    valid = random_valid(seed, shape=(4, 5, 5), share=0.1)
    probs.requires_grad_()
    topological_loss(probs, target, valid).backward()
    assert probs.grad.count_nonzero() > 5
    step = 1e-6  # far below the gaps between probabilities: the pairing stays
    for place in np.ndindex(4, 5, 5):
        values = []
        for sign in (1, -1):
            moved = probs.detach().clone()
            moved[place] += sign * step
            values.append(topological_loss(moved, target, valid).item())
        slope = (values[0] - values[1]) / (2 * step)
        assert probs.grad[place].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("content", [0.0, 1.0, 1e30, -math.inf, math.nan])
def test_content_of_invalid_voxels_cannot_change_value_or_gradient(content):
    probs, target = smooth_probs(1, dtype=torch.float32)
    valid = random_valid(1)
    valid[0, 0, 0] = False
    results = []
    for p, t in ((probs, target.float()), (probs * 0 + content, target.float() * 0 + content)):
        p = torch.where(valid, probs, p).requires_grad_()
        loss = topological_loss(p, torch.where(valid, target.float(), t), valid)
        loss.backward()
        assert bool((p.grad[~valid] == 0).all()) and p.grad.count_nonzero() > 10
        results.append((loss.detach(), p.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_window_without_a_valid_voxel_is_zero_with_zero_gradient():
    probs = torch.full((3, 3, 3), math.nan, requires_grad=True)
    loss = topological_loss(probs, torch.ones(3, 3, 3), torch.zeros(3, 3, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and bool((probs.grad == 0).all())


def test_nan_in_a_valid_voxel_gives_nan():
    probs = torch.full((3, 3, 3), 0.5)
    probs[1, 1, 1] = math.nan
    assert topological_loss(probs, torch.ones(3, 3, 3)).isnan()


def test_shapes_that_differ_are_refused():
    with pytest.raises(
        ValueError, match=r"one shape \(D, H, W\), .* got \(3, 3, 4\) and \(3, 3, 3\)"
    ):
        topological_loss(torch.zeros(3, 3, 3), torch.zeros(3, 3, 4))
    with pytest.raises(ValueError, match=r"got \(1, 3, 3, 3\)"):
        topological_loss(torch.zeros(1, 3, 3, 3), torch.zeros(1, 3, 3, 3))


def test_loss_of_a_rough_prediction_stays_small():
    probs = torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(0))
    assert topological_loss(probs, torch.zeros_like(probs)) < 0.5  # some 2000 classes
    assert topological_loss(0.5 + 0.08 * (probs - 0.5), torch.zeros_like(probs)) < 2  # faint ones


def test_windows_together_are_each_alone():
    windows = [(*smooth_probs(seed), random_valid(seed)) for seed in range(3)]
    together = topological_losses(windows)
    assert together.shape == (3,)
    for value, alone in zip(together, windows, strict=True):
        assert torch.equal(value, topological_loss(*alone))
    assert topological_losses([]).shape == (0,)


# ---------------------------------------------------------------------------- behaviour


def noisy_logits(target):
    return (target * 2 - 1) * 3 + 0.3 * torch.randn(
        target.shape, generator=torch.Generator().manual_seed(0)
    )


def sheet_with_a_pinhole():
    """Logits of a sheet with one voxel missed, and the whole sheet."""
    target = torch.zeros(7, 12, 12)
    target[3] = 1
    logits = noisy_logits(target)
    logits[3, 6, 6] = -3
    return logits, target


def sheets_with_a_bridge():
    """Logits of two parallel sheets that one voxel joins, and the sheets apart."""
    target = torch.zeros(7, 12, 12)
    target[2] = target[4] = 1
    logits = noisy_logits(target)
    logits[3, 6, 6] = 2
    return logits, target


def steps_to_repair(logits, target, extra, limit, rate=5.0):
    """Steps of gradient descent on BCE + extra(probs, target) until the topology is right."""
    logits = logits.clone().requires_grad_()
    wanted = betti_numbers(target > 0.5)
    for step in range(limit):
        probs = torch.sigmoid(logits)
        if betti_numbers(probs.detach() > 0.5) == wanted:
            return step
        loss = F.binary_cross_entropy(probs, target) + extra(probs, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= rate * gradient
    return limit


def soft_dice(probs, target):
    return 1 - 2 * (probs * target).sum() / (probs.sum() + target.sum())


@pytest.mark.parametrize("case", [sheet_with_a_pinhole, sheets_with_a_bridge])
def test_descent_repairs_the_topology_where_bce_and_dice_have_not(case):
    logits, target = case()
    assert betti_numbers(logits > 0) != betti_numbers(target > 0.5)
    assert steps_to_repair(logits, target, topological_loss, limit=40) < 20
    assert steps_to_repair(logits, target, soft_dice, limit=100) == 100
