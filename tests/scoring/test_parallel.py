"""Cases scored side by side: the same rows, whatever the number of processes."""

import numpy as np
import pytest

from scoring import masks, pairs
from scoring import parallel as scoring
from volumes import files as volumes


def write_pairs(folder, count, faulty=()):
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        truth = (rng.random((4, 6, 5 + i)) < 0.4).astype(np.uint8)
        prediction = (rng.random(truth.shape) < 0.4).astype(np.uint8) * (3 if i in faulty else 1)
        paths = [str(folder / f"{kind}_{i}.tif") for kind in ("truth", "pred")]
        for path, mask in zip(paths, (truth, prediction), strict=True):
            volumes.write_volume(path, mask)
        found.append(pairs.Pair(str(i), {"m": paths[1]}, paths[0], None))
    return found


def scorer():
    return scoring.Scorer(masks.Reading(), ("dice", "components"), 2.0)


def test_processes_give_the_rows_of_one_in_the_order_of_cases(tmp_path):
    found, seen = write_pairs(tmp_path, 4), []
    alone = scoring.score_all(found, scorer(), jobs=1)
    beside = scoring.score_all(found, scorer(), jobs=2, budget=1, progress=seen.append)
    assert beside == alone
    assert [result.rows[0]["case"] for result in beside] == ["0", "1", "2", "3"]
    assert seen == [1, 2, 3, 4]


def test_after_a_fault_the_rest_is_only_checked(tmp_path):
    results = scoring.score_all(write_pairs(tmp_path, 4, faulty=(1, 3)), scorer())
    assert [len(result.rows) for result in results] == [1, 0, 0, 0]
    assert [len(result.faults) for result in results] == [0, 1, 0, 1]


def test_a_case_whose_process_dies_is_named(tmp_path, monkeypatch):
    found = write_pairs(tmp_path, 3)

    class Killed:
        """A pool whose workers are killed by the case that is called 1."""

        def __init__(self, dataset, count):
            self.dataset, self.left, self.tasks, self.most = dataset, count, {}, 0

        def __len__(self):
            return self.left

        def submit(self, task):
            self.tasks[task.number] = task

        def receive(self, timeout):
            self.most = max(self.most, len(self.tasks))
            task = self.tasks.pop(min(self.tasks, key=lambda number: number != 1))
            if task.number != 1:
                return {task.number: [self.dataset[place] for place in task.places]}, []
            self.left -= 1
            process = type("Process", (), {"exitcode": -9})
            return {}, [type("Dead", (), {"tasks": {1: task}, "process": process})]

        def close(self):
            self.left = 0

    monkeypatch.setattr("workers.Pool", Killed)
    with pytest.raises(scoring.ScoringError, match="1: the process that scored it was killed by"):
        scoring.score_all(found, scorer(), jobs=2)


def test_no_case_is_no_result():
    assert scoring.score_all([], scorer()) == []


@pytest.mark.parametrize("suffix", [".tif", ".nii.gz", ".h5"])
def test_voxels_are_counted_from_the_header(tmp_path, suffix):
    path = str(tmp_path / f"a{suffix}")
    volumes.write_volume(path, np.zeros((3, 4, 5), np.uint8))
    assert volumes.voxel_count(path) == 60
    (tmp_path / f"a{suffix}").write_bytes(b"no volume")
    assert volumes.voxel_count(path) == 0
    assert volumes.voxel_count(str(tmp_path / f"gone{suffix}")) == 0
