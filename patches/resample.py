"""One grid per patch: where its voxels lie in the source, and resampling them from there.

Crop, spacing, flip, quarter turn, rotation, scaling and elastic field are one map from patch voxels
to source voxels (z, y, x, voxel centers at whole numbers):

    source = origin + matrix @ patch_index + field(patch_index)

`field` is a cubic B-spline of a coarse lattice of displacements. `place_patch` says which box of
source voxels a patch needs, on the host, in a few numbers; `resample_patch` makes the patch on the
device of that box, with one interpolation.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

WHOLE = 1e-6  # a matrix or origin this close to whole numbers is used as such, and is then exact
FACE_MARGIN = 1e-3  # a patch inside keeps this far from the faces, for coordinates are rounded
FIXED_POINT = 8  # steps, each of which leaves half of the error or less: the field never folds
SAMPLES = 4  # points per lattice cell and axis at which place_patch looks at the field


class Map(NamedTuple):
    """How patch voxels map to source voxels, wherever the patch lies.

    matrix: (3, 3) float64, patch voxels to source voxels; upright: the same without the rotation;
    control: displacements in source voxels, (3, nz, ny, nx) float32, or None; control point i of an
    axis stands at patch voxel (i - 1) * step. roll: slices to roll the finished patch along z.
    """

    matrix: np.ndarray
    upright: np.ndarray
    control: np.ndarray | None = None
    step: tuple[float, float, float] | None = None
    roll: int = 0

    def half_extent(self, patch):
        """Half the room that a patch needs along the source axes, in voxels: (3,)."""
        return np.abs(self.upright) @ (np.asarray(patch) / 2)


class Place(NamedTuple):
    """Where a patch lies: its first voxel, and the box [start, stop) that it needs, both (3,)."""

    origin: np.ndarray  # in source voxels
    start: np.ndarray
    stop: np.ndarray
    inside: bool  # whether all of it is inside the volume


# ---------------------------------------------------------------------------- on the host


def place_patch(mapping, center, patch, shape, voxel=None):
    """The `Place` of a patch around a source voxel, moved inside the volume where it fits.

    mapping: a `Map`; center: source coordinates that the patch center should have; patch, shape:
    voxels, z, y, x. Along an axis that is shorter than the patch, the patch is centered and hangs
    over both ends. voxel: one that must lie in the patch, even over the border. The box is cut to
    the volume; with a field it is up to three voxels larger on a side than what is needed.
    """
    patch, shape = np.asarray(patch), np.asarray(shape)
    half = mapping.half_extent(patch)
    low, high = half - 0.5, shape - 0.5 - half
    center = np.where(low <= high, np.clip(center, low, high), (shape - 1) / 2)
    origin = center - mapping.matrix @ ((patch - 1) / 2) - _mean_field(mapping, patch)
    if voxel is not None:
        place = _place_in_patch(mapping, origin, patch, voxel)
        origin = origin + mapping.matrix @ (place - np.clip(place, 0, patch - 1))
    if mapping.control is None:
        # Slices that are neither turned nor zoomed are copied, not blended with their neighbors.
        whole = _whole_rows(mapping.matrix)
        origin[whole] = np.round(origin[whole])
    lowest, highest = _reach(mapping, origin, patch)
    start = np.clip(np.floor(lowest + WHOLE), 0, shape - 1).astype(int)
    stop = np.clip(np.ceil(highest - WHOLE), 0, shape - 1).astype(int) + 1
    margin = 0.5 - FACE_MARGIN
    inside = (lowest > -margin).all() and (highest < shape - 1 + margin).all()
    return Place(origin, start, stop, bool(inside))


def _place_in_patch(mapping, origin, patch, voxel):
    """The patch voxel, not rounded, that shows a source voxel; it may lie outside the patch."""
    place = np.linalg.solve(mapping.matrix, voxel - origin)
    for _ in range(0 if mapping.control is None else FIXED_POINT):
        shift = _field(mapping, [[p] for p in np.clip(place, 0, patch - 1)]).reshape(3)
        place = np.linalg.solve(mapping.matrix, voxel - origin - shift)
    return place


def _weights(mapping, points):
    lattice = zip(points, mapping.step, mapping.control.shape[1:], strict=True)
    return [spline_weights(p, step, count) for p, step, count in lattice]


def _field(mapping, points):
    """The field at a grid of patch voxels, in source voxels: (3, Z, Y, X); points: z, y, x."""
    weights = _weights(mapping, points)
    return np.einsum("aijk,zi,yj,xk->azyx", mapping.control, *weights, optimize=True)


def _mean_field(mapping, patch):
    """Mean of the field over the patch, in source voxels: (3,). It moves the patch as a whole."""
    if mapping.control is None:
        return 0.0
    weights = [w.mean(axis=0) for w in _weights(mapping, map(np.arange, patch))]
    return np.einsum("aijk,i,j,k->a", mapping.control, *weights, optimize=True)


def _reach(mapping, origin, patch):
    """Bounds of the source coordinates of a patch, (3,) each: exact without a field."""
    if mapping.control is None:
        corners = np.array(list(itertools.product(*((0, n - 1) for n in patch))))
        reached = origin + corners @ mapping.matrix.T
        return reached.min(0), reached.max(0)
    # The map is computed on a coarse grid. Between points h apart it leaves their hull by h^2 / 8
    # times its second derivative, at most that of the lattice: a second difference over step^2.
    points, slack = [], np.zeros(3)
    for axis, (n, step) in enumerate(zip(patch, mapping.step, strict=True)):
        count = int(np.ceil(SAMPLES * (n - 1) / step)) + 1
        points.append(np.linspace(0, n - 1, count) if n > 1 else np.zeros(1))
        gap = (n - 1) / max(count - 1, 1) / step
        bend = np.abs(np.diff(mapping.control, n=2, axis=axis + 1)).max(axis=(1, 2, 3))
        slack += gap**2 / 8 * bend
    reached = _field(mapping, points)
    for axis, p in enumerate(points):
        along = np.multiply.outer(mapping.matrix[:, axis], p)
        reached += np.expand_dims(along, [b + 1 for b in range(3) if b != axis])
    reached = origin + reached.reshape(3, -1).T
    return reached.min(0) - slack, reached.max(0) + slack


def _whole_rows(matrix):
    """The source axes along which patch voxels fall on voxels: bool (3,)."""
    matrix = np.asarray(matrix, float)
    rounded = np.round(matrix)
    return (np.abs(rounded).sum(axis=1) == 1) & (np.abs(matrix - rounded).max(axis=1) < WHOLE)


def lattice_size(patch, step):
    """Control points per axis that a patch needs, one before it and two after: (nz, ny, nx)."""
    return tuple(int((n - 1) / s) + 4 for n, s in zip(patch, step, strict=True))


def spline_weights(positions, step, count):
    """Uniform cubic B-spline weights of `count` control points: (len(positions), count) float64.

    positions: in patch voxels, from 0; control point i stands at (i - 1) * step. Rows sum to one.
    """
    t = np.asarray(positions, float)[:, None] / step
    distance = np.abs(t + 1 - np.arange(count))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


# ---------------------------------------------------------------------------- on the device


def resample_patch(
    image, label, skeleton=None, *, geometry, patch, regions, ignore_label, exclusive=False
):
    """Resample one patch from its box, on the box's device.

    image (C, d, h, w) any dtype, label (d, h, w) uint8 or None: the box [start, stop) of a volume;
    skeleton (d, h, w) uint8 or None: of all classes, as a case file holds it. geometry: a dict with
    the matrix, control, step and roll of a `Map`, the origin, start and inside of a `Place`, and
    the volume's shape; regions: class ids of each of R regions.
    Returns image (C, D, H, W) float32, target (R, D, H, W) float32 of 0 and 1, or (1, D, H, W) of 0
    and the numbers from 1 of regions that are exclusive, valid (1, D, H, W) bool: inside the volume
    and labeled, and skeleton (1, D, H, W) float32 of 0 and 1, within the target, or None without
    one. Outside, the image repeats its border.
    The image is interpolated linearly; label and skeleton take the nearest voxel, for the heaviest
    interpolated class breaks thin tubes: benchmarks/label_interpolation.py.
    """
    stored = [box for box in (label, skeleton) if box is not None]
    origin = np.asarray(geometry["origin"], float) - geometry["start"]
    # Of a signed permutation the patch is a copy, not an interpolation.
    whole = _whole_rows(geometry["matrix"]).all() and abs(np.linalg.det(geometry["matrix"])) > 0.5
    whole = whole and np.abs(origin - np.round(origin)).max() < WHOLE
    make = _copy if whole and geometry["control"] is None else _interpolate
    image, masks, valid = make(image, stored, origin, geometry, patch)
    if geometry["roll"]:
        image, valid, *masks = (box.roll(geometry["roll"], 1) for box in (image, valid, *masks))
    if label is None:
        return image, torch.zeros_like(image[:1]), torch.zeros_like(valid), None
    label = masks[0]
    if ignore_label is not None:
        valid = valid & (label != ignore_label)
    target = torch.zeros((len(regions), *patch), dtype=torch.bool, device=label.device)
    for mask, ids in zip(target, regions, strict=True):
        for class_id in ids:
            mask |= label[0] == class_id
    target &= valid
    tube = None if skeleton is None else (target.any(0, keepdim=True) & (masks[1] != 0)).float()
    if exclusive:
        numbers = torch.arange(1, len(regions) + 1, device=label.device).view(-1, 1, 1, 1)
        target = (target * numbers).sum(0, keepdim=True)
    return image, target.float(), valid, tube


def _faces(geometry):
    """Where the volume begins and ends, in voxels of the box: a pair of numbers per axis."""
    # Python scalars, here and below: a small tensor would be a copy that waits for the device.
    ends = zip(geometry["start"], geometry["shape"], strict=True)
    return [(-float(start) - 0.5, float(n - start) - 0.5) for start, n in ends]


def _copy(image, stored, origin, geometry, patch):
    """Exact voxels: one index per source axis, then the axes in the patch's order."""
    matrix, faces = np.asarray(geometry["matrix"]), _faces(geometry)
    boxes = [image, *(box[None] for box in stored)]
    along = np.abs(matrix).argmax(axis=1)  # the patch axis that runs along each source axis
    order = [0] + [1 + int(axis) for axis in np.argsort(along)]
    valid = torch.ones((1, 1, 1), dtype=torch.bool, device=image.device)
    for axis in range(3):
        sign, first = round(matrix[axis, along[axis]]), round(origin[axis])
        index = first + sign * torch.arange(patch[along[axis]], device=image.device)
        inside = (index > faces[axis][0]) & (index < faces[axis][1])
        valid = valid & inside.view([-1 if a == axis else 1 for a in range(3)])
        index = index.clamp(0, image.shape[axis + 1] - 1)
        boxes = [box.index_select(axis + 1, index) for box in boxes]
    image, *masks, valid = (box.permute(order).contiguous() for box in (*boxes, valid[None]))
    return image.float(), masks, valid


def _interpolate(image, stored, origin, geometry, patch):
    shape = image.shape[1:]
    points = _points(patch, geometry, origin, image.device)
    valid = torch.ones((1, *patch), dtype=torch.bool, device=image.device)
    if not geometry["inside"]:
        for axis, (low, high) in enumerate(_faces(geometry)):
            valid &= (points[2 - axis] > low) & (points[2 - axis] < high)
            points[2 - axis].clamp_(0, shape[axis] - 1)
    if stored:
        index = _flat_index(points, shape)
        stored = [box.reshape(-1).index_select(0, index).view(1, *patch) for box in stored]
    for axis, n in enumerate(shape):  # grid_sample wants -1 to 1
        points[2 - axis].mul_(2 / max(n - 1, 1)).sub_(1)
    grid = points.permute(1, 2, 3, 0)[None]
    values = F.grid_sample(image.float()[None], grid, "bilinear", "border", align_corners=True)
    return values[0], stored, valid


def _points(patch, geometry, origin, device):
    """Coordinates of the patch voxels in voxels of the box: (3, D, H, W) float32, order x, y, z."""
    # The field alone goes through matrix products: where these run in TF32, a thousandth of a
    # displacement is lost, not of a coordinate.
    if geometry["control"] is None:
        points = torch.empty((3, *patch), device=device)
    else:
        control = torch.as_tensor(geometry["control"]).to(device, non_blocking=True).flip(0)
        lattice = zip(patch, geometry["step"], control.shape[1:], strict=True)
        z, y, x = (_weights_on(n, step, count, device) for n, step, count in lattice)
        rows = torch.matmul(y, control @ x.T)  # (3, nz, H, W)
        points = torch.matmul(z, rows.flatten(2)).view(3, *patch)
    steps = [torch.arange(n, device=device, dtype=torch.float32) for n in patch]
    for axis in range(3):
        a, b, c = (float(m) for m in geometry["matrix"][axis])
        column = (a * steps[0] + float(origin[axis])).view(-1, 1, 1)
        plane = (b * steps[1]).view(-1, 1) + c * steps[2]
        if geometry["control"] is None:
            torch.add(column, plane, out=points[2 - axis])
        else:
            points[2 - axis].add_(plane).add_(column)
    return points


@functools.lru_cache(maxsize=256)
def _weights_on(n, step, count, device):
    return torch.from_numpy(spline_weights(np.arange(n), step, count)).float().to(device)


def _flat_index(points, shape):
    """Index of the voxel nearest to each point, in a flattened box."""
    number = torch.int32 if shape.numel() < 2**31 else torch.int64
    index = (points[2] + 0.5).to(number)  # not below -0.5: cutting is rounding down
    for axis in (1, 2):
        index.mul_(shape[axis]).add_((points[2 - axis] + 0.5).to(number))
    return index.view(-1)
