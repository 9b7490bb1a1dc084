"""Distances against scipy, against values worked out by hand, and on degenerate masks."""

import tempfile

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topology import distance as distance_module
from topology.distance import edt, truncated_edt

BACKENDS = ["native", "scipy", "downsampled"]
SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.994, 0.994), (0.3, 2.0, 1.1)]


@pytest.fixture(autouse=True)
def lock_folder(tmp_path, monkeypatch):
    """A lock of its own for each test, and for the processes that the test starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def single(shape, *voxels):
    mask = torch.zeros(shape, dtype=torch.bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def test_one_voxel_gives_distances_in_units_of_spacing():
    distance = truncated_edt(single((3, 3, 3), (0, 0, 0)), 100.0, (5.0, 2.0, 1.0))
    assert distance.dtype == torch.float32
    assert distance[0, 0].tolist() == [0.0, 1.0, 2.0]
    assert distance[1, 0, 0] == 5.0
    assert distance[0, 2, 0] == 4.0
    assert distance[2, 2, 2] == pytest.approx(np.sqrt(100 + 16 + 4), rel=1e-6)


def test_distances_end_at_max_distance():
    distance = truncated_edt(single((1, 1, 6), (0, 0, 0)), 2.5)
    assert distance[0, 0].tolist() == [0.0, 1.0, 2.0, 2.5, 2.5, 2.5]


@pytest.mark.parametrize("max_distance", [0.6, 1.0, 2.0, 3.7, 11.2, 11.3, 50.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_agrees_with_scipy_up_to_the_cut(spacing, max_distance):
    mask = np.random.default_rng(0).random((7, 11, 13)) > 0.985
    expected = ndimage.distance_transform_edt(~mask, sampling=spacing).clip(max=max_distance)
    distance = truncated_edt(torch.from_numpy(mask), max_distance, spacing)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_cut_of_a_whole_number_of_fractional_steps_agrees_with_scipy():
    mask = single((1, 1, 9), (0, 0, 0))
    for step, count in ((0.1, 3), (0.2, 3), (0.7, 6)):
        expected = np.minimum(np.arange(9) * step, count * step)
        distance = truncated_edt(mask, count * step, (1.0, 1.0, step))
        np.testing.assert_allclose(distance[0, 0].numpy(), expected, rtol=1e-6)


def test_volumes_of_a_batch_do_not_see_each_other():
    masks = torch.stack([single((2, 3, 4), (0, 0, 0)), single((2, 3, 4))])[:, None]
    distance = truncated_edt(masks, 3.0)
    assert distance.shape == (2, 1, 2, 3, 4)
    assert torch.equal(distance[0, 0], truncated_edt(masks[0, 0], 3.0))
    assert bool((distance[1] == 3.0).all())


def test_empty_mask_is_max_distance_everywhere_and_full_mask_is_zero():
    assert bool((truncated_edt(torch.zeros(4, 4, 4, dtype=torch.bool), 2.3) == 2.3).all())
    assert bool((truncated_edt(torch.ones(4, 4, 4, dtype=torch.bool), 2.0) == 0.0).all())


def test_non_zero_voxels_of_other_dtypes_count_as_foreground():
    mask = single((3, 4, 5), (1, 2, 3), (2, 0, 0))
    expected = truncated_edt(mask, 4.0)
    assert torch.equal(truncated_edt(mask.to(torch.uint8) * 255, 4.0), expected)
    assert torch.equal(truncated_edt(mask.float() * -0.5, 4.0), expected)


def test_the_mask_is_left_as_it_was_and_the_result_has_no_gradient():
    mask = single((3, 3, 3), (1, 1, 1)).float().requires_grad_()
    before = mask.detach().clone()
    assert not truncated_edt(mask, 2.0).requires_grad
    assert torch.equal(mask.detach(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 3), 1.0), "mask"),
        ((torch.zeros(3, 3, 3), 0.0), "max_distance"),
        ((torch.zeros(3, 3, 3), float("inf")), "max_distance"),
        ((torch.zeros(3, 3, 3), 1.0, (1.0, 0.0, 1.0)), "spacing"),
        ((torch.zeros(3, 3, 3), 1.0, (1.0, 1.0)), "spacing"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        truncated_edt(*arguments)


# ---------------------------------------------------------------------------- edt, any backend


def random_masks(count):
    """Masks of odd shapes, from one voxel to nearly full, with a spacing each; none is empty."""
    rng = np.random.default_rng(7)
    for i in range(count):
        mask = rng.random(rng.integers(1, 24, 3)) < rng.choice([0.0, 0.003, 0.03, 0.3, 0.97])
        mask[tuple(rng.integers(mask.shape))] = True
        spacing = (1.0, 1.0, 1.0) if i % 2 else tuple(rng.uniform(0.2, 6.0, 3).tolist())
        yield mask, spacing


def test_native_and_truncated_agree_with_scipy_on_random_masks():
    for mask, spacing in random_masks(200):
        expected = ndimage.distance_transform_edt(~mask, sampling=spacing)
        native = edt(torch.from_numpy(mask), spacing)
        assert native.dtype == torch.float32
        np.testing.assert_allclose(native.numpy(), expected, rtol=1e-4)
        cut = max(0.5 * expected.max(), 0.1)
        truncated = truncated_edt(torch.from_numpy(mask).float(), cut, spacing)
        np.testing.assert_allclose(truncated.numpy(), expected.clip(max=cut), rtol=1e-4)


@pytest.mark.parametrize("slab_voxels", [1, 200, 10**9])
def test_slabs_of_any_size_give_the_same_distances(slab_voxels, monkeypatch):
    monkeypatch.setattr(distance_module, "_SLAB_VOXELS", slab_voxels)
    mask = np.random.default_rng(1).random((9, 13, 31)) > 0.999
    mask[3, 4, 5] = True
    expected = ndimage.distance_transform_edt(~mask, sampling=(2.0, 1.0, 0.5))
    result = edt(torch.from_numpy(mask), (2.0, 1.0, 0.5))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)
    limited = truncated_edt(torch.from_numpy(mask), 6.0, (2.0, 1.0, 0.5))
    np.testing.assert_allclose(limited.numpy(), expected.clip(max=6.0), rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_downsampled_is_wrong_by_at_most_a_voxel_diagonal(spacing):
    for mask, _ in random_masks(60):
        expected = ndimage.distance_transform_edt(~mask, sampling=spacing)
        result = edt(torch.from_numpy(mask), spacing, "downsampled").numpy()
        assert np.abs(result - expected).max() <= np.linalg.norm(spacing) * (1 + 1e-6)
        assert np.array_equal(result == 0, mask)


def test_downsampled_reaches_its_bound_between_far_corners_and_between_near_ones():
    # Neighbours along the diagonal: their blocks are 2 sqrt(3) apart.
    far, near = single((4, 4, 4), (0, 0, 0)), single((4, 4, 4), (1, 1, 1))
    assert edt(far, backend="downsampled")[3, 3, 3] == pytest.approx(2 * 3**0.5)  # truly 3 sqrt(3)
    assert edt(near, backend="downsampled")[2, 2, 2] == pytest.approx(2 * 3**0.5)  # truly sqrt(3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (1, 7, 1), (0, 1, 3, 4, 5), (2, 0, 4, 5)])
def test_empty_mask_is_infinitely_far_and_full_mask_is_zero(backend, shape):
    far, near = edt(torch.zeros(shape), backend=backend), edt(torch.ones(shape), backend=backend)
    assert far.shape == near.shape == shape
    assert bool((far == torch.inf).all()) and bool((near == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axes_of_length_one_are_transformed(backend, axis):
    shape = [1, 1, 1]
    shape[axis] = 5
    result = edt(single(shape, (0, 0, 0)), (3.0, 3.0, 3.0), backend).flatten().tolist()
    # Blocks {0, 1}, {2, 3}, {4}: centres 6 apart; off the mask at least one step.
    downsampled = [0.0, 3.0, 6.0, 6.0, 12.0]
    assert result == (downsampled if backend == "downsampled" else [0.0, 3.0, 6.0, 9.0, 12.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_edt_volumes_of_a_batch_do_not_see_each_other(backend):
    masks = torch.stack(
        [single((3, 5, 4), (0, 0, 0)), single((3, 5, 4)), single((3, 5, 4), (2, 1, 3))]
    )
    result = edt(masks[:, None], backend=backend)
    assert result.shape == (3, 1, 3, 5, 4)
    for mask, one in zip(masks, result[:, 0], strict=True):
        assert torch.equal(one, edt(mask, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_edt_leaves_the_mask_alone_and_has_no_gradient(backend):
    mask = single((3, 4, 5), (1, 1, 1), (2, 3, 4)).float().mul_(-0.5).requires_grad_()
    turned = mask.transpose(0, 2)  # not contiguous
    before = mask.detach().clone()
    result = edt(turned, backend=backend)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert torch.equal(result, edt((before != 0).transpose(0, 2).contiguous(), backend=backend))
    assert torch.equal(mask.detach(), before)


class OutputDtypes(TorchDispatchMode):
    """Collects the dtypes of all tensors that operations give back."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves(out) if torch.is_tensor(x)}
        return out


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 0.7), (1.0, 1.0, 1.0)])
def test_native_path_makes_nothing_wider_than_float32(spacing):
    mask = single((6, 30, 31), (2, 3, 4))
    with OutputDtypes() as dtypes:
        edt(mask, spacing)
        truncated_edt(mask, 4.0, spacing)
    assert dtypes.seen <= {torch.float32, torch.bool, torch.uint8}


@pytest.mark.parametrize("max_distance", [2.0, 50.0])
def test_truncated_distance_of_a_turned_mask_is_that_of_its_copy(max_distance):
    mask = single((3, 4, 5), (1, 1, 1), (2, 3, 4)).transpose(0, 2)
    copied = truncated_edt(mask.contiguous(), max_distance)
    assert torch.equal(truncated_edt(mask, max_distance), copied)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_result_lies_on_the_device_of_the_mask_and_equals_the_cpu_s(backend):
    mask = torch.rand(2, 1, 9, 40, 41, generator=torch.Generator().manual_seed(0)) > 0.999
    result = edt(mask.cuda(), (2.0, 1.0, 0.7), backend)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), edt(mask, (2.0, 1.0, 0.7), backend))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.zeros(3, 3)}, "mask: expected"),
        ({"spacing": (1.0, -1.0, 1.0)}, "spacing: expected"),
        ({"timeout": 0}, "timeout: expected"),
        ({"backend": "cuda"}, "backend: expected 'native', 'scipy' or 'downsampled', got 'cuda'"),
    ],
)
def test_edt_refuses_impossible_arguments_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        edt(**{"mask": torch.zeros(3, 3, 3), **arguments})
