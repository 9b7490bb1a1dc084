"""What only a GPU can tell, in one call of 8 minutes: tables, verdicts, gpu_check.json in --out.

    python benchmarks/gpu_check.py [--out DIR] [--sections env ladder ...] [--seconds 450]
    python benchmarks/gpu_check.py --small --device cpu      # whether it runs, in half a minute

    env         card, versions, the two ceilings: memory traffic and bf16 arithmetic
    equal       a CPU against the GPU: patches, losses and gradients, distances, windows, 30 steps
    ladder      a training step under ever less memory: what it did, its gradient, memory kept
    tests       those of tests/ that need a GPU
    train       train.py on configs/exp001_full.yaml: seconds by part, load; a run stopped and
                resumed against one that was not, bit for bit
    step        seconds and memory of a step without data: ours, and peers' on the same network
    inference   a volume of 320 voxels a side, beside MONAI's sliding window
    terms       milliseconds of each loss term, forward and backward

Sections run in this order, each for so many seconds at most and behind its own except. The JSON is
written after each measurement, so that nothing is lost. At the end the figures are held against
what is asked of them: met, NOT MET, or not measured.
Exit status: 0; 1 if something had an error; 2 if a package is missing. Verdicts do not change it.
"""

import argparse
import importlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import gpu_verdicts

ROOT = Path(__file__).resolve().parents[1]
# {module: package of requirements*.txt} without which nothing runs, and what else is of use.
NEEDED = {"yaml": "PyYAML", "cc3d": "connected-components-3d"}
NEEDED |= {n: n for n in "torch numpy scipy h5py nibabel tifffile".split()}
NEEDED |= {n: n for n in "pydantic rich psutil cripser filelock".split()}
USEFUL = {"monai": "monai", "pynvml": "nvidia-ml-py", "pytest": "pytest"}


def missing(modules):
    """Those packages that cannot be imported, with the versions that we use."""
    lines = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.txt"))
    versions, names = dict(re.findall(r"^([\w.-]+)==(\S+)", lines, flags=re.M)), []
    for module, package in modules.items():
        try:
            importlib.import_module(module)
        except ImportError:
            names.append(f"{package}=={versions[package]}")
    return names


class Late(BaseException):
    """A section has had its time; no except of a measurement may hold it up."""


def too_late(*signal_and_frame):
    raise Late


def run_section(check, name, function, most):
    """Whether a section came to its end, or to that of its time, without an error."""
    begun = time.monotonic()
    if begun > check.end:
        check.note(name, "not run", "the time was over")
        return True
    check.begin(most)
    signal.setitimer(signal.ITIMER_REAL, check.seconds_left())
    try:
        function(check)
        return True
    except (Late, subprocess.TimeoutExpired):
        check.note(name, "cut short", f"after {time.monotonic() - begun:.0f} s")
        return True
    except Exception:
        check.note(name, "error", traceback.format_exc()[-1500:])
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        check.note(name, "seconds", round(time.monotonic() - begun, 1))


def main():
    needed, useful = missing(NEEDED), missing(USEFUL)
    if needed:
        print(f"not here: {', '.join(needed)}, and nothing runs without", file=sys.stderr)
        print(f"of use, but not here: {', '.join(useful) or 'nothing'}", file=sys.stderr)
        return 2
    import gpu_sections
    import torch

    sections = gpu_sections.SECTIONS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--small", action="store_true", help="a tiny network and volume: does it run at all?")
    add("--sections", nargs="+", default=list(sections), choices=sections, metavar="NAME")
    add("--seconds", type=float, default=450.0, help="after which no section is begun or goes on")
    add("--out", type=Path, default=Path("."), help="an existing folder for gpu_check.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, got none; --small --device cpu needs none")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu: expected --small with it, got the full network")
    if not options.out.is_dir():
        parser.error(f"--out: expected a folder that is there, got {options.out}")
    signal.signal(signal.SIGALRM, too_late)
    with tempfile.TemporaryDirectory() as folder:
        check = gpu_sections.Check(options, Path(folder))
        gpu_sections.make_data(check)
        check.note("env", "not installed, but of use", useful)
        ended = [run_section(check, name, *sections[name]) for name in options.sections]
    for name, verdict in gpu_verdicts.judge(check.results, options.sections, options.small):
        check.note("verdicts", name, verdict)
    return 0 if all(ended) and not check.failed else 1


if __name__ == "__main__":
    sys.exit(main())
