import dataclasses
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import checkpoint, config
from runtime import folder as runs
from runtime.checkpoint import CheckpointError, load, load_newest, previous_path, save
from runtime.evaluations import Standing
from runtime.folder import link_newest


def state_of(step, **changes):
    state = {key: None for key in checkpoint.KEYS if key != "format"}
    return {
        **state,
        "model": {"w": torch.full((3,), float(step))},
        "loop": {"step": step},
    } | changes


def same_tree(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return type(a) is type(b) and a == b


def trained(steps=3):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.BatchNorm3d(2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    for _ in range(steps):
        network(torch.randn(2, 1, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
    return network, optimizer, schedule


# ---------------------------------------------------------------------------- round trip


def test_round_trip_is_bit_for_bit(tmp_path):
    network, optimizer, schedule = trained()
    state = state_of(
        3,
        model=network.state_dict(),
        ema={"w": torch.tensor([1e-40, -0.0, 3.0], dtype=torch.bfloat16)},
        optimizer=optimizer.state_dict(),
        scheduler=schedule.state_dict(),
        scaler=torch.amp.GradScaler("cpu").state_dict(),
        rng=checkpoint.rng_state(),
        config={"model": {"patch": (72, 136, 136), "name": "unet", "dropout": 0.15, "x": None}},
        versions=runs.versions(),
    )
    save(state, tmp_path / "last.pt")
    back = load(tmp_path / "last.pt")
    assert back.pop("format") == checkpoint.FORMAT
    assert same_tree(state, {key: back[key] for key in state})
    others = trained(0)
    for other, key in zip(others, ("model", "optimizer", "scheduler"), strict=True):
        other.load_state_dict(back[key])
        assert same_tree(other.state_dict(), state[key])


def test_rng_state_survives_the_file_and_repeats_the_draws(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second draw back

    def draw():
        return (
            [random.gauss(0, 1), random.random()],
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        )

    save(state_of(0, rng=checkpoint.rng_state()), tmp_path / "last.pt")
    first, other = draw(), draw()
    checkpoint.set_rng_state(load(tmp_path / "last.pt")["rng"])
    assert draw() == first != other


def test_a_run_on_the_cpu_opens_no_cuda_context_for_its_generators(monkeypatch):
    on_a_gpu = checkpoint.rng_state() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # other tests may have
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: pytest.fail("a context"))
    assert checkpoint.rng_state()["cuda"] is None
    checkpoint.set_rng_state(on_a_gpu)  # the rest of it counts
    assert torch.equal(torch.get_rng_state(), on_a_gpu["torch"])


def test_a_run_on_a_gpu_keeps_its_generator_and_goes_on_from_a_cpu_without_it(monkeypatch):
    of_a_cpu, given = checkpoint.rng_state(), []
    state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    checkpoint.set_rng_state(of_a_cpu)
    assert given == []
    checkpoint.set_rng_state(checkpoint.rng_state())
    assert len(given) == 1 and torch.equal(given[0], state)


def test_memory_that_runs_out_while_a_file_is_read_is_no_damage(tmp_path, monkeypatch):
    save(state_of(0), tmp_path / "last.pt")

    def no_memory(*arguments, **how):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load(tmp_path / "last.pt")


def test_versions_are_plain_strings():
    versions = runs.versions()
    assert set(versions) == {"lamina", "python", "torch", "numpy", "platform"}
    assert all(type(v) is str and v for v in versions.values())


# ---------------------------------------------------------------------------- generations


def test_generation_before_is_kept_and_older_ones_go(tmp_path):
    for step in (1, 2, 3):
        save(state_of(step), tmp_path / "last.pt")
    assert load(tmp_path / "last.pt")["loop"] == {"step": 3}
    assert load(tmp_path / "last.previous.pt")["loop"] == {"step": 2}
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt"]


def test_stop_while_writing_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    for step in (1, 2):
        save(state_of(step), tmp_path / "last.pt")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def stopped(state, file):
        file.write(b"half of a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(state_of(3), tmp_path / "last.pt")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("call", range(8))
def test_kill_at_any_file_operation_leaves_a_readable_generation(
    tmp_path, monkeypatch, call, hard_links
):
    for step in (1, 2):
        save(state_of(step), tmp_path / "last.pt")
    count = iter(range(100))

    def deadly(operation):
        def wrapped(*args, **kwargs):
            if next(count) == call:
                raise Killed
            return operation(*args, **kwargs)

        return wrapped

    def no_link(*args):
        raise OSError("no hard links here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", deadly(os.link if hard_links else no_link))
        for name in ("replace", "fsync"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        # A killed process cleans up nothing.
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        try:
            save(state_of(3), tmp_path / "last.pt")
        except Killed:
            pass
    _, state, _ = load_newest(tmp_path)
    assert state["loop"]["step"] in (2, 3)
    save(state_of(4), tmp_path / "last.pt")  # what the kill left behind is in nobody's way
    path, state, reasons = load_newest(tmp_path)
    assert (path, state["loop"]["step"], reasons) == (tmp_path / "last.pt", 4, [])
    assert load(tmp_path / "last.previous.pt")["loop"]["step"] in (2, 3)
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt"]


def test_truncated_file_does_not_push_out_the_good_generation(tmp_path):
    for step in (1, 2):
        save(state_of(step), tmp_path / "last.pt")
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    path, _, (reason,) = load_newest(tmp_path)
    assert path.name == "last.previous.pt" and "truncated" in reason and "\n" not in reason
    save(state_of(3), tmp_path / "last.pt")
    assert load(tmp_path / "last.pt")["loop"] == {"step": 3}
    assert load(tmp_path / "last.previous.pt")["loop"] == {"step": 1}


def test_newest_is_the_previous_one_where_last_is_gone(tmp_path):
    for step in (1, 2):
        save(state_of(step), tmp_path / "last.pt")
    (tmp_path / "last.pt").unlink()
    path, state, (reason,) = load_newest(tmp_path)
    assert path.name == "last.previous.pt" and state["loop"] == {"step": 1}
    assert "last.pt" in reason and "no such file" in reason


def test_best_is_gone_on_from_where_it_is_the_newest_that_can_be_read(tmp_path):
    save(state_of(1), tmp_path / "last.pt")
    save(state_of(2), tmp_path / "last.pt")
    save(state_of(2), tmp_path / "best.pt")
    (tmp_path / "last.pt").write_bytes(b"")
    path, state, reasons = load_newest(tmp_path)
    assert (path.name, state["loop"]["step"], len(reasons)) == ("best.pt", 2, 1)


def test_without_anything_readable_every_file_is_named_with_its_fault(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt: .*no such file"):
        load_newest(tmp_path)
    for name in ("last.pt", "last.previous.pt", "best.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt.*last\.previous\.pt.*best\.pt"):
        load_newest(tmp_path)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    state = state_of(1, model={"w": torch.arange(500.0)}, config={"lr": 0.1})
    save(state, tmp_path / "last.pt")
    whole = (tmp_path / "last.pt").read_bytes()
    found = 0
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        (tmp_path / "last.pt").write_bytes(flipped)
        try:
            back = load(tmp_path / "last.pt")
        except CheckpointError:
            found += 1
        else:
            assert same_tree({k: back[k] for k in state}, state), place
    assert found > 0.6 * len(whole) / 7  # the rest is what fills archives up


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "value, name",
    [(np.float64(1), "float64"), (np.zeros(2), "ndarray"), (Path("x"), "Path"), ({1, 2}, "set")],
)
def test_values_that_could_not_be_read_back_are_refused_when_saving(tmp_path, value, name):
    with pytest.raises(TypeError, match=rf"state\.loop\.best\[0\]: \w*{name}"):
        save(state_of(1, loop={"best": [value]}), tmp_path / "last.pt")
    assert os.listdir(tmp_path) == []


def test_state_with_missing_or_unknown_keys_is_refused(tmp_path):
    state = state_of(1, extra=1)
    del state["optimizer"]
    with pytest.raises(ValueError, match=r"lacks .'optimizer'. and has unknown .'extra'."):
        save(state, tmp_path / "last.pt")


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def bad_files(folder):
    save(state_of(1), folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes(whole[:-40])
    (folder / "text.pt").write_text("weights")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Hostile(folder / "ran")))
    torch.save({**state_of(1), "model": Hostile(folder / "ran")}, folder / "hostile.pt")
    torch.save({"conv.weight": torch.zeros(2)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"format": "lamina-checkpoint-0"}, folder / "older.pt")
    torch.save({"format": checkpoint.FORMAT, "model": {}}, folder / "partial.pt")
    with zipfile.ZipFile(folder / "archive.pt", "w") as file:
        file.writestr("readme", "no tensors")
    damaged = bytearray(whole)
    at = whole.index(b"data.pkl") + 80
    damaged[at : at + 60] = bytes(60)
    (folder / "damaged.pt").write_bytes(damaged)
    (folder / "folder.pt").mkdir()
    (folder / "dangling.pt").symlink_to("gone/last.pt")
    return {
        "empty": "an empty file",
        "truncated": "a truncated file",
        "text": "of another kind",
        "pickle": "of another kind",
        "hostile": "other than tensors and plain values",
        "foreign": "without a format",
        "list": "a list",
        "older": "lamina-checkpoint-0",
        "partial": "one without config, data, ema",
        "archive": "cannot be read",
        "damaged": "",
        "folder": "a folder",
        "dangling": "a link to gone/last.pt",
        "missing": "no such file",
    }


def test_files_that_are_no_checkpoint_get_one_sentence_and_run_nothing(tmp_path):
    for name, got in bad_files(tmp_path).items():
        path = tmp_path / f"{name}.pt"
        with pytest.raises(CheckpointError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: expected a Lamina checkpoint, got ") and got in message
        assert "\n" not in message and "; " in message
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------- link to the last run


def test_last_run_is_linked_relatively_and_the_folder_can_move(tmp_path):
    runs = tmp_path / "runs"
    for step, name in enumerate(("a", "b")):
        path = runs / name / "checkpoints" / "last.pt"
        save(state_of(step), path)
        link_newest(runs, path.parent)
        assert load(runs / "last.pt")["loop"] == {"step": step}
    assert os.readlink(runs / "last.pt") == "b/checkpoints/last.pt"
    runs.rename(tmp_path / "moved")
    assert load(tmp_path / "moved" / "last.pt")["loop"] == {"step": 1}
    assert sorted(os.listdir(tmp_path / "moved")) == ["a", "b", "last.pt"]


def test_previous_path_keeps_the_suffix():
    assert previous_path("runs/x/best.pt") == Path("runs/x/best.previous.pt")


# ---------------------------------------------------------------------------- older formats

FIRST_LOOP = {
    "step": 9,
    "seconds": 2.5,
    "lines": 14,
    "sums": {"total": (0.5, 1.0)},
    "draws": {},
    "epoch_parts": {"total": (1.5, 2.0)},
    "epoch_draws": {"around_foreground": (1.0, 2.0)},
    "evaluated_step": 8,
    "pending": None,
    "best_score": 0.25,
    "best_step": 4,
    "worse": 1,
    "chosen": {"threshold": 0.4},
    "skipped": {"in_a_row": 0, "since_log": 0, "cases": {}},
    "left_out": {"bar1": ["it cannot be read", 1, 2]},
    "part": 1,
    "recompute": True,
    "window_fits": {"12x24x24": [1, True]},
}


def test_a_state_of_the_first_format_is_read_as_one_of_this(tmp_path):
    settings = config.build({}).plain()
    settings["data"]["max_left_out"] = settings["data"].pop("max_excluded")
    del settings["loss"]["class_weights"]  # it knew none
    for term in settings["loss"].values():
        term["between"] = term.pop("off_step")
    state = state_of(9, loop=FIRST_LOOP, config=settings)
    torch.save(state | {"format": "lamina-checkpoint-1"}, tmp_path / "last.pt")
    state = load(tmp_path / "last.pt")
    assert config.build(state["config"]) == config.build({})
    assert state["loop"] == {
        "step": 9,
        "seconds": 2.5,
        "lines": 14,
        "means": {
            "line": {"loss": {"total": (0.5, 1.0)}, "patches": {}},
            "epoch": {
                "loss": {"total": (1.5, 2.0)},
                "patches": {"around_foreground": (1.0, 2.0)},
            },
        },
        "skipped": {"in_a_row": 0, "since_log": 0, "cases": {}},
        "evaluations": dataclasses.asdict(
            Standing(0.25, 4, 1, 8, None, {"threshold": 0.4}, {"12x24x24": [1, True]})
        ),
        "micro_batch": {"size": 1, "checkpointing": True},
        "excluded": {"bar1": ["it cannot be read", 1, 2]},
    }
    assert save(state, tmp_path / "again.pt").bytes and load(tmp_path / "again.pt")
