"""What README.md, AGENTS.md and docs/ claim is true, and the commands that they show work."""

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from torch.distributed.run import get_args_parser

from losses import LOSSES
from runtime import config, ending, jobs
from scoring.metrics import SCORES
from settings import Settings
from tests import docs_check, processes

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAP = ROOT / "docs/map.md"
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [README, ROOT / "AGENTS.md", *DOCS]
SCRIPTS = "prepare train infer evaluate monitor tune sweep".split()
ROOMS = "volumes topology monitoring scoring patches runtime".split()
FOLDERS = "tests benchmarks docs configs".split()
FOR_THE_READER_TO_MAKE, PLACEHOLDER = "configs/mine.yaml", "group.key=value"
SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+(=\S*| *[{\[].*)?|[a-z_]+(\.[a-z_0-9]+)+=[{\[].*[}\]]")
ON_EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ---------------------------------------------------------------------------- reading a page


def blocks(page):
    """[(language, content)] of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def code_spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def section(page, title):
    return page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """The cells of each row of the tables in a text, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-")]
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def lines_of_shell(text):
    """The words of each command line, without comments; a backslash continues a line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def commands(page):
    """The words of each command `python script.py ...` that a page shows."""
    shown = [line for language, text in blocks(page) if not language for line in
             lines_of_shell(text)]  # fmt: skip
    shown += [shlex.split(span) for span in code_spans(page) if span.startswith("python ")]
    return [words[1:] for words in shown if words[:1] == ["python"]]


def settings_in(words):
    """Those of some words that are settings: `group.key` or `group.key=value`."""
    groups = tuple(f"{group}." for group in Settings.model_fields)
    files = (".py", ".md", ".yaml", ".json", ".jsonl", ".png", ".pt", ".csv", ".h5")
    return [
        word
        for word in words
        if SETTING.fullmatch(word)
        and word != PLACEHOLDER
        and not word.endswith(files)
        and ("=" in word or word.startswith(groups))
    ]


@functools.cache
def options_of(script):
    """The options of a script, from the usage that its --help prints."""
    done = processes.run([ROOT / f"{script}.py", "--help"])
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout.split("\n\n")[0])) | {"--help"}


def names_defined_in(path):
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


# ---------------------------------------------------------------------------- map and edit table


def test_the_map_lists_every_source_file_and_no_other():
    mapped = [row[0].strip("`") for row in rows(section(MAP, "Files"))]
    mapped = [name for name in mapped if name.endswith(".py")]
    places = [ROOT, *(ROOT / room for room in ROOMS)]
    files = {str(p.relative_to(ROOT)) for place in places for p in place.glob("*.py")}
    files = {name for name in files if not name.endswith("__init__.py")}
    assert len(mapped) == len(set(mapped))
    missing, gone = files - set(mapped), set(mapped) - files
    assert (missing, gone) == (set(), set())


def test_each_row_of_the_edit_table_names_what_is_there():
    text = section(MAP, "To change something")
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    places = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(places) >= 10
    for name, path in places:
        assert name in names_defined_in(ROOT / path), f"{name} in {path}"


@ON_EVERY_PAGE
def test_every_file_that_is_named_exists(page):
    for span in code_spans(page):
        name = span.split()[0]
        folder = name.split("/")[0] if "/" in name else None
        is_ours = name.endswith(".py") if folder is None else folder in (*ROOMS, *FOLDERS)
        if is_ours and name != FOR_THE_READER_TO_MAKE and not re.search(r"[<>*]", name):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_config_is_named_in_the_readme_and_can_be_read():
    text = README.read_text() + (ROOT / "Makefile").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{path.name}" in text
        config.load(path)


@ON_EVERY_PAGE
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, f"{page.name}: {link}"


def test_every_page_and_picture_is_linked():
    linked = set()
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s#]+)", prose(page))
        linked |= {(page.parent / link).resolve() for link in links}
    assert {p.resolve() for p in [*DOCS, *ROOT.glob("docs/*.png")]} <= linked


# ---------------------------------------------------------------------------- settings, options


@ON_EVERY_PAGE
def test_every_setting_that_is_named_exists_and_accepts_its_value(page):
    for span in code_spans(page):
        if span.startswith("python "):
            continue
        whole = settings_in([span])
        check_settings(page, whole or settings_in(span.split()))
    for words in commands(page):
        base = ROOT / words[1] if len(words) > 1 and words[1].startswith("configs/") else None
        base = None if words[0] == "sweep.py" else base  # that is no config
        check_settings(page, settings_in(words[1:]), base)
    for language, text in blocks(page):
        if language == "yaml":
            content = yaml.safe_load(text)
            config.build(content, jobs.Sweep if "config" in content else Settings)


def check_settings(page, settings, base=None):
    """Settings that stand together are tried together: some are valid only with others."""
    keys = config.valid_keys()
    for setting in settings:
        key = setting.split("=")[0]
        known = key in keys or ("=" not in setting and any(k.startswith(f"{key}.") for k in keys))
        assert known, f"{page.name}: {setting}"
    overrides = [setting for setting in settings if "=" in setting]
    if base and base.is_file():
        config.load(base, overrides)
    else:
        config.build(config.apply_overrides({}, overrides))


@ON_EVERY_PAGE
def test_every_command_names_a_script_and_its_options(page):
    for script, *words in commands(page):
        if not script.endswith(".py"):
            continue  # python -m ...
        name = script.removesuffix(".py")
        assert name in SCRIPTS or (ROOT / script).is_file(), f"{page.name}: {script}"
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert name not in SCRIPTS or options <= options_of(name), f"{page.name}: {script}"
        for word in words:
            if word.startswith("configs/") and word != FOR_THE_READER_TO_MAKE:
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


@ON_EVERY_PAGE
def test_every_option_that_is_named_is_one_of_a_script(page):
    torchrun = {o for a in get_args_parser()._actions for o in a.option_strings}
    known = torchrun.union(*map(options_of, SCRIPTS))
    for span in code_spans(page):
        options = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", span))
        assert span.startswith("ruff") or options <= known, f"{page.name}: {span}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_a_script_is_described_on_some_page(script):
    text = "".join(page.read_text() for page in PAGES)
    described = set(re.findall(r"--[a-z][a-z-]*", text))
    assert options_of(script) - {"--help"} <= described


def test_every_loss_term_and_every_score_is_on_its_page():
    assert set(code_spans(ROOT / "docs/losses.md")) >= set(LOSSES)
    assert set(code_spans(ROOT / "docs/scores.md")) >= set(SCORES)


# ---------------------------------------------------------------------------- other claims


@pytest.mark.parametrize("page", [README, ROOT / "docs/when-something-goes-wrong.md"],
                         ids=lambda page: page.name)  # fmt: skip
def test_the_exit_statuses_are_those_of_a_run(page):
    meanings = {
        int(row[0]): row[1] for row in rows(page.read_text()) if len(row) == 2 and row[0].isdigit()
    }
    assert set(meanings) == {ending.DONE, ending.FAILED, ending.WRONG_INPUT, ending.STOPPED}
    assert meanings[ending.DONE] == "done" and "--resume" in meanings[ending.STOPPED]
    assert "cannot go on" in meanings[ending.FAILED] and "wrong" in meanings[ending.WRONG_INPUT]


def test_all_examples_predict_with_the_best_state_of_the_newest_run():
    shown = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    shown += [line for page in PAGES for _, text in blocks(page) for line in text.splitlines()]
    named = {word for line in shown for word in re.findall(r"--ckpt (runs/\w+\.pt)", line)}
    assert named == {"runs/best.pt"}


def test_a_misspelled_setting_is_one_sentence_and_exit_status_2(tmp_path):
    words = [ROOT / "train.py", ROOT / "configs/vessels.yaml", "optim.rl=1"]
    done = processes.run(words, cwd=tmp_path)
    assert done.returncode == 2 and "optim.lr" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_claimed_sizes_hold():
    claims = re.findall(r"`(\w+\.py)` has fewer than (\d+) lines", MAP.read_text())
    assert claims
    for name, limit in claims:
        assert len((ROOT / name).read_text().splitlines()) < int(limit)
    assert len(README.read_text().splitlines()) <= 220
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) <= 60
    for page in set(DOCS) - {MAP}:  # that has a line for each file
        assert 40 <= len(page.read_text().splitlines()) <= 120, page.name


@pytest.mark.parametrize(
    "page, text",
    [
        (README, section(README, "What to expect on your machine")),
        (ROOT / "docs/figures.md", (ROOT / "docs/figures.md").read_text()),
        (ROOT / "docs/losses.md", section(ROOT / "docs/losses.md", "Cost")),
    ],
    ids=["README.md", "figures.md", "losses.md"],
)
def test_every_figure_of_a_table_is_in_the_results(page, text):
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    cells = [re.sub(r"`[^`]*`", "", cell) for row in rows(text) for cell in row]
    figures = set(re.findall(r"\d+\.\d+", " ".join(cells))) - {"0.000"}
    assert figures
    assert {figure for figure in figures if figure not in results} == set()


WITHOUT_POSIX = """
import os, runpy, signal, sys
for name in ("fcntl", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGKILL", "SIGBUS", "SIGCHLD", "SIGPIPE", "pthread_sigmask"):
    delattr(signal, name)
for name in ("memfd_create", "sched_getaffinity", "posix_fadvise", "pread", "pwrite", "getuid"):
    delattr(os, name)
for sys.argv in [[f"{name}.py", "--help"] for name in sys.argv[1:]]:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, sys.argv
"""


def test_all_scripts_start_without_what_posix_and_linux_alone_have():
    scripts = ["prepare", "evaluate", "monitor", "train", "infer", "tune"]
    command = [sys.executable, "-c", WITHOUT_POSIX, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [done.stdout.count(f"usage: {script}.py") for script in scripts] == [1] * 6


# ---------------------------------------------------------------------------- your own data


def make_raw_case(folder, name, seed):
    """An image with a bright bar, and its label, as NIfTI, in images/ and labels/."""
    label = np.zeros((48, 48, 16), np.uint8)
    label[8:40, 20:28, 4:12] = 1
    noise = np.random.default_rng(seed).normal(60, 10, label.shape)
    for kind, array in (("image", noise + 80 * label), ("label", label)):
        path = folder / f"{kind}s" / f"{name}_{kind}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), np.eye(4)), path)


def test_the_five_commands_for_your_own_data_work(tmp_path):
    for i in range(5):
        make_raw_case(tmp_path / "raw", f"case{i}", seed=i)
    make_raw_case(tmp_path / "new", "unseen", seed=9)
    (tmp_path / "configs").mkdir()
    (_, text), *_ = re.findall(
        r"^```(\w*)\n(.*?)^```", section(README, "Your own data"), flags=re.M | re.S
    )
    small = "model.base=4 model.multipliers=[1,2] training.max_steps=4 training.workers=0"
    small += " run.threads=1 validation.untrained=false monitor.picture=false"
    shown = lines_of_shell(text)
    assert [words[0] for words in shown] == ["python", "echo", "python", "python", "python"]
    for words in shown:
        if words[0] == "echo":
            _, content, arrow, path = words
            assert arrow == ">"
            (tmp_path / path).write_text(f"{content}\n")
            continue
        _, script, *arguments = words
        arguments += small.split() if script == "train.py" else []
        done = processes.run([ROOT / script, *arguments], cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "runs/mine/checkpoints/last.pt").is_file()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predictions.jsonl", "unseen.nii.gz"}
    assert "unseen" in (tmp_path / "scores.csv").read_text()


# ---------------------------------------------------------------------------- what docs_check runs


@pytest.mark.parametrize("page", docs_check.PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_is_run_by_docs_check_or_says_why_not(page):
    commands = docs_check.commands_of(page)
    shown = [text for language, text in blocks(page) if language in ("", "python")]
    assert bool(commands) == bool(shown)
    for language, text, reason in commands:
        runnable = language == "python" or text.split()[0] in (
            "python",
            "torchrun",
            "echo",
            "touch",
        )
        assert reason or runnable, f"{page.name}: {text}"


@pytest.mark.parametrize("page", [README, ROOT / "docs/classes.md"], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page):
    scripts = [text for language, text, _ in docs_check.commands_of(page) if language == "python"]
    assert scripts
    for text in scripts:
        done = docs_check.run("python", text, ROOT)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_a_command_that_fails_is_listed_and_one_that_needs_a_cluster_too(tmp_path):
    page = tmp_path / "page.md"
    lines = "```\necho a > b\ntouch none/c\nsbatch x\n```\n"
    page.write_text(f"{lines}\n<!-- not run: no GPU -->\n```\npython x.py\n```\n")
    (tmp_path / "configs/sweeps").mkdir(parents=True)
    number, skipped, failed = docs_check.check(page, tmp_path)
    assert number == 2 and [line.split(": ")[1] for line in skipped] == [
        "not run, needs SLURM",
        "not run, no GPU",
    ]
    assert (
        len(failed) == 1 and "touch none/c" in failed[0] and (tmp_path / "b").read_text() == "a\n"
    )
