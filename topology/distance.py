"""Distance transforms of masks, on the device where the mask lies.

Nothing but torch and the standard library is imported, so that this file can be lifted out with one
copy; the backend named scipy imports scipy when it is called.

`truncated_edt` is for whoever compares distances with a tolerance: a few passes over the volume
(about 5 ms for 72 x 136 x 136 at a distance of 2 on two CPU cores). `edt` has no such limit, and
costs as many passes as the longest distance has voxels. Both are exact to float32 rounding, and
all of their steps are plain tensor operations.
"""

import contextlib
import math
import os
import tempfile
import time
import warnings

import torch
import torch.nn.functional as F

# Passes run over slabs of about this many voxels (4 MB), so that the three float32 arrays of a pass
# stay in the cache of a CPU: 2 to 3 times faster at 160^3 than passes over the whole volume.
_SLAB_VOXELS = 2**20
# To look at a bound waits for the device and costs half a pass, so that it pays only now and then.
_SHIFTS_PER_LOOK = 8
_MOST_IN_A_BYTE = 127  # two of them are added

_LOCK_NAME = "lamina-edt.lock"
_LOCK_POLL_SECONDS = 0.01


def truncated_edt(mask, max_distance, spacing=(1.0, 1.0, 1.0)):
    """Euclidean distance to the nearest True voxel, cut at `max_distance`.

    mask (..., D, H, W): bool, or any dtype whose non-zero voxels count as True; each volume of the
    leading dimensions is transformed by itself. max_distance and spacing (z, y, x) share one unit.
    Returns float32 of the mask's shape in [0, max_distance], without gradient: 0 on the mask,
    max_distance wherever the mask has no voxel nearer than that (everywhere, if it is empty).
    Exact to float32 rounding.

    The squared distance separates over axes (Felzenszwalb and Huttenlocher 2012): along each axis
    the smallest f(x + k) + (k * spacing)^2 over shifts k. Only shifts shorter than max_distance can
    change the result: 3 * max_distance / spacing passes per axis. Memory: the result and two slabs.
    Never waits for the device.

    ValueError for a mask of fewer than 3 dimensions, or for numbers that are not positive.
    """
    if not (math.isfinite(max_distance) and max_distance > 0):
        raise ValueError(f"max_distance: expected a positive number, got {max_distance}")
    _check(mask, spacing)
    # A shift of max_distance or more can only give what the start value already is.
    reaches = [math.ceil(max_distance / step) - 1 for step in spacing]
    steps = {step for step, reach in zip(spacing, reaches, strict=True) if reach > 0}
    unit = min(steps, default=max_distance)
    most = math.ceil((max_distance / unit) ** 2)
    if len(steps) <= 1 and most <= _MOST_IN_A_BYTE:
        # Squared distances in units of the only step that counts are whole numbers: a byte each.
        squared = mask.logical_not().contiguous().to(torch.uint8).mul_(most)
        spacing = (1, 1, 1)
    else:
        unit, squared = 1.0, _zero_on(mask, max_distance * max_distance)
    for axis, (step, reach) in enumerate(zip(spacing, reaches, strict=True)):
        for slab in _slabs(squared, axis):
            _lower_along(slab, axis, step, reach)
    return squared.float().sqrt_().mul_(unit).clamp_(max=max_distance)


def edt(mask, spacing=(1.0, 1.0, 1.0), backend="native", *, timeout=600.0):
    """Euclidean distance to the nearest True voxel, however far.

    mask (..., D, H, W): bool, or any dtype whose non-zero voxels count as True; each volume of the
    leading dimensions is transformed by itself. spacing (z, y, x) sets the unit. Returns float32 of
    the mask's shape, on its device, without gradient: 0 on the mask; inf everywhere if the mask is
    empty (scipy's own answer is then a distance to some place outside).

    backend:
        "native"       exact to float32 rounding, on any device. See `_native`.
        "scipy"        scipy.ndimage.distance_transform_edt on the CPU, one call at a time over all
                       processes that share the folder for temporary files, since each takes about
                       50 bytes per voxel (native: 12). `timeout` is for this backend alone: the
                       seconds to wait for each volume's turn. See `_scipy`.
        "downsampled"  the native transform of the mask at half the size: 3 to 8 times faster, and
                       wrong by at most the diagonal of one voxel, |spacing|; on average by about
                       half a voxel. See `_downsampled`.

    ValueError for a mask of fewer than 3 dimensions, numbers that are not positive, or an unknown
    backend. From the scipy backend also TimeoutError if its turn does not come, OSError if the lock
    file cannot be opened, RuntimeError where the system has no such locks; and RuntimeWarning if
    another process has died inside.
    """
    _check(mask, spacing)
    if not timeout > 0:
        raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
    if backend == "native":
        return _native(mask, spacing)
    if backend == "scipy":
        return _scipy(mask, spacing, timeout)
    if backend == "downsampled":
        return _downsampled(mask, spacing)
    raise ValueError(f"backend: expected 'native', 'scipy' or 'downsampled', got {backend!r}")


def _check(mask, spacing):
    if mask.ndim < 3:
        raise ValueError(f"mask: expected (..., D, H, W), got shape {tuple(mask.shape)}")
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing: expected three positive numbers z, y, x, got {tuple(spacing)}")


# ---------------------------------------------------------------------------- native


def _native(mask, spacing):
    """The transform by shifts, axis by axis: y by doubling, then x and z by parabolas.

    Along the first axis the distance is a plain count of steps, so that shifts of 1, 2, 4, ...
    reach everything: log2(H) passes. Along the others it is the lower envelope of parabolas, one
    pass per shift k until (k * spacing)^2 exceeds what any voxel of the slab still has. Memory: the
    result, the mask's complement, and two slabs.

    Time grows with the longest distance of a slab, at worst with the length of the axis. On one CPU
    core, 72 x 136 x 136: sheets 35 ms (scipy 115 ms), vessels 60 ms (scipy 85 ms), one corner voxel
    90 ms (scipy 40 ms). One corner voxel in 160^3: 0.25 s (scipy 0.2 s).
    """
    distance = _zero_on(mask, math.inf)
    for slab in _slabs(distance, 1):
        _count_steps_along(slab, 1)
        slab.mul_(spacing[1]).square_()
    for axis in (2, 0):
        for slab in _slabs(distance, axis):
            _lower_fully_along(slab, axis, spacing[axis])
    return distance.sqrt_()


def _zero_on(mask, elsewhere):
    """Float32 of the mask's shape: 0 on the mask, `elsewhere` off it."""
    start = torch.where(mask.bool(), 0.0, elsewhere)  # scalars are of torch's default type
    return start.float().contiguous()


def _slabs(field, axis):
    """Views (d, h, w) that cut each volume of `field` into slabs, never across `axis`."""
    for volume in field.view(-1, *field.shape[-3:]) if field.numel() else ():
        count = max(1, round(volume.numel() / _SLAB_VOXELS))
        yield from volume.chunk(count, dim=1 if axis == 0 else 0)


def _count_steps_along(field, axis):
    """Lower `field` in place to the smallest field[x + k] + |k| along one axis, over all k."""
    shifted = torch.empty_like(field)
    k = 1
    while k < field.shape[axis]:
        torch.add(field, k, out=shifted)
        _lower_by_shift(field, shifted, axis, k)
        k *= 2


def _lower_along(field, axis, step, reach):
    """Lower `field` in place to the smallest field[x + k] + (k * step)^2 over |k| <= reach."""
    reach = min(reach, field.shape[axis] - 1)
    # Of a single shift all is read before anything is lowered.
    source, shifted = field.clone() if reach > 1 else field, torch.empty_like(field)
    for k in range(1, reach + 1):
        torch.add(source, (k * step) ** 2, out=shifted)
        _lower_by_shift(field, shifted, axis, k)


def _lower_fully_along(field, axis, step):
    """`_lower_along` without a reach: it ends when no longer shift can lower anything."""
    # A line without any finite value stays as it is, and must not keep the bound at infinity.
    blank = field.amin(axis, keepdim=True).isinf()
    field.masked_fill_(blank, 0.0)
    source, shifted = field.clone(), torch.empty_like(field)
    k, reach = 0, field.shape[axis] - 1
    while k < reach:
        if k % _SHIFTS_PER_LOOK == 0:
            largest = field.amax().item()
            if math.isfinite(largest):
                reach = min(reach, math.ceil(math.sqrt(largest) / step) - 1)
        k += 1
        torch.add(source, (k * step) ** 2, out=shifted)
        _lower_by_shift(field, shifted, axis, k)
    field.masked_fill_(blank, math.inf)


def _lower_by_shift(field, shifted, axis, k):
    """Lower `field` in place to `shifted`, k voxels to either side along one axis."""
    rest = field.shape[axis] - k
    left, right = field.narrow(axis, 0, rest), field.narrow(axis, k, rest)
    torch.minimum(left, shifted.narrow(axis, k, rest), out=left)
    torch.minimum(right, shifted.narrow(axis, 0, rest), out=right)


# ---------------------------------------------------------------------------- downsampled


def _downsampled(mask, spacing):
    """The native transform of the mask in blocks of 2 x 2 x 2, given back to all voxels of a block.

    A block is True if it holds a True voxel; blocks at the end of an odd axis count as whole ones.
    Off the mask no value is below the smallest spacing, since no true distance is.

    |error| <= |spacing|, the diagonal of one voxel. Every voxel lies within h = |spacing| / 2 of
    its block's centre. Let a voxel x have the distance d, and its block the distance D between
    centres. From x to its centre, D to the nearest centre and on to a True voxel of that block:
    d <= h + D + h. From the centre to x, d to the nearest True voxel and on to its centre:
    D <= h + d + h. The bound is reached: two blocks side by side along the diagonal can face each
    other with their near corners or with their far ones.
    """
    *lead, depth, height, width = mask.shape
    if mask.numel() == 0:
        return _zero_on(mask, math.inf)
    taken = mask != 0
    blocks = taken.reshape(-1, depth, height, width).float()
    blocks = F.max_pool3d(blocks, 2, ceil_mode=True)
    coarse = _native(blocks, tuple(2.0 * s for s in spacing))
    coarse.clamp_(min=min(spacing))
    fine = F.interpolate(coarse[None], scale_factor=2, mode="nearest")[0]
    fine = fine[:, :depth, :height, :width].reshape(*lead, depth, height, width)
    return fine.masked_fill_(taken, 0.0)


# ---------------------------------------------------------------------------- scipy, one at a time


def _scipy(mask, spacing, timeout):
    """scipy's transform of each volume; the lock is taken and given back volume by volume.

    So at most one volume's float64 result exists on the machine, and other processes get their
    turn between the volumes of a batch. Who waits has allocated nothing but pages not yet touched.
    An empty volume needs no turn.
    """
    from scipy import ndimage

    distance = torch.empty(mask.shape, dtype=torch.float32)
    if mask.numel() == 0:
        return distance.to(mask.device)
    shape = (-1, *mask.shape[-3:])
    for result, volume in zip(distance.view(shape), mask.detach().reshape(shape), strict=True):
        if not bool(volume.any()):
            result.fill_(math.inf)
            continue
        with _turn(timeout):
            background = (volume == 0).cpu().numpy()
            exact = ndimage.distance_transform_edt(background, sampling=tuple(spacing))
            result.copy_(torch.from_numpy(exact))
            del background, exact  # while nobody else is inside
    return distance.to(mask.device)


@contextlib.contextmanager
def _turn(timeout):
    """Be the only one inside, over all threads and processes that share the temporary folder.

    The lock is a flock on a file that holds the pid of whoever is inside, and nothing otherwise.
    The kernel drops it when a process dies, so that no death blocks the others; a pid found in the
    file of a free lock is that of a process that died inside, and is warned of. Those who wait ask
    100 times a second, in no order. OSError if the file cannot be opened, TimeoutError after
    `timeout` seconds, RuntimeError on a system without flock.
    """
    try:
        import fcntl
    except ImportError:
        raise RuntimeError(
            "edt backend 'scipy': expected a system with file locks (fcntl), found none; "
            "use backend='native'"
        ) from None
    path = os.path.join(tempfile.gettempdir(), _LOCK_NAME)
    lock = _open_lock(path)
    try:
        deadline = time.monotonic() + timeout
        while not _try_flock(fcntl, lock):
            if time.monotonic() > deadline:
                raise TimeoutError(_why_waiting(lock, path, timeout))
            time.sleep(_LOCK_POLL_SECONDS)
        try:
            _warn_of_death_inside(lock)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.ftruncate(lock, 0)
            # Closing would not do: a child forked meanwhile shares the lock and would keep it.
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _open_lock(path):
    """A descriptor of its own for each call: threads that shared one would share the lock too."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        try:
            # Without O_CREAT first: Linux may refuse it on another user's file in a sticky folder.
            return os.open(path, flags)
        except FileNotFoundError:
            lock = os.open(path, flags | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(
            f"edt backend 'scipy': expected to open the lock file {path}, got {error.strerror!r}; "
            "have its owner delete it, set TMPDIR to another folder, or use backend='native'"
        ) from error
    if os.fstat(lock).st_uid == os.geteuid():
        os.fchmod(lock, 0o666)  # the umask has taken the other users' right to write
    return lock


def _try_flock(fcntl, lock):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_inside(lock):
    """The pid that the lock file holds, or None."""
    text = os.pread(lock, 32, 0)
    return int(text) if text.isdigit() and 0 < int(text) < 2**31 else None


def _is_alive(pid):
    """Whether a process runs. One that has died, but was not waited for by its parent, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:  # there is no /proc on this system
        return True


def _why_waiting(lock, path, timeout):
    pid = _pid_inside(lock)
    if pid is None:
        holder, advice = "an unnamed process holds", "try again"
    elif _is_alive(pid):
        holder, advice = f"process {pid} (alive) holds", f"wait longer or end process {pid}"
    else:
        holder = f"a child forked by process {pid} (dead) still holds"
        advice = f"end that child (`fuser {path}` names it)"
    return (
        f"edt backend 'scipy': expected a turn within {timeout:g} s, but {holder} the lock {path}; "
        f"{advice}, or use backend='native'"
    )


def _warn_of_death_inside(lock):
    pid = _pid_inside(lock)
    if pid is not None:
        warnings.warn(
            f"edt backend 'scipy': process {pid} died inside the transform, likely killed for want "
            "of memory; its turn is over and this call goes on",
            RuntimeWarning,
            stacklevel=6,  # the caller of edt
        )
