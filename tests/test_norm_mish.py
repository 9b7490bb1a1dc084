"""norm_mish: Triton's interpreter runs the kernels on a CPU, where Triton is installed."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
import norm_mish

ERRORS = """
    import itertools, json, torch, torch.nn.functional as F
    import norm_mish
    norm_mish.TILE = 128  # several tiles of several chunks
    kernels = norm_mish.FusedNormMish.apply
    torch.manual_seed(0)

    def error(a, b):
        return float((a.detach().double() - b.detach()).norm() / b.detach().norm())

    found = {}
    names = "y", "x", "scale", "shift", "residual"
    layouts = torch.contiguous_format, torch.channels_last_3d
    kinds = [(torch.float32, layouts[0], 3), (torch.float32, layouts[1], 8)]
    kinds += [(torch.bfloat16, layouts[1], 8)]
    for (dtype, layout, channels), takes in itertools.product(kinds, (True, False)):
        numbers = [torch.randn(2, channels, 4, 6, 10) for _ in range(3)]
        numbers[0] = 3 * numbers[0] + 50  # a mean far from 0
        x, residual, grad = (n.to(dtype).to(memory_format=layout) for n in numbers)
        given = [x, *torch.randn(2, 2, channels), *([residual] if takes else [])]
        given = [g.clone().requires_grad_() for g in given]
        y = kernels(*given[:3], given[3] if takes else None, 1e-5)
        y.backward(grad)
        exact = [g.detach().double().requires_grad_() for g in given]
        scale, shift = (e[..., None, None, None] for e in exact[1:3])
        z = F.instance_norm(exact[0], eps=1e-5) * scale + shift
        expected = F.mish(z + exact[3] if takes else z)
        expected.backward(grad.double())
        pairs = [(y, expected), *((g.grad, e.grad) for g, e in zip(given, exact))]
        for name, pair in zip(names, pairs):
            key = f"{str(dtype)[6:]} {name}"
            found[key] = max(found.get(key, 0.0), error(*pair))
        again = kernels(*given[:3], given[3] if takes else None, 1e-5)
        found["other bits"] = found.get("other bits", 0.0) + float((again != y).sum())
    print(json.dumps(found))
"""
NETWORK = """
    import copy, json, torch
    import model, norm_mish
    norm_mish.TILE = 512
    torch.manual_seed(0)
    plain = model.UNet3D(1, 2, base=4, multipliers=[1, 2], blocks=1, dropout=0.5,
                         strides=[(1, 1, 1), (2, 2, 2)], kernels=[(3, 3, 3)] * 2)
    kernels, x, results = copy.deepcopy(plain), torch.randn(2, 1, 8, 8, 8), []
    for network, answer in ((plain, False), (kernels, True)):
        norm_mish.fused = lambda device: (answer, "")
        network.checkpointing = answer
        torch.manual_seed(1)
        logits = network(x)
        sum((scale ** 2).mean() for scale in logits).backward()
        gradients = [p.grad.flatten() for p in network.parameters()]
        results.append([scale.detach() for scale in logits] + [torch.cat(gradients)])
    print(json.dumps([float((a - b).norm() / b.norm()) for b, a in zip(*results)]))
"""


@pytest.fixture(scope="module")
def interpreted():
    """(errors of the kernels, of a network) by Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = textwrap.dedent(ERRORS) + textwrap.dedent(NETWORK)
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("of", ["y", "x", "scale", "shift", "residual"])
def test_the_kernels_give_values_and_gradients_of_float64(interpreted, of):
    assert interpreted[0][f"float32 {of}"] < 1e-5
    assert interpreted[0][f"bfloat16 {of}"] < 1e-2  # of numbers with 8 bits


def test_the_kernels_give_the_same_bits_each_time(interpreted):
    assert interpreted[0]["other bits"] == 0


def test_a_network_with_the_kernels_is_one_without_with_dropout_and_recomputing(
    interpreted,
):
    assert max(interpreted[1]) < 1e-5


# ---------------------------------------------------------------------------- when they are used


class OnGPU:
    type = "cuda"


@pytest.fixture
def layers():
    torch.manual_seed(0)
    norm = nn.InstanceNorm3d(4, affine=True)
    nn.init.normal_(norm.weight)
    return torch.randn(2, 4, 3, 4, 5), norm


@pytest.fixture
def small_network():
    torch.manual_seed(0)
    about = {"strides": [(1, 1, 1), (2, 2, 2)], "kernels": [(1, 3, 3)] * 2}
    return model.UNet3D(1, 1, base=2, multipliers=[1, 1], blocks=1, **about).eval()


def test_a_cpu_runs_norm_dropout_residual_and_mish(layers):
    x, norm = layers
    y, residual, dropout = norm_mish.norm_mish(x, norm), torch.randn_like(x), nn.Dropout3d(0.5)
    torch.testing.assert_close(y, F.mish(norm(x)))
    torch.manual_seed(1)
    y = norm_mish.norm_mish(x, norm, dropout, residual)
    torch.manual_seed(1)
    torch.testing.assert_close(y, F.mish(dropout(norm(x)) + residual))


@pytest.mark.parametrize("piece", [7, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mish_on_a_cpu_and_its_gradient_are_those_of_float64(monkeypatch, dtype, piece):
    monkeypatch.setattr(norm_mish, "PIECE", piece)
    x = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([0.0, -90.0, 90.0, 1e4, -1e4])])
    x, grad = x.to(dtype).view(2, 3, -1).transpose(0, 1), torch.randn(3, 2, 101).to(dtype)
    given, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = norm_mish.MishOnCPU.apply(given), F.mish(exact)
    y.backward(grad)
    expected.backward(grad.double())
    near = {"rtol": 3e-6, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-9}
    assert y.dtype == given.grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **near)
    near["atol"] = 3e-6 if dtype == torch.float32 else 4e-3  # where the slope crosses 0
    torch.testing.assert_close(given.grad.double(), exact.grad, **near)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm3d(4),
        nn.InstanceNorm3d(4),
        nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
    ],
    ids=lambda norm: str(norm)[:30],
)
@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.5), nn.Dropout3d(0.5)])
def test_another_norm_or_dropout_is_taken_as_it_is(monkeypatch, norm, dropout):
    """Also where the kernels are: they would take it for an instance norm."""
    monkeypatch.setattr(norm_mish, "fused", lambda device: (True, ""))
    x = 3 * torch.randn(2, 4, 3, 4, 5) + 1
    torch.manual_seed(1)
    y = norm_mish.norm_mish(x, copy.deepcopy(norm), dropout, x)
    torch.manual_seed(1)
    normed = copy.deepcopy(norm)(x)
    assert torch.equal(y, F.mish((normed if dropout is None else dropout(normed)) + x))


def test_what_is_no_number_stays_none():
    x = torch.tensor([float("nan"), float("inf")])
    y = norm_mish.MishOnCPU.apply(x)
    assert y[0].isnan() and y[1] == float("inf")


def test_a_second_derivative_is_an_error_also_where_torch_would_take_it_for_0():
    x = torch.randn(5, requires_grad=True)
    y = norm_mish.MishOnCPU.apply(x)  # a sum's gradient has no graph
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_network_can_be_saved_and_takes_other_sizes(small_network, tmp_path):
    with torch.no_grad():
        torch.jit.trace(small_network, torch.randn(1, 1, 4, 4, 4)).save(tmp_path / "network.pt")
        other = torch.randn(2, 1, 6, 4, 8)
        found = torch.jit.load(tmp_path / "network.pt")(other)
        torch.testing.assert_close(found, small_network(other))


def test_torch_func_differentiates_a_network_as_backward_does(small_network):
    x, names = torch.randn(1, 1, 4, 4, 4), dict(small_network.named_parameters())

    def loss(weights):
        return torch.func.functional_call(small_network, weights, (x,)).square().mean()

    found = torch.func.grad(loss)(names)
    loss(names).backward()
    for name, weight in names.items():
        torch.testing.assert_close(found[name], weight.grad)


def test_without_triton_a_gpu_runs_plain_torch_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(norm_mish, "triton", None)
    monkeypatch.setattr(norm_mish, "MISSING", "No module named 'triton'", raising=False)
    assert norm_mish.fused.__wrapped__(OnGPU()) == (
        False,
        "without Triton: No module named 'triton'",
    )


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_kernels_that_are_wrong_on_a_card_are_not_used(monkeypatch, wrong):
    monkeypatch.setattr(norm_mish, "triton", "there")
    monkeypatch.setattr(norm_mish, "_difference", lambda device: wrong)
    assert norm_mish.fused.__wrapped__(OnGPU()) == (False, f"Triton is off by {wrong:.1g}")


def test_kernels_that_cannot_be_built_are_not_used_and_the_reason_is_said(monkeypatch):
    def fail(device):
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(norm_mish, "triton", "there")
    monkeypatch.setattr(norm_mish, "_difference", fail)
    used, reason = norm_mish.fused.__wrapped__(OnGPU())
    assert not used
    assert reason == "Triton cannot run: RuntimeError: Failed to find C compiler"


def test_the_check_of_a_card_sees_a_wrong_value_and_a_wrong_gradient(monkeypatch):
    def plain(x, scale, shift, residual, eps):  # keeps scale for its backward pass, as the kernels
        scale, shift = (t[..., None, None, None] for t in (scale, shift))
        return F.mish(F.instance_norm(x, eps=eps) * scale + shift + residual)

    class Wrong:
        apply = staticmethod(plain)

    monkeypatch.setattr(norm_mish, "FusedNormMish", Wrong)
    assert norm_mish._difference(torch.device("cpu")) < 1e-6
    Wrong.apply = staticmethod(lambda *given: plain(*given) + 0.01)
    assert norm_mish._difference(torch.device("cpu")) > 0.005
    Wrong.apply = staticmethod(lambda x, *given: plain(x, *given) + 0.1 * (x - x.detach()))
    assert norm_mish._difference(torch.device("cpu")) > 0.005
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        Wrong.apply = staticmethod(plain)
        assert norm_mish._difference(torch.device("cpu")) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_a_network_with_the_kernels_is_one_without(monkeypatch, dtype):
    shape = {"base": 8, "multipliers": [1, 2], "blocks": 2, "dropout": 0.2}
    about = {"strides": [(1, 1, 1), (2, 2, 2)], "kernels": [(3, 3, 3)] * 2}
    torch.manual_seed(0)
    plain = model.UNet3D(1, 2, **shape, **about).cuda()
    kernels, x = copy.deepcopy(plain), torch.randn(2, 1, 16, 32, 32, device="cuda")
    assert norm_mish.fused(x.device) == (True, "fused by Triton")
    results = []
    torch.backends.cudnn.allow_tf32 = False
    for network in (kernels, plain):
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = network(x)
        sum((scale.float() ** 2).mean() for scale in logits).backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
        results.append([*(scale.detach().float() for scale in logits), gradients])
        monkeypatch.setattr(norm_mish, "fused", lambda device: (False, ""))
    torch.backends.cudnn.allow_tf32 = True
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() / b.norm() < (1e-4 if dtype == torch.float32 else 0.1)
