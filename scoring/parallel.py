"""Scores of many cases, side by side, within a budget of memory.

    scorer = Scorer(masks.Reading(ignore_label=2), ("dice", "surface_dice"), tolerance=2.0)
    results = score_all(pairs, scorer, jobs=4, budget=8e9)

Each case is scored in a process that keeps nothing of the one before. Small work is done here: a
process takes two seconds to start.
"""

import dataclasses
import os
from collections import deque
from typing import NamedTuple

from scoring import masks, metrics
from volumes import files as volumes

BYTES_PER_VOXEL = 48  # of one case: 37 were the most seen in metrics.score, and the masks are read
SMALL = 4_000_000  # voxels of all cases together


class ScoringError(RuntimeError):
    """A case whose process ends whenever it is scored; the message is one sentence."""


class Result(NamedTuple):
    """Of one case: rows (a dict of scores and facts per method), faults (sentences), facts."""

    rows: list
    faults: list
    stated: bool  # whether a file states the spacing
    white: dict  # see masks.Masks


@dataclasses.dataclass
class Scorer:
    """scorer[pair, only_check] is the `Result` of a case, as a plain tuple.

    names, tolerance: see metrics.score; threads: what one case may use.
    """

    reading: masks.Reading
    names: tuple
    tolerance: float
    threads: int = 1

    def __getitem__(self, task):
        pair, only_check = task
        faults = []
        found = masks.read(pair, self.reading, faults)
        if found is None:
            return tuple(Result([], faults, True, {}))
        rows = [] if only_check else [self._row(pair, found, method) for method in found.masks]
        return tuple(Result(rows, faults, found.stated, found.white))

    def _row(self, pair, found, method):
        scores = metrics.score(
            found.masks[method],
            found.truth,
            found.spacing,
            self.reading.ignore_label,
            self.tolerance,
            names=self.names,
            threads=self.threads,
        )
        about = {
            "tolerance": self.tolerance,
            "spacing": " ".join(f"{s:g}" for s in found.spacing),
            "unit": found.unit,
        }
        return {"case": pair.id, "method": method} | scores | about


def cores():
    """CPU cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not every system has it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def score_all(pairs, scorer, *, jobs=None, budget=None, progress=lambda done: None):
    """[Result] in the order of pairs. Once there is a fault, the rest is only read and checked.

    jobs: cases at one time, None: as many as there are cores, cases and budget for; budget: bytes
    of memory for all of them. One case is scored whatever it takes. progress(done) is called after
    each. ScoringError where the processes of a case die with it, however few there are.
    """
    needs = [BYTES_PER_VOXEL * volumes.voxel_count(pair.truth) for pair in pairs]
    wanted = min(jobs or cores(), len(pairs))
    if jobs is None and sum(needs) < SMALL * BYTES_PER_VOXEL:
        wanted = 1
    scorer = dataclasses.replace(scorer, threads=max(1, cores() // max(wanted, 1)))
    if wanted > 1:
        return _beside_each_other(pairs, needs, scorer, wanted, budget, progress)
    results = []
    for done, pair in enumerate(pairs, start=1):
        results.append(Result(*scorer[pair, any(result.faults for result in results)]))
        progress(done)
    return results


def _beside_each_other(pairs, needs, scorer, jobs, budget, progress):
    import workers  # late: with torch, which takes a second

    # The largest first, so that the last one to end is a small one.
    waiting = deque(sorted(range(len(pairs)), key=lambda i: -needs[i]))
    running, results, only_check = {}, {}, False
    pool = workers.Pool(scorer, jobs)
    try:
        while len(results) < len(pairs):
            while waiting and len(running) < len(pool):
                number = waiting[0]
                if running and budget and sum(running.values()) + needs[number] > budget:
                    break
                running[waiting.popleft()] = needs[number]
                pool.submit(workers.Task(number, [(pairs[number], only_check)]))
            done, dead = pool.receive(1.0)
            for number, (result,) in done.items():
                results[number] = Result(*result)
                only_check = only_check or bool(results[number].faults)
                del running[number]
                progress(len(results))
            for worker in dead:  # its case is tried again, with fewer beside it
                for number in worker.tasks:
                    waiting.appendleft(number)
                    del running[number]
                if not len(pool):
                    raise ScoringError(_death(worker, pairs[number], needs[number]))
    finally:
        pool.close()
    return [results[number] for number in range(len(pairs))]


def _death(worker, pair, need):
    import workers

    return (
        f"{pair.id}: the process that scored it {workers.death(worker.process.exitcode)}, with no "
        f"other beside it; it needs about {need / 1e9:.1f} GB: score it where there is more "
        "memory, or fewer --scores"
    )
