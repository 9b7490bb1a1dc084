"""What infer.py predicts: volumes found by name, each checked before the first is predicted."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from volumes import casefile, files
from volumes.volume import InputErrors, VolumeError, collect_errors

PHANTOM_SUFFIX = ".nii.gz"  # of cases that were made from no file


@dataclass(frozen=True)
class Input:
    """One volume to predict, checked. path is a case file or what files.read_image reads."""

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

    @contextlib.contextmanager
    def voxels(self):
        """(C, D, H, W): the dataset of a case file, which stays on disk, or an array.

        VolumeError, a sentence, where the file turns out to be damaged while it is read.
        """
        with damage_named(self.path):
            if self.is_case:
                with h5py.File(self.path, "r") as file:
                    yield file["image"]
            else:
                yield files.read_image(self.path).array

    def prediction_path(self, output):
        """Where the mask of this input goes in the folder output."""
        return output / f"{self.id}{self.suffix}"


def check_inputs(texts, metadata, root, output):
    """(inputs, notes) of all --input texts, or of the run's own cases where there are none.

    metadata: what the checkpoint says of the run's data; root: where its case files lie; output:
    the folder of the predictions. InputErrors with every fault, if there is one.
    """
    faults, notes, paths, inputs = [], [], [], []
    with collect_errors(faults):
        if not texts:
            texts, reason = default_inputs(metadata, root)
            notes.append(f"inputs     {reason}")
    for text in texts:
        with collect_errors(faults):
            paths += _find(text, notes)
    for case_id, path in dict.fromkeys(paths):
        with collect_errors(faults), damage_named(path):
            inputs.append(_inspect(case_id, path))
            faults.extend(_run_faults(inputs[-1], metadata))
    faults.extend(_output_faults(inputs, output))
    if faults:
        raise InputErrors(*faults)
    return inputs, notes


def default_inputs(metadata, root):
    """(case files, why these) where no --input is given: the run's test cases, else validation."""
    for key in ("test", "validation"):
        if metadata[key]:
            paths = [str(Path(root) / f"{case_id}.h5") for case_id in metadata[key]]
            if gone := [path for path in paths if not Path(path).is_file()]:
                sentence = "expected a case of the run, got no such file; if the data lie elsewhere"
                raise InputErrors(*(f"{path}: {sentence}, give data.root=DIR" for path in gone))
            return paths, f"the run's {key} cases in {root}"
    raise ValueError("--input: expected volumes, for the run has no test or validation cases")


def _find(text, notes):
    """The volumes that one --input names, as [(id, path)]; a note says which are left out."""
    index = Path(text) / casefile.DATASET_FILE
    if index.is_file() and "lamina-dataset" in index.read_text(encoding="utf-8", errors="replace"):
        return [(case.id, case.path) for case in casefile.read_dataset(text).cases.values()]
    sources = files.find_volumes(text)
    images = [source for source in sources if not files.is_label_name(source.path)]
    if images and len(images) < len(sources):
        notes.append(f"{text}: {len(sources) - len(images)} files named as labels left out")
    return [(source.id, source.path) for source in images or sources]


def _inspect(case_id, path):
    """The `Input` of a case file, or of any other volume, which is read whole for this."""
    attributes = {}
    if h5py.is_hdf5(path):  # which the name of one of its datasets is not
        with h5py.File(path, "r") as file:
            attributes = dict(file.attrs) if "image" in file else {}
    if "intensity" in attributes:  # prepare.py wrote it
        case, source = casefile.read_case(path), str(attributes["source_image"])
        sources = (*source.split(", "), str(attributes["source_label"]))
        suffix = files.suffix_of(source) or PHANTOM_SUFFIX
        grid = (case.shape, case.channels, case.spacing, case.unit, attributes.get("affine"))
        return Input(case.id, path, True, sources, suffix, *grid, case.intensity)
    volume = files.read_image(path)
    channels, *shape = volume.array.shape
    grid = (tuple(shape), channels, volume.spacing, volume.unit, volume.affine)
    intensity = casefile.intensity_statistics(volume.array)
    return Input(case_id, path, False, (), files.suffix_of(path), *grid, intensity)


def _run_faults(volume, metadata):
    """What keeps a network that was trained on such data from predicting an input."""
    spacing, unit = metadata["spacing"], metadata["unit"]
    if volume.channels != metadata["channels"]:
        yield (
            f"{volume.path}: expected {metadata['channels']} channels as in training, got "
            f"{volume.channels}; store the same channels in one file"
        )
    if not any(spacing):
        return
    if volume.spacing is None or not all(np.isfinite(s) and s > 0 for s in volume.spacing):
        got = "none" if volume.spacing is None else list(volume.spacing)
        yield (
            f"{volume.path}: expected a spacing, because the run works at {spacing} {unit}, got "
            f"{got}; prepare the volume with prepare.py --spacing Z Y X"
        )
    elif volume.unit and unit and volume.unit != unit:
        yield (
            f"{volume.path}: expected a spacing in {unit} as in training, got {volume.unit}; "
            f"prepare the volume with prepare.py --spacing Z Y X --unit {unit}"
        )


def _output_faults(inputs, output):
    """Predictions that cannot be written where they belong, as sentences."""
    by_target, read = {}, set()
    for volume in inputs:
        by_target.setdefault(volume.prediction_path(output), []).append(volume.path)
        for path in (volume.path, *volume.sources):
            read.add(Path(files.split_dataset(path)[0]).resolve())
    for target, paths in by_target.items():
        if len(paths) > 1:
            yield (
                f"{target}: expected one input for this prediction, got {', '.join(paths)}; "
                "give one of them"
            )
        if target.resolve() in read:
            yield f"{target}: the prediction would overwrite an input; give another --output"
    if files.suffix_of(output):
        yield f"--output {output}: expected a folder, got the name of a file"
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"--output {output}: expected a folder that may be written; {existing} is none"


@contextlib.contextmanager
def damage_named(path):
    """VolumeError, a sentence, for a file that is there and cannot be read."""
    try:
        yield
    except OSError as error:
        raise VolumeError(
            f"{path}: expected a volume that can be read, got {error}; copy or prepare it again"
        ) from error
