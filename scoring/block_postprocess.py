"""Post-processing of volumes larger than memory: `scoring.postprocess`, a block at a time.

    masks = postprocessed(read, shape, folder, hysteresis=0.3, max_hole_voxels=30)
    store[box] = masks(box)["sheet"]            # of any box, in any order, as often as you like

The masks are those of `postprocess.apply_to_regions`, bit for bit, whatever the blocks.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from scoring import postprocess
from scoring.blocks import Bits, Grid, Joined, size_of, written


def postprocessed(
    read,
    shape,
    folder,
    *,
    block=None,
    exclusive=False,
    spacing=None,
    hysteresis=None,
    min_component_voxels=0,
    max_hole_voxels=0,
    closing_radius=0.0,
):
    """A function of a box (three slices with start and stop) that gives {region: its mask (d, h, w)
    bool} after all steps; all of the volume is read once or more before this returns.

    read(box) -> ({region: mask above the threshold}, {region: mask above that of hysteresis, if it
    is on}), bool, of any box of a volume (D, H, W). The keywords are those of
    `postprocess.stages_of_regions`. Boxes that are whole blocks, or several, cost least: others
    make their blocks anew.

    folder: an existing one, of this volume alone. What a step needs to know of the whole volume is
    kept there, and between two steps a bit for each voxel and region; a call with the same
    arguments goes on after the last complete step. Delete it when you have all masks.

    Memory: that of a few blocks, about 13 bytes for each voxel of one, with closing_radius also of
    as much around it as twice the radius; and for each voxel of a plane (H, W), in which blocks
    meet, 4 bytes and region, 12 with max_hole_voxels.
    """
    spacing = None if spacing is None else [float(step) for step in spacing]
    settings = [exclusive, spacing, hysteresis, min_component_voxels, max_hole_voxels]
    grid = Grid(shape, block)
    text = json.dumps([grid.shape, grid.block, *settings, closing_radius])
    path = str(Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16])
    regions = tuple(read((slice(0, 1),) * 3)[0])
    sizes = min_component_voxels
    sizes = sizes if isinstance(sizes, dict) else dict.fromkeys(regions, sizes)

    def masks(box):
        return read(box)[0]

    def stored(step):
        bits = Bits(f"{path}.{step}", grid, regions)
        bits.fill(masks)
        return bits.read

    changed = hysteresis is not None or max(sizes.values(), default=0) > 1
    if changed:
        masks = _components(read, grid, regions, hysteresis is not None, sizes, path)
    if max_hole_voxels > 0:
        masks = stored("components") if changed else masks
        masks, changed = _filled(masks, grid, regions, max_hole_voxels, exclusive, path), True
    if closing_radius > 0:
        masks = stored("filled") if changed else masks
        masks = _closed(masks, grid, closing_radius, spacing, exclusive)
    return masks


def _by_blocks(grid, of_block):
    """The function of a box that puts together {region: mask} of the blocks that it meets."""

    def masks(box):
        whole = {}
        for index, own, there in grid.touched(box):
            for region, mask in of_block(index).items():
                out = whole.setdefault(region, np.zeros(size_of(box), bool))
                out[there] = mask[own]
        return whole

    return masks


def _settled(path, joins, add):
    """Let add(index) take in all blocks and settle {name: `Joined`}, or read what came of it."""
    if not joins:
        return
    if not os.path.exists(path):
        for index in next(iter(joins.values())).grid:
            add(index)
        arrays = {}
        for number, joined in enumerate(joins.values()):
            joined.settle()
            arrays |= {f"{key}{number}": value for key, value in joined.state().items()}
        with written(path) as file:
            np.savez(file, **arrays)
    with np.load(path) as arrays:
        for number, joined in enumerate(joins.values()):
            joined.load({key: arrays[f"{key}{number}"] for key in ("starts", "judged")})


def _components(read, grid, regions, hysteresis, sizes, path):
    """Hysteresis and small components at once: of a component of hysteresis all voxels stay."""

    def keeps(least):
        return lambda voxels, marked: (marked | (not hysteresis)) & (voxels >= least)

    joins = {r: Joined(grid, keeps(sizes.get(r, 0))) for r in regions
             if hysteresis or sizes.get(r, 0) > 1}  # fmt: skip

    def inputs(index):
        high, low = read(grid.grown(index))
        for region in joins:
            mask = low[region] | high[region] if hysteresis else high[region]
            yield region, mask, high[region] if hysteresis else None
        for region in regions:
            if region not in joins:
                yield region, high[region], None

    def add(index):
        for region, mask, mark in inputs(index):
            if region in joins:
                joins[region].add(index, mask, mark)

    def of_block(index):
        own = tuple(map(slice, size_of(grid.box(index))))
        found = {
            region: joins[region].kept(index, mask, mark) if region in joins else mask[own]
            for region, mask, mark in inputs(index)
        }
        return {region: found[region] for region in regions}

    _settled(f"{path}.components.npz", joins, add)
    return _by_blocks(grid, of_block)


def _filled(masks, grid, regions, most, exclusive, path):
    """Cavities of the volume, and pinholes of its planes across each axis."""

    def keeps(voxels, marked):
        return ~marked & (voxels <= most)

    ways = [{"connectivity": 6}, *({"connectivity": 4, "axis": axis} for axis in range(3))]
    joins = {
        (region, number): Joined(grid, keeps, enclosed=True, **way)
        for region in regions
        for number, way in enumerate(ways)
    }

    def add(index):
        for region, mask in masks(grid.grown(index)).items():
            for number in range(len(ways)):
                joins[region, number].add(index, ~mask)

    def of_block(index):
        def fill(region, mask):
            filled, background = mask[own].copy(), ~mask
            for number in range(len(ways)):
                filled |= joins[region, number].kept(index, background)
            return filled

        own = tuple(map(slice, size_of(grid.box(index))))
        grown = masks(grid.grown(index))
        here = {region: mask[own] for region, mask in grown.items()}
        postprocess.change(here, lambda region, _: fill(region, grown[region]), exclusive)
        return here

    _settled(f"{path}.filled.npz", joins, add)
    return _by_blocks(grid, of_block)


def _closed(masks, grid, radius, spacing, exclusive):
    """A voxel depends on those within twice the radius; a margin is read around each block."""
    margin = [2 * m for m in postprocess.margins(radius, spacing)]

    def of_block(index):
        own, wide = grid.box(index), grid.box(index, margin, margin)
        inner = tuple(
            slice(o.start - w.start, o.stop - w.start) for o, w in zip(own, wide, strict=True)
        )
        around = masks(wide)
        here = {region: mask[inner] for region, mask in around.items()}
        # What the volume's border adds to a margin that ends within it does not reach the block.
        postprocess.change(
            here,
            lambda region, _: postprocess.close(around[region], radius, spacing)[inner],
            exclusive,
        )
        return here

    return _by_blocks(grid, of_block)
