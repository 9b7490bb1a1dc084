"""The peer on real vessels: MONAI's DynUNet, trained as its tutorials do, judged by left_out.py.

    .venv-bench/bin/python benchmarks/vessels_dynunet.py data/vessels --minutes 10 \\
        --groups burgess2014 poon2015 santos2015 --seeds 0 1 2 --out runs/dynunet.csv

Each group in turn is the test, all other cases train. Filters 16 to 128, Dice + cross-entropy,
fp32, whole volumes normalised over non-zero voxels, patches balanced between foreground and
background, flips, quarter turns, intensity scale and shift. One thread, as in left_out.py. A row
for each group and seed is added to the CSV, rows that are there are not made again. Needs
requirements-bench.txt. Minutes are of CPU time, so that other work beside it takes none of them.
"""

import argparse
import itertools
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
import left_out

from scoring import metrics
from volumes import casefile

PATCH = (12, 96, 96)


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


def transforms(seed):
    keys = ("image", "label")
    return mt.Compose(
        [
            mt.SpatialPadd(keys, PATCH),
            mt.RandCropByPosNegLabeld(keys, "label", PATCH, pos=1, neg=1, num_samples=2),
            mt.RandFlipd(keys, prob=0.5, spatial_axis=1),
            mt.RandFlipd(keys, prob=0.5, spatial_axis=2),
            mt.RandRotate90d(keys, prob=0.5, spatial_axes=(1, 2)),
            mt.RandScaleIntensityd("image", factors=0.25, prob=0.5),
            mt.RandShiftIntensityd("image", offsets=0.25, prob=0.5),
        ]
    ).set_random_state(seed=seed)


def train(volumes, seed, minutes):
    """The network after so many minutes, and how many steps these were."""
    torch.manual_seed(seed)
    draw, network, loss_of = transforms(seed), build(), DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    started, step = time.process_time(), 0
    while (elapsed := time.process_time() - started) < 60 * minutes:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - elapsed / (60 * minutes)) ** 0.9
        drawn = draw(volumes[step % len(volumes)])
        image = torch.stack([torch.as_tensor(d["image"]) for d in drawn])
        label = torch.stack([torch.as_tensor(d["label"]) for d in drawn])
        loss_of(network(image), label).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return network.eval(), step


def predict(network, image):
    """The mask (D, H, W) of a normalised image (1, D, H, W)."""
    with torch.inference_mode():
        image = torch.as_tensor(image)[None]
        logits = sliding_window_inference(image, PATCH, 2, network, 0.25, mode="gaussian")
        return logits.argmax(1)[0].numpy().astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--groups", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(casefile.read_dataset(arguments.root).cases.values())
    normalise = mt.NormalizeIntensityd("image", nonzero=True)
    rows = left_out.read_rows(arguments.out)
    for seed, group in itertools.product(arguments.seeds, arguments.groups):
        values = ("vessels", "MONAI DynUNet", group, seed, "", f"{arguments.minutes} minutes")
        identity = dict(zip(left_out.KEYS, map(str, values), strict=True))
        if any(identity.items() <= row.items() for row in rows):
            continue
        volumes = [normalise(load(case)) for case in cases if case.group != group]
        network, steps = train(volumes, seed, arguments.minutes)
        tests = [case for case in cases if case.group == group]
        masks = [predict(network, normalise(load(case))["image"]) for case in tests]
        scores = [left_out.score_case(*pair, (1,)) for pair in zip(tests, masks, strict=True)]
        row = {key: f"{x:.4f}" for key, x in metrics.mean_scores(scores).items()} | identity
        row |= {"seconds_per_step": f"{60 * arguments.minutes / steps:.4f}", "cases": len(tests)}
        rows.append({key: str(value) for key, value in row.items()} | {"lamina": ""})
        left_out.write_rows(arguments.out, rows)
        print(row, flush=True)
    left_out.show(rows)


if __name__ == "__main__":
    main()
