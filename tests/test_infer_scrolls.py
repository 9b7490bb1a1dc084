"""infer.py into a store: what does not fit into memory, predicted box by box."""

import numpy as np
import pytest
import tifffile

from scoring import postprocess
from tests.test_infer import expected_probs, faults_of, image_of, infer_ok, network_of, run
from tests.volumes.zarrs import write_zarr
from volumes import ome_zarr, zarr_store

__all__ = ["run"]  # a fixture

SMALL = "inference.shard=[16,32,16]"
SHAPE = (40, 50, 36)


def scroll(path, image, **how):
    """An OME-Zarr of chunks of 8 voxels a side."""
    return write_zarr(path, [image], spacing=(2.0, 0.5, 0.5), unit="micrometer", **how)


def stored(path):
    """(probability, mask) of a complete store of one region, (D, H, W)."""
    assert zarr_store.open_store(path).description["complete"]
    parts = (ome_zarr.open_volume(f"{path}/{name}") for name in ("0", "labels/mask/0"))
    return [part[:][0] for part in parts]


def codes(probs):
    return np.rint(probs * np.float32(255)).astype(np.uint8)


@pytest.mark.parametrize("shard", ["[16,32,16]", "[64,64,64]", "[8,8,40]"])
def test_a_store_holds_the_prediction_of_the_whole_in_memory(run, tmp_path, capsys, shard):
    image = image_of(SHAPE) + 1
    path = scroll(tmp_path / "a.zarr", image)
    infer_ok("--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr",
             f"inference.shard={shard}")  # fmt: skip
    probability, mask = stored(tmp_path / "pred.zarr")
    probs = expected_probs(image)
    np.testing.assert_array_equal(probability, codes(probs))
    np.testing.assert_array_equal(mask, probs >= 0.5)
    print(capsys.readouterr().out)
