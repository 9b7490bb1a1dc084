"""What infer.py predicts: volumes found by name, each checked before the first is predicted."""

import contextlib
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from volumes import casefile, files, layouts, ome_zarr
from volumes.formats import FORMATS, fault_of_writing
from volumes.statistics import blank_channels, faults_of_contrast, sampled
from volumes.volume import (
    HEADER_TOLERANCE,
    METRES,
    InputErrors,
    VolumeError,
    axes_of,
    collect_errors,
    is_spacing,
    mixed_sizes,
    unit_scale,
    with_unit,
)

UNLIKE = 2.0  # times the voxel size of training, from which on it is said
FAR = 100.0  # times that size on all axes: it must be in another unit
TURNED = str.maketrans("LPI", "RAS")  # directions of axes without their signs
STORE = ".zarr"  # of predictions that are written a box at a time
PHANTOM_SUFFIX = ".nii.gz"  # of cases that were made from no file


@dataclass(frozen=True)
class Input:
    """One volume to predict, checked. path is a case file or what files.read_image reads."""

    id: str
    path: str
    is_case: bool
    sources: tuple[str, ...]  # the file of each channel, or the raw files of a case file
    suffix: str  # of the prediction
    shape: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float] | None
    unit: str
    affine: np.ndarray | None
    header: bytes | None
    intensity: dict
    offset: tuple = (0.0, 0.0, 0.0)  # as of `ome_zarr.ZarrVolume`
    doubt: str = ""  # as of `Volume`
    remarks: tuple[str, ...] = ()

    @contextlib.contextmanager
    def voxels(self):
        """(C, D, H, W): the dataset of a case file or of a .zarr, which stays on disk, or an array.

        VolumeError, a sentence, where the file turns out to be damaged while it is read.
        """
        try:
            if self.is_case:
                with h5py.File(self.path, "r") as file:
                    yield file["image"]
            elif _is_zarr(self.path):
                yield ome_zarr.open_volume(self.path)
            else:
                yield files.read_channels(self.sources).array
        except OSError as error:
            raise VolumeError(
                f"{self.path}: expected a volume that can be read, got {error}; "
                "copy or prepare it again"
            ) from error

    @property
    def is_stored(self):
        """Whether its prediction goes into a store, a box at a time; see runtime/scrolls.py."""
        return self.suffix == STORE

    def prediction_path(self, output):
        """Where the mask of this input goes in the folder output."""
        return output / f"{self.id}{self.suffix}"


def check_inputs(texts, metadata, root, output, spacing=None):
    """(inputs, notes) of all --input texts, or of the run's own cases where there are none.

    metadata: what the checkpoint says of the run's data; root: where its case files lie; output:
    the folder of the predictions; spacing: z, y, x of the inputs that state none, in the unit of
    the run. InputErrors with every fault, if there is one.
    """
    faults, notes, inputs = [], [], []
    if spacing is not None and not is_spacing(spacing):
        raise ValueError(f"--spacing: expected three numbers above 0, got {with_unit(spacing, '')}")
    sources = {}  # {Source: whether its id is not given by a pattern}
    with collect_errors(faults):
        if not texts:
            texts, reason = default_inputs(metadata, root)
            notes.append(f"inputs     {reason}")
    for text in texts:
        with collect_errors(faults):
            sources |= dict.fromkeys(_find(text, notes), "{id}" not in text)
    bare = [s for s, is_bare in sources.items() if is_bare and not _case_attributes(s.path)]
    named = [(source.id, [source.path]) for source in sources if source not in bare]
    for case_id, paths in named + layouts.stack_channels(bare, (), faults):
        with collect_errors(faults):
            volume = _inspect(case_id, paths, metadata)
            if spacing is not None:
                volume = _with_spacing(volume, spacing, metadata["unit"])
            inputs.append(volume)
            faults += faults_of(volume, metadata)
            notes += [f"note: {volume.path}: {remark}" for remark in volume.remarks]
            notes += [f"warning: {volume.path}: {doubt}" for doubt in doubts(volume, metadata)]
    if files.suffix_of(output) == STORE and len(inputs) == 1:
        inputs = [replace(inputs[0], id=files.stem_of(output), suffix=STORE)]
    faults += _output_faults(inputs, output)
    if faults:
        raise InputErrors(*faults)
    if bare := [volume.id for volume in inputs if volume.spacing is None]:
        notes.append(
            f"note: no spacing in {files.few(bare)}: masks state none either, and evaluate.py will "
            "measure in voxels; give --spacing Z Y X"
        )
    for folder in dict.fromkeys(Path(volume.path).parent for volume in inputs if volume.is_case):
        notes += _other_ids(folder, metadata)
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
    """The volumes that one --input names, as [Source]; a note says which are left out."""
    if casefile.is_dataset(text):
        return [files.Source(c.id, c.path) for c in casefile.read_dataset(text).cases.values()]
    sources = files.find_volumes(text, notes)
    images = [source for source in sources if not files.is_label_name(source.path)]
    if images and len(images) < len(sources):
        notes.append(f"{text}: {len(sources) - len(images)} files named as labels left out")
    return images or sources


def _case_attributes(path):
    """The attributes of a case file that prepare.py wrote; none of any other file."""
    # HDF5 raises these for what is no HDF5, and for damaged bytes, which are named on reading.
    with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r") as file:
        return dict(file.attrs) if "image" in file and "intensity" in file.attrs else {}
    return {}


def _is_zarr(path):
    return files.suffix_of(path) == STORE


def _inspect_zarr(case_id, path, metadata):
    """The `Input` of a .zarr, of the level that is nearest to the voxels of training."""
    trained = metadata.get("stored_spacing", metadata.get("trained_spacing")) or (0, 0, 0)
    # Voxels that are coarser than 1.6+ are not resampled, so the level must not be coarser.
    sizes = [
        float(own[:-1]) / ome_zarr.COARSER if isinstance(own, str) else own
        for own in metadata["spacing"]
    ]
    wanted = [own or stored for own, stored in zip(sizes, trained, strict=True)]
    volume = ome_zarr.open_volume(path, wanted=wanted, unit=metadata["unit"])
    path = path.rstrip("/")
    if volume.level and not path.endswith(f"/{volume.level}"):
        path = f"{path}/{volume.level}"
    sample = sampled(volume)
    files.check_image(path, sample)
    intensity = casefile.intensity_statistics(sample)
    channels, *shape = volume.shape
    grid = (tuple(shape), channels, volume.spacing, volume.unit, None, None)
    return Input(case_id, path, False, (path,), STORE, *grid, intensity, volume.offset)


def _inspect(case_id, paths, metadata):
    """The `Input` of a case file, a .zarr, or of any other volume, which is read whole for this."""
    path = paths[0]
    if len(paths) > 1 and any(map(_is_zarr, paths)):
        raise VolumeError(
            f"{path}: expected all channels in one .zarr, got {', '.join(paths)}; store them in one"
        )
    if _is_zarr(path):
        return _inspect_zarr(case_id, path, metadata)
    if attributes := _case_attributes(path):
        case, source = casefile.read_case(path), str(attributes["source_image"])
        sources = (source, *source.split(", "), str(attributes["source_label"]))
        suffix = _written_as(files.suffix_of(source) or PHANTOM_SUFFIX)
        affine, header = attributes.get("affine"), attributes.get("nifti_header")
        header = None if header is None else header.tobytes()
        grid = (case.shape, case.channels, case.spacing, case.unit, affine, header)
        return Input(case.id, path, True, sources, suffix, *grid, case.intensity)
    volume = files.read_channels(paths)
    channels, *shape = volume.array.shape
    grid = (tuple(shape), channels, volume.spacing, volume.unit, volume.affine, volume.header)
    intensity = casefile.intensity_statistics(volume.array)
    about = {"doubt": volume.doubt, "remarks": tuple(volume.remarks())}
    suffix = _written_as(files.suffix_of(path))
    return Input(case_id, volume.path, False, tuple(paths), suffix, *grid, intensity, **about)


def _written_as(suffix):
    """The suffix of a prediction for an image of this one; the same where none can be written."""
    return FORMATS[suffix].written_as or suffix


def _with_spacing(volume, spacing, unit):
    """The input with a spacing that was given by hand; VolumeError where it states another."""
    if volume.spacing is None:
        return replace(volume, spacing=tuple(spacing), unit=unit)
    stated = np.multiply(volume.spacing, unit_scale(volume.unit, unit))
    if not np.allclose(stated, spacing, rtol=HEADER_TOLERANCE, atol=0.0):
        raise VolumeError(
            f"{volume.path}: expected no spacing of its own, or that of --spacing, "
            f"{with_unit(spacing, unit)}, got {with_unit(volume.spacing, volume.unit)}; leave "
            "--spacing out, or correct the file that is wrong with prepare.py --spacing Z Y X"
        )
    return volume


def faults_of(volume, metadata):
    """What keeps a network that was trained on such data from predicting an input."""
    spacing, unit = metadata["spacing"], metadata["unit"]
    for fault in faults_of_contrast(volume.intensity):
        yield f"{volume.path}: expected {fault}"
    if volume.channels != metadata["channels"]:
        yield (
            f"{volume.path}: expected {metadata['channels']} channels as in training, got "
            f"{volume.channels}; store the same channels in one file, or in files called "
            "ID_0000, ID_0001 and on (a pattern such as 'folder/{id}.tif' tells ids from channels)"
        )
    usable = volume.spacing is None or is_spacing(volume.spacing)
    if not usable or (volume.spacing is None and any(spacing)):
        got = "none" if volume.spacing is None else list(volume.spacing)
        why = f", because the run works at {spacing} {unit}" if any(spacing) else " above 0"
        advice = "give one (--spacing Z Y X)"
        if volume.spacing is not None:
            advice = "prepare the volume with prepare.py --spacing Z Y X"
        yield f"{volume.path}: expected a spacing{why}, got {got}; {advice}"
    if any(spacing) and volume.doubt:
        yield (
            f"{volume.path}: {volume.doubt}; correct the header, or prepare the volume with "
            "prepare.py --spacing Z Y X"
        )
    ratios, trained = _beside_training(volume, metadata)
    if unit in METRES and ratios and (min(ratios) > FAR or max(ratios) < 1 / FAR):
        yield (
            f"{volume.path}: expected voxels of about {with_unit(trained, unit)} as in training, "
            f"got {with_unit(volume.spacing, volume.unit)}; correct the unit, or prepare the "
            f"volume with prepare.py --spacing Z Y X --unit {unit}"
        )
    elif any(spacing) and volume.unit and unit and volume.unit != unit:
        yield (
            f"{volume.path}: expected a spacing in {unit} as in training, got {volume.unit}; "
            f"prepare the volume with prepare.py --spacing Z Y X --unit {unit}"
        )


def doubts(volume, metadata):
    """Clauses on what may make the prediction of an input worse than those in training."""
    for channel, value in blank_channels(volume.intensity).items():
        yield f"channel {channel} is {value:g} in all voxels"
    known, unit = metadata.get("axes"), metadata["unit"]  # none in older versions
    axes = known and volume.affine is not None and axes_of(volume.affine)
    if axes and axes not in known:
        turned = axes.translate(TURNED) not in [own.translate(TURNED) for own in known]
        yield (
            f"its axes x, y, z run to {axes}, in training to {' or '.join(known)}: they are "
            f"{'swapped' if turned else 'mirrored'}, and volumes are not turned; turn it first"
        )
    ratios, trained = _beside_training(volume, metadata)
    if not ratios:
        return
    extremes = metadata.get("stored_range", [trained, trained])  # none in older versions
    sizes = np.multiply(ratios, trained).tolist()
    sizes = zip(sizes, metadata["spacing"], *extremes, strict=True)
    far = False
    for size, wanted, low, high in sizes:
        coarse = size > high * UNLIKE and (not wanted or isinstance(wanted, str))  # of 1.6+
        far |= coarse or (not wanted and size < low / UNLIKE)
    orders = np.divide([*itertools.permutations(volume.spacing)], trained)  # z, y, x is the first
    spreads = (orders.max(axis=1) / orders.min(axis=1)).tolist()
    swapped = spreads[0] > UNLIKE * min(spreads)
    if far or swapped:
        yield (
            f"voxels of {with_unit(volume.spacing, volume.unit)}, where training had "
            f"{', '.join([with_unit(trained, unit), *mixed_sizes(extremes).values()])}"
            + "; they are not resampled" * far
            + "; are its axes in another order than z, y, x?" * swapped
        )


def _beside_training(volume, metadata):
    """([voxel size as a share of that in training], that in training), z, y, x; [] if unknown."""
    trained = metadata.get("stored_spacing", metadata.get("trained_spacing"))  # of older versions
    if volume.spacing is None or trained is None or not is_spacing(volume.spacing):
        return [], trained
    scale = unit_scale(volume.unit, metadata["unit"])
    return (np.multiply(volume.spacing, scale) / trained).tolist(), trained


def _other_ids(folder, metadata):
    """A line where the labels of a prepared folder have other classes than masks of several
    classes will have: scores would compare what is not alike."""
    if len(metadata.get("regions", ())) < 2 or not casefile.is_dataset(folder):
        return
    with contextlib.suppress(ValueError, OSError):  # its other cases may be gone
        both = casefile.read_dataset(folder).classes, metadata["classes"]
        there, here = ({name: i for name, i in one.items() if i} for one in both)
        if there != here:
            there, here = (", ".join(f"{n} {i}" for n, i in one.items()) for one in (there, here))
            yield (
                f"warning: {folder}: its labels have {there}; masks will have the ids of the "
                f"training data, {here}"
            )


def folder_of(output):
    """The folder of predictions: output, or the one in which it lies where it is a store."""
    return output.parent if files.suffix_of(output) == STORE else output


def _output_faults(inputs, output):
    """Predictions that cannot be written where they belong, as sentences."""
    if files.suffix_of(output) == STORE:
        if len(inputs) > 1:
            named = files.few([volume.path for volume in inputs])
            yield f"--output {output}: expected one input for one .zarr, got {named}; give a folder"
            return
        output = folder_of(output)
    elif files.suffix_of(output):
        yield f"--output {output}: expected a folder or a .zarr, got the name of a file"
    by_id, read = {}, set()
    for volume in inputs:
        by_id.setdefault(volume.id, []).append(volume)
        for path in (volume.path, *volume.sources):
            read.add(Path(files.split_dataset(path)[0]).resolve())
    for case_id, volumes in by_id.items():
        target = volumes[0].prediction_path(output)
        if len(volumes) > 1:
            yield (
                f"{target}: expected one input for this prediction, got several of id {case_id}, "
                f"{', '.join(volume.path for volume in volumes)}; give one of them"
            )
        if volumes[0].is_stored:
            if around := {*target.resolve().parents} & read:
                yield (
                    f"{target}: expected a path outside of the input, got one inside of "
                    f"{around.pop()}; give another --output"
                )
        elif fault := fault_of_writing(target, volumes[0].suffix):
            yield fault
        if target.is_dir() and not volumes[0].is_stored:
            yield f"{target}: expected a file to write, got a folder; give another --output"
        if target.resolve() in read:
            yield f"{target}: the prediction would overwrite an input; give another --output"
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"--output {output}: expected a folder that may be written; {existing} is none"
