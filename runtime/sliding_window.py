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

import functools
import math
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch

import data
from patches.intensity import normalise, within_float32
from runtime.microbatch import free_memory, listed, memory_figures, nothing, out_of_memory
from runtime.precision import PRECISIONS, autocast
from runtime.signals import CannotGoOn

FLIPS = [axes for n in range(4) for axes in combinations((-3, -2, -1), n)]  # all 8 of z, y, x
SIGMAS_PER_WINDOW = 8
# Sent to the device as stored (a uint8 box is a quarter of its float32 copy); others, among them
# every type in foreign byte order, become float32 on the host.
SENT_AS_STORED = [np.dtype(t) for t in ("u1", "i1", "i2", "i4", "f2", "f4")]


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


# ---------------------------------------------------------------------------- geometry of one axis


@dataclass(frozen=True)
class Span:
    """What one window does on one axis; start, stop and read count voxels of the volume.

    to_network and to_volume interpolate along the axis by (low, high, fraction), three tensors:
    out[i] = lerp(in[low[i]], in[high[i]], fraction[i]). They are None where nothing changes.
    """

    start: int  # voxels start..stop get this window's probabilities
    stop: int
    read: slice  # voxels that the network's input is interpolated from
    to_network: tuple | None  # read voxels -> network voxels
    to_volume: tuple | None  # network voxels -> voxels start..stop
    weight: torch.Tensor  # (stop - start,) share of this window in the blend


def window_starts(size, extent, overlap):
    """Starts of the windows on an axis of `size` voxels: evenly spread integers.

    The first is 0, the last size - extent, and no step is above extent * (1 - overlap) (or above
    1 where that is less). A window at least as long as the axis is alone and centered on it, so
    its start is 0 or negative.
    """
    if extent >= size:
        return [(size - extent) // 2]
    stride = max(1, math.floor(extent * (1 - overlap) + 1e-6))  # 10 * (1 - 0.8) is below 2
    gaps = math.ceil((size - extent) / stride)
    return [round(i * (size - extent) / gaps) for i in range(gaps + 1)]


def blend_weights(size, extent, starts):
    """Share of each window in each voxel of an axis: (windows, size) float64, columns sum to 1.

    Gaussian around the middle of the window with sigma = extent / 8: at the window's ends it is
    still 3e-4 of its top, so a voxel that only one window covers gets exactly 1.
    """
    offset = np.arange(size) - np.asarray(starts)[:, None] - (extent - 1) / 2
    gauss = np.exp(-0.5 * (offset * SIGMAS_PER_WINDOW / extent) ** 2)
    gauss[np.abs(offset) > (extent - 1) / 2] = 0.0
    return gauss / gauss.sum(axis=0)


def _taps(positions, size, device):
    """(low, high, fraction) at positions of an axis of `size` voxels, its edge repeated beyond."""
    positions = np.clip(positions, 0, size - 1)
    low = np.floor(positions).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    fraction = (positions - low).astype(np.float32)
    return tuple(torch.from_numpy(a).to(device) for a in (low, high, fraction))


def _extent(window, ratio):
    """Volume voxels that a window of network voxels holds on an axis."""
    return max(1, math.floor(window * ratio + 1e-6))


def axis_spans(size, window, overlap, ratio, device):
    """The `Span` of every window on one axis.

    Network voxel j lies at volume coordinate center + (j - (window - 1) / 2) * ratio. A window
    predicts the whole volume voxels that it holds, floor(window * ratio) of them.
    """
    extent = _extent(window, ratio)
    starts = window_starts(size, extent, overlap)
    spans = []
    for begin, weight in zip(starts, blend_weights(size, extent, starts), strict=True):
        center = begin + (extent - 1) / 2
        positions = center + (np.arange(window) - (window - 1) / 2) * ratio
        # Clipped to the volume twice: a padded window may begin or end wholly outside.
        first = min(max(math.floor(positions[0]), 0), size - 1)
        last = min(max(math.ceil(positions[-1]), 0), size - 1)
        start, stop = max(begin, 0), min(begin + extent, size)
        to_network = to_volume = None
        if ratio != 1 or (start, stop) != (begin, begin + window):
            back = (np.arange(start, stop) - center) / ratio + (window - 1) / 2
            to_network = _taps(positions - first, last + 1 - first, device)
            to_volume = _taps(back, window, device)
        share = torch.from_numpy(weight[start:stop]).float().to(device)
        spans.append(Span(start, stop, slice(first, last + 1), to_network, to_volume, share))
    return spans


def window_rows(shape, window, overlap, ratio):
    """(rows, windows in each): how many rows of windows `predict_slabs` goes through in a volume.

    Each row finishes the planes from its start to that of the next.
    """
    axes = zip(shape, window, ratio, strict=True)
    counts = [len(window_starts(size, _extent(w, r), overlap)) for size, w, r in axes]
    return counts[0], counts[1] * counts[2]


# ---------------------------------------------------------------------------- one batch of windows


def _interpolate(x, taps):
    """x (C, D, H, W) along z, y, x by the taps of each axis; None leaves an axis as it is."""
    for axis, tap in enumerate(taps, start=1):
        if tap is not None:
            low, high, fraction = tap
            fraction = fraction.view([-1 if a == axis else 1 for a in range(x.ndim)])
            x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), fraction)
    return x


def _read_patch(volume, spans, normalize, device):
    """One network input (C, *window) float32 from the box that its three spans read."""
    box = volume[(slice(None), *(span.read for span in spans))]
    dtype = box.dtype if box.dtype in SENT_AS_STORED else np.float32
    with np.errstate(over="ignore"):  # `within_float32` cuts it
        box = torch.from_numpy(np.array(box, dtype=dtype, order="C")).to(device)
    patch = _interpolate(within_float32(box).float(), [span.to_network for span in spans])
    return patch if normalize is None else normalize(patch)


def _call(network, patches, precision, channels):
    """Logits (B, K, *window) of a batch; the one place where the network runs."""
    with autocast(patches.device, precision):
        logits = listed(network(patches))[0]
    expected = (patches.shape[0], channels, *patches.shape[2:])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"network: expected logits of shape {expected} for an input of "
            f"{tuple(patches.shape)}, got {tuple(logits.shape)}; give a network with {channels} "
            f"output channel{'s' * (channels > 1)} that keeps the window's shape"
        )
    return logits


def _probabilities(networks, patches, flips, precision, channels, exclusive):
    """Probabilities (B, K, *window) float32: the mean over networks, and the 8 flips if wanted."""
    views = [*product(networks, FLIPS if flips else FLIPS[:1])]
    total = 0.0
    for network, axes in views:
        logits = _call(network, patches.flip(axes), precision, channels).float()
        probs = logits.softmax(dim=1) if exclusive else logits.sigmoid()
        total = total + probs.flip(axes)
    return total / len(views)


@torch.inference_mode()
def _add_windows(slab, volume, windows, predict, normalize, device):
    """Add the blended probabilities of a batch of windows of one z row to its slab, or none.

    slab (K, d, H, W) begins at the plane where the windows begin; windows are (z, y, x) spans.
    """
    patches = torch.stack([_read_patch(volume, spans, normalize, device) for spans in windows])
    weighted = []
    for probs, (z, y, x) in zip(predict(patches), windows, strict=True):
        probs = _interpolate(probs, [z.to_volume, y.to_volume, x.to_volume])
        probs = probs * (z.weight[:, None, None] * y.weight[:, None] * x.weight)
        weighted.append(probs.to(slab.device))
    for probs, (z, y, x) in zip(weighted, windows, strict=True):  # needs no more memory
        slab[:, : z.stop - z.start, y.start : y.stop, x.start : x.stop] += probs


# ---------------------------------------------------------------------------- memory


class WindowFit:
    """How many windows go at once and where the slab lies, for a volume of some size.

    Each time the device runs out of memory it is less: half as many windows, down to one, then the
    slab on the CPU. remembered: {"DxHxW": [windows, whether on the CPU]}, plain values that outlive
    the volume; a volume begins with what volumes of its size and smaller ones have needed.
    """

    def __init__(self, shape, batch, device, remembered, report):
        self.key, self.device, self.report = "x".join(map(str, shape)), device, report
        self.remembered, self.batch, self.on_cpu = remembered, batch, False
        for key, (windows, on_cpu) in remembered.items():
            if math.prod(map(int, key.split("x"))) <= math.prod(shape):
                self.batch, self.on_cpu = min(self.batch, windows), self.on_cpu or on_cpu

    @property
    def slab_device(self):
        return torch.device("cpu") if self.on_cpu else self.device

    def lower(self, error):
        """Ask for less memory after an error. Raises it if it is another one, and `CannotGoOn` if
        nothing is left that could be less."""
        if not out_of_memory(error):
            raise error
        where = (
            f"{self.device} ran out of memory{memory_figures(self.device)} in the prediction of a "
            f"volume of {self.key}"
        )
        if self.batch == 1 and self.on_cpu:
            raise CannotGoOn(
                f"{where} with one window at a time and the results on the CPU; lower "
                "inference.window"
            ) from error
        if self.batch > 1:
            self.batch //= 2
            what = f"{self.batch} windows at once"
        else:
            self.on_cpu, what = True, "the results on the CPU"
        self.remembered[self.key] = [self.batch, self.on_cpu]
        free_memory(error, self.device)
        text = f"{where}: it goes on with {what}, as will others of this size"
        self.report("cuda memory", text, windows=self.batch, on_cpu=self.on_cpu)


# ---------------------------------------------------------------------------- volumes


def _check(volume, window, overlap, ratio, precision, batch):
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
    if batch < 1:
        faults.append(f"batch: expected 1 or more windows at once, got {batch}")
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
    batch=1,
    flips=False,
    device="cpu",
    precision="fp32",
    progress=nothing,
    remembered=None,
    report=nothing,
    rows=None,
):
    """Finished planes of the prediction in order of z: (z0, probs (K, d, H, W) float32 numpy).

    The planes are disjoint and cover the volume, or those of some `window_rows`: a range of their
    numbers. Planes have the same bits in whatever range they are predicted.

    network(patches (B, C, *window) float32) -> logits (B, K, *window), or a list of logits of
    which the first counts; the caller has put it on the device and in eval mode. Of a list of
    networks it is the mean of the probabilities. K: channels, exclusive by a softmax or sigmoids.
    volume (C, D, H, W): array or HDF5 dataset, any real dtype; only boxes are read from it. An
    axis shorter than the window is padded with its edge voxels, cut off afterwards.
    window (z, y, x) in voxels of the network; ratio (z, y, x): the network's voxel size over the
    volume's. Where it is not 1, each window is interpolated to the network's spacing, and its
    probabilities back; blending happens in voxels of the volume.
    normalize(patch (C, *window) float32 on the device) -> the same shape, after interpolation as
    in training; it sees one window at a time, so its numbers must not come from that window.
    flips: mean of the probabilities over the 8 flips, at 8 times the cost. batch: windows of one
    z row that go through the network at once. precision: fp32, bf16 or fp16 (autocast); sums are
    float32 always. progress(done, total): called with numbers of windows. remembered,
    report(kind, text, **figures): see `WindowFit`.

    ValueError, at the call and naming all faults, for arguments that cannot work.
    """
    _check(volume, window, overlap, ratio, precision, batch)
    how = {"flips": flips, "precision": precision, "channels": channels, "exclusive": exclusive}
    predict = functools.partial(_probabilities, listed(network), **how)
    axes = [
        axis_spans(size, int(length), overlap, float(r), device)
        for size, length, r in zip(volume.shape[1:], window, ratio, strict=True)
    ]
    remembered = {} if remembered is None else remembered
    fit = WindowFit(volume.shape[1:], batch, device, remembered, report)
    rows = range(len(axes[0])) if rows is None else rows
    return _slabs(volume, axes, rows, channels, predict, normalize, fit, progress)


def _slabs(volume, axes, rows, channels, predict, normalize, fit, progress):
    """The generator behind predict_slabs, whose arguments are checked by then."""
    spans, columns = axes[0], list(product(*axes[1:]))
    ends = [*(z.start for z in spans[1:]), volume.shape[1]]
    # Rows before the first that is wanted reach into its planes.
    reach = sum(z.stop > spans[rows.start].start for z in spans[: rows.start])
    slab, done, total = None, 0, (reach + len(rows)) * len(columns)
    for row in range(rows.start - reach, rows.stop):
        z, first = spans[row], 0
        while first < len(columns):
            windows = [(z, y, x) for y, x in columns[first : first + fit.batch]]
            try:
                if slab is None:
                    shape = (channels, z.stop - z.start, *volume.shape[2:])
                    slab = torch.zeros(shape, device=fit.slab_device)
                _add_windows(slab, volume, windows, predict, normalize, fit.device)
            except RuntimeError as error:
                fit.lower(error)
                slab = None if slab is None else slab.to(fit.slab_device)
                continue
            first += len(windows)
            progress(done + first, total)
        done += len(columns)
        finished = ends[row] - z.start
        if row >= rows.start:
            # Of several channels at once a GPU would make a copy first.
            yield z.start, np.stack([channel[:finished].cpu().numpy() for channel in slab])
        # Plane by plane, because a second slab may not fit.
        kept = slab.shape[1] - finished
        for plane in range(kept):
            slab[:, plane] = slab[:, plane + finished]
        slab[:, kept:] = 0


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


def predict_volume(network, volume, window, overlap=0.5, *, channels=1, **how):
    """Probabilities (K, D, H, W) float32 numpy of a whole volume, in its own voxels.

    Arguments and errors as in `predict_slabs`. Host memory: the result itself.
    """
    probs = np.empty((channels, *volume.shape[1:]), np.float32)
    for z0, planes in predict_slabs(network, volume, window, overlap, channels=channels, **how):
        probs[:, z0 : z0 + planes.shape[1]] = planes
    return probs
