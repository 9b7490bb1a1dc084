"""model.py with norm_mish.py, in a folder of their own, is a network to build and to train."""

import shutil
import subprocess
import sys
from pathlib import Path

USE = """
import torch
from model import UNet3D, derive_kernels, derive_strides

torch.manual_seed(0)
patch, spacing = (16, 32, 32), (2.0, 1.0, 1.0)
strides = derive_strides(patch, spacing, 3)
kernels = derive_kernels(patch, spacing, strides)
network = UNet3D(
    1, 1, base=4, multipliers=(1, 2, 4), blocks=1, strides=strides, kernels=kernels,
    dropout=0.0, deep_supervision=True,
)
logits = network(torch.randn(2, 1, *patch))
sum(scale.square().mean() for scale in logits).backward()
norms = [weight.grad.norm() for weight in network.parameters()]
assert all(norm.isfinite() for norm in norms) and sum(norms) > 0
assert network.eval()(torch.randn(1, 1, *patch)).shape == (1, 1, *patch)
print(len(logits), tuple(logits[0].shape))
"""


def test_model_and_norm_mish_alone_build_the_network_and_run_it_both_ways(tmp_path):
    for name in ("model.py", "norm_mish.py"):
        shutil.copy(Path(__file__).parents[1] / name, tmp_path)
    command = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')\n" + USE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 (2, 1, 16, 32, 32)\n"
