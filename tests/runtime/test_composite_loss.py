"""The weighted sum of terms: scales, steps, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses
import runtime.composite_loss
from losses import (
    LOSSES,
    boundary_loss,
    soft_dice_loss,
    soft_skeletons,
    surface_distance_loss,
    weighted_bce_loss,
)
from runtime.composite_loss import (
    acting,
    check_terms,
    composite_loss,
    pool_target,
    takes_skeleton,
    validation_losses,
)
from tests.test_losses import as_logits, bar, draw
from topology.persistence import betti_numbers

# ---------------------------------------------------------------------------- scales


def test_pooling_averages_exact_blocks():
    target = bar(2, length=3, size=8)
    coarse, valid = pool_target(target, None, (1, 1, 4))
    assert coarse.flatten().tolist() == [0.0, 1.0, 0.5, 0.0]
    assert valid is None


def test_pooling_counts_valid_voxels_only():
    target = torch.tensor([1.0, 9.0, 0.0, 1.0, 1.0, 9.0, 9.0, 9.0]).reshape(1, 1, 1, 1, 8)
    valid = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0]).bool().reshape(1, 1, 1, 1, 8)
    coarse, coarse_valid = pool_target(target, valid, (1, 1, 4))
    assert coarse.flatten().tolist() == [1.0, 0.5, 1.0, 0.0]
    assert coarse_valid.flatten().tolist() == [True, True, True, False]


def test_pooling_to_a_shape_that_does_not_divide_is_adaptive():
    target = torch.rand(1, 1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    coarse, valid = pool_target(target, torch.ones(1, 1, 3, 5, 7).bool(), (2, 3, 4))
    torch.testing.assert_close(coarse, F.adaptive_avg_pool3d(target, (2, 3, 4)))
    assert bool(valid.all())


def test_composite_is_the_weighted_sum_over_scales():
    logits, target, valid = draw()
    coarse = torch.randn(2, 1, 2, 5, 3, generator=torch.Generator().manual_seed(1))
    terms = {
        "weighted_bce": {"weight": 0.5, "positive_weight": 2.0},
        "surface_distance": {"weight": 0.25, "scales": 1, "tolerance": 3.0},
        "soft_dice": {"weight": 0.0},
    }
    total, components = composite_loss([logits, coarse], target, valid, terms)
    pooled = pool_target(target, valid, (2, 5, 3))
    bce = 2 / 3 * weighted_bce_loss(logits, target, valid, positive_weight=2.0)
    bce = bce + 1 / 3 * weighted_bce_loss(coarse, *pooled, positive_weight=2.0)
    surface = surface_distance_loss(logits, target, valid, tolerance=3.0)
    assert set(components) == {"weighted_bce", "surface_distance", "total"}
    torch.testing.assert_close(components["weighted_bce"], bce)
    torch.testing.assert_close(components["surface_distance"], surface)
    torch.testing.assert_close(total, 0.5 * bce + 0.25 * surface)
    torch.testing.assert_close(components["total"], total)


def test_composite_scales_the_spacing_with_the_pooling():
    coarse = as_logits(bar(3, length=1, size=4))
    fine, target = as_logits(bar(0, length=2, size=8)), bar(0, length=2, size=8)
    terms = {"surface_distance": {"weight": 1.0, "tolerance": 12.0}}
    total, _ = composite_loss([fine, coarse], target, None, terms, spacing=(1.0, 1.0, 2.0))
    # Coarse voxels are 4 wide; three of them lie between the two: 12, each way, over 4 voxels.
    assert total.item() == pytest.approx((1.0 + 1.0) / 4 / 3, rel=1e-5)  # scales: 2 to 1


def test_composite_of_one_tensor_is_its_finest_scale():
    logits, target, valid = draw()
    total, components = composite_loss(logits, target, valid, {"soft_dice": {"weight": 2.0}})
    torch.testing.assert_close(components["soft_dice"], soft_dice_loss(logits, target, valid))
    torch.testing.assert_close(total, 2.0 * components["soft_dice"])


def test_composite_gives_ignored_voxels_no_gradient_at_any_scale():
    logits, target, valid = draw()
    valid[..., :2] = False  # whole blocks of the coarse scale
    outputs = [logits, torch.zeros(2, 1, 2, 5, 3)]
    outputs = [x.clone().requires_grad_() for x in outputs]
    terms = {name: {"weight": 1.0} for name in LOSSES}
    total, components = composite_loss(outputs, torch.where(valid, target, math.nan), valid, terms)
    total.backward()
    assert math.isfinite(components["total"])
    assert bool((outputs[0].grad[~valid] == 0).all())
    assert bool((outputs[1].grad[..., 0] == 0).all())
    assert bool((outputs[1].grad[..., 1:] != 0).any())


# ---------------------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["one", "classes", "regions"])
@pytest.mark.parametrize("name", [*LOSSES, "boundary"])
def test_the_mean_over_ranks_is_the_loss_of_one_batch_of_all_their_samples(name, kind):
    if name == "toploss":
        pytest.skip("it chooses its windows among those of a whole batch")
    term = {"weight": 0.7, "scales": 2}
    term |= {"positive_weight": 3.0} if name == "weighted_bce" else {}
    terms, step = {name: term}, 0
    if name == "boundary":
        terms, step = {"cldice": {"weight": 0.7, "interval": 2, "off_step": "boundary"}}, 1
    generator = torch.Generator().manual_seed(0)
    channels = {"one": 1, "classes": 3, "regions": 2}[kind]
    fine, target = (
        torch.randn(4, channels, 8, 8, 8, generator=generator),
        torch.zeros(4, 1, 8, 8, 8),
    )
    target[:, :, 2:6, 3:5] = 1.0
    how = {}
    if kind == "classes":
        target[:, :, 3:5, 4:7] = 2.0
    if kind == "regions":
        target = torch.cat([target, target.flip(2, 3)], 1)
    if kind != "one":
        how = {"class_weights": [1.0, 3.0], "overlapping": kind == "regions"}
    valid = torch.rand(4, 1, 8, 8, 8, generator=generator) < 0.9
    valid[0, :, 1:], valid[1] = False, False  # few voxels of one sample, none of another
    scales = [fine, F.avg_pool3d(fine, 2)]
    whole, components = composite_loss(scales, target, valid, terms, step=step, **how)

    def of_rank(rank, over_ranks):
        part = slice(2 * rank, 2 * rank + 2)
        one = [scale[part] for scale in scales]
        arguments = one, target[part], valid[part], terms
        return composite_loss(*arguments, step=step, over_ranks=over_ranks, **how)

    weights = []
    for rank in range(2):
        of_rank(rank, lambda own: weights.append(own) or own)
    mean = sum(weights) / 2
    halves = [of_rank(rank, lambda own: mean) for rank in range(2)]
    assert float(sum(total for total, _ in halves) / 2) == pytest.approx(float(whole), abs=1e-6)
    for key, value in components.items():
        assert float(sum(found[key] for _, found in halves) / 2) == pytest.approx(float(value))
    plain = sum(of_rank(rank, None)[0] for rank in range(2)) / 2
    assert float(plain) != pytest.approx(float(whole), rel=1e-4)  # so that it is a test


def test_term_of_an_interval_acts_on_one_step_of_so_many():
    logits, target, valid = draw()
    terms = {"soft_dice": {"weight": 1.0}, "cldice": {"weight": 2.0, "interval": 4}}
    values = [composite_loss(logits, target, valid, terms, step=s)[1] for s in range(8)]
    assert ["cldice" in components for components in values] == [True, False, False, False] * 2
    for components in values:
        torch.testing.assert_close(
            components["total"], components["soft_dice"] + 2.0 * components.get("cldice", 0.0)
        )


def test_boundary_stands_in_between_under_its_own_name():
    logits, target, valid = draw()
    coarse = torch.zeros(2, 1, 2, 5, 3)
    terms = {"surface_distance": {"weight": 0.5, "interval": 2, "off_step": "boundary"}}
    total, components = composite_loss([logits, coarse], target, valid, terms, step=1)
    assert set(components) == {"surface_distance_boundary", "total"}
    torch.testing.assert_close(
        components["surface_distance_boundary"], boundary_loss(logits, target, valid)
    )
    torch.testing.assert_close(total, 0.5 * boundary_loss(logits, target, valid))
    assert set(composite_loss([logits, coarse], target, valid, terms, step=2)[1]) == {
        "surface_distance",
        "total",
    }


@pytest.mark.parametrize("intervals", [(2, 2), (2, 4), (6, 12)])
def test_terms_take_turns(intervals):
    terms = {
        "weighted_bce": {"weight": 1.0},
        "cldice": {"weight": 1.0, "interval": intervals[0]},
        "toploss": {"weight": 1.0, "interval": intervals[1]},
    }
    seen = {"cldice": 0, "toploss": 0}
    for step in range(48):
        busy = [name for name in acting(terms, step) if name != "weighted_bce"]
        assert len(busy) <= 1
        for name in busy:
            seen[name] += 1
    assert seen == {name: 48 // terms[name]["interval"] for name in seen}


def test_homology_is_begun_once_and_before_other_terms_whatever_their_order(monkeypatch):
    calls, terms = [], {"toploss": {"weight": 0.5, "window": [4, 4, 4]}, "soft_dice": {"weight": 1}}
    start, dice = losses.start_homology, losses.soft_dice_loss

    def called(name, function):
        return lambda *arguments, **named: (calls.append(name), function(*arguments, **named))[1]

    for module in (losses, runtime.composite_loss):
        monkeypatch.setattr(module, "start_homology", called("homology", start))
    monkeypatch.setitem(LOSSES, "soft_dice", called("dice", dice))
    logits, target, valid = draw()
    first, _ = composite_loss(logits, target, valid, terms)
    second, _ = composite_loss(logits, target, valid, dict(reversed(terms.items())))
    assert calls == ["homology", "dice"] * 2
    alone = losses.toploss_loss(logits, target, valid, window=(4, 4, 4))
    torch.testing.assert_close(first, 0.5 * alone + dice(logits, target, valid))
    torch.testing.assert_close(first, second)


def test_terms_of_one_scale_share_their_skeletons(monkeypatch):
    made = []

    def counting(*arguments, iterations):
        made.append(iterations)
        return soft_skeletons(*arguments, iterations=iterations)

    monkeypatch.setattr("runtime.composite_loss.soft_skeletons", counting)
    logits, target, valid = draw()
    terms = {"cldice": {"weight": 1.0}, "morph_skeleton": {"weight": 1.0}}
    _, components = composite_loss(logits, target, valid, terms)
    assert made == [3]
    for name in terms:
        torch.testing.assert_close(components[name], LOSSES[name](logits, target, valid))
    terms["morph_skeleton"]["iterations"] = 1
    composite_loss(logits, target, valid, terms)
    assert made == [3, 3, 1]


def test_tubed_skeleton_goes_to_the_term_that_asks_for_it():
    logits, target, valid = draw()
    skeleton = (target > 0.7).float()
    terms = {"skeleton_recall": {"weight": 1.0, "scales": 1}}
    total, _ = composite_loss(logits, target, valid, terms, skeleton=skeleton)
    expected = LOSSES["skeleton_recall"](logits, target, valid, skeleton=skeleton)
    torch.testing.assert_close(total, expected)
    assert takes_skeleton(terms)
    assert not takes_skeleton({"cldice": {"weight": 1.0}, "skeleton_recall": {"weight": 0.0}})


def test_tubed_skeleton_is_pooled_to_the_coarse_scale():
    logits, coarse = as_logits(bar(0, 4, 8)), as_logits(bar(0, 2, 4))
    target, skeleton = bar(0, 8, 8), bar(2, 6, 8)
    terms = {"skeleton_recall": {"weight": 1.0}}
    _, components = composite_loss([logits, coarse], target, None, terms, skeleton=skeleton)
    # Of 6 voxels 2 are found, of 3 coarse cells 1; one of smoothing each. Scales count 2 to 1.
    expected = (2 * (1 - (2 + 1) / (6 + 1)) + 1 - (1 + 1) / (3 + 1)) / 3
    assert components["skeleton_recall"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", range(4))
def test_content_of_ignored_voxels_changes_no_step(step):
    terms = {name: {"weight": 1.0, "interval": 2, "off_step": "boundary"} for name in LOSSES}
    results = []
    for fill in (0.0, 123.0):
        logits, target, valid = draw()
        coarse = torch.randn(2, 1, 2, 5, 3, generator=torch.Generator().manual_seed(1))
        outputs = [torch.where(valid, logits, fill).requires_grad_(), coarse.requires_grad_()]
        total, _ = composite_loss(
            outputs, torch.where(valid, target, fill), valid, terms, step=step
        )
        total.backward()
        assert bool((outputs[0].grad[~valid] == 0).all())
        results.append((total.detach(), outputs[0].grad, outputs[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("step", range(2))
def test_all_ignored_gives_zero_loss_and_zero_gradient_in_every_step(step):
    terms = {name: {"weight": 1.0, "interval": 2, "off_step": "boundary"} for name in LOSSES}
    logits, target, valid = draw()
    outputs = [logits.requires_grad_(), torch.randn(2, 1, 2, 5, 3).requires_grad_()]
    total, _ = composite_loss(outputs, target, torch.zeros_like(valid), terms, step=step)
    total.backward()
    assert total == 0.0
    assert all(bool((x.grad == 0).all()) for x in outputs)


# ---------------------------------------------------------------------------- descent

BASE = {"weighted_bce": {"weight": 0.5}, "soft_dice": {"weight": 0.5}}


def repaired_within(steps, fault, target, terms, done, rate):
    """Whether gradient descent on the logits of a faulty prediction repairs it in time."""
    logits = as_logits(fault[None, None], sharp=2.0).requires_grad_()
    for _ in range(steps + 1):
        if done(logits.detach()[0, 0] > 0):
            return True
        total, _ = composite_loss(logits, target[None, None], None, terms)
        (gradient,) = torch.autograd.grad(total, logits)
        logits.data -= rate * gradient
    return False


def broken_bar():
    target = torch.zeros(7, 8, 20)
    target[2:5, 3:6, 1:19] = 1.0
    fault = target.clone()
    fault[..., 8:12] = 0.0
    return fault, target


def bridged_sheets():
    target = torch.zeros(10, 12, 14)
    target[2:4] = target[6:8] = 1.0
    fault = target.clone()
    fault[4:6, 5, 6] = 1.0
    return fault, target


def sheet_with_a_pinhole():
    target = torch.zeros(7, 12, 14)
    target[3] = 1.0
    fault = target.clone()
    fault[3, 5, 6] = 0.0
    return fault, target


def displaced_sheet():
    target, fault = torch.zeros(2, 12, 10, 10)
    target[4:6] = fault[6:8] = 1.0
    return fault, target


@pytest.mark.parametrize(
    ("shape", "term", "steps"),
    [
        (broken_bar, "cldice", 20),
        (bridged_sheets, "toploss", 5),
        (sheet_with_a_pinhole, "toploss", 5),
    ],
)
def test_term_repairs_the_topology_where_bce_and_dice_take_longer(shape, term, steps):
    fault, target = shape()
    with_term = {name: {"weight": 0.25} for name in BASE} | {term: {"weight": 0.5}}

    def done(mask):
        return betti_numbers(mask) == betti_numbers(target)

    assert not done(fault)
    assert repaired_within(steps, fault, target, with_term, done, rate=50.0)
    assert not repaired_within(2 * steps, fault, target, BASE, done, rate=50.0)


def test_surface_distance_added_to_bce_and_dice_pulls_a_displaced_sheet_back_sooner():
    fault, target = displaced_sheet()
    with_term = {**BASE, "surface_distance": {"weight": 1.0}}

    def done(mask):
        return torch.equal(mask, target > 0)

    steps = next(n for n in range(80) if repaired_within(n, fault, target, with_term, done, 100.0))
    assert not repaired_within(steps, fault, target, BASE, done, rate=100.0)


# ---------------------------------------------------------------------------- classes


def test_several_classes_are_shares_at_the_coarse_scale():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (1, 1, 4, 4, 4), generator=generator)
    fine = torch.randn(1, 3, 4, 4, 4, generator=generator)
    coarse = torch.randn(1, 3, 2, 2, 2, generator=generator)
    total, _ = composite_loss([fine, coarse], target, None, {"soft_dice": {"weight": 1.0}})
    one_hot = F.one_hot(target[:, 0], 3).movedim(-1, 1).float()
    expected = 2 / 3 * soft_dice_loss(fine, one_hot)
    expected = expected + 1 / 3 * soft_dice_loss(coarse, F.avg_pool3d(one_hot, 2))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("class_weights", [None, [1.0, 4.0]])
def test_overlapping_regions_are_each_a_foreground_of_its_own(class_weights):
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(2, 2, 6, 8, 8, generator=generator).requires_grad_()
    coarse = torch.randn(2, 2, 3, 4, 4, generator=generator).requires_grad_()
    target = (torch.rand(2, 2, 6, 8, 8, generator=generator) > 0.7).float()
    valid = torch.rand(2, 1, 6, 8, 8, generator=generator) > 0.2
    skeleton = (torch.rand(2, 1, 6, 8, 8, generator=generator) > 0.5).float()
    terms = {name: {"weight": 0.5, "scales": 1} for name in LOSSES if name != "weighted_bce"}
    terms["weighted_bce"] = {"weight": 1.0}
    how = {"spacing": (2.0, 1.0, 1.0), "skeleton": skeleton}
    total, components = composite_loss(
        [fine, coarse], target, valid, terms, overlapping=True, class_weights=class_weights, **how
    )
    each = [
        composite_loss([x[:, [r]] for x in (fine, coarse)], target[:, [r]], valid, terms, **how)
        for r in range(2)
    ]
    shares = [w / sum(class_weights or [1, 1]) for w in class_weights or [1, 1]]
    for name, value in components.items():
        expected = sum(s * found[name] for s, (_, found) in zip(shares, each, strict=True))
        torch.testing.assert_close(value, expected)
    total.backward()
    assert bool((fine.grad[~valid.expand_as(fine)] == 0).all())
    assert bool((fine.grad[:, 0] != 0).any()) and bool((fine.grad[:, 1] != 0).any())


# ---------------------------------------------------------------------------- validation


@pytest.mark.parametrize("overlapping", [False, True])
def test_validation_losses_of_several_classes_are_those_of_training(overlapping):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=generator)
    ids = torch.randint(0, 3, (1, 4, 5, 6), generator=generator)
    target = torch.cat([ids > 0, ids > 1, ids == 1]) if overlapping else ids
    valid = torch.rand(4, 5, 6, generator=generator) > 0.2
    terms = {name: {"weight": 1.0} for name in ("weighted_bce", "surface_distance")}
    later = {name: term | {"validation_only": True} for name, term in terms.items()}
    weights = [1.0, 2.0, 3.0] if overlapping else [1.0, 3.0]
    how = {"overlapping": overlapping, "class_weights": weights}
    probs = torch.sigmoid(logits) if overlapping else torch.softmax(logits, 0)
    values = validation_losses(probs, target, valid, later, tile=(4, 5, 6), **how)
    _, expected = composite_loss(logits[None], target[None], valid[None, None], terms, **how)
    assert values == {
        f"{name}_loss": pytest.approx(float(expected[name]), rel=1e-4) for name in terms
    }


def test_validation_only_terms_never_train():
    logits, target, valid = draw()
    terms = {"soft_dice": {"weight": 1.0}, "cldice": {"weight": 1.0, "validation_only": True}}
    assert set(composite_loss(logits, target, valid, terms)[1]) == {"soft_dice", "total"}


def test_validation_losses_are_means_over_tiles():
    logits, target, valid = (x[0, 0] for x in draw())
    valid[2:] = False
    valid[3, 4, 5] = True  # one voxel in the last tile
    terms = {
        "soft_dice": {"weight": 1.0},
        "weighted_bce": {"weight": 0.0, "validation_only": True},
        "surface_distance": {"weight": 0.1, "validation_only": True, "tolerance": 3.0},
    }
    values = validation_losses(
        torch.sigmoid(logits)[None],
        target[None] > 0.5,
        valid,
        terms,
        tile=(3, 5, 6),
        spacing=(2.0, 1.0, 1.0),
    )
    whole = [x[None, None] for x in (logits, (target > 0.5).float(), valid)]
    assert set(values) == {"weighted_bce_loss", "surface_distance_loss"}
    # A mean over voxels is the same with tiles and without.
    assert values["weighted_bce_loss"] == pytest.approx(weighted_bce_loss(*whole).item(), rel=1e-4)
    tiles = [
        surface_distance_loss(
            *(x[:, :, part] for x in whole), tolerance=3.0, spacing=(2.0, 1.0, 1.0)
        ).item()
        for part in (slice(0, 3), slice(3, 4))
    ]
    counts = [int(valid[:3].sum()), int(valid[3:].sum())]
    expected = sum(p * n for p, n in zip(tiles, counts, strict=True)) / sum(counts)
    assert values["surface_distance_loss"] == pytest.approx(expected, rel=1e-4)


def test_validation_recalls_the_skeleton_that_is_given():
    target = bar(0, 9)[0, 0]
    probs, everywhere = torch.where(bar(0, 3)[0, 0] > 0, 1.0, 0.0), torch.ones_like(target) > 0
    terms = {"skeleton_recall": {"weight": 0.0, "validation_only": True}}
    options = {"tile": (9, 9, 9), "skeleton": bar(2, 3)[0, 0]}
    values = validation_losses(probs[None], target[None], everywhere, terms, **options)
    assert values["skeleton_recall_loss"] == pytest.approx(1 - (1 + 1) / (3 + 1), rel=1e-4)
    assert takes_skeleton(terms, validation_only=True)
    assert not takes_skeleton(terms)


def test_validation_without_a_term_or_a_valid_voxel():
    probs, target = torch.rand(4, 5, 6), torch.ones(4, 5, 6)
    none = torch.zeros(4, 5, 6, dtype=torch.bool)
    terms = {"cldice": {"weight": 1.0, "validation_only": True}}
    assert validation_losses(probs[None], target[None], none, terms, tile=(4, 4, 4)) == {
        "cldice_loss": 0.0
    }
    assert (
        validation_losses(probs, target, ~none, {"cldice": {"weight": 1.0}}, tile=(4, 4, 4)) == {}
    )


# ---------------------------------------------------------------------------- checks


def test_components_are_detached_tensors():
    logits, target, valid = draw()
    _, components = composite_loss(
        logits.requires_grad_(), target, valid, {"soft_dice": {"weight": 1}}
    )
    assert all(torch.is_tensor(c) and not c.requires_grad for c in components.values())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"soft_dise": {"weight": 1}}, "'soft_dise' is unknown; did you mean 'soft_dice'"),
        ({"soft_dice": {"weight": 1, "smoth": 1}}, "no 'smoth'; did you mean 'smooth'"),
        ({"soft_dice": {"weight": -1}}, "expected a weight of 0 or more, got -1"),
        ({"soft_dice": {}}, "expected a weight of 0 or more, got None"),
        ({"soft_dice": {"weight": 1, "scales": 0}}, "expected scales of 1 or more"),
        ({"soft_dice": {"weight": 1, "interval": 0}}, "expected interval of 1 or more, got 0"),
        ({"soft_dice": {"weight": 1, "off_step": "boundary"}}, "no step lies between"),
        (
            {"soft_dice": {"weight": 1, "interval": 2, "validation_only": True}},
            "no interval with validation_only",
        ),
        ({"soft_dice": {"weight": 1, "off_step": "all"}}, "nothing or boundary, got 'all'"),
        ({"soft_dice": {"weight": 1, "spacing": (1, 1, 1)}}, "has no 'spacing'"),
        ({"soft_dice": {"weight": 1, "interval": 2}}, "acts on every step"),
        ({"soft_dice": {"weight": 1, "validation_only": True}}, "acts on every step"),
        ({"surface_distance": {"weight": 1, "tolerance": None}}, "positive number, got None"),
        ({"toploss": {"weight": 1, "windows": 0}}, "toploss: expected windows >= 1"),
        ({"soft_dice": {"weight": 0}}, "at least one term with a weight above 0"),
        ({"soft_dice": {"weight": 1, "smooth": 0}}, "smooth: expected a positive number, got 0"),
    ],
)
def test_wrong_terms_are_refused_by_name(terms, message):
    logits, target, valid = draw()
    with pytest.raises(ValueError, match=message):
        composite_loss(logits, target, valid, terms)


def test_a_term_without_class_weights_is_called_without_and_refused_where_they_are_set(monkeypatch):
    def own_loss(logits, target, valid=None, *, factor=2.0):
        return factor * logits.mean()

    monkeypatch.setitem(LOSSES, "own", own_loss)
    logits, target, valid = draw()
    terms = {"own": {"weight": 0.5, "factor": 3.0}}
    total, _ = composite_loss(logits, target, valid, terms)
    torch.testing.assert_close(total, 1.5 * logits.mean())
    with pytest.raises(ValueError, match="class_weights: expected terms that take it, got own"):
        check_terms(terms, {"artery": 2.0}, in_training=True)
    check_terms({"own": {"weight": 0.0}}, {"artery": 2.0})


def test_patches_of_differing_spacing_have_the_loss_that_each_has_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 1, 8, 12, 12), (2, 1, 4, 6, 6)
    outputs = [torch.randn(shape, generator=generator) for shape in shapes]
    target = (torch.rand(shapes[0], generator=generator) > 0.9).float()
    terms = {"surface_distance": {"weight": 1.0, "scales": 2}}
    spacings = [(3.0, 1.0, 1.0), (1.0, 0.5, 0.5)]
    together, _ = composite_loss(outputs, target, None, terms, spacing=spacings)
    alone = [
        composite_loss([x[i : i + 1] for x in outputs], target[i : i + 1], None, terms, spacing=s)
        for i, s in enumerate(spacings)
    ]
    alone = [total for total, _ in alone]
    assert abs(alone[0] - alone[1]) > 0.02
    torch.testing.assert_close(together, sum(alone) / 2)  # all voxels are valid
    same, _ = composite_loss(outputs, target, None, terms, spacing=[spacings[0]] * 2)
    assert torch.equal(same, composite_loss(outputs, target, None, terms, spacing=spacings[0])[0])
