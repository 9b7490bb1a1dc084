"""The settings: groups, types, units, ranges and defaults.

A config file holds differences from these only. Lists of three are z, y, x. Spacings and distances
are in the unit of the data (mm, micron, voxel).
"""

import math
import re
from typing import Annotated, Literal, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)


def _tuples(value):
    """YAML has no tuples, and strict types accept no list for one."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _one_or_each(number, *words):
    """The type of a number, {region: number}, or one of words; a fault is that of one of them."""
    kinds = {"<one>": number, "<each>": dict[str, number]} | {w: Literal[w] for w in words}

    def which(value):
        return "<each>" if isinstance(value, dict) else value if value in words else "<one>"

    kinds = tuple(Annotated[kind, Tag(tag)] for tag, kind in kinds.items())
    return Annotated[Union[kinds], Discriminator(which)]  # noqa: UP007


def _voxel_size(value):
    if (isinstance(value, str) and re.fullmatch(r"(\d+\.?\d*|\.\d+)\+", value)) or value is None:
        return value
    if type(value) in (int, float) and 0 <= value < math.inf:
        return float(value)
    raise ValueError("a size of 0 or more, null, or such as 1.6+")


Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Probabilities = _one_or_each(Probability, "auto")
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Wholes = _one_or_each(Whole)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float | str | None, BeforeValidator(_voxel_size)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Range = tuple[Finite, Finite]  # low, high
PositiveRange = tuple[Positive, Positive]
NonNegativeRange = tuple[NonNegative, NonNegative]
Widths = Annotated[tuple[Count, ...], Field(min_length=2)]
Thresholds = Annotated[tuple[Probability, ...], Field(min_length=1, max_length=100)]
# A class by its name or its number.
Class = Annotated[str, BeforeValidator(lambda word: str(word) if type(word) is int else word)]
Classes = Annotated[tuple[Class, ...], BeforeValidator(_tuples), Field(min_length=1)]
UNFOLDED = 0.075  # elastic amplitude, as a share of the control points' distance


# The steps of post-processing that validation may take: {key: the value without}.
STEPS_OFF = {"hysteresis": None, "max_hole_voxels": 0, "closing_radius": 0.0}


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value):
        return _tuples(value)

    @field_validator("*")
    @classmethod
    def _ranges_rise(cls, value, info):
        if info.field_name.endswith(("_range", "_boxes")) and value and value[0] > value[1]:
            raise ValueError(f"a range [low, high] with low <= high, got {list(value)}")
        return value


class Run(Group):
    name: str = ""  # empty: the config file's name
    folder: str = "runs"
    seed: Whole = 0
    # A checkpoint whose (averaged) weights a new run starts from; null: random ones.
    init_from: str | None = None
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: Whole = 0  # of the CPU, 0: OMP_NUM_THREADS, else all that this process may use
    # On a GPU: a run repeats and resumes bit for bit, with slower convolutions. On a CPU it does.
    deterministic: bool = False
    # Limit on the host memory of all processes of the run together, in 10^9 bytes; null: only the
    # limits of the machine and its cgroups, which hold in any case.
    memory_gb: Positive | None = None  # with several ranks: of those on one machine
    # How long a rank of torchrun may not answer before the others end and name it.
    rank_timeout_minutes: Positive = 30.0


class Data(Group):
    root: str = "data"  # a folder made by prepare.py
    source: str = ""  # where the data come from: printed when root is missing
    # Case ids, groups, or patterns of either (burgess2014_*).
    train: tuple[str, ...] | None = None  # null: all labeled cases not named below
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    folds: Whole = 0  # 0: no cross-validation; k: validation is fold number `fold` of k
    fold: Whole = 0
    # What the network sees: a target spacing per axis; 0 or null keeps the axis as it is stored,
    # and 1.6+ keeps it where voxels are coarser than 1.6.
    spacing: tuple[Size, Size, Size] = (0, 0, 0)
    # Classes, by name or number, that are one foreground together; null: each is told apart.
    foreground: tuple[Class, ...] | None = None
    # Regions that may overlap, {name: its classes}, each told from all else.
    regions: dict[str, Classes] | None = None
    # Cache of the case files over all processes, in 10^9 bytes; 0: none; null: half of the memory
    # that is free at the start, at most what the training cases hold.
    cache_gb: NonNegative | None = None
    # The largest share of training cases that may be excluded because their files cannot be read.
    max_excluded: Probability = 0.25
    clip_percentiles: Literal["none", "0.5-99.5", "1-99", "5-95"] = "0.5-99.5"

    @property
    def percentiles(self):
        """(low, high) of clip_percentiles, or None."""
        if self.clip_percentiles == "none":
            return None
        return tuple(float(p) for p in self.clip_percentiles.split("-"))

    @model_validator(mode="after")
    def _keys_go_together(self):
        if self.foreground and self.regions:
            raise ValueError("either data.foreground or data.regions, got both")
        if self.folds and self.validation:
            raise ValueError("either data.folds or data.validation, got both")
        if self.folds == 1 or (self.folds and self.fold >= self.folds):
            raise ValueError(
                f"folds >= 2 and fold from 0 to folds-1, got folds={self.folds} fold={self.fold}"
            )
        return self


class Sampling(Group):
    patch: tuple[Count, Count, Count] = (64, 64, 64)
    foreground_share: Probability = 0.5  # of patches that are centered on a foreground voxel
    # Of those, how many on each foreground class, {name: weight}; null: all alike; unnamed: none.
    class_ratio: dict[str, NonNegative] | None = None
    jitter: Probability = 0.5  # the center moves by up to this share of half the patch


class Augment(Group):
    """A probability each, and a range if it has a strength; probability 0 turns it off."""

    flip: Probability = 0.5  # per axis
    turn90: Probability = 0.5  # a random number of quarter turns in each plane of equal spacing
    rotation: Probability = 0.3  # about each axis that is allowed
    rotation_degrees: Range = (-30.0, 30.0)
    rotation_axes: Literal["auto", "z", "all"] = "auto"  # auto: about z alone if anisotropic
    scaling: Probability = 0.3
    scaling_range: PositiveRange = (0.75, 1.33)  # > 1 shows things larger
    scaling_per_axis: Probability = 0.0  # of those: a factor of its own for every axis
    elastic: Probability = 0.0
    # Distance of control points and, per axis, root mean square of the displacement, in the unit
    # of the spacing; null: 24 voxels, and 0.5 to 1.5 voxels, of the finest axis.
    elastic_spacing: Positive | None = None
    elastic_amplitude_range: NonNegativeRange | None = None
    roll: Probability = 0.0  # the patch is rolled along z by a random number of slices
    brightness: Probability = 0.3
    brightness_range: Range = (-0.5, 0.5)  # added, in standard deviations of the volume
    contrast: Probability = 0.3
    contrast_range: PositiveRange = (0.65, 1.5)  # factor about the patch mean
    gamma: Probability = 0.3
    gamma_range: PositiveRange = (0.7, 1.5)
    noise: Probability = 0.2
    noise_range: NonNegativeRange = (0.0, 0.3)  # sigma, in standard deviations of the volume
    rician: Probability = 0.0
    rician_range: NonNegativeRange = (0.0, 0.3)  # the same, of the noise of magnitude images (MRI)
    blur: Probability = 0.2
    blur_range: PositiveRange = (0.5, 1.0)  # sigma in voxels of the finest axis
    low_resolution: Probability = 0.0
    low_resolution_range: tuple[AtLeastOne, AtLeastOne] = (1.0, 2.0)  # factor of the voxel size
    illumination: Probability = 0.0
    illumination_range: NonNegativeRange = (0.0, 0.7)  # log of the largest gain of a smooth field
    dropout: Probability = 0.0
    dropout_range: tuple[Decay, Decay] = (0.01, 0.1)  # share of the patch that is blanked, in boxes
    dropout_boxes: tuple[Count, Count] = (1, 8)  # how many

    @model_validator(mode="after")
    def _elastic_fields_do_not_fold(self):
        distance, amplitude = self.elastic_spacing, self.elastic_amplitude_range
        if (amplitude is None) != (distance is None):
            raise ValueError(
                "elastic_spacing and elastic_amplitude_range, both or neither, got "
                f"{distance} and {amplitude}"
            )
        if amplitude and amplitude[1] > UNFOLDED * distance * (1 + 1e-9):
            raise ValueError(
                f"elastic_amplitude_range from 0 to {UNFOLDED} of elastic_spacing, above which the "
                f"field may fold, got {list(amplitude)} and {distance}"
            )
        return self


class Model(Group):
    base: Count = 16
    multipliers: Widths = (1, 2, 4, 4)  # width of each stage, times base
    blocks: Count = 1  # residual blocks per stage, encoder and decoder
    dropout: Decay = 0.0
    deep_supervision: bool = True
    # Of each stage but the first: [[1, 2, 2], ...]; null derives them from patch and spacing.
    strides: tuple[tuple[Count, Count, Count], ...] | None = None
    compile: bool = False
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower

    @model_validator(mode="after")
    def _one_stride_per_downsampling(self):
        if self.strides is not None and len(self.strides) != len(self.multipliers) - 1:
            raise ValueError(
                f"one row of strides for each stage but the first, {len(self.multipliers) - 1}, "
                f"got {len(self.strides)}"
            )
        return self


class Term(Group):
    """What the weighted sum reads of every term: see runtime/composite_loss.py."""

    weight: NonNegative = 0.0
    scales: Count | None = None  # how many scales, from the finest, it acts on; null: all
    interval: Count = 1  # acts on one step of this many
    off_step: Literal["nothing", "boundary"] = "nothing"  # replaces it on the other steps
    validation_only: bool = False  # computed at each validation, never trained


class WeightedBce(Term):
    weight: NonNegative = 0.5
    positive_weight: Positive = 1.0


class SoftDice(Term):
    weight: NonNegative = 0.5
    batch: bool = False  # one Dice over the batch instead of one per patch


class Finest(Term):
    scales: Count | None = 1


class Skeletons(Finest):
    iterations: Count = 3  # of the erosion: the largest radius of a structure, in voxels


class SurfaceDistance(Finest):  # a thin structure is empty at a coarse scale
    tolerance: Positive | None = None  # in the unit of the spacing; null: validation.tolerance
    backend: Literal["native", "scipy", "downsampled"] = "native"  # of the distance transform


class Toploss(Finest):
    window: tuple[Count, Count, Count] = (48, 48, 48)  # voxels
    windows: Count = 2  # used in each step, of the whole batch


class Loss(Group):
    weighted_bce: WeightedBce = WeightedBce()
    soft_dice: SoftDice = SoftDice()
    cldice: Skeletons = Skeletons()
    morph_skeleton: Skeletons = Skeletons()
    surface_distance: SurfaceDistance = SurfaceDistance()
    skeleton_recall: Finest = Finest()  # needs cases that were prepared with skeletons
    toploss: Toploss = Toploss()
    worst_neighbor: Finest = Finest()
    # What each class or region counts beside the others, {name: weight}; unnamed: 1.
    class_weights: dict[str, Positive] | None = None


class Optim(Group):
    """AdamW."""

    lr: Positive = 1e-3
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    max_lr: Positive | None = None  # peak of one_cycle, which starts at lr
    warmup_steps: Whole = 20
    final_lr_share: Probability = 0.01  # of the peak, at the last step
    weight_decay: NonNegative = 1e-2
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip: NonNegative = 1.0  # norm of the gradient, 0: off
    ema: Decay = 0.99  # decay of the averaged weights, 0: off

    @model_validator(mode="after")
    def _one_cycle_has_a_peak(self):
        if (self.schedule == "one_cycle") != (self.max_lr is not None):
            raise ValueError(
                "max_lr with schedule one_cycle and with no other, got "
                f"schedule={self.schedule} max_lr={self.max_lr}"
            )
        return self


class Training(Group):
    max_epochs: Count = 10
    train_iterations_per_epoch: Count = 100  # optimiser steps
    train_batch_size: Count = 2
    accumulate: Count = 1  # batches per optimiser step
    max_steps: Whole | None = None  # stop after this many; 0: evaluate the untrained network
    workers: Whole = 1  # processes that read patches; 0: the training process itself
    prefetch_factor: Annotated[int, Field(ge=1, le=64)] = 4  # batches that each of them reads ahead
    persistent_workers: bool = True
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_hours: Positive | None = None  # of this process, which then saves its state and exits
    save_minutes: Positive | None = 10.0  # between two saves within an epoch; null: none
    max_skipped: Count = 10  # steps in a row without a finite loss and gradient; more stop the run


class Validation(Group):
    every: Count = 1  # epochs
    untrained: bool = True  # also before the first step: the baseline
    # Of scoring.metrics.SCORES: picks best.pt, threshold and size. Of several classes the mean
    # picks best.pt, or that of one, by a name such as dice/artery.
    score: str = "surface_dice"
    scores: tuple[str, ...] = ("dice", "precision", "recall", "components", "components_truth")
    tolerance: Positive = 2.0  # of surface_dice, in the unit of the spacing
    # The best of these are chosen, unless inference.threshold and postprocess.min_component_voxels
    # are given; then the other steps of postprocess that are null, as runtime/evaluator.py says.
    thresholds: Thresholds = (0.3, 0.4, 0.5, 0.6, 0.7)
    min_component_voxels: Annotated[tuple[Whole, ...], Field(min_length=1)] = (0, 20, 100)
    # Whether another process evaluates while training goes on; null: where a GPU trains.
    background: bool | None = None
    max_cases: Count | None = None
    patience: Whole = 0  # stop after this many in a row without a better score; 0: never


class Inference(Group):
    window: tuple[Count, Count, Count] | None = None  # null: the training patch
    overlap: Decay = 0.5
    flips: bool = False  # average over the 8 flips
    batch: Count | None = None  # windows at once; null: 1 on a CPU, 2 on a GPU
    # Of regions one for all, or {name: threshold}; null: what validation chose, 0.5 without; auto:
    # of each volume by its own probabilities, see runtime/own_threshold.py.
    threshold: Probabilities | None = None
    save_probabilities: bool = False
    save_disagreement: bool = False  # of the flips or networks that are averaged
    # Of predictions in .zarr: voxels of a file, and how much of the image is kept decoded.
    shard: tuple[Count, Count, Count] = (512, 512, 512)
    cache_gb: NonNegative = 0.25


class Postprocess(Group):
    """In this order, after the threshold: see scoring/postprocess.py.

    null: what validation chose, else off.
    """

    hysteresis: Probability | None = None  # voxels above it stay if they touch kept ones; 1: off
    # Smaller components are removed, 0: none. Of several classes one number for all, or
    # {name: number}.
    min_component_voxels: Wholes | None = None
    # Holes of up to so many voxels are filled, in slices too; 0: none.
    max_hole_voxels: Whole | None = None
    # Of the ball that closes gaps, in the unit of the spacing; 0: off.
    closing_radius: NonNegative | None = None


class Monitor(Group):
    log_every: Count = 10  # steps
    seconds: Positive = 10.0  # between two lines of system.jsonl
    tensorboard: bool = True
    picture: bool = True  # progress.png


class Settings(Group):
    run: Run = Run()
    data: Data = Data()
    sampling: Sampling = Sampling()
    augment: Augment = Augment()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    training: Training = Training()
    validation: Validation = Validation()
    inference: Inference = Inference()
    postprocess: Postprocess = Postprocess()
    monitor: Monitor = Monitor()

    def plain(self):
        """Nested dicts of plain values, as YAML and checkpoints hold them."""
        return self.model_dump(mode="json")

    def terms(self):
        """The terms of `runtime.composite_loss.composite_loss`."""
        terms = self.loss.model_dump(exclude={"class_weights"})
        surface = terms["surface_distance"]
        surface["tolerance"] = surface["tolerance"] or self.validation.tolerance
        return terms

    def window_arguments(self):
        """Arguments of `runtime.sliding_window.predict_slabs`."""
        arguments = self.inference.model_dump(include={"window", "overlap", "batch", "flips"})
        return {**arguments, "window": self.inference.window or self.sampling.patch}
