"""Sliding-window prediction of volumes of any size: windows go in order of z, and only the slab
of planes that they still touch is in memory.

    probs = predict_volume(network, volume, (72, 136, 136))           # (1, D, H, W) float32
    for z0, planes in predict_slabs(network, volume, (72, 136, 136), channels=2):
        ...                                          # (2, d, H, W), z in order: of two regions

Windows stand on a Cartesian grid of starts. The Gaussian weight of a window is a product of three
1-D weights, and each axis is normalised over its own windows (weight divided by the sum of the
weights at that voxel). A product of three partitions of unity is one too, so no volume of summed
weights is kept and no floor under a small sum is needed: the border has its full weight.

Memory on the device: a slab of K x floor(window_z * ratio_z) x H x W float32, beside what the
network needs for one batch. If the device has less, fewer windows go at once, and then the slab
lies on the CPU: see `WindowFit`.
"""

import contextlib
import functools
import math
from collections import deque
from itertools import combinations, product

import numpy as np
import torch

import data
from patches.intensity import normalise, widened, within_float32
from runtime.device_memory import WindowFit
from runtime.microbatch import listed, nothing
from runtime.onednn import OneDNN
from runtime.precision import PRECISIONS, autocast
from runtime.window_axis import rows_needed, touching, window_spans
from runtime.window_transfer import is_asynchronous, read_ahead, to_host

FLIPS = [axes for n in range(4) for axes in combinations((-3, -2, -1), n)]  # all 8 of z, y, x
# Sent to the device as stored (a uint8 box is a quarter of its float32 copy); others, among them
# every type in foreign byte order, become float32 on the host.
SENT_AS_STORED = [np.dtype(t) for t in ("u1", "i1", "u2", "i2", "i4", "f2", "f4")]


# ---------------------------------------------------------------------------- where it runs


def resolve_device(name):
    """(torch.device, reason) for auto, cpu, cuda or cuda:N; ValueError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"the first of {torch.cuda.device_count()} GPUs"
        return torch.device("cpu"), "no GPU is visible to torch"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # so that its generator is the one that is saved
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"run.device: expected auto, cpu or cuda:N, got {name} ({reason})"
        ) from error
    return device, "as set"


def windows_at_once(batch, device):
    """How many windows go through the network at once; batch None: what is fastest.

    On a CPU this is one: with two, what a layer makes leaves the caches, and often the size up to
    which the C library keeps memory, so that each layer gets its pages from the kernel anew.
    """
    if batch is not None:
        return batch
    return 1 if torch.device(device).type == "cpu" else 2


# ---------------------------------------------------------------------------- one batch of windows


def _interpolate(x, taps):
    """x (C, D, H, W) along z, y, x by the taps of each axis; None leaves an axis as it is."""
    for axis, tap in enumerate(taps, start=1):
        if tap is not None:
            low, high, fraction = tap
            fraction = fraction.view([-1 if a == axis else 1 for a in range(x.ndim)])
            x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), fraction)
    return x


def _read_box(volume, device, spans):
    """The box (C, ...) that three spans read, on the host; pinned if the device is a GPU."""
    box = volume[(slice(None), *(span.read for span in spans))]
    dtype = box.dtype if box.dtype in SENT_AS_STORED else np.float32
    with np.errstate(over="ignore"):  # `within_float32` cuts it
        box = torch.from_numpy(np.array(box, dtype=dtype, order="C"))
    return box.pin_memory() if torch.device(device).type == "cuda" else box


def _patch(box, spans, normalize, device):
    """One network input (C, *window) float32 on the device from the box that its spans read."""
    box = box.to(device, non_blocking=True)
    patch = _interpolate(within_float32(widened(box)).float(), [span.to_network for span in spans])
    return patch if normalize is None else normalize(patch)


def _call(network, patches, precision, channels):
    """Logits (B, K, *window) of a batch; the one place where the network runs."""
    alone = patches.device.type == "cpu" and precision == "fp32" and len(patches) == 1
    fast = OneDNN() if alone and torch.backends.mkldnn.is_available() else contextlib.nullcontext()
    with autocast(patches.device, precision), fast:
        logits = listed(network(patches))[0]
    expected = (patches.shape[0], channels, *patches.shape[2:])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"network: expected logits of shape {expected} for an input of "
            f"{tuple(patches.shape)}, got {tuple(logits.shape)}; give a network with {channels} "
            f"output channel{'s' * (channels > 1)} that keeps the window's shape"
        )
    return logits


def _probabilities(views, patches, precision, channels, exclusive, disagreement):
    """Probabilities (B, K, *window) float32: the mean over views, pairs of a network and the axes
    that it sees flipped. disagreement: followed by that of the views, see `predict_slabs`."""
    total, squares = 0.0, 0.0
    for count, (network, axes) in enumerate(views):
        logits = _call(network, patches.flip(axes), precision, channels).float()
        probs = logits.softmax(dim=1) if exclusive else logits.sigmoid()
        probs = probs.flip(axes)
        if disagreement and count:  # Welford's sum: a mean of squares less a square cancels
            squares = squares + (probs - total / count).square() * (count / (count + 1))
        total = total + probs
    mean = total / len(views)
    if not disagreement:
        return mean
    variance = squares / len(views)
    if exclusive:
        variance = variance.sum(dim=1, keepdim=True) / 2
    return torch.cat([mean, variance.sqrt()], dim=1)


@torch.inference_mode()
def _add_windows(slab, corner, windows, predict, normalize, device):
    """Add the blended probabilities of a batch of windows of one z row to its slab, or none.

    slab (K, d, h, w) begins at the plane where the windows begin, and at the corner (y, x) of the
    volume; windows are pairs of (z, y, x) spans and the box that they read. What reaches out of the
    slab is left out. On a GPU the host waits for nothing here.
    """
    patches = torch.stack([_patch(box, spans, normalize, device) for spans, box in windows])
    weighted = []
    for probs, ((z, y, x), _) in zip(predict(patches), windows, strict=True):
        probs = _interpolate(probs, [z.to_volume, y.to_volume, x.to_volume])
        probs = probs * (z.weight[:, None, None] * y.weight[:, None] * x.weight)
        for axis, span, low in zip((2, 3), (y, x), corner, strict=True):
            start, stop = max(span.start, low), min(span.stop, low + slab.shape[axis])
            probs = probs.narrow(axis - 4, start - span.start, stop - start)
        weighted.append(probs.to(slab.device))
    for probs, ((_, y, x), _) in zip(weighted, windows, strict=True):  # needs no more memory
        y0, x0 = (max(span.start - low, 0) for span, low in zip((y, x), corner, strict=True))
        _, d, h, w = probs.shape
        slab[:, :d, y0 : y0 + h, x0 : x0 + w] += probs


# ---------------------------------------------------------------------------- volumes


def _check(volume, window, overlap, ratio, precision, batch, disagreement, views):
    """ValueError with one sentence per argument that cannot work."""
    faults = []
    if len(volume.shape) != 4 or min(volume.shape) < 1:
        shape = tuple(volume.shape)
        faults.append(f"volume: expected (C, D, H, W) without an empty axis, got shape {shape}")
    if len(window) != 3 or any(int(w) != w or w < 1 for w in window):
        faults.append(f"window: expected three whole numbers (z, y, x) of 1 or more, got {window}")
    if len(ratio) != 3 or not all(math.isfinite(r) and r > 0 for r in ratio):
        faults.append(f"ratio: expected three numbers (z, y, x) above 0, got {ratio}")
    if not 0 <= overlap < 1:
        faults.append(f"overlap: expected a share of at least 0 and below 1, got {overlap}")
    if precision not in PRECISIONS:
        faults.append(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if batch is not None and batch < 1:
        faults.append(f"batch: expected 1 or more windows at once, got {batch}")
    if disagreement and len(views) == 1:
        faults.append("disagreement: expected flips or several networks, got one network, no flips")
    if faults:
        raise ValueError("; ".join(faults))


def predict_slabs(
    network,
    volume,
    window,
    overlap=0.5,
    *,
    channels=1,
    exclusive=False,
    ratio=(1, 1, 1),
    normalize=None,
    batch=None,
    flips=False,
    disagreement=False,
    device="cpu",
    precision="fp32",
    progress=nothing,
    remembered=None,
    report=nothing,
    rows=None,
    box=None,
    skip=None,
):
    """Finished planes of the prediction in order of z: (z0, probs (K, d, H, W) float32 numpy).

    The planes are disjoint and cover the volume, or those of some `window_rows`: a range of their
    numbers; box: slices of y and x, of which alone they are. Voxels have the same bits in whatever
    range and box they are predicted, one window at once. skip((z, y, x) spans) -> whether a window
    is neither read nor predicted, its share being 0: called in order, by the thread that reads.

    network(patches (B, C, *window) float32) -> logits (B, K, *window), or a list of logits of
    which the first counts; the caller has put it on the device and in eval mode. Of a list of
    networks it is the mean of the probabilities. K: channels, exclusive by a softmax or sigmoids.
    volume (C, D, H, W): what is sliced, any real dtype; only boxes are read from it. An axis
    shorter than the window is padded with its edge voxels, cut off afterwards.
    window (z, y, x) in voxels of the network; ratio (z, y, x): the network's voxel size over the
    volume's. Where it is not 1, each window is interpolated to the network's spacing, and its
    probabilities back; blending happens in voxels of the volume.
    normalize(patch (C, *window) float32 on the device) -> the same shape, after interpolation as
    in training; it sees one window at a time, so its numbers must not come from that window.
    flips: mean of the probabilities over the 8 flips, at 8 times the cost. batch: windows of one
    z row that go through the network at once, None: see `windows_at_once`. precision: fp32, bf16
    or fp16 (autocast); sums are float32 always. progress(done, total): called with numbers of
    windows. remembered, report(kind, text, **figures): see `WindowFit`.
    disagreement: K channels follow, the standard deviation of the probabilities over flips and
    networks; if exclusive one, the root of half the sum of their variances. A window's is blended
    as its probabilities are: never less than that of blended flips, without a slab for each.
    ValueError, at the call and naming all faults, for arguments that cannot work.
    """
    views = [*product(listed(network), FLIPS if flips else FLIPS[:1])]
    _check(volume, window, overlap, ratio, precision, batch, disagreement, views)
    how = {"precision": precision, "channels": channels, "exclusive": exclusive}
    predict = functools.partial(_probabilities, views, disagreement=disagreement, **how)
    channels += disagreement * (1 if exclusive else channels)
    axes = window_spans(volume.shape[1:], window, overlap, ratio, device)
    remembered = {} if remembered is None else remembered
    box = box or [slice(0, size) for size in volume.shape[2:]]
    shape = (volume.shape[1], *(wanted.stop - wanted.start for wanted in box))
    fit = WindowFit(shape, windows_at_once(batch, device), device, remembered, report)
    rows = range(len(axes[0])) if rows is None else rows
    return _slabs(volume, axes, rows, box, channels, skip, predict, normalize, fit, progress)


def _slabs(volume, axes, rows, box, channels, skip, predict, normalize, fit, progress):
    """The generator behind predict_slabs, whose arguments are checked by then.

    Beside a GPU boxes are read a batch ahead, and planes are handed out a row late, when the GPU
    has the next row to do. Where memory ran out, boxes that are read wait on the host.
    """
    spans, columns = axes[0], list(product(*map(touching, axes[1:], box)))
    corner, size = [wanted.start for wanted in box], [wanted.stop - wanted.start for wanted in box]
    ends = [*(z.start for z in spans[1:]), volume.shape[1]]
    needed = rows_needed(spans, rows)
    overlaps = is_asynchronous(fit.device)

    def read(spans):
        return None if skip and skip(spans) else _read_box(volume, fit.device, spans)

    jobs = ((spans[row], y, x) for row in needed for y, x in columns)
    slab, done, total, finished = None, 0, len(needed) * len(columns), deque()
    with contextlib.closing(read_ahead(read, jobs, fit.batch if overlaps else 0)) as boxes:
        for row in needed:
            z, left, windows = spans[row], len(columns), []
            while left:
                while len(windows) < min(fit.batch, left):
                    window = next(boxes)
                    if window[1] is not None:
                        windows.append(window)
                        continue
                    left -= 1
                    done += 1
                batch = windows[: fit.batch]
                try:
                    if slab is None:
                        shape = (channels, z.stop - z.start, *size)
                        slab = torch.zeros(shape, device=fit.slab_device)
                    if batch:
                        _add_windows(slab, corner, batch, predict, normalize, fit.device)
                except RuntimeError as error:
                    fit.lower(error)
                    slab = None if slab is None else slab.to(fit.slab_device)
                    continue
                del windows[: len(batch)]
                left -= len(batch)
                done += len(batch)
                progress(done, total)
            depth = ends[row] - z.start
            if row >= rows.start:
                finished.append((z.start, to_host(slab[:, :depth])))
            # Plane by plane, because a second slab may not fit.
            kept = slab.shape[1] - depth
            for plane in range(kept):
                slab[:, plane] = slab[:, plane + depth]
            slab[:, kept:] = 0
            while len(finished) > overlaps:
                yield _arrived(finished)
    while finished:
        yield _arrived(finished)


def _arrived(finished):
    """Take (z0, planes on the host) of the first row from those that are being copied."""
    z0, later = finished.popleft()
    return z0, later()


def network_ratio(spacing, wanted):
    """The ratio of `predict_slabs`, of voxels of this spacing; None: the network's. wanted: as in
    `data.network_spacing`."""
    if spacing is None:
        return (1, 1, 1)
    sizes = zip(data.network_spacing(spacing, wanted), spacing, strict=True)
    return [seen / stored for seen, stored in sizes]


def predict_case(network, image, spacing, intensity, *, wanted, clip, typical=True, **how):
    """`predict_slabs` of an image as it is stored, which is seen as in training.

    spacing: of its voxels, None: the network's; intensity: its statistics. wanted, clip, typical:
    as in `data.network_spacing` and `data.normalisation`; how: arguments of `predict_slabs`.
    """
    scale = data.normalisation(intensity, clip, typical=typical)
    how["ratio"] = network_ratio(spacing, wanted)
    return predict_slabs(network, image, normalize=functools.partial(normalise, **scale), **how)


def predict_volume(network, volume, window, overlap=0.5, **how):
    """What `predict_slabs` yields, (K, D, H, W) float32 numpy, of a whole volume in its own voxels.

    Arguments and errors as in `predict_slabs`. Host memory: the result itself.
    """
    probs = None
    for z0, planes in predict_slabs(network, volume, window, overlap, **how):
        if probs is None:
            probs = np.empty((len(planes), *volume.shape[1:]), np.float32)
        probs[:, z0 : z0 + planes.shape[1]] = planes
    return probs
