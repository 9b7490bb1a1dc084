"""What settings and data settle before anything large is made."""

import h5py
import numpy as np
import pytest

from patches import feed
from runtime import build, checkpoint
from tests.test_training_step import make_root, make_settings
from volumes import casefile


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
    assert metadata["stored_range"] == [[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]
    assert metadata["root"] == str(tmp_path.resolve())
    for part in ("train", "validation", "test"):
        assert metadata[part] == [case.id for case in getattr(plan.split, part)]
    about = {key: metadata[key] for key in ("channels", "classes", "ignore_label", "unit")}
    classes = {"background": 0, "slab": 1}
    assert about == {"channels": 1, "classes": classes, "ignore_label": None, "unit": "micron"}
    assert checkpoint._foreign(metadata, "data") == []


def make_thin_root(tmp_path):
    """Three groups of one case each whose voxels differ: 1, 2 and 4 wide, all 4 deep."""
    ids = []
    for width in (1, 2, 4):
        label = np.zeros((8, 16, 16), np.uint8)
        label[2:6, 4:12, 4:12] = 1
        ids.append(f"c{width}")
        casefile.write_case(
            tmp_path / f"c{width}.h5", label[None] + np.float32(width), label,
            spacing=(4, width, width), unit="micron", affine=None, group=f"g{width}",
            ignore_label=None,
        )  # fmt: skip
    casefile.write_dataset(
        tmp_path, classes={"background": 0, "slab": 1}, ignore_label=None, unit="micron",
        case_ids=ids,
    )  # fmt: skip


def thin_settings(tmp_path, fold):
    changes = ["data.folds=3", f"data.fold={fold}", "model.multipliers=[1,2,4]"]
    return make_settings(tmp_path, *changes)


def test_all_folds_of_a_cross_validation_train_one_network(tmp_path):
    make_thin_root(tmp_path)
    plans = [build.resolve(thin_settings(tmp_path, fold)) for fold in range(3)]
    assert [plan.split.validation[0].id for plan in plans] == ["c1", "c2", "c4"]
    for plan in plans:  # by spacing 4 2 2, the median of all
        assert plan.spacing == (4, 2, 2) and plan.strides == [(1, 1, 1), (2, 2, 2), (1, 2, 2)]


def test_sizes_in_another_order_than_z_y_x_are_asked_about(tmp_path):
    make_thin_root(tmp_path)  # 8 x 16 x 16 voxels
    for change, words in (
        ("data.spacing=[1,1,4]", "data.spacing: voxels of 1 1 4 micron, and few slices: z comes"),
        (
            "sampling.patch=[32,16,8]",
            "sampling.patch: 32 voxels in z, where most cases have 8 or less; the rest is padding",
        ),
        ("sampling.patch=[8,16,16]", ""),
    ):
        notes = build.resolve(make_settings(tmp_path, "data.validation=[]", change)).notes
        notes = [note for note in notes if "comes first" in note or "is padding" in note]
        assert any(note.startswith(words) for note in notes) if words else not notes


def test_a_resumed_run_keeps_the_strides_of_its_state_and_another_patch_must_fit_them(tmp_path):
    make_thin_root(tmp_path)
    plan = build.resolve(thin_settings(tmp_path, 0))
    saved = {"strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]], "kernels": [[1, 3, 3]] * 3}
    saved = {"config": plan.settings.plain(), "data": saved}
    build.keep_network(plan, None)
    assert plan.settings.postprocess.hysteresis is None
    assert plan.strides[1] == (2, 2, 2)
    build.keep_network(plan, saved)
    assert plan.strides == [(1, 1, 1), (1, 2, 2), (1, 2, 2)] and plan.kernels == [(1, 3, 3)] * 3
    assert plan.settings.postprocess.hysteresis == 1  # off, as null was when this was saved
    plan.settings.sampling.patch = (8, 16, 18)
    with pytest.raises(ValueError, match=r"sampling\.patch \[8, 16, 18\]: no stride fits axis x"):
        build.keep_network(plan, saved)
