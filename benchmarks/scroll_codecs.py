"""What it costs to write a shard: codecs, time, memory, and what levels keep of thin things.

    python benchmarks/scroll_codecs.py --ckpt runs/best.pt

The voxels are probabilities that a network gives of a phantom scroll, mirrored to a shard of 512³.
Seconds are those of the CPU, in one thread, so that other work on the machine counts little.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from numcodecs import blosc
from numcodecs.zstd import Zstd

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.arrays import load_network
from volumes import phantoms, zarr_shards, zarr_store

PREDICTED, CHUNK, SHARD = 192, 128, 512
CODECS = {f"zstd {level}": Zstd(level, checksum=True) for level in (1, 3, 5, 9)} | {
    f"blosc zstd {level}, {name}": blosc.Blosc("zstd", level, shuffle)
    for level in (1, 3)
    for name, shuffle in (("no shuffle", blosc.NOSHUFFLE), ("bits", blosc.BITSHUFFLE))
}
SURE = 26  # below 0.1: what a network that is sure of its background has as 0


def codecs(name, voxels):
    """Print size and speed of each codec on the chunks of voxels (256, 256, 256)."""
    places = np.ndindex(2, 2, 2)
    corners = [tuple(slice(i * CHUNK, (i + 1) * CHUNK) for i in place) for place in places]
    chunks = [np.ascontiguousarray(voxels[corner]) for corner in corners]
    print(f"\n{name}, {(voxels == 0).mean():.0%} zeros: ratio, encoding and decoding in MB/s")
    for title, codec in CODECS.items():
        seconds, encoded = cpu_time(lambda codec=codec: [codec.encode(c) for c in chunks])
        back, _ = cpu_time(lambda codec=codec, all=encoded: [codec.decode(c) for c in all])
        ratio, megabytes = voxels.size / sum(map(len, encoded)), voxels.size / 1e6
        speeds = f"{megabytes / seconds:6.0f} {megabytes / back:6.0f}"
        print(f"  {title:24} {ratio:6.2f} {speeds}")


def cpu_time(do, tries=2):
    """(the fewest CPU seconds, what do() returns)."""
    best = np.inf
    for _ in range(tries):
        begin = time.process_time()
        result = do()
        best = min(best, time.process_time() - begin)
    return best, result


def shard(probability, mask):
    """Print what writing a shard takes: CPU seconds and memory above that of its voxels."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = zarr_store.create(f"{folder}/p.zarr", mask.shape, {"sheet": 1})
        seconds, _ = cpu_time(lambda: store.write((0, 0, 0), probability, mask))
        size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        tracemalloc.start()
        store.write((0, 0, 0), probability, mask)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    pooling, _ = cpu_time(lambda: zarr_shards.pool(probability))
    print(f"\na shard of {SHARD}³: {seconds:.2f} s, of which {pooling:.2f} s pool the first level;")
    print(f"{size / 1e6:.1f} MB, {most / 2**20:.0f} MiB above its voxels")


def shares(name, mask):
    """Print the share of a mask that its levels have, to that of level 0."""
    voxels = np.pad(mask, [(0, -n % 8) for n in mask.shape])
    d, h, w = voxels.shape
    print(f"\n{name}, share of {mask.mean():.3f}: every second voxel, maximum, majority")
    for step in (2, 4, 8):
        blocks = voxels.reshape(d // step, step, h // step, step, w // step, step)
        ways = (
            mask[::step, ::step, ::step],
            blocks.max((1, 3, 5)),
            blocks.mean((1, 3, 5)) >= 0.5,
        )
        print(f"  1/{step}: " + "  ".join(f"{way.mean() / mask.mean():5.2f}" for way in ways))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="of the quickstart")
    image = phantoms.scroll((PREDICTED,) * 3, seed=5).image
    probs, mask = load_network(parser.parse_args().ckpt).predict(image, (1.0, 1.0, 1.0))
    pad = [(0, SHARD // 2 - PREDICTED)] * 3
    probability = np.pad(np.rint(probs * 255).astype(np.uint8), pad, "symmetric")
    mirrored = np.pad(mask, pad, "symmetric")
    codecs("probability", probability)
    codecs("probability, 0 below 0.1", np.where(probability < SURE, 0, probability))
    codecs("mask", mirrored)
    shard(np.tile(probability, (2, 2, 2))[None], np.tile(mirrored, (2, 2, 2)))
    shares("sheets", mask)
    shares("vessels", (phantoms.vessels((96, 192, 192), seed=1).label == 1).astype(np.uint8))


if __name__ == "__main__":
    main()
