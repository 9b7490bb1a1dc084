"""Several ranks, as torchrun starts them: what they share, and how they end."""

import json
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import train
from benchmarks import kills
from runtime import build, distributed, ending
from runtime.run import Run
from tests import processes
from tests.test_train import events, root, settings, weights_of

__all__ = ["root"]  # a fixture
ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import train
from runtime import config, distributed
rank = int(os.environ["RANK"])

def after_step(step, act):
    update = train.model.update_ema
    def acting(ema, network, decay, number):
        if number == step:
            act()
        update(ema, network, decay, number)
    train.model.update_ema = acting

{inject}
if __name__ == "__main__":
    sys.exit(train.main(config.build(json.loads(sys.argv[1])), resume={resume}))
"""


def start(count, code, *arguments):
    """Processes that run some code as ranks, as torchrun would, with its store in rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": port}
    names |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return [
        processes.Script(
            ["-c", code, *arguments],
            env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def start_training(count, content, inject="", resume=False):
    code = SCRIPT.format(root=str(ROOT), inject=inject, resume=resume)
    return start(count, code, json.dumps(content.plain()))


def ends(ranks, seconds=90):
    """[(exit status, standard output, standard error)]"""
    try:
        texts = [rank.communicate(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *pair) for rank, pair in zip(ranks, texts, strict=True)]


def train_with(count, content, inject="", resume=False):
    return ends(start_training(count, content, inject, resume))


def runs(tmp_path):
    return tmp_path / "runs" / "r"


# ---------------------------------------------------------------------------- what they share

GROUP = f"""
import os, sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
from runtime import distributed
with distributed.joined(1) as group:
    rank = group.rank
    assert group.gather(rank) == [0, 1, 2]
    assert group.from_first(lambda: ["made", rank]) == ["made", 0]
    try:
        group.from_first(lambda: 1 / 0)
        raise SystemExit("no error")
    except ZeroDivisionError:
        pass
    assert group.meet({{}}) == []
    assert group.meet({{"stop": 1}} if rank == 2 else {{}}) == [{{}}, {{}}, {{"stop": 1}}]
    assert group.mine(list("abcde")) == [["a", "d"], ["b", "e"], ["c"]][rank]
    mean = group.over_ranks(0, 0)
    assert mean(torch.tensor([float(rank), 3.0])).tolist() == [1.0, 3.0]
    if rank == 1:  # a step that begins again asks nobody
        assert group.over_ranks(0, 0)(torch.tensor([7.0, 7.0])).tolist() == [1.0, 3.0]
    network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    weight, unused = network[0].weight, network[0].bias
    weight.grad = torch.tensor([[rank, 1.0]])
    network[1].running_mean.fill_(rank)
    results = [({{"dice": torch.tensor(float(rank))}}, {{"share": 2 * rank}})]
    ((loss, shares),) = group.average(network, results)
    assert weight.grad.tolist() == [[1.0, 1.0]] and unused.grad.tolist() == [0.0]
    assert network[1].running_mean.tolist() == [1.0]
    assert list(loss) == ["dice"] and list(shares) == ["share"]
    assert (loss["dice"].item(), shares["share"].item()) == (1.0, 2.0)
    group.seed_step(5, 1)
    numbers = group.gather(torch.rand(1).item())
    group.seed_step(5, 1)
    assert numbers[rank] == torch.rand(1).item() and len(set(numbers)) == 3

    distributed.LOOK, group.minutes = 0.1, 1 / 60
    end = time.monotonic() + 2
    while rank == 1 and time.monotonic() < end:  # it works for longer, and shows it
        group.word()
    group.wait_for_all(group.word)
    if rank == 2:
        os._exit(0)
    wait = [lambda: group.wait_for_all(lambda: None), lambda: group.word(now=True)][rank]
    try:
        while True:
            wait()
    except distributed.Left as left:
        text = str(left)
    assert " has not answered for 1 s" in text or "rank 2 (process " in text, text
    assert rank == 0 or text.endswith(" has ended"), text
"""


def test_ranks_gather_agree_average_wait_and_draw_numbers_of_their_own():
    for status, _, error in ends(start(3, GROUP)):
        assert status == 0, error


def test_ranks_that_torchrun_starts_again_do_not_hear_those_before():
    torchrun = dist.HashStore()

    def own_part(rank):
        one = object.__new__(distributed.Ranks)
        one.rank, one.size, one.minutes = rank, 3, 1
        return one._own_part(torchrun)

    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(own_part, [2, 1, 0]))
        assert not any(part.check(["left/1"]) for part in parts)
        parts[0].set("left/1", "")
        assert all(part.check(["left/1"]) for part in parts)


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """A run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    for status, _, error in train_with(2, settings(root, folder)):
        assert status == 0, error
    return folder


def test_two_ranks_train_as_one_process_with_twice_the_batch(root, tmp_path):
    changes = ["model.dropout=0", "loss.cldice.weight=0.1", "optim.clip=0", "training.max_epochs=3"]
    for status, _, error in train_with(2, settings(root, tmp_path / "two", *changes)):
        assert status == 0, error
    double = [*changes, "training.train_batch_size=4"]
    assert train.main(settings(root, tmp_path / "one", *double)) == 0
    two, one = (events(runs(tmp_path / name), "step") for name in ("two", "one"))
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    a, b = (weights_of(runs(tmp_path / name)) for name in ("two", "one"))
    for name, weight in a["model"].items():
        assert (weight - b["model"][name]).abs().max() < 1e-4, name
    scores = [events(runs(tmp_path / n), "evaluation")[-1] for n in ("two", "one")]
    assert scores[0]["cases"].keys() == scores[1]["cases"].keys()


def test_rank_0_alone_writes_and_says_how_many_there_are(straight):
    (begin,) = events(runs(straight), "start")
    assert begin["ranks"] == 2
    assert [e["step"] for e in events(runs(straight), "step")] == list(range(1, 13))
    assert not (straight / "runs" / "r-2").exists()
    assert weights_of(runs(straight))["loop"]["ranks"] == 2


# ---------------------------------------------------------------------------- what happens to one


def test_a_signal_to_one_rank_stops_all_and_with_as_many_the_run_goes_on_bit_for_bit(
    root, tmp_path, straight, capsys
):
    inject = "if rank == 1: after_step(4, lambda: os.kill(os.getpid(), signal.SIGUSR1))"
    both = train_with(2, settings(root, tmp_path), inject)
    assert [status for status, *_ in both] == [75, 75], both
    assert weights_of(runs(tmp_path))["loop"]["step"] in (5, 6)
    assert events(runs(tmp_path), "stop")[0]["reason"] == "rank 1: signal SIGUSR1"
    shutil.copytree(tmp_path / "runs", tmp_path / "alone" / "runs")
    for status, _, error in train_with(2, settings(root, tmp_path), resume=True):
        assert status == 0, error
    assert kills.differences(runs(straight), runs(tmp_path)) == []
    assert train.main(settings(root, tmp_path / "alone"), resume=True) == 0
    text = "resume: ranks: 1 instead of 2; a step is now over 2 x 1 x 1 patches"
    assert text in capsys.readouterr().out
    assert weights_of(runs(tmp_path / "alone"))["loop"]["step"] == 12


FAULTS = """
if rank == 1:
    forward, calls = train.model.UNet3D.forward, []
    def faulty(self, image):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        out = forward(self, image)
        if self.training and len(calls) == 8:
            out = [scale * torch.nan for scale in out]
        return out
    train.model.UNet3D.forward = faulty
    from patches.cache import VolumeCache
    read = VolumeCache.read
    def broken(self, case, box, names):
        if case.id == "bar0":
            raise OSError("bar0.h5: gone")
        return read(self, case, box, names)
    VolumeCache.read = broken
    train.data.PAUSES = ()
    def unreadable(network, case, *arguments, **named):
        raise OSError(f"{case.id}.h5: gone")
    train.build.validation.predict = unreadable
    class Timer(train.StepTimer):
        def start(self):
            super().start()
            assert len(self.marks) < 12, "marks of more than a line of the log"
    train.StepTimer = Timer
"""


def test_what_one_rank_runs_into_all_know_and_none_waits_for_ever(root, tmp_path):
    changes = ["data.validation=[bar2,bar3]", "data.test=[]", "data.max_excluded=0.5"]
    changes += ["validation.untrained=false"]
    both = train_with(2, settings(root, tmp_path, *changes), FAULTS)
    assert [status for status, *_ in both] == [0, 0], both
    found = [(e["kind"], e["step"], e["text"]) for e in events(runs(tmp_path), "trouble")]
    lines = "\n".join(f"{kind} {step} {text}" for kind, step, text in found)
    assert re.search(r"^cuda memory \d rank 1: cpu ran out of memory", lines, re.M), lines
    assert re.search(r"^case left out \d rank 1: bar0.h5: gone", lines, re.M), lines
    assert re.search(r"^case left out 12 rank 1: bar3.h5: gone", lines, re.M), lines
    assert "step skipped" in lines
    loop = weights_of(runs(tmp_path))["loop"]
    assert loop["micro_batch"]["checkpointing"] and list(loop["excluded"]) == ["bar0"]


def test_a_rank_that_does_not_answer_is_named_within_the_time(root, tmp_path):
    inject = "if rank == 1: after_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP))"
    content = settings(root, tmp_path, "run.rank_timeout_minutes=0.1")
    first, second = start_training(2, content, inject)
    began = time.monotonic()
    try:
        _, error = first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 1 and time.monotonic() - began < 40
    assert "rank 1 (process" in error and "has not answered for 6 s" in error
    assert weights_of(runs(tmp_path))["loop"]["step"] == 3


def test_an_exception_of_one_rank_is_named_by_rank_0(root, tmp_path):
    inject = "if rank == 1: after_step(2, lambda: 1 / 0)"
    first, second = train_with(2, settings(root, tmp_path), inject)
    assert (first[0], second[0]) == (1, 1)
    assert "rank 1: ZeroDivisionError: division by zero" in first[2]
    assert "ZeroDivisionError" in second[2] and "Traceback" in second[2]


def test_an_error_of_one_rank_before_there_is_a_run_is_named_by_rank_0(root, tmp_path):
    inject = """
if rank == 1:
    train.build.resolve = lambda *arguments: 1 / 0
"""
    first, second = train_with(2, settings(root, tmp_path), inject)
    assert (first[0], second[0]) == (1, 1) and "Traceback" in second[2]
    assert first[2].strip() == "rank 1: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("key", ["the case files of data.root", "optim.lr", "run.device"])
def test_ranks_that_would_train_otherwise_are_refused(root, tmp_path, key):
    plan = build.resolve(settings(root, tmp_path))
    plan.group.gather = lambda own: [own, own, own | {key: "other"}]
    plan.group.people = [["a", 1], ["a", 2], ["b", 3]]
    text = (
        f"{key}: expected the same for all ranks, got others for rank 0 on a than for rank 2 on b"
    )
    with pytest.raises(ValueError, match=text):
        build.check_alike(plan, {})


def test_sigterm_from_torchrun_after_another_rank_has_ended_is_not_a_wish_to_stop():
    def word(now):
        if now:
            raise distributed.Left("rank 1 has ended")

    group = SimpleNamespace(word=word)
    with pytest.raises(distributed.Left, match="rank 1 has ended"):
        Run.check(SimpleNamespace(group=group, _reason=lambda: "signal SIGTERM"))
    Run.check(SimpleNamespace(group=group, _reason=lambda: None))


def test_sigterm_on_several_machines_does_not_keep_torchrun_from_going_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    last = {"event": "stop", "status": 75, "time": 4e9, "reason": "rank 1: signal SIGTERM"}
    (tmp_path / "log.jsonl").write_text(json.dumps(last) + "\n")
    group = SimpleNamespace(size=2, local_size=1)
    run = SimpleNamespace(resumed_from=tmp_path, folder=tmp_path, group=group)
    Run._check_not_stopped(run)
    group.local_size = 2
    with pytest.raises(ending.WrongInput, match="was stopped"):
        Run._check_not_stopped(run)


def test_a_fault_that_one_rank_finds_is_one_sentence_and_nothing_is_written(root, tmp_path):
    inject = """
if rank == 1:
    def missing(*arguments):
        raise FileNotFoundError("data: expected a folder, got none")
    train.build.resolve = missing
"""
    first, second = train_with(2, settings(root, tmp_path), inject)
    assert (first[0], second[0]) == (2, 2)
    # torch may say there that rank 0, which keeps the store here, has ended first
    assert "data:" not in second[2] and "Traceback" not in second[2]
    host = socket.gethostname()
    assert first[2].strip() == f"rank 1 on {host}: data: expected a folder, got none"
    assert not (tmp_path / "runs").exists()


def test_a_killed_rank_is_named_and_the_run_that_torchrun_starts_again_ends_as_if_undisturbed(
    root, tmp_path, straight
):
    script = tmp_path / "train_ranks.py"
    inject = """
if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    after_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    script.write_text(SCRIPT.format(root=str(ROOT), inject=inject, resume=False))
    words = ["-c", "from torch.distributed.run import main; main()", "--standalone"]
    words += ["--nproc-per-node=2", "--max-restarts=2", script]
    done = processes.run([*words, json.dumps(settings(root, tmp_path).plain())])
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"step 8: rank 1 \(process \d+ on .*\) has ended; the state of step 8 is saved", done.stderr
    )
    assert kills.differences(runs(straight), runs(tmp_path)) == []
    assert [e["resumed"] for e in events(runs(tmp_path), "start")] == [False, True]


def test_what_torchrun_starts_again_goes_on_with_its_run_unless_that_was_stopped(
    root, tmp_path, monkeypatch, capsys
):
    content = settings(root, tmp_path, "training.max_steps=4")
    assert train.main(content) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    late = settings(root, tmp_path, "training.max_hours=1e-9")
    assert train.main(late) == 75
    assert [path.name for path in (tmp_path / "runs").glob("r*")] == ["r"]
    assert train.main(settings(root, tmp_path)) == 75
    assert "was stopped (its time is up" in capsys.readouterr().err
    (tmp_path / "runs" / "r" / "lock").write_text("process 1 on another\nstarted by another")
    assert train.main(content) == 0
    assert (tmp_path / "runs" / "r-2").exists()
