"""What prepare.py finds out about a volume once: coordinates of its classes, intensities."""

import itertools

import numpy as np

MAX_COORDINATES = 20_000
PERCENTILES = (0.5, 1.0, 5.0, 50.0, 95.0, 99.0, 99.5)
APART = 3.0  # times the range of the outermost percentiles: no image lies farther beyond them
BOXES, BOX, MOST_TRIES = 64, 64, 500  # of `sampled`
FEWEST_LEVELS = 16  # of an image of fewer, none is taken for a fill value: it may be a class
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
EPS = float(np.finfo(np.float32).eps)


def sample_coordinates(label, class_id, rng, most=MAX_COORDINATES):
    """Up to `most` voxel coordinates of one class, without repeats: (N, 3) int32, sorted."""
    flat = label.reshape(-1)
    count = int(np.count_nonzero(flat == class_id))
    if count > 20 * most:  # by rejection: no index array of the volume's size is made
        share = count / flat.size
        voxels = np.empty(0, np.int64)
        while voxels.size < most:
            trial = rng.integers(0, flat.size, size=int(1.2 * most / share))
            voxels = np.unique(np.concatenate([voxels, trial[flat[trial] == class_id]]))
    else:
        voxels = np.flatnonzero(flat == class_id)
    if voxels.size > most or count > 20 * most:
        voxels = rng.choice(voxels, most, replace=False)
    return np.stack(np.unravel_index(np.sort(voxels), label.shape), axis=1).astype(np.int32)


def sampled(volume):
    """Voxels (C, d, h, w) that tell the statistics of a `ome_zarr.ZarrVolume`: all of a small one.

    Else those of BOXES boxes, in one another's place in z, that lie at random in the volume and are
    not 0 throughout. They are the same each time.
    """
    channels, *shape = volume.shape
    if np.prod(shape, dtype=float) <= BOXES * BOX**3:
        return volume[:]
    rng, boxes, tries = np.random.default_rng(0), [], 0
    sizes = [min(BOX, size) for size in shape]
    while len(boxes) < BOXES and tries < MOST_TRIES:
        # They lie on a grid, so that no more chunks than needed are read for one.
        cells = [int(rng.integers(n // s)) for n, s in zip(shape, sizes, strict=True)]
        box = [slice(i * s, (i + 1) * s) for i, s in zip(cells, sizes, strict=True)]
        chunks = [
            range(s.start // n, -(-s.stop // n)) for s, n in zip(box, volume.chunks, strict=True)
        ]
        if volume.fill == 0 and not any(volume.stored(*i) for i in itertools.product(*chunks)):
            tries += 0.1  # that costs little
            continue
        tries += 1
        voxels = volume[:, *box]
        if voxels.any():
            boxes.append(voxels)
    return np.concatenate(boxes, axis=1) if boxes else np.zeros((channels, 1, 1, 1), volume.dtype)


def intensity_statistics(image):
    """Mean, std, percentiles and range of the non-zero finite voxels, per channel, as lists; dtype.

    image (C, D, H, W). A channel without such a voxel gets mean 0, std 1, percentiles and range 0.
    "typical" holds the same of the voxels that are no fill values, dead or hot voxels, see
    `_typical`, and of all voxels where those that are not zero have one value. Its percentiles are
    those to clip to: two that are equal, of a nearly constant image, give way to the next ones
    outward, at last to the range. Left out if nothing differs.
    """
    everything, typical = [], []
    for channel in image:
        values = channel[(channel != 0) & np.isfinite(channel)]
        cuts = _percentiles(values)
        plain = _describe(values, cuts)
        few, (low, high) = values, plain["range"]
        if values.size and low == high:
            few, cuts = channel.reshape(-1), _percentiles(channel.reshape(-1))
        few, cuts = _typical(few, cuts)
        usual = dict(plain) if few is values else _describe(few, cuts)
        everything.append(plain)
        typical.append(usual)
        outer, cuts = usual["range"], list(cuts)
        usual["percentiles"] = cuts
        for i in range(len(cuts) // 2):
            if cuts[i] == cuts[-1 - i]:
                cuts[i], cuts[-1 - i] = outer
            outer = cuts[i], cuts[-1 - i]
    out = _lists(everything) | {"dtype": image.dtype.str}
    return out if typical == everything else out | {"typical": _lists(typical)}


def _percentiles(values):
    """PERCENTILES of values (N,), as floats; zeros if there are none."""
    if values.size == 0:
        return [0.0] * len(PERCENTILES)
    limits = np.finfo if values.dtype.kind == "f" else np.iinfo
    if float(values.max()) - float(values.min()) > float(limits(values.dtype).max):
        values = values.astype(np.float64)  # numpy takes differences, which would wrap
    return np.percentile(values, PERCENTILES).tolist()


def _describe(values, cuts):
    if values.size == 0:
        return {"mean": 0.0, "std": 1.0, "percentiles": cuts, "range": [0.0, 0.0]}
    with np.errstate(over="ignore", invalid="ignore"):  # `faults_of_contrast` names it
        mean, std = (float(f(values, dtype=np.float64)) for f in (np.mean, np.std))
    ends = [float(values.min()), float(values.max())]
    return {"mean": mean, "std": std, "percentiles": cuts, "range": ends}


def _lists(channels):
    out = {key: [one[key] for one in channels] for key in ("mean", "std", "range")}
    by_percentile = zip(*(one["percentiles"] for one in channels), strict=True)
    names = map(str, PERCENTILES)
    return out | {"percentiles": dict(zip(names, map(list, by_percentile), strict=True))}


def _typical(values, cuts):
    """(values, their percentiles) without fill values, and without what lies far beyond the rest.

    A fill value reaches an outermost percentile, and the gap from there to the next value is wider
    than all from that to the other end. Of the rest, what is farther than APART times the range of
    the outermost percentiles beyond them is left out. Both hold whatever the scale.
    """
    while (rest := _without_fill(values, cuts)) is not None:
        values, cuts = rest, _percentiles(rest)
    margin = APART * (cuts[-1] - cuts[0])
    low, high = np.float64(cuts[0] - margin), np.float64(cuts[-1] + margin)
    if margin > 0 and (values.min() < low or values.max() > high):
        values = values[(values >= low) & (values <= high)]
    return values, cuts


def _without_fill(values, cuts):
    """The values without the fill value at one of their ends; None if there is none at either."""
    for inward, beyond, extreme in ((cuts, np.greater, np.min), (cuts[::-1], np.less, np.max)):
        end, other = inward[0], inward[-1]
        # The next value is no farther than the second of these; the first may lie between values.
        inner = [*dict.fromkeys(inward), other, other][2]
        if abs(inner - end) <= abs(other - inner) and inner != other:  # the usual case
            continue
        rest = values[beyond(values, np.float64(end))]
        nearest = float(extreme(rest)) if rest.size else other
        levels = np.unique(rest[:: rest.size // 100_000 + 1]).size
        if abs(nearest - end) > abs(other - nearest) and levels > FEWEST_LEVELS:
            return rest
    return None


def _ranges(intensity):
    """[(std, lowest, highest value)] per channel; [] of statistics of older versions."""
    usual = intensity.get("typical", intensity)
    return [(std, *ends) for std, ends in zip(usual["std"], usual.get("range", ()), strict=False)]


def blank_channels(intensity):
    """{channel: its value} of those that have one value in all voxels."""
    return {i: low for i, (_, low, high) in enumerate(_ranges(intensity)) if low == high}


def faults_of_contrast(intensity):
    """What is beyond the range of float32, or rounded away by it, as sentences without a file."""
    dtype = np.dtype(intensity.get("dtype", np.float32))
    for std, low, high in _ranges(intensity):
        most = max(abs(low), abs(high))
        if low != high and not (SMALLEST <= std and high - low <= LARGEST):
            yield f"values that float32 can hold, got up to {most:g} with a deviation of {std:g}"
        elif dtype.itemsize >= 4 and dtype != np.float32 and low != high and std < 16 * EPS * most:
            yield (
                f"values that float32 can tell apart, got up to {most:g} with a deviation of "
                f"{std:g}; subtract an offset"
            )


def clip_fill(channel, intensity=None):
    """A channel (D, H, W) or part of one with its fill values, if it has any, at the nearest other.

    intensity: `intensity_statistics` of the channel alone, if they are known.
    """
    intensity = intensity or intensity_statistics(channel[None])
    apart = "typical" in intensity and describe_fill(intensity)
    return channel.clip(*intensity["typical"]["range"][0]) if apart else channel


def describe_fill(intensity):
    """A sentence on the values that `_typical` has left out; "" for none."""
    ends, usual = intensity["range"], intensity.get("typical", intensity)["range"]
    apart = {a[0] for a, b in zip(ends, usual, strict=True) if a[0] < b[0]}
    apart |= {a[1] for a, b in zip(ends, usual, strict=True) if a[1] > b[1]}
    named = " and ".join(f"{value:g}" for value in sorted(apart))
    what = "lie far from all others, as fill values do: they are clipped, and do not count in"
    return f"values up to {named} {what} mean, deviation and percentiles" if apart else ""
