"""Volumes larger than memory: phantoms as OME-Zarr of any size, and what their prediction costs.

    python benchmarks/scrolls.py phantom --size 1024 --format v3 --air 0.9 scroll.zarr
    python benchmarks/scrolls.py memory --sizes 512 1024 --formats v2 v3
    python benchmarks/scrolls.py air --size 512               # 90 % of zeros beside a full volume
    .venv-bench/bin/python benchmarks/scrolls.py monai --size 512   # PatchInferer, ZarrAvgMerger

All but the first print rows of a table and leave nothing. Each prediction is infer.py in a process
of its own. Its time is from start to end; its peak is that of its resident memory, above what a
process has that has imported infer.py. Without --ckpt a tiny network is trained for some seconds
before; settings for infer.py may follow, such as inference.shard=[256,256,256].
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from volumes import phantoms

ROOT = Path(__file__).resolve().parents[1]
TILE, SHARD = 128, 512
MICRON = 7.91  # the size of a voxel
TINY = ["model.base=2", "model.multipliers=[1,2]", "sampling.patch=[64,64,64]"]
TINY += ["inference.overlap=0.5", "data.validation=[]", "data.test=[]", "data.folds=2"]
TINY += ["training.max_steps=10", "run.name=tiny"]

# ---------------------------------------------------------------------------- phantoms


def write_phantom(path, size, kind="v3", air=0.0, seed=0):
    """A scroll (size, size, size) uint8 as OME-Zarr: kind "v2" is 0.4, "v3" is 0.5 in shards.

    A phantom of 128^3 is repeated, mirrored, so that sheets go on from chunk to chunk. air: share
    of zeros, 0 or from 0.25 on; the rest is a cylinder along z. Chunks of zeros are not stored, as
    in published scrolls. Memory: a shard.
    """
    import zarr

    tile = np.maximum(phantoms.scroll((TILE,) * 3, seed).image, 1)  # 0 is air
    group = zarr.open_group(path, mode="w", zarr_format=2 if kind == "v2" else 3)
    block = TILE if kind == "v2" else min(SHARD, -(-size // TILE) * TILE)
    how = {"shape": (size,) * 3, "chunks": (TILE,) * 3, "dtype": "u1", "fill_value": 0}
    how |= {} if kind == "v2" else {"shards": (block,) * 3}
    array = group.create_array("0", **how)
    radius = size * np.sqrt((1 - air) / np.pi)
    for corner in np.ndindex(*(-(-size // block),) * 3):
        places = [np.arange(i * block, min((i + 1) * block, size)) for i in corner]
        mirrored = [np.where(p // TILE % 2, TILE - 1 - p % TILE, p % TILE) for p in places]
        values = tile[np.ix_(*mirrored)]
        if air:
            y, x = ((p - (size - 1) / 2) ** 2 for p in places[1:])
            values = values * (y[:, None] + x < radius**2)
        array[tuple(slice(p[0], p[-1] + 1) for p in places)] = values
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    scale = [{"type": "scale", "scale": [MICRON] * 3}]
    level = {"path": "0", "coordinateTransformations": scale}
    image = {"name": "scroll", "axes": axes, "datasets": [level]}
    v2 = {"multiscales": [{"version": "0.4"} | image]}
    v3 = {"ome": {"version": "0.5", "multiscales": [image]}}
    group.attrs.update(v2 if kind == "v2" else v3)


def tiny_checkpoint(folder):
    """The checkpoint of a network of 2 and 4 channels that was trained for some seconds."""
    data = folder / "data"
    quick = {"stdout": subprocess.DEVNULL, "check": True}
    script = [sys.executable, str(ROOT / "prepare.py"), "--phantom", "scroll", "--out", str(data)]
    subprocess.run([*script, "--cases", "2", "--shape", "80", "80", "80"], **quick)
    script = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "quickstart.yaml")]
    subprocess.run([*script, *TINY, f"data.root={data}", f"run.folder={folder}"], **quick)
    return folder / "tiny" / "checkpoints" / "last.pt"


# ---------------------------------------------------------------------------- one prediction


def measured(command):
    """(seconds, peak of resident bytes, standard output) of a command that must end well."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}: {text[-2000:]}")
    return seconds, usage.ru_maxrss * 1024, text


def interpreter():
    """Resident bytes of a process that has imported infer.py, at most."""
    return measured(["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import infer"])[1]


def predict(arguments, image, output):
    """{"seconds", "bytes", "factor"} of infer.py: bytes above the interpreter's."""
    command = [ROOT / "infer.py", "--ckpt", arguments.ckpt, "--input", image, "--output", output]
    seconds, peak, text = measured([*command, *arguments.overrides])
    factor = re.search(r"read factor ([\d.]+)", text)
    bytes_more = peak - arguments.interpreter
    return {"seconds": seconds, "bytes": bytes_more, "factor": float(factor[1])}


# ---------------------------------------------------------------------------- measurements


def memory(arguments, folder):
    print("| voxels | format | peak above the interpreter, MB | read factor | s | levels |")
    print("|---|---|---|---|---|---|")
    for kind in arguments.formats:
        for size in arguments.sizes:
            image, output = folder / f"{size}_{kind}.zarr", folder / f"{size}_{kind}_pred.zarr"
            write_phantom(image, size, kind, arguments.air)
            row = predict(arguments, image, output)
            levels = len(list(output.glob("[0-9]*")))
            print(
                f"| {size}^3 | {kind} | {row['bytes'] / 1e6:.0f} | {row['factor']:.2f} | "
                f"{row['seconds']:.1f} | {levels} |",
                flush=True,
            )


def air(arguments, folder):
    import zarr

    rows, share = {}, arguments.air or 0.9
    for zeros in (0.0, share):
        image, output = folder / f"{zeros}.zarr", folder / f"{zeros}_pred.zarr"
        write_phantom(image, arguments.size, "v3", zeros)
        rows[zeros] = predict(arguments, image, output)
    voxels = zarr.open_array(image, path="0", mode="r")
    wrong = 0
    for name in ("0", "labels/mask/0"):
        predicted = zarr.open_array(output, path=name, mode="r")
        for z in range(0, arguments.size, TILE):
            wrong += int(np.count_nonzero(predicted[z : z + TILE] * (voxels[z : z + TILE] == 0)))
    full, empty = (row["seconds"] for row in rows.values())
    print(
        f"{arguments.size}^3: {full:.1f} s full, {empty:.1f} s with {100 * share:.0f} % of zeros "
        f"({100 * empty / full:.0f} %); {wrong} voxels set where the input is 0"
    )


def monai(arguments, folder):
    image = folder / "scroll.zarr"
    write_phantom(image, arguments.size, "v3")
    print("| row | s | peak above the interpreter, MB |\n|---|---|---|")
    rows = {"ours": [], "monai": []}
    for number in range(arguments.rounds):
        rows["ours"].append(predict(arguments, image, folder / f"ours{number}.zarr"))
        command = [__file__, "merge", "--ckpt", arguments.ckpt, image, folder / f"{number}.zarr"]
        seconds, peak, _ = measured([*command, *arguments.overrides])
        rows["monai"].append({"seconds": seconds, "bytes": peak - arguments.interpreter})
    for row, runs in rows.items():
        seconds, size = (
            sorted(r[key] for r in runs)[len(runs) // 2] for key in ("seconds", "bytes")
        )
        print(f"| {row} | {seconds:.1f} | {size / 1e6:.0f} |", flush=True)


def merge(arguments, folder):
    """MONAI: windows of the same network and overlap, averaged in a Zarr on disk."""
    import torch
    import zarr
    from monai.inferers import PatchInferer, SlidingWindowSplitter, ZarrAvgMerger

    import data
    from patches.intensity import normalise
    from runtime.arrays import load_network
    from runtime.threads import use_threads
    from volumes.statistics import intensity_statistics

    predictor = load_network(arguments.ckpt, settings=arguments.overrides)
    use_threads(predictor.settings.run.threads, 1)
    (network,), inference = predictor.networks, predictor.settings.inference
    voxels = zarr.open_array(arguments.paths[0], path="0", mode="r")[:][None]
    how = data.normalisation(intensity_statistics(voxels), predictor.how["clip"])
    inferer = PatchInferer(
        splitter=SlidingWindowSplitter(tuple(inference.window), inference.overlap),
        merger_cls=ZarrAvgMerger,
        preprocessing=lambda patch: normalise(patch[0].float(), **how)[None],
        postprocessing=torch.sigmoid,
        store=arguments.paths[1],
        chunks=(1, 1, *inference.window),  # faster than its default, and than larger ones
    )
    with torch.inference_mode():
        inferer(torch.from_numpy(voxels)[None], network)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {f.__name__: f for f in (memory, air, monai, merge)}
    add = parser.add_argument
    add("command", choices=["phantom", *commands])
    add("paths", nargs="*", help="of the phantom")
    add("--size", type=int, default=256)
    add("--sizes", type=int, nargs="+", default=[128, 256], help="for memory")
    add("--format", choices=["v2", "v3"], default="v3")
    add("--formats", nargs="+", default=["v2", "v3"], help="for memory")
    add("--air", type=float, default=0.0, help="share of zeros")
    add("--rounds", type=int, default=1, help="for monai")
    add("--ckpt", type=Path)
    arguments = parser.parse_intermixed_args()
    arguments.overrides = [text for text in arguments.paths if "=" in text]
    arguments.paths = [text for text in arguments.paths if text not in arguments.overrides]
    if arguments.command == "phantom":
        write_phantom(arguments.paths[0], arguments.size, arguments.format, arguments.air)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if arguments.command != "merge":
            arguments.ckpt = arguments.ckpt or tiny_checkpoint(folder)
            arguments.interpreter = interpreter()
        commands[arguments.command](arguments, folder)


if __name__ == "__main__":
    main()
