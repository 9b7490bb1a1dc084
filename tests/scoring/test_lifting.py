"""The scores can be taken into another project with one copy."""

import shutil
import subprocess
import sys
from pathlib import Path

SCORING = Path(__file__).resolve().parents[2] / "scoring"
SCRIPT = """
import numpy as np
from scoring import metrics

truth = np.zeros((6, 8, 12), np.uint8)
truth[3, 4, 2:10] = 1
prediction = np.roll(truth, 2, axis=2)
names = [name for name in metrics.SCORES if name not in ("cldice", "vesuvius_score", "ece")]
scores = metrics.score(prediction, truth, (2.0, 1.0, 1.0), names=names)
print(scores["dice"], scores["surface_dice"], scores["hausdorff"], scores["toposcore"])
"""


def test_scoring_alone_in_an_empty_folder_scores_two_arrays(tmp_path):
    shutil.copytree(SCORING, tmp_path / "scoring", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Bars of 8 voxels that share 6; what one has more lies within 2 of the other.
    assert done.stdout.split() == ["0.75", "1.0", "2.0", "1.0"]
