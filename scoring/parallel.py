"""Scores of many cases, several at a time in processes of their own, within a memory budget.

    scorer = Scorer(inputs.ReadOptions(ignore_label=2), ("dice", "surface_dice"), tolerance=2.0)
    results = score_all(pairs, scorer, jobs=4, budget=8e9)

Small work is done in this process: another one takes two seconds to start.
"""

import contextlib
import dataclasses
import multiprocessing
import signal
from collections import deque
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from scoring import block_inputs, inputs, metrics
from volumes import files, origins
from volumes.processes import NO_MEMORY, cores, describe_death, signals_blocked, start_worker
from volumes.volume import unit_scale

BYTES_PER_VOXEL = 48  # of one case: 37 were the most seen in metrics.score, and the masks are read
BYTES_PER_PROBABILITY = 4  # of each class and method
TOLERANCE = 2.0  # of surface Dice, where nobody has asked for another one
SMALL = 4_000_000  # voxels of all cases together


class Result(NamedTuple):
    """Of one case: rows (scores and details per method), errors (sentences), and what was read."""

    rows: list
    errors: list
    masks: inputs.Masks | None  # without its voxels; None where there are errors
    failure: str = ""  # a sentence on a case whose process dies although no other runs


@dataclasses.dataclass
class Scorer:
    """scorer(pair, only_check) is the `Result` of a case; names, tolerance: see metrics.score.

    unit: of the tolerance; None: that of each case.
    """

    options: inputs.ReadOptions
    names: tuple
    tolerance: float
    unit: str | None = None
    threads: int = 1  # of one case

    def __call__(self, pair, only_check=False):
        errors, rows = [], []
        large = block_inputs.is_large(pair)
        if large:
            blocks = block_inputs.open_case(pair, self.options, self.names, errors)
            case = blocks and blocks.masks
        else:
            case = inputs.read(pair, self.options, errors)
        if case is None:
            return Result([], errors, None)
        spacing = " ".join(f"{s:g}" for s in case.spacing)
        tolerance = self.tolerance_of(case)
        details = {"tolerance": tolerance, "spacing": spacing, "unit": case.unit}
        how = (case.spacing, self.options.ignore_label, tolerance)
        which = {"names": self.names, "classes": self.options.classes}
        for method, mask in ({} if only_check else case.masks).items():
            if large:
                scores = blocks.scores(method, tolerance, self.threads)
            else:
                probs = case.probs.get(method, {})
                which["probs"] = probs if self.options.classes else probs.get(None)
                scores = metrics.score(mask, case.truth, *how, **which, threads=self.threads)
            rows.append({"case": pair.id, "method": method} | scores | details)
        return Result(rows, errors, dataclasses.replace(case, masks={}, truth=None, probs={}))

    def tolerance_of(self, case):
        """The tolerance in the unit of a case; without a spacing it is TOLERANCE voxels."""
        if self.unit is None:
            return self.tolerance
        if case.unit == inputs.VOXELS:
            return TOLERANCE
        scaled = self.tolerance * unit_scale(self.unit, case.unit)
        return float(f"{scaled:.9g}")  # a distance of just as much counts


def tolerance_of_runs(pairs, notes):
    """(tolerance, unit) of validation in the run whose predictions are scored, as of `Scorer`;
    TOLERANCE and None where there is no run, or several differ, which is noted."""
    known = origins.tolerances([path for pair in pairs for path in pair.predictions.values()])
    if len(known) == 1:
        return known.pop()
    if known:
        notes.append(f"the tolerances of the runs differ, {TOLERANCE:g} is used (--tolerance)")
    return TOLERANCE, None


def one_tolerance(rows, unit, errors, notes):
    """The tolerance of a run, given in a unit, in that of all rows, which is noted; an error if
    they have several."""
    tolerance, units = rows[0]["tolerance"], sorted({row["unit"] for row in rows})
    if len(units) > 1:
        got = ", ".join(unit or "none" for unit in units)
        errors.append(
            f"--tolerance: expected cases of one unit, for the tolerance is that of the run, got "
            f"{got}; give it"
        )
    elif units != [inputs.VOXELS]:
        text = f"{tolerance:g} {units[0] or unit}".rstrip()
        notes.append(f"the tolerance is that of the run, {text} (--tolerance)")
    return tolerance


def score_all(pairs, scorer, *, jobs=None, budget=None, progress=lambda: None):
    """[Result] in the order of pairs. After the first error, the rest is only read and checked.

    jobs: cases at one time, None: as many as there are cores, cases and budget for; budget: bytes
    of memory for all of them, but for a case on its own. progress() is called after each.
    """
    maps = len(scorer.options.probs) * len(pairs[0].predictions) if pairs else 0
    each = BYTES_PER_VOXEL + BYTES_PER_PROBABILITY * maps
    needs = [
        block_inputs.MEMORY if block_inputs.is_large(p) else each * files.voxel_count(p.truth)
        for p in pairs
    ]
    small = jobs is None and sum(needs) < SMALL * each
    wanted = 1 if small else min(jobs or cores(), len(pairs))
    scorer = dataclasses.replace(scorer, threads=max(1, cores() // max(wanted, 1)))
    results = {}
    if wanted <= 1:
        for number, pair in enumerate(pairs):
            try:
                results[number] = scorer(pair, any(result.errors for result in results.values()))
            except MemoryError as error:
                results[number] = _failure(pair, needs[number], error)
            progress()
    elif not _in_processes(pairs, needs, scorer, wanted, budget, progress, results):
        # A process died, perhaps for want of memory: the cases that are left run one at a time.
        _in_processes(pairs, needs, scorer, 1, budget, progress, results)
    return [results[number] for number in range(len(pairs))]


def _in_processes(pairs, needs, scorer, jobs, budget, progress, results):
    """Add the results that are missing, {number: Result}; False if one of several processes died.

    If there was one alone, its case has failed, and the next one gets another process.
    """
    # The largest first, so that the last one to end is a small one.
    waiting = deque(sorted(set(range(len(pairs))) - set(results), key=lambda i: -needs[i]))
    running = {}  # {future: (number, worker)}
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(worker_process({signal.SIGINT})) for _ in range(jobs)]
        while waiting or running:
            while waiting and idle:
                used = sum(needs[number] for number, _ in running.values())
                if running and budget and used + needs[waiting[0]] > budget:
                    break
                number, only_check = waiting.popleft(), any(r.errors for r in results.values())
                pool, process = idle.pop()
                future = pool.submit(scorer, pairs[number], only_check)
                running[future] = number, (pool, process)
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                number, worker = running.pop(future)
                idle.append(worker)
                try:
                    results[number] = future.result()
                except (BrokenProcessPool, MemoryError) as error:
                    if jobs > 1:
                        return False
                    results[number] = _failure(pairs[number], needs[number], error, worker)
                    idle = [stack.enter_context(worker_process({signal.SIGINT}))]
                progress()
    return True


def _failure(pair, need, error, worker=(None, None)):
    text = (
        f"{pair.id}: the process that scored it {cause_of_death(error, *worker)}, although no "
        f"other ran; it needs about {need / 1e9:.1f} GB: score it where there is more memory, or "
        "fewer --scores"
    )
    return Result([], [], None, text)


@contextlib.contextmanager
def worker_process(blocked_signals):
    """(ProcessPoolExecutor of one process, that process); it is killed at the end.

    blocked_signals do not reach the process: one that is sent to the whole process group is for the
    parent to handle. It ends with the parent even if that is killed, and where memory runs out, the
    kernel kills it first. A pool of several would break as a whole, and not say which process died.
    """
    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=start_worker)
    with signals_blocked(blocked_signals):
        pool.submit(int)  # starts the process, which inherits the mask
    (process,) = set(multiprocessing.active_children()) - before
    try:
        yield pool, process
    finally:
        process.kill()
        pool.shutdown(cancel_futures=True)


def cause_of_death(error, pool, process):
    """How the process of a broken pool ended, for people: "was killed by SIGKILL"."""
    if isinstance(error, MemoryError):
        return describe_death(NO_MEMORY)
    # A thread of the pool waits for the process too, and one of two waits gets no exit status.
    pool.shutdown()
    return describe_death(process.exitcode)
