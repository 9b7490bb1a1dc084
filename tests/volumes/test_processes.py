"""How a script meets its terminal, other work, and a system that lacks signals."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

import evaluate
import prepare
from runtime import log
from volumes import casefile, processes
from volumes.processes import Output, run_script


def goes_nowhere(stream):
    return os.path.sameopenfile(stream.fileno(), os.open(os.devnull, os.O_WRONLY))


@pytest.fixture
def nobody():
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        yield stream
        Output(stream).flush()  # as the interpreter does at its end


@pytest.mark.parametrize("terminal", [False, True])
def test_where_nobody_reads_any_more_a_run_falls_silent_and_goes_on(nobody, terminal):
    console = Console(file=Output(nobody), force_terminal=terminal)
    with log.ProgressLine(console, 2, 0) as show:
        show.print("something " * 2000)
        show.advance(1, "a line of its own", short="short")
        show.print("something else")
    assert goes_nowhere(nobody)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_an_output_on_a_full_disk_is_named_once_and_ends_nothing(capsys):
    stream = open("/dev/full", "w")
    console = Console(file=Output(stream))
    console.print("something")
    console.print("something else")
    assert goes_nowhere(stream)
    stream.close()
    assert capsys.readouterr().err == "standard output: No space left on device; it shows no more\n"


def test_a_list_is_given_to_a_closed_pipe_without_a_word(nobody, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Output(nobody))
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--list-scores"])
    assert (left.value.code, capsys.readouterr().err) == (0, "")


def test_cases_are_written_though_nobody_reads_about_them(nobody, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", Output(nobody))
    size = ["--cases", "2", "--shape", "8", "16", "16", "--workers", "1"]
    assert prepare.main(["--phantom", "scroll", *size, "--out", str(tmp_path / "d")]) == 0
    assert list(casefile.read_dataset(tmp_path / "d").cases) == ["scroll_000", "scroll_001"]


@pytest.mark.parametrize(
    "encoding, shown",
    [("ascii", b"gr\\xf6\\xdfe \\udcf6\n"), ("utf-8", "größe \\udcf6\n".encode())],
)
def test_what_an_encoding_lacks_is_printed_as_an_escape(monkeypatch, encoding, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit) as left:
        run_script(lambda: print("größe \udcf6", flush=True) or 3)
    assert (left.value.code, written.getvalue()) == (3, shown)


def test_a_script_runs_whose_output_was_closed_before(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as left:
        run_script(lambda: print(sys.stdout.isatty(), file=sys.stderr) or 0)
    assert left.value.code == 0


def test_in_the_locale_c_a_script_starts_again_with_utf8(monkeypatch):
    commands = []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train.py", "c.yaml"])
    monkeypatch.setattr(os, "execv", lambda *command: commands.append(command) or sys.exit(75))
    with pytest.raises(SystemExit):
        run_script(lambda: 0)
    again = [sys.executable, "-X", "utf8", "-u", "train.py", "c.yaml"]
    assert commands == [(sys.executable, again)]


def test_a_blocked_signal_comes_when_it_is_no_more_blocked():
    numbers = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: numbers.append(number))
    try:
        with processes.signals_blocked({signal.SIGUSR1}):
            # Not to the process, of which another thread might take it.
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert numbers == []
        assert numbers == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_where_signals_cannot_be_blocked_the_context_still_runs(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")
    with processes.signals_blocked({signal.SIGINT}):
        ran = True
    assert ran


@pytest.mark.parametrize("script", ["train", "infer", "tune"])
@pytest.mark.parametrize("given", [None, "300000"])
def test_threads_that_wait_leave_their_core_to_others_unless_the_caller_decides(
    script, given, tmp_path
):
    # OpenMP reads it when torch is loaded: here in place of that, in a process of its own.
    code = "import os, sys\nprint(os.environ['GOMP_SPINCOUNT'])\nsys.exit()"
    (tmp_path / "torch.py").write_text(code, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"PYTHONPATH": str(tmp_path)} | ({"GOMP_SPINCOUNT": given} if given else {})
    command = [sys.executable, Path(prepare.__file__).parent / f"{script}.py"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == (given or "1000"), run.stderr


def quota_tree(root, line, folder, **files):
    """(proc, cgroup) of a process in one cgroup that has some files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    (root / "cgroup" / folder).mkdir(parents=True)
    for name, content in files.items():
        (root / "cgroup" / folder / name.replace("__", ".")).write_text(content)
    return root / "proc", root / "cgroup"


@pytest.mark.parametrize(
    "line, folder, files, expected",
    [
        ("0::/job", "job", {"cpu__max": "150000 100000\n"}, (2, "cgroup quota, of 8 cores")),
        ("0::/job", "job", {"cpu__max": "10000 100000\n"}, (1, "cgroup quota, of 8 cores")),
        ("0::/job", "job", {"cpu__max": "max 100000\n"}, (4, "CPU affinity, of 8 cores")),
        ("0::/job", "job", {}, (4, "CPU affinity, of 8 cores")),
        (
            "3:cpu,cpuacct:/job",
            "cpu/job",
            {"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"},
            (3, "cgroup quota, of 8 cores"),
        ),
        (
            "3:cpu,cpuacct:/job",
            "cpu/job",
            {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"},
            (4, "CPU affinity, of 8 cores"),
        ),
    ],
)
def test_cores_are_those_that_affinity_and_the_quota_of_a_cgroup_leave(
    tmp_path, monkeypatch, line, folder, files, expected
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    where = quota_tree(tmp_path, line, folder, **files)
    assert processes.cores_and_reason(*where) == expected


def test_without_affinity_or_a_quota_all_cores_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert processes.cores_and_reason(tmp_path, tmp_path) == (8, "all 8 cores")


def test_a_printed_command_starts_the_script_from_the_current_folder(monkeypatch, tmp_path):
    root = Path(processes.__file__).parents[1]
    monkeypatch.chdir(root)
    assert processes.command_of("train.py") == "python train.py"
    monkeypatch.chdir(tmp_path)
    assert processes.command_of("train.py") == f"python {root}/train.py"  # of a notebook
    (tmp_path / "my tools").symlink_to(root)
    monkeypatch.setattr(sys, "argv", ["my tools/sweep.py"])
    assert processes.command_of("train.py") == "python 'my tools/train.py'"
