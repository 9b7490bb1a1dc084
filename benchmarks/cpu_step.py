"""The training step on a CPU: in fp32 and bf16, and beside cores that others keep busy.

    python benchmarks/cpu_step.py configs/quickstart.yaml
    python benchmarks/cpu_step.py configs/quickstart.yaml --busy 0 1 2 --variants \
        threads "spin GOMP_SPINCOUNT=300000" "one run.threads=1"

A step is as in train.py: threads that wait spin 1000 times (300000 is OpenMP's own number),
and what a step has freed is kept for the next. Each variant is a process that waits while the
others take their steps, so that whatever else the machine does hits all of them. Variants: fp32 and
bf16, or those named. A word of a variant in capitals is a variable of its environment, others are
settings. --busy: how many cores a loop each keeps busy meanwhile, the last ones first.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def take_steps(path, overrides, steps):
    """In a variant's process: for each line of standard input some steps, the medians of
    their seconds and CPU seconds."""
    import time

    import torch

    from benchmarks import training_step
    from runtime import build, config, memory_guard, timer
    from volumes.processes import cores

    plan = build.resolve(config.load(path, ["run.device=cpu", "training.workers=0", *overrides]))
    torch.set_num_threads(plan.settings.run.threads or cores())
    torch.manual_seed(0)
    memory_guard.keep_freed()
    trainer = training_step.Trainer(plan)
    fetch = training_step.from_loader(
        plan, training_step.batches(plan, build.make_patches(plan), 10000)
    )
    number = 0
    for _ in sys.stdin:
        times = []
        for _ in range(steps):
            ticks = timer.StepTimer(plan.device)
            ticks.start()
            begun, cpu = time.perf_counter(), time.process_time()
            trainer.step(fetch, number, ticks)
            times.append((time.perf_counter() - begun, time.process_time() - cpu))
            number += 1
        print(*map(statistics.median, zip(*times, strict=True)))
        sys.stdout.flush()


class Variant:
    """A process that takes steps of a config when it is asked to."""

    def __init__(self, arguments, words):
        own = dict(w.split("=", 1) for w in words if w.split("=")[0].isupper())
        overrides = [w for w in words if w.split("=")[0] not in own]
        code = "from benchmarks import cpu_step; import sys; "
        code += "cpu_step.take_steps(sys.argv[1], sys.argv[3:], int(sys.argv[2]))"
        command = [sys.executable, "-c", code, arguments.config, str(arguments.steps), *overrides]
        spins = {"GOMP_SPINCOUNT": "1000"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        self.process = subprocess.Popen(command, env=os.environ | spins | own, **pipes)

    def seconds(self):
        """Medians of some steps: seconds, and CPU seconds of all threads."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [float(word) for word in self.process.stdout.readline().split()]


@contextlib.contextmanager
def busy(count):
    """In this context a loop runs on each of the last `count` cores."""
    pinned = sorted(os.sched_getaffinity(0))[::-1][:count]
    code = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in pinned]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--variants", nargs="*", help="variants: a name and words that make it one")
    parser.add_argument("--busy", nargs="*", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="of a variant in a round")
    arguments = parser.parse_args()
    named = arguments.variants or ["fp32 training.precision=fp32", "bf16 training.precision=bf16"]
    variants = {words.split()[0]: Variant(arguments, words.split()[1:]) for words in named}
    for variant in variants.values():
        variant.seconds()  # of warming up
    for count in arguments.busy:
        times = {name: [] for name in variants}
        with busy(count):
            for _ in range(arguments.rounds):
                for name, variant in variants.items():
                    times[name].append(variant.seconds())
        first = None
        for name, rounds in times.items():
            now = [statistics.median(column) for column in zip(*rounds, strict=True)]
            first = first or now
            ratio, of_cpu = (a / b for a, b in zip(first, now, strict=True))
            least = min(seconds for seconds, _ in rounds)
            text = f"{now[0]:.3f} s, least {least:.3f}, CPU {now[1]:.3f}"
            text += f"; first / this {ratio:.2f}, CPU {of_cpu:.2f}"
            print(f"{count} busy, {name}: {text}", flush=True)
    for variant in variants.values():
        variant.process.stdin.close()
        variant.process.wait()


if __name__ == "__main__":
    main()
