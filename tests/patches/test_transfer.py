"""What a worker packs and the training process unpacks; the copy to the device."""

import os

import numpy as np
import pytest
import torch

from patches import transfer
from patches.transfer import pack, unpack
from tests.test_data import SHAPES, same_sample, still, write


def sent(content):
    message, file = pack(content)
    back = unpack(message)
    os.close(file)
    return back


def test_samples_arrive_as_they_were_whatever_their_size_and_type():
    large = np.arange(6000, dtype=np.uint16).reshape(10, 20, 30)
    samples = [
        {"image": torch.from_numpy(large), "case": "bar", "none": None},
        {"turned": large.transpose(2, 0, 1), "part": large[::2, 1:, ::-1], "empty": large[:0]},
        {"small": np.float32([1.5]), "one": torch.tensor(3), "mask": large > 7, "at": (1, 2.5)},
    ]
    back = sent(samples)
    assert torch.equal(back[0]["image"], samples[0]["image"]) and back[0]["none"] is None
    for one, other in zip(samples[1:], back[1:], strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, np.ndarray):
                assert value.dtype == other[key].dtype and np.array_equal(value, other[key])
                assert other[key].flags.writeable
            else:
                assert value == other[key]


def test_every_array_begins_at_a_multiple_of_64_bytes():
    sizes = (5000, 4097, 9001)
    back = sent([np.full(size, i, np.uint8) for i, size in enumerate(sizes)])
    assert [array.ctypes.data % 64 for array in back] == [0, 0, 0]
    assert [(len(a), int(a.min()), int(a.max())) for a in back] == [
        (5000, 0, 0),
        (4097, 1, 1),
        (9001, 2, 2),
    ]


def test_a_small_array_does_not_keep_the_memory_of_its_batch():
    small, large = sent([np.zeros(3), np.zeros(10_000)])
    assert small.base is None or small.base.nbytes < 10_000
    large[:] = 1
    assert small.tolist() == [0, 0, 0]


def test_a_message_is_short_whatever_the_batch_holds():
    message, _ = pack([{"x": np.zeros(5000)} for _ in range(1000)])
    assert len(repr(message)) < 100


def test_unpacking_leaves_no_descriptor_open_once_the_arrays_are_gone():
    message, _ = pack(np.zeros(10_000))
    before = len(os.listdir("/proc/self/fd"))
    array = unpack(message)
    del array
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_closed_or_of_a_later_process_with_the_same_pid_is_no_batch():
    ((_, inode, pieces), file), ((path, *_), _) = pack([1]), pack([2])
    with pytest.raises(FileNotFoundError, match="another file"):
        unpack([path, inode, pieces])
    os.close(file)
    with pytest.raises(OSError):
        unpack([f"/proc/{os.getpid()}/fd/{file}", inode, pieces])


# ---------------------------------------------------------------------------- to the device


@pytest.fixture
def batch(tmp_path):
    dataset = still([write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)])
    return [dataset[0, 0], dataset[0, 1]]


def test_on_a_cpu_the_samples_pass_as_they_are(batch):
    cpu = torch.device("cpu")
    assert transfer.copy_stream(cpu) is None
    assert transfer.to_device(batch, cpu, None) is batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_samples_arrive_whole(batch):
    device = torch.device("cuda")
    stream, pinned = transfer.copy_stream(device), transfer.pin(batch)
    assert all(sample["image"].is_pinned() for sample in pinned)
    for sample, there in zip(batch, transfer.to_device(pinned, device, stream), strict=True):
        assert there["image"].is_cuda and there["label"].is_cuda
        back = {k: v.cpu() if torch.is_tensor(v) else v for k, v in there.items()}
        assert same_sample(sample, back)
