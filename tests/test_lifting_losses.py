"""`cp -r losses.py topology/` gives another project the losses: a fresh process there trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# In what another project would write, nothing but torch and the copied files is there.
TRAIN = """
import torch
from losses import LOSSES

torch.manual_seed(0)
network = torch.nn.Conv3d(1, 1, 3, padding=1)
optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
target = torch.zeros(1, 1, 8, 12, 12)
target[..., 3:5, 2:10, 2:10] = 1
image = target + 0.5 * torch.randn_like(target)
valid = torch.rand_like(target) > 0.1
totals = []
for step in range(30):
    logits = network(image)
    total = sum(loss(logits, target, valid) for loss in LOSSES.values())
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    totals.append(total.item())
print(len(LOSSES), totals[-1] / totals[0])
"""


def test_the_losses_train_a_network_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "losses.py", tmp_path)
    shutil.copytree(
        ROOT / "topology", tmp_path / "topology", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "train_mine.py").write_text(TRAIN)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "train_mine.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    terms, ratio = done.stdout.split()
    assert int(terms) == 8
    assert float(ratio) < 0.7
