"""What settings and data settle before anything large is made."""

import h5py
import numpy as np
import pytest

from patches import feed
from runtime import build, checkpoint
from tests.test_training_step import make_root, make_settings


@pytest.mark.parametrize(
    "change, named",
    [
        ("data.root=nowhere", "data.root"),
        ("run.device=tpu", "run.device"),
        ("sampling.patch=[7,7,7]", "sampling.patch"),
        ("data.train=[none]", "data.train"),
        ("loss.skeleton_recall.weight=1", "prepare these cases again"),
    ],
)
def test_settings_that_cannot_train_are_refused_by_name(tmp_path, change, named):
    make_root(tmp_path)
    if "skeleton" in change:
        for path in tmp_path.glob("*.h5"):
            with h5py.File(path, "a") as file:
                del file["skeleton"]
    with pytest.raises((ValueError, FileNotFoundError), match=named.replace(".", r"\.")):
        build.resolve(make_settings(tmp_path, change))


def test_where_no_workers_can_be_the_training_process_reads_and_says_so(tmp_path, monkeypatch):
    make_root(tmp_path)
    monkeypatch.setattr(feed, "HAS_WORKERS", False)
    plan = build.resolve(make_settings(tmp_path, "training.workers=3"))
    assert plan.settings.training.workers == 0
    assert plan.notes[-1].startswith("training.workers: 0 instead of 3")


def test_a_patch_much_larger_than_most_cases_is_noted_at_the_spacing_of_the_network(tmp_path):
    make_root(tmp_path)  # 12 x 24 x 24 voxels of 2 x 1 x 1
    how = ["sampling.patch=[16,40,32]", "data.spacing=[2.5,0.5,null]"]
    notes = build.resolve(make_settings(tmp_path, *how)).notes
    assert [n for n in notes if n.startswith("sampling.patch")] == [
        "sampling.patch: 16 voxels in z, where most cases have 10 or less; the rest is padding"
    ]


def test_the_line_on_training_names_the_steps_that_max_steps_leaves(tmp_path):
    make_root(tmp_path)
    lines = []
    for most in (2, 3, "null"):
        plan = build.resolve(make_settings(tmp_path, f"training.max_steps={most}"))
        about = build.announce(plan, build.make_network(plan), build.make_patches(plan))
        lines += [line.split(", ")[0] for line in about if line.startswith("training")]
    assert lines == ["training   2 of 3 steps in 1 epochs", *["training   3 steps in 1 epochs"] * 2]


def test_metadata_are_plain_and_name_the_cases_of_each_part(tmp_path):
    make_root(tmp_path)
    for path in tmp_path.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file.attrs["affine"] = np.diag([-1.0, 1, 2, 1])
    plan = build.resolve(make_settings(tmp_path, "data.spacing=[1, 1, 1]"))
    metadata = build.metadata(plan)
    assert (metadata["axes"], metadata["stored_spacing"]) == (["LAS"], [2.0, 1.0, 1.0])
    assert metadata["root"] == str(tmp_path.resolve())
    for part in ("train", "validation", "test"):
        assert metadata[part] == [case.id for case in getattr(plan.split, part)]
    about = {key: metadata[key] for key in ("channels", "classes", "ignore_label", "unit")}
    classes = {"background": 0, "slab": 1}
    assert about == {"channels": 1, "classes": classes, "ignore_label": None, "unit": "micron"}
    assert checkpoint._foreign(metadata, "data") == []
