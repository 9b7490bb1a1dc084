import threading
import time
import traceback

import numpy as np
import pytest
import torch

from runtime import sliding_window
from runtime.sliding_window import predict_slabs, predict_volume
from runtime.window_transfer import read_ahead, to_host

torch.set_num_threads(1)
PATIENCE = 20  # seconds

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


class Watched:
    """A volume that counts its boxes, and may fail at one of them."""

    def __init__(self, array, fails_at=None):
        self.array, self.shape, self.fails_at, self.boxes = array, array.shape, fails_at, 0

    def __getitem__(self, box):
        self.boxes += 1
        if self.boxes == self.fails_at:
            raise OSError("the disk is gone")
        return self.array[box]


def random_volume(*shape):
    return np.random.default_rng(0).uniform(0.1, 0.9, (1, *shape)).astype(np.float32)


def same(x):
    return torch.logit(x[:, :1])


@pytest.fixture
def beside(monkeypatch):
    """The CPU taken for a device that computes while the host does other things."""
    monkeypatch.setattr(sliding_window, "is_asynchronous", lambda device: True)


# ---------------------------------------------------------------------------- a thread that reads


def test_boxes_are_read_ahead_while_the_first_is_used_and_no_more_than_asked_for():
    done = []
    results = read_ahead(lambda job: done.append(job) or 10 * job, range(9), 3)
    assert next(results) == (0, 0)
    assert wait_until(lambda: len(done) == 4)
    time.sleep(0.02)
    assert done == [0, 1, 2, 3]
    assert list(results) == [(job, 10 * job) for job in range(1, 9)]
    assert not reading_threads()


def test_without_a_thread_nothing_is_read_before_it_is_wanted():
    threads = []
    results = read_ahead(lambda job: threads.append(threading.current_thread()), range(3), 0)
    next(results)
    assert threads == [threading.current_thread()]


def test_an_error_of_reading_is_raised_in_its_place_with_its_own_traceback():
    def divide(job):
        return 1 / (2 - job)

    results = read_ahead(divide, range(5), 4)
    assert [next(results)[1] for _ in range(2)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "divide"
    assert not reading_threads()


def test_planes_on_the_host_keep_what_they_were():
    slab = torch.arange(24.0).reshape(2, 3, 2, 2)
    later = to_host(slab[:, :2])
    slab[:] = 0
    np.testing.assert_array_equal(later(), np.arange(24.0).reshape(2, 3, 2, 2)[:, :2])


# ---------------------------------------------------------------------------- beside a device


@pytest.mark.parametrize("rows", [None, range(1, 3), range(3, 4)])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_planes_that_come_late_are_the_same(beside, monkeypatch, rows, batch):
    volume, how = random_volume(20, 9, 10), {"rows": rows, "batch": batch}
    late = list(predict_slabs(same, volume, (8, 6, 6), **how))
    monkeypatch.undo()
    at_once = list(predict_slabs(same, volume, (8, 6, 6), **how))
    assert [z0 for z0, _ in late] == [z0 for z0, _ in at_once]
    for (_, planes), (_, expected) in zip(late, at_once, strict=True):
        np.testing.assert_array_equal(planes, expected)


def test_the_next_batch_is_read_and_the_next_row_issued_before_planes_are_waited_for(
    beside, monkeypatch
):
    """Two rows of two batches of two windows."""
    events, volume = [], Watched(random_volume(12, 6, 15))

    def network(x):
        assert wait_until(lambda: volume.boxes >= min(8, 2 * events.count("batch") + 4))
        events.append("batch")
        return same(x)

    def watched_to_host(planes):
        events.append("copy")
        later = to_host(planes)
        return lambda: events.append("wait") or later()

    monkeypatch.setattr(sliding_window, "to_host", watched_to_host)
    assert len(list(predict_slabs(network, volume, (8, 6, 6), batch=2))) == 2
    assert events == ["batch", "batch", "copy", "batch", "batch", "copy", "wait", "wait"]


def test_windows_that_ran_out_of_memory_are_done_again_from_boxes_that_were_read_once(beside):
    volume, expected = Watched(random_volume(20, 9, 10)), None
    sizes, known = [], {}

    def network(x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return same(x)

    probs = predict_volume(network, volume, (8, 6, 6), batch=9, remembered=known)
    expected = predict_volume(same, volume.array, (8, 6, 6), batch=2)
    np.testing.assert_array_equal(probs, expected)
    assert sizes[:3] == [6, 4, 2] and known == {"20x9x10": [2, False, None]}
    assert volume.boxes == 4 * 6


def test_a_box_that_cannot_be_read_is_an_error_of_the_caller_and_ends_the_thread(beside):
    volume = Watched(random_volume(20, 9, 10), fails_at=9)
    with pytest.raises(OSError, match="the disk is gone"):
        predict_volume(same, volume, (8, 6, 6), batch=2)
    assert not reading_threads()


def test_a_prediction_that_is_given_up_ends_its_thread(beside):
    slabs = predict_slabs(same, random_volume(40, 9, 10), (8, 6, 6))
    next(slabs)
    assert reading_threads()
    slabs.close()
    assert not reading_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_the_network_ends_the_thread(beside, error):
    def network(x):
        raise error

    with pytest.raises(error):
        predict_volume(network, random_volume(20, 9, 10), (8, 6, 6))
    assert wait_until(lambda: not reading_threads())


def test_logits_in_channels_last_order_give_the_same():
    volume, how = random_volume(9, 10, 11), {"ratio": (1, 1.5, 1), "channels": 2, "flips": True}

    def network(x):
        return torch.cat([same(x), -same(x)], dim=1)

    def last(x):
        return network(x).contiguous(memory_format=torch.channels_last_3d)

    probs = predict_volume(last, volume, (6, 6, 6), **how)
    np.testing.assert_allclose(probs, predict_volume(network, volume, (6, 6, 6), **how), atol=1e-7)


# ---------------------------------------------------------------------------- on a GPU


def a_network():
    torch.manual_seed(0)
    layers = torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.Mish(), torch.nn.Conv3d(8, 2, 1)
    return torch.nn.Sequential(*layers).eval()


@needs_cuda
@pytest.mark.parametrize("precision, most", [("fp32", 1e-6), ("bf16", 1e-2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_cuda_gives_the_probabilities_of_the_cpu(monkeypatch, precision, most, memory_format):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    volume = (250 * random_volume(50, 40, 44)).astype(np.uint8)
    how = {"channels": 2, "ratio": (1, 1.3, 1), "normalize": lambda patch: patch / 200 - 0.5}
    expected = predict_volume(a_network(), volume, (16, 16, 16), **how)
    network = a_network().cuda().to(memory_format=memory_format)
    for batch in (None, 5):
        how |= {"device": torch.device("cuda"), "precision": precision, "batch": batch}
        probs = predict_volume(network, volume, (16, 16, 16), **how)
        np.testing.assert_allclose(probs, expected, atol=most)


@needs_cuda
def test_cuda_slabs_that_are_kept_are_not_overwritten_by_later_ones():
    volume, how = random_volume(60, 24, 24), {"device": torch.device("cuda")}
    kept = [planes for _, planes in predict_slabs(same, volume, (8, 16, 16), **how)]
    np.testing.assert_allclose(np.concatenate(kept, axis=1), volume, atol=1e-6)


@needs_cuda
def test_cuda_that_runs_out_of_memory_gives_the_same_with_fewer_windows_and_on_the_cpu():
    volume, known, sizes = random_volume(40, 30, 30), {}, []

    def network(x):
        sizes.append(len(x))
        if len(sizes) in (3, 4, 6):  # in the middle of a row: 4, 2 and 1 windows at once
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return same(x)

    how = {"device": torch.device("cuda"), "batch": 4, "remembered": known}
    probs = predict_volume(network, volume, (16, 16, 16), **how)
    np.testing.assert_allclose(probs, volume, atol=1e-6)
    total = torch.cuda.get_device_properties(0).total_memory
    assert known == {"40x30x30": [1, True, total]}
