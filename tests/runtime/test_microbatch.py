"""Batches that go through the network in parts, and predictions that make do with less memory."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F

import losses
import model
from runtime import composite_loss, microbatch
from runtime.microbatch import MicroBatch
from runtime.signals import CannotGoOn
from tests.runtime.test_device_memory import GB, TEXTS, card, memory_error

__all__ = ["card"]  # a fixture
SHAPE = (8, 16, 16)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of a busy machine wait for each other a hundred times as long as they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(dropout=0.0):
    torch.manual_seed(0)
    return model.UNet3D(
        1,
        1,
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2)],
        kernels=[(3, 3, 3)] * 3,
        base=4,
        multipliers=[1, 2, 2],
        blocks=1,
        dropout=dropout,
    )


def batch(size=5):
    """(image, target, valid, skeleton): bars of several lengths in noise, a face not labeled."""
    generator = torch.Generator().manual_seed(1)
    target = torch.zeros(size, 1, *SHAPE)
    for i in range(size):
        target[i, 0, 2:5, 4 + i : 7 + i, 2 : 8 + i] = 1
    image = target + 0.3 * torch.randn(target.shape, generator=generator)
    valid = torch.ones_like(target, dtype=torch.bool)
    valid[1:, :, -2:] = False  # other numbers of voxels in each patch
    return image, target, valid, F.max_pool3d(target, 3, 1, 1)


def micro_batch_of(net, size=None, checkpointing=False):
    micro_batch = MicroBatch(net, contextlib.nullcontext)
    micro_batch.load_state_dict({"size": size, "checkpointing": checkpointing})  # an older state
    return micro_batch


TERMS = {
    "surface_distance": {"tolerance": 2.0, "scales": 1},
    "cldice": {"off_step": "boundary", "interval": 2},
    "soft_dice": {"batch": True},
    "toploss": {"window": [8, 8, 8]},
}


def loss_of(logits, terms, step=0):
    _, target, valid, skeleton = batch()
    total, _ = composite_loss.composite_loss(
        logits, target, valid, terms, spacing=(2.0, 1.0, 1.0), skeleton=skeleton, step=step
    )
    return total


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def trained(terms, size=None, step=0, recompute=False):
    net = network()
    micro_batch = micro_batch_of(net, size, recompute)
    micro_batch.backward(loss_of(micro_batch.forward(batch()[0]), terms, step))
    return gradients(net)


# ---------------------------------------------------------------------------- the same gradient


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_gradient_in_parts_is_that_of_the_whole_batch_for_every_term(name):
    terms = {name: {"weight": 1.0, **TERMS.get(name, {})}}
    whole = trained(terms)
    assert whole.abs().max() > 1e-4
    for size in (1, 2):  # 5 patches: the last part is a short one
        assert torch.allclose(trained(terms, size), whole, rtol=0, atol=1e-6)


def test_the_gradient_in_parts_is_that_of_the_whole_batch_for_all_terms_at_once():
    terms = {name: {"weight": 0.3, **TERMS.get(name, {})} for name in losses.LOSSES}
    for step in (0, 1):  # on the second, boundary stands in for cldice
        whole = trained(terms, step=step)
        assert torch.allclose(trained(terms, 3, step), whole, rtol=0, atol=1e-6)
        assert torch.allclose(trained(terms, 1, step, True), whole, rtol=0, atol=1e-6)


def test_a_mean_of_gradients_of_parts_would_be_another_one():
    terms, net = {"weighted_bce": {"weight": 1.0}}, network()
    image, target, valid, _ = batch()
    for i in range(5):
        part = slice(i, i + 1)
        loss, _ = composite_loss.composite_loss(net(image[part]), target[part], valid[part], terms)
        (loss / 5).backward()
    assert not torch.allclose(gradients(net), trained(terms), rtol=0, atol=1e-4)


def test_gradients_of_several_batches_add_up():
    net = network()
    micro_batch = micro_batch_of(net, 2)
    for _ in range(3):
        micro_batch.backward(micro_batch.forward(batch()[0])[0].mean())
    one = network()
    one(batch()[0])[0].mean().backward()
    assert torch.allclose(gradients(net), 3 * gradients(one), rtol=0, atol=1e-6)


def test_a_scale_that_no_term_looks_at_gets_no_gradient():
    net = network()
    micro_batch = micro_batch_of(net, 2)
    logits = micro_batch.forward(batch()[0])
    assert len(logits) == 2
    micro_batch.backward(logits[0].mean())
    whole = network()
    whole(batch()[0])[0].mean().backward()
    assert torch.allclose(gradients(net), gradients(whole), rtol=0, atol=1e-6)


def test_each_part_drops_the_same_units_both_times_and_the_generator_moves_on_once():
    net = network(dropout=0.5)
    micro_batch = micro_batch_of(net, 2)
    seen = []
    net.register_forward_hook(lambda module, given, logits: seen.append(logits[0].detach()))
    torch.manual_seed(3)
    logits = micro_batch.forward(batch()[0])
    after = torch.get_rng_state()
    micro_batch.backward(logits[0].mean())
    assert torch.equal(torch.get_rng_state(), after)
    assert len(seen) == 6 and all(map(torch.equal, seen[:3], seen[3:]))
    assert not torch.equal(seen[0], network(dropout=0.5)(batch()[0][:2])[0])  # it does drop


def test_a_part_as_large_as_the_batch_is_the_batch():
    net = network()
    micro_batch = micro_batch_of(net, 5)
    assert micro_batch.forward(batch()[0])[0].grad_fn is not None and micro_batch._parts is None


# ---------------------------------------------------------------------------- out of memory


def failing(net, most, where, name="torch"):
    """The network finds no memory for more than `most` patches, or without recomputation, in its
    forward or backward pass; name: of the error."""
    calls, forward = [], net.forward

    def limited(x):
        logits = forward(x)
        if torch.is_grad_enabled() and (len(x) > most or not net.checkpointing):
            calls.append(len(x))
            if where == "forward":
                raise memory_error(name)
            logits[0].register_hook(raising)
        return logits

    def raising(gradient):
        raise memory_error(name)

    net.forward = limited
    return calls


def step_of(micro_batch, terms, forward=None):
    """A step of two batches; what was reported on the way: a list of (text, figures)."""
    reports = []
    micro_batch.start()
    while True:
        try:
            for _ in range(2):
                logits = (forward or micro_batch.forward)(batch()[0])
                micro_batch.backward(loss_of(logits, terms) / 2)
            return reports
        except RuntimeError as error:
            logits = None
            micro_batch.shrink(error, lambda kind, text, **f: reports.append((text, f)))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_finds_no_memory_recomputes_and_then_takes_ever_smaller_parts(where):
    terms = {"soft_dice": {"weight": 1.0, "batch": True}}
    net = network()
    micro_batch = micro_batch_of(net)
    calls = failing(net, 1, where)
    reports = step_of(micro_batch, terms)
    assert calls == [5, 5, 3, 2]
    assert [f["micro_batch"] for _, f in reports] == [None, 3, 2, 1]
    assert all(f["checkpointing"] for _, f in reports) and net.checkpointing
    assert "activations are recomputed in the backward pass" in reports[0][0]
    assert (
        "batches of 5 go through the network 3 at a time, with the same gradient" in reports[1][0]
    )
    assert torch.allclose(gradients(net), trained(terms), rtol=0, atol=1e-6)  # and none twice
    assert step_of(micro_batch, terms) == []  # it is remembered


@pytest.mark.parametrize("name", TEXTS)
def test_after_each_error_of_memory_a_step_goes_on_to_the_same_gradient(card, name):
    terms, net = {"soft_dice": {"weight": 1.0, "batch": True}}, network()
    failing(net, 3, "backward", name)
    assert len(step_of(micro_batch_of(net), terms)) == 2
    assert torch.allclose(gradients(net), trained(terms), rtol=0, atol=1e-6)


def test_recomputed_activations_drop_the_same_units_and_give_the_same_gradient():
    def gradient(checkpointing):
        net = network(dropout=0.5)
        micro_batch = micro_batch_of(net, None, checkpointing)
        torch.manual_seed(3)
        micro_batch.backward(micro_batch.forward(batch()[0])[0].square().mean())
        return gradients(net), torch.get_rng_state()

    (kept, after), (recomputed, after_recomputed) = gradient(False), gradient(True)
    assert torch.equal(kept, recomputed) and torch.equal(after, after_recomputed)


def test_a_network_that_cannot_recompute_takes_parts_at_once():
    net = torch.nn.Conv3d(1, 1, 1)
    micro_batch = micro_batch_of(net)
    micro_batch.start()
    micro_batch.forward(batch()[0])
    micro_batch.shrink(memory_error("find"), microbatch.nothing)
    assert micro_batch.state_dict() == {"size": 3, "checkpointing": False, "memory": None}


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_when_one_patch_is_too_much_nothing_is_left_and_the_error_is_shown(where):
    net = network()
    micro_batch, reports = micro_batch_of(net), []
    failing(net, 0, where, "find")
    before = torch.get_rng_state()
    micro_batch.start()
    text = (
        r"^cpu ran out of memory with one patch at a time and activations recomputed; lower "
        r"sampling.patch .*; the error was: FIND was unable to find an engine"
    )
    with pytest.raises(CannotGoOn, match=text):
        while True:
            try:
                micro_batch.backward(micro_batch.forward(batch()[0])[0].mean())
            except RuntimeError as error:
                micro_batch.shrink(error, lambda kind, text, **f: reports.append((text, f)))
    assert [f["micro_batch"] for _, f in reports] == [None, 3, 2, 1]
    assert "model.checkpointing" in reports[0][0]
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["forward", "loss"])  # on a CPU, torch keeps those of a backward
def test_a_pass_that_failed_leaves_no_activation_to_the_next_one(where):
    net, alive, activations = network(), [], []
    first = next(module for module in net.modules() if isinstance(module, torch.nn.Conv3d))
    first.register_forward_hook(
        lambda module, given, output: activations.append(weakref.ref(output))
    )
    micro_batch = micro_batch_of(net)
    if where == "forward":
        failing(net, 2, where)

    def forward(image):
        alive.append(sum(ref() is not None for ref in activations))
        logits = micro_batch.forward(image)
        if where == "loss" and micro_batch.size != 2:
            raise memory_error("torch")
        return logits

    step_of(micro_batch, {"soft_dice": {"weight": 1.0}}, forward)
    assert len(activations) > 3 and alive[:3] == [0, 0, 0]  # 5, then 3, then 2 patches at once


def test_another_attempt_draws_what_the_first_one_drew():
    micro_batch, drawn = micro_batch_of(network(dropout=0.3)), []

    def forward(image):
        drawn.append(float(torch.rand(1)))
        if len(drawn) < 3:
            micro_batch.forward(image)
            raise memory_error("torch")
        return micro_batch.forward(image)

    step_of(micro_batch, {"soft_dice": {"weight": 1.0}}, forward)
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_any_other_error_is_raised_as_it_is():
    micro_batch = micro_batch_of(network())
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        micro_batch.shrink(RuntimeError("shapes differ"), microbatch.nothing)
    assert micro_batch.state_dict() == {"size": None, "checkpointing": False, "memory": None}


def test_the_state_of_a_run_that_is_resumed_holds_from_the_start():
    net = network()
    micro_batch = micro_batch_of(net, 1, True)
    assert net.checkpointing
    assert micro_batch.forward(batch()[0])[0].is_leaf and len(micro_batch._parts) == 5


@pytest.fixture
def on_a_card(card, monkeypatch):
    """A `MicroBatch` maker whose network seems to lie on the card."""
    monkeypatch.setattr(MicroBatch, "_device", torch.device("cuda"))
    monkeypatch.setattr(microbatch, "_set_generators", lambda device, states: None)
    return lambda: micro_batch_of(network())


def test_what_did_not_fit_is_kept_with_the_memory_of_the_card_and_forgotten_on_a_larger_one(
    card, on_a_card
):
    micro_batch, reports = on_a_card(), []
    for _ in range(2):
        micro_batch.batch = 4
        micro_batch.shrink(memory_error("get"), lambda kind, text, **_: reports.append(text))
    state = micro_batch.state_dict()
    assert state == {"size": 2, "checkpointing": True, "memory": 80 * GB}
    assert "cuda ran out of memory (80.0 GB, this run took up to 7.0, 0.2 are free)" in reports[0]
    for total in (80, 24):
        card.total, resumed = total * GB, on_a_card()
        assert resumed.load_state_dict(state) == [] and resumed.network.checkpointing
        assert resumed.state_dict() == state  # of the larger card, until this one lacks memory
    card.total, resumed = 141 * GB, on_a_card()
    (line,) = resumed.load_state_dict(state)
    assert "this GPU has 141.0 GB" in line and "one of 80.0" in line and "tried again" in line
    assert resumed.state_dict() == on_a_card().state_dict() and not resumed.network.checkpointing


def test_the_smaller_of_two_states_has_the_smaller_card(on_a_card):
    one = on_a_card()
    one.take_smaller({"size": 2, "checkpointing": False, "memory": 24 * GB})
    assert one.state_dict() == {"size": 2, "checkpointing": False, "memory": 24 * GB}
    one.take_smaller({"size": None, "checkpointing": True, "memory": 80 * GB})
    assert one.state_dict() == {"size": 2, "checkpointing": True, "memory": 24 * GB}
    assert one.network.checkpointing
