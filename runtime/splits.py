"""Which cases train, validate and test."""

from dataclasses import dataclass

import data
from volumes.files import counted, few, matching
from volumes.volume import doubt_of_order

CUT = "cut a single case by prepare.py --crop train=0:80 val=90:112"
NO_VALIDATION = (
    "NO VALIDATION: there are no scores and no curve of them, best.pt is the last state, and masks "
    "are made with threshold 0.5 and all components, unless you set them; set data.validation or "
    f"data.folds; {CUT}"
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
        chosen_validation = _fold(chosen_train, folds, fold, faults)
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


def _fold(cases, folds, fold, faults):
    """{id: case} of a fold; {} and a fault if there are fewer groups than folds."""
    groups = {}
    for case in cases.values():
        groups.setdefault(case.group, []).append(case.id)
    if 0 < len(groups) < folds:
        got = f"got {folds} for {counted(len(groups), 'group')}"
        advice = CUT if len(cases) == 1 else "lower it, or prepare the cases with smaller groups"
        faults.append(
            f"data.folds: expected no more folds than groups in data.train, {got}; {advice}"
        )
        return {}
    parts = [[] for _ in range(folds)]
    for group in sorted(groups, key=lambda g: (-len(groups[g]), g)):
        min(parts, key=len).extend(groups[group])
    return {i: cases[i] for i in parts[fold]}


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
    """Notes on sizes that seem to be in another order than z, y, x, on padding and on voxels of
    several sizes. ValueError that names the cases that patches, or windows of validation, cannot
    show."""
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
    spacings = [data.network_spacing(case.spacing, wanted) for case in split.train]
    pairs = zip(split.train, spacings, strict=True)
    doubts = dict.fromkeys(doubt_of_order(case.shape, own, case.unit) for case, own in pairs)
    notes = [f"data.spacing: {doubt}" for doubt in filter(None, doubts)]
    notes += data.padding_notes(split.train, patch, wanted)
    return notes + [*data.mixed_spacings(split.train + split.validation, wanted)]


def changes_of_data(before, now):
    """A line on training cases that differ between the metadata of a saved state and those now.
    ValueError if one of them would validate now."""
    old, new = before.get("trained", {}), now["trained"]  # none in older versions
    if seen := sorted(old.keys() & set(now["validation"]) - set(before.get("validation", ()))):
        raise ValueError(
            f"data.validation: expected no case that was trained on, got {few(seen)}; begin a run "
            "of another run.name"
        )
    changed = [case for case in sorted(old.keys() | new.keys()) if old.get(case) != new.get(case)]
    listed = ", ".join(changed[:5]) + ", ..." * (len(changed) > 5)
    what = "training cases are others, or hold other voxels, than in the saved state"
    return [f"changed: {len(changed)} {what}: {listed}"] if old and changed else []


def absent_regions(outputs, cases):
    """A note for people, which names the cases that lack some of several regions, if any does."""
    absent = {
        name: [case.id for case in cases if not any(case.counts.get(i) for i in ids)]
        for name, ids in outputs.regions.items()
    }
    parts = [
        f"{name} in {'any case' if len(some) == len(cases) else few(some)}"
        for name, some in absent.items()
        if some
    ]
    if parts and outputs.several:
        yield (
            f"validation: no voxel of {', of '.join(parts)}; each ratio is 1 there if the "
            "prediction has none either, else 0"
        )
