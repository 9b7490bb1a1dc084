"""What infer.py predicts: volumes found by name, each checked before the first is predicted."""

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from volumes import casefile as cases
from volumes import files as volumes

PHANTOM_SUFFIX = ".nii.gz"  # of cases that were made from no file


@dataclass(frozen=True)
class Job:
    """One volume to predict, checked. path is a case file or what volumes.read_image takes."""

    id: str
    path: str
    is_case: bool
    sources: tuple[str, ...]  # the raw files that a case file was made from
    suffix: str  # of the prediction
    shape: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float] | None
    unit: str
    affine: np.ndarray | None
    intensity: dict


def default_inputs(facts, root):
    """(case files, why these) where no --input is given: the run's test cases, else validation."""
    for key in ("test", "validation"):
        if facts[key]:
            files = [str(Path(root) / f"{case_id}.h5") for case_id in facts[key]]
            return files, f"the run's {key} cases in {root}"
    raise ValueError("--input: expected volumes, for the run has no test or validation cases")


def expand(text):
    """The volumes that one --input names, as [(id, path)], and notes on what was left out."""
    index = Path(text) / cases.DATASET_FILE
    if index.is_file() and "lamina-dataset" in index.read_text(errors="replace"):
        return [(case.id, case.path) for case in cases.read_dataset(text).cases.values()], []
    sources = volumes.find_volumes(text)
    images = [s for s in sources if not volumes.is_label_name(s.path)]
    skipped = len(sources) - len(images)
    if not images or not skipped:
        return [(s.id, s.path) for s in sources], []
    return [(s.id, s.path) for s in images], [f"{text}: {skipped} files named as labels left out"]


def is_case_file(path):
    """Whether a path is an HDF5 file that prepare.py wrote, and not one of its datasets."""
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return "intensity" in file.attrs and "image" in file


def inspect(case_id, path):
    """The `Job` of a case file or of any other volume, which is read whole for this."""
    if is_case_file(path):
        case = cases.read_case(path)
        with h5py.File(path, "r") as file:
            affine, source = file.attrs.get("affine"), str(file.attrs["source_image"])
            sources = (*source.split(", "), str(file.attrs["source_label"]))
        suffix = volumes.suffix_of(source) or PHANTOM_SUFFIX
        facts = (case.shape, case.channels, case.spacing, case.unit, affine, case.intensity)
        return Job(case.id, path, True, sources, suffix, *facts)
    volume = volumes.read_image(path)
    array = volume.array
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"{path}: expected finite voxels, got {int((~np.isfinite(array)).sum())} that are NaN "
            "or infinite; replace them, by 0 where nothing was measured"
        )
    intensity = cases.intensity_statistics(array)
    facts = (array.shape[1:], len(array), volume.spacing, volume.unit, volume.affine, intensity)
    return Job(case_id, path, False, (), volumes.suffix_of(path), *facts)


def run_faults(job, facts):
    """What keeps a network with these facts of its data from predicting a volume, as sentences."""
    if job.channels != facts["channels"]:
        yield (
            f"{job.path}: expected {facts['channels']} channels as in training, got "
            f"{job.channels}; store the same channels in one file"
        )
    if not any(facts["spacing"]):
        return
    if job.spacing is None or not all(np.isfinite(s) and s > 0 for s in job.spacing):
        got = "none" if job.spacing is None else list(job.spacing)
        yield (
            f"{job.path}: expected a spacing, because the run works at {facts['spacing']} "
            f"{facts['unit']}, got {got}; prepare the volume with prepare.py --spacing Z Y X"
        )
    elif job.unit and facts["unit"] and job.unit != facts["unit"]:
        yield (
            f"{job.path}: expected a spacing in {facts['unit']} as in training, got {job.unit}; "
            f"prepare the volume with prepare.py --spacing Z Y X --unit {facts['unit']}"
        )


def target_faults(jobs, output):
    """Predictions that cannot be written where they belong, as sentences."""
    targets = {job.path: target_path(job, output) for job in jobs}
    for target, count in Counter(targets.values()).items():
        if count > 1:
            paths = ", ".join(path for path, other in targets.items() if other == target)
            yield f"{target}: expected one input for this prediction, got {paths}; give one of them"
    read = [path for job in jobs for path in (job.path, *job.sources)]
    if volumes.suffix_of(output):
        yield f"--output {output}: expected a folder, got the name of a file"
    inputs = {Path(volumes.split_dataset(path)[0]).resolve() for path in read}
    for target in sorted(set(targets.values())):
        if target.resolve() in inputs:
            yield f"{target}: the prediction would overwrite an input; give another --output"
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"--output {output}: expected a folder that may be written; {existing} is none"


def target_path(job, output):
    return output / f"{job.id}{job.suffix}"


def check_inputs(texts, state, root, output):
    """(jobs, notes) of all inputs; ValueError names every fault, a line each."""
    facts, faults, notes, found, jobs = state["data"], [], [], [], []
    with collected(faults):
        if texts:
            for text in texts:
                with collected(faults):
                    pairs, excluded = expand(text)
                    found, notes = found + pairs, notes + excluded
        else:
            files, why = default_inputs(facts, root)
            found, notes = [(Path(file).stem, file) for file in files], [f"inputs     {why}"]
    for case_id, path in dict.fromkeys(found):
        with collected(faults), readable(path):
            jobs.append(inspect(case_id, path))
            faults.extend(run_faults(jobs[-1], facts))
    faults.extend(target_faults(jobs, output))
    if faults:
        raise ValueError("\n".join(faults))
    return jobs, notes


@contextlib.contextmanager
def collected(faults):
    """Append the sentences of a ValueError to faults instead of raising it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        faults.extend(str(error).split("\n"))


@contextlib.contextmanager
def readable(path):
    """cases.Unreadable, a sentence, for a file that is there and damaged."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cases.Unreadable(
            f"{path}: expected a volume that can be read, got {error}; copy or prepare it again"
        ) from error
