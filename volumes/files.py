"""Volumes of every format: found by name, read, and written with spacing, unit and affine.

An image is (C, D, H, W) and a label (D, H, W), in the file's own dtype; spacing is z, y, x. A mask
that is written with the affine of its image overlays that image in a viewer.
"""

import fnmatch
import glob
import os
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from volumes import atomic, ome_zarr
from volumes.formats import ADVICE, DETACHED, FORMATS, HEADERS, fault_of_writing
from volumes.volume import InputErrors, VolumeError, check_affine, compare, printable, sizes

# Files that lie beside volumes. Other files that are no volumes are mentioned as passed over.
SIDECARS = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".xml", ".md", ".rst", ".yaml", ".yml",
            ".log", ".pdf", ".html", ".py", ".sh", ".toml", ".ini", ".xlsx", ".bval",
            ".bvec"}  # fmt: skip
SIDECAR_NAMES = {"readme", "license", "changes", "makefile", "probabilities", "disagreement"}
_HDF5_NAME = re.compile(r"^(.*\.(?:h5|hdf5)):(.+)$", re.IGNORECASE)
_WILDCARD = re.compile(r"([*?]|\[!?\]?[^\]]*\])")
_CHANNEL = re.compile(r"_0000$")
_IMAGE_ROLE = re.compile(r"[_-](?:img|image|raw|im|vol)$", re.IGNORECASE)
# A label word may be followed by one more token, as in `_labels_v1` or `_seg-manual`, but by no
# bare number: `label_01` and `label_02` are two cases.
_LABEL_ROLE = re.compile(
    r"[_-](?:(?:lbl|labels?)(?:[_-](?!\d+$)[A-Za-z0-9]+)?"
    r"|(?:(?:gm|wm|sc)?seg|segmentation|masks?|gt|truth|pred|prediction)"
    r"(?:[_-](?:manual|auto|final|corrected|v\d+))?)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """The file of a volume that has not been read. path may be `file.h5:dataset`."""

    id: str
    path: str


# ---------------------------------------------------------------------------- names


def split_dataset(path):
    """`file.h5:dataset` and `a.zarr/dataset` as (file, dataset); any other path as (path, None)."""
    text = str(path)
    folder, name = os.path.split(text)
    if not os.path.isfile(text) and (root := ome_zarr.split(text))[0] != text:
        return root[0], root[1] or None
    # The name of a file, or of its folder, may itself hold `.h5:`.
    if not _HDF5_NAME.match(text) or os.path.exists(text):
        return text, None
    match = _HDF5_NAME.match(name if os.path.isdir(folder) else text)
    return (text.removesuffix(f":{match[2]}"), match[2]) if match else (text, None)


def is_volume(path):
    """Whether a path names one file that is there, a .zarr folder or one at a URL."""
    file = split_dataset(path)[0]
    is_zarr = suffix_of(file) == ".zarr" and (os.path.isdir(file) or ome_zarr.is_url(file))
    return is_zarr or os.path.isfile(file)


def suffix_of(path):
    """The known suffix of a file name in lower case (".nii.gz" is one), or ""."""
    name = Path(split_dataset(path)[0]).name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), "")


def stem_of(path):
    """The file name without folder, dataset, known suffix and OME's `.ome`, in Unicode's NFC."""
    name = Path(split_dataset(path)[0]).name
    stem = name[: len(name) - len(suffix_of(name))]
    return nfc(re.sub(r"\.ome$", "", stem, flags=re.IGNORECASE))


def nfc(text):
    return unicodedata.normalize("NFC", text)


def case_id(path):
    """The id that an image, its label and its prediction share.

    Drops folder, suffix, the first-channel mark `_0000` and words of role, one after another:
    `a_img.nii.gz`, `a_0000.tif`, `a_labels_v1.tif` and `a_seg-manual.nii.gz` are all `a`.
    """
    stem = stem_of(path)
    while True:
        shorter = _LABEL_ROLE.sub("", _IMAGE_ROLE.sub("", _CHANNEL.sub("", stem)))
        if shorter in ("", stem):
            return stem
        stem = shorter


def is_label_name(path):
    """Whether the file name ends in a word for labels, such as `_lbl`, `_seg` or `_mask`."""
    return _LABEL_ROLE.search(stem_of(path)) is not None


def find_volumes(text, notes=None):
    """The volumes that text names, as a list of `Source`, sorted by path.

    text is a file, `file.h5:dataset`, `a.zarr` or a URL of one, a folder, a glob, or a pattern
    with `{id}` where the id stands, such as `folder/{id}_denoised.tif`. A folder that is there is
    taken as it is called, whatever its name. What lies among the volumes and is passed over is
    added to notes. VolumeError if there are none; InputErrors names each that cannot be opened.
    """
    text = str(text)
    location = split_dataset(text)[0]
    if is_volume(location):
        return _in_utf8([Source(case_id(location), text)])
    if os.path.isdir(location):
        found = _walk(location, ("*",))
        expected = f"a folder with volumes ({', '.join(FORMATS)}), got one without any"
    elif "{id}" in location or glob.has_magic(location):
        root = Path(location).anchor
        found = _walk(root, Path(location).parts[bool(root) :])
        expected = "a pattern that matches volumes, got one that matches none"
    else:
        found, expected = [], f"a file, a folder or a pattern, got {_what_is_at(location)}"
    tail, sources, faults, others = text.removeprefix(location), [], [], {}
    for name, path in sorted(found, key=lambda item: item[1]):
        if suffix_of(path) and is_volume(path):
            sources.append(Source(name or case_id(path), path + tail))
        elif not suffix_of(path) or os.path.isdir(path):
            others.setdefault(_other_kind(path), []).append(os.path.basename(path))
        else:
            faults.append(f"{path}: expected a volume, got {_what_is_at(path)}")
    if faults:
        raise InputErrors(*faults)
    passed = [f"{counted(len(n), kind)}, e.g. {n[0]}" for kind, n in others.items() if kind]
    if not sources:
        also = f" but {'; '.join(passed)}" if passed else ""
        raise VolumeError(f"{text}: expected {expected}{also}; {_advice([p for _, p in found])}")
    if passed and notes is not None:
        notes.append(f"{text}: passed over {'; '.join(passed)}")
    return _in_utf8(sources)


def _in_utf8(sources):
    """The sources. VolumeError if names of files are no UTF-8, for then their ids are none."""
    names = [os.path.basename(source.path) for source in sources]
    if wrong := [name for name in map(printable, names) if name not in names]:
        raise VolumeError(
            f"{', '.join(wrong)}: expected names of files in UTF-8, got another encoding, as old "
            "archives have; rename them"
        )
    return sources


def _advice(paths):
    """What to do where none of these is a volume."""
    arrays = any(path.lower().endswith((".npy", ".npz")) for path in paths)
    return "write arrays as HDF5 (docs/python.md)" if arrays else "check the path"


def _what_is_at(path):
    if os.path.islink(path):
        gone = f"a link to {os.readlink(path)}, where nothing can be opened"
        return f"{gone}; fetch that (git annex get, dvc pull) or remove the link"
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "a path that does not exist"
    except OSError as error:
        return error.strerror
    return "what is no file"


def _other_kind(path):
    """What a thing beside the volumes is, for people; "" for what need not be mentioned."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    if os.path.islink(path) and not os.path.exists(path):
        return "dangling link"
    if suffix in SIDECARS or stem in SIDECAR_NAMES or _is_detached(path):
        return ""
    if not os.path.isdir(path):
        return f"{suffix} file" if suffix else "suffixless file"
    if suffix != ".n5" and not suffix_of(path):
        files = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
        return "subfolder" if any(suffix_of(file) or _other_kind(file) for file in files) else ""
    return f"{suffix_of(path) or suffix} folder"


def _is_detached(path):
    """Whether a file holds the voxels of a header beside it."""
    starts = [path[: -len(end)] for end in DETACHED if path.lower().endswith(end)]
    return any(os.path.isfile(start + suffix) for start in starts for suffix in HEADERS)


def _walk(folder, parts, name=None):
    """[(id or None, path)] of all below a folder that matches the parts of a pattern, one a level.

    A part that is the name of something there means that alone.
    """
    if not parts:
        return [(name, folder)]
    part = parts[0] if name is None else parts[0].replace("{id}", name)
    if "{id}" not in part and os.path.lexists(os.path.join(folder, part)):
        return _walk(os.path.join(folder, part), parts[1:], name)
    try:
        entries = os.listdir(folder or ".")
    except NotADirectoryError:
        return []
    except OSError as error:
        got = error.strerror if os.path.exists(folder) else _what_is_at(folder)
        raise VolumeError(f"{folder}: expected a folder that can be read, got {got}") from error
    first, *rest = map(_regex, nfc(parts[0]).split("{id}"))
    the_id = "(?P<id>.+?)" if name is None else f"(?P<id>{re.escape(name)})"
    regex = re.compile(first + (the_id + "(?P=id)".join(rest) if rest else ""), re.DOTALL)
    found = []
    for entry in entries:
        match = regex.fullmatch(nfc(entry))
        if match and (part.startswith(".") or not entry.startswith(".")):
            match_id = match["id"] if rest else name
            found += _walk(os.path.join(folder, entry), parts[1:], match_id)
    return found


def _regex(pattern):
    """The regular expression of a glob; a bracket stands for itself too."""
    text, *others = _WILDCARD.split(pattern)
    regex = re.escape(text)
    for wildcard, text in zip(others[::2], others[1::2], strict=True):
        # fnmatch writes (?s:...) and an anchor around what it translates.
        one = fnmatch.translate(wildcard)[4:-3]
        literal = f"|{re.escape(wildcard)}" if wildcard[0] == "[" else ""
        regex += f"(?:{one}{literal}){re.escape(text)}"
    return regex


def matching(names, pattern):
    """Those of names (ids) that a pattern means: the one of that very name, else all it matches."""
    pattern = nfc(pattern)
    exact = [name for name in names if nfc(name) == pattern]
    regex = re.compile(_regex(pattern), re.DOTALL)
    return exact or [name for name in names if regex.fullmatch(nfc(name))]


def notes_on_pairs(pairs):
    """What must be said of files that go together: [(id, path, id of the partner, its path)]."""
    named = {"by the beginning of their names": [], "though their names differ in Unicode form": []}
    begun, forms = named.values()
    for own, path, other, partner in pairs:
        if own != other:
            begun.append(f"{path} with {partner}")
        elif len({unicodedata.is_normalized("NFC", Path(p).name) for p in (path, partner)}) > 1:
            forms.append(f"{path} with {partner}")
    for how, some in named.items():
        if some:
            yield f"matched {how}: {few(some, 5, '; ')}"


def few(names, most=8, between=", "):
    """Names for people, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def counted(number, noun):
    """A number of things for people."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---------------------------------------------------------------------------- reading


def read_image(path, box=None):
    """The image in a file as a `Volume` with array (C, D, H, W), integers kept as they are.

    TIFF of several pages; NIfTI, NRRD, MetaImage, HDF5 and zarr of 3 dimensions, or with channels;
    box: slices of z, y, x, None for all. Only NIfTI with a scale in its header becomes float32.
    VolumeError if the file cannot be read, or holds no volume, or one with NaN or infinite voxels.
    """
    volume = _read(path, "image", box)
    check_image(path, volume.array)
    return volume


def check_image(path, array):
    """VolumeError if voxels are no numbers, or not finite."""
    if array.dtype.kind not in "uif":
        raise VolumeError(
            f"{path}: expected an image of real numbers, got dtype {array.dtype}; convert it"
        )
    if array.dtype.kind == "f" and (bad := array.size - np.count_nonzero(np.isfinite(array))):
        raise VolumeError(
            f"{path}: expected finite values, got {bad} voxels of NaN or Inf; "
            "replace them, by 0 for voxels without a measurement"
        )


def read_channels(paths, *, by_hand=False, box=None):
    """The image in one file, or all channels of several, each as `read_image` gives it.

    Its path names all of them. InputErrors where their voxels are not the same places; by_hand:
    spacing and axes of the headers do not count.
    """
    channels, faults = [read_image(path, box) for path in paths], []
    if len(channels) == 1:
        return channels[0]
    image = next((c for c in channels if c.spacing is not None), channels[0])
    notes = dict.fromkeys(note for channel in channels for note in channel.notes)
    for other in (c for c in channels if c is not image):
        odd, said = compare(other, image, spacing=not by_hand, axes=not by_hand)
        faults += odd
        notes |= dict.fromkeys(f"channels: {note}" for note in said)
    if faults:
        raise InputErrors(*faults)
    voxels = np.concatenate([channel.array for channel in channels])
    doubt = next((channel.doubt for channel in channels if channel.doubt), "")
    path = ", ".join(map(str, paths))
    return replace(image, array=voxels, path=path, notes=tuple(notes), doubt=doubt)


def read_label(path, box=None):
    """The label in a file as a `Volume` with array (D, H, W) of integers.

    Formats as `read_image`. Floats are accepted if every value is whole. VolumeError otherwise,
    and for a file with more than one channel.
    """
    return as_label(_read(path, "label", box))


def as_label(volume):
    """A `Volume` of an array (C, D, H, W) as that of a label; VolumeError as of `read_label`."""
    channels, array, path = len(volume.array), volume.array[0], volume.path
    if channels != 1:
        raise VolumeError(
            f"{path}: expected a label with one channel, got {channels}; "
            "store class ids in one volume"
        )
    if array.dtype.kind not in "ui":
        # NaN fails the comparison too, and beyond 2^24 a float32 is not exact any more.
        real = array.dtype.kind == "f"
        if not real or not (np.abs(array) < 2**24).all() or (array != np.rint(array)).any():
            raise VolumeError(
                f"{path}: expected a label of whole numbers, got {array.dtype} with values that "
                "are none; store class ids"
            )
        array = array.astype(np.int32)
    return replace(volume, array=array)


def voxel_count(path):
    """Voxels of the volume in a file, by its header alone; 0 if that cannot be read."""
    file, dataset = split_dataset(path)
    try:
        return FORMATS[suffix_of(file)].module.count_voxels(file, dataset)
    except Exception:  # the fault is named when the volume is read
        return 0


def _read(path, role, box=None):
    """A `Volume` with (C, D, H, W), native byte order, and no dimension of length 0."""
    file, dataset = split_dataset(path)
    suffix = suffix_of(file)
    if not suffix or not is_volume(file):
        got = "another kind" if os.path.isfile(file) else "none there"
        got += f"; {_advice([file])}"
        raise VolumeError(f"{path}: expected a {', '.join(FORMATS)} file, got {got}")
    try:
        volume = FORMATS[suffix].read(file, dataset, role, box)
    except (VolumeError, MemoryError):
        raise
    # Truncated and foreign files surface as struct, zlib, OS, key and type errors, and more.
    except Exception as error:
        reason = " ".join(str(error).replace(file, "").split()) or "no reason given"
        reason = f"{type(error).__name__}: {reason[:160]}"
        advice = next((text for words, text in ADVICE.items() if re.search(words, reason)), "")
        expected = f"a whole {suffix} file, got one that cannot be read ({reason})"
        if advice:
            expected = f"a {suffix} file that can be read, got {reason}"
        raise VolumeError(
            f"{path}: expected {expected}; {advice or 'it may be truncated, fetch it again'}"
        ) from error
    array, affine, spacing = volume.array, volume.affine, volume.spacing
    if affine is not None:
        affine = check_affine(affine, path)
        spacing = spacing or sizes(affine)
    if 0 in array.shape:
        raise VolumeError(f"{path}: expected a volume, got an empty one of shape {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    array = array[None] if array.ndim == 3 else array
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return replace(volume, array=array, affine=affine, spacing=spacing, path=str(path))


# ---------------------------------------------------------------------------- writing


def write_volume(path, array, *, spacing=None, unit="", affine=None, header=None):
    """Write a mask or a probability map; the suffix of path decides on the format.

    array (D, H, W), or (C, D, H, W) but for TIFF; bool is written as uint8. spacing z, y, x in
    unit. NIfTI gets affine, or one made of the spacing, in the way that header, of the `Volume` it
    lies on, states it; NRRD and MetaImage get affine or spacing; TIFF gets one LZW page per z and
    ImageJ's spacing; HDF5 gets the dataset `segmentation`. The file appears whole or not at all.
    VolumeError for another suffix or number of dimensions.
    """
    suffix, array = suffix_of(path), np.asarray(array)
    array = array.astype(np.uint8) if array.dtype == bool else array
    if fault := fault_of_writing(path, suffix):
        raise VolumeError(fault)
    module = FORMATS[suffix].module
    if array.ndim not in module.WRITES_DIMENSIONS:
        raise VolumeError(f"{path}: expected (D, H, W) to write, got shape {array.shape}")
    with atomic.replacing(path) as partial:
        module.write(partial, array, spacing, unit, affine, header)
