"""The intensity part of augmentation, on the device where the patches lie.

Nothing but torch, numpy and the standard library is imported, so that this file can be lifted out
with one copy. `sample_intensity_params` chooses what is done to a patch, in a worker, as a few plain
numbers; `normalise` and `change_intensity` do the work.

Each transform runs on the samples that chose it, one after the other, in place, and takes its
numbers as Python scalars: nothing is copied from the host, the device is never waited for, a sample
that chose nothing keeps its bits, and a sample comes out the same alone and in any batch, bit for
bit on a CPU, but for the last bits of a blur of a patch of a few voxels. Whoever calls it under
autocast or with TF32 allowed loses digits in the blur.

None depends on where the volume's zero lies: what is above the patch minimum stands for the signal.
"""

import math

import numpy as np
import torch

SMOOTHEST = 0.2  # of a blur: below this sigma in voxels a neighbour weighs under 1e-5
ORDERS = 3  # half waves of the illumination along each axis: 0, 1 or 2
TINY = 1e-12  # below any deviation that float32 noise could make of a constant patch

# ---------------------------------------------------------------------------- parameters


def sample_intensity_params(rng, *, settings):
    """Draw what `change_intensity` does to one patch.

    rng: numpy Generator; settings: plain dict of the `augment` settings with, for each name of
    `NAMES`, a probability `name` and a range `name_range`, and `dropout_boxes`; or None.
    Returns a dict of plain numbers: a value for each name that was chosen, `dropout_boxes` if
    dropout was, and always `noise_seed`, from which all that is random on the device follows; {}
    if settings is None. As many numbers are drawn whatever the settings say, so that one of them
    does not shift the others.
    """
    if settings is None:
        return {}
    chosen = {}
    for name in NAMES:
        wanted, value = rng.random(), rng.uniform(*settings[f"{name}_range"])
        if wanted < settings[name]:
            chosen[name] = float(value)
    fewest, most = settings["dropout_boxes"]
    # Generator.integers draws nothing at all for a range of one number.
    boxes = fewest + math.floor(rng.random() * (most - fewest + 1))
    if "dropout" in chosen:
        chosen["dropout_boxes"] = boxes
    chosen["noise_seed"] = int(rng.integers(2**62))
    return chosen


# ---------------------------------------------------------------------------- on the device


def normalise(image, *, mean, std, low=None, high=None):
    """Clip to [low, high] and standardise, as a new tensor.

    image (C, ...) of any float dtype; mean, std, low, high: one number per channel each, in the
    image's own unit; low and high None: no clipping. Where std is 0 the image is divided by 1e-6.
    """
    channels = []
    for i, channel in enumerate(image):
        if low is not None:
            channel = channel.clamp(low[i], high[i])
        channels.append((channel - mean[i]).div_(max(std[i], 1e-6)))
    return torch.stack(channels)


def change_intensity(images, chosen, spacings):
    """Do what `sample_intensity_params` chose, to each sample of a batch.

    images (B, C, D, H, W) float32, normalised, so that 1 is a standard deviation of the volume;
    chosen: B dicts; spacings: B tuples, the patch's voxels z, y, x in any unit. Returns a new
    tensor of the same shape, or `images` itself if no sample chose anything.

    In this order, as an image comes to be (x: the patch, m: its minimum, per channel, when the
    transform begins):
        illumination    m + (x - m) * gain, exp(-value) <= gain <= exp(value). See `_illuminate`.
        blur            Gaussian, sigma = value voxels of the finest axis.
        low_resolution  voxels `value` times larger, drawn down and up again. See `_soften`.
        rician          noise of magnitude images, sigma = value. See `_add_rician`.
        noise           x + value * normal noise.
        gamma           (x - m) ** value, brought back to the mean and deviation of x.
        contrast        mean + value * (x - mean).
        brightness      x + value.
        dropout         boxes over this share of the voxels, filled with the mean.
    Rician noise comes before Gaussian noise, whose minimum would be no longer the image's.

    ValueError for another number of dimensions, of dicts or of spacings, and for an unknown name.
    """
    _check(images, chosen, spacings)
    if not any(name in own for own in chosen for name in NAMES):
        return images
    images = images.clone(memory_format=torch.contiguous_format)
    for patch, own, spacing in zip(images, chosen, spacings, strict=True):
        for names, change in CHANGES:
            if any(name in own for name in names):
                change(patch, own, spacing)
    return images


def _check(images, chosen, spacings):
    if images.ndim != 5 or not images.is_floating_point():
        raise ValueError(
            "images: expected (B, C, D, H, W) of a float dtype, "
            f"got {tuple(images.shape)} of {images.dtype}"
        )
    if not len(chosen) == len(spacings) == len(images):
        raise ValueError(
            f"expected one dict of choices and one spacing for each of {len(images)} samples, "
            f"got {len(chosen)} and {len(spacings)}"
        )
    unknown = {name for own in chosen for name in own} - {*NAMES, "dropout_boxes", "noise_seed"}
    if unknown:
        raise ValueError(f"chosen: expected names of {NAMES}, got {sorted(unknown)}")


# Each changes a contiguous patch (C, D, H, W) in place, by one signature, so that `CHANGES` can be
# a table; chosen, spacing: of this sample.


def _illuminate(patch, chosen, spacing):
    """A gain that varies slowly over the patch, each channel by a field of its own.

    Its logarithm is a sum of the lowest cosines along each axis but the constant, as the bias field
    of Ashburner and Friston 2005 (Unified segmentation), with normal weights, scaled to a largest
    absolute value of chosen["illumination"]. So it sums to 0 over the patch, and the gain's
    geometric mean is 1. An axis of one voxel has no slope; a patch of one voxel is left as it is.
    """
    orders = [min(ORDERS, n) for n in patch.shape[1:]]
    field = _normal(patch.new_empty(len(patch), *orders), chosen, "illumination")
    field[:, 0, 0, 0] = 0
    for axis, n in enumerate(patch.shape[1:], start=1):
        place = (torch.arange(n, device=patch.device, dtype=patch.dtype) + 0.5) * (math.pi / n)
        order = torch.arange(orders[axis - 1], device=patch.device, dtype=patch.dtype)
        field = _along(field, torch.cos(place[:, None] * order), axis)
    largest = torch.maximum(field.amax(dim=(1, 2, 3), keepdim=True), -_low(field)).clamp_min(TINY)
    gain = field.mul_(chosen["illumination"] / largest).exp_()
    low = _low(patch)
    patch.sub_(low).mul_(gain).add_(low)


def _soften(patch, chosen, spacing):
    """Blur and low resolution: one matrix per axis does both, borders repeated.

    Both act in physical units: an axis of coarser voxels is blurred by fewer of them, and is
    lowered only if the new voxels, value times the finest spacing, are larger than its own. Lowered
    is by averaging over the new voxels, a grid about the patch's middle, and raised linearly
    between their centres (after the low-resolution simulation of nnU-Net, Isensee et al. 2021,
    which takes the nearest voxel down, a cubic up, and every axis alike).

    A matrix costs 4 to 7 ms per axis of 72 x 136 x 136 on a CPU core, whatever the width; a
    convolution of 9 taps 27 ms.
    """
    changed = patch
    for axis, step in enumerate(spacing, start=1):
        n, finest = patch.shape[axis], min(spacing) / step
        sigma = chosen.get("blur", 0.0) * finest
        factor = chosen.get("low_resolution", 1.0) * finest
        matrices = [_blurring(n, sigma, patch)] if sigma >= SMOOTHEST else []
        if factor > 1:
            matrices.append(_lowering(n, factor, patch))
        if n > 1 and matrices:
            matrix = matrices[0] if len(matrices) == 1 else matrices[1] @ matrices[0]
            changed = _along(changed, matrix, axis)
    patch.copy_(changed)


def _blurring(n, sigma, like):
    """(n, n): a Gaussian of sigma voxels, cut where scipy.ndimage.gaussian_filter cuts it."""
    reach = int(4 * sigma + 0.5)
    place = torch.arange(n, device=like.device, dtype=like.dtype)
    padded = torch.arange(-reach, n + reach, device=like.device, dtype=like.dtype)
    away = padded - place[:, None]
    weights = torch.exp(-0.5 * (away / sigma) ** 2) * (away.abs() <= reach)
    border = (padded.clamp(0, n - 1)[:, None] == place).to(like.dtype)
    return (weights / weights.sum(dim=1, keepdim=True)) @ border


def _lowering(n, factor, like):
    """(n, n): to voxels that are `factor` times larger, and back."""
    fewer = max(math.ceil(n / factor - 1e-6), 1)  # a rounding error must not add a voxel
    first = (n - fewer * factor) / 2  # the outer ones hang over both ends alike
    voxel = torch.arange(n, device=like.device, dtype=like.dtype)
    edge = torch.arange(fewer, device=like.device, dtype=like.dtype)[:, None] * factor + first
    shared = torch.minimum(edge + factor, voxel + 1) - torch.maximum(edge, voxel)
    down = shared.clamp_min(0)
    down = down / down.sum(dim=1, keepdim=True)
    place = ((voxel + 0.5 - first) / factor - 0.5).clamp(0, fewer - 1)[:, None]
    between = torch.arange(fewer, device=like.device, dtype=like.dtype)
    up = (1 - (place - between).abs()).clamp_min(0)
    return up @ down


def _along(box, matrix, axis):
    """A matrix (m, n) applied to axis 1, 2 or 3, of length n, of a box (C, D, H, W)."""
    shape = (*box.shape[:axis], len(matrix), *box.shape[axis + 1 :])
    if axis == 3:
        return box @ matrix.T
    trailing = math.prod(box.shape[axis + 1 :])
    return (matrix @ box.reshape(-1, box.shape[axis], trailing)).view(shape)


def _add_rician(patch, chosen, spacing):
    """m + sqrt((x - m + n1)^2 + n2^2), n1 and n2 normal with deviation chosen["rician"].

    The magnitude of a complex signal with noise in both parts (Gudbjartsson and Patz 1995): where
    there is no signal, a Rayleigh distribution of mean 1.25 sigma.
    """
    low, sigma = _low(patch), chosen["rician"]
    noise = _normal(patch.new_empty(2, *patch.shape), chosen, "rician").mul_(sigma)
    torch.hypot(patch.sub_(low).add_(noise[0]), noise[1], out=patch).add_(low)


def _add_noise(patch, chosen, spacing):
    patch.add_(_normal(torch.empty_like(patch), chosen, "noise"), alpha=chosen["noise"])


def _bend(patch, chosen, spacing):
    """Gamma. A constant patch stays as it is.

    Dividing by the range before the power would only scale the result, and the deviation that it is
    brought back to undoes every scale.
    """
    mean, std = _mean(patch), _std(patch)
    patch.sub_(_low(patch)).pow_(chosen["gamma"])
    scale = std / _std(patch).clamp_min(TINY)
    patch.sub_(_mean(patch)).mul_(scale).add_(mean)


def _stretch(patch, chosen, spacing):
    """Contrast and brightness."""
    contrast, brightness = chosen.get("contrast", 1.0), chosen.get("brightness", 0.0)
    shift = brightness if contrast == 1 else _mean(patch) * (1 - contrast) + brightness
    patch.mul_(contrast).add_(shift)


def _blank(patch, chosen, spacing):
    """Dropout: what is hidden in a gap is to be bridged, so label and valid stay."""
    mean = _mean(patch)
    rng = np.random.default_rng(chosen["noise_seed"])
    for box in blank_boxes(
        rng, patch.shape[1:], share=chosen["dropout"], count=chosen["dropout_boxes"]
    ):
        patch[(slice(None), *box)] = mean


def blank_boxes(rng, shape, *, share, count):
    """Boxes that do not overlap and cover this share of a patch, as tuples of slices z, y, x.

    The patch is cut into `count` cells at random places, across the longest side each time; each
    cell holds one box of its own proportions and place, and what rounding to voxels adds or lacks
    is carried over to the next. Fewer boxes where the patch has too few voxels to cut or to cover.
    """
    boxes, covered, passed = [], 0, 0
    for start, size in _cells(rng, (0, 0, 0), tuple(shape), count):
        passed += math.prod(size)
        edges = _edges(rng, size, share * passed - covered)
        corner = [
            a + int(rng.integers(n - e + 1)) for a, n, e in zip(start, size, edges, strict=True)
        ]
        if math.prod(edges):
            boxes.append(tuple(slice(a, a + e) for a, e in zip(corner, edges, strict=True)))
            covered += math.prod(edges)
    return boxes


def _cells(rng, start, size, count):
    """Cut a box into disjoint ones, (start, size) each: `count`, or as many as it has room for."""
    axis = int(np.argmax(size))
    if count == 1 or size[axis] == 1:
        return [(start, size)]
    before = int(rng.integers(1, count))  # cells on this side of the cut
    place = size[axis] * (before / count + rng.uniform(-0.25, 0.25) / count)
    place = min(max(round(place), 1), size[axis] - 1)
    after = tuple(a + place * (i == axis) for i, a in enumerate(start))
    sizes = (
        [m if i == axis else n for i, n in enumerate(size)] for m in (place, size[axis] - place)
    )
    left, right = (tuple(s) for s in sizes)
    return _cells(rng, start, left, before) + _cells(rng, after, right, count - before)


def _edges(rng, size, voxels):
    """Edges of a box of about this many voxels within a cell; zeros for less than half a voxel."""
    if voxels < 0.5:
        return (0, 0, 0)
    edges, parts = [0, 0, 0], rng.dirichlet((4, 4, 4))
    # The longest side comes last and takes up the rounding of the others.
    for i in np.argsort(size, kind="stable"):
        rest = [j for j in range(3) if not edges[j]]
        room = math.prod(size[j] for j in rest)
        left = min(voxels / math.prod(e for e in edges if e), room)
        part = parts[i] / sum(parts[j] for j in rest)
        edges[i] = min(max(round(size[i] * (left / room) ** part), 1), size[i])
    return tuple(edges)


def _normal(empty, chosen, name):
    """Fill with normal noise that depends on the seed and on the transform alone."""
    seed = chosen["noise_seed"] + RANDOM.index(name)
    return empty.normal_(generator=torch.Generator(empty.device).manual_seed(seed))


def _low(patch):
    return patch.amin(dim=(1, 2, 3), keepdim=True)


def _mean(patch):
    return patch.mean(dim=(1, 2, 3), keepdim=True)


def _std(patch):
    return patch.std(dim=(1, 2, 3), keepdim=True, correction=0)


CHANGES = (
    (("illumination",), _illuminate),
    (("blur", "low_resolution"), _soften),
    (("rician",), _add_rician),
    (("noise",), _add_noise),
    (("gamma",), _bend),
    (("contrast", "brightness"), _stretch),
    (("dropout",), _blank),
)
NAMES = tuple(name for names, _ in CHANGES for name in names)
RANDOM = ("illumination", "rician", "noise")  # a stream of its own each
