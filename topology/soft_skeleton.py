"""The soft skeleton of probabilities, for the losses of centrelines.

Exact, with unlabeled voxels, and ten times faster on a CPU than pooling. Only torch is needed.
"""

import torch
import torch.nn.functional as F


def soft_skeleton(probs, iterations=3, valid=None):
    """The soft skeleton of clDice: what an opening removes, erosion after erosion.

    probs (..., D, H, W) float32 in [0, 1]; valid of the same shape, bool, None: everywhere; returns
    the same shape in [0, 1], 0 where invalid. Each volume of the leading dimensions by itself. Of a
    structure of more than 2 * iterations + 2 voxels across only the corners are kept.

    As Shit et al. 2021: erosion by the six neighbours, dilation by the box of 27, iterations + 1
    openings, joined as 1 - prod(1 - removed). The border of the volume and the edge of the
    unlabeled region erode nothing: an invalid voxel is neither background nor foreground.

    The gradient is exact; where neighbours tie, one of them gets it. Only `probs` is kept for the
    backward pass. ValueError for fewer than 3 dimensions, shapes that differ, or iterations < 0.
    """
    shapes = {tuple(x.shape) for x in (probs, valid) if x is not None}
    if probs.ndim < 3 or len(shapes) > 1:
        raise ValueError(f"expected probs and valid of one shape (..., D, H, W), got {shapes}")
    if iterations < 0:
        raise ValueError(f"iterations: expected 0 or more, got {iterations}")
    valid = torch.ones_like(probs, dtype=torch.bool) if valid is None else valid
    return _SoftSkeleton.apply(probs, valid, iterations)


class _SoftSkeleton(torch.autograd.Function):
    """skeleton = 1 - prod(1 - d_k), d_k = relu(x_k - open_k), x_(k+1) = erode(x_k)."""

    @staticmethod
    def forward(ctx, probs, valid, iterations):
        ctx.save_for_backward(probs, valid)
        ctx.iterations = iterations
        grid = _Grid(valid)
        x, rest = grid.flat(probs), torch.ones_like(grid.inside)
        for _ in range(iterations + 1):
            eroded = grid.erode(x)
            removed = x.sub_(grid.open(eroded)[-1]).clamp_(min=0.0)
            rest.addcmul_(rest, removed, value=-1.0)
            x = eroded
        return grid.volume(rest.neg_().add_(1.0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        probs, valid = ctx.saved_tensors
        grid = _Grid(valid)
        levels, earlier = [grid.flat(probs)], [torch.ones_like(grid.inside)]
        for k in range(ctx.iterations):  # earlier[k]: the product over all levels before k
            levels.append(grid.erode(levels[k]))
            removed = (levels[k] - grid.open(levels[k + 1])[-1]).clamp_(min=0.0)
            earlier.append(torch.addcmul(earlier[k], earlier[k], removed, value=-1.0))
        levels.append(grid.erode(levels[-1]))

        later = grid.flat(grad).mul_(grid.inside)  # the gradient times the product of later levels
        grad_x = torch.zeros_like(later)
        for k in reversed(range(ctx.iterations + 1)):
            eroded, x = levels.pop(), levels[k]
            stages = grid.open(eroded)
            removed = torch.sub(x, stages[-1]).clamp_(min=0.0)
            grad_removed = earlier.pop().mul_(later).mul_(removed > 0)
            later.addcmul_(later, removed, value=-1.0)
            grad_eroded = grid.open_backward(-grad_removed, stages).add_(grad_x)
            grad_x = grid.pool_backward(grad_eroded, x, eroded, grid.steps, onto=grad_removed)
            grad_x.mul_(grid.inside)
        return grid.volume(grad_x), None, None


class _Grid:
    """Volumes as one flat buffer, each with a border of one voxel.

    A neighbour is then a fixed offset and every pass one operation on contiguous memory. Invalid
    voxels are treated like the border: 1 for an erosion and 0 for a dilation.
    """

    def __init__(self, valid):
        *lead, d, h, w = valid.shape
        self.padded = (*lead, d + 2, h + 2, w + 2)
        self.steps = ((h + 2) * (w + 2), w + 2, 1)
        self.valid = valid
        self.inside = F.pad(valid.float(), (1,) * 6).flatten()
        self.outside = 1.0 - self.inside

    def flat(self, volume):
        """To a buffer with 1 outside; contents of invalid voxels are dropped, be they NaN."""
        return F.pad(torch.where(self.valid, volume, 0.0), (1,) * 6).flatten().add_(self.outside)

    def volume(self, flat):
        return flat.mul_(self.inside).view(self.padded)[..., 1:-1, 1:-1, 1:-1].contiguous()

    def at(self, flat, offset=0):
        """The buffer from the first to the last voxel that is no border, moved by `offset`."""
        first = sum(self.steps)
        return flat[first + offset : flat.numel() - first + offset]

    def erode(self, x):
        return torch.maximum(self._pool(torch.minimum, x, self.steps), self.outside)

    def open(self, eroded):
        """The dilation of an erosion, axis after axis: [what goes in, ..., the result]."""
        stages = [torch.minimum(eroded, self.inside)]
        for step in self.steps:
            stages.append(self._pool(torch.maximum, stages[-1], (step,)))
        return stages

    def _pool(self, extremum, x, steps):
        out = x.clone()
        for offset in (o for step in steps for o in (-step, step)):
            extremum(self.at(out), self.at(x, offset), out=self.at(out))
        return out

    def open_backward(self, grad, stages):
        """Uses up `grad` and `stages`."""
        for step in reversed(self.steps):
            pooled = stages.pop()
            grad = self.pool_backward(grad, stages[-1], pooled, (step,), torch.zeros_like(grad))
        return grad.mul_(self.inside)

    def pool_backward(self, grad, x, pooled, steps, onto):
        """Add to `onto` each voxel's gradient, at the first of its neighbours that it came from."""
        left, came, pooled = self.at(grad), self.at(torch.empty_like(x)), self.at(pooled)
        *first, last = [0] + [s for step in steps for s in (-step, step)]
        for step in first:
            torch.eq(self.at(x, step), pooled, out=came)
            self.at(onto, step).addcmul_(left, came)
            left.addcmul_(left, came, value=-1.0)
        self.at(onto, last).add_(left)
        return onto
