"""Whole-volume validation of a network in training: windows over each case, then the judge."""

import functools

import h5py
import torch

import cases
import composite
import data
import intensity
import metrics
import picture
import windows


def validate(
    network,
    chosen,
    *,
    foreground,
    spacing,
    clip,
    window,
    threshold,
    tolerance,
    terms,
    tile,
    device,
    precision,
):
    """Scores of a network on labelled cases: (mean scores, {case id: scores}, slices).

    chosen: `cases.Case` list; spacing, clip: as in `data.PatchDataset`; window: what
    `windows.predict_volume` takes besides; tolerance: of the surface Dice, in the spacing's unit.
    The scores are those of `metrics.score`, and `<name>_loss` of the validation-only terms, on
    tiles of `tile` voxels. slices: of the first case, see `picture.middle_slices`; None of no case.
    """
    was_training = network.training
    network.eval()
    per_case, slices = {}, None
    for case in chosen:
        with h5py.File(case.path, "r") as file:
            truth = cases.read_truth(file, foreground, case.ignore_label)
            scale = data.normalisation(case.intensity, clip)
            seen = data.network_spacing(case.spacing, spacing)
            probs = windows.predict_volume(
                network,
                file["image"],
                ratio=[w / s for w, s in zip(seen, case.spacing, strict=True)],
                normalize=functools.partial(intensity.normalise, **scale),
                device=device,
                precision=precision,
                **window,
            )[0]
            tube = _skeleton(file, terms)
            if slices is None:
                slices = picture.middle_slices(file["image"][0], truth, probs, case.ignore_label)
        mask, ignored = probs >= threshold, case.ignore_label
        scores = metrics.score(mask, truth, case.spacing, ignored, tolerance)
        volumes = (probs, truth == 1, truth != (-1 if ignored is None else ignored))
        per_case[case.id] = scores | composite.validation_losses(
            *map(torch.from_numpy, volumes), terms, tile=tile, spacing=case.spacing, skeleton=tube
        )
    network.train(was_training)
    return metrics.mean_scores(list(per_case.values())), per_case, slices


def _skeleton(file, terms):
    """The tubed skeleton of a case file, if a validation-only term takes it, else None."""
    wanted = composite.takes_skeleton(terms, validation_only=True)
    return torch.from_numpy(file["skeleton"][:]) if wanted else None
