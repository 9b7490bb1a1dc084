"""A trained network in Python: arrays in, probabilities and a mask out.

    from runtime.arrays import load_network

    network = load_network("runs/best.pt")
    probs, mask = network.predict(image, spacing=(2, 0.5, 0.5))

The mask is that of infer.py for these voxels, byte for byte on a CPU with as many threads.
"""

import contextlib
import warnings
from dataclasses import dataclass

import numpy as np

import data
from runtime import ensemble, parts
from runtime.members import read_members
from runtime.precision import resolve_precision
from runtime.sliding_window import resolve_device
from volumes import inputs
from volumes.statistics import intensity_statistics
from volumes.volume import InputErrors, is_spacing


def load_network(*paths, settings=()):
    """The `TrainedNetwork` of a checkpoint; of several, or a sweep folder, the ensemble.

    settings: as on the command line of infer.py, such as ["inference.flips=true",
    "run.device=cpu"]. ValueError names every fault.
    """
    members = read_members(paths)
    joint, _ = ensemble.joint_settings(members, settings)
    joint.inference.save_probabilities = True
    device, _ = resolve_device(joint.run.device)
    precision, _ = resolve_precision(joint.training.precision, device)
    metadata = ensemble.joint_metadata(members)
    return TrainedNetwork(members, joint, metadata, device, precision)


class TrainedNetwork(ensemble.Predictor):
    """networks: those of the checkpoints, in eval mode; settings, metadata: what they know."""

    def predict(self, image, spacing=None):
        """(probabilities, mask) of an image (D, H, W), or (C, D, H, W), of any real dtype.

        spacing: of its voxels (z, y, x), in the unit of training; None: unknown, which a run with
        data.spacing refuses.
        probabilities: (D, H, W) float32, of several classes {name: (D, H, W)}; mask: (D, H, W)
        uint8 as infer.py writes it, 0 and 1 or the ids of classes. With
        inference.save_disagreement=true (probabilities, mask, disagreement): that of regions that
        may overlap by name, else one (D, H, W) float32. ValueError, a line per fault; what infer.py
        warns of is a UserWarning.
        """
        volume = self._checked(np.asarray(image), spacing)
        whole = parts.assemble(volume.shape[0], self.slabs(volume))
        maps = [self.regions_of(whole, kind) for kind in ("probabilities", "disagreement")]
        probs, *disagreement = [own if len(own) > 1 else own.popitem()[1] for own in maps if own]
        return probs, self.outputs.paint(self.masks(volume, whole)), *disagreement

    def _checked(self, image, spacing):
        channels = self.metadata["channels"]
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or len(image) != channels or not image.size:
            layout = "(D, H, W) or (C, D, H, W)" if channels == 1 else "(C, D, H, W)"
            raise ValueError(
                f"image: expected an array {layout} with {channels} channels as in training, got "
                f"the shape {image.shape}"
            )
        if image.dtype.kind not in "uif" or not np.isfinite(image).all():
            got = "NaN or infinite ones" if image.dtype.kind == "f" else f"dtype {image.dtype}"
            raise ValueError(f"image: expected finite real numbers, got {got}")
        if spacing is not None and (np.shape(spacing) != (3,) or not is_spacing(spacing)):
            raise ValueError(f"spacing: expected 3 numbers above 0 (z, y, x), got {spacing}")
        unit, intensity = self.metadata["unit"], intensity_statistics(image)
        volume = _ArrayVolume(image, image.shape[1:], channels, spacing, unit, intensity)
        faults = [*inputs.faults_of(volume, self.metadata)]
        if not faults and spacing is not None:
            grid = spacing, self.metadata["spacing"], unit
            window = self.settings.inference.window
            faults += data.spacing_faults(volume.path, volume.shape, window, *grid)
        if faults:
            raise InputErrors(*faults)
        for doubt in inputs.doubts(volume, self.metadata):
            warnings.warn(f"image: {doubt}", stacklevel=3)
        return volume


@dataclass(frozen=True)
class _ArrayVolume:
    """What is asked of an `inputs.Input`. array (C, D, H, W)."""

    array: np.ndarray
    shape: tuple
    channels: int
    spacing: tuple | None
    unit: str
    intensity: dict
    path: str = "image"
    affine: None = None
    doubt: str = ""

    @contextlib.contextmanager
    def voxels(self):
        yield self.array
