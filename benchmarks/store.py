"""How a case file should store its volumes: chunk shapes and compression beside none of either.

    python benchmarks/store.py                   # 40 s on one core; prints a markdown table
    python benchmarks/store.py --side 64 --repeats 1

One scroll phantom of 160 x 320 x 320 voxels, image and label, is stored in every way. From each
file the box of a rotated and scaled patch of 72 x 136 x 136 is read, 100 x 190 x 190 voxels of
both, at eight places: medians of processor time on one thread, all of the file in memory. "from
file" goes through VolumeCache with a budget of 0, "HDF5" through a file that is open already,
"cached" through VolumeCache once it holds the case. "touched" is what a box needs of the file:
pages, or whole chunks as they are stored. Leaves nothing on disk.

Found on two cores of an AMD EPYC: contiguous it is. Its box takes 1.4 ms, of chunks without
compression 7 to 10 ms, with lzf 26 to 65 ms, with gzip 76 to 107 ms, both with the checksums that
case files have, though it touches more of the file than small compressed chunks do (12.5 MB, 5.5
with lzf). Of the chunks, 16 x 32 x 32 are the best to compress: the least to decode for a box. lzf
makes the file 1.8 times smaller and gzip 2.3 times; they save time only where nothing stays in
memory and the disk gives each worker less than some 300 MB/s (lzf) or 100 MB/s (gzip). What the
cache holds is read in a millisecond however it was stored.
"""

import argparse
import itertools
import math
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from patches.cache import VolumeCache
from volumes import casefile, phantoms

SHAPE = (160, 320, 320)
BOX = (100, 190, 190)
PLACES = 8
NAMES = ("image", "label")
CHUNKS = ((16, 32, 32), (32, 64, 64), (64, 64, 64), (1, None, None))  # None: the whole axis
COMPRESSIONS = (None, "lzf", "gzip")
MB = 2**20


def ways(shape):
    """(name, chunk z, y, x or None, compression) of every way to store a volume."""
    yield "contiguous", None, None
    for chunk, compression in itertools.product(CHUNKS, COMPRESSIONS):
        whole = tuple(min(c or n, n) for c, n in zip(chunk, shape, strict=True))
        yield f"{' x '.join(map(str, whole))}, {compression or 'none'}", whole, compression


def store(path, source, chunk, compression):
    """A copy of a case file with its volumes stored another way."""
    with h5py.File(source) as old, h5py.File(path, "w") as new:
        new.attrs.update(old.attrs)
        for name in old:
            if name not in NAMES or chunk is None:
                old.copy(name, new)
                continue
            per_channel = (1,) * (old[name].ndim - 3)
            options = {"chunks": (*per_channel, *chunk), "compression": compression}
            options["fletcher32"] = compression is not None  # as in casefile.py
            new.create_dataset(name, data=old[name][:], **options)
    return casefile.read_case(path)


def places(shape, seed=0):
    """Boxes at random places of a volume, as slices z, y, x."""
    rng = np.random.default_rng(seed)
    sizes = [min(n, most) for n, most in zip(BOX, shape, strict=True)]
    for _ in range(PLACES):
        starts = [int(rng.integers(0, n - s + 1)) for n, s in zip(shape, sizes, strict=True)]
        yield tuple(slice(a, a + s) for a, s in zip(starts, sizes, strict=True))


def touched(case, box):
    """Bytes of the file that a box needs."""
    with h5py.File(case.path) as file:
        return sum(
            pages_of(*case.layout[name], box)
            if case.layout[name] is not None
            else chunks_of(file[name], box)
            for name in NAMES
        )


def pages_of(offset, shape, dtype, box):
    first = np.ravel_multi_index(
        np.ix_(*(range(s.start, s.stop) for s in box[:2]), [box[2].start]), shape[-3:]
    )
    size = np.dtype(dtype).itemsize
    starts = offset + size * first.ravel()
    ends = starts + size * (box[2].stop - box[2].start) - 1
    pages = np.concatenate([starts // mmap.PAGESIZE, ends // mmap.PAGESIZE])
    return len(np.unique(pages)) * mmap.PAGESIZE * math.prod(shape[:-3])


def chunks_of(dataset, box):
    stored = (dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks()))
    return sum(
        chunk.size
        for chunk in stored
        if all(
            start < s.stop and start + length > s.start
            for start, length, s in zip(
                chunk.chunk_offset[-3:], dataset.chunks[-3:], box, strict=True
            )
        )
    )


def median_ms(read, boxes, repeats):
    """Median of processor time of read(box); each box once before, to have it in memory."""
    taken = []
    for number in range(repeats + 1):
        for box in boxes:
            started = time.process_time()
            read(box)
            if number:
                taken.append(1000 * (time.process_time() - started))
    return statistics.median(taken)


def measure(case, repeats):
    """The row of a table for one file: MB, MB touched, and milliseconds of the three ways."""
    boxes = list(places(case.shape))
    from_file, cached = VolumeCache([case], 0), VolumeCache([case], 2**62)
    with h5py.File(case.path) as file:
        yield os.path.getsize(case.path) / MB
        yield statistics.mean(touched(case, box) for box in boxes) / MB
        yield median_ms(lambda box: from_file.read(case, box, NAMES), boxes, repeats)
        yield median_ms(lambda box: read_open(file, box), boxes, repeats)
        yield median_ms(lambda box: cached.read(case, box, NAMES), boxes, repeats)


def read_open(file, box):
    return file["image"][(slice(None), *box)], file["label"][box]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=SHAPE[1], help="voxels in plane; half in z")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shape = (options.side // 2, options.side, options.side)
    phantom = phantoms.scroll(shape)
    print(
        f"{' x '.join(map(str, shape))} uint8, box {' x '.join(map(str, BOX))}; "
        f"{platform.machine()}, {os.cpu_count()} cores, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}, numpy {np.__version__}\n"
    )
    print("| stored | file, MB | touched, MB | from file, ms | HDF5, ms | cached, ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.h5"
        settings = {"spacing": phantom.spacing, "unit": phantom.unit, "affine": None, "group": "g"}
        casefile.write_case(source, phantom.image[None], phantom.label, skeleton=False, **settings)
        for name, chunk, compression in ways(shape):
            path = Path(folder) / "case.h5"
            row = measure(store(path, source, chunk, compression), options.repeats)
            print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
