"""Predictions that several processes make together: infer.py --part, and under torchrun."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch

import infer
from runtime import checkpoint, ensemble, parts
from tests import processes
from tests.test_infer import (
    faults_of,
    image_of,
    infer_ok,
    make_cases,
    network_of,
    run,
    write_nifti,
)
from volumes import origins

__all__ = ["run"]  # a fixture

ROOT = Path(__file__).parents[1]
SETTINGS = ("inference.save_probabilities=true", "postprocess.hysteresis=0.49")
SLOW = """
import os, sys, time
import infer
from runtime import sliding_window
call = sliding_window._call
if os.environ.get("RANK") != "0":
    sliding_window._call = lambda *arguments: time.sleep(0.2) or call(*arguments)
if __name__ == "__main__":
    sys.exit(infer.main(sys.argv[1:]))
"""


def scans(tmp_path):
    """A volume of 5 rows of 6 windows, and one of a single window."""
    write_nifti(tmp_path / "scans" / "a.nii.gz", image_of((23, 30, 20)))
    tifffile.imwrite(tmp_path / "scans" / "b.tif", image_of((8, 16, 16), 1))
    return tmp_path / "scans"


def files_of(folder):
    """{name: content} of all files under a folder but those of parts, and the list of what was
    predicted with which checkpoint, to which parts add in any order."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".parts" not in path.parts]
    paths = [path for path in paths if path.name != origins.NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def slabs_in(folder):
    return sorted(path.stem for path in (folder / ".parts").glob("*/*/[!.]*.npz"))


def predicted_rows(monkeypatch):
    """The ranges of rows that are predicted from now on."""
    predict_case, ranges = ensemble.predict_case, []

    def watched(*arguments, rows=None, **how):
        ranges.append(rows)
        return predict_case(*arguments, rows=rows, **how)

    monkeypatch.setattr(ensemble, "predict_case", watched)
    return ranges


# ---------------------------------------------------------------------------- equal files


@pytest.mark.parametrize("order", [(3, 1, 2), (2, 3, 1)])
def test_three_parts_in_any_order_leave_the_files_of_one_process(run, tmp_path, capsys, order):
    about = ["--ckpt", run(), "--input", scans(tmp_path), *SETTINGS]
    one, three = tmp_path / "one", tmp_path / "three"
    infer_ok(*about, "--output", one, "--submission", one / "s.zip")
    for number in order:
        where = ["--output", three, "--submission", three / "s.zip"]
        infer_ok(*about, *where, "--part", f"{number}/3")
    assert files_of(three) == files_of(one)
    names = {"a.nii.gz", "b.tif", "probabilities/a.nii.gz", "probabilities/b.tif", "s.zip"}
    assert files_of(one).keys() == names and slabs_in(three) == []
    assert "s.zip: 2 masks, read back and the same" in capsys.readouterr().out.splitlines()[-1]


def test_parts_share_out_the_slabs_of_one_volume(run, tmp_path, capsys, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", image_of((23, 30, 20)))
    about = ["--ckpt", run(), "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out"]
    ranges = predicted_rows(monkeypatch)
    infer_ok(*about, "--part", "2/2")
    assert ranges == [range(2, 5)] and slabs_in(tmp_path / "out") == ["2", "3", "4"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "part 2/2: a: waits for 2 of 5 slabs, of part 1/2"
    assert all(line.startswith("part 2/2: ") for line in lines)
    infer_ok(*about, "--part", "1/2")
    assert ranges == [range(2, 5), range(2)]
    assert "part 1/2: 1/1 a: 23x30x20" in capsys.readouterr().out


def test_a_part_that_is_killed_and_started_again_does_no_slab_twice(run, tmp_path, monkeypatch):
    about = ["--ckpt", str(run()), "--input", str(scans(tmp_path)), *SETTINGS, "--output"]
    out = tmp_path / "out"
    process = processes.Script(["-c", SLOW, *about, out, "--part", "1/2"], cwd=ROOT)
    while len(slabs_in(out)) < 1:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    done, ranges = slabs_in(out), predicted_rows(monkeypatch)
    assert 1 <= len(done) < 3 and not (out / "a.nii.gz").exists()
    infer_ok(*about, out, "--part", "2/2")
    infer_ok(*about, out, "--part", "1/2")
    assert ranges == [range(3, 5), range(1), range(len(done), 3)]
    infer_ok(*about, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_torchrun_makes_each_rank_a_part_and_none_ends_before_the_others(run, tmp_path):
    # The first rank has case a alone, and fails at once; the other three have as many windows.
    images = {"a": image_of((40, 16, 16)), **{n: image_of((16, 16, 16)) for n in "bcd"}}
    make_cases(tmp_path / "cases", **images)
    about = ["--ckpt", run(), "--input", tmp_path / "cases", "--output"]
    infer_ok(*about, tmp_path / "one")
    damage(tmp_path / "cases" / "a.h5")
    out = tmp_path / "out"
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["-c", "from torch.distributed.run import main; main()", "--nproc-per-node=2"]
    words += [tmp_path / "slow.py", *about, out]
    done = processes.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "part 1/2: a: " in done.stderr and "a.h5: expected a volume that can" in done.stderr
    expected = files_of(tmp_path / "one")
    del expected["a.tif"]
    assert files_of(out) == expected
    assert "part 2/2: 4/4 d: " in done.stdout and done.stdout.count("windows ") == 1


def damage(path):
    """Spoil the voxels of a case file, not what is known of them."""
    with h5py.File(path, "r+") as file:
        image = file["image"][:]
        del file["image"]
        file.create_dataset("image", data=image, chunks=image.shape, fletcher32=True)
        chunk = file["image"].id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size // 2))


# ---------------------------------------------------------------------------- what is not mixed


@pytest.mark.parametrize("what", ["threshold", "weights", "input", "spacing"])
def test_slabs_of_other_settings_weights_or_files_are_not_mixed(run, tmp_path, capsys, what):
    path = tmp_path / ("a.tif" if what == "spacing" else "a.nii.gz")
    write = tifffile.imwrite if what == "spacing" else write_nifti
    write(path, image_of((23, 30, 20)))
    about, out = ["--ckpt", run(), "--input", path], tmp_path / "out"
    infer_ok(*about, "--output", out, "--part", "1/2")
    if what == "threshold":
        about.append("inference.threshold=0.51")
    elif what == "spacing":
        about += ["--spacing", "2", "0.5", "0.5"]
    elif what == "weights":
        state = checkpoint.load(about[1])
        checkpoint.save(state | {"ema": network_of(3)[0].state_dict()}, about[1])
    else:
        write_nifti(path, image_of((23, 30, 20), 5))
    infer_ok(*about, "--output", out, "--part", "2/2")
    said = capsys.readouterr().out
    assert "a: waits for 2 of 5 slabs, of part 1/2; slabs from other weights, settings" in said
    assert not (out / path.name).exists()
    infer_ok(*about, "--output", out, "--part", "1/2")
    infer_ok(*about, "--output", tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_parts_that_are_done_do_nothing_unless_their_files_were_changed(run, tmp_path, monkeypatch):
    about, out = ["--ckpt", run(), "--input", scans(tmp_path), "--output"], tmp_path / "out"
    infer_ok(*about, out, "--part", "1/1")
    expected, ranges = files_of(out), predicted_rows(monkeypatch)
    infer_ok(*about, out, "--part", "2/3")  # of whatever number
    assert ranges == [] and files_of(out) == expected
    for place in (tmp_path, out):  # it is another file, though of the same name
        infer_ok(*about, out, "--part", "1/1", "--submission", place / "s.zip")
        assert (place / "s.zip").exists()
    (out / "s.zip").unlink()
    (out / "b.tif").unlink()
    infer_ok(*about, out, "inference.threshold=0.51")  # without parts: the files are others now
    ranges.clear()
    infer_ok(*about, out, "--part", "1/1")
    assert ranges == [range(5), range(1)] and files_of(out) == expected


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize("text", ["4/3", "0/3", "a", "1", "1/0", "-1/3", "1/2/3"])
def test_a_part_that_cannot_be_is_one_sentence(run, tmp_path, capsys, text):
    write_nifti(tmp_path / "a.nii.gz", image_of((8, 16, 16)))
    about = ("--ckpt", run(), "--input", tmp_path / "a.nii.gz", f"--part={text}")
    (fault,) = faults_of(capsys, *about)
    assert fault == f"--part: expected I/N with I from 1 to N, such as 2/3, got {text}"


def as_rank(monkeypatch, rank, count):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(count))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    as_rank(monkeypatch, 1, 2)
    assert parts.find_part(None).device(torch.device("cuda")) == torch.device("cuda:1")
    assert parts.find_part(None).device(torch.device("cpu")) == torch.device("cpu")
    as_rank(monkeypatch, 1, 3)
    with pytest.raises(ValueError, match="expected a GPU for each of 3 ranks on this machine"):
        parts.find_part(None).device(torch.device("cuda"))
    as_rank(monkeypatch, 0, 1)
    assert parts.find_part(None) is None


def test_a_part_of_a_rank_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    (fault,) = faults_of(capsys, "--ckpt", run(), "--part", "1/2")
    assert fault == "--part: expected none under torchrun, which makes this part 2/2"


def test_a_volume_that_fails_is_named_by_its_part_and_made_when_that_is_started_again(
    run, tmp_path, capsys, monkeypatch
):
    about = ["--ckpt", run(), "--input", scans(tmp_path), "--output", tmp_path / "out"]
    target = tmp_path / "s.zip"
    about += ["--submission", target, "--part", "1/1"]
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_volume", full_disk)
        assert infer.main([str(a) for a in about]) == 1
    *failures, last = capsys.readouterr().err.splitlines()
    assert [line.split("(")[0] for line in failures] == [
        f"part 1/1: {name}: the prediction cannot be written " for name in "ab"
    ]
    assert last == "part 1/1: --submission: not written, for masks are missing"
    ranges = predicted_rows(monkeypatch)
    infer_ok(*about)
    assert ranges == [] and files_of(tmp_path / "out").keys() == {"a.nii.gz", "b.tif"}
    assert target.exists()


def full_disk(path, *arguments, **how):
    raise OSError(28, "No space left on device")


def test_a_slab_that_cannot_be_read_or_written_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", image_of((23, 30, 20)))
    about = ["--ckpt", run(), "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "out"]
    about = [str(word) for word in about]
    infer_ok(*about, "--part", "1/2")
    (path,) = (tmp_path / "out").glob(".parts/*/*/1.npz")
    content = path.read_bytes()
    path.write_bytes(content.replace(content[300:320], bytes(20)))
    assert infer.main([*about, "--part", "2/2"]) == 1
    (failure,) = capsys.readouterr().err.splitlines()
    assert failure.startswith(f"part 2/2: a: {path}: expected a slab that can be read, got ")
    path.unlink()
    infer_ok(*about, "--part", "1/2")
    assert (tmp_path / "out" / "a.nii.gz").exists()
    monkeypatch.setattr(parts.np, "savez", full_disk)
    assert infer.main([*about, "--part", "1/2", "inference.threshold=0.4"]) == 1
    (failure,) = capsys.readouterr().err.splitlines()
    assert "0.npz: the slab cannot be written ([Errno 28]" in failure


# ---------------------------------------------------------------------------- the rule


def test_shares_of_all_parts_cover_each_row_once_and_are_alike():
    assert parts.share([(9, 25), (40, 16)], 3) == [
        [range(9), range(4)],
        [range(9, 9), range(4, 22)],
        [range(9, 9), range(22, 40)],
    ]
    rng = np.random.default_rng(0)
    for _ in range(200):
        volumes = rng.integers(1, 12, (rng.integers(1, 6), 2)).tolist()
        shares = parts.share(volumes, int(rng.integers(1, 9)))
        for index, (rows, _) in enumerate(volumes):
            assert [row for share in shares for row in share[index]] == list(range(rows))
        loads = [
            sum(len(r) * w for r, (_, w) in zip(share, volumes, strict=True)) for share in shares
        ]
        assert max(loads) - min(loads) <= 2 * max(windows for _, windows in volumes)


def test_what_has_been_made_is_made_once_however_many_ask(tmp_path):
    made, path = [], tmp_path / "made"

    def make():
        time.sleep(0.05)
        path.write_text("x")
        made.append(path)
        return [path]

    records = [parts.Record(tmp_path, "made", "digits") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:  # each opens the file, so their locks are apart
        called = [*pool.map(lambda record: record.once(make), records)]
    assert sorted(called) == [False, False, False, True] and made == [path]
    assert parts.Record(tmp_path, "made", "other").once(make)
