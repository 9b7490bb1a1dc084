"""Cases scored several at a time: the same rows, whatever the number of processes."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scoring import inputs, parallel
from volumes import files


def write_pairs(folder, count, wrong=()):
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(count):
        truth = (rng.random((4, 6, 5 + i)) < 0.4).astype(np.uint8)
        prediction = (rng.random(truth.shape) < 0.4).astype(np.uint8) * (3 if i in wrong else 1)
        paths = [str(folder / f"{kind}_{i}.tif") for kind in ("truth", "pred")]
        for path, mask in zip(paths, (truth, prediction), strict=True):
            files.write_volume(path, mask)
        pairs.append(inputs.Pair(str(i), {"m": paths[1]}, paths[0], None))
    return pairs


def scorer():
    return parallel.Scorer(inputs.ReadOptions(), ("dice", "components"), 2.0)


def test_processes_give_the_rows_of_one_in_the_order_of_cases(tmp_path):
    pairs, seen = write_pairs(tmp_path, 4), []
    alone = parallel.score_all(pairs, scorer(), jobs=1)
    beside = parallel.score_all(pairs, scorer(), jobs=2, budget=1, progress=lambda: seen.append(1))
    assert beside == alone
    assert [result.rows[0]["case"] for result in beside] == ["0", "1", "2", "3"]
    assert len(seen) == 4


def test_after_an_error_the_rest_is_only_checked(tmp_path):
    results = parallel.score_all(write_pairs(tmp_path, 4, wrong=(1, 3)), scorer())
    assert [len(result.rows) for result in results] == [1, 0, 0, 0]
    assert [len(result.errors) for result in results] == [0, 1, 0, 1]


class Killed(parallel.Scorer):
    """Its process is killed by the case that is called 1."""

    def __call__(self, pair, only_check=False):
        if pair.id == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(pair, only_check)


def test_a_case_whose_process_dies_is_named_with_the_cause(tmp_path):
    pairs = write_pairs(tmp_path, 3)
    scorer = Killed(inputs.ReadOptions(), ("dice",), 2.0)
    expected = "^1: the process that scored it was killed by SIGKILL, although no other ran; it"
    first, killed, last = parallel.score_all(pairs, scorer, jobs=2)
    assert re.match(expected, killed.failure) and not killed.rows
    assert [row["case"] for result in (first, last) for row in result.rows] == ["0", "2"]


class Hungry(parallel.Scorer):
    """No memory is left, as long as a file is there; a case takes it away."""

    def __call__(self, pair, only_check=False):
        try:
            os.unlink(os.path.join(os.path.dirname(pair.truth), "hungry"))
        except FileNotFoundError:
            return super().__call__(pair, only_check)
        raise MemoryError


def test_a_case_without_memory_is_scored_again_on_its_own(tmp_path):
    pairs = write_pairs(tmp_path, 3)
    (tmp_path / "hungry").touch()
    results = parallel.score_all(pairs, Hungry(inputs.ReadOptions(), ("dice",), 2.0), jobs=2)
    assert [result.rows[0]["case"] for result in results] == ["0", "1", "2"]


POOL = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from scoring import parallel

if __name__ == "__main__":
    with parallel.worker_process({signal.SIGINT, signal.SIGTERM}) as (pool, process):
        pool.submit(int).result()
        print(process.pid, flush=True)
        time.sleep(60)
"""


def test_a_worker_ignores_signals_to_the_group_and_ends_with_its_parent(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    time.sleep(0.3)
    assert is_alive(worker)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_case_is_no_result():
    assert parallel.score_all([], scorer()) == []


@pytest.mark.parametrize("suffix", [".tif", ".nii.gz", ".h5"])
def test_voxels_are_counted_from_the_header(tmp_path, suffix):
    path = str(tmp_path / f"a{suffix}")
    files.write_volume(path, np.zeros((3, 4, 5), np.uint8))
    assert files.voxel_count(path) == 60
    (tmp_path / f"a{suffix}").write_bytes(b"no volume")
    assert files.voxel_count(path) == 0
    assert files.voxel_count(str(tmp_path / f"gone{suffix}")) == 0
