"""Pairs of zarr volumes by blocks: the same files as in memory, and the same faults."""

import shutil

import numpy as np
import pytest
import zarr
from scipy import ndimage

import evaluate
from scoring import block_inputs, blocks
from volumes import files, zarr_store

SHAPE = (20, 36, 40)
SPACING = (2.0, 1.0, 1.0)
SCORES = ["dice", "surface_dice", "surface_dice@1", "precision", "voi_score", "components"]
SCORES += ["components_truth", "handles", "cavities", "toposcore", "betti_error_1"]


def blobs(seed):
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.2) > 0.1


def write_truth(path, label, dtype=np.uint8, spacing=SPACING):
    group = zarr.open_group(path, mode="w", zarr_format=2)
    array = group.create_array("0", shape=label.shape, chunks=(8, 16, 16), dtype=dtype)
    array[:] = label
    scale = [{"type": "scale", "scale": list(spacing)}]
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    level = {"path": "0", "coordinateTransformations": scale}
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [level]}]
    return str(path)


def write_prediction(path, masks, probs=None, finish=True):
    """masks: {region: bool}, painted as 1, 2, ..."""
    names = {name: number for number, name in enumerate(masks, 1)}
    how = {"spacing": SPACING, "unit": "micron", "shard": (16, 32, 32), "chunk": (8, 16, 16)}
    store = zarr_store.create(path, SHAPE, names, **how)
    probs = np.stack([mask * np.uint8(255) for mask in masks.values()]) if probs is None else probs
    painted = np.zeros(SHAPE, np.uint8)
    for name, mask in masks.items():
        painted[mask] = names[name]
    for index in store.missing():
        box = store.box(index)
        store.write(index, np.ascontiguousarray(probs[:, *box]), painted[box])
    if finish:
        store.finish()
    return str(path)


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


@pytest.fixture
def small_blocks(monkeypatch):
    """A function that makes every zarr pair one that is scored by blocks of a few voxels."""

    def choose():
        monkeypatch.setattr(block_inputs, "LARGE", 0)
        monkeypatch.setattr(blocks, "BLOCK", (9, 16, 21))

    return choose


@pytest.fixture
def compared(tmp_path, small_blocks, capsys):
    """A function that scores in memory, then by blocks: (both CSV files, what the second said)."""

    def score(*arguments):
        assert run(*arguments, "--out", tmp_path / "memory.csv") == 0
        capsys.readouterr()
        small_blocks()
        assert run(*arguments, "--out", tmp_path / "blocks.csv") == 0
        texts = [(tmp_path / f"{name}.csv").read_text() for name in ("memory", "blocks")]
        return *texts, capsys.readouterr().out

    return score


def test_a_pair_by_blocks_has_the_scores_that_it_has_in_memory(tmp_path, compared):
    truth = write_truth(tmp_path / "truth.zarr", np.where(blobs(0), 255, 0))
    prediction = write_prediction(
        tmp_path / "pred.zarr", {"sheet": blobs(0) ^ (blobs(1) & blobs(2))}
    )
    memory, by_blocks, said = compared("--pred", prediction, "--truth", truth, "--scores", *SCORES)
    assert memory == by_blocks
    assert "truths of 0 and 255 read as 0 and 1" in said
    assert "scored by blocks" in said and "Betti matching over 2 x 2 x 2 tiles" in said
    assert "2 1 1" in memory and "micron" in memory


def test_unlabeled_voxels_and_classes_count_by_blocks_as_in_memory(tmp_path, compared):
    label = np.where(blobs(0), 3, np.where(blobs(1), 7, 0)).astype(np.int32)
    label[:, :5] = -1
    truth = write_truth(tmp_path / "truth.zarr", label, np.int32)
    masks = {"artery": blobs(0) & blobs(2), "vein": blobs(1) & ~blobs(0)}
    prediction = write_prediction(tmp_path / "pred.zarr", masks)
    shutil.move(prediction, tmp_path / "named.zarr")
    painted = zarr.open_array(tmp_path / "named.zarr/labels/mask/0", mode="r")[:]
    other = write_truth(tmp_path / "other.zarr", np.array([0, 3, 7])[painted])
    arguments = ["--classes", "artery=3", "vein=7", "vessel=3+7", "--ignore-label", -1]
    arguments += ["--scores", "dice", "surface_dice", "voi_score/vein", "components"]
    memory, by_blocks, _ = compared("--pred", other, "--truth", truth, *arguments)
    assert memory == by_blocks
    assert "dice/vessel" in memory and "voi_score/vein" in memory


def test_probabilities_come_from_the_store(tmp_path, compared):
    truth = write_truth(tmp_path / "truth.zarr", blobs(0))
    probs = np.random.default_rng(3).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    prediction = write_prediction(tmp_path / "pred.zarr", {"sheet": probs[0] > 127}, probs)
    scores = ["--scores", "ece", "dice"]
    memory, by_blocks, _ = compared("--pred", prediction, "--truth", truth, *scores)
    values = [float(text.splitlines()[1].split(",")[3]) for text in (memory, by_blocks)]
    assert memory.startswith("case,summary,method,ece")
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    share = blobs(0).mean()
    assert values[0] == pytest.approx((share**2 + (1 - share) ** 2) / 2, abs=0.01)  # of chance


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--scores", "hd95", "dice"], "scores that blocks add up to, of a volume of more than 0"),
        (["--scores", "dice", "cldice"], "got cldice; leave that out, or score boxes"),
        (["--overlays", "pictures"], "--overlays: expected volumes that fit into memory"),
        (["--ignore-label", "2"], "expected the values 0, 1, 2, got 0, 1, 5"),
    ],
)
def test_what_blocks_cannot_do_is_refused_in_a_sentence(
    tmp_path, small_blocks, capsys, options, fault
):
    small_blocks()
    label = blobs(0).astype(np.uint8)
    label[0, 0, 0] = 5 if "--ignore-label" in options else 0
    truth = write_truth(tmp_path / "truth.zarr", label)
    prediction = write_prediction(tmp_path / "pred.zarr", {"sheet": blobs(1)})
    out = tmp_path / "scores.csv"
    assert run("--pred", prediction, "--truth", truth, *options, "--out", out) == 2
    assert fault in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_prediction_with_missing_shards_is_not_scored(tmp_path, small_blocks, capsys, by_blocks):
    if by_blocks:
        small_blocks()
    truth = write_truth(tmp_path / "truth.zarr", blobs(0))
    prediction = write_prediction(tmp_path / "pred.zarr", {"sheet": blobs(1)}, finish=False)
    assert run("--pred", prediction, "--truth", truth) == 2
    assert "pred.zarr: expected a finished prediction, got " in capsys.readouterr().err


def test_volumes_of_two_shapes_are_refused_before_their_voxels_are_read(
    tmp_path, small_blocks, capsys, monkeypatch
):
    small_blocks()
    monkeypatch.setattr(block_inputs, "_values", lambda *_: pytest.fail("read"))
    truth = write_truth(tmp_path / "truth.zarr", blobs(0)[1:])
    prediction = write_prediction(tmp_path / "pred.zarr", {"sheet": blobs(1)})
    assert run("--pred", prediction, "--truth", truth) == 2
    assert "expected the shape of" in capsys.readouterr().err


def test_a_small_pair_is_scored_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(block_inputs, "open_case", lambda *_: pytest.fail("by blocks"))
    truth = write_truth(tmp_path / "truth.zarr", blobs(0))
    prediction = write_prediction(tmp_path / "pred.zarr", {"sheet": blobs(1)})
    assert run("--pred", prediction, "--truth", truth, "--scores", "hd95") == 0
    assert files.voxel_count(truth) < block_inputs.LARGE and blocks.BLOCK == (256, 256, 256)
