"""Reading settings: a config file, overrides, and the messages when one is wrong.

A config file holds only differences from the defaults in settings.py. More files may follow; the
later one wins. Every key can also be given as `group.key=value`, which wins over all files.

    settings = load("configs/vessels.yaml", ["training.max_steps=10", "data.root=/data/vessels"])
    settings = load("configs/vessels.yaml", ["tuned.yaml", "training.max_steps=10"])
    settings.training.max_steps, settings.model.base
"""

import contextlib
import difflib
import functools
import os
import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from settings import Group, Settings
from volumes.processes import command_of
from volumes.volume import collect_errors, printable

SYNONYMS = {  # other common names of a setting
    word: key
    for key, words in {
        "augment.flip": "mirroring random_flip",
        "data.cache_gb": "cache cache_num cache_rate",
        "data.folds": "kfold n_folds num_folds",
        "data.foreground": "class_names classes labels n_classes num_classes out_channels",
        "data.root": "data_dir data_path dataset dataset_path",
        "data.spacing": "pixdim target_spacing voxel_size voxel_spacing",
        "data.validation": "val val_fraction val_split validation_split",
        "inference.flips": "test_time_augmentation tta",
        "inference.batch": "sw_batch_size",
        "model.base": "base_filters features filters init_filters n_filters width",
        "model.checkpointing": "activation_checkpointing gradient_checkpointing",
        "model.multipliers": "depth n_stages num_levels",
        "monitor.log_every": "log_interval log_steps",
        "optim.betas": "momentum",
        "optim.clip": "clip_grad grad_clip gradient_clip_val gradient_clipping max_grad_norm",
        "optim.ema": "ema_decay",
        "optim.lr": "base_lr initial_lr learning_rate lr0",
        "optim.schedule": "lr_scheduler scheduler",
        "optim.warmup_steps": "warmup warmup_epochs warmup_iters",
        "optim.weight_decay": "decay l2 wd",
        "run.device": "accelerator cuda devices gpu gpus",
        "run.folder": "log_dir out_dir output output_dir save_dir",
        "run.init_from": "checkpoint ckpt ckpt_path load_from pretrained weights",
        "run.name": "exp_name experiment experiment_name run_name",
        "run.seed": "manual_seed random_seed",
        "run.threads": "n_threads num_threads",
        "sampling.foreground_share": "oversample_foreground_percent pos_neg_ratio",
        "sampling.patch": "crop_size img_size input_size patch_size roi_size spatial_size",
        "training.accumulate": "accumulate_grad_batches accumulation_steps grad_accum "
        "gradient_accumulation gradient_accumulation_steps",
        "training.max_epochs": "epochs max_epoch n_epochs num_epochs",
        "training.max_steps": "max_iter max_iterations n_steps num_steps steps total_steps",
        "training.precision": "amp bf16 dtype fp16 half mixed_precision",
        "training.save_minutes": "checkpoint_every save_every save_interval",
        "training.train_batch_size": "batch batch_size batch_size_per_gpu bs",
        "training.train_iterations_per_epoch": "iterations iters_per_epoch num_iterations "
        "num_iterations_per_epoch steps_per_epoch",
        "training.workers": "n_workers num_workers",
        "validation.every": "check_val_every_n_epoch eval_every val_every val_interval",
        "validation.patience": "early_stopping",
    }.items()
    for word in words.split()
}
HINTS = {
    "validation.every": "; above training.max_epochs, with validation.untrained=false, it is only "
    "done at the end",
    "inference.threshold": ", or auto",
}


class ConfigError(ValueError):
    """One sentence per fault, a line each."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as a string; this reads a number. A key that comes twice is an error."""

    def construct_mapping(self, node, deep=False):
        first = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key that is no word, in line {key.start_mark.line + 1}")
            if first.setdefault(key.value, key) is not key:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"two entries of {key.value!r}, again in line {line}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def valid_keys(model=Settings, prefix=""):
    """Every settable key as `group.key` (`group.term.key` for the loss)."""
    keys = []
    for name in model.model_fields:
        inner = _group_of(name, model)
        keys += valid_keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def _group_of(name, model):
    """The group that a field of a group is, None if it is a plain setting, or no field."""
    inner = getattr(model.model_fields.get(name), "annotation", None)
    return inner if isinstance(inner, type) and issubclass(inner, Group) else None


def _nearest(key, model=Settings):
    """The valid key that `key` means, or most like it: its last part counts more than its group."""
    keys, last = valid_keys(model), key.split(".")[-1]
    if last in ("resume", "resume_from"):
        return f"; {command_of('train.py')} --resume RUN goes on with a run"
    groups = sorted({k.rsplit(".", i)[0] for k in keys for i in (1, 2) if k.count(".") >= i})
    meant = [] if key.startswith("loss.") else [k for k in keys if k == SYNONYMS.get(last)]
    by_last = [k for k in keys if k.split(".")[-1] == last]
    group = key.rpartition(".")[0]
    own = {k.split(".")[-1]: k for k in keys if k.rpartition(".")[0] == group}
    of_group = [own[k] for k in difflib.get_close_matches(last, own, n=1, cutoff=0.85)]
    close = meant or of_group or by_last
    close = close or difflib.get_close_matches(key, keys + groups, n=1, cutoff=0.5)
    if not close:
        by_part = {k.split(".")[-1]: k for k in keys}
        close = [by_part[k] for k in difflib.get_close_matches(last, by_part, n=1)]
    if close:
        return f"; the nearest valid key is {close[0]}"
    return f"; groups: {', '.join(groups)}" if groups else f"; there are {', '.join(keys)}"


def _example(key):
    """The default of a key as YAML, or a made-up list where that is null or empty."""
    if key == "data.spacing":  # whose default, zeros, shows nothing
        return "[null, 1, 1]"
    node = Settings().plain()
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node or "[a, b]"


def _sentence(error, model):
    """One pydantic error as: key: expected, got, what to do."""
    kinds = (
        "tuple",
        "none",
        "literal",
        "constrained",
        "tagged",
        "<",
    )  # of a value that may be of one kind or another
    key = ".".join(str(p) for p in error["loc"] if not str(p).startswith(kinds))
    got = repr(error["input"])
    if error["type"] == "extra_forbidden":
        if not difflib.get_close_matches(
            key, model.model_fields, cutoff=0.85
        ):  # no slip in a group
            inner = error["input"] if isinstance(error["input"], dict) else ()
            key = next((f"{key}.{word}" for word in inner if word in SYNONYMS), key)
        return f"{key}: no such setting{_nearest(key, model)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: expected a group of settings (key: value), got {got}"
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] in ("missing", "too_long", "too_short", "tuple_type"):
        key = key.rsplit(".", 1)[0] if error["type"] == "missing" else key
        text = f"a list such as {_example(key)}"
    elif text.startswith(("greater", "less", "finite")):
        text = f"a number {text}"
    text += "" if ", got " in text else f", got {got}"
    return f"{key}: expected {text}{HINTS.get(key, '')}"


def build(content, model=Settings):
    """Settings from nested plain dicts; ConfigError with every fault in them."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # One fault per key is enough: a union reports every type that it might have been.
        sentences = [_sentence(e, model) for e in error.errors()]
        sentences = {sentence.split(": ")[0]: sentence for sentence in sentences}
        raise ConfigError("\n".join(sentences.values())) from None


def apply_overrides(content, overrides):
    """Nested dicts with each `group.key=value` set, read as YAML; ConfigError with every fault."""
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    faults = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            faults.append(f"{text}: expected group.key=value{_nearest(key)}")
            continue
        try:
            value = yaml.load(value, _Loader)
        except yaml.YAMLError:
            faults.append(f"{text}: the value is not readable as YAML")
            continue
        *path, last = key.split(".")
        node = content
        for part in path:
            child = node.get(part)
            node[part] = dict(child) if isinstance(child, dict) else {}
            node = node[part]
        node[last] = value
    if faults:
        with collect_errors(faults):
            build(content)
        raise ConfigError("\n".join(faults))
    return content


def merge(content, later, model=Settings):
    """Nested dicts of two files: in each key of a group the later one wins."""
    merged = content | later
    for name in content.keys() & later.keys():
        inner, pair = _group_of(name, model), (content[name], later[name])
        if inner and all(isinstance(part, dict) for part in pair):
            merged[name] = merge(*pair, inner)
    return merged


def _instead_of(path):
    """What a path that is no file may have meant, as a clause."""
    if (path / "checkpoints").is_dir():
        return f"; {command_of('train.py')} --resume {path} goes on with that run"
    if path.exists():
        return ""
    beside = [p for place in (path.parent, Path("runs")) for p in place.glob("*")]
    there = {p.name: str(p) for p in beside if p.is_file() or (p / "checkpoints").is_dir()}
    near = [there[name] for name in difflib.get_close_matches(path.name, there)]
    return f"; there is {', '.join(near)}" if near else ""


def read(path):
    """The nested dicts of a YAML file; ConfigError names the file and what is wrong."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path}: expected a config file in YAML, got: {reason}{_instead_of(Path(path))}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected groups of settings, got {type(content).__name__}")
    return content


@contextlib.contextmanager
def faults_of(path):
    """In this context each fault of a ConfigError begins with the path."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None


def is_override(text):
    """Whether a word of the command line is `group.key=value`, and no config file."""
    return re.match(r"[\w.]+=", text) is not None


def load(path, more=()):
    """Settings of a YAML file; ConfigError names the file and every fault.

    more: further files, of which the later one wins, and overrides `group.key=value`, which win
    over all files, in whatever order they come.
    """
    paths = [path, *(text for text in more if not is_override(text))]
    content = functools.reduce(merge, map(read, paths))
    with faults_of(" with ".join(map(str, paths))):
        settings = build(apply_overrides(content, filter(is_override, more)))
    settings.run.name = settings.run.name or default_name(path)
    return settings


def default_name(path):
    """A run's name by its config; the tasks of a SLURM array have one each, which they keep when
    they are queued again."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return printable(Path(path).stem) + (f"_task{task}" if task else "")


def changes(before, after):
    """A line for each setting in which two plain, nested configs differ."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [line.replace(": ", f": {key}.", 1) for line in changes(old, new)]
        elif old != new:
            lines.append(f"changed: {key} is {new}, was {old} in the saved state")
    return lines
