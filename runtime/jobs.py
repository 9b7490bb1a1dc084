"""A sweep: the runs that its file asks for, what they are checked for, and their ledger.

config: configs/quickstart.yaml      # the settings that all runs begin with
settings: {training.max_epochs: 1}   # changes of all runs
variants: {bce: {}, cldice: {loss.cldice.weight: 0.2}}   # or grid: {optim.lr: [1e-3, 2e-3]}
folds: 5                             # of a cross-validation; left out: the config's own split
seeds: [0, 1]                        # left out: the config's
"""

import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from monitoring.records import append_line, read_lines
from runtime import build, config
from runtime.folder import newest_run_folder
from scoring.classes import MEAN, described, split_name
from settings import Group, Settings, Validation, Whole
from volumes import atomic
from volumes.volume import collect_errors

FROM_THE_SWEEP = {  # keys that no change may set, and where they come from
    "run.name": "the names under variants",
    "run.seed": "seeds",
    "data.folds": "folds",
    "data.fold": "folds",
    "run.folder": "settings",
}
NAME = re.compile(r"\w[\w.+-]*")
KEYS = {"run", "status", "reason", "scores", "seconds", "peak_memory", "peak_gpu_memory"}
LONGEST_VALUE = 30  # in a name, in characters


class Sweep(Group):
    """The keys of a sweep file."""

    config: str = ""
    settings: dict[str, Any] = Field(default={})
    variants: dict[str, dict[str, Any] | None] = Field(default={})
    grid: dict[str, list[Any]] = Field(default={})
    folds: Whole = 0
    seeds: tuple[Whole, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run of a sweep. fold is None where the config's own split is used."""

    index: int
    variant: str
    fold: int | None
    seed: int
    config: str  # path
    changes: dict  # {group.key: value}
    settings: Settings
    judge: Validation  # the settings that all runs are scored by: those of the first variant

    @property
    def name(self):
        """Of its folder, in that of the sweep; it ends in no number that run folders count by."""
        return self.settings.run.name

    @property
    def folder(self):
        """Where it has saved state, or None."""
        return newest_run_folder(self.settings.run.folder, self.name)

    @property
    def score_names(self):
        """What it is scored by, the main score first."""
        return list(dict.fromkeys([self.judge.score, *self.judge.scores]))

    def names_in(self, rows):
        """The scores that tables show of the rows of scores.json: of several classes the means, and
        the main score of each."""
        main, *others = [n if n in rows[0] else f"{n}/{MEAN}" for n in self.score_names]
        of_classes = [n for n in rows[0] if n.startswith(f"{split_name(main)[0]}/")]
        return list(dict.fromkeys([main, *of_classes, *others]))

    def cases(self):
        """What evaluate.py says of each case; None if the file is gone, damaged, or lacks one of
        these scores at this tolerance. The run is then scored again."""
        if self.folder is None:
            return None
        try:
            text = (self.folder / "scores.json").read_text(encoding="utf-8")
            rows = json.loads(text)["cases"]
            finite = all(math.isfinite(row[name]) for row in rows for name in self.names_in(rows))
            tolerances = {row["tolerance"] for row in rows if row["case"]}
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return rows if finite and tolerances == {self.judge.tolerance} else None


# ---------------------------------------------------------------------------- what is asked for


def expand(path):
    """(sweep folder, [`Job`]) of a sweep file; ConfigError names every fault, a line each."""
    content, path = config.read(path), Path(path)
    with config.faults_of(path):
        sweep = config.build(content, Sweep)
        if not sweep.config:
            raise config.ConfigError("config: expected the config file of the runs, got none")
        content = config.read(sweep.config)
        with config.faults_of(sweep.config):
            base = config.build(content)
        variants, folds = _variants(sweep), range(sweep.folds) if sweep.folds else [None]
        given = {"folder": sweep.settings.get("run.folder", base.run.folder)}
        folder = Path(config.build({"run": given}).run.folder, path.stem)
        jobs, faults = [], {variant: [] for variant in variants}
        places = itertools.product(variants, folds, sweep.seeds or [base.run.seed])
        for index, (variant, fold, seed) in enumerate(places):
            name = f"{variant}_seed{seed}" if fold is None else f"{variant}_fold{fold}_seed{seed}"
            changes = {**sweep.settings, **(variants[variant] or {}), "run.folder": str(folder)}
            changes |= {"run.name": name, "run.seed": seed}
            changes |= {} if fold is None else {"data.folds": sweep.folds, "data.fold": fold}
            changes = json.loads(_text(changes))
            with collect_errors(faults[variant]):
                settings = config.build(config.apply_overrides(content, overrides(changes)))
                judge = jobs[0].judge if jobs else settings.validation
                job = Job(index, variant, fold, seed, sweep.config, changes, settings, judge)
                jobs.append(job)
        _raise_any(faults)
    return folder, jobs


def overrides(changes):
    """Changes as the command line has them."""
    return [f"{key}={_text(value)}" for key, value in changes.items()]


def _text(value):
    """JSON of what YAML has given, where a date is a text."""
    return json.dumps(value, default=str)


def _variants(sweep):
    """{name: changes} of a `Sweep`; ConfigError with all that is wrong with names and keys."""
    rows = [
        dict(zip(sweep.grid, values, strict=True))
        for values in itertools.product(*sweep.grid.values())
    ]
    gridded = dict(zip(_names(rows), rows, strict=True)) if rows and sweep.grid else {}
    variants = sweep.variants or gridded or {Path(sweep.config).stem: {}}
    places = {f"variants.{name}": changes or {} for name, changes in sweep.variants.items()}
    places |= {"grid": sweep.grid, "settings": sweep.settings}
    faults = [
        f"{place}: {key} comes from {FROM_THE_SWEEP[key]}; leave it out here"
        for place, changes in places.items()
        for key in changes
        if key in FROM_THE_SWEEP and (place, key) != ("settings", "run.folder")
    ]
    faults += [
        f"variants: expected names of letters, digits and _ . + -, got {name!r}"
        for name in variants
        if not NAME.fullmatch(name)
    ]
    if sweep.variants and sweep.grid:
        faults.append("grid: expected either this or variants, got both")
    if any(not values or max(map(values.count, values)) > 1 for values in sweep.grid.values()):
        faults.append("grid: expected one value or more of each key, each once")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        faults.append(f"seeds: expected each once, got {list(sweep.seeds)}")
    if sweep.folds == 1:
        faults.append("folds: expected 2 or more, or none, got 1")
    if faults:
        raise config.ConfigError("\n".join(faults))
    return variants


def _names(rows):
    """A name that a folder can have for each of some changes: lr-0.001_cldice.weight-0.2."""
    tails, names = [key.split(".", 1)[-1] for key in rows[0]], []
    keys = [t if tails.count(t) == 1 else key for key, t in zip(rows[0], tails, strict=True)]
    for row in rows:
        values = (_text(value).strip('"')[:LONGEST_VALUE] for value in row.values())
        texts = (f"{key}-{value}" for key, value in zip(keys, values, strict=True))
        name = "_".join(re.sub(r"[^\w.+-]+", "-", text).strip("-") for text in texts)
        while name in names:  # of values that differ in nothing that a name shows
            name += "+"
        names.append(name)
    return names


def _raise_any(faults):
    """ConfigError if {variant: its faults} has any; what all share is said once, without names."""
    sentences = {}
    for variant, lines in faults.items():
        for line in lines:
            shared = all(line in others for others in faults.values())
            sentences[line if shared else f"variants.{variant}: {line}"] = None
    if sentences:
        raise config.ConfigError("\n".join(sentences))


# ---------------------------------------------------------------------------- checked with the data


def check(jobs):
    """{name of a job: its `build.Plan`}; ConfigError with every fault that the data show.

    Each variant and fold is resolved once, as a run would, for seeds change nothing there.
    """
    plans, faults, first = {}, {job.variant: [] for job in jobs}, jobs[0].variant
    for job in jobs:
        if (job.variant, job.fold) not in plans:
            with collect_errors(faults[job.variant]):
                plans[job.variant, job.fold] = build.resolve(job.settings)
    _raise_any(faults)
    ids = {place: tuple(case.id for case in held_out(plan)) for place, plan in plans.items()}
    if not all(ids.values()):
        raise config.ConfigError(
            "folds: expected labeled cases that a run is not trained on, got none; give folds, or "
            "data.validation or data.test in settings"
        )
    for job in jobs:
        cases = ids[job.variant, job.fold]
        if cases != ids[first, job.fold]:
            fault = f"data: expected the held-out cases of {first}, got {cases}"
            faults[job.variant].append(fault)
        own, others = (plans[name, job.fold].outputs for name in (job.variant, first))
        if (own.several or others.several) and own.regions != others.regions:
            faults[job.variant].append(
                f"data: expected the classes of {first}, {described(others.regions)}, got "
                f"{described(own.regions)}; scores of others do not compare"
            )
        faults[job.variant] += _changed(job, cases)
    _raise_any(faults)
    return {job.name: plans[job.variant, job.fold] for job in jobs}


def held_out(plan):
    """The labeled cases that a run is judged by: those of its fold, else test, else validation."""
    split = plan.split
    cases = split.validation if plan.settings.data.folds else split.test or split.validation
    return [case for case in cases if case.labeled]


def _changed(job, cases):
    """Faults of a run that has state, but began with other settings or held-out cases."""
    if job.folder is None:
        return []
    try:
        before = config.load(job.folder / "config.yaml").plain()
    except config.ConfigError as error:
        return [f"{error}; delete {job.folder} to do the run again"]
    after = job.settings.plain()
    after["monitor"] = before["monitor"]  # these groups may differ, but for where it began
    after["run"] = before["run"] | {"init_from": after["run"]["init_from"]}
    faults = [
        f"{job.folder}: expected the settings that it began with, got others ({line})"
        for line in config.changes(before, after)
    ]
    if (scored := job.cases()) and sorted(row["case"] for row in scored) != sorted(cases):
        faults.append(f"{job.folder}: expected the held-out cases that it began with, got {cases}")
    return [f"{fault}; rename the sweep file" for fault in faults]


# ---------------------------------------------------------------------------- ledger


class Ledger:
    """A file with a JSON object per line, to which several processes append; the last line of a
    run counts.

    run, index, variant, fold, seed; settings: {group.key: value} that differ from the config;
    groups: {held-out case: its group};
    status: done, failed or stopped; reason; scores: means over the held-out cases; seconds: of
    training steps; peak_memory, peak_gpu_memory: bytes; time: since 1970.
    """

    def __init__(self, path):
        self.path = Path(path)

    def entries(self):
        """{name of a run: its last line}; {} without a file."""
        return {line["run"]: line for line in read_lines(self.path) if line.keys() >= KEYS}

    def done(self, jobs):
        """Those of some jobs that are done, and whose scores are still there."""
        entries = self.entries()
        done = [job for job in jobs if entries.get(job.name, {}).get("status") == "done"]
        return [job for job in done if job.cases()]

    def append(self, entry):
        """Add a line, which is on disk when this returns."""
        with open(self.path, "a+b", buffering=0) as file:
            while not atomic.try_lock(file):
                time.sleep(0.01)
            append_line(file, entry)
            os.fsync(file.fileno())
