"""Many runs from one file: variants of a config x folds x seeds, and one table of them all.

    python sweep.py configs/sweeps/losses.yaml              # one after another
    python sweep.py configs/sweeps/losses.yaml --jobs 2     # two at a time
    python sweep.py configs/sweeps/folds.yaml --print | xargs -r -P2 -d '\\n' -n1 sh -c
    sbatch --array=0-11 ... python sweep.py SWEEP.yaml --index $SLURM_ARRAY_TASK_ID
    python sweep.py configs/sweeps/losses.yaml --report     # the table of what is done so far

Each run is train.py, then infer.py and evaluate.py on the cases that it was not trained on, each in
a process of its own. Started again after a stop or a kill, it goes on where it was; a run that
failed is tried again. What a sweep file holds is explained in docs/sweeps.md.

Leaves runs/<name of the file>/: a folder per run, ledger.jsonl (a line per run), output/ (what the
processes printed), table.csv, and report.html, one page to send to a colleague.

Exit status: 0 done; 1 a run failed, the others went on; 2 the input is wrong (one sentence per
fault, nothing written); 75 stopped early, run it again to go on.
"""

import argparse
import contextlib
import glob
import os
import queue
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from monitoring import picture
from monitoring.formatting import duration, format_bytes
from monitoring.records import peaks, read_lines
from runtime import comparison, folder, jobs, page, signals
from runtime.ending import DONE, FAILED, STOPPED, WRONG_INPUT
from runtime.log import read_log
from runtime.threads import of_environment
from scoring import report
from volumes import atomic
from volumes.processes import command_of, cores, describe_death, run_script

ROOT, POLL_SECONDS, OVERLAY_CASES = Path(__file__).resolve().parent, 0.2, 2
PLAIN = {"highlight": False, "markup": False, "emoji": False}
console = Console(soft_wrap=True, **PLAIN)


# ---------------------------------------------------------------------------- one run


@dataclass
class Worker:
    """Does the runs of a sweep and writes them into its ledger.

    plans: {name of a job: `build.Plan`}; count: how many are done at a time; stop: a
    `signals.Stop`, while they are done.
    """

    plans: dict
    ledger: jobs.Ledger
    count: int
    stop: signals.Stop | None = None

    def __post_init__(self):
        self.free = queue.SimpleQueue()  # of runs to come: CUDA_VISIBLE_DEVICES of each, or None
        gpus = torch.cuda.device_count()  # opens none
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")[:gpus] or [None]
        for number in range(self.count):
            self.free.put(names[number % len(names)])

    def do(self, job):
        """Do a run, unless it is done; False if another process does it at this moment."""
        path = self.ledger.path.parent / "output" / job.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The processes of a run inherit this file, and its lock with it: that is held until the
            # last of them has ended, even if this process is killed.
            with open(path, "ab") as out:
                if not atomic.try_lock(out):
                    return False
                if not (self.stop.why or self.ledger.done([job])):
                    self._do(job, out)
        except OSError as error:
            self.stop.why = self.stop.why or str(error)  # the runs beside it meet the same disk
            raise
        return True

    def _do(self, job, out):
        """Do a run, and write down what came of it."""
        gpu, environment = self.free.get(), dict(os.environ)
        begins = f"{job.name} {'goes on' if job.folder else 'begins'}"
        if gpu is not None and job.settings.run.device == "auto":
            environment["CUDA_VISIBLE_DEVICES"] = gpu
            begins += f" on GPU {gpu}"
        console.print(begins)
        try:
            status, reason = self._run(job, out, environment)
        finally:
            self.free.put(gpu)
        entry = {"run": job.name, "index": job.index, "variant": job.variant, "fold": job.fold}
        entry |= {"seed": job.seed, "settings": job.changes, "status": status, "reason": reason}
        entry["groups"] = {case.id: case.group for case in jobs.held_out(self.plans[job.name])}
        rows = job.cases() if status == "done" else None
        scores = {name: comparison.mean(rows, name) for name in job.names_in(rows)} if rows else {}
        entry |= {"scores": scores, **figures(job), "time": round(time.time(), 3)}
        self.ledger.append(entry)
        result = reason or "{} {:.4f}".format(*next(iter(scores.items())))
        spent = f"{duration(entry['seconds'])} of training, {format_bytes(entry['peak_memory'])}"
        console.print(f"{job.name} {status}: {result} ({spent})")

    def _run(self, job, out, environment):
        """(status, reason) of the processes of a run, one after another."""
        for command in self._commands(job):
            code, line = self._process(command, out, environment)
            if code == DONE:
                continue
            if code != STOPPED and not self.stop.why:
                return "failed", f"{command[0]} {describe_death(code)}" + (line and f": {line}")
            self.stop.why = self.stop.why or f"{job.name} stopped: {line}"
            return "stopped", self.stop.why
        return "done", None

    def _commands(self, job):
        """The commands of a run, each made when those before it have ended well."""
        threads = job.settings.run.threads or of_environment() or max(1, cores() // self.count)
        changes = job.changes | {"run.threads": threads}
        yield ["train.py", job.config, "--resume", *jobs.overrides(changes)]
        plan, judge, run = self.plans[job.name], job.judge, job.folder
        predictions, cases = run / "predictions", jobs.held_out(plan)
        yield [
            *("infer.py", "--ckpt", run / "checkpoints" / "last.pt", "--output", predictions),
            *("--input", *(case.path for case in cases)),
        ]
        yield [
            *("evaluate.py", "--pred", f"{job.name}={predictions}", "--truth", plan.dataset.root),
            *("--cases", *(glob.escape(case.id) for case in cases)),
            *(*classes_of(plan.outputs), "--tolerance", judge.tolerance),
            *("--scores", *job.score_names, "--rank", judge.score),
            *("--out", run / "scores.json", "--overlays", run, "--overlay-cases", OVERLAY_CASES),
        ]

    def _process(self, command, out, environment):
        """(exit status, what it says of why) of a script, which a reason to stop ends."""
        # Unbuffered, so that the last line is the one that was said last.
        words = map(str, [sys.executable, "-u", ROOT / command[0], *command[1:]])
        start, asked = out.seek(0, os.SEEK_END), False
        process = subprocess.Popen([*words], stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if self.stop.why and not asked:
                process.terminate()
                asked = True
            time.sleep(POLL_SECONDS)
        text = Path(out.name).read_bytes()[start:]
        lines = text.decode(errors="replace").strip().split("\n")
        code = process.returncode
        return code, "; ".join(lines) if code == WRONG_INPUT else lines[-1]


def classes_of(outputs):
    """The option of evaluate.py that says what a run tells apart."""
    if not outputs.several:
        return "--foreground", *outputs.foreground
    regions = outputs.regions.items()
    return "--classes", *(f"{name}={'+'.join(map(str, ids))}" for name, ids in regions)


def figures(job):
    """Seconds of training steps and peak memory, as far as the files of a run tell."""
    run = job.folder or Path(job.settings.run.folder, job.name)
    seconds, step = 0.0, 0
    for event in read_log(run / "log.jsonl"):
        if event["event"] == "step":
            seconds += (event["step"] - step) * event["step_seconds"]
            step = event["step"]
    memory, gpu_memory = peaks(read_lines(run / "system.jsonl"))
    return {"seconds": round(seconds, 2), "peak_memory": memory, "peak_gpu_memory": gpu_memory}


# ---------------------------------------------------------------------------- all runs


def do_all(worker, chosen):
    """Do the chosen runs; the exit status."""
    with (
        contextlib.suppress(KeyboardInterrupt),  # a second Ctrl-C, which the runs had too
        signals.Stop() as worker.stop,
        ThreadPoolExecutor(worker.count) as pool,
    ):
        pending = chosen
        while pending and not worker.stop.why:
            ours = [*pool.map(worker.do, pending)]
            # What other processes do, such as a sweep of the same file on another GPU, comes last.
            busy = [job for job, done in zip(pending, ours, strict=True) if not done]
            if busy and pending is chosen:
                names = ", ".join(job.name for job in busy)
                console.print(f"another process does {names}; waiting for its end")
            pending = busy
            time.sleep(POLL_SECONDS if busy else 0)
    if worker.stop.why:
        return STOPPED
    return DONE if len(worker.ledger.done(chosen)) == len(chosen) else FAILED


def write_report(all_jobs, ledger, path):
    """Print the tables of the runs that are done; write table.csv and report.html."""
    first, entries, place = all_jobs[0], ledger.entries(), ledger.path.parent
    done, folders = ledger.done(all_jobs), {}
    names = first.names_in(done[0].cases()) if done else first.score_names
    for job in all_jobs:
        if job not in done and entries.get(job.name, {}).get("status") == "done":
            reason = "its scores.json is gone, damaged or of other scores; start the sweep again"
            entries[job.name] |= {"status": "failed", "reason": reason, "scores": {}}
    runs = [(job.variant, (job.fold, job.seed), job.cases()) for job in done]
    rows = [row for n in names for row in comparison.compare(runs, n, first.variant)]
    tables, notes = [], []
    if rows:
        groups = {case: g for e in entries.values() for case, g in e.get("groups", {}).items()}
        held_out = comparison.held_out_table(runs, names, groups)
        tables = [*comparison.tables(rows, names), held_out]
        wide = Console(width=None if console.is_terminal else 160, **PLAIN)
        for table in tables:
            comparison.print_table(wide, *table)
        folds = first.fold is not None
        choosing = folds or not first.settings.data.test
        notes = [*comparison.notes(rows, folds=folds, choosing=choosing)]
        for note in notes:
            wide.print(f"note: {note}")
        report.write_csv(place / "table.csv", [row._asdict() for row in rows])
    for job in done:
        folders.setdefault(job.variant, []).append(job.folder)
    pictures = [("Curves of all runs", picture.draw_runs(folders, names[0]))] if done else []
    page.write_page(
        place / "report.html",
        f"Sweep {place.name}: {len(done)} of {len(all_jobs)} runs done",
        tables,
        notes,
        [entries[job.name] for job in all_jobs if job.name in entries],
        names=names,
        pictures=pictures + worst_pictures(done, names[0]),
        sweep_file=path,
    )
    for job in all_jobs:
        if (entry := entries.get(job.name, {})).get("reason"):
            console.print(f"{job.name} {entry['status']}: {entry['reason']}")
    console.print(f"{len(done)} of {len(all_jobs)} runs done; wrote {place / 'report.html'}")


def worst_pictures(done, score):
    """[(title, PNG)]: of each variant, the picture of the run whose worst case is the worst."""
    rows = [row | {"method": job.variant, "job": job} for job in done for row in job.cases()]
    pictures = []
    for variant in report.methods_of(rows):
        job = report.worst_first(rows, variant, score)[0]["job"]
        title, path = f"{variant}: the worst cases of {job.name}", job.folder / f"{job.name}.png"
        if path.exists():
            pictures.append((title, path.read_bytes()))
    return pictures


# ---------------------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, task = parser.add_argument, parser.add_mutually_exclusive_group()
    add("sweep", metavar="SWEEP.yaml", help="a config, what to change in it, folds and seeds")
    add("--jobs", type=int, default=1, metavar="N", help="runs at one time; default 1")
    task.add_argument("--index", type=int, metavar="I", help="do run I alone, counted from 0")
    task.add_argument("--print", action="store_true", help="print the command of each run")
    task.add_argument("--report", action="store_true", help="only the tables of what is done")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected 1 or more, got {arguments.jobs}")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    path, index = arguments.sweep, arguments.index
    try:
        place, all_jobs = jobs.expand(path)
        if index is not None and not 0 <= index < len(all_jobs):
            raise ValueError(f"--index: expected 0 to {len(all_jobs) - 1}, got {index}")
        if folder.run_folder_of(place):
            raise ValueError(f"{path}: expected a name of its own, got that of a run, {place}")
        ledger = jobs.Ledger(place / "ledger.jsonl")
        plans = {} if arguments.report else jobs.check(all_jobs)
        if arguments.print:
            done, words = ledger.done(all_jobs), (sys.executable, ROOT / "sweep.py", path)
            for job in all_jobs:
                if job not in done:
                    print(shlex.join(map(str, [*words, "--index", job.index])))
            return DONE
        if arguments.report and not ledger.path.exists():
            raise ValueError(f"{path}: expected runs of it in {place}, got none; run it first")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    worker, status = Worker(plans, ledger, arguments.jobs), DONE
    try:
        if not arguments.report:
            status = do_all(worker, all_jobs if index is None else [all_jobs[index]])
        if status == STOPPED:
            again = path if index is None else f"{path} --index {index}"
            again = f"{command_of('sweep.py')} {again}"
            console.print(f"stopped: {worker.stop.why}; go on with: {again}")
        elif index is None or {job.name for job in all_jobs} <= ledger.entries().keys():
            write_report(all_jobs, ledger, path)
    except OSError as error:
        print(
            f"{place}: the sweep cannot go on ({error}); start it again to go on", file=sys.stderr
        )
        return FAILED
    return status


if __name__ == "__main__":
    with signals.listening():
        run_script(main)
