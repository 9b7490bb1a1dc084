"""Whole-volume validation of a network in training: windows over each case, then the judge."""

import functools

import torch

import boxes
import cases
import composite
import data
import intensity
import metrics
import picture
import windows


def validate(network, chosen, *, threshold, tolerance, terms, tile, report, poll, **how):
    """Scores of a network on labelled cases: (mean scores, {case id: scores}, unread, slices).

    chosen: `cases.Case` list; tolerance: of the surface Dice, in the spacing's unit; how: what
    `predict` takes. The scores are those of `metrics.score`, and `<name>_loss` of the
    validation-only terms, on tiles of `tile` voxels. slices: of the first case, see
    `picture.middle_slices`; None of no case.

    unread: ids of the cases whose files cannot be read, after they were tried again; they are
    reported and not in the mean. report(kind, text, **figures): see runlog.py; poll() is called
    after each batch of windows and may raise.
    """
    was_training = network.training
    network.eval()
    skeletons = composite.takes_skeleton(terms, validation_only=True)
    per_case, unread, slices = {}, [], None
    how |= {"report": report, "progress": lambda done, total: poll()}
    for case in chosen:
        try:
            wanted = {"skeletons": skeletons, "slices": slices is None}
            read = functools.partial(predict, network, case, **wanted, **how)
            truth, probs, tube, first = data.read_patiently(read)
        except data.UNREADABLE as error:
            unread.append(case.id)
            text = f"{' '.join(str(error).split())}; this evaluation goes without it"
            report("case left out", text, case=case.id)
            continue
        slices = slices or first
        mask, ignored = probs >= threshold, case.ignore_label
        scores = metrics.score(mask, truth, case.spacing, ignored, tolerance)
        volumes = (probs, truth == 1, truth != (-1 if ignored is None else ignored))
        per_case[case.id] = scores | composite.validation_losses(
            *map(torch.from_numpy, volumes), terms, tile=tile, spacing=case.spacing, skeleton=tube
        )
    network.train(was_training)
    return metrics.mean_scores(list(per_case.values())), per_case, unread, slices


def predict(network, case, *, foreground, spacing, clip, window, skeletons, slices, **how):
    """(truth, probabilities, tubed skeleton, slices) of a case, the last two None if not wanted.

    Arrays (D, H, W); spacing, clip: as in `data.PatchDataset`; window: what of the settings goes to
    `windows.predict_volume`, how: what else does. boxes.Unreadable if its file cannot be read.
    """
    with boxes.opened(case) as file:
        truth = cases.read_truth(file, foreground, case.ignore_label)
        scale = data.normalisation(case.intensity, clip)
        seen = data.network_spacing(case.spacing, spacing)
        probs = windows.predict_volume(
            network,
            file["image"],
            ratio=[w / s for w, s in zip(seen, case.spacing, strict=True)],
            normalize=functools.partial(intensity.normalise, **scale),
            **window,
            **how,
        )[0]
        tube = torch.from_numpy(file["skeleton"][:]) if skeletons else None
        image = file["image"][0] if slices else None
    shown = picture.middle_slices(image, truth, probs, case.ignore_label) if slices else None
    return truth, probs, tube, shown
