"""Instance norm, a residual and Mish in one pass: on a GPU by two Triton kernels each way.

    y = norm_mish(x, norm)                                 # mish(norm(x))
    y = norm_mish(x, norm, dropout, residual)              # mish(dropout(norm(x)) + residual)

x (B, C, D, H, W), contiguous or channels_last_3d; norm an affine nn.InstanceNorm3d, dropout an
nn.Dropout3d. torch's own instance norm gives one block of threads to each channel of each patch,
which leaves most of a GPU idle, and norm and Mish apart read and write each voxel some ten times
more often and keep the normed voxels for the backward pass. Here a sum is spread over the chip:
chunks of voxels are summed by as many programs, and their sums by one more. A CPU has a Mish
that is faster; under torch.compile, and on a GPU where Triton cannot run, it is all plain torch.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError as error:  # no CUDA build of torch
    triton, MISSING = None, str(error)

TILE = 2048  # numbers that a program holds at once: voxels x channels
MOST_CHANNELS = 64  # of a tile
MOST_CHUNKS = 512  # of the voxels of a patch
PIECE = 2**18  # numbers that a CPU takes through all of Mish at once


def norm_mish(x, norm, dropout=None, residual=None):
    """mish(dropout(norm(x)) + residual), (B, C, D, H, W), of x's type."""
    known = type(norm) is nn.InstanceNorm3d and norm.affine and not norm.track_running_stats
    known = known and type(dropout) in (type(None), nn.Dropout3d)
    if _operations_are_recorded() or not known:
        return F.mish(_sum(norm(x), dropout, residual))
    if fused(x.device)[0]:
        scale, shift = norm.weight.expand(x.shape[:2]), norm.bias.expand(x.shape[:2])
        if dropout is not None:  # drops whole channels
            keep = dropout(torch.ones_like(scale)[..., None, None, None]).flatten(1)
            scale, shift = scale * keep, shift * keep
        return FusedNormMish.apply(x, scale, shift, residual, norm.eps)
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return F.mish(_sum(norm(x), dropout, residual))
    y = F.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps)  # the same, faster
    y = y if dropout is None else dropout(y)
    if residual is not None:  # in place, for nothing else needs y
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    return MishOnCPU.apply(y) if y.requires_grad else _in_pieces(_mish, y, in_place=True)


def _sum(x, dropout, residual):
    x = x if dropout is None else dropout(x)
    return x if residual is None else x + residual


def _operations_are_recorded():
    """Whether a compiler, torch.export, torch.jit.trace or torch.func looks at each operation."""
    # The first fuses by itself; the last two cannot look into a function with its own backward.
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recorded or torch._C._are_functorch_transforms_active()


def _refuse_second_derivatives():
    """RuntimeError in a backward pass that makes a graph of itself (create_graph=True).

    torch's `once_differentiable` is silent where the gradient that comes in has no graph.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "norm_mish: expected to be differentiated once, got create_graph=True; put plain torch "
            "into norm_mish() for second derivatives: F.mish(norm(x))"
        )


class MishOnCPU(torch.autograd.Function):
    """x * tanh(log(1 + exp(x))) = x w / (-2 - w), with w = s (s - 2) and the sigmoid s of x.

    torch takes a logarithm and a tanh of each voxel, which takes 2 to 3 times as long. In float32,
    piece by piece, so that what is in between stays in the cache.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _in_pieces(_mish, x)

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivatives()
        return _in_pieces(_mish_gradient, *ctx.saved_tensors, grad)


def _in_pieces(function, *tensors, in_place=False):
    tensors = [t.contiguous() for t in tensors]
    result = tensors[0] if in_place else torch.empty_like(tensors[0])
    pieces = (t.view(-1).split(PIECE) for t in (result, *tensors))
    for piece, *arguments in zip(*pieces, strict=True):
        piece.copy_(function(*arguments))
    return result


def _mish(x):
    x = x.float()
    s = torch.sigmoid(x)
    w = s.mul_(s - 2)
    return w.div_(w + 2).mul_(x).neg_()


def _mish_gradient(x, grad):
    """grad * (t + x t'), with t = -w / (2 + w) and t' = 4 s (1 - s)^2 / (2 + w)^2."""
    x = x.float()
    s = torch.sigmoid(x)
    w, rise = s * (s - 2), (s - 1).square_().mul_(s).mul_(x)
    whole = torch.add(w, 2, out=s)
    return rise.mul_(4).div_(whole).sub_(w).div_(whole).mul_(grad)


@functools.cache
def fused(device):
    """(whether Triton's kernels run on a device, reason): tried once, on a few voxels."""
    if device.type != "cuda" or triton is None:
        return False, "plain torch" if device.type != "cuda" else f"without Triton: {MISSING}"
    try:
        wrong = _difference(device)
    except Exception as error:  # it needs a compiler of C, a folder to write to, a card it knows
        return False, f"Triton cannot run: {type(error).__name__}: {str(error).splitlines()[0]}"
    return (True, "fused by Triton") if wrong < 1e-4 else (False, f"Triton is off by {wrong:.1g}")


def _difference(device):
    """The largest difference between the kernels and torch, of values and gradients."""
    with (
        torch.inference_mode(False),  # a prediction may be the first to ask
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        drawn = torch.randn(2, 1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
        one, zero = torch.ones(1, 8, device=device), torch.zeros(1, 8, device=device)
        x, y = (n.clone().requires_grad_() for n in drawn)
        found = FusedNormMish.apply(x, one, zero, y, 1e-5)
        expected = F.mish(F.instance_norm(x) + y)
        gradients = (torch.autograd.grad(z.square().sum(), (x, y)) for z in (found, expected))
        pairs = [(found, expected), *zip(*gradients, strict=True)]
        wrong = torch.stack([(a - b).detach().abs().max() for a, b in pairs])
    return float(wrong.max())  # NaN if one is


class FusedNormMish(torch.autograd.Function):
    """mish(scale * (x - mean) / std + shift + residual).

    x and residual (B, C, D, H, W), residual may be None; scale and shift (B, C) float32. mean and
    std are of the voxels of each channel of each patch. Sums are float32; the same bits each time.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, residual, eps):
        x, scale, shift = _channels_last(x), *(t.float().contiguous() for t in (scale, shift))
        if residual is not None:
            residual = _channels_last(residual.to(x.dtype))
        grid, sizes, constants = _launch(x)
        parts = x.new_empty((2, x.shape[0], grid[0], x.shape[1]), dtype=torch.float32)
        _moments[grid](x, parts, *sizes, **constants)
        sums, y = parts.sum(2), torch.empty_like(x)
        has = {"HAS_RESIDUAL": residual is not None}
        other = x if residual is None else residual
        _apply[grid](x, other, y, sums, scale, shift, eps, *sizes, **has, **constants)
        ctx.save_for_backward(x, scale, shift, residual, sums)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivatives()
        x, scale, shift, residual, sums = ctx.saved_tensors
        grad = _channels_last(grad.to(x.dtype))
        grid, sizes, constants = _launch(x)
        parts = x.new_empty((2, x.shape[0], grid[0], x.shape[1]), dtype=torch.float32)
        has = {"HAS_RESIDUAL": residual is not None}
        inner = grad if residual is None else torch.empty_like(x)  # the gradient of Mish's input
        other = x if residual is None else residual
        _sum_gradients[grid](
            x, other, grad, inner, parts, sums, scale, shift, ctx.eps, *sizes, **has, **constants
        )
        totals, of_x = parts.sum(2), torch.empty_like(x)
        _input_gradient[grid](
            x, inner, of_x, totals, sums, scale, shift, ctx.eps, *sizes, **has, **constants
        )
        return of_x, totals[1], totals[0], None if residual is None else inner, None


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last_3d)


def _launch(x):
    """(grid, arguments, constants) of a kernel; the grid is chunks of voxels, channels, patches."""
    batch, channels, voxels = x.shape[0], x.shape[1], x[0, 0].numel()
    unit, tile = 1 if channels % 8 else 8, min(MOST_CHANNELS, triton.next_power_of_2(channels))
    chunks = min(MOST_CHUNKS, triton.cdiv(voxels * tile, 4 * TILE))
    constants = {"UNIT": unit, "TILE_C": tile, "TILE_V": TILE // tile}
    grid = (chunks, triton.cdiv(channels, tile), batch)
    return grid, (voxels, channels // unit, triton.cdiv(voxels, chunks)), constants


if triton:

    @triton.jit
    def _place(voxels, channels, chunk, UNIT: tl.constexpr, TILE_C: tl.constexpr):
        """(channels in all, those of this program, which of them exist, offsets of their first
        voxels; first voxel of the program, and the one behind its last)."""
        channels *= UNIT  # so that a thread knows that it may read 16 bytes at once
        c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
        first = tl.program_id(2).to(tl.int64) * voxels * channels + c
        begin = tl.program_id(0) * chunk
        return channels, c, c < channels, first, begin, tl.minimum(begin + chunk, voxels)

    @triton.jit
    def _tile(first, start, end, real, channels, TILE_V: tl.constexpr):
        """(offsets of the voxels from start, which of them are inside), (TILE_V, TILE_C)."""
        v = start + tl.arange(0, TILE_V)
        offset = first[None, :] + v.to(tl.int64)[:, None] * channels
        return offset, (v < end)[:, None] & real[None, :]

    @triton.jit
    def _moments(
        x, parts, voxels, channels, chunk,
        UNIT: tl.constexpr, TILE_C: tl.constexpr, TILE_V: tl.constexpr,
    ):  # fmt: skip
        """Sums of x - (its first voxel) and of its square, of each chunk and channel."""
        channels, c, real, first, begin, end = _place(voxels, channels, chunk, UNIT, TILE_C)
        origin = tl.load(x + first, real, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((TILE_V, TILE_C), tl.float32)
        square = tl.zeros((TILE_V, TILE_C), tl.float32)
        for start in range(begin, end, TILE_V):
            place, inside = _tile(first, start, end, real, channels, TILE_V)
            value = tl.load(x + place, inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - origin, 0.0)
            total += value
            square += value * value
        _store(parts, total, square, channels, c, real)

    @triton.jit
    def _store(parts, one, two, channels, c, real):
        """Sums over a tile's voxels to parts (2, B, chunks, C)."""
        chunks = tl.num_programs(0)
        row = (tl.program_id(2) * chunks + tl.program_id(0)) * channels + c
        size = tl.num_programs(2) * chunks * channels
        tl.store(parts + row, tl.sum(one, 0), real)
        tl.store(parts + size + row, tl.sum(two, 0), real)

    @triton.jit
    def _norm(x, first, sums, scale, shift, eps, voxels, channels, c, real):
        """(mean, 1 / std, scale, shift) of the program's channels, each (1, TILE_C)."""
        row, size = tl.program_id(2) * channels + c, tl.num_programs(2) * channels
        origin = tl.load(x + first, real, other=0.0).to(tl.float32)
        offset = tl.load(sums + row, real, other=0.0) / voxels
        variance = tl.load(sums + size + row, real, other=1.0) / voxels - offset * offset
        rate = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
        scale = tl.load(scale + row, real, other=0.0)
        shift = tl.load(shift + row, real, other=0.0)
        return (origin + offset)[None, :], rate[None, :], scale[None, :], shift[None, :]

    @triton.jit
    def _rise(z):
        """(exp(z), t = tanh(log(1 + exp(z))), 1 - t) of Mish, z * t."""
        e = tl.exp(tl.minimum(z, 20.0))  # beyond, t is 1
        n = e * (e + 2.0)
        return e, n / (n + 2.0), 2.0 / (n + 2.0)

    @triton.jit
    def _slope(z):
        """The derivative of Mish."""
        e, t, rest = _rise(z)
        return t + z * (1.0 + t) * rest * (e / (1.0 + e))

    @triton.jit
    def _apply(
        x, residual, y, sums, scale, shift, eps, voxels, channels, chunk,
        HAS_RESIDUAL: tl.constexpr,
        UNIT: tl.constexpr, TILE_C: tl.constexpr, TILE_V: tl.constexpr,
    ):  # fmt: skip
        """y = mish(norm(x) + residual)."""
        channels, c, real, first, begin, end = _place(voxels, channels, chunk, UNIT, TILE_C)
        mean, rate, scale, shift = _norm(
            x, first, sums, scale, shift, eps, voxels, channels, c, real
        )
        for start in range(begin, end, TILE_V):
            place, inside = _tile(first, start, end, real, channels, TILE_V)
            value = tl.load(x + place, inside, other=0.0).to(tl.float32)
            z = (value - mean) * (rate * scale) + shift
            if HAS_RESIDUAL:
                z += tl.load(residual + place, inside, other=0.0).to(tl.float32)
            tl.store(y + place, (z * _rise(z)[1]).to(y.dtype.element_ty), inside)

    @triton.jit
    def _sum_gradients(
        x, residual, grad, inner, parts, sums, scale, shift, eps,
        voxels, channels, chunk,
        HAS_RESIDUAL: tl.constexpr,
        UNIT: tl.constexpr, TILE_C: tl.constexpr, TILE_V: tl.constexpr,
    ):  # fmt: skip
        """Sums of the gradient of Mish's input, alone and times norm(x); stored if HAS_RESIDUAL."""
        channels, c, real, first, begin, end = _place(voxels, channels, chunk, UNIT, TILE_C)
        mean, rate, scale, shift = _norm(
            x, first, sums, scale, shift, eps, voxels, channels, c, real
        )
        total = tl.zeros((TILE_V, TILE_C), tl.float32)
        product = tl.zeros((TILE_V, TILE_C), tl.float32)
        for start in range(begin, end, TILE_V):
            place, inside = _tile(first, start, end, real, channels, TILE_V)
            normed = (tl.load(x + place, inside, other=0.0).to(tl.float32) - mean) * rate
            g = tl.load(grad + place, inside, other=0.0).to(tl.float32)
            z = normed * scale + shift
            if HAS_RESIDUAL:
                z += tl.load(residual + place, inside, other=0.0).to(tl.float32)
            g = tl.where(inside, g * _slope(z), 0.0)
            if HAS_RESIDUAL:
                tl.store(inner + place, g.to(inner.dtype.element_ty), inside)
            total += g
            product += g * normed
        _store(parts, total, product, channels, c, real)

    @triton.jit
    def _input_gradient(
        x, inner, of_x, totals, sums, scale, shift, eps,
        voxels, channels, chunk,
        HAS_RESIDUAL: tl.constexpr,
        UNIT: tl.constexpr, TILE_C: tl.constexpr, TILE_V: tl.constexpr,
    ):  # fmt: skip
        """The gradient of x. inner: that of Mish's input, or of its output if not HAS_RESIDUAL."""
        channels, c, real, first, begin, end = _place(voxels, channels, chunk, UNIT, TILE_C)
        mean, rate, scale, shift = _norm(
            x, first, sums, scale, shift, eps, voxels, channels, c, real
        )
        row, size = tl.program_id(2) * channels + c, tl.num_programs(2) * channels
        mean_g = (tl.load(totals + row, real, other=0.0) / voxels)[None, :]
        mean_p = (tl.load(totals + size + row, real, other=0.0) / voxels)[None, :]
        for start in range(begin, end, TILE_V):
            place, inside = _tile(first, start, end, real, channels, TILE_V)
            normed = (tl.load(x + place, inside, other=0.0).to(tl.float32) - mean) * rate
            g = tl.load(inner + place, inside, other=0.0).to(tl.float32)
            if not HAS_RESIDUAL:
                g *= _slope(normed * scale + shift)
            g = (rate * scale) * (g - mean_g - normed * mean_p)
            tl.store(of_x + place, g.to(of_x.dtype.element_ty), inside)
