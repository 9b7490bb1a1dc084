"""run.init_from: a new run that starts from the weights of another one's checkpoint."""

import json

import pytest
import torch

import train
from runtime import checkpoint
from tests.test_training_step import make_root, make_settings

SPLIT = ["data.train=[slab0, slab1]", "data.validation=[slab2]", "data.test=[slab3]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four cases, and the run `first` of three steps on two of them."""
    root = make_root(tmp_path_factory.mktemp("data"))
    assert train.main(make_settings(root, *SPLIT, "run.name=first")) == 0
    return root


@pytest.fixture
def file(root):
    return root / "runs" / "first" / "checkpoints" / "last.pt"


def started(root, tmp_path, file, *changes, resume=False):
    """(exit status, folder) of a run from a file: of no step, unless changes say otherwise."""
    settings = make_settings(
        root, *SPLIT, "training.max_steps=0", f"run.folder={tmp_path}", f"run.init_from={file}",
        *changes,
    )  # fmt: skip
    return train.main(settings, resume=resume), tmp_path / "r"


def lines(folder):
    """The notes on weights in the log's last start."""
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    notes = [event["notes"] for event in events if event["event"] == "start"][-1]
    return [note for note in notes if note.startswith("init_from: ")]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(file, path, change):
    """A copy of a checkpoint, which change(state) may alter."""
    state = checkpoint.load(file)
    change(state)
    checkpoint.save(state, path)
    return path


def test_network_and_average_start_from_averaged_weights_and_all_else_anew(root, tmp_path, file):
    first = checkpoint.load(file)
    assert not same(first["ema"], first["model"])
    status, folder = started(root, tmp_path, file)
    state, count = checkpoint.load(folder / "checkpoints" / "last.pt"), len(first["ema"])
    assert status == 0 and same(state["model"], first["ema"]) and same(state["ema"], first["ema"])
    assert state["loop"]["step"] == 0 and state["optimizer"]["state"] == {}
    assert lines(folder) == [f"init_from: {count} of {count} tensors loaded from {file} at step 3"]
    _, fresh = started(root, tmp_path / "fresh", "null")
    assert torch.equal(
        state["rng"]["torch"], checkpoint.load(fresh / "checkpoints" / "last.pt")["rng"]["torch"]
    )
    assert lines(fresh) == []


def test_a_checkpoint_without_averaged_weights_gives_its_own(root, tmp_path, file):
    other = changed(file, tmp_path / "other.pt", lambda state: state.update(ema=None))
    _, folder = started(root, tmp_path, other)
    weights = checkpoint.load(folder / "checkpoints" / "last.pt")["ema"]
    assert same(weights, checkpoint.load(file)["model"])


def test_what_does_not_fit_is_named_and_stays_as_it_would_have_been(root, tmp_path, file):
    def change(state):
        weights = state["ema"]
        weights["stem.0.weight"] = torch.ones(4, 2, 3, 3, 3)  # of two channels
        weights["old.weight"] = weights.pop("stem.1.weight")

    other = changed(file, tmp_path / "other.pt", change)
    _, folder = started(root, tmp_path, other)
    _, fresh = started(root, tmp_path / "fresh", "null")
    first, fresh = checkpoint.load(file)["ema"], checkpoint.load(fresh / "checkpoints/last.pt")
    state, kernel = checkpoint.load(folder / "checkpoints/last.pt"), "3 x 3 x 3"
    assert lines(folder) == [
        f"init_from: {len(first) - 2} of {len(first)} tensors loaded from {other} at step 3; not: "
        f"stem.0.weight (4 x 2 x {kernel} there, 4 x 1 x {kernel} here), "
        "stem.1.weight (none there, 4 here), old.weight (4 there, none here)"
    ]
    for name, weight in state["model"].items():
        source = fresh["model"] if name in ("stem.0.weight", "stem.1.weight") else first
        assert torch.equal(weight, source[name]), name
    assert same(state["ema"], state["model"])


def test_of_many_that_do_not_fit_ten_are_named_and_the_others_counted(root, tmp_path, file):
    _, folder = started(root, tmp_path, file, "model.multipliers=[1, 3]")
    (line,) = lines(folder)
    weights, own = (checkpoint.load(p)["ema"] for p in (file, folder / "checkpoints/last.pt"))
    others = sum(n not in own or own[n].shape != w.shape for n, w in weights.items())
    others += len(own.keys() - weights.keys())
    assert others > 10 and line.endswith(f", and {others - 10} more")
    assert line.count(" there, ") == 10


def refused(root, tmp_path, capsys, file, *changes):
    """The sentence that a run is refused with; nothing is written."""
    capsys.readouterr()
    status, _ = started(root, tmp_path / "runs", file, *changes)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert status == 2 and not (tmp_path / "runs").exists()
    return sentence


def test_a_network_of_another_width_is_refused_though_some_biases_fit(root, tmp_path, file, capsys):
    sentence = refused(root, tmp_path, capsys, file, "model.base=8")
    assert sentence.startswith(
        f"run.init_from: expected a checkpoint of a network like this one, got {file}, none of "
        "whose convolutions fits: stem.0.weight (4 x 1 x 3 x 3 x 3 there, 8 x 1 x 3 x 3 x 3 here), "
    )
    assert sentence.endswith("; take the settings of model from its run")


def test_a_file_that_is_missing_damaged_or_foreign_is_one_sentence(root, tmp_path, file, capsys):
    missing, cut, foreign = (tmp_path / name for name in ("no.pt", "cut.pt", "foreign.pt"))
    cut.write_bytes(file.read_bytes()[:-900])
    torch.save({"weight": torch.zeros(3)}, foreign)
    for path in (missing, cut, foreign, tmp_path):
        sentence = refused(root, tmp_path, capsys, path)
        assert sentence.startswith(f"{path}: expected a Lamina checkpoint, got ")


def test_a_resumed_run_goes_on_from_its_own_state_though_the_file_is_gone(root, tmp_path, file):
    other = changed(file, tmp_path / "other.pt", lambda state: None)
    started(root, tmp_path / "straight", other, "training.max_steps=null")
    _, folder = started(root, tmp_path, other, "training.max_steps=2")
    other.unlink()
    status, _ = started(root, tmp_path, other, "training.max_steps=null", resume=True)
    assert status == 0 and lines(folder) == []
    straight, resumed = (
        checkpoint.load(place / "r" / "checkpoints" / "last.pt")
        for place in (tmp_path / "straight", tmp_path)
    )
    assert same(straight["model"], resumed["model"]) and resumed["loop"]["step"] == 3


def test_a_link_is_named_by_the_file_that_it_points_to(root, tmp_path, file):
    _, folder = started(root, tmp_path, root / "runs" / "last.pt")
    assert f"loaded from {file} at step 3" in lines(folder)[0]


def test_with_resume_and_no_saved_state_the_run_starts_from_the_file(root, tmp_path, file):
    status, folder = started(root, tmp_path, file, resume=True)
    assert status == 0 and len(lines(folder)) == 1


def test_another_spacing_or_normalization_is_said_in_a_note(root, tmp_path, file):
    def change(state):
        state["data"].update(trained_spacing=[0.5, 0.5, 0.5], unit="mm", typical=False)

    other = changed(file, tmp_path / "other.pt", change)
    _, folder = started(root, tmp_path, other, "data.clip_percentiles=5-95")
    assert lines(folder)[1:] == [
        f"init_from: spacing is 2 1 1 micron, was 0.5 0.5 0.5 mm in {other}",
        f"init_from: data.clip_percentiles is 5-95, was 0.5-99.5 with fill values in {other}",
    ]


def test_cases_that_the_file_was_trained_on_are_named_where_they_judge_the_run(
    root, tmp_path, file
):
    split = ["data.train=[slab2]", "data.validation=[slab0]", "data.test=[slab1, slab3]"]
    _, folder = started(root, tmp_path, file, *split)
    assert lines(folder)[1:] == [
        f"init_from: {file} was trained on 2 validation or test cases of this run, whose scores "
        "will be too good: slab0, slab1"
    ]
