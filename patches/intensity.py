"""The intensity part of augmentation, on the device where the patches lie.

Nothing but torch, numpy and the standard library is imported, so that this file can be lifted out
with one copy. `sample_intensity_params` chooses what is done to a patch, in a worker, as a few
plain numbers; `normalise` and `change_intensity` do the work.

Each transform runs in place on the samples that chose it, with its numbers as Python scalars: the
device is never waited for. A sample comes out the same alone and in any batch. None depends on the
volume's zero: what is above the patch minimum is the signal.
"""

import math

import numpy as np
import torch

SMOOTHEST = 0.2  # of a blur: below this sigma in voxels a neighbour weighs under 1e-5
ORDERS = 3  # half waves of the illumination along each axis: 0, 1 or 2
FARTHEST = torch.finfo(torch.float32).max / 4  # differences of two such values stay finite


def sample_intensity_params(rng, *, settings):
    """Sample what `change_intensity` does to one patch.

    rng: numpy Generator; settings: plain dict of the `augment` settings with, for each name of
    `NAMES`, a probability `name` and a range `name_range` (without one the value is 1), and
    `dropout_boxes`; or None.
    Returns a dict of plain numbers: a value for each name that was chosen, `dropout_boxes` if
    dropout was, and always `noise_seed`, from which all that is random on the device follows; {}
    if settings is None. One setting does not shift the random numbers of the others.
    """
    if settings is None:
        return {}
    chosen = {}
    for name in NAMES:
        chance, value = rng.random(), rng.uniform(*settings.get(f"{name}_range", (1, 1)))
        if chance < settings[name]:
            chosen[name] = float(value)
    fewest, most = settings["dropout_boxes"]
    # Generator.integers takes no random number at all for a range of one.
    boxes = fewest + math.floor(rng.random() * (most - fewest + 1))
    if "dropout" in chosen:
        chosen["dropout_boxes"] = boxes
    chosen["noise_seed"] = int(rng.integers(2**62))
    return chosen


# ---------------------------------------------------------------------------- on the device


def widened(box):
    """uint16, for which torch has few operations, as int32; other types as they are."""
    if box.dtype != torch.uint16:
        return box
    return box.view(torch.int16).int().bitwise_and_(0xFFFF)


def within_float32(image):
    """Integers as they are, floats as float32; values beyond its range (fill values) are cut."""
    return image.float().clamp(-FARTHEST, FARTHEST) if image.is_floating_point() else image


def normalise(image, *, mean, std, low=None, high=None):
    """Clip to [low, high] and standardise, as a new tensor.

    image (C, ...) of any float dtype; mean, std, low, high: one number per channel each, in the
    image's own unit; low and high None: no clipping. Where std is 0 nothing is divided.
    """
    channels = []
    for i, channel in enumerate(image):
        if low is not None:
            channel = channel.clamp(low[i], high[i])
        channels.append((channel - mean[i]).div_(std[i] or 1.0))
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
        low_resolution  voxels `value` times larger, averaged and raised again. See `_blur`.
        rician          noise of magnitude images, sigma = value. See `_add_rician`.
        noise           x + value * normal noise.
        gamma           (x - m) ** value, brought back to the mean and deviation of x.
        contrast        mean + value * (x - mean).
        brightness      x + value.
        dropout         boxes over this share of the voxels, filled with the mean.
    Rician noise comes before Gaussian noise, whose minimum would be no longer the image's.

    ValueError for another number of dimensions, of dicts or of spacings, and for an unknown name.
    """
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
    names = {name for params in chosen for name in params}
    if unknown := names - {*NAMES, "dropout_boxes", "noise_seed"}:
        raise ValueError(f"chosen: expected names of {NAMES}, got {sorted(unknown)}")
    if names.isdisjoint(NAMES):
        return images
    images = images.clone(memory_format=torch.contiguous_format)
    for patch, params, spacing in zip(images, chosen, spacings, strict=True):
        for group, change in CHANGES:
            if not params.keys().isdisjoint(group):
                change(patch, params, spacing)
    return images


# Each changes a contiguous patch (C, D, H, W) in place, by one signature, so that `CHANGES` can be
# a table; params, spacing: of this sample.


def _illuminate(patch, params, spacing):
    """A gain that varies slowly over the patch, each channel by a field of its own.

    Its logarithm is a sum of the lowest cosines along each axis but the constant, as the bias field
    of Ashburner and Friston 2005 (Unified segmentation), with normal weights, scaled to a largest
    absolute value of params["illumination"]. So the gain's geometric mean is 1.
    """
    orders = [min(ORDERS, n) for n in patch.shape[1:]]
    field = _normal(patch.new_empty(len(patch), *orders), params, "illumination")
    field[:, 0, 0, 0] = 0
    for axis, n in enumerate(patch.shape[1:], start=1):
        place = (_arange(0, n, patch) + 0.5) * (math.pi / n)
        order = _arange(0, orders[axis - 1], patch)
        field = _along(field, torch.cos(place[:, None] * order), axis)
    largest = torch.maximum(field.amax(dim=(1, 2, 3), keepdim=True), -_low(field))
    gain = field.mul_(_quotient(params["illumination"], largest)).exp_()
    low = _low(patch)
    patch.sub_(low).mul_(gain).add_(low)


def _blur(patch, params, spacing):
    """Blur and low resolution: one matrix per axis does both, borders repeated.

    Both act in physical units: an axis of coarser voxels is blurred by fewer of them, and changes
    resolution only if the new voxels, value times the finest spacing, are larger than its own. Down
    is an average over the new voxels, a grid about the patch's middle, up is linear between their
    centers (nnU-Net, Isensee et al. 2021: the nearest voxel down, a cubic up, every axis alike).
    """
    changed = patch
    for axis, step in enumerate(spacing, start=1):
        n, finest = patch.shape[axis], min(spacing) / step
        sigma = params.get("blur", 0.0) * finest
        factor = params.get("low_resolution", 1.0) * finest
        matrices = [_blur_matrix(n, sigma, patch)] if sigma >= SMOOTHEST else []
        if factor > 1:
            matrices.append(_low_resolution_matrix(n, factor, patch))
        if n > 1 and matrices:
            matrix = matrices[0] if len(matrices) == 1 else matrices[1] @ matrices[0]
            changed = _along(changed, matrix, axis)
    patch.copy_(changed)


def _blur_matrix(n, sigma, like):
    """(n, n): a Gaussian of sigma voxels, cut where scipy.ndimage.gaussian_filter cuts it."""
    reach = int(4 * sigma + 0.5)
    place, padded = _arange(0, n, like), _arange(-reach, n + reach, like)
    away = padded - place[:, None]
    weights = torch.exp(-0.5 * (away / sigma) ** 2) * (away.abs() <= reach)
    border = (padded.clamp(0, n - 1)[:, None] == place).to(like.dtype)
    return (weights / weights.sum(dim=1, keepdim=True)) @ border


def _low_resolution_matrix(n, factor, like):
    """(n, n): to voxels that are `factor` times larger, and back."""
    fewer = max(math.ceil(n / factor - 1e-6), 1)  # a rounding error must not add a voxel
    first = (n - fewer * factor) / 2  # the outer ones hang over both ends alike
    voxel, edge = _arange(0, n, like), _arange(0, fewer, like)[:, None] * factor + first
    shared = (torch.minimum(edge + factor, voxel + 1) - torch.maximum(edge, voxel)).clamp_min(0)
    down = shared / shared.sum(dim=1, keepdim=True)
    place = ((voxel + 0.5 - first) / factor - 0.5).clamp(0, fewer - 1)[:, None]
    up = (1 - (place - _arange(0, fewer, like)).abs()).clamp_min(0)
    return up @ down


def _along(box, matrix, axis):
    """A matrix (m, n) applied to axis 1, 2 or 3, of length n, of a box (C, D, H, W)."""
    shape = (*box.shape[:axis], len(matrix), *box.shape[axis + 1 :])
    if axis == 3:
        return box @ matrix.T
    trailing = math.prod(box.shape[axis + 1 :])
    return (matrix @ box.reshape(-1, box.shape[axis], trailing)).view(shape)


def _add_rician(patch, params, spacing):
    """m + sqrt((x - m + n1)^2 + n2^2), n1 and n2 normal with deviation params["rician"].

    The magnitude of a complex signal with noise in both parts (Gudbjartsson and Patz 1995): where
    there is no signal, a Rayleigh distribution of mean 1.25 sigma.
    """
    low, sigma = _low(patch), params["rician"]
    noise = _normal(patch.new_empty(2, *patch.shape), params, "rician").mul_(sigma)
    torch.hypot(patch.sub_(low).add_(noise[0]), noise[1], out=patch).add_(low)


def _add_noise(patch, params, spacing):
    patch.add_(_normal(torch.empty_like(patch), params, "noise"), alpha=params["noise"])


def _change_gamma(patch, params, spacing):
    """Gamma, after which mean and deviation are brought back; a constant patch stays as it is."""
    mean, std = _mean(patch), _std(patch)
    patch.sub_(_low(patch)).pow_(params["gamma"])
    patch.sub_(_mean(patch)).mul_(_quotient(std, _std(patch))).add_(mean)


def _change_contrast(patch, params, spacing):
    """Contrast and brightness."""
    contrast, brightness = params.get("contrast", 1.0), params.get("brightness", 0.0)
    shift = brightness if contrast == 1 else _mean(patch) * (1 - contrast) + brightness
    patch.mul_(contrast).add_(shift)


def _drop_boxes(patch, params, spacing):
    """Dropout: the network shall bridge such a gap, so label and valid stay."""
    mean, rng = _mean(patch), np.random.default_rng(params["noise_seed"])
    share, count = params["dropout"], params["dropout_boxes"]
    for box in blank_boxes(rng, patch.shape[1:], share=share, count=count):
        patch[(slice(None), *box)] = mean


def blank_boxes(rng, shape, *, share, count):
    """Boxes that do not overlap and cover this share of a patch, as tuples of slices z, y, x.

    The patch is cut into `count` cells at random, across the longest side each time; each holds one
    box. Fewer boxes where the patch has too few voxels to cut or to cover.
    """
    boxes, covered, passed = [], 0, 0
    for start, size in _cells(rng, (0, 0, 0), tuple(shape), count):
        passed += math.prod(size)
        edges = _edges(rng, size, share * passed - covered)
        cell = zip(start, size, edges, strict=True)
        corner = [first + int(rng.integers(n - edge + 1)) for first, n, edge in cell]
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
    left, right, second = list(size), list(size), list(start)
    left[axis], right[axis], second[axis] = place, size[axis] - place, start[axis] + place
    return _cells(rng, start, left, before) + _cells(rng, second, right, count - before)


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


def _normal(empty, params, name):
    """Fill with normal noise that depends on the seed and on the transform alone."""
    seed = params["noise_seed"] + RANDOM.index(name)
    return empty.normal_(generator=torch.Generator(empty.device).manual_seed(seed))


def _arange(start, stop, like):
    return torch.arange(start, stop, device=like.device, dtype=like.dtype)


def _low(patch):
    return patch.amin(dim=(1, 2, 3), keepdim=True)


def _mean(patch):
    return patch.mean(dim=(1, 2, 3), keepdim=True)


def _quotient(a, b):
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)


def _std(patch):
    return patch.std(dim=(1, 2, 3), keepdim=True, correction=0)


CHANGES = (
    (("illumination",), _illuminate),
    (("blur", "low_resolution"), _blur),
    (("rician",), _add_rician),
    (("noise",), _add_noise),
    (("gamma",), _change_gamma),
    (("contrast", "brightness"), _change_contrast),
    (("dropout",), _drop_boxes),
)
NAMES = tuple(name for names, _ in CHANGES for name in names)
RANDOM = ("illumination", "rician", "noise")  # a stream of its own each
