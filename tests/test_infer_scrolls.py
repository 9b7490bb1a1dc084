"""infer.py into a store: what does not fit into memory, predicted box by box."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr

import infer
from runtime import checkpoint, own_threshold, scrolls, sliding_window
from scoring import postprocess
from tests import processes
from tests.test_infer import (
    expected_probs,
    faults_of,
    image_of,
    infer_ok,
    network_of,
    run,
    write_nifti,
)
from tests.test_infer_classes import made
from tests.volumes.zarrs import set_metadata, write_zarr
from volumes import files, inputs, ome_zarr, statistics, zarr_shards, zarr_store
from volumes.statistics import intensity_statistics
from volumes.volume import VolumeError

__all__ = ["made", "run"]  # fixtures

ROOT = Path(__file__).parents[1]
SHARDS = "inference.shard=[16,16,16]"  # 2 x 2 x 2 of SHAPE, of which windows hold 8 x 16 x 16
AUTO = "inference.threshold=auto"
SHAPE = (24, 30, 28)
CHEAP = """
import os, sys, time
import torch
import infer
from runtime import sliding_window, scrolls
pool = torch.nn.functional.avg_pool3d
sliding_window._call = lambda n, patches, *_: pool(patches[:, :1], 3, 1, 1) * 2
write = scrolls.Scroll._write
def slowly(*about):
    write(*about)
    time.sleep(0.1)
scrolls.Scroll._write = slowly
if __name__ == "__main__":
    sys.exit(infer.main(sys.argv[1:]))
"""


@pytest.fixture
def windows(monkeypatch):
    """A network that costs nothing; a list that grows by a window each time that it is called."""
    calls, pool = [], torch.nn.functional.avg_pool3d

    def call(network, patches, precision, channels):
        calls.extend(patches)
        smooth = pool(patches[:, :1], 3, 1, 1) * 2
        return torch.cat([smooth, -smooth, smooth / 2][:channels], dim=1)

    monkeypatch.setattr(sliding_window, "_call", call)
    return calls


def scroll(path, image, **how):
    """An OME-Zarr in chunks of 8 voxels a side."""
    place = {"spacing": (2.0, 0.5, 0.5), "translation": (100.0, 10.0, 0.0)}
    return write_zarr(path, [image], **{**place, **how})


def image_without_zeros(shape=SHAPE):
    return image_of(shape) + 1


def stored(path):
    """(probability, mask) of a complete store, (C, D, H, W) and (D, H, W)."""
    assert zarr_store.open_store(path).description["complete"]
    return ome_zarr.open_volume(f"{path}/0")[:], ome_zarr.open_volume(f"{path}/labels/mask/0")[:][0]


def codes(probs):
    return np.rint(probs * np.float32(255)).astype(np.uint8)


def files_of(path):
    """{name: content} of the voxels of a store."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def forget(path, *indexes):
    for index in indexes:
        os.remove(path / "0" / "c" / Path(*map(str, index)))


# ---------------------------------------------------------------------------- the same voxels


@pytest.mark.parametrize("shard, cache", [("[16,16,16]", 0), ("[64,64,64]", 1), ("[8,16,40]", 1)])
def test_a_store_holds_the_prediction_of_the_whole(run, windows, tmp_path, shard, cache):
    image = image_without_zeros()
    path = scroll(tmp_path / "a.zarr", image, version="0.5", shard=16)
    infer_ok("--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr",
             f"inference.shard={shard}", f"inference.cache_gb={cache}")  # fmt: skip
    (probability,), mask = stored(tmp_path / "pred.zarr")
    probs = expected_probs(image)
    assert len(np.unique(codes(probs))) > 20 and 0.2 < (probs >= 0.5).mean() < 0.8
    np.testing.assert_array_equal(probability, codes(probs))
    np.testing.assert_array_equal(mask, probs >= 0.5)


def test_float32_probabilities_are_those_of_the_whole_bit_for_bit(run, tmp_path, monkeypatch):
    image, planes, finish = image_without_zeros(), [], scrolls.Scroll._finish

    def keep(self, probs, masked, arrays):
        planes.append(probs[0].copy())
        return finish(self, probs, masked, arrays)

    monkeypatch.setattr(scrolls.Scroll, "_finish", keep)
    path = scroll(tmp_path / "a.zarr", image)
    infer_ok("--ckpt", run(), "--input", path, "--output", tmp_path / "out",
             "inference.shard=[8,16,32]")  # fmt: skip
    whole = expected_probs(image)
    for y in (slice(0, 16), slice(16, 30)):  # two columns of shards
        own = [part for part in planes if part.shape[1] == y.stop - y.start]
        np.testing.assert_array_equal(np.concatenate(own), whole[:, y])


def test_a_volume_of_any_format_goes_into_a_store(run, windows, tmp_path):
    image = image_without_zeros()
    write_nifti(tmp_path / "a.nii.gz", image)
    infer_ok("--ckpt", run(), "--input", tmp_path / "a.nii.gz", "--output",
             tmp_path / "b_img.zarr", SHARDS)  # fmt: skip
    (probability,), _ = stored(tmp_path / "b_img.zarr")
    np.testing.assert_array_equal(probability, codes(expected_probs(image)))


def test_a_zarr_among_files_goes_beside_their_predictions(run, windows, tmp_path):
    scroll(tmp_path / "in" / "a.zarr", image_without_zeros())
    tifffile.imwrite(tmp_path / "in" / "b.tif", image_of(SHAPE))
    infer_ok("--ckpt", run(), "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert stored(tmp_path / "out" / "a.zarr")[1].shape == SHAPE
    assert (tmp_path / "out" / "b.tif").is_file()


def test_a_box_has_the_voxels_of_the_whole_at_its_place(run, windows, tmp_path):
    path, about = scroll(tmp_path / "a.zarr", image_without_zeros()), ["--ckpt", run(), "--input"]
    infer_ok(*about, path, "--output", tmp_path / "whole.zarr")
    infer_ok(*about, path, "--output", tmp_path / "part.zarr", SHARDS,
             "--bbox", "5:22", ":", "3:24")  # fmt: skip
    for part, whole in zip(
        *(stored(tmp_path / f"{n}.zarr") for n in ("part", "whole")), strict=True
    ):
        np.testing.assert_array_equal(part, whole[..., 5:22, :, 3:24])
    volume = ome_zarr.open_volume(tmp_path / "part.zarr")
    assert volume.offset == (110.0, 10.0, 1.5) and volume.spacing == (2.0, 0.5, 0.5)
    assert volume.unit == "micron"


def test_a_run_takes_the_level_of_its_own_voxel_size(run, windows, tmp_path, capsys):
    fine = image_without_zeros((48, 60, 56))
    path = write_zarr(
        tmp_path / "a.zarr", [fine, fine[::2, ::2, ::2]], chunk=32, spacing=(1.0, 0.25, 0.25)
    )
    metadata = {"stored_spacing": [2.0, 0.5, 0.5], "trained_spacing": [2.0, 0.5, 0.5]}
    infer_ok("--ckpt", run(**metadata), "--input", path, "--output", tmp_path / "out")
    assert stored(tmp_path / "out" / "a.zarr")[1].shape == SHAPE
    infer_ok("--ckpt", run(**metadata), "--input", f"{path}/0", "--output", tmp_path / "fine.zarr")
    assert stored(tmp_path / "fine.zarr")[1].shape == (48, 60, 56)


def test_a_run_that_keeps_coarse_voxels_takes_no_level_that_it_would_not_resample(
    run, windows, tmp_path
):
    fine = image_without_zeros((12, 60, 56))
    path = write_zarr(
        tmp_path / "a.zarr", [fine, fine[::2, ::2, ::2]], chunk=32, spacing=(1.0, 1.0, 1.0)
    )
    facts = {"spacing": [0, "1.6+", "1.6+"], "trained_spacing": [2.0, 1.6, 1.6]}
    infer_ok("--ckpt", run(**facts), "--input", path, "--output", tmp_path / "out")
    assert stored(tmp_path / "out" / "a.zarr")[1].shape == (12, 60, 56)
    facts["spacing"] = [0, "2+", "2+"]
    infer_ok("--ckpt", run(**facts), "--input", path, "--output", tmp_path / "coarse")
    assert stored(tmp_path / "coarse" / "a.zarr")[1].shape == (6, 30, 28)


@pytest.mark.parametrize("exclusive", [True, False])
def test_several_regions_are_channels_and_ids(made, windows, tmp_path, exclusive):
    image, regions = image_without_zeros(), {"vessel": [3, 7], "artery": [3]}
    regions = {"vein": [7], "artery": [3]} if exclusive else regions
    infer_ok("--ckpt", made(regions, exclusive), "--input", scroll(tmp_path / "a.zarr", image),
             "--output", tmp_path / "pred.zarr", SHARDS)  # fmt: skip
    probability, mask = stored(tmp_path / "pred.zarr")
    count = 2 + exclusive
    probs = expected_probs(image, channels=count, exclusive=exclusive)
    np.testing.assert_array_equal(probability, codes(probs[int(exclusive) :]))
    if exclusive:
        expected = np.array([0, 7, 3])[probs.argmax(axis=0)]
    else:
        expected = np.where(probs[1] >= 0.5, 3, np.where(probs[0] >= 0.5, 7, 0))
    np.testing.assert_array_equal(mask, expected)
    assert len(np.unique(mask)) >= 2


STEPS = {
    "hysteresis": 0.47,
    "min_component_voxels": 40,
    "max_hole_voxels": 6,
    "closing_radius": 1.0,
}


@pytest.mark.parametrize("count", [None, 3])
def test_post_processing_by_blocks_gives_the_mask_of_the_whole(run, windows, tmp_path, count):
    image = image_without_zeros()
    path, steps = (
        scroll(tmp_path / "a.zarr", image),
        [f"postprocess.{k}={v}" for k, v in STEPS.items()],
    )
    about = ["--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr", SHARDS]
    for number in range(1, count + 1) if count else [None]:
        infer_ok(*about, *steps, *(["--part", f"{number}/{count}"] if count else []))
    probs = expected_probs(image)
    high, low = ({"foreground": probs >= threshold} for threshold in (0.5, 0.47))
    expected = postprocess.apply_to_regions(high, low, spacing=(2.0, 0.5, 0.5), **STEPS)
    (probability,), mask = stored(tmp_path / "pred.zarr")
    np.testing.assert_array_equal(mask, expected["foreground"])
    np.testing.assert_array_equal(probability, codes(probs))
    assert (mask != high["foreground"]).any() and not (tmp_path / "pred.zarr" / ".lamina").exists()


def trained_with(foreground, ckpt):
    """The checkpoint, which now knows of such a share of foreground in training."""
    state = checkpoint.load(ckpt)
    state["loop"]["foreground"] = foreground
    checkpoint.save(state, ckpt)
    return ckpt


@pytest.mark.parametrize("steps", [(), ("postprocess.min_component_voxels=40",)])
def test_a_store_is_cut_at_the_threshold_of_its_own_probabilities(run, windows, tmp_path, steps):
    image, ckpt = image_without_zeros(), trained_with(0.6, run())
    path, pred = scroll(tmp_path / "a.zarr", image), tmp_path / "pred.zarr"
    infer_ok("--ckpt", ckpt, "--input", path, "--output", pred, SHARDS, AUTO, *steps)
    probs = expected_probs(image)
    counts = own_threshold.histogram(own_threshold.count_reached(probs))
    threshold = own_threshold.own_threshold(counts, 0.6)
    assert threshold > 0.5
    expected = postprocess.remove_small_components(probs >= threshold, 40 if steps else 0)
    np.testing.assert_array_equal(stored(pred)[1], expected)
    assert expected.any() and not expected.all()


# ---------------------------------------------------------------------------- what is masked


def image_in_air():
    """Half of it, and all but a corner of the rest, is 0, as around a scroll."""
    image = image_without_zeros((24, 48, 48))
    image[:, 18:], image[:, :, 20:] = 0, 0
    image[4, 5, 6] = 0  # one voxel of it too
    return image


@pytest.mark.parametrize("steps", [(), ("postprocess.closing_radius=3",)])
def test_air_is_not_predicted_and_all_else_is_as_without(run, windows, tmp_path, steps):
    image = image_in_air()
    probs = expected_probs(image)
    del windows[:]
    infer_ok("--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image), "--output",
             tmp_path / "pred.zarr", "inference.shard=[64,64,64]", *steps)  # fmt: skip
    assert len(windows) == 2 + 5 * 3 * 3  # of 5 x 5 x 5; two say how long one takes
    (probability,), mask = stored(tmp_path / "pred.zarr")
    air = image == 0
    air[4, 5, 6] = False
    np.testing.assert_array_equal(probability, np.where(air, 0, codes(probs)))
    assert not mask[air].any() and mask[~air].any()
    if not steps:
        np.testing.assert_array_equal(mask, ~air & (probs >= 0.5))


def test_air_does_not_count_for_the_threshold_of_its_own_probabilities(run, windows, tmp_path):
    image, probs = image_in_air(), expected_probs(image_in_air())
    ckpt, pred = trained_with(0.4, run()), tmp_path / "pred.zarr"
    infer_ok("--ckpt", ckpt, "--input", scroll(tmp_path / "a.zarr", image), "--output", pred,
             "inference.shard=[64,64,64]", AUTO)  # fmt: skip
    air = image == 0
    air[4, 5, 6] = False
    masks = []
    for voxels in (~air, np.ones_like(air)):
        counts = own_threshold.histogram([own_threshold.count_reached(probs[voxels])])
        masks.append(~air & (probs >= own_threshold.own_threshold(counts, 0.4)))
    np.testing.assert_array_equal(stored(pred)[1], masks[0])
    assert (masks[0] != masks[1]).any()  # what air would have changed


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
def test_a_mask_volume_bounds_what_is_predicted(run, windows, tmp_path, suffix):
    image, mask = image_without_zeros(), np.zeros(SHAPE, np.uint8)
    mask[:, :15, :13] = 2
    path = tmp_path / f"m{suffix}"
    scroll(path, mask) if suffix == ".zarr" else tifffile.imwrite(path, mask)
    probs = expected_probs(image)
    del windows[:]
    infer_ok("--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image), "--output",
             tmp_path / "pred.zarr", "--mask", path, "inference.shard=[32,32,32]")  # fmt: skip
    assert len(windows) == 2 + 5 * 3 * 3  # windows start at 0, 7, 14 and 0, 6, 12
    (probability,), own = stored(tmp_path / "pred.zarr")
    np.testing.assert_array_equal(probability, np.where(mask > 0, codes(probs), 0))
    np.testing.assert_array_equal(own, (mask > 0) & (probs >= 0.5))


def test_beside_a_gpu_planes_come_late_and_are_the_same(run, windows, tmp_path, monkeypatch):
    for module in (sliding_window, scrolls):
        monkeypatch.setattr(module, "is_asynchronous", lambda device: True)
    image = image_in_air()
    infer_ok("--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image), "--output",
             tmp_path / "pred.zarr", "inference.shard=[16,32,32]")  # fmt: skip
    (probability,), _ = stored(tmp_path / "pred.zarr")
    air = image == 0
    air[4, 5, 6] = False
    np.testing.assert_array_equal(probability, np.where(air, 0, codes(expected_probs(image))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_a_store_holds_the_prediction_of_the_whole(run, tmp_path):
    image = image_in_air()
    infer_ok("--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image), "--output",
             tmp_path / "pred.zarr", SHARDS, "run.device=cuda")  # fmt: skip
    (probability,), _ = stored(tmp_path / "pred.zarr")
    (probs,) = expected_probs(image, network=network_of(1)[0].cuda(), device="cuda")
    air = image == 0
    air[4, 5, 6] = False
    expected = np.where(air, 0, codes(probs)).astype(int)
    assert np.abs(probability - expected).max() <= 1  # other windows go at once


def test_a_volume_of_air_has_an_empty_prediction(run, windows, tmp_path):
    infer_ok("--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", np.zeros(SHAPE, np.uint8)),
             "--output", tmp_path / "pred.zarr", SHARDS)  # fmt: skip
    probability, mask = stored(tmp_path / "pred.zarr")
    assert not probability.any() and not mask.any() and len(windows) == 2


# ---------------------------------------------------------------------------- parts and restarts


@pytest.mark.parametrize("order", [(3, 1, 2), (2, 3, 1)])
def test_three_parts_leave_the_bytes_of_one_process(run, windows, tmp_path, capsys, order):
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    infer_ok(*about, "--output", tmp_path / "one.zarr", SHARDS)
    for number in order:
        infer_ok(*about, "--output", tmp_path / "three.zarr", SHARDS, "--part", f"{number}/3")
    assert files_of(tmp_path / "three.zarr") == files_of(tmp_path / "one.zarr")
    out = capsys.readouterr().out
    others = " and ".join(f"part {n}/3" for n in sorted(order[1:])).replace(" and", ",")
    assert f"part {order[0]}/3: three: waits for " in out and f"of 8 shards, of {others}" in out


def test_a_second_start_does_only_what_is_missing(run, windows, tmp_path, capsys):
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    about += ["--output", tmp_path / "pred.zarr", SHARDS]
    infer_ok(*about)
    whole = files_of(tmp_path / "pred.zarr")
    forget(tmp_path / "pred.zarr", (1, 0, 0), (0, 1, 1))
    del windows[:]
    infer_ok(*about)
    assert files_of(tmp_path / "pred.zarr") == whole
    # Of 5 x 3 x 3: the last row and the one that reaches in; 4 rows, of which 2 x 2 touch.
    assert len(windows) == 2 + 2 * 3 * 3 + 4 * 2 * 2
    capsys.readouterr()
    infer_ok(*about)
    assert "pred: 24x30x28" in (out := capsys.readouterr().out) and "it was there" in out


@pytest.mark.parametrize("step", ["", "postprocess.min_component_voxels=20"])
def test_files_that_were_removed_by_hand_are_made_again(run, windows, tmp_path, step):
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    about += ["--output", tmp_path / "pred.zarr", SHARDS, *filter(None, [step])]
    infer_ok(*about)
    out = tmp_path / "pred.zarr"
    whole, one = files_of(out), Path("c", "0", "1", "0")
    for gone in (
        ["labels/mask/0" / one],
        ["1" / one],
        ["0" / one, "labels/mask/1" / one],
        ["labels", "0/zarr.json"],
    ):
        for name in gone:
            (shutil.rmtree if (out / name).is_dir() else os.remove)(out / name)
        infer_ok(*about)
        assert files_of(out) == whole and not (out / ".lamina").exists()
        stored(out)


def test_a_half_done_store_that_lost_its_codes_makes_them_again(run, windows, tmp_path):
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    about += [SHARDS, "postprocess.min_component_voxels=20", "--output"]
    infer_ok(*about, tmp_path / "one.zarr")
    infer_ok(*about, tmp_path / "pred.zarr", "--part", "1/2")
    shutil.rmtree(tmp_path / "pred.zarr" / ".lamina")
    infer_ok(*about, tmp_path / "pred.zarr")
    assert files_of(tmp_path / "pred.zarr") == files_of(tmp_path / "one.zarr")


def test_a_killed_process_leaves_whole_shards_that_are_not_done_again(run, windows, tmp_path):
    about = ["--ckpt", str(run()), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    about += [SHARDS, "postprocess.min_component_voxels=20", "--output"]
    path, shards = tmp_path / "killed.zarr", tmp_path / "killed.zarr" / "0" / "c"
    process = processes.Script(["-c", CHEAP, *about, path], cwd=ROOT)
    while len(there := [*shards.glob("*/*/[0-9]*")]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    times = {file: file.stat().st_mtime_ns for file in there}
    for out in (path, tmp_path / "one.zarr"):
        infer_ok(*about, out)
    assert files_of(path) == files_of(tmp_path / "one.zarr")
    assert {file: file.stat().st_mtime_ns for file in there} == times


def test_a_shard_that_another_process_holds_is_left_to_it(run, windows, tmp_path, capsys):
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    about += ["--output", tmp_path / "pred.zarr", SHARDS]
    infer_ok(*about, "--part", "1/8")
    with zarr_store.open_store(tmp_path / "pred.zarr").lock((1, 1, 0)) as free:
        assert free
        infer_ok(*about)
    assert "pred: waits for 1 of 8 shards, of another process" in capsys.readouterr().out
    infer_ok(*about)
    (probability,), _ = stored(tmp_path / "pred.zarr")
    np.testing.assert_array_equal(probability, codes(expected_probs(image_without_zeros())))


def test_a_full_disk_is_one_sentence_and_a_later_run_goes_on(
    run, windows, tmp_path, capsys, monkeypatch
):
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image_without_zeros())]
    about += ["--output", tmp_path / "pred.zarr", SHARDS]
    write_shard, calls = zarr_shards.write_shard, []

    def full(file, *voxels):
        calls.append(file)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(file, *voxels)

    monkeypatch.setattr(zarr_shards, "write_shard", full)
    assert infer.main([str(a) for a in about]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err and err.count("\n") == 1
    assert 0 < len(zarr_store.open_store(tmp_path / "pred.zarr").missing()) < 8
    monkeypatch.setattr(zarr_shards, "write_shard", write_shard)
    infer_ok(*about)
    (probability,), _ = stored(tmp_path / "pred.zarr")
    np.testing.assert_array_equal(probability, codes(expected_probs(image_without_zeros())))


# ---------------------------------------------------------------------------- what is said and kept


def test_the_figures_before_and_after_are_printed(run, windows, tmp_path, capsys):
    path = scroll(tmp_path / "a.zarr", image_without_zeros((24, 160, 160)), chunk=64)
    infer_ok("--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr",
             "inference.shard=[32,96,96]")  # fmt: skip
    out = capsys.readouterr().out
    figures = (
        r"estimate   [\d.]+ [MG]B of RAM, up to [\d.e-]+ hours \(\d+ windows of [\d.e-]+ s\), "
    )
    assert re.search(figures + r"reads up to [124] MB, writes up to 1 MB before compression\n", out)
    assert re.search(
        r"4 shards in [\d.]+ s, read factor 1.00 \(1 MB decoded\), peak [\d.]+ .B", out
    )


def test_a_store_says_what_made_it(run, windows, tmp_path):
    path = scroll(tmp_path / "a.zarr", image := image_without_zeros())
    infer_ok("--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr",
             "--bbox", "4:20", ":", ":", "inference.flips=true")  # fmt: skip
    about = json.loads((tmp_path / "pred.zarr" / "zarr.json").read_text())["attributes"]["lamina"]
    about = about["provenance"]
    assert about["input"] == f"{path}/0" and about["box"] == [[4, 20], [0, 30], [0, 28]]
    assert about["grid"] == {
        "window": [8, 16, 16],
        "ratio": [1.0, 1.0, 1.0],
        "starts": [[-4, 0, 4, 8, 12], [0, 7, 14], [0, 6, 12]],
    }
    assert about["checkpoint"]["1"]["run"] == "tiny" and about["checkpoint"]["1"]["step"] == 0
    assert len(about["checkpoint"]["1"]["sha256_of_weights"]) == 32
    assert about["inference"]["flips"] and about["inference"]["threshold"] == 0.5
    assert about["normalization"]["mean"] == intensity_statistics(image[None])["mean"]
    assert about["date"] and about["commit"] and about["torch"] == torch.__version__


def test_statistics_of_a_large_volume_are_those_of_boxes_that_hold_something(tmp_path, monkeypatch):
    image = np.zeros((40, 100, 140), np.uint8)
    image[:, :64, :64] = np.random.default_rng(0).integers(1, 250, (40, 64, 64))
    volume = ome_zarr.open_volume(scroll(tmp_path / "a.zarr", image, chunk=16))
    np.testing.assert_array_equal(statistics.sampled(volume)[0], image)  # it is small
    monkeypatch.setattr(statistics, "BOXES", 20)
    monkeypatch.setattr(statistics, "BOX", 16)
    voxels, again = statistics.sampled(volume), statistics.sampled(volume)
    assert voxels.shape == (1, 20 * 16, 16, 16) and voxels.all()
    np.testing.assert_array_equal(voxels, again)


# ---------------------------------------------------------------------------- faults


def refused(capsys, *about):
    (fault,) = faults_of(capsys, *about)
    return fault


def test_a_store_of_something_else_is_refused_with_what_differs(run, windows, tmp_path, capsys):
    path, out = scroll(tmp_path / "a.zarr", image_without_zeros()), tmp_path / "pred.zarr"
    about = ["--ckpt", run(), "--input", path, "--output", out, SHARDS]
    infer_ok(*about, "--part", "1/2")
    before = files_of(out)
    capsys.readouterr()
    for change, words in {
        "inference.threshold=0.4": "inference.threshold 0.5 instead of 0.4",
        "inference.overlap=0.25": "inference.overlap 0.5 instead of 0.25",
        "inference.shard=[8,8,8]": "shard [16, 16, 16] instead of [8, 8, 8]",
        "postprocess.closing_radius=2": "post false instead of true",
    }.items():
        assert words in refused(capsys, *about, change)
    assert "box [[0, 24], [0, 30], [0, 28]] instead of" in refused(
        capsys, *about, "--bbox", ":", ":", ":9"
    )
    other = checkpoint.load(about[1])
    other["ema"] = network_of(5)[0].state_dict()
    checkpoint.save(other, about[1])
    assert "checkpoint.1.sha256_of_weights" in refused(capsys, *about)
    assert files_of(out) == before


def test_more_memory_for_the_cache_is_no_other_prediction(run, windows, tmp_path):
    path = scroll(tmp_path / "a.zarr", image_without_zeros())
    about = ["--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr", SHARDS]
    infer_ok(*about, "--part", "1/2")
    infer_ok(*about, "--part", "2/2", "inference.cache_gb=2")
    stored(tmp_path / "pred.zarr")


def test_an_output_inside_of_the_input_is_refused(run, tmp_path, capsys):
    path = scroll(tmp_path / "a.zarr", image_without_zeros())
    about = ["--ckpt", run(), "--input", path, "--output"]
    inside = refused(capsys, *about, path / "pred.zarr")
    assert "expected a path outside of the input, got one inside of" in inside
    assert "would overwrite an input" in refused(capsys, *about, path)
    assert "would overwrite an input" in refused(capsys, *about, tmp_path)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--bbox", "0:9", "0:31", ":"], "expected a box within its"),
        (["--bbox", "0-9", ":", ":"], "--bbox: expected Z0:Z1 Y0:Y1 X0:X1"),
        (["--mask", "m.tif"], "m.tif: expected a mask of the voxels of"),
        (["--mask", "gone.tif"], "gone.tif: expected a"),
        (["--submission", "s.zip"], "--submission: expected masks in files, got"),
        (["inference.shard=[200,64,64]"], "inference.shard: expected multiples of 128"),
        (["inference.flips=true", "inference.save_disagreement=true"], "expected false for"),
    ],
)
def test_what_a_store_cannot_have_is_one_sentence(run, tmp_path, capsys, monkeypatch, more, words):
    path = scroll(tmp_path / "a.zarr", image_without_zeros())
    tifffile.imwrite(tmp_path / "m.tif", np.ones((5, 30, 28), np.uint8))
    monkeypatch.chdir(tmp_path)
    checkpoint_path = run()
    fault = refused(capsys, "--ckpt", checkpoint_path, "--input", path, "--output", "p.zarr", *more)
    assert words in fault and not (tmp_path / "p.zarr").exists()


def test_an_unfinished_prediction_is_no_input_mask_or_label(run, windows, tmp_path, capsys):
    path = scroll(tmp_path / "a.zarr", image_without_zeros())
    about, half = ["--ckpt", run(), "--output", tmp_path / "p.zarr"], tmp_path / "half.zarr"
    infer_ok(*about[:2], "--input", path, "--output", half, SHARDS, "--part", "1/2")
    capsys.readouterr()
    words = "expected a finished prediction, got one whose missing shards would be read as 0"
    assert words in refused(capsys, *about, "--input", half)
    assert words in refused(capsys, *about, "--input", path, "--mask", half / "labels/mask")
    with pytest.raises(VolumeError, match=words):
        files.read_label(half / "labels/mask", (slice(0, 8),) * 3)


@pytest.mark.parametrize("call", ["rename", "fsync"])  # of the folder, of the first file
def test_a_folder_that_takes_no_store_is_one_sentence(run, tmp_path, capsys, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = scroll(tmp_path / "a.zarr", image_without_zeros())
    about = ["--ckpt", run(), "--input", path, "--output", tmp_path / "p" / "p.zarr"]
    monkeypatch.setattr(os, call, full)
    assert "got No space left on device; make room" in refused(capsys, *about)
    assert not [*tmp_path.glob("p/*")]


@pytest.mark.parametrize("option", [["--mask", "m.tif"], ["--bbox", ":", ":", ":"]])
def test_a_mask_or_a_box_of_what_is_predicted_whole_is_refused(run, tmp_path, capsys, option):
    tifffile.imwrite(tmp_path / "a.tif", image_of(SHAPE))
    fault = refused(capsys, "--ckpt", run(), "--input", tmp_path / "a.tif", *option)
    assert f"{option[0]}: expected one prediction, in a .zarr, got" in fault


def test_several_inputs_do_not_go_into_one_store(run, tmp_path, capsys):
    paths = [scroll(tmp_path / f"{name}.zarr", image_without_zeros()) for name in "ab"]
    fault = refused(capsys, "--ckpt", run(), "--input", *paths, "--output", tmp_path / "p.zarr")
    assert fault.endswith("b.zarr/0; give a folder") and "expected one input for one .zarr" in fault


def test_inputs_that_are_no_volume_are_one_sentence_each(run, tmp_path, capsys):
    path, about = scroll(tmp_path / "a.zarr", image_without_zeros()), ["--ckpt", run(), "--input"]
    assert "its levels are 0" in refused(capsys, *about, f"{path}/7")
    write_zarr(tmp_path / "c.zarr", [np.zeros(SHAPE, np.complex64)], spacing=(1.0, 1.0, 1.0))
    assert "c.zarr: expected voxels of real numbers" in refused(capsys, *about, tmp_path / "c.zarr")
    set_metadata(zarr.open_group(str(path)), {"multiscales": [{}]})
    assert "a.zarr: expected metadata of OME-Zarr" in refused(capsys, *about, path)


def test_a_damaged_chunk_is_named_and_shards_without_it_are_there(
    run, windows, tmp_path, capsys, monkeypatch
):
    image = image_without_zeros((48, 30, 28))
    path = scroll(tmp_path / "a.zarr", image)
    about = ["--ckpt", run(), "--input", path, "--output", tmp_path / "pred.zarr", SHARDS]
    chunk = path / "0" / "5.0.0"  # of planes from 40 on
    whole = chunk.read_bytes()
    chunk.write_bytes(b"damaged" + whole[7:])
    assert "5.0.0" in refused(capsys, *about)  # all is read for the statistics
    monkeypatch.setattr(inputs, "sampled", lambda _: image[None])  # as of a large one
    assert infer.main([str(a) for a in about]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pred: ") and "5.0.0" in err and err.count("\n") == 1
    assert (2, 0, 0) in zarr_store.open_store(tmp_path / "pred.zarr").missing()
    assert (0, 0, 0) not in zarr_store.open_store(tmp_path / "pred.zarr").missing()
    chunk.write_bytes(whole)
    infer_ok(*about)
    (probability,), _ = stored(tmp_path / "pred.zarr")
    np.testing.assert_array_equal(probability, codes(expected_probs(image)))


def test_voxels_that_are_no_finite_numbers_are_refused_before_the_start(run, tmp_path, capsys):
    image = image_without_zeros().astype(np.float32)
    image[9, 8, 7] = np.nan
    about = ["--ckpt", run(), "--output", tmp_path / "pred.zarr", "--input"]
    assert "got 1 voxels of NaN or Inf" in refused(
        capsys, *about, scroll(tmp_path / "a.zarr", image)
    )
    assert "got dtype bool; convert it" in refused(
        capsys, *about, scroll(tmp_path / "b.zarr", image > 9)
    )
    assert not (tmp_path / "pred.zarr").exists()


def test_values_that_are_not_finite_are_named(run, windows, tmp_path, capsys, monkeypatch):
    image = image_without_zeros().astype(np.float32)
    monkeypatch.setattr(inputs, "sampled", lambda _: image[None, :8])
    image[9, 8, 7] = np.nan
    about = ["--ckpt", run(), "--input", scroll(tmp_path / "a.zarr", image)]
    assert infer.main([str(a) for a in (*about, "--output", tmp_path / "pred.zarr")]) == 1
    assert (
        "expected finite values, got NaN or Inf in the chunk (1, 1, 0)" in capsys.readouterr().err
    )
