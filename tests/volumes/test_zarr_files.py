"""Files of a Zarr array that were cut or damaged: what can be seen is a fault, never voxels."""

import fsspec
import numcodecs
import numpy as np
import pytest
import zarr
from zarr import codecs

from volumes import ome_zarr
from volumes.volume import VolumeError

BLOSC = [
    ("v2", numcodecs.Blosc("lz4", 5, 1)),
    ("v2", numcodecs.Blosc("zstd", 1, 0)),
    ("v3", codecs.BloscCodec(cname="lz4")),
    ("v3", {"name": "numcodecs.blosc", "configuration": {"cname": "lz4"}}),
]
OTHERS = [
    ("v2", None),
    ("v2", numcodecs.Zstd(3)),
    ("v2", numcodecs.LZ4()),
    ("v2", numcodecs.Zlib(1)),
    ("v2", numcodecs.LZMA()),
    ("v3", None),
    ("v3", codecs.ZstdCodec(level=3)),
    ("v3", codecs.GzipCodec()),
    ("v3", [codecs.BloscCodec(cname="lz4"), codecs.Crc32cCodec()]),
]
pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")


def voxels():
    """Half of them compress, half do not, so that Blosc keeps some chunks as they are."""
    array = np.random.default_rng(0).integers(0, 60_000, (16, 16, 16)).astype(np.uint16)
    array[:, :8] = np.arange(16)
    return array


def refuses(path, box=np.s_[:]):
    """Whether reading a box is one sentence that names a file or a chunk."""
    try:
        ome_zarr.open_volume(path)[box]
    except VolumeError as error:
        assert "got the chunk at" in str(error) or "got the file c/0/0/0 that" in str(error)
        return True
    return False


@pytest.mark.parametrize(("version", "codec"), BLOSC + OTHERS)
def test_a_chunk_that_was_cut_is_no_voxels_by_any_codec(tmp_path, version, codec):
    path, array = tmp_path / "a.zarr", voxels()
    options = {"zarr_format": int(version[1]), "compressors": codec}
    zarr.create_array(path, shape=(16,) * 3, chunks=(8,) * 3, dtype="u2", **options)[...] = array
    for key in ("0.0.0", "0.1.0") if version == "v2" else ("c/0/0/0", "c/0/1/0"):
        file = path / key
        whole = file.read_bytes()
        for content in (b"", whole[:12], whole[:20], whole[:-20], whole[:-1]):
            file.write_bytes(content)
            assert refuses(path)
        file.write_bytes(whole)
    assert np.array_equal(ome_zarr.open_volume(path)[:][0], array)


def test_a_chunk_of_blosc_that_was_cut_is_named_at_a_url_too(tmp_path):
    array = voxels()
    options = {"chunks": (8,) * 3, "zarr_format": 2, "compressors": numcodecs.Blosc()}
    zarr.create_array(tmp_path / "a.zarr", data=array, **options)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "a.zarr"), "/bucket/a.zarr", recursive=True)
    try:
        memory.pipe("/bucket/a.zarr/0.1.1", memory.cat("/bucket/a.zarr/0.1.1")[:100])
        volume = ome_zarr.open_volume("memory://bucket/a.zarr")
        assert np.array_equal(volume[:, 8:][0], array[8:])
        with pytest.raises(VolumeError, match=r"at 0:8, 8:16, 8:16 .*: 100 bytes where its"):
            volume[:]
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("get", "got"),
    [
        (lambda whole, length: whole, "all of it where 132 bytes were asked for"),
        (lambda whole, length: 1 / 0, "ZeroDivisionError"),  # no OSError, as those of aiohttp
    ],
)
def test_a_server_that_does_not_give_the_index_of_a_shard_is_a_fault(
    tmp_path, monkeypatch, get, got
):
    options = {"data": voxels(), "chunks": (8,) * 3, "shards": (16,) * 3}
    zarr.create_array(tmp_path / "a.zarr", **options)
    volume = ome_zarr.open_volume(tmp_path / "a.zarr")
    read = zarr.storage.LocalStore.get

    async def answer(store, key, prototype, byte_range=None):
        return get(await read(store, key, prototype), byte_range)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", answer)
    for ask in (lambda: volume.stored(0, 0, 0), lambda: volume[:]):
        with pytest.raises(VolumeError, match=f"to look up the file c/0/0/0, got .*{got}"):
            ask()


@pytest.mark.parametrize("codec", [None, codecs.ZstdCodec(), codecs.BloscCodec(cname="lz4")])
@pytest.mark.parametrize("index_codecs", [1, 2], ids=["plain", "crc32c"])
@pytest.mark.parametrize("place", ["start", "end"])
def test_a_shard_that_was_cut_is_no_voxels_wherever_its_index_is(
    tmp_path, place, index_codecs, codec
):
    path, array = tmp_path / "a.zarr", voxels()
    inner = codecs.ShardingCodec(
        chunk_shape=(8, 8, 8),
        index_location=place,
        index_codecs=[codecs.BytesCodec(), codecs.Crc32cCodec()][:index_codecs],
        codecs=[codecs.BytesCodec(), *([codec] if codec else [])],
    )
    options = {"shape": (16,) * 3, "chunks": (16,) * 3, "dtype": "u2", "compressors": None}
    zarr.create_array(path, serializer=inner, **options)[...] = array
    assert np.array_equal(ome_zarr.open_volume(path)[:][0], array)
    file = path / "c/0/0/0"
    whole = file.read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert refuses(path) and refuses(path, np.s_[:, 9:])
