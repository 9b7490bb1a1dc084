"""Files of a Zarr array: which chunks they hold, and whether they were cut.

What zarr finds by itself is not looked for: a chunk of other length than its voxels need, or with
bytes that its codec refuses. Imported when a volume is opened, as zarr is.
"""

import math

import google_crc32c
import numpy as np
from zarr import Array, AsyncArray
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath, WrapperStore

_NOWHERE = 2**64 - 1  # in the index of a shard: this chunk is not stored
_PLAIN, _CHECKED = (BytesCodec(),), (BytesCodec(), Crc32cCodec())


class _WholeBlosc(WrapperStore):
    """A store of files of Blosc, which takes for voxels what lies behind a cut one in memory."""

    async def get(self, key, prototype, byte_range=None):
        file = await super().get(key, prototype, byte_range)
        if file is not None:
            size = int.from_bytes(file[12:16].to_bytes(), "little")  # by the header
            if len(file) != size:
                raise ValueError(f"{len(file)} bytes where its header says {size}")
        return file


def checked(array):
    """The zarr.Array, which now raises ValueError where a file of Blosc was cut."""
    last = type(array.compressors[-1]).__name__ if array.compressors else ""
    if array.shards or last not in ("Blosc", "BloscCodec"):  # of numcodecs, and zarr's own
        return array
    place = StorePath(_WholeBlosc(array.store), array.path)
    return Array(AsyncArray(array.metadata, place, array.config))


def stored_chunks(array, key, inside):
    """Which chunks the file of a key holds: bools of shape inside, the chunks of a file along each
    axis; None if it was cut, or the index of the shard is damaged."""
    file = array.store_path / key
    sharding = array.metadata.codecs[0] if array.shards else None
    if sharding is None or sharding.index_codecs not in (_PLAIN, _CHECKED):
        return np.full(inside, sync(file.exists()))
    size = 16 * math.prod(inside)  # offset and length of each, then a checksum
    is_first, has_sum = sharding.index_location.value == "start", sharding.index_codecs == _CHECKED
    length = size + 4 * has_sum
    part = RangeByteRequest(0, length) if is_first else SuffixByteRequest(length)
    found = sync(file.get(default_buffer_prototype(), part))
    if found is None:
        return np.zeros(inside, bool)
    if len(found) > length:
        raise OSError(f"all of it where {length} bytes were asked for: its server knows no ranges")
    index, checksum = found.to_bytes()[:size], found.to_bytes()[size:]
    if len(found) < length:
        return None
    if has_sum and google_crc32c.value(index) != int.from_bytes(checksum, "little"):
        return None
    index = np.frombuffer(index, "<u8").reshape(*inside, 2)
    stored = (index != _NOWHERE).any(-1)
    if is_first or not has_sum:  # a checksum at the end shows a cut by itself
        ends = index[stored].astype(float).sum(-1)
        if (ends > sync(file.store.getsize(file.path))).any():
            return None
    return stored
