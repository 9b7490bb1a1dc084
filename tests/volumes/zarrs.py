"""OME-Zarr as other programs write it, for tests."""

import zarr

UNITS = {"x": "space", "y": "space", "z": "space", "c": "channel", "t": "time"}


def write_zarr(
    path,
    levels,
    version="0.4",
    axes="zyx",
    *,
    spacing=(4.0, 2.0, 2.0),
    translation=None,
    unit="micrometer",
    chunk=8,
    shard=None,
    **options,
):
    """Write levels, arrays from fine to coarse, each half the size of the one before.

    spacing, translation: of level 0, in the order of the axes z, y, x; chunk, shard: voxels along
    each of these; options: of zarr's create_array. Returns the path.
    """
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    place = dict(zip("zyx", translation or (0.0,) * 3, strict=True))
    size, datasets = dict(zip("zyx", spacing, strict=True)), []
    for level, array in enumerate(levels):
        chunks, shards = ([n if a in "zyx" else 1 for a in axes] for n in (chunk, shard))
        written = group.create_array(
            str(level),
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunks,
            shards=shards if shard else None,
            **options,
        )
        written[...] = array
        steps = [{"type": "scale", "scale": [size[a] * 2**level if a in size else 1 for a in axes]}]
        if translation:
            steps += [{"type": "translation", "translation": [place.get(a, 0.0) for a in axes]}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    named = [{"name": a, "type": UNITS[a]} for a in axes]
    if unit:
        named = [axis | ({"unit": unit} if axis["name"] in "zyx" else {}) for axis in named]
    set_metadata(group, {"multiscales": [{"axes": named, "datasets": datasets}]}, version)
    return path


def set_metadata(group, content, version="0.4"):
    """Write attributes of OME-Zarr where the version has them."""
    if version == "0.4":
        content["multiscales"][0]["version"] = version
        group.attrs.update(content)
    else:
        group.attrs["ome"] = {"version": version, **content}


def add_label(path, name, levels, version="0.4", **options):
    """Write a label into the group `labels` of an image that is there."""
    group = zarr.open_group(str(path), mode="a").require_group("labels")
    names = group.attrs.get("labels", []) or group.attrs.get("ome", {}).get("labels", [])
    write_zarr(f"{path}/labels/{name}", levels, version, **options)
    names = [*names, name]
    group.attrs.update({"labels": names} if version == "0.4" else {"ome": {"labels": names}})
