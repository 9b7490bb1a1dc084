"""Three classes against one foreground: time and memory of a training step and of a prediction.

    python benchmarks/classes.py [--steps 15] [--shape 160 320 320]

The network and loss of configs/arteries_veins.yaml on its phantoms: all classes as one foreground,
by a softmax, and as three regions. Steps take turns in one process of one thread, and medians are
compared. Memory is the largest resident size of a run of train.py, and of infer.py on a volume of
--shape; seconds of infer.py are those of the processor.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training_step

from runtime import build, config
from volumes import files

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "one foreground": ["data.foreground=[artery, vein, nerve]"],
    "3 classes": [],
    "3 regions": ["data.regions={artery: [artery], vein: [vein], nerve: [nerve]}"],
}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def measured(script, *words):
    """(largest resident bytes, seconds of the processor) of a script."""
    command = [sys.executable, ROOT / script, *words]
    process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{script}: expected an exit status of 0, got {status}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def seconds_of_steps(plans, count):
    """{kind: median seconds of a step} of trainers that take turns."""
    torch.set_num_threads(1)
    turns = {}
    for kind, plan in plans.items():
        patches = build.make_patches(plan)
        batch = plan.settings.training.train_batch_size
        drawn = build.augment_batch(plan, [patches[0, i] for i in range(batch)])
        trainer = training_step.Trainer(plan)
        turns[kind] = trainer, lambda ticks, drawn=drawn: drawn
    steps = {kind: [] for kind in plans}
    for number in range(-2, count):  # the first two are not counted
        for kind, (trainer, fetch) in turns.items():
            started = time.perf_counter()
            training_step.run_steps(
                lambda n, ticks, t=trainer, f=fetch: t.step(f, n, ticks), [0], plan.device
            )
            steps[kind] += [time.perf_counter() - started] * (number >= 0)
    return {kind: float(np.median(own)) for kind, own in steps.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs=3, default=(160, 320, 320))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = ["--phantom", "arteries_veins", "--cases", "2", "--shape", "48", "96", "96"]
        measured("prepare.py", *made, "--out", f"{folder}/data")
        image = np.random.default_rng(0).integers(0, 255, arguments.shape, dtype=np.uint8)
        files.write_volume(Path(folder, "image.nii"), image, spacing=(3.0, 1.0, 1.0), unit="micron")
        changes = [f"data.root={folder}/data", "data.validation=[]", "data.test=[]"]
        name, plans, rows = str(ROOT / "configs/arteries_veins.yaml"), {}, {}
        for kind, own in KINDS.items():
            one = [*changes, *own] + ["loss.class_weights=null"] * (kind == "one foreground")
            plans[kind] = build.resolve(config.load(name, one))
            runs = [f"run.folder={folder}/runs", f"run.name={kind.split()[-1]}"]
            train, _ = measured("train.py", name, *one, *runs, "training.max_steps=6")
            told = ["--ckpt", f"{folder}/runs/last.pt", "--input", f"{folder}/image.nii"]
            rows[kind] = train, *measured("infer.py", *told, "--output", f"{folder}/{kind}")
        steps = seconds_of_steps(plans, arguments.steps)
    first = next(iter(KINDS))
    print("| | step s | ratio | train.py MB | ratio | infer.py MB | ratio | infer.py s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, (train, memory, seconds) in rows.items():
        own, base = (steps[kind], train / 1e6, memory / 1e6, seconds), rows[first]
        base = steps[first], base[0] / 1e6, base[1] / 1e6, base[2]
        cells = [f"{a:.3g} | {a / b:.2f}" for a, b in zip(own, base, strict=True)]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
