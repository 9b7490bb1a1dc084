import copy

import numpy as np
import pytest
import torch

import model
from runtime import config

SMALL = {"base": 4, "multipliers": (1, 2, 2), "blocks": 1}


def network(patch=(8, 16, 16), spacing=(1, 1, 1), **changes):
    torch.manual_seed(0)
    sizes = {**SMALL, **changes}
    strides = model.derive_strides(patch, spacing, len(sizes["multipliers"]))
    kernels = model.derive_kernels(patch, spacing, strides)
    return model.UNet3D(1, 1, strides=strides, kernels=kernels, **sizes)


def test_the_full_setting_has_33_67_million_parameters_within_one_percent():
    settings = config.load("configs/exp001_full.yaml")
    chosen = settings.model.model_dump(exclude={"strides", "compile"})
    patch, spacing = settings.sampling.patch, (1, 1, 1)
    strides = model.derive_strides(patch, spacing, len(settings.model.multipliers))
    kernels = model.derive_kernels(patch, spacing, strides)
    with torch.device("meta"):
        network = model.UNet3D(1, 1, strides=strides, kernels=kernels, **chosen)
    count = sum(p.numel() for p in network.parameters())
    assert abs(count / 33.67e6 - 1) < 0.01


def test_isotropic_patch_is_halved_along_every_axis_while_it_is_even():
    strides = model.derive_strides((72, 136, 136), (1, 1, 1), 5)
    kernels = model.derive_kernels((72, 136, 136), (1, 1, 1), strides)
    assert strides == [(1, 1, 1)] + [(2, 2, 2)] * 3 + [(1, 1, 1)]
    assert set(kernels) == {(3, 3, 3)}


def test_a_coarse_axis_waits_until_the_others_have_caught_up():
    strides = model.derive_strides((16, 96, 96), (5, 1, 1), 4)
    kernels = model.derive_kernels((16, 96, 96), (5, 1, 1), strides)
    assert strides == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)]
    assert kernels == [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)]


@pytest.mark.parametrize("depth", [1, 5, 10, 96])
def test_thin_and_deep_patches_find_strides_and_keep_their_shape(depth):
    net = network((depth, 32, 32), multipliers=(1, 2))
    x = torch.randn(1, 1, depth, 32, 32)
    assert net.eval()(x).shape == x.shape


def test_the_bottleneck_keeps_at_least_four_voxels_per_halved_axis():
    strides = model.derive_strides((8, 64, 64), (1, 1, 1), 6)
    assert np.prod(strides, axis=0).tolist() == [2, 16, 16]


@pytest.mark.parametrize("patch", [(1, 1, 1), (7, 7, 7), (33, 65, 65), (64, 64, 150), (50, 50, 50)])
def test_a_patch_that_no_stride_fits_is_named_with_what_would_fit(patch):
    with pytest.raises(ValueError, match=r"sampling.patch .*(multiples of 8|nearest sizes)"):
        model.derive_strides(patch, (1, 1, 1), 4)


def test_strides_by_hand_must_divide_the_patch():
    model.check_divides("sampling.patch", (8, 16, 16), [(1, 1, 1), (1, 2, 2)], at_least=4)
    for patch, strides in (((6, 16, 16), [(2, 2, 2), (2, 2, 2)]), ((16, 16, 16), [(8, 8, 8)])):
        with pytest.raises(ValueError, match=r"sampling.patch .* axis z: expected a multiple of"):
            model.check_divides("sampling.patch", patch, strides, at_least=4)


def test_strides_by_hand_bring_their_kernels():
    assert model.derive_kernels((50, 50, 50), (4, 1, 1), [(1, 1, 1), (1, 5, 5)]) == [
        (1, 3, 3),
        (3, 3, 3),
    ]


def test_training_gives_logits_of_every_scale_and_evaluation_the_finest():
    net = network()
    x = torch.randn(2, 1, 8, 16, 16)
    shapes = [tuple(y.shape[2:]) for y in net.train()(x)]
    assert shapes == [(8, 16, 16), (4, 8, 8)]
    assert net.eval()(x).shape == x.shape
    single = network(deep_supervision=False).train()(x)
    assert single.shape == x.shape


def test_every_parameter_gets_a_gradient():
    net = network().train()
    sum(y.square().mean() for y in net(torch.randn(1, 1, 8, 16, 16))).backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None]
    assert missing == []


def test_checkpointing_changes_memory_not_numbers():
    x = torch.randn(1, 1, 8, 16, 16)
    plain, saving = network(dropout=0.2), network(dropout=0.2, checkpointing=True)
    grads = []
    for net in (plain, saving):
        torch.manual_seed(1)
        sum(y.square().mean() for y in net.train()(x)).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_untrained_network_says_background():
    probs = network().eval()(torch.randn(1, 1, 8, 16, 16)).sigmoid().detach()
    assert 0.05 < float(probs.mean()) < 0.2 and float(probs.max()) < 0.5


@pytest.mark.parametrize("exclusive", [True, False])
def test_untrained_classes_share_the_prior_of_one_foreground_and_regions_have_it_each(exclusive):
    torch.manual_seed(0)
    strides, kernels = model.fit((8, 16, 16), (1, 1, 1), stages=2)
    settings = config.build({"model": {"base": 4, "multipliers": [1, 2]}}).model.model_dump()
    shape = {"strides": strides, "kernels": kernels, "settings": settings}
    untrained = model.build_network(1, 4, exclusive=exclusive, **shape).eval()
    logits = untrained(torch.zeros(1, 1, 8, 16, 16))
    probs = torch.softmax(logits, 1)[:, 1:] if exclusive else torch.sigmoid(logits)
    expected = 0.1 / 3 if exclusive else 0.1
    torch.testing.assert_close(probs, torch.full_like(probs, expected), rtol=0.1, atol=0)


def test_contrast_of_the_image_hardly_matters():
    net = network().eval()
    x = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        a, b = net(x), net(3 * x)
    assert torch.allclose(a, b, atol=1e-3)


def test_a_size_that_the_strides_do_not_divide_is_named():
    with pytest.raises(ValueError, match="H: expected a multiple of 4 voxels, got 18"):
        network()(torch.randn(1, 1, 8, 18, 16))


def test_the_averaged_network_has_the_running_statistics_of_the_network():
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.BatchNorm3d(2))
    averaged = copy.deepcopy(net).requires_grad_(False)
    net(5 + 3 * torch.randn(2, 1, 4, 4, 4))
    model.update_ema(averaged, net, 0.999, 0)
    assert torch.equal(averaged[1].running_mean, net[1].running_mean)
    assert averaged[1].running_mean.abs().max() > 0.01 and averaged[1].num_batches_tracked == 1
