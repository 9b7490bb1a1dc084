import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from runtime.onednn import OneDNN
from runtime.sliding_window import predict_volume

torch.set_num_threads(1)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


def convolutions(call):
    """Names of the kernels of convolutions that a call runs."""
    with torch.inference_mode(), profile() as record:
        call()
    return {e.name for e in record.events() if "conv3d_forward" in e.name or "mkldnn" in e.name}


@needs_onednn
def test_small_convolutions_of_a_batch_of_one_are_made_by_onednn():
    x, conv = torch.zeros(1, 4, 6, 8, 8), torch.nn.Conv3d(4, 4, 3, padding=1)
    with OneDNN():
        assert convolutions(lambda: conv(x)) == {"aten::mkldnn_convolution"}


@needs_onednn
@pytest.mark.parametrize("how", [{}, {"batch": 2}])
def test_prediction_of_a_volume_never_takes_the_slow_convolution(how):
    network = torch.nn.Conv3d(1, 1, 3, padding=1)
    volume = torch.zeros(1, 9, 12, 8).numpy()  # windows of a row are odd in number
    assert convolutions(lambda: predict_volume(network, volume, (6, 6, 8), **how)) == {
        "aten::mkldnn_convolution"
    }


@needs_onednn
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": 1, "bias": False},
        {"padding": (0, 1, 1), "stride": (1, 2, 2)},
        {"dilation": (1, 2, 1), "padding": 2},
        {"groups": 2, "padding": "same"},
        {"groups": 4, "padding": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions_by_onednn_have_the_values_of_torch_in_float64(how, dtype):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(4, 8, 3, **how).to(dtype)
    x = torch.randn(1, 4, 7, 9, 8, dtype=dtype)
    with torch.inference_mode():
        with OneDNN():
            out = conv(x)
        expected = conv.double()(x.double())
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@needs_onednn
def test_arguments_of_other_forms_and_faults_go_to_torch():
    x, weight = torch.randn(1, 2, 5, 5, 5), torch.randn(3, 2, 3, 3, 3)
    with torch.inference_mode(), OneDNN():
        by_number = F.conv3d(x, weight, stride=2, padding=1)
        unbatched = F.conv3d(x[0], weight, stride=2, padding=1)
        with pytest.raises(RuntimeError, match=r"expected input.*to have 2 channels, but got 1"):
            F.conv3d(x[:, :1], weight, None, (1, 1, 1), (0, 0, 0), (1, 1, 1))
    expected = F.conv3d(x, weight, stride=2, padding=1)
    torch.testing.assert_close(by_number, expected)
    torch.testing.assert_close(unbatched, expected[0])


@needs_onednn
def test_a_network_with_its_own_autocast_keeps_it():
    x, conv = torch.randn(1, 2, 5, 5, 5), torch.nn.Conv3d(2, 2, 3)
    with torch.inference_mode(), OneDNN(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16


@needs_onednn
def test_a_compiled_network_predicts_the_same():
    torch.manual_seed(0)
    conv, volume = torch.nn.Conv3d(1, 1, 3, padding=1), torch.randn(1, 6, 6, 6).numpy()
    compiled = torch.compile(conv, backend="eager")
    probs = predict_volume(compiled, volume, (6, 6, 6))
    expected = predict_volume(conv, volume, (6, 6, 6))
    torch.testing.assert_close(torch.from_numpy(probs), torch.from_numpy(expected))
