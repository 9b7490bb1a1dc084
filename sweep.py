"""Many runs from one file: variants of a config x folds x seeds, and one table of them all.

    python sweep.py configs/sweeps/losses.yaml              # one after another
    python sweep.py configs/sweeps/losses.yaml --jobs 2     # two at a time
    python sweep.py configs/sweeps/folds.yaml --print | xargs -P2 -I{} sh -c {}
    sbatch --array=0-11 ... python sweep.py SWEEP.yaml --index $SLURM_ARRAY_TASK_ID
    python sweep.py configs/sweeps/losses.yaml --report     # the table of what is done so far

Each run is train.py, then infer.py and evaluate.py on the cases that it was not trained on, each in
a process of its own. Started again after a stop or a kill, it goes on where it was; a run that
failed is tried again. What a sweep file holds is explained in runtime/jobs.py.

Leaves runs/<name of the file>/: a folder per run, ledger.jsonl (a line per run), output/ (what the
processes printed), table.csv, and report.html, one page to send to a colleague.

Exit status: 0 done; 1 a run failed, the others went on; 2 the input is wrong (one sentence per
fault, nothing written); 75 stopped early, run it again to go on.
"""

import argparse
import contextlib
import glob
import json
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from monitoring import picture
from monitoring.formatting import duration, format_bytes
from monitoring.records import parse, peaks
from runtime import comparison, folder, jobs, log, page, signals
from runtime.run import DONE, FAILED, STOPPED, WRONG_INPUT
from scoring import report
from settings import Validation
from volumes.processes import cores, describe_death

ROOT, POLL_SECONDS, OVERLAY_CASES = Path(__file__).resolve().parent, 0.2, 2
console = Console(file=log.Output(), highlight=False, soft_wrap=True, markup=False)


# ---------------------------------------------------------------------------- one run


@dataclass
class Worker:
    """Does the runs of a sweep, several at a time if wanted, and writes them into its ledger.

    plans: {name of a job: `build.Plan`}; judge: the settings that all are scored by; count: how
    many are done at a time.
    """

    plans: dict
    ledger: jobs.Ledger
    judge: Validation
    count: int
    stop: signals.Stop | None = None  # while they are done

    def do(self, job):
        """Do a run, unless it is done."""
        place = self.ledger.path.parent / "output"
        place.mkdir(parents=True, exist_ok=True)
        # The processes of a run inherit this file and its lock with it: that is held until the
        # last of them has ended, even if this process is killed.
        with open(place / job.name, "ab") as out:
            self._lock(out, job)
            if self.stop.reason() or self.ledger.done(job):
                return
            console.print(f"{job.name} {'goes on' if job.folder() else 'begins'}")
            status, reason = self._run(job, out)
            entry = {"run": job.name, "index": job.index, "variant": job.variant, "fold": job.fold}
            entry |= {"seed": job.seed, "settings": job.changes, "status": status, "reason": reason}
            entry |= {"scores": self._scores(job) if status == "done" else {}, **figures(job)}
            self.ledger.append(entry | {"time": round(time.time(), 3)})
        result = reason or f"{self.judge.score} {entry['scores'][self.judge.score]:.4f}"
        spent = f"{duration(entry['seconds'])} of training, {format_bytes(entry['peak_memory'])}"
        console.print(f"{job.name} {status}: {result} ({spent})")

    def _lock(self, out, job):
        waiting = False
        while not folder.try_lock(out) and not self.stop.reason():
            if not waiting:
                console.print(f"{job.name}: another process does it; waiting for its end")
            waiting = True
            time.sleep(1)

    def _run(self, job, out):
        """(status, reason) of the processes of a run, one after another."""
        for command in self._commands(job):
            code, line = self._process(command, out)
            if code == DONE:
                continue
            reason = f"{command[0]} {describe_death(code)}" + (f": {line}" if line else "")
            if code != STOPPED and not self.stop.why:
                return "failed", reason
            self.stop.why = self.stop.why or f"{job.name} stopped: {why_stopped(job)}"
            return "stopped", self.stop.why
        return "done", None

    def _commands(self, job):
        """The commands of a run, each made when those before it have ended well."""
        threads = job.settings.run.threads or max(1, cores() // self.count)
        overrides = [*job.overrides, f"run.threads={threads}"]
        yield ["train.py", job.config, "--resume", *overrides]
        run, plan = job.folder(), self.plans[job.name]
        predictions, checkpoint = run / "predictions", run / "checkpoints" / "last.pt"
        paths = [case.path for case in jobs.held_out(plan)]
        ids = [glob.escape(case.id) for case in jobs.held_out(plan)]
        yield ["infer.py", "--ckpt", checkpoint, "--output", predictions, "--input", *paths]
        yield [
            *("evaluate.py", "--pred", f"{job.name}={predictions}", "--truth", plan.dataset.root),
            *("--cases", *ids, "--foreground", *plan.foreground),
            *("--scores", *score_names(self.judge), "--rank", self.judge.score),
            *("--tolerance", self.judge.tolerance, "--out", run / "scores.json"),
            *("--overlays", run, "--overlay-cases", OVERLAY_CASES),
        ]

    def _process(self, command, out):
        """(exit status, its last line on stderr) of a script, which a reason to stop ends."""
        words = [sys.executable, ROOT / command[0], *command[1:]]
        with open(f"{out.name}.errors", "w+b") as errors:
            process = subprocess.Popen(list(map(str, words)), stdout=out, stderr=errors)
            asked = False
            while process.poll() is None:
                if self.stop.reason() and not asked:
                    process.terminate()
                    asked = True
                time.sleep(POLL_SECONDS)
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().split("\n")
        return process.returncode, lines[-1]

    def _scores(self, job):
        rows = cases_of(job)
        return {n: statistics.fmean(row[n] for row in rows) for n in score_names(self.judge)}


def score_names(judge):
    return list(dict.fromkeys([judge.score, *judge.scores]))


def cases_of(job):
    """What evaluate.py says of each case of a run that is done."""
    return json.loads((job.folder() / "scores.json").read_text())["cases"]


def figures(job):
    """Seconds of training steps and peak memory, as far as the files of a run tell."""
    run = job.folder() or Path(job.settings.run.folder, job.name)
    seconds, step, readings = 0.0, 0, []
    with contextlib.suppress(FileNotFoundError):
        for event in log.read_log(run / "log.jsonl"):
            if event["event"] == "step":
                seconds += (event["step"] - step) * event["step_seconds"]
                step = event["step"]
        readings = [*filter(None, map(parse, (run / "system.jsonl").read_bytes().splitlines()))]
    memory, gpu_memory = peaks(readings)
    return {
        "seconds": round(seconds, 2), "peak_memory": memory, "peak_gpu_memory": gpu_memory
    }  # fmt: skip


def why_stopped(job):
    events = log.read_log(job.folder() / "log.jsonl")
    return next((e["reason"] for e in reversed(events) if e["event"] == "stop"), "no reason given")


# ---------------------------------------------------------------------------- all runs


def do_all(worker, chosen, count):
    """Do the chosen runs, `count` at a time; the exit status."""
    with signals.Stop() as worker.stop, ThreadPoolExecutor(count) as pool:
        for _ in pool.map(worker.do, chosen):
            pass
    if worker.stop.why:
        return STOPPED
    return DONE if all(worker.ledger.done(job) for job in chosen) else FAILED


def write_report(all_jobs, ledger, sweep_file):
    """Print the tables of the runs that are in the ledger; write table.csv and report.html."""
    judge, entries = all_jobs[0].settings.validation, ledger.entries()
    done = [job for job in all_jobs if entries.get(job.name, {}).get("status") == "done"]
    runs = [comparison.Scored(job.variant, job.place, cases_of(job)) for job in done]
    names, first = score_names(judge), all_jobs[0].variant
    rows = [row for name in names for row in comparison.compare(runs, name, first)]
    shown = [entries[job.name] for job in all_jobs if job.name in entries]
    if rows:
        wide = Console(width=None if console.is_terminal else 160, highlight=False, markup=False)
        comparison.print_table(wide, rows, judge.score)
        report.write_csv(ledger.path.parent / "table.csv", [row._asdict() for row in rows])
    folders = {}
    for job in done:
        folders.setdefault(job.variant, []).append(job.folder())
    figures = [("Curves of all runs", picture.draw_runs(folders, judge.score))] if done else []
    page.write_page(
        ledger.path.parent / "report.html",
        f"Sweep {ledger.path.parent.name}: {len(done)} of {len(all_jobs)} runs done",
        rows,
        shown,
        score=judge.score,
        names=names,
        figures=figures + worst_pictures(done, judge.score),
        about={str(sweep_file): Path(sweep_file).read_text()},
    )
    for entry in shown:
        if entry["status"] != "done":
            console.print(f"{entry['run']} {entry['status']}: {entry['reason']}")
    console.print(
        f"wrote {ledger.path.parent / 'report.html'}; {len(done)} of {len(all_jobs)} done"
    )


def worst_pictures(done, score):
    """[(title, PNG)]: of each variant, the picture of the run whose worst case is the worst."""
    worst = {}
    for job in done:
        (row, *_) = report.worst_first(cases_of(job), job.name, score)
        worst.setdefault(job.variant, []).append({**row, "method": job.variant, "run": job})
    pictures = []
    for variant, rows in worst.items():
        run = report.worst_first(rows, variant, score)[0]["run"]
        png = (run.folder() / f"{run.name}.png").read_bytes()
        pictures.append((f"{variant}: the worst cases of {run.name}", png))
    return pictures


# ---------------------------------------------------------------------------- command line


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, task = parser.add_argument, parser.add_mutually_exclusive_group()
    add("sweep", metavar="SWEEP.yaml", help="a config, what to change in it, folds and seeds")
    add("--jobs", type=int, default=1, metavar="N", help="runs at one time; default 1")
    add("--index", type=int, metavar="I", help="do run I alone, counted from 0")
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
        chosen = all_jobs if index is None else [all_jobs[index]]
        if arguments.print:
            script = [sys.executable, str(ROOT / "sweep.py"), path, "--index"]
            print(*(shlex.join([*script, str(job.index)]) for job in chosen), sep="\n")
            return DONE
        ledger = jobs.Ledger(place / "ledger.jsonl")
        plans = {} if arguments.report else jobs.check(all_jobs)
        if arguments.report and not ledger.path.exists():
            raise ValueError(f"{path}: expected runs of it in {place}, got none; run it first")
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    status = DONE
    try:
        if not arguments.report:
            worker = Worker(plans, ledger, all_jobs[0].settings.validation, arguments.jobs)
            status = do_all(worker, chosen, arguments.jobs)
        if status == STOPPED:
            console.print(f"stopped: {worker.stop.why}; go on with: python sweep.py {path}")
        elif index is None or len(ledger.entries()) == len(all_jobs):
            write_report(all_jobs, ledger, path)
    except OSError as error:
        print(f"{place}: the sweep cannot go on ({error})", file=sys.stderr)
        return FAILED
    return status


if __name__ == "__main__":
    with signals.listening():
        sys.exit(main())
