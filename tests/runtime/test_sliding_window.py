import math

import h5py
import numpy as np
import pytest
import torch
from scipy import ndimage

from runtime import outputs, sliding_window
from runtime.sliding_window import (
    predict_slabs,
    predict_volume,
    resolve_device,
)
from runtime.window_axis import blend_weights, window_rows, window_starts
from tests.runtime.test_device_memory import TEXTS, card, memory_error

__all__ = ["card"]  # a fixture
torch.set_num_threads(1)


def constant(value):
    return lambda x: torch.full_like(x[:, :1], math.log(value / (1 - value)))


def same(x):
    """The probability that it predicts is its input, which lies inside (0, 1)."""
    return torch.logit(x[:, :1].double()).float()


def random_volume(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 0.9, (1, *shape)).astype(np.float32)


# ---------------------------------------------------------------------------- layout and blending


@pytest.mark.parametrize("size", [7, 8, 9, 16, 31, 100])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_starts_are_even_and_reach_both_ends(size, overlap):
    starts = window_starts(size, 7, overlap)
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == size - 7
    assert (steps <= 7 * (1 - overlap) + 1e-6).all() and (steps >= 1).all()
    assert steps.size == 0 or steps.max() - steps.min() <= 1


def test_starts_of_known_axes():
    assert window_starts(10, 10, 0.8) == [0]
    assert window_starts(14, 10, 0.8) == [0, 2, 4]  # a step of 2, although 10 * (1 - 0.8) < 2
    assert window_starts(20, 8, 0.5) == [0, 4, 8, 12]
    assert window_starts(3, 8, 0.5) == [-3]  # alone, the volume in its middle


def test_blend_weights_sum_to_one_and_follow_the_gaussian():
    weights = blend_weights(12, 8, [0, 4])
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-15)
    np.testing.assert_array_equal(weights[:, :4], [[1] * 4, [0] * 4])  # the border has all of it
    near, far = math.exp(-0.5 * 0.5**2), math.exp(-0.5 * 3.5**2)  # sigma 1, middles 3.5 and 7.5
    np.testing.assert_allclose(weights[0, 4], near / (near + far), rtol=1e-12)


@pytest.mark.parametrize("shape", [(9, 21, 17), (8, 8, 8), (1, 30, 5), (25, 3, 8)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_constant_network_gives_the_constant_up_to_the_border(shape, overlap):
    probs = predict_volume(constant(0.3), np.zeros((1, *shape), np.uint8), (8, 8, 8), overlap)
    assert probs.shape == (1, *shape) and probs.dtype == np.float32
    np.testing.assert_allclose(probs, 0.3, atol=1e-6)


@pytest.mark.parametrize("ratio", [(1, 2.5, 0.4), (0.37, 1, 3.1), (7, 0.2, 1)])
def test_constant_network_gives_the_constant_at_any_ratio(ratio):
    volume = np.zeros((1, 9, 23, 14), np.float32)
    probs = predict_volume(constant(0.7), volume, (4, 6, 5), 0.5, ratio=ratio)
    np.testing.assert_allclose(probs, 0.7, atol=1e-6)


def test_touching_windows_without_overlap_are_not_mixed():
    volume = random_volume(4, 8, 8)
    halves = predict_volume(lambda x: x.mean((2, 3, 4), True).expand_as(x), volume, (4, 8, 4), 0.0)
    for columns in (slice(0, 4), slice(4, 8)):
        mean = volume[..., columns].mean()
        np.testing.assert_allclose(halves[..., columns], 1 / (1 + math.exp(-mean)), atol=1e-6)


# ---------------------------------------------------------------------------- positions of voxels


@pytest.mark.parametrize("shape", [(11, 19, 23), (1, 17, 8), (2, 3, 5), (7, 9, 9), (30, 8, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_identity_network_reproduces_the_volume(shape, batch):
    volume = random_volume(*shape)
    probs = predict_volume(same, volume, (7, 9, 9), 0.5, batch=batch)
    np.testing.assert_allclose(probs, volume, atol=1e-6)


def test_volume_up_to_the_window_is_one_call_padded_with_its_edge():
    seen = []

    def network(x):
        seen.append(x.clone())
        return same(x)

    volume = random_volume(2, 8, 5)
    probs = predict_volume(network, volume, (6, 8, 8), 0.5)
    expected = np.pad(volume[0], ((2, 2), (0, 0), (2, 1)), mode="edge")
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0][0, 0].numpy(), expected)
    np.testing.assert_allclose(probs, volume, atol=1e-6)


@pytest.mark.parametrize("ratio", [(1, 2, 2), (1, 0.5, 0.7), (1.6, 1, 0.3)])
def test_linear_ramp_survives_the_way_to_the_network_spacing_and_back(ratio):
    z, y, x = np.meshgrid(*(np.arange(n) for n in (14, 24, 20)), indexing="ij")
    volume = (0.2 + 0.01 * z + 0.01 * y + 0.008 * x)[None].astype(np.float32)
    probs = predict_volume(same, volume, (6, 8, 8), 0.5, ratio=ratio)
    interior = (0, *(slice(math.ceil(r), -math.ceil(r)) for r in ratio))
    np.testing.assert_allclose(probs[interior], volume[interior], atol=1e-4)
    assert np.abs(probs - volume).max() < 0.05  # the edge is a voxel repeated, no more


def test_network_sees_the_volume_at_its_own_spacing():
    seen = []

    def network(x):
        seen.append(x.clone())
        return x[:, :1]

    volume = random_volume(4, 20, 20)
    predict_volume(network, volume, (4, 10, 40), 0.5, ratio=(1, 2, 0.5))
    # A ratio of 2 puts network voxel j at 2 j + 0.5, one of 0.5 at (j - 0.5) / 2.
    at = np.meshgrid(np.arange(4), np.arange(10) * 2 + 0.5, np.arange(40) / 2 - 0.25, indexing="ij")
    expected = ndimage.map_coordinates(volume[0], at, order=1, mode="nearest")
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0][0, 0].numpy(), expected, atol=1e-5)


def test_smooth_volume_at_a_ratio_matches_whole_volume_resampling():
    smooth = ndimage.gaussian_filter(random_volume(12, 30, 30)[0], 3)
    volume = (0.5 + 10 * (smooth - smooth.mean()))[None]
    probs = predict_volume(same, volume, (6, 8, 8), 0.5, ratio=(1, 1.5, 1.5))
    grid, back = np.arange(20) * 1.5 + 0.25, (np.arange(30) - 0.25) / 1.5
    at = np.meshgrid(np.arange(12), grid, grid, indexing="ij")
    coarse = ndimage.map_coordinates(volume[0], at, order=1)
    at = np.meshgrid(np.arange(12), back, back, indexing="ij")
    expected = ndimage.map_coordinates(coarse, at, order=1, mode="nearest")
    # Windows start at whole voxels of the volume, so their grids lie up to a voxel beside that
    # of the whole: equal up to what linear interpolation loses, here a tenth of the contrast.
    assert volume.std() > 0.09
    np.testing.assert_allclose(probs[0], expected, atol=0.02)


def test_flips_average_a_lopsided_network():
    def first_column(x):  # 1 at x = 0 of the window, whatever it shows
        logits = torch.full_like(x[:, :1], -30.0)
        logits[..., 0] = 30.0
        return logits

    probs = predict_volume(first_column, np.zeros((1, 2, 3, 4)), (2, 3, 4), flips=True)
    np.testing.assert_allclose(probs[0, 0, 0], [0.5, 0, 0, 0.5], atol=1e-6)
    corner = predict_volume(
        lambda x: first_column(x).where(torch.arange(3)[:, None] == 0, -30.0),
        np.zeros((1, 2, 3, 4)),
        (2, 3, 4),
        flips=True,
    )
    np.testing.assert_allclose(corner[0, 0, :, 0], [0.25, 0, 0.25], atol=1e-6)


def test_flips_leave_an_equivariant_network_alone():
    volume = random_volume(9, 11, 10)
    np.testing.assert_allclose(
        predict_volume(same, volume, (5, 6, 6), flips=True), volume, atol=1e-6
    )


# ---------------------------------------------------------------------------- slabs and memory


def test_slabs_are_the_volume_in_order():
    volume = random_volume(23, 10, 9)
    slabs = list(predict_slabs(same, volume, (8, 6, 6), 0.5))
    assert [z0 for z0, _ in slabs] == [0, *np.cumsum([p.shape[1] for _, p in slabs])[:-1]]
    np.testing.assert_array_equal(
        np.concatenate([p for _, p in slabs], axis=1), predict_volume(same, volume, (8, 6, 6), 0.5)
    )
    assert max(planes.shape[1] for _, planes in slabs) <= 8


@pytest.mark.parametrize("depth, overlap, ratio", [(23, 0.5, 1), (31, 0.8, 1), (40, 0.6, 1.7)])
@pytest.mark.parametrize("batch", [1, 4])
def test_planes_have_the_same_bits_in_whatever_range_of_rows(depth, overlap, ratio, batch):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 1, 3, padding=1)
    volume, window, ratio = random_volume(depth, 14, 15), (8, 6, 6), (ratio, 1, 1)
    how = {"ratio": ratio, "batch": batch}
    whole = predict_volume(network, volume, window, overlap, **how)
    rows, windows = window_rows(volume.shape[1:], window, overlap, ratio)
    assert windows == len(window_starts(14, 6, overlap)) * len(window_starts(15, 6, overlap))
    starts = [z0 for z0, _ in predict_slabs(network, volume, window, overlap, **how)]
    assert len(starts) == rows
    for chosen in (range(2), range(1, 2), range(2, rows - 1), range(rows - 1, rows)):
        slabs = list(predict_slabs(network, volume, window, overlap, rows=chosen, **how))
        assert [z0 for z0, _ in slabs] == [starts[row] for row in chosen]
        for z0, planes in slabs:
            np.testing.assert_array_equal(planes, whole[:, z0 : z0 + planes.shape[1]])


def test_progress_of_a_range_counts_the_rows_that_reach_into_it():
    calls, volume = [], random_volume(20, 6, 6)
    how = {"rows": range(2, 4), "progress": lambda *counts: calls.append(counts)}
    list(predict_slabs(same, volume, (8, 6, 6), 0.5, **how))
    assert calls == [(1, 3), (2, 3), (3, 3)]  # row 1 reaches into row 2


@pytest.mark.parametrize("ratio", [(1, 1, 1), (1.3, 0.7, 1.6)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_voxels_have_the_same_bits_in_whatever_box(ratio, overlap):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    volume, window = random_volume(14, 33, 27), (6, 8, 6)
    how = {"ratio": ratio, "channels": 2, "exclusive": True}
    whole = predict_volume(network, volume, window, overlap, **how)
    boxes = [(0, 33, 0, 27), (0, 9, 20, 27), (13, 14, 5, 6), (7, 31, 4, 19), (32, 33, 0, 27)]
    for y0, y1, x0, x1 in boxes:
        box = slice(y0, y1), slice(x0, x1)
        for z0, planes in predict_slabs(network, volume, window, overlap, box=box, **how):
            expected = whole[:, z0 : z0 + planes.shape[1], y0:y1, x0:x1]
            np.testing.assert_array_equal(planes, expected)


def test_windows_that_do_not_touch_a_box_are_not_predicted():
    calls, volume = [], random_volume(6, 24, 24)  # windows start at 0, 4, .. 16
    how = {"box": (slice(8, 16), slice(0, 3)), "progress": lambda *counts: calls.append(counts)}
    ((_, planes),) = predict_slabs(same, volume, (8, 8, 8), 0.5, **how)
    assert planes.shape == (1, 6, 8, 3) and calls[-1] == (3, 3)


@pytest.mark.parametrize("batch", [1, 3])
def test_skipped_windows_are_not_read_and_change_no_voxel_that_they_do_not_touch(batch):
    volume, reads = random_volume(20, 12, 12), []

    class Watched:
        shape = volume.shape

        def __getitem__(self, box):
            reads.append([s.start for s in box[1:]])
            return volume[box]

    def skip(spans):
        starts = [span.start for span in spans]
        return starts[0] == 8 or starts == [0, 4, 4]  # a whole row, and one of another

    how = {"batch": batch, "skip": skip}
    probs = predict_volume(same, Watched(), (8, 8, 8), 0.5, **how)
    assert len(reads) == 16 - 4 - 1 and not any(start[0] == 8 for start in reads)
    touched = np.zeros(volume.shape, bool)
    touched[:, 8:16] = touched[:, :8, 4:, 4:] = True
    whole = predict_volume(same, volume, (8, 8, 8), 0.5)
    np.testing.assert_array_equal(probs[~touched], whole[~touched])
    assert (probs <= whole).all() and probs[touched].sum() < whole[touched].sum()


def test_a_voxel_all_of_whose_windows_are_skipped_is_zero():
    volume = random_volume(8, 8, 24)
    probs = predict_volume(same, volume, (8, 8, 8), 0.0, skip=lambda spans: spans[2].start != 8)
    assert not probs[..., :8].any() and not probs[..., 16:].any() and probs[..., 8:16].all()
    assert not predict_volume(same, volume, (8, 8, 8), skip=lambda spans: True).any()


@pytest.mark.parametrize("flips", [False, True])
def test_several_networks_give_the_mean_of_their_probabilities(flips):
    volume = random_volume(9, 8, 8)
    probs = predict_volume([same, constant(0.3)], volume, (6, 8, 8), flips=flips)
    np.testing.assert_allclose(probs, (volume + 0.3) / 2, atol=1e-6)


def test_planes_leave_before_the_next_rows_are_read():
    class Watched:
        shape = (1, 40, 8, 8)
        deepest = 0

        def __getitem__(self, box):
            self.deepest = max(self.deepest, box[1].stop)
            return np.zeros([s.stop - s.start for s in (slice(0, 1), *box[1:])], np.float32)

    watched = Watched()
    for z0, planes in predict_slabs(constant(0.5), watched, (8, 8, 8), 0.5):
        assert watched.deepest <= z0 + 8 and planes.shape[1] <= 8
    assert watched.deepest == 40


def test_consumer_of_slabs_is_not_left_in_inference_mode():
    for _ in predict_slabs(same, random_volume(9, 4, 4), (4, 4, 4)):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("ratio, most", [((1, 1, 1), 4 * 5 * 6), ((1, 2, 0.5), 4 * 12 * 5)])
def test_only_the_box_of_a_window_is_read(ratio, most):
    class Recorder:
        shape = (2, 30, 40, 50)
        largest = 0

        def __getitem__(self, box):
            out = np.zeros(self.shape, np.uint8)[box]
            self.largest = max(self.largest, out[0].size)
            return out

    volume = Recorder()
    predict_volume(constant(0.5), volume, (4, 5, 6), 0.25, ratio=ratio, batch=64)
    assert 0 < volume.largest <= most


def test_hdf5_dataset_and_array_give_the_same(tmp_path):
    volume = np.random.default_rng(1).integers(0, 255, (1, 9, 12, 11), dtype=np.uint8)
    with h5py.File(tmp_path / "case.h5", "w") as file:
        dataset = file.create_dataset("image", data=volume)
        from_file = predict_volume(same, dataset, (4, 8, 8), normalize=lambda x: x / 300 + 0.1)
    np.testing.assert_allclose(from_file, volume / 300 + 0.1, atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i2", ">i2", "i4", "f2", "f4", "f8", ">f4"])
def test_any_dtype_and_byte_order_is_read(dtype):
    volume = np.random.default_rng(1).integers(1, 100, (2, 5, 6, 7)).astype(dtype)
    probs = predict_volume(same, volume, (4, 4, 4), normalize=lambda x: x / 128)
    np.testing.assert_allclose(probs[0], volume[0] / 128, atol=1e-6)


def test_every_uint16_reaches_the_network_as_it_is_stored():
    volume, seen = np.arange(2**16, dtype=np.uint16).reshape(1, 16, 64, 64), []

    def network(x):
        seen.append(x)
        return torch.zeros_like(x)

    predict_volume(network, volume, (16, 64, 64), 0.0)
    assert np.array_equal(seen[0][0].numpy(), volume)


# ---------------------------------------------------------------------------- too little memory


def test_results_that_do_not_fit_at_first_are_those_of_a_volume_that_fits(monkeypatch):
    volume, known, zeros = random_volume(11, 9, 10), {}, torch.zeros

    def small(*shape, device):
        if not known.get("11x9x10", [2, False])[1]:  # until the slab lies on the CPU
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*shape, device=device)

    expected = predict_volume(same, volume, (6, 6, 6), 0.5)
    monkeypatch.setattr(torch, "zeros", small)
    probs = predict_volume(same, volume, (6, 6, 6), 0.5, batch=2, remembered=known)
    assert known == {"11x9x10": [1, True, None]}
    np.testing.assert_array_equal(probs, expected)


@pytest.mark.parametrize("name", TEXTS)
def test_a_prediction_goes_on_after_each_error_of_memory(card, monkeypatch, name):
    volume, call, failed = random_volume(8, 9, 10), sliding_window._call, []

    def small(network, patches, *rest):
        if len(patches) > 1 or not failed or failed[-1] > 1:
            failed.append(len(patches))
            raise memory_error(name)
        return call(network, patches, *rest)

    expected = predict_volume(same, volume, (6, 6, 6), 0.5)
    monkeypatch.setattr(sliding_window, "_call", small)
    probs = predict_volume(same, volume, (6, 6, 6), 0.5, batch=4)
    assert failed == [4, 2, 1]
    np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------- the call


def test_list_of_logits_counts_by_its_first_and_progress_counts_windows():
    calls = []
    volume = random_volume(6, 8, 8)
    probs = predict_volume(
        lambda x: [same(x), x[..., ::2]],
        volume,
        (4, 4, 4),
        0.5,
        batch=4,
        progress=lambda done, total: calls.append((done, total)),
    )
    np.testing.assert_allclose(probs, volume, atol=1e-6)
    assert calls == [(n, 18) for n in (4, 8, 9, 13, 17, 18)]


def test_bf16_runs_under_autocast_and_returns_float32():
    seen = []

    def network(x):
        logits = torch.nn.functional.conv3d(x, torch.ones(1, 1, 1, 1, 1))
        seen.append(logits.dtype)
        return logits

    probs = predict_volume(network, random_volume(4, 4, 4), (4, 4, 4), precision="bf16")
    assert seen == [torch.bfloat16] and probs.dtype == np.float32


@pytest.mark.parametrize(
    "change, word",
    [
        ({"window": (4, 4)}, "window"),
        ({"window": (4, 0, 4)}, "window"),
        ({"overlap": 1.0}, "overlap"),
        ({"ratio": (1, 0, 1)}, "ratio"),
        ({"precision": "fp8"}, "precision"),
        ({"batch": 0}, "batch"),
        ({"volume": np.zeros((4, 4, 4))}, "volume"),
        ({"volume": np.zeros((1, 0, 4, 4))}, "volume"),
        ({"network": lambda x: x[..., 1:]}, "network"),
    ],
)
def test_arguments_that_cannot_work_are_named(change, word):
    good = {"network": same, "volume": np.zeros((1, 4, 4, 4)), "window": (4, 4, 4)}
    with pytest.raises(ValueError, match=f"^{word}: expected"):
        predict_volume(**{**good, **change})


def test_faults_are_raised_at_the_call_and_together():
    with pytest.raises(ValueError, match=r"overlap.*precision"):
        predict_slabs(same, np.zeros((1, 4, 4, 4)), (4, 4, 4), 2.0, precision="half")


def test_a_device_is_resolved_with_a_reason():
    assert resolve_device("cpu") == (torch.device("cpu"), "as set")
    assert resolve_device("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=rf"run\.device: expected .* got {name} \("):
            resolve_device(name)


# ---------------------------------------------------------------------------- several channels


def channels_of(*scales):
    """A network whose logits are multiples of its input, a channel for each."""
    return lambda x: torch.cat([scale * x[:, :1] for scale in scales], dim=1)


def test_channels_have_a_sigmoid_each_or_one_softmax_if_exclusive():
    volume, scales = random_volume(5, 6, 7), (0.0, 1.0, -2.0)
    logits = torch.from_numpy(volume * np.reshape(scales, (3, 1, 1, 1))).float()
    for exclusive, expected in ((False, logits.sigmoid()), (True, logits.softmax(dim=0))):
        how = {"channels": 3, "exclusive": exclusive}
        probs = predict_volume(channels_of(*scales), volume, (4, 4, 4), **how)
        assert probs.shape == (3, 5, 6, 7) and probs.dtype == np.float32
        np.testing.assert_allclose(probs, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_with_another_number_of_channels_is_refused(channels):
    volume = random_volume(4, 4, 4)
    with pytest.raises(ValueError, match=f"got .1, 2, 4, 4, 4.; .* {channels} output channel"):
        predict_volume(channels_of(1.0, 2.0), volume, (4, 4, 4), channels=channels)


def test_classes_of_slabs_are_those_of_the_whole_volume_in_any_range_of_rows():
    volume, networks = random_volume(19, 9, 9) - 0.5, [channels_of(0, 9, -9), channels_of(4, 0, 1)]
    how = {"channels": 3, "exclusive": True, "flips": True, "ratio": (1.3, 1, 1)}
    whole = predict_volume(networks, volume, (6, 6, 6), **how)
    classes = whole.argmax(axis=0)
    assert len(np.unique(classes)) > 1
    rows, _ = window_rows(volume.shape[1:], (6, 6, 6), 0.5, how["ratio"])
    for part in (range(rows), range(1, 3), range(3, rows)):
        for z0, planes in predict_slabs(networks, volume, (6, 6, 6), rows=part, **how):
            there = slice(z0, z0 + planes.shape[1])
            np.testing.assert_array_equal(planes, whole[:, there])
            np.testing.assert_array_equal(outputs.most_probable(planes), classes[there])


def test_networks_are_averaged_by_their_probabilities_of_classes():
    volume, a, b = np.ones((1, 4, 4, 4), np.float32), (0.0, 6.0), (0.0, -1.0)
    how = {"channels": 2, "exclusive": True}
    probs = predict_volume([channels_of(*a), channels_of(*b)], volume, (4, 4, 4), **how)
    mean = (1 / (1 + math.exp(-6)) + 1 / (1 + math.exp(1))) / 2
    np.testing.assert_allclose(probs[1], mean, atol=1e-6)
    np.testing.assert_allclose(probs.sum(axis=0), 1, atol=1e-6)
