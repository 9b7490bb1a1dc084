"""Which checkpoints a prediction is of: predictions.jsonl beside the masks, a line for each.

Parts of a prediction append to one file. Of two lines on a mask the later counts.
"""

import contextlib
import json
import os
from pathlib import Path

from volumes.files import few, split_dataset
from volumes.processes import command_of

NAME = "predictions.jsonl"


def origin(path):
    """What tells a checkpoint from a later one at its path; ask before it is read."""
    file = Path(path).resolve()
    with contextlib.suppress(OSError):
        about = os.stat(file)
        return {"checkpoint": str(file), "bytes": about.st_size, "time_ns": about.st_mtime_ns}
    return {"checkpoint": str(file)}


def write(path, origins):
    """Write down what a mask was predicted with: [`origin` with the step, and with tolerance and
    unit of the scores of its run]."""
    path = Path(path)
    with open(path.with_name(NAME), "a", encoding="utf-8") as file:
        file.write(json.dumps({"file": path.name, "of": origins}) + "\n")


def read(folder):
    """{name of a mask: [origin]} of a folder, {} if nothing is known."""
    known = {}
    with contextlib.suppress(OSError), open(Path(folder) / NAME, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # it was cut off
                about = json.loads(line)
                known[about["file"]] = about["of"]
    return known


def of_each(paths):
    """What is known of each mask: [origin], or None."""
    known, files = {}, [Path(split_dataset(path)[0]) for path in paths]
    for folder in {file.parent for file in files}:
        known[folder] = read(folder)
    return [known[file.parent].get(file.name) for file in files]


def tolerances(paths):
    """{(tolerance, unit)} of validation in the runs whose predictions these are."""
    ones = [one for origins in of_each(paths) for one in origins or ()]
    return {(one["tolerance"], one["unit"]) for one in ones if "tolerance" in one}


def predictions_of_run(text):
    """Where infer.py has put the predictions of a run, which its folder or a checkpoint names; any
    other path as it is. ValueError that says how to predict, if that was not done."""
    path = Path(text).resolve()  # runs/best.pt is a link
    of_checkpoint = path.suffix == ".pt" and path.is_file()
    run = path.parent.parent if of_checkpoint else path
    if not of_checkpoint and not (run / "checkpoints").is_dir():
        if (run / "ledger.jsonl").is_file():
            raise ValueError(f"expected predictions, got {text}, a sweep; give one of its runs")
        return text
    folder = run / "predictions"
    if of_checkpoint:
        known = read(folder).values()
        there = any(path == Path(one["checkpoint"]) for of in known for one in of)
    else:
        there = folder.is_dir()
    if not there:
        raise ValueError(
            f"expected predictions, got {text}, of which there are none in {folder}; predict first "
            f"with {command_of('infer.py')} --ckpt {text}"
        )
    return str(folder)


def doubts(predictions):
    """Sentences on predictions {case: path} of several checkpoints, or of one that was saved anew
    since; none on masks of other programs."""
    cases = {}
    for case, origins in zip(predictions, of_each(predictions.values()), strict=True):
        cases.setdefault(json.dumps(origins), []).append(case)
    if len(cases) > 1:
        groups = [f"{_named(json.loads(text))} ({few(ids, 3)})" for text, ids in cases.items()]
        yield f"predictions of several checkpoints: {'; '.join(groups)}; predict all anew with one"
    for text, ids in cases.items():
        for one in json.loads(text) or ():
            now = origin(one["checkpoint"])
            if Path(one["checkpoint"]).exists() and any(one.get(key) != now[key] for key in now):
                path = one["checkpoint"]
                yield (
                    f"{few(ids, 3)}: predicted with {path} of step {one['step']}, which was saved "
                    f"anew since; predict again with {command_of('infer.py')} --ckpt {path}"
                )


def _named(origins):
    named = [f"{one['checkpoint']} of step {one['step']}" for one in origins or ()]
    return " and ".join(named) or "not by infer.py"
