"""What prepare.py finds out about a volume once: coordinates of its classes, intensities."""

import numpy as np

MAX_COORDINATES = 20_000
PERCENTILES = (0.5, 1.0, 5.0, 50.0, 95.0, 99.0, 99.5)


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


def intensity_statistics(image):
    """Mean, std and percentiles of the non-zero finite voxels, per channel, as lists.

    image (C, D, H, W). A channel without such a voxel gets mean 0, std 1 and percentiles 0.
    """
    out = {"mean": [], "std": [], "percentiles": {str(p): [] for p in PERCENTILES}}
    for channel in image:
        values = channel[(channel != 0) & np.isfinite(channel)]
        empty = values.size == 0
        out["mean"].append(0.0 if empty else float(values.mean(dtype=np.float64)))
        out["std"].append(1.0 if empty else float(values.std(dtype=np.float64)))
        cuts = np.zeros(len(PERCENTILES)) if empty else np.percentile(values, PERCENTILES)
        for p, cut in zip(PERCENTILES, cuts, strict=True):
            out["percentiles"][str(p)].append(float(cut))
    return out
