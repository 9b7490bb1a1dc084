"""Prediction of a volume beside MONAI's sliding window, with the same network, windows and overlap.

    .venv-bench/bin/python benchmarks/inference.py                  # 160^3, windows of 64^3
    .venv-bench/bin/python benchmarks/inference.py --size 96 --window 12 96 96 --rounds 1

Each measurement is a process of its own, so that its peak memory is its own: resident bytes above
those before the prediction. Rounds go through all rows in turn, so that what else runs on the
machine meets all of them. Differences are between the probabilities of a row and the last one's;
MONAI's weights have a floor of 1e-3, and where windows do not fit it moves the last one.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model
import norm_mish
from runtime.sliding_window import predict_slabs, predict_volume

MULTIPLIERS = (1, 2, 4, 4)


def ours(network, volume, window, overlap):
    return predict_volume(network, volume, window, overlap)


def ours_by_two(network, volume, window, overlap):
    return predict_volume(network, volume, window, overlap, batch=2)


def ours_in_slabs(network, volume, window, overlap):
    """As infer.py does it: of each slab only the mask stays."""
    slabs = predict_slabs(network, volume, window, overlap)
    return np.concatenate([planes >= 0.5 for _, planes in slabs], axis=1)


def monai(network, volume, window, overlap, batch=1):
    from monai.inferers import sliding_window_inference

    def probabilities(x):  # which ours blends too
        return network(x).sigmoid()

    x, how = torch.from_numpy(volume)[None], {"overlap": overlap, "mode": "gaussian"}
    with torch.inference_mode():
        return sliding_window_inference(x, window, batch, probabilities, **how)[0].numpy()


def monai_plain(*arguments):
    """With the norm and Mish of torch, which others' networks have."""
    with mock.patch.object(norm_mish, "_operations_are_recorded", lambda: True):
        return monai(*arguments)


def monai_by_two(*arguments):
    return monai(*arguments, batch=2)


def monai_by_four(*arguments):
    return monai(*arguments, batch=4)


ROWS = (ours, ours_by_two, ours_in_slabs, monai_plain, monai, monai_by_two, monai_by_four)
ROWS = {row.__name__: row for row in ROWS}


def measure(row, arguments, path):
    """Seconds and bytes of one row; its probabilities are written to a path."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    window = tuple(arguments.window)
    strides, kernels = model.fit(window, arguments.spacing, stages=len(MULTIPLIERS))
    shape = {"base": arguments.base, "multipliers": MULTIPLIERS, "blocks": 1}
    network = model.UNet3D(1, 1, strides=strides, kernels=kernels, **shape).eval()
    volume = np.random.default_rng(0).normal(size=(1, *[arguments.size] * 3)).astype(np.float32)
    # Libraries are loaded and start their threads, in all rows alike; what that took goes back.
    ROWS[row](network, volume[:, : window[0], : window[1], : window[2]], window, 0.5)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, cpu = time.perf_counter(), time.process_time()
    probs = ROWS[row](network, volume, window, arguments.overlap)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resident("VmHWM") - before
    np.save(path, probs)
    return {"seconds": seconds, "cpu": cpu, "bytes": peak}


def resident(what="VmRSS"):
    """Bytes of this process that are in memory, or were at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", type=int, default=160)
    add("--window", type=int, nargs=3, default=[64, 64, 64])
    add("--spacing", type=float, nargs=3, default=[1, 1, 1])
    add("--overlap", type=float, default=0.5)
    add("--base", type=int, default=16)
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # a row, and where its result goes
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], arguments, arguments.measure[1])))
        return
    results = {row: [] for row in arguments.rows}
    with tempfile.TemporaryDirectory() as folder:
        paths = {row: Path(folder) / f"{row}.npy" for row in arguments.rows}
        for _ in range(arguments.rounds):
            for row, path in paths.items():
                command = [sys.executable, *sys.argv, "--measure", row, str(path)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[row].append(json.loads(out.splitlines()[-1]))
        probs = {row: np.load(path) for row, path in paths.items()}
    print("| row | s | s of CPU | MB | largest difference |\n|---|---|---|---|---|")
    for row, runs in results.items():
        seconds, cpu, size = (
            statistics.median(r[k] for r in runs) for k in ("seconds", "cpu", "bytes")
        )
        difference = "a mask"
        if probs[row].dtype != bool:
            difference = f"{np.abs(probs[row] - probs[arguments.rows[-1]]).max():.1e}"
        print(f"| {row} | {seconds:.1f} | {cpu:.1f} | {size / 1e6:.0f} | {difference} |")


if __name__ == "__main__":
    main()
