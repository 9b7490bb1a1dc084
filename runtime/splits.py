"""Which cases train, validate and test."""

import math
from dataclasses import dataclass

import data
from volumes.files import few, matching
from volumes.volume import doubt_of_order

LEAST_SEEN = 0.5  # of a patch: what may be padding without a word

NO_VALIDATION = (
    "NO VALIDATION: there are no scores and no curve of them, best.pt is the last state, and masks "
    "are made with threshold 0.5 and all components; set data.validation, or data.folds=5"
)


@dataclass(frozen=True)
class Split:
    train: list
    validation: list
    test: list


def choose_cases(dataset, *, train, validation, test, folds, fold):
    """The `Split` of a dataset, and notes to print. ValueError names every fault, a line each.

    train, validation, test: ids, groups or patterns of either; train None: all labeled cases not
    named elsewhere. folds > 0: whole groups go to folds, the largest first to the emptiest fold,
    and validation is fold number `fold`.
    """
    faults, notes = [], []
    chosen_train, chosen_validation, chosen_test = (
        _matches(dataset, key, patterns or (), faults)
        for key, patterns in (("train", train), ("validation", validation), ("test", test))
    )
    if train is None:
        elsewhere = chosen_validation | chosen_test
        chosen_train = {i: c for i, c in dataset.cases.items() if i not in elsewhere and c.labeled}
        if bare := sorted(dataset.cases.keys() - elsewhere - chosen_train.keys()):
            notes.append(f"train: without label, not trained on: {few(bare)}")
    if folds:
        chosen_validation, fold_notes = _fold(chosen_train, folds, fold)
        notes += fold_notes
        chosen_train = {i: c for i, c in chosen_train.items() if i not in chosen_validation}
    split = Split(*(list(d.values()) for d in (chosen_train, chosen_validation, chosen_test)))
    faults += _split_faults(split)
    if faults:
        raise ValueError("\n".join(faults))
    if not split.validation:
        notes.append(NO_VALIDATION)
    return split, notes


def _matches(dataset, key, patterns, faults):
    """{id: case} whose id or group matches any pattern; one that matches none is a fault."""
    matches, names = {}, {*dataset.cases, *(case.group for case in dataset.cases.values())}
    for pattern in patterns:
        named = set(matching(names, pattern))
        hits = {i: c for i, c in dataset.cases.items() if named & {i, c.group}}
        if not hits:
            known = ", ".join(list(dataset.cases)[:8])
            faults.append(f"data.{key}: no case or group is named {pattern!r}; there are {known}")
        matches |= hits
    return matches


def _fold(cases, folds, fold):
    groups = {}
    for case in cases.values():
        groups.setdefault(case.group, []).append(case.id)
    notes = []
    if len(groups) < folds:
        got = f"only {len(groups)} groups are there"
        if len(groups) > 1:
            got += f", so this is fold {fold % len(groups)} of {len(groups)}"
        notes.append(f"data.folds: {folds} asked for, {got}")
    if len(groups) < 2:
        return {}, notes
    parts = [[] for _ in range(min(folds, len(groups)))]
    for group in sorted(groups, key=lambda g: (-len(groups[g]), g)):
        min(parts, key=len).extend(groups[group])
    return {i: cases[i] for i in parts[fold % len(parts)]}, notes


def _split_faults(split):
    if not split.train:
        yield "data.train: expected at least one labeled case, got none"
    for key in ("train", "validation"):
        for case in getattr(split, key):
            if not case.labeled:
                yield f"data.{key}: case {case.id} has no label; prepare it with --labels"
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = {c.group for c in getattr(split, a)} & {c.group for c in getattr(split, b)}
        if shared:
            yield (
                f"data.{a} and data.{b}: expected no group in both, got "
                f"{', '.join(sorted(shared))}; name whole groups on one side"
            )
    channels = {c.channels for c in split.train + split.validation}
    if len(channels) > 1:
        yield f"data.root: expected one number of channels in all cases, got {sorted(channels)}"


def check_sizes(settings, split):
    """Notes on sizes that seem to be in another order than z, y, x. ValueError that names the cases
    that patches, or windows of validation, cannot show."""
    patch, wanted = settings.sampling.patch, settings.data.spacing
    window = settings.inference.window or patch
    shown = [(case, patch) for case in split.train] + [(case, window) for case in split.validation]
    faults = [
        fault
        for case, size in shown
        for fault in data.spacing_faults(
            f"case {case.id}", case.shape, size, case.spacing, wanted, case.unit
        )
    ]
    if faults:
        more = [f"data.spacing: the same of {len(faults) - 3} more cases"] * (len(faults) > 3)
        raise ValueError("\n".join(faults[:3] + more))
    doubts, padded = {}, []
    for case in split.train:
        spacing = data.network_spacing(case.spacing, wanted)
        doubts[doubt_of_order(case.shape, spacing, case.unit)] = None
        sizes = zip(case.shape, case.spacing, patch, spacing, strict=True)
        if math.prod(min(1.0, n * step / (p * s)) for n, step, p, s in sizes) < LEAST_SEEN:
            padded.append(f"{case.id} ({'x'.join(map(str, case.shape))})")
    notes = [f"data.spacing: {doubt}" for doubt in filter(None, doubts)]
    if padded:
        text = f"sampling.patch: {list(patch)} is more padding than image in {few(padded, 3)}"
        notes.append(f"{text}; its order is z, y, x")
    return notes
