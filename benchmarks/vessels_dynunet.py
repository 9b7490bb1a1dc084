"""The peer on real vessels: MONAI's DynUNet, trained as its tutorials do, scored by metrics.py.

    python prepare.py --images DIR --labels DIR --out data/vessels
    .venv-bench/bin/python benchmarks/vessels_dynunet.py data/vessels --minutes 10

Same training and test cases as configs/vessels.yaml, same number of threads; filters 16 to 128,
Dice + cross-entropy, fp32, whole volumes normalised over non-zero voxels, patches balanced between
foreground and background, flips, quarter turns, intensity scale and shift. Prints the scores and
leaves nothing on disk. Needs requirements-bench.txt.
"""

import argparse
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from monai import transforms as mt
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scoring import metrics
from volumes import casefile

PATCH = (12, 96, 96)
SPACING = (5.0, 1.0, 1.0)  # of the published comparison


def load(case):
    with h5py.File(case.path) as file:
        image = file["image"][:].astype(np.float32)
        return {"image": image, "label": file["label"][:][None].astype(np.int64)}


def build():
    kernels = [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)]
    strides = [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)]
    return DynUNet(
        3, 1, 2, kernels, strides, strides[1:], filters=(16, 32, 64, 128), norm_name="instance"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dataset = casefile.read_dataset(arguments.root)
    normalise = mt.NormalizeIntensityd("image", nonzero=True)
    keys = ("image", "label")
    draw = mt.Compose(
        [
            mt.SpatialPadd(keys, PATCH),
            mt.RandCropByPosNegLabeld(keys, "label", PATCH, pos=1, neg=1, num_samples=2),
            mt.RandFlipd(keys, prob=0.5, spatial_axis=1),
            mt.RandFlipd(keys, prob=0.5, spatial_axis=2),
            mt.RandRotate90d(keys, prob=0.5, spatial_axes=(1, 2)),
            mt.RandScaleIntensityd("image", factors=0.25, prob=0.5),
            mt.RandShiftIntensityd("image", offsets=0.25, prob=0.5),
        ]
    ).set_random_state(seed=0)
    volumes = [
        normalise(load(c)) for c in dataset.cases.values() if c.id.startswith("burgess2014_")
    ]
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    started, step = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 60 * arguments.minutes:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - elapsed / (60 * arguments.minutes)) ** 0.9
        drawn = draw(volumes[step % len(volumes)])
        image = torch.stack([torch.as_tensor(d["image"]) for d in drawn])
        label = torch.stack([torch.as_tensor(d["label"]) for d in drawn])
        loss = loss_of(network(image), label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {elapsed:.0f} s loss {loss.item():.4f}", flush=True)

    network.eval()
    for case in (c for c in dataset.cases.values() if c.id.startswith("poon2015_")):
        stored = load(case)
        image = torch.as_tensor(normalise(dict(stored))["image"])[None]
        with torch.inference_mode():
            logits = sliding_window_inference(image, PATCH, 2, network, 0.25, mode="gaussian")
        mask = logits.argmax(1)[0].numpy().astype(np.uint8)
        scores = metrics.score(mask, stored["label"][0], SPACING, None, 2.0)
        print(case.id, f"{step} steps", {k: round(v, 4) for k, v in scores.items()})


if __name__ == "__main__":
    main()
