"""Whole runs that something happens to: kills, signals, dead workers, no memory, no disk, NaN."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
import model
import train
from benchmarks import kills
from runtime import checkpoint, evaluator, memory_guard, sliding_window
from tests import processes
from tests.runtime.test_device_memory import memory_error
from tests.test_train import events, root, same_state, settings, weights_of

__all__ = ["root"]  # a fixture
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    assert train.main(settings(root, folder)) == 0
    return folder


def run_folder(tmp_path):
    return tmp_path / "runs" / "r"


def troubles(tmp_path, kind):
    return [e for e in events(run_folder(tmp_path), "trouble") if e["kind"] == kind]


def after_step(monkeypatch, step, act):
    """Have act() called in the middle of the learning step that comes after `step` steps."""
    update = model.update_ema

    def acting(ema, network, decay, number):
        if number == step:
            act()
        update(ema, network, decay, number)

    monkeypatch.setattr(model, "update_ema", acting)


# ---------------------------------------------------------------------------- killed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not(
    root, tmp_path, straight, workers
):
    changes = (f"training.workers={workers}", "training.save_minutes=0.005")
    (tmp_path / "c.yaml").write_text(json.dumps(settings(root, tmp_path, *changes).plain()))
    words = [ROOT / "train.py", tmp_path / "c.yaml", "--resume"]
    for moment in ("start", "write", "later"):
        kill_at(moment, words, tmp_path / "runs")
    done = processes.run(words)
    assert done.returncode == 0, done.stderr
    assert kills.differences(run_folder(straight), run_folder(tmp_path)) == []
    assert events(run_folder(tmp_path), "start")[-1]["resumed"]


def kill_at(moment, words, folder):
    conditions = {
        "start": lambda: any(folder.glob("*/log.jsonl")),
        "write": lambda: any(folder.glob("*/checkpoints/.partial_*")),
        "later": lambda: kills.reached(folder, 5),
    }
    process = processes.Script(words)
    assert kills.wait_until(conditions[moment], process), process.communicate()[1]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_a_run_after_its_step_with_its_state(
    root, tmp_path, monkeypatch, capsys, signal_name
):
    number = getattr(signal, signal_name)
    after_step(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    assert train.main(settings(root, tmp_path)) == 75
    assert weights_of(run_folder(tmp_path))["loop"]["step"] == 5
    (stop,) = events(run_folder(tmp_path), "stop")
    assert signal_name in stop["reason"] and stop["status"] == 75
    assert "--resume" in capsys.readouterr().out
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("way", ["file", "hours", "signal"])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    root, tmp_path, straight, monkeypatch, way
):
    stopped = settings(root, tmp_path, *["training.max_hours=1e-9"] * (way == "hours"))
    if way == "file":
        monkeypatch.setattr(train.signals, "LOOK", 0.0)
        after_step(monkeypatch, 3, lambda: (run_folder(tmp_path) / "stop").touch())
    elif way == "signal":
        after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(stopped) == 75
    assert weights_of(run_folder(tmp_path))["loop"]["step"] == (0 if way == "hours" else 4)
    assert not (run_folder(tmp_path) / "stop").exists()
    monkeypatch.undo()
    assert train.main(settings(root, tmp_path), resume=True) == 0
    assert kills.differences(run_folder(straight), run_folder(tmp_path)) == []


def test_a_signal_while_the_next_batch_does_not_come_keeps_the_step_that_is_computed(
    root, tmp_path, straight, monkeypatch
):
    receive = data.Batches._receive

    def stalled(self):
        if self.number == 3:  # it is fetched in the step before
            os.kill(os.getpid(), signal.SIGTERM)
            self.poll()
        return receive(self)

    monkeypatch.setattr(data.Batches, "_receive", stalled)
    assert train.main(settings(root, tmp_path)) == 75
    assert weights_of(run_folder(tmp_path))["loop"]["step"] == 3
    monkeypatch.undo()
    assert train.main(settings(root, tmp_path), resume=True) == 0
    assert kills.differences(run_folder(straight), run_folder(tmp_path)) == []


def test_a_signal_does_not_wait_for_validation_to_end(root, tmp_path, monkeypatch):
    windows_seen = []

    def slow(network, patches, *rest):
        windows_seen.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return patches[:, :1] * 0

    monkeypatch.setattr(sliding_window, "_call", slow)
    changes = ["validation.untrained=false", "training.max_epochs=1"]
    assert train.main(settings(root, tmp_path, *changes)) == 75
    assert len(windows_seen) == 1
    assert weights_of(run_folder(tmp_path))["loop"]["step"] == 3
    monkeypatch.undo()
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    assert [e["step"] for e in events(run_folder(tmp_path), "evaluation")] == [3]


def test_a_run_that_is_running_cannot_be_resumed_and_a_new_one_gets_a_number(
    root, tmp_path, monkeypatch, capsys
):
    statuses = []

    def second():
        statuses.append(train.main(settings(root, tmp_path, "training.max_steps=0"), resume=True))
        statuses.append(train.main(settings(root, tmp_path, "training.max_steps=0")))

    after_step(monkeypatch, 4, second)
    assert train.main(settings(root, tmp_path)) == 0
    assert statuses == [2, 0] and (tmp_path / "runs" / "r-2").is_dir()
    error = capsys.readouterr().err
    assert f"process {os.getpid()}" in error and "wait for it or stop it" in error


# ---------------------------------------------------------------------------- damaged state


def broken(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        with zipfile.ZipFile(path) as file:  # not in what lies unused between its entries
            largest = file.read(max(file.infolist(), key=lambda entry: entry.file_size))
        middle = content.index(largest) + len(largest) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "deleted"])
def test_a_damaged_state_is_told_and_the_one_before_gone_on_from(
    root, tmp_path, straight, capsys, how
):
    assert train.main(settings(root, tmp_path, "training.max_steps=9")) == 0
    folder = run_folder(tmp_path) / "checkpoints"
    os.replace(folder / "last.previous.pt", folder / "kept")
    shutil.copy(folder / "kept", folder / "last.previous.pt")
    for path in folder.glob("best*"):
        path.unlink()
    broken(folder / "last.pt", how)
    assert train.main(settings(root, tmp_path), resume=True) == 0
    said = capsys.readouterr().out
    assert "last.previous.pt at step" in said and "newest state that can be read" in said
    assert "last.pt: expected a Lamina checkpoint" in said
    a, b = (weights_of(run_folder(where)) for where in (straight, tmp_path))
    assert same_state(a["model"], b["model"]) and same_state(a["ema"], b["ema"])
    assert (folder / "last.pt.broken").exists() == (how != "deleted")


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(root, tmp_path, capsys):
    assert train.main(settings(root, tmp_path, "training.max_steps=0")) == 0

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = run_folder(tmp_path) / "checkpoints"
    state = checkpoint.load(folder / "last.pt")
    for path in folder.glob("*.pt"):
        torch.save({**state, "model": Hostile()}, path)
    assert train.main(settings(root, tmp_path), resume=True) == 2
    assert "not run" in capsys.readouterr().err and not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------- workers


def test_killing_a_worker_is_reported_and_changes_no_weight(
    root, tmp_path, straight, monkeypatch, capsys
):
    pools = []
    start = data.Batches.__init__

    def watched(self, *arguments, **named):
        start(self, *arguments, **named)
        pools.append(self)

    def kill_one():
        victim = pools[0].workers[0]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)

    killed = []
    monkeypatch.setattr(data.Batches, "__init__", watched)
    after_step(monkeypatch, 2, kill_one)
    assert train.main(settings(root, tmp_path, "training.workers=2")) == 0
    (report,) = troubles(tmp_path, "worker died")
    assert report["pid"] == killed[0] and report["exitcode"] == -signal.SIGKILL
    for part in (
        "SIGKILL",
        f"pid {killed[0]}",
        "GB",
        "/dev/shm",
        "OOM counter",
        "training.workers",
    ):
        assert part in report["text"]
    assert report["text"] in capsys.readouterr().out
    assert kills.differences(run_folder(straight), run_folder(tmp_path)) == []


def copy_of(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


def test_a_case_that_is_cut_short_is_named_left_out_and_listed(root, tmp_path, monkeypatch, capsys):
    own = copy_of(root, tmp_path)
    monkeypatch.setattr(data, "PAUSES", (0.0,))
    after_step(monkeypatch, 2, lambda: os.truncate(own / "bar1.h5", 2000))
    changes = ["data.max_excluded=0.5", "training.max_epochs=2"]
    assert train.main(settings(own, tmp_path, *changes)) == 0
    (report,) = troubles(tmp_path, "case left out")
    assert report["case"] == "bar1" and "bar1.h5" in report["text"]
    assert "left out: case bar1" in capsys.readouterr().out.split("done:")[1]
    assert list(weights_of(run_folder(tmp_path))["loop"]["excluded"]) == ["bar1"]


def test_a_case_left_out_of_the_next_batch_is_so_in_the_run_that_goes_on_from_there(
    root, tmp_path, monkeypatch
):
    read = data.PatchDataset._sample

    def gone(self, epoch, index):
        if epoch == 1 and self.case_of((epoch, index)) == "bar1":
            raise OSError("bar1.h5: gone")
        return read(self, epoch, index)

    monkeypatch.setattr(data, "PAUSES", ())
    monkeypatch.setattr(data.PatchDataset, "_sample", gone)
    changes = ["data.max_excluded=0.5", "training.max_epochs=2", "training.train_batch_size=2"]
    assert train.main(settings(root, tmp_path / "straight", *changes)) == 0
    iterations = settings(root, tmp_path).training.train_iterations_per_epoch
    after_step(monkeypatch, iterations - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(settings(root, tmp_path, *changes)) == 75
    state = weights_of(run_folder(tmp_path))["loop"]
    assert state["step"] == iterations and list(state["excluded"]) == ["bar1"]
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    assert kills.differences(run_folder(tmp_path / "straight"), run_folder(tmp_path)) == []


def test_more_cases_left_out_than_allowed_stop_the_run_with_its_state(
    root, tmp_path, monkeypatch, capsys
):
    own = copy_of(root, tmp_path)
    monkeypatch.setattr(data, "PAUSES", ())
    after_step(monkeypatch, 2, lambda: (own / "bar1.h5").unlink())
    assert train.main(settings(own, tmp_path)) == 1  # one of two
    error = capsys.readouterr().err
    assert "bar1" in error and "data.max_excluded" in error and len(error.splitlines()) == 1
    assert weights_of(run_folder(tmp_path))["loop"]["step"] >= 3


def test_a_validation_case_that_cannot_be_read_chooses_no_best(root, tmp_path, monkeypatch):
    own = copy_of(root, tmp_path)
    monkeypatch.setattr(data, "PAUSES", ())
    after_step(monkeypatch, 1, lambda: (own / "bar2.h5").unlink())
    assert train.main(settings(own, tmp_path, "training.max_epochs=1")) == 0
    first, last = events(run_folder(tmp_path), "evaluation")
    assert first["unread"] == [] and last["unread"] == ["bar2"] and last["scores"] == {}
    assert checkpoint.load(run_folder(tmp_path) / "checkpoints/best.pt")["loop"]["step"] == 0


# ---------------------------------------------------------------------------- memory


def test_near_its_limit_a_run_gives_back_cache_then_workers_then_leaves(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory_guard, "LOOK", 0.0)
    changes = ["training.workers=2", "run.memory_gb=0.1", "training.max_epochs=1"]
    assert train.main(settings(root, tmp_path, *changes)) == 75
    texts = [e["text"] for e in troubles(tmp_path, "memory")]
    assert len(texts) == 3 and "the cache gives back" in texts[0]
    assert ["1 left" in texts[1], "none left" in texts[2]] == [True, True]
    (stop,) = events(run_folder(tmp_path), "stop")
    assert "run.memory_gb" in stop["reason"] and "lower data.cache_gb" in stop["reason"]
    order = [e["event"] for e in events_of(tmp_path) if e["event"] in ("trouble", "saved", "stop")]
    assert order == ["trouble"] * 3 + ["saved", "stop"]
    assert weights_of(run_folder(tmp_path))["loop"]["step"] == 0


def events_of(tmp_path):
    return [json.loads(line) for line in (run_folder(tmp_path) / "log.jsonl").open()]


def limited(monkeypatch, most):
    """A network that finds no memory for more than `most` patches in training, nor without
    recomputation; each time another error says so."""
    forward, names = model.UNet3D.forward, itertools.cycle(["find", "plans", "cudnn 9"])

    def wrapped(self, x):
        if self.training and (len(x) > most or not self.checkpointing):
            raise memory_error(next(names))
        return forward(self, x)

    monkeypatch.setattr(model.UNet3D, "forward", wrapped)


def test_a_batch_that_finds_no_memory_trains_in_parts_to_the_same_weights(
    root, tmp_path, monkeypatch, capsys
):
    changes = ["model.dropout=0", "training.train_batch_size=4", "training.max_epochs=1"]
    changes += ["training.accumulate=2", "loss.cldice.weight=0.2", "loss.soft_dice.batch=true"]
    assert train.main(settings(root, tmp_path / "whole", *changes)) == 0
    limited(monkeypatch, 1)
    assert train.main(settings(root, tmp_path, *changes)) == 0
    a, b = (weights_of(run_folder(where)) for where in (tmp_path / "whole", tmp_path))
    for key, one in a["optimizer"]["state"].items():  # exp_avg is the sum of all gradients
        other = b["optimizer"]["state"][key]["exp_avg"]
        assert torch.allclose(one["exp_avg"], other, rtol=1e-4, atol=1e-6)
    assert [e["micro_batch"] for e in troubles(tmp_path, "cuda memory")] == [None, 2, 1]
    assert b["loop"]["micro_batch"] == {"size": 1, "checkpointing": True, "memory": None}
    assert "same gradient" in capsys.readouterr().out


def test_a_resumed_run_still_knows_what_fits(root, tmp_path, monkeypatch):
    limited(monkeypatch, 1)
    assert train.main(settings(root, tmp_path, "training.max_steps=2")) == 0
    assert train.main(settings(root, tmp_path, "training.max_steps=4"), resume=True) == 0
    assert len(troubles(tmp_path, "cuda memory")) == 2  # recomputation, then parts


def test_where_even_one_patch_finds_no_memory_the_run_ends_with_its_state(
    root, tmp_path, monkeypatch, capsys
):
    limited(monkeypatch, 0)
    assert train.main(settings(root, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "lower sampling.patch" in error and len(error.splitlines()) == 1
    assert "the error was: " in error
    assert weights_of(run_folder(tmp_path))["loop"]["step"] == 0
    assert len(troubles(tmp_path, "cuda memory")) == 2  # recomputation, then one patch


def test_validation_that_finds_no_memory_takes_fewer_windows_and_remembers(
    root, tmp_path, monkeypatch
):
    call, failed, names = sliding_window._call, [], iter(["get", "cublas"])

    def small(network, patches, *rest):
        if len(patches) > 1 or len(failed) < 2:
            failed.append(len(patches))
            raise memory_error(next(names))
        return call(network, patches, *rest)

    changes = "training.max_epochs=1", "inference.batch=2"
    assert train.main(settings(root, tmp_path / "whole", *changes)) == 0
    monkeypatch.setattr(sliding_window, "_call", small)
    assert train.main(settings(root, tmp_path, *changes)) == 0
    one, other = (
        [e["scores"] for e in events(run_folder(where), "evaluation")]
        for where in (tmp_path / "whole", tmp_path)
    )
    assert one == pytest.approx(other) if isinstance(one, dict) else len(one) == len(other) == 2
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert failed == [2, 1]  # in the first evaluation alone
    assert weights_of(run_folder(tmp_path))["loop"]["evaluations"]["window_fits"] == {
        "12x24x24": [1, True, None]
    }


# ---------------------------------------------------------------------------- numbers


def with_nan(root, tmp_path, *ids):
    own = copy_of(root, tmp_path)
    for case_id in ids:
        with h5py.File(own / f"{case_id}.h5", "a") as file:
            image = file["image"][:].astype(np.float32)
            del file["image"]
            file["image"] = np.full_like(image, np.nan)
    return own


def test_a_case_of_nan_is_named_its_steps_are_skipped_and_the_run_goes_on(root, tmp_path, capsys):
    own = with_nan(root, tmp_path, "bar1")
    changes = ["training.train_batch_size=1", "monitor.log_every=2", "data.validation=[]"]
    assert train.main(settings(own, tmp_path, "data.test=[b,c]", *changes)) == 0
    found = troubles(tmp_path, "step skipped")
    assert found and all(e["cases"] == ["bar1"] for e in found)
    assert "weighted_bce" in found[0]["text"] and "bar1: the image is not" in found[0]["text"]
    assert {e["skipped"] for e in events(run_folder(tmp_path), "step")} >= {1}
    assert "steps without an update, by case: bar1 (" in capsys.readouterr().out
    state = weights_of(run_folder(tmp_path))
    assert all(bool(w.isfinite().all()) for w in state["model"].values())
    assert state["loop"]["skipped"]["cases"] == {"bar1": len(found)} and len(found) < 12


def test_nothing_but_nan_stops_the_run_with_its_state(root, tmp_path, capsys):
    own = with_nan(root, tmp_path, "bar0", "bar1")
    changes = ["training.max_skipped=4", "data.validation=[]", "data.test=[b,c]"]
    assert train.main(settings(own, tmp_path, *changes)) == 1
    error = capsys.readouterr().err
    assert "4 steps in a row" in error and "bar0" in error and len(error.splitlines()) == 1
    state = weights_of(run_folder(tmp_path))
    assert state["loop"]["step"] == 4 and len(troubles(tmp_path, "step skipped")) == 4


# ---------------------------------------------------------------------------- disk


def full_disk(monkeypatch, after):
    """Checkpoints after the first `after` find no room."""
    save, written = checkpoint._write, []

    def full(state, path):
        if len(written) >= after:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        return save(state, path)

    monkeypatch.setattr(checkpoint, "_write", full)


def test_a_full_disk_keeps_the_last_state_and_says_so_once(root, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, after=3)  # of step 0, with best
    assert train.main(settings(root, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "state of step 0 is kept" in error
    assert len(error.splitlines()) == 1
    folder = run_folder(tmp_path) / "checkpoints"
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["best.pt", "candidate.pt", "last.previous.pt", "last.pt"]
    assert checkpoint.load(folder / "last.pt")["loop"]["step"] == 0
    monkeypatch.undo()
    assert train.main(settings(root, tmp_path), resume=True) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, which only root can make."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_on_a_disk_that_fills_up_ends_in_one_sentence_with_a_good_state(
    root, small_disk, capsys
):
    filling = threading.Event()

    def fill():
        while not list(small_disk.glob("runs/r/checkpoints/best.pt")):
            time.sleep(0.01)
        with open(small_disk / "other", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                filling.set()

    threading.Thread(target=fill, daemon=True).start()
    wanted = settings(root, small_disk, "training.max_epochs=200", "monitor.tensorboard=true")
    assert train.main(wanted) == 1
    assert filling.is_set()
    error = capsys.readouterr().err
    assert "No space left" in error and "is kept" in error and len(error.splitlines()) == 1
    _, state, reasons = checkpoint.load_newest(small_disk / "runs" / "r" / "checkpoints")
    assert reasons == [] and all(bool(w.isfinite().all()) for w in state["model"].values())
    (small_disk / "other").unlink()
    assert train.main(settings(root, small_disk, "training.max_steps=1"), resume=True) == 0


def test_early_stopping_ends_a_run_and_is_still_known_when_it_is_resumed(
    root, tmp_path, monkeypatch
):
    scores = iter([0.5, 0.4, 0.6, 0.1, 0.2, 0.3])

    def evaluate(spec, predictions):
        found = {"surface_dice": next(scores)}
        choice = {"threshold": 0.5, "min_component_voxels": 0}
        return {**choice, "scores": found, "cases": {}, "steps": [], "tried": [], "unread": []}

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    changes = ["validation.patience=2", "training.max_epochs=9", "validation.untrained=false"]
    assert train.main(settings(root, tmp_path, *changes, "training.max_steps=12")) == 0
    assert train.main(settings(root, tmp_path, *changes), resume=True) == 0
    assert [e["step"] for e in events(run_folder(tmp_path), "evaluation")] == [3, 6, 9, 12, 15]
    assert weights_of(run_folder(tmp_path))["loop"]["evaluations"]["best_step"] == 9
