"""Drawing a patch from a region: one grid, one interpolation, then the intensity part.

Crop, spacing, flip, quarter turn, rotation and scaling are one affine map from patch voxels to
source voxels,

    source = origin + matrix @ patch_index        (z, y, x, voxel centres at whole numbers)

`draw_spatial` and `draw_intensity` draw their parameters with a numpy generator (in a worker, on
the CPU, a few numbers); `place_patch` says which source box a patch needs; `draw_patch` and
`change_intensity` do the work on the tensors' own device.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

ISOTROPY = 2.0  # axes whose voxels are more than this many times the shortest are not rotated into
WHOLE = 1e-6  # a matrix or origin this close to whole numbers is taken as such, and is then exact


# ---------------------------------------------------------------------------- parameters


def draw_spatial(rng, source_spacing, spacing, *, settings):
    """Draw one map from patch voxels to source voxels, without its place.

    rng: numpy Generator; source_spacing: of the stored voxels, spacing: of the patch's, z, y, x in
    one unit; settings: plain dict of the `augment` settings, or None for no augmentation.
    Returns (matrix, upright): (3, 3) float64 each; upright lacks the rotation, so that it tells
    how much room the patch takes along the axes.
    """
    source_spacing, spacing = np.asarray(source_spacing, float), np.asarray(spacing, float)
    turn, rotation, zoom = np.eye(3), np.eye(3), np.ones(3)
    if settings is not None:
        turn = _turn(rng, spacing, settings)
        rotation = _rotation(rng, spacing, settings)
        zoom = _zoom(rng, settings)
    upright = turn @ np.diag(spacing / zoom)  # patch voxels to physical distances
    to_source = np.diag(1 / source_spacing)
    return to_source @ rotation @ upright, to_source @ upright


def _turn(rng, spacing, settings):
    """A signed permutation: flips, and quarter turns in the planes whose two spacings are equal."""
    turn = np.eye(3)
    for plane in itertools.combinations(range(3), 2):
        quarters = rng.integers(0, 4)
        wanted = rng.random() < settings["turn90"]
        if wanted and math.isclose(spacing[plane[0]], spacing[plane[1]], rel_tol=1e-3):
            turn = turn @ np.round(_rotate_in(plane, quarters * math.pi / 2))
    signs = np.where(rng.random(3) < settings["flip"], -1.0, 1.0)
    return turn @ np.diag(signs)


def _rotate_in(plane, angle):
    a, b = plane
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _rotation(rng, spacing, settings):
    """About z alone, or about every axis; never between axes of too different spacing if auto."""
    axes = settings["rotation_axes"]
    matrix = np.eye(3)
    for axis, plane in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        wanted, angle = rng.random(), math.radians(rng.uniform(*settings["rotation_degrees"]))
        ratio = max(spacing[list(plane)]) / min(spacing[list(plane)])
        allowed = axes == "all" or (axes == "z" and axis == 0)
        allowed = allowed or (axes == "auto" and ratio <= ISOTROPY)
        if allowed and wanted < settings["rotation"]:
            matrix = matrix @ _rotate_in(plane, angle)
    return matrix


def _zoom(rng, settings):
    """How many times larger things are shown, per axis; log-uniform: 1/2 is as likely as 2."""
    low, high = np.log(settings["scaling_range"])
    wanted, per_axis = rng.random(2)
    factors = np.exp(rng.uniform(low, high, size=3))
    if wanted >= settings["scaling"]:
        return np.ones(3)
    return factors if per_axis < settings["scaling_per_axis"] else np.full(3, factors[0])


def draw_intensity(rng, *, settings):
    """Draw what `change_intensity` does to one patch: a dict of plain numbers."""
    chosen = {}
    if settings is not None:
        for name in ("blur", "noise", "brightness", "contrast", "gamma"):
            wanted, value = rng.random(), rng.uniform(*settings[f"{name}_range"])
            if wanted < settings[name]:
                chosen[name] = float(value)
        chosen["noise_seed"] = int(rng.integers(2**62))
    return chosen


# ---------------------------------------------------------------------------- the place


def place_patch(matrix, upright, centre, patch, shape):
    """Origin of a patch around a source voxel, moved inside the volume, and the box it needs.

    centre: source coordinates that the patch centre should have; patch, shape: voxels, z, y, x.
    Along an axis that is shorter than the patch, the patch is centred and hangs over both ends.
    Returns (origin (3,), start (3,), stop (3,)): the box is source[start:stop], inside the volume.
    """
    patch, shape = np.asarray(patch), np.asarray(shape)
    half = np.abs(upright) @ (patch / 2)
    low, high = half - 0.5, shape - 0.5 - half
    centre = np.where(low <= high, np.clip(centre, low, high), (shape - 1) / 2)
    origin = centre - matrix @ ((patch - 1) / 2)
    if is_whole(matrix):
        origin = np.round(origin)
    corners = np.array(list(itertools.product(*((0, n - 1) for n in patch))))
    reached = origin + corners @ matrix.T
    start = np.clip(np.floor(reached.min(0) + WHOLE), 0, shape - 1).astype(int)
    stop = np.clip(np.ceil(reached.max(0) - WHOLE), 0, shape - 1).astype(int) + 1
    return origin, start, stop


def is_whole(matrix):
    """Whether a matrix is a signed permutation: then a patch is a copy, not an interpolation."""
    rounded = np.round(np.asarray(matrix))
    is_permutation = (np.abs(rounded).sum(0) == 1).all() and (np.abs(rounded).sum(1) == 1).all()
    return bool(is_permutation and np.abs(matrix - rounded).max() < WHOLE)


# ---------------------------------------------------------------------------- on the device


def draw_patch(
    image, label, *, matrix, origin, start, shape, patch, foreground, ignore_label, skeleton=None
):
    """Draw one patch from its box, on the box's device.

    image (C, d, h, w) any dtype, label (d, h, w) uint8 or None: the box source[start:start+dhw] of
    a volume of `shape`; matrix, origin: see the module; foreground: class ids that are foreground;
    skeleton (d, h, w) uint8 or None: of all classes, as a case file holds it.
    Returns image (C, D, H, W) float32, target (1, D, H, W) float32 of 0 and 1, valid
    (1, D, H, W) bool: inside the volume and labelled, and skeleton (1, D, H, W) float32 of 0 and 1,
    within the target, or None without one. Outside, the image repeats its border.
    The image is interpolated linearly; label and skeleton take the nearest voxel. Interpolating
    each class and taking the heaviest breaks thin tubes: benchmarks/label_interpolation.py.
    """
    matrix, origin = np.asarray(matrix, float), np.asarray(origin, float) - start
    faces = -np.asarray(start) - 0.5, np.asarray(shape) - start - 0.5  # of the volume
    exact = is_whole(matrix) and np.abs(origin - np.round(origin)).max() < WHOLE
    draw = _copy if exact else _interpolate
    stored = [box for box in (label, skeleton) if box is not None]
    image, drawn, valid = draw(image, stored, matrix, origin, faces, patch)
    if label is None:
        return image, torch.zeros_like(image[:1]), torch.zeros_like(valid), None
    label = drawn[0]
    if ignore_label is not None:
        valid = valid & (label != ignore_label)
    target = torch.zeros_like(valid)
    for class_id in foreground:
        target |= label == class_id
    target &= valid
    tube = None if skeleton is None else (target & (drawn[1] != 0)).float()
    return image, target.float(), valid, tube


# Numbers of the map go into the arithmetic as Python scalars: a small tensor made on the host
# would be a copy that the device must be waited for, for every patch.


def _copy(image, stored, matrix, origin, faces, patch):
    """Exact voxels: one index per source axis, then the axes in the patch's order."""
    drawn = [image, *(box[None] for box in stored)]
    along = np.abs(matrix).argmax(axis=1)  # the patch axis that runs along each source axis
    order = [0] + [1 + int(axis) for axis in np.argsort(along)]
    valid = torch.ones((1, 1, 1), dtype=torch.bool, device=image.device)
    for axis in range(3):
        sign, first = round(matrix[axis, along[axis]]), round(origin[axis])
        index = first + sign * torch.arange(patch[along[axis]], device=image.device)
        inside = (index > faces[0][axis]) & (index < faces[1][axis])
        valid = valid & inside.view([-1 if a == axis else 1 for a in range(3)])
        index = index.clamp(0, image.shape[axis + 1] - 1)
        drawn = [box.index_select(axis + 1, index) for box in drawn]
    image, *drawn = (box.permute(order).contiguous() for box in (*drawn, valid[None]))
    return image.float(), drawn[:-1], drawn[-1]


def _interpolate(image, stored, matrix, origin, faces, patch):
    device = image.device
    z, y, x = (
        torch.arange(n, device=device, dtype=torch.float32).view(
            [-1 if a == axis else 1 for a in range(3)]
        )
        for axis, n in enumerate(patch)
    )
    valid = torch.ones(patch, dtype=torch.bool, device=device)
    grid, nearest = [], []
    for axis, n in enumerate(image.shape[1:]):
        a, b, c = (float(m) for m in matrix[axis])
        place = a * z + b * y + c * x + float(origin[axis])  # (D, H, W), in voxels of the box
        valid &= (place > float(faces[0][axis])) & (place < float(faces[1][axis]))
        nearest.append((place + 0.5).floor().long().clamp(0, n - 1))
        grid.insert(0, 2 * place / max(n - 1, 1) - 1)  # grid_sample wants x, y, z from -1 to 1
    drawn = F.grid_sample(
        image.float()[None],
        torch.stack(grid, -1)[None],
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return drawn[0], [box[tuple(nearest)][None] for box in stored], valid[None]


def normalise(image, *, mean, std, low=None, high=None):
    """Clip to [low, high] and standardise. image (C, ...) float32; one value per channel each."""
    channels = []
    for i, channel in enumerate(image):
        if low is not None:
            channel = channel.clamp(low[i], high[i])
        channels.append((channel - mean[i]) / max(std[i], 1e-6))
    return torch.stack(channels)


def change_intensity(image, chosen, spacing):
    """What `draw_intensity` chose, on a normalised patch (C, D, H, W); spacing of its voxels.

    Contrast and gamma act about the patch's own mean and range, so that their strength does not
    depend on where the volume's zero lies; gamma keeps mean and deviation.
    """
    if "blur" in chosen:
        sigmas = [chosen["blur"] * min(spacing) / s for s in spacing]
        image = gaussian_blur(image, sigmas)
    if "noise" in chosen:
        generator = torch.Generator(image.device).manual_seed(chosen["noise_seed"])
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = image + chosen["noise"] * noise
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    if "gamma" in chosen:
        low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
        bent = ((image - low) / (high - low).clamp_min(1e-6)).pow(chosen["gamma"])
        bent_std = bent.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
        std = image.std(dim=(1, 2, 3), keepdim=True)
        image = (bent - bent.mean(dim=(1, 2, 3), keepdim=True)) / bent_std * std + mean
    if "contrast" in chosen:
        image = (image - mean) * chosen["contrast"] + mean
    return image + chosen.get("brightness", 0.0)


def gaussian_blur(image, sigmas):
    """Gaussian blur of (C, D, H, W), sigmas in voxels z, y, x; borders repeated."""
    for axis, sigma in enumerate(sigmas):
        reach = math.ceil(3 * sigma)
        if sigma < 0.2:  # the neighbour's weight would be under 1e-5
            continue
        offsets = torch.arange(-reach, reach + 1, device=image.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        weights = (weights / weights.sum()).view([-1 if a == axis else 1 for a in range(3)])
        padding = [0] * 6
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = reach
        padded = F.pad(image[:, None], padding, mode="replicate")
        image = F.conv3d(padded, weights[None, None])[:, 0]
    return image


def draw_batch(samples, patch, *, foreground, ignore_label, device):
    """Samples of data.PatchDataset to (image, target, valid, skeleton).

    Each (B, C or 1, D, H, W); the skeleton is None if the samples carry none.
    """
    batch = []
    for sample in samples:
        boxes = {
            name: sample[name].to(device, non_blocking=True)
            for name in ("image", "label", "skeleton")
            if name in sample
        }
        image, *masks = draw_patch(
            **boxes,
            **{key: sample[key] for key in ("matrix", "origin", "start", "shape")},
            patch=patch,
            foreground=foreground,
            ignore_label=ignore_label,
        )
        image = normalise(image, **{key: sample[key] for key in ("mean", "std", "low", "high")})
        batch.append((change_intensity(image, sample["intensity"], sample["spacing"]), *masks))
    *drawn, skeletons = zip(*batch, strict=True)
    carried = None if skeletons[0] is None else torch.stack(skeletons)
    return *(torch.stack(patches) for patches in drawn), carried
