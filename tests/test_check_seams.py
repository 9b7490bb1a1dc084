"""infer.py --check-seams and --shift-consistency."""

import numpy as np

import infer
from runtime import checkpoint, own_threshold
from tests.runtime.test_seams import SHARD, changed, clean
from tests.test_infer import image_of, run
from tests.volumes.zarrs import write_zarr
from volumes import zarr_store

__all__ = ["run"]  # a fixture


def store_of(path, probability, lacking=0):
    """A store of probabilities (1, D, H, W) in shards of 48 voxels, of which some may lack."""
    grid = {"window": [32, 32, 32], "starts": [[0, 32, 64]] * 3}
    about = {"shard": SHARD, "chunk": (24, 24, 24), "provenance": {"grid": grid}}
    store = zarr_store.create(path, probability.shape[1:], {"sheet": 1}, **about)
    for index in store.missing()[lacking:]:
        own = np.ascontiguousarray(probability[(slice(None), *store.box(index))])
        store.write(index, own, np.zeros(own.shape[1:], np.uint8))
    store.finish()
    return str(path)


def test_a_store_without_seams_ends_with_status_0(tmp_path, capsys):
    assert infer.main(["--check-seams", store_of(tmp_path / "pred.zarr", clean())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:7]] == [
        [axis, kind] for axis in "zyx" for kind in ("shard", "window")
    ]
    assert lines[-1] == "no seam"


def test_a_store_with_a_seam_of_5_percent_ends_with_status_1(tmp_path, capsys):
    for place, words in ((48, "shard borders on y"), (64, "window borders on y")):
        box = (slice(None), slice(place, None), slice(None))
        probability = changed(box, lambda p: p + 0.05 * 255)
        path = store_of(tmp_path / f"{place}.zarr", probability)
        assert infer.main(["--check-seams", path]) == 1
        assert capsys.readouterr().out.splitlines()[-1] == f"seams at {words}"


def test_what_is_no_complete_store_is_refused_in_one_sentence(tmp_path, capsys):
    lacks = store_of(tmp_path / "pred.zarr", clean(), lacking=1)
    other = str(write_zarr(tmp_path / "scan.zarr", [image_of((8, 8, 8))]))
    for path, words in ((lacks, "a finished prediction"), (other, "a store that infer.py has")):
        assert infer.main(["--check-seams", path]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(path) and words in line


def test_two_grids_of_windows_are_compared_and_nothing_is_written(run, tmp_path, capsys):
    image = str(write_zarr(tmp_path / "scan.zarr", [image_of((40, 50, 36))]))
    command = ["--ckpt", str(run()), "--input", image, "--shift-consistency"]
    before = sorted(tmp_path.rglob("*"))
    assert infer.main([*command, "--bbox", "8:24", "10:40", "8:28"]) == 0
    dice, normal = capsys.readouterr().out.splitlines()
    assert 0.3 < float(dice.removeprefix("Dice of two grids: ")) < 1
    assert normal.startswith("normal")
    assert sorted(tmp_path.rglob("*")) == before


def test_grids_are_compared_by_masks_where_the_threshold_is_that_of_their_probabilities(
    run, tmp_path, capsys
):
    image, ckpt = str(write_zarr(tmp_path / "scan.zarr", [image_of((40, 50, 36))])), run()
    state = checkpoint.load(ckpt)
    state["loop"]["foreground"] = 0.6
    checkpoint.save(state, ckpt)
    command = ["--ckpt", str(ckpt), "--input", image, "--shift-consistency"]
    command += ["--bbox", "8:24", "10:40", "8:28"]
    dice = []
    for threshold in ("auto", *(level for level in own_threshold.LEVELS if level >= 0.5)):
        assert infer.main([*command, f"inference.threshold={threshold}"]) == 0
        dice.append(capsys.readouterr().out.splitlines()[0])
    assert dice[0] in dice[1:]


def test_a_comparison_of_grids_without_a_box_that_they_cover_is_refused(run, tmp_path, capsys):
    image = str(write_zarr(tmp_path / "scan.zarr", [image_of((40, 50, 36))]))
    command = ["--ckpt", str(run()), "--input", image, "--shift-consistency"]
    assert infer.main(command) == 2
    assert "expected one --input and a --bbox" in capsys.readouterr().err
    assert infer.main([*command, "--bbox", "0:24", "10:40", "8:28"]) == 2
    assert "within 2:38 on axis z" in capsys.readouterr().err


def test_a_checkpoint_is_needed_for_all_else(capsys):
    try:
        infer.main(["--input", "a.tif"])
    except SystemExit as end:
        assert end.code == 2
    assert "required: --ckpt" in capsys.readouterr().err
