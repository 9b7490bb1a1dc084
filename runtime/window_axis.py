"""Where windows lie on an axis of a volume, what each reads there, and its share in the blend."""

import math
from dataclasses import dataclass

import numpy as np
import torch

SIGMAS_PER_WINDOW = 8


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

    @property
    def reach(self):
        """The voxels that it reads or predicts: of large network voxels it reads fewer."""
        return slice(min(self.start, self.read.start), max(self.stop, self.read.stop))


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


def extent_of(window, ratio):
    """Volume voxels that a window of network voxels holds on an axis."""
    return max(1, math.floor(window * ratio + 1e-6))


def axis_spans(size, window, overlap, ratio, device):
    """The `Span` of every window on one axis.

    Network voxel j lies at volume coordinate center + (j - (window - 1) / 2) * ratio. A window
    predicts the whole volume voxels that it holds, floor(window * ratio) of them.
    """
    extent = extent_of(window, ratio)
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


def window_spans(shape, window, overlap, ratio, device):
    """[[`Span`] of each axis] of the windows that `predict_slabs` goes through in a volume."""
    axes = zip(shape, window, ratio, strict=True)
    return [axis_spans(size, int(n), overlap, float(r), device) for size, n, r in axes]


def touching(spans, wanted):
    """The spans that predict voxels of a slice of their axis."""
    return [span for span in spans if span.start < wanted.stop and span.stop > wanted.start]


def rows_needed(spans, rows):
    """The rows of windows to predict for the planes of a range of them: those before that reach
    into its first plane too."""
    reach = sum(z.stop > spans[rows.start].start for z in spans[: rows.start])
    return range(rows.start - reach, rows.stop)


def window_rows(shape, window, overlap, ratio):
    """(rows, windows in each): how many rows of windows `predict_slabs` goes through in a volume.

    Each row finishes the planes from its start to that of the next.
    """
    axes = zip(shape, window, ratio, strict=True)
    counts = [len(window_starts(size, extent_of(w, r), overlap)) for size, w, r in axes]
    return counts[0], counts[1] * counts[2]
