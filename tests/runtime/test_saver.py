"""The thread that writes states while training goes on: order, names, and what goes wrong."""

import errno
import os
import threading

import pytest
import torch

from runtime import checkpoint
from runtime.checkpoint import CheckpointError, Saver, load
from tests.test_survival import broken

CONSTANT = dict.fromkeys(("format", "scheduler", "config", "data", "versions"))


class Weight:
    """Something with a state, of one number."""

    def __init__(self, value):
        self.value = torch.tensor([float(value)])

    def state_dict(self):
        return {"w": self.value}


@pytest.fixture
def made(tmp_path):
    """(saver, weight, calls): calls lists what before() and after() saw."""
    weight, calls = Weight(0), []
    parts = dict.fromkeys(("model", "ema", "optimizer", "scaler"), weight)
    saver = Saver(
        tmp_path / "checkpoints",
        CONSTANT,
        parts,
        step=None,
        before=lambda: calls.append("before"),
        after=lambda path: calls.append(load(path)["loop"]["step"]),
    )
    yield saver, weight, calls
    saver.close()


def names(saver):
    return sorted(os.listdir(saver.folder))


def full_from(monkeypatch, number):
    """From the number-th write on, the disk takes nothing more."""
    write, count = checkpoint._write, iter(range(100))

    def limited(state, path):
        if next(count) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(state, path)

    monkeypatch.setattr(checkpoint, "_write", limited)


# ---------------------------------------------------------------------------- what is written


def test_the_state_is_copied_when_it_is_given_however_late_it_is_written(made):
    saver, weight, calls = made
    gate, loop = threading.Event(), {"step": 1, "inner": {"count": 1}}
    saver.before = gate.wait
    saver.save(loop)
    weight.value += 5
    loop["inner"]["count"] = 6
    assert saver.busy and saver.written() == [] and (saver.step, saver.on_disk) == (1, None)
    gate.set()
    (saved,) = saver.written(wait=True)
    state = load(saver.folder / "last.pt")
    assert state["model"]["w"].tolist() == [0.0] and state["loop"]["inner"] == {"count": 1}
    assert saved.path.name == "last.pt" and saved.bytes == saved.path.stat().st_size
    assert calls == [1] and (saver.step, saver.on_disk, saver.busy) == (1, 1, False)


def test_the_candidate_is_a_second_name_of_the_same_bytes_until_it_gets_others(made):
    saver, _, calls = made
    saver.save({"step": 1}, also="candidate.pt")
    saver.written(wait=True)
    assert os.path.samefile(saver.folder / "last.pt", saver.folder / "candidate.pt")
    saver.save({"step": 2})
    saver.written(wait=True)
    steps = {name: load(saver.folder / name)["loop"]["step"] for name in names(saver)}
    assert steps == {"candidate.pt": 1, "last.previous.pt": 1, "last.pt": 2}
    assert calls == ["before", 1, "before", 2]


def test_the_candidate_is_a_copy_where_there_are_no_hard_links(made, monkeypatch):
    saver, _, _ = made

    def no_link(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    for step in (1, 2):
        saver.save({"step": step}, also="candidate.pt")
        saver.written(wait=True)
    assert load(saver.folder / "candidate.pt")["loop"] == {"step": 2}
    assert names(saver) == ["candidate.pt", "last.previous.pt", "last.pt"]


def test_the_best_is_the_candidate_with_changes_and_the_best_before_stays(made):
    saver, weight, _ = made
    for step in (1, 2):
        weight.value = torch.tensor([float(step)])
        saver.save({"step": step, "best_score": None}, also="candidate.pt")
        saver.promote("candidate.pt", "best.pt", step=step, changes={"best_score": step / 10})
    assert [saved.path.name for saved in saver.written(wait=True)] == ["last.pt", "best.pt"] * 2
    best, before = (load(saver.folder / name) for name in ("best.pt", "best.previous.pt"))
    assert best["loop"] == {"step": 2, "best_score": 0.2} and best["model"]["w"].item() == 2.0
    assert before["loop"] == {"step": 1, "best_score": 0.1} and before["model"]["w"].item() == 1.0
    assert load(saver.folder / "candidate.pt")["loop"]["best_score"] is None


# ---------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("how", ["flipped", "empty", "deleted"])
def test_a_candidate_that_is_lost_is_told_and_what_comes_after_it_is_written(made, how):
    saver, _, _ = made
    saver.save({"step": 1}, also="candidate.pt")
    saver.promote("candidate.pt", "best.pt", step=1, changes={})
    saver.written(wait=True)
    saver.save({"step": 2}, also="candidate.pt")
    saver.save({"step": 2})  # its own bytes: those of the candidate are shared
    saver.written(wait=True)
    broken(saver.folder / "candidate.pt", how)
    saver.promote("candidate.pt", "best.pt", step=2, changes={})
    saver.save({"step": 3})
    lost, saved = saver.written(wait=True)
    assert isinstance(lost, CheckpointError) and "candidate.pt" in str(lost)
    assert saved.path.name == "last.pt" and saver.on_disk == 3
    assert load(saver.folder / "best.pt")["loop"] == {"step": 1}


def test_a_candidate_of_another_step_never_becomes_the_best(made):
    saver, _, _ = made
    saver.save({"step": 1}, also="candidate.pt")
    saver.promote("candidate.pt", "best.pt", step=2, changes={"best_score": 0.9})
    _, lost = saver.written(wait=True)
    assert "the state of step 1" in str(lost) and not (saver.folder / "best.pt").exists()


def test_an_error_of_the_disk_is_raised_by_who_asks_and_the_good_state_stays(made, monkeypatch):
    saver, _, _ = made
    saver.save({"step": 1})
    saver.written(wait=True)
    full_from(monkeypatch, 0)
    saver.save({"step": 2})
    with pytest.raises(OSError, match="No space left"):
        saver.written(wait=True)
    assert saver.written(wait=True) == [] and not saver.busy  # told once
    assert (saver.step, saver.on_disk) == (2, 1) and names(saver) == ["last.pt"]
    assert load(saver.folder / "last.pt")["loop"] == {"step": 1}


def test_a_state_that_found_no_room_does_not_make_the_one_before_it_the_best(made, monkeypatch):
    saver, _, _ = made
    saver.save({"step": 1}, also="candidate.pt")
    saver.promote("candidate.pt", "best.pt", step=1, changes={"best_score": 0.1})
    saver.written(wait=True)
    with monkeypatch.context() as patch:
        full_from(patch, 0)
        saver.save({"step": 2}, also="candidate.pt")
        saver.pending[0].exception()  # it has failed, and there is room again
    saver.promote("candidate.pt", "best.pt", step=2, changes={"best_score": 0.9})
    with pytest.raises(OSError, match="No space left"):
        saver.written(wait=True)
    saver.close()
    assert load(saver.folder / "best.pt")["loop"] == {"step": 1, "best_score": 0.1}


def test_closing_waits_for_what_is_not_written_yet(made):
    saver, _, _ = made
    for step in (1, 2, 3):
        saver.save({"step": step})
    saver.close()
    assert saver.on_disk == 3 and load(saver.folder / "last.pt")["loop"] == {"step": 3}


def test_values_that_no_reader_takes_are_told_and_nothing_is_written(made):
    saver, _, _ = made
    saver.save({"step": 1, "found": {1, 2}})
    with pytest.raises(TypeError, match=r"state\.loop\.found: set"):
        saver.written(wait=True)
    assert not saver.folder.exists() or names(saver) == []
