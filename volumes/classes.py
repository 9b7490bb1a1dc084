"""The classes of labels: how they are declared, and label values that are not.

Classes are {name: id}, background (0) included. Regions are {name: ids of the classes that belong
to it}, and may overlap. An id is a value of the label, and stays one in every file.
"""

import difflib
import operator
import re
import shlex

from volumes.files import few

UNNAMED = {"background": 0, "foreground": 1}  # where nobody has declared any
# Scores are called dice/NAME and dice/mean; options begin with -, what no legend shows with _.
NAME = "a name that is not empty or 'mean', has no '/' and begins with neither '-' nor '_'"
MOST_UNDECLARED = 20  # values of labels; of more they are numbered objects


def from_words(words):
    """The classes of `--classes NAME=ID ...`; the id of a bare NAME is its place, from 1 on.

    ValueError with one sentence if a name or an id comes twice, or an id is no whole number.
    """
    classes = {}
    for place, word in enumerate(words, start=1):
        name, number = word.rsplit("=", 1) if "=" in word else (word, str(place))
        if not re.fullmatch(r"\d{1,9}", number, re.ASCII):
            raise ValueError(f"--classes {word}: expected NAME or NAME=ID, such as artery=3")
        classes.setdefault(name, []).append(int(number))
    ids = [i for numbers in classes.values() for i in numbers]
    if len(classes) < len(words) or len(set(ids)) < len(ids):
        raise ValueError(
            f"--classes: expected distinct names and ids, got {shlex.join(words)} (a name without "
            "=ID has its place as id)"
        )
    return {"background": 0} | {name: numbers[0] for name, numbers in classes.items()}


def from_labels(labels, order=None):
    """(classes, regions, ignore label) of the `labels` of an nnU-Net or MSD dataset.json.

    labels: {"name": id} or {"id": "name"}. nnU-Net makes regions of lists: {"name": [ids]}, and
    then every class of one id is a region too. An id that has no name of its own is class_<id>.
    order: `regions_class_order`, the id that each region is written with; it comes first in its
    region. Regions are {} where all classes are plain ids. ValueError says what is wrong.
    """
    if all(str(key).isdigit() for key in labels):
        if len(set(labels.values())) < len(labels):
            raise ValueError(f"two classes of one name ({labels})")
        labels = {name: int(key) for key, name in labels.items()}
    groups = {n: ids if isinstance(ids, list) else [ids] for n, ids in labels.items()}
    if not all(isinstance(name, str) for name in groups):
        raise ValueError(f"a name that is no text ({labels})")
    whole = all(ids and all(type(i) is int for i in ids) for ids in groups.values())
    if not whole or isinstance(labels.get("ignore"), list):
        raise ValueError(f"an id that is no whole number ({labels})")
    if len({frozenset(ids) for ids in groups.values()}) < len(groups):
        raise ValueError(f"two classes of one id or of the same ids ({labels})")
    (ignore,) = groups.pop("ignore", [None])
    groups = {name: ids for name, ids in groups.items() if set(ids) != {0}}
    names = {ids[0]: name for name, ids in groups.items() if len(ids) == 1}
    if not any(isinstance(ids, list) for ids in labels.values()):
        return {"background": 0} | {name: i for i, name in names.items()}, {}, ignore
    ids = sorted({i for ids in groups.values() for i in ids})
    if {0, ignore} & set(ids):
        raise ValueError(f"background or the ignore label in a region ({labels})")
    order = [ids[0] for ids in groups.values()] if order is None else order
    if len(order) != len(groups) or not all(map(operator.contains, groups.values(), order)):
        raise ValueError(f"regions_class_order {order}, expected one id of each of {groups}")
    regions = {
        name: tuple(dict.fromkeys([first, *group]))
        for first, (name, group) in zip(order, groups.items(), strict=True)
    }
    return {"background": 0} | {names.get(i, f"class_{i}"): i for i in ids}, regions, ignore


def is_name(name):
    """Whether a class or region may be called so: see NAME."""
    return name.strip() not in ("", "mean") and "/" not in name and name[0] not in "-_"


def parsed(texts, known):
    """{name: ids} of texts of --classes such as artery=1 or vessel=1+2; known: as for `id_of`."""
    classes = {}
    for text in texts:
        name, _, ids = text.rpartition("=")
        if not name:
            raise ValueError(f"--classes: expected NAME=ID, or NAME=ID+ID of a region, got {text}")
        if name in classes:
            raise ValueError(f"--classes: expected names that differ, got {name} twice")
        ids = [id_of(one, known, f"--classes {text}") for one in ids.split("+")]
        classes[name] = tuple(dict.fromkeys(ids))
    return classes


def id_of(word, known, option):
    """The id that a word of an option or setting means: a name among known, {name: id}, or an id.

    ValueError for another; without any known classes every number is an id.
    """
    word = str(word)
    number = int(word) if re.fullmatch(r"-?\d{1,9}", word, re.ASCII) else None
    if word in known or (number is not None and (not known or number in known.values())):
        return known.get(word, number)
    if not known:
        raise ValueError(
            f"{option}: expected the number of a class, got {word!r}; name it with --classes "
            "NAME=ID ..., as only a folder made by prepare.py says what its classes are called"
        )
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
    named = ", ".join(f"{name} {i}" for name, i in known.items())
    raise ValueError(
        f"{option}: expected a class by its name or number, {named}, got {word!r}; the nearest "
        f"is {near}"
    )


def faults_of(classes, regions, ignore_label):
    """What is wrong with classes and regions, as sentences."""
    for name in classes | regions:
        if not is_name(name):
            yield f"classes: expected {NAME}, got {name!r}; give --classes NAME=ID ..."
    if classes.get("background") != 0 or "background" in regions:
        yield (
            f"classes: expected background to be 0 and nothing else, got "
            f"{classes | regions}; leave it out, or choose another name"
        )
    ids = [i for name, i in classes.items() if name != "background"]
    if not all(0 < i < 256 for i in ids):
        yield f"classes: expected ids from 1 to 255, got {classes}; change the ids in the labels"
    for name in classes.keys() & regions.keys() - {"background"}:
        if regions[name] != (classes[name],):
            yield (
                f"classes: expected other names for regions than for classes, got {name} as class "
                f"{classes[name]} and as region {list(regions[name])}; rename one of them"
            )
    if ignore_label is not None and (ignore_label in ids or not 0 < ignore_label < 256):
        yield (
            f"--ignore-label: expected a value from 1 to 255 that is no class of {classes}, "
            f"got {ignore_label}"
        )


def undeclared(labels, classes, ignore_label):
    """A sentence on all label values that are not declared, as a list: empty if there are none.

    labels: (path, values, those that are not declared) of every label. It ends with a line to copy.
    """
    paths = {}
    for path, _, unknown in labels:
        for value in unknown:
            paths.setdefault(value, []).append(path)
    if not paths:
        return []
    unknown = sorted(paths)
    got = few([f"{value} in {few(paths[value], 2)}" for value in unknown], between="; ")
    ids = set().union(*(values for _, values, _ in labels))
    names = {} if classes == UNNAMED else {i: name for name, i in classes.items()}
    ids = sorted((ids | names.keys()) - {0, ignore_label})
    read = set().union(*(values for _, values, some in labels if not some))
    masks = sorted(read - {*classes.values(), ignore_label})  # of {0, 255}, which needs no name
    words = {i: f"{names.get(i, f'class_{i}')}={i}" for i in ids}
    advice = f"name every class, as in `{shlex.join(['--classes', *words.values()])}`"
    if len(unknown) > MOST_UNDECLARED:
        files = list(dict.fromkeys(path for value in unknown for path in paths[value]))
        got = f"{few(list(map(str, unknown)))} in {few(files, 2)}"
        advice = "these look like numbered objects; store a mask of classes"
    elif unknown[0] < 0 or unknown[-1] > 255:
        advice = "store ids of 0 to 255, unlabeled voxels as one of their own (--ignore-label)"
    else:
        value = ([i for i in unknown if i not in masks] or unknown)[-1]
        rest = [] if len(unknown) == 1 else ["--classes", *(words[i] for i in ids if i != value)]
        beside_masks = masks and all(len(some) < 2 for _, _, some in labels)
        if beside_masks:
            advice = f"other labels are masks of 0 and {masks[0]}; store one foreground value"
        if ignore_label is None and not (beside_masks and rest):
            line = shlex.join([*rest, "--ignore-label", str(value)])
            advice += f", or give `{line}` if {value} means unlabeled"
    expected = sorted({*classes.values(), ignore_label} - {None})
    return [f"labels: expected the values {expected}, got also {got}; {advice}"]


def rare(classes, ids_of):
    """Notes on classes that are in no case, or in one of several only.

    ids_of: {case: the ids in its label}. None where there is one foreground class.
    """
    named = {name: [c for c, ids in ids_of.items() if i in ids] for name, i in classes.items() if i}
    if len(named) < 2 or not ids_of:
        return
    if nowhere := [name for name, cases in named.items() if not cases]:
        yield f"classes in no case: {few(nowhere)}"
    once = [f"{name} ({cases[0]})" for name, cases in named.items() if len(cases) == 1]
    if once and len(ids_of) > 1:
        yield f"classes in one case only: {few(once)}"
