"""Several classes in a volume of ids: which there are, and how their scores are called.

classes = checked({"artery": 1, "vessel": (1, 2)})  # {"artery": (1,), "vessel": (1, 2)}
full_names(["dice", "recall/vessel"], classes)
# ("dice/artery", "dice/vessel", "dice/mean", "recall/vessel")
split_name("surface_dice@4/artery")                 # ("surface_dice@4", "artery")
"""

import difflib
from collections.abc import Iterable, Mapping

import numpy as np

MEAN = "mean"  # over classes: what follows the / in the name of such a score


def split_name(name):
    """(score, class) of a name such as dice/artery; the class is None where there is no /."""
    score, slash, which = str(name).partition("/")
    return score, which if slash else None


def full_names(names, classes):
    """Names of scores, each with its class: one without stands for every class, then the mean.

    Without classes (None) they stay as they are. ValueError for a class that is not there.
    """
    known, full = [*(classes or ()), MEAN], []
    for name in names:
        score, which = split_name(name)
        if classes is None and which is not None:
            raise ValueError(
                f"expected {score} without a class, as no classes are given; got {name}"
            )
        if which is not None and which not in known:
            near = difflib.get_close_matches(which, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"expected a class among {', '.join(known)}, got {name}; the nearest is "
                f"{score}/{near}"
            )
        every = known if which is None else [which]
        full += [name] if classes is None else [f"{score}/{one}" for one in every]
    return tuple(dict.fromkeys(full))


def checked(classes, ignore_label=None):
    """{name: (id, ...)} of {name: id, or several of a region}; regions may overlap.

    ValueError where that is not so, for an id that is 0 or ignore_label, and for the name "mean".
    """
    if not isinstance(classes, Mapping) or not classes:
        raise ValueError(f"classes: expected {{name: id or ids}}, got {classes!r}")
    several = {n: tuple(i) if isinstance(i, Iterable) else (i,) for n, i in classes.items()}
    for name, ids in several.items():
        if not isinstance(name, str) or name in ("", MEAN):
            raise ValueError(f"classes: expected names other than {MEAN!r} and '', got {name!r}")
        whole = all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in ids)
        if not ids or not whole or 0 in ids:
            raise ValueError(f"classes: expected ids of {name} that are integers but 0, got {ids}")
        if ignore_label in ids:
            raise ValueError(
                f"classes: expected ids that are not {ignore_label}, of unlabeled voxels, got it "
                f"as one of {name}"
            )
    return several


def ids_of(classes):
    """The ids of all classes, each once."""
    return list(dict.fromkeys(i for ids in classes.values() for i in ids))


def described(classes):
    """The classes for people: "artery 1, vessel 1+2"."""
    return ", ".join(f"{name} {'+'.join(map(str, ids))}" for name, ids in classes.items())


def mask_of(values, ids):
    """Where an array of ids has one of these."""
    mask = values == ids[0]
    for other in ids[1:]:
        mask |= values == other
    return mask


def voxels_of(values, known):
    """({id: its voxels} of the known ids, the other values that occur, sorted)."""
    voxels = {one: int(np.count_nonzero(values == one)) for one in known}
    if sum(voxels.values()) == values.size:
        return voxels, []
    return voxels, [value for value in np.unique(values).tolist() if value not in voxels]
