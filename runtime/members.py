"""Checkpoints as what predicts: one, or several that were trained on the same kind of data.

members = read_members(["runs/losses"])        # a sweep folder: the runs of its one variant
"""

from pathlib import Path
from typing import NamedTuple

import torch

import model
from runtime import checkpoint, config, outputs
from runtime.folder import newest_run_folder
from runtime.jobs import Ledger
from volumes import origins
from volumes.inputs import UNLIKE
from volumes.volume import InputErrors, collect_errors


class Member(NamedTuple):
    """A checkpoint without what only training needs; network: in eval mode on the CPU."""

    path: str
    step: int
    weights: str  # which
    network: torch.nn.Module
    config: dict
    data: dict  # what the run knows of its data
    chosen: dict  # by validation
    foreground: float | None  # its share in training, None in checkpoints of older versions
    origin: dict  # see volumes/origins.py

    @property
    def run(self):
        """The name of its run: of the folder, else, of a copy elsewhere, as it was set."""
        place = Path(self.origin["checkpoint"]).parent
        return place.parent.name if place.name == "checkpoints" else self.config["run"]["name"]


def read_members(texts):
    """[`Member`] of checkpoints, run folders and sweep folders; InputErrors names every fault."""
    faults, paths, members = [], [], []
    for text in texts:
        with collect_errors(faults):
            is_sweep, own = (Path(text) / "ledger.jsonl").is_file(), Path(text) / "checkpoints"
            of_run = [path for path in (own / "best.pt", own / "last.pt") if path.is_file()]
            paths += _of_sweep(Path(text)) if is_sweep else of_run[:1] or [text]
    files = [Path(path).resolve() for path in paths]
    for path, file in zip(paths, files, strict=True):
        if files.count(file) > 1:
            faults.append(
                f"{path}: expected each checkpoint once, got it {files.count(file)} times"
            )
            continue
        with collect_errors(faults):
            came_from = origins.origin(path)
            state = checkpoint.load(path)
            state["config"] |= {"loss": {}}  # nothing here needs it, and terms may be one's own
            network, weights = build_network(state, path)
            loop = state["loop"]
            about = state["config"], state["data"], loop["evaluations"]["chosen"]
            about += (loop.get("foreground"),)
            came_from |= {"step": loop["step"], "unit": state["data"]["unit"]}
            came_from |= {"tolerance": state["config"]["validation"]["tolerance"]}
            members.append(Member(str(path), loop["step"], weights, network, *about, came_from))
    if not faults:
        faults = [fault for other in members[1:] for fault in _layout_faults(members[0], other)]
    if faults:
        raise InputErrors(*dict.fromkeys(faults))
    return members


def _of_sweep(folder):
    """The checkpoints of a sweep folder, by which its runs are judged."""
    entries = Ledger(folder / "ledger.jsonl").entries()
    variants = sorted({entry["variant"] for entry in entries.values()})
    if len(variants) != 1:
        raise ValueError(
            f"{folder}: expected a sweep of one variant, got {', '.join(variants) or 'no runs'}; "
            f"give the checkpoints of one, such as {folder}/{(variants or ['NAME'])[0]}_*/"
            "checkpoints/last.pt"
        )
    folders = {name: newest_run_folder(folder, name) for name in sorted(entries)}
    undone = [name for name in folders if entries[name]["status"] != "done" or not folders[name]]
    if undone:
        raise ValueError(
            f"{folder}: expected runs that are done, got {', '.join(undone)}, which are not; do "
            "them again, or give the checkpoints of the others"
        )
    return [str(run / "checkpoints" / "last.pt") for run in folders.values()]


def build_network(state, path):
    """(network, which weights) of a checkpoint, in eval mode on the CPU; ValueError names path."""
    advice = "use the code in the run's source/ folder"
    try:
        metadata, settings = state["data"], config.build(state["config"])
    except config.ConfigError as error:
        got = f"got others ({'; '.join(str(error).splitlines())}); {advice}"
        raise ValueError(f"{path}: expected settings of this version, {got}") from None
    told_apart = outputs.of_metadata(metadata)
    network = model.build_network(
        metadata["channels"],
        told_apart.channels,
        strides=metadata["strides"],
        kernels=metadata["kernels"],
        settings=settings.model.model_dump(),
        exclusive=told_apart.exclusive,
    )
    averaged = state["ema"] is not None and settings.optim.ema > 0  # 0: a copy of the last step's
    try:
        network.load_state_dict(state["ema"] if averaged else state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected the weights of the network that model.py builds, got those of "
            f"another version; {advice}"
        ) from error
    return network.eval(), "averaged (EMA) weights" if averaged else "weights of the last step"


def _layout_faults(first, other):
    """A sentence if two models saw other data layouts."""
    layouts = []
    for member in (first, other):
        metadata, settings = member.data, config.build(member.config)
        names = {number: name for name, number in metadata["classes"].items()}
        layouts.append(
            {
                "channels": metadata["channels"],
                "foreground": sorted(names[number] for number in metadata["foreground"]),
                "regions": _regions(outputs.of_metadata(metadata), names),
                "unit": metadata["unit"],
                "data.spacing": [size or 0.0 for size in metadata["spacing"]],
                "data.clip_percentiles": settings.data.clip_percentiles,
                "fill values known": metadata.get("typical", False),
            }
        )
    ours, theirs = layouts
    differ = [f"{key} {theirs[key]} for {ours[key]}" for key in ours if ours[key] != theirs[key]]
    voxels = [member.data.get("trained_spacing") for member in (first, other)]
    if not differ and all(voxels):
        sizes = zip(*voxels, ours["data.spacing"], strict=True)
        ratios = [b / a for a, b, wanted in sizes if not wanted]
        if any(ratio > UNLIKE or ratio < 1 / UNLIKE for ratio in ratios):
            differ = [f"voxels of {voxels[1]} for {voxels[0]}"]
    if differ:
        yield (
            f"{other.path}: expected a network for such data as {first.path} has seen, got "
            f"{', '.join(differ)}; average those of one kind"
        )


def _regions(told_apart, names):
    """What a network tells apart, in words; names: {id: class}."""
    if not told_apart.several:
        return "one foreground"
    kind = "one in each voxel" if told_apart.exclusive else "that may overlap"
    rows = told_apart.regions.items()
    rows = [f"{name} ({'+'.join(names[number] for number in ids)})" for name, ids in rows]
    return f"{', '.join(rows)}, {kind}"
