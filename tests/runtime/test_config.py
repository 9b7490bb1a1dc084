import re
from pathlib import Path

import pytest
import yaml

from runtime import config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def fault(content=None, overrides=()):
    with pytest.raises(config.ConfigError) as caught:
        config.build(config.apply_overrides(content or {}, overrides))
    return str(caught.value)


def test_an_unknown_key_is_named_with_the_nearest_one():
    assert fault({"training": {"train_batchsize": 1}}) == (
        "training.train_batchsize: no such setting; the nearest valid key is "
        "training.train_batch_size"
    )
    assert "nearest valid key is training" in fault({"traning": {}})
    assert "loss.soft_dice" in fault({"loss": {"soft_dise": {"weight": 1}}})
    assert "training.max_steps" in fault(overrides=["max_steps=3"])


@pytest.mark.parametrize(
    "key, words",
    [
        ("data.folds", "n_folds num_folds"),
        ("data.foreground", "num_classes"),
        ("data.spacing", "target_spacing"),
        ("data.validation", "val_split"),
        ("inference.flips", "tta"),
        ("model.base", "features n_filters"),
        ("model.checkpointing", "gradient_checkpointing"),
        ("optim.betas", "momentum"),
        ("optim.clip", "gradient_clip_val max_grad_norm"),
        ("optim.lr", "learning_rate base_lr"),
        ("optim.weight_decay", "wd"),
        ("run.device", "gpu gpus devices"),
        ("run.init_from", "checkpoint ckpt_path weights"),
        ("run.name", "exp_name experiment_name"),
        ("run.threads", "num_threads"),
        ("run.seed", "random_seed"),
        ("sampling.patch", "patch_size spatial_size"),
        ("training.max_epochs", "epochs max_epoch num_epochs"),
        ("training.max_steps", "steps"),
        ("training.precision", "amp"),
        ("training.train_batch_size", "batch batch_size bs"),
        ("training.train_iterations_per_epoch", "iterations"),
        ("training.workers", "num_workers"),
    ],
)
def test_other_common_names_of_a_setting_lead_to_it_in_any_group_and_in_none(key, words):
    for word in words.split():
        named = f"; the nearest valid key is {key}"
        assert fault({word: 1}) == f"{word}: no such setting{named}"
        assert fault(overrides=[f"{word}=1"]) == f"{word}=1: expected group.key=value{named}"
        for text in (f"{g}.{word}" for g in ("data", "optimizer", "train", "training")):
            assert fault(overrides=[f"{text}=1"]) == f"{text}: no such setting{named}"


def test_resume_is_an_option_and_no_setting():
    expected = "no such setting; python train.py --resume RUN goes on with a run"
    assert fault(overrides=["training.resume=1"]) == f"training.resume: {expected}"


def test_each_task_of_a_slurm_array_has_a_run_name_of_its_own_unless_it_is_given(
    tmp_path, monkeypatch
):
    path = tmp_path / "vessels.yaml"
    path.write_text("")
    assert config.load(path).run.name == "vessels"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert config.load(path).run.name == "vessels_task3"
    assert config.load(path, ["run.name=mine"]).run.name == "mine"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("inference.flip", "inference.flips"),  # and not augment.flip
        ("augment.flips", "augment.flip"),
        ("inference.windows", "inference.window"),
        ("data.kfold", "data.folds"),  # a common name of a setting counts more
        ("optim.flip", "augment.flip"),
    ],
)
def test_a_slip_is_first_sought_in_the_group_that_is_given(key, meant):
    for got in (fault(overrides=[f"{key}=1"]), fault({key.split(".")[0]: {key.split(".")[1]: 1}})):
        assert got == f"{key}: no such setting; the nearest valid key is {meant}"


def test_other_names_are_of_valid_keys_and_hide_no_nearer_one():
    keys = config.valid_keys()
    assert set(config.SYNONYMS.values()) <= set(keys)
    assert "loss.cldice.iterations" in fault(overrides=["loss.soft_dice.iterations=3"])
    assert fault(overrides=["infrence.batch=3"]).endswith("nearest valid key is inference")
    for key in ("training.lr", "model.weight_decay", "training.seed", "data.device", "data.patch"):
        assert fault(overrides=[f"{key}=3"]).endswith("." + key.split(".")[1])


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("training.workers=four", "training.workers: expected a valid integer, got 'four'"),
        ("training.max_steps=1.5", "training.max_steps"),
        ("training.precision=bf15", "'auto', 'fp32', 'bf16' or 'fp16', got 'bf15'"),
        ("optim.lr=0", "optim.lr: expected a number greater than 0, got 0"),
        ("sampling.patch=[1,2]", "sampling.patch"),
        ("sampling.patch=64", "sampling.patch"),
        ("data.spacing=[1,-1,1]", "data.spacing"),
        ("augment.gamma_range=[2,1]", "low <= high"),
        ("augment.scaling_range=[0,1]", "scaling_range.0: expected a number greater than 0, got 0"),
        ("augment.blur_range=[0,1]", "blur_range.0: expected a number greater than 0, got 0"),
        ("augment.dropout_range=[0,1]", "dropout_range.1: expected a number less than 1, got 1"),
        (
            "augment.noise_range=[-1,1]",
            "noise_range.0: expected a number greater than or equal to 0",
        ),
        ("augment.dropout_boxes=[5,2]", "range [low, high] with low <= high, got [5, 2]"),
        ("augment.low_resolution_range=[0.5,1]", "a number greater than or equal to 1, got 0.5"),
        ("augment.elastic_spacing=12", "both or neither, got 12.0 and None"),
        ("augment.elastic_amplitude_range=[0,0.5]", "both or neither, got None and (0.0, 0.5)"),
        (
            "augment.elastic_spacing=12; augment.elastic_amplitude_range=[0.5,0.91]",
            "elastic_amplitude_range from 0 to 0.075 of elastic_spacing",
        ),
        (
            "augment.elastic_spacing=12; augment.elastic_amplitude_range=[-0.5,0.5]",
            "elastic_amplitude_range.0: expected a number greater than or equal to 0, got -0.5",
        ),
        ("loss={weighted_bce: {weight: 0}, soft_dice: {weight: 0}}", "expected group.key"),
        ("model.strides=[[1,2,2]]", "one row of strides"),
        ("data.folds=1", "folds >= 2"),
        ("optim.max_lr=1e-3", "schedule one_cycle"),
        ("validation.every=0", "got 0; above training.max_epochs, with validation.untrained=false"),
        ("training=3", "expected group.key=value"),
        ("a.b=[1", "not readable as YAML"),
        ("run.seed=true", "run.seed"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_key(overrides, named):
    text = fault(overrides=overrides.split("; "))
    assert named in text and "\n" not in text


def test_the_largest_elastic_amplitude_that_does_not_fold_is_taken():
    # 0.075 x 12 is a little below 0.9 in floating point.
    content = {"augment": {"elastic_spacing": 12.0, "elastic_amplitude_range": [0.5, 0.9]}}
    assert config.build(content).augment.elastic_amplitude_range == (0.5, 0.9)


def test_all_faults_are_told_at_once():
    text = fault({"training": {"workers": -1, "worker": 1}, "optim": {"lr": "fast"}})
    assert len(text.split("\n")) == 3


def test_all_faults_of_overrides_are_told_at_once():
    text = fault(overrides=["initial_lr=1", "num_epochs=2", "a.b=[1", "training.workers=-1"])
    assert [line.split(":")[0] for line in text.split("\n")] == [
        *("initial_lr=1", "num_epochs=2", "a.b=[1", "training.workers")
    ]


def test_one_number_for_the_spacing_is_answered_by_a_list_that_means_something():
    text = fault(overrides=["data.spacing=1"])
    assert text == "data.spacing: expected a list such as [null, 1, 1], got 1"


def test_a_run_folder_without_resume_and_a_typo_in_a_name_are_answered_by_what_was_meant(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("{}")
    for name, meant in (
        ("mine", f"train.py --resume {tmp_path / 'mine'} goes on with that run"),
        ("mien", f"; there is {tmp_path / 'mine'}"),
        ("miene.yaml", f"; there is {tmp_path / 'mine.yaml'}"),
        ("first", "; there is runs/first"),
        ("other", "got: No such file or directory"),
    ):
        with pytest.raises(config.ConfigError) as caught:
            config.read(tmp_path / name)
        assert str(caught.value).endswith(meant)


def test_changing_a_number_of_a_term_leaves_its_weight():
    content = {"loss": {"weighted_bce": {"positive_weight": 2.0}, "soft_dice": {"batch": True}}}
    terms = config.build(content).terms()
    assert terms["weighted_bce"]["weight"] == terms["soft_dice"]["weight"] == 0.5


def test_surface_distance_has_the_tolerance_of_the_surface_dice_unless_it_has_its_own():
    content = {"validation": {"tolerance": 20.0}}
    assert config.build(content).terms()["surface_distance"]["tolerance"] == 20.0
    content["loss"] = {"surface_distance": {"tolerance": 5.0}}
    assert config.build(content).terms()["surface_distance"]["tolerance"] == 5.0


def test_overrides_win_over_the_file_and_leave_its_other_keys(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("training: {max_steps: 3, workers: 0}\noptim: {lr: 1e-4}\n")
    settings = config.load(path, ["training.max_steps=7", "data.spacing=[null, 1, 1]"])
    assert (settings.training.max_steps, settings.training.workers) == (7, 0)
    assert settings.optim.lr == 1e-4  # YAML 1.1 would have read a string
    assert settings.data.spacing == (None, 1, 1)
    assert settings.run.name == "my"


def test_of_two_files_the_later_wins_in_each_key_and_overrides_win_over_both(tmp_path):
    first, second = tmp_path / "lr=1" / "first.yaml", tmp_path / "second.yaml"
    first.parent.mkdir()
    first.write_text(
        "training: {workers: 1, max_steps: 3}\nsampling: {class_ratio: {vein: 1, artery: 2}}\n"
        "loss: {toploss: {weight: 0.1, windows: 3}}\n"
    )
    second.write_text(
        "training: {workers: 2}\nsampling: {class_ratio: {vein: 3}}\n"
        "loss: {toploss: {windows: 4}}\n"
    )
    settings = config.load(first, ["training.max_steps=5", str(second)])
    assert (settings.training.workers, settings.training.max_steps) == (2, 5)
    assert settings.sampling.class_ratio == {"vein": 3}  # a value, and no group
    assert (settings.loss.toploss.weight, settings.loss.toploss.windows) == (0.1, 4)
    assert settings.run.name == "first"
    assert config.load(second, ["training.workers=0", str(first)]).training.workers == 0


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "second.yaml: expected a config file in YAML, got: No such file"),
        ("training: {worker: 2}", "second.yaml: training.worker: no such setting"),
        ("training: 2", "second.yaml: training: expected a group of settings"),
        ("3", "second.yaml: expected groups of settings, got int"),
    ],
)
def test_a_wrong_second_file_is_one_sentence(tmp_path, text, named):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("training: {workers: 1}\n")
    if text:
        second.write_text(text)
    with pytest.raises(config.ConfigError, match=re.escape(named)) as caught:
        config.load(first, [str(second)])
    assert "\n" not in str(caught.value)


def test_a_key_without_its_group_is_no_file():
    with pytest.raises(config.ConfigError, match="max_steps=3: expected group"):
        config.load(CONFIGS[0], ["max_steps=3"])


def test_a_file_that_is_no_config_is_named(tmp_path):
    for name, text in (("absent.yaml", None), ("list.yaml", "[1]"), ("bad.yaml", "a: [")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(config.ConfigError, match=re.escape(name)):
            config.load(tmp_path / name)


def test_plain_settings_give_the_same_settings_back():
    settings = config.build({"data": {"train": ["a*"], "spacing": [0, 1, None]}})
    text = yaml.safe_dump(settings.plain())
    assert config.build(yaml.safe_load(text)) == settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load_and_hold_at_most_thirty_lines_of_differences(path):
    settings = config.load(path)
    lines = [line for line in path.read_text().splitlines() if line.split("#")[0].strip()]
    assert len(lines) <= 30
    defaults = config.Settings().plain()
    for group, keys in yaml.safe_load(path.read_text()).items():
        for key in keys:
            same = settings.plain()[group][key] == defaults[group][key]
            assert not same, f"{path.name}: {group}.{key} is the default"


def test_valid_keys_reach_the_numbers_of_each_loss_term():
    keys = config.valid_keys()
    assert {"loss.surface_distance.tolerance", "training.train_batch_size"} <= set(keys)


@pytest.mark.parametrize(
    "text", ["data:\n  root: a\ndata:\n  test: [b]", "data: {root: a, root: b}"]
)
def test_a_key_that_comes_twice_is_named_with_its_line(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=r"two entries of '(data|root)', again in line"):
        config.load(path)


def test_a_key_that_is_no_word_is_named_with_its_line(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {name: x}\n? [data]\n: {root: y}\n")
    with pytest.raises(config.ConfigError, match="a key that is no word, in line 2"):
        config.load(tmp_path / "a.yaml")


def test_all_faults_of_the_command_line_are_told_at_once():
    with pytest.raises(config.ConfigError) as caught:
        config.apply_overrides({}, ["initial_lr=1", "optim.lr=2", "num_epochs=3", "run.name=[a"])
    lines = str(caught.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["initial_lr=1", "num_epochs=3", "run.name=[a"]
    assert lines[0].endswith("the nearest valid key is optim.lr")
