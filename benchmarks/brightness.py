"""Does a network hang on absolute intensity? One case, its grey values changed, scored again.

    python benchmarks/brightness.py runs/last.pt data/vessels poon2015_plaqueVessels

Each change is one that another microscope might make; the first row is the volume as it is.
"""

import argparse
import functools
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from patches import intensity
from runtime import checkpoint, config, sliding_window
from runtime.members import build_network
from scoring import metrics
from volumes import casefile
from volumes.processes import cores

CHANGES = {
    "as it is": lambda x: x,
    "a quarter as bright, rounded to uint8": lambda x: np.round(x / 4),
    "0.6 x + 90, cut at 255": lambda x: np.clip(0.6 * x + 90, 0, 255),
    "uint16, 180 x + 3000": lambda x: 180 * x + 3000,
    "gamma 0.5": lambda x: 255 * (x / 255) ** 0.5,
    "gamma 1.6": lambda x: 255 * (x / x.max()) ** 1.6,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ckpt")
    parser.add_argument("root")
    parser.add_argument("case")
    parser.add_argument("--spacing", type=float, nargs=3, default=(5.0, 1.0, 1.0))
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    state = checkpoint.load(arguments.ckpt)
    settings = config.build(state["config"])
    network, _ = build_network(state, arguments.ckpt)
    case = casefile.read_dataset(arguments.root).cases[arguments.case]
    with h5py.File(case.path) as file:
        image = file["image"][:].astype(np.float64)
        label = file["label"][:]
    foreground = np.isin(label, state["data"]["foreground"])
    truth = np.where(label == case.ignore_label, label, foreground)
    for name, change in CHANGES.items():
        changed = np.round(change(image)).astype(np.float32)
        about = data.normalisation(
            casefile.intensity_statistics(changed), settings.data.percentiles
        )
        normalize = functools.partial(intensity.normalise, **about)
        window = settings.window_arguments()
        probs = sliding_window.predict_volume(network, changed, normalize=normalize, **window)[0]
        mask = probs >= settings.inference.threshold
        scores = metrics.score(mask, truth, arguments.spacing, case.ignore_label, 2.0)
        print(f"{name:40s} dice {scores['dice']:.3f} surface dice {scores['surface_dice']:.3f}")


if __name__ == "__main__":
    main()
