"""Runs of several classes: saved states of other classes, and names of any kind."""

import json

import pytest

import train
from tests.test_training_step import make_root, make_settings

ONE_STEP = ["training.max_steps=1", "data.train=[slab0, slab1]", "data.validation=[slab2]"]
BOTH = "data.regions={a: [slab], b: [rim]}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Cases of two classes, and runs of a step with the network for `BOTH` and for one of them."""
    root = make_root(tmp_path_factory.mktemp("data"), rim=True)
    for name, change in (("both", BOTH), ("one", "data.foreground=[slab]")):
        assert train.main(make_settings(root, *ONE_STEP, f"run.name={name}", change)) == 0
    return root


@pytest.mark.parametrize(
    "name, change, now",
    [
        ("both", "data.regions={b: [rim], a: [slab]}", "b (2), a (1): regions that may overlap"),
        ("both", "data.regions={a: [rim], b: [slab]}", "a (2), b (1): regions that may overlap"),
        ("both", "data.foreground=[slab]", "one foreground, slab"),
        ("one", "data.foreground=[rim]", "one foreground, rim"),
        ("one", "data.regions=null", "slab (1), rim (2): one of these in each voxel"),
    ],
    ids=["order", "names", "one foreground", "another", "several classes"],
)
def test_a_run_is_not_resumed_for_other_classes(root, capsys, name, change, now):
    changed = make_settings(root, *ONE_STEP, f"run.name={name}", change)
    before = "a (1), b (2): regions that may overlap" if name == "both" else "one foreground, slab"
    last = root / "runs" / name / "checkpoints" / "last.pt"
    bytes_before = last.read_bytes()
    assert train.main(changed, resume=True) == 2
    assert capsys.readouterr().err == (
        f"{last}: expected a network for {now}, got one for {before}; resume with the classes it "
        "was trained on, or begin a run from it with run.init_from\n"
    )
    assert last.read_bytes() == bytes_before


def test_a_run_that_starts_from_a_network_for_other_classes_says_so(root, tmp_path):
    file = root / "runs" / "both" / "checkpoints" / "last.pt"
    swapped = "data.regions={b: [rim], a: [slab]}"
    more = [f"run.init_from={file}", f"run.folder={tmp_path}", "training.max_steps=0"]
    assert train.main(make_settings(root, *ONE_STEP, *more, swapped)) == 0
    start = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[0])
    assert (
        "init_from: the network is for b (2), a (1): regions that may overlap, was for a (1), "
        f"b (2): regions that may overlap in {file}"
    ) in start["notes"]


def test_a_region_whose_name_looks_like_markup_is_printed_as_it_is(root, tmp_path, capsys):
    regions = "data.regions={'[red]a': [slab], ':fire:': [rim]}"
    changes = [f"run.folder={tmp_path}", "training.max_steps=0", regions]
    assert train.main(make_settings(root, *ONE_STEP, *changes)) == 0
    assert "classes    [red]a (1), :fire: (2): regions that" in capsys.readouterr().out
