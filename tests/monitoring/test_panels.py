import io
import time

import pytest
from rich.console import Console

from monitoring import health, panels
from monitoring.panels import RunView
from tests.monitoring.test_health import GB, event
from tests.monitoring.test_records import NOW, line, read, start, step, write_lines

FAR = {"host": "far", "pid": 7, "created": NOW - 3, "steps": 300, "iterations": 100}
BETTER = {"dice": "higher", "surface_dice": "higher", "components": None}
PARTS = {"wait": 0.6, "transfer": 0.0, "augment": 0.2, "forward": 0.4, "loss": 0.2, "backward": 0.6}


def process(pid, role, **changes):
    figures = {
        "pid": pid,
        "role": role,
        "rss": GB,
        "shared": GB // 4,
        "cpu": 90.0,
        "status": "running",
    }
    return {**figures, **changes}


def full_run(folder, *, number=150, **changes):
    """A run with something of everything, its last line of system.jsonl at NOW + 2 * number."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    log = [start(**FAR, score="surface_dice", better=BETTER)]
    for s in range(10, number + 1, 10):
        loss = {"total": 2.0 - s / 100, "cldice": None if s == 50 else 0.5, "toploss": 0.25}
        log.append(
            {**step(s, loss=loss, lr=3e-4, step_seconds=2.0, seconds=PARTS), "time": NOW + 2 * s}
        )
        if s == 100:
            counts = {"cases": 12, "bytes": GB, "budget": 4 * GB, "hits": 90, "misses": 10}
            scores = {"dice": 0.75, "surface_dice": 0.9, "components": 7, "components_truth": 4}
            log.append({**event("epoch", s, cache={**counts, "evictions": 3}), "time": NOW + 200})
            log.append({**event("evaluation", s, scores=scores), "time": NOW + 220})
            saved = event("saved", s, file="checkpoints/last.pt", seconds=1.25, bytes=541_000_000)
            log.append({**saved, "time": NOW + 230})
    text = "worker 3 was killed by signal 9 at 7.1 GB"
    log.append(
        {**event("trouble", number, kind="worker died", text=text), "time": NOW + 2 * number}
    )
    write_lines(folder / "log.jsonl", log)
    rooms = [[24 * GB, 64 * GB, "memory of this machine"], [2 * GB, 32 * GB, "cgroup limit"]]
    machine = {"tree": 20 * GB, "rooms": rooms, "new_oom_kills": 0, "swap": [GB, 8 * GB]}
    machine |= {
        "shm": [3 * GB, 4 * GB],
        "disk": [500 * GB, 2000 * GB],
        "load": [3.5, 3, 3],
        "cores": 16,
    }
    gpu = {"index": 0, "name": "NVIDIA H100", "used": 40 * GB, "total": 80 * GB, "load": 64}
    machine |= {"gpus": [{**gpu, "temperature": 58, "power": 412, "reserved": 31 * GB}]}
    processes = [
        process(7, "training"),
        process(8, "worker 0"),
        process(9, "worker 1", cpu=None),
    ]
    last = line(number, seconds=10, **{**machine, "processes": processes, **changes})
    earlier = {**last, "time": NOW, "step": 0, "processes": [process(7, "training")]}
    write_lines(folder / "system.jsonl", [earlier, {**last, "time": NOW + 2 * number}])
    return folder


def view_of(folder, seconds):
    """The view at so many seconds after NOW."""
    run, now = read(folder), NOW + seconds
    return RunView(run, health.RunHealth(run).status(now), now)


def text_of(view, width=100, height=None):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    options = console.options.update(height=height)
    text = "".join(segment.text for segment in console.render(view, options))
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def panel(view, function, width=100):
    """The lines of one panel, words apart by one space."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(function(view))
    return [" ".join(text.split()) for text in console.file.getvalue().splitlines()]


def row(view, function, begin):
    """The one line of a panel that begins so."""
    (text,) = [text for text in panel(view, function) if text.startswith(begin)]
    return text


# ---------------------------------------------------------------------------- what it says


@pytest.fixture
def shown(tmp_path):
    return view_of(full_run(tmp_path / "exp001"), 302)


def test_the_head_has_name_state_place_and_start(shown):
    first, second, *_ = text_of(shown).splitlines()
    assert first == "exp001   RUNNING   last line 2 s ago"
    begun = time.strftime("%H:%M:%S", time.localtime(NOW))
    assert second == f"host far · pid 7 · started {begun}, 5 min ago"


def test_steps_and_epoch_are_shown_with_what_is_left(shown):
    # 150 steps of 2 s and two more evaluations of 30 s, less 2 s that have gone.
    done = time.strftime("%H:%M:%S", time.localtime(NOW + 302 + 358))
    assert panel(shown, panels.steps) == [
        "━━━━━━╸ 50% step 150 of 300, epoch 2 of 3",
        f"run done {done}, in 6 min · epoch in 98 s",
        "2 s/step, 1800 steps/h · 30 s between epochs",
    ]


def test_each_part_of_the_loss_has_value_and_curve(shown):
    total, *_ = panel(shown, panels.loss)
    assert total.startswith("total 0.5 █") and total.endswith("▁")
    assert row(shown, panels.loss, "cldice").startswith("cldice 0.5 ▄▄▄▄ ▄▄▄▄▄")
    assert row(shown, panels.loss, "learning rate").startswith("learning rate 0.0003 ▄")


def test_scores_are_shown_with_the_best_and_the_one_that_chooses_first(shown):
    assert panel(shown, panels.score) == [
        "surface_dice 0.9 best 0.9 at 100 ▄",
        "dice 0.75 best 0.75 at 100 ▄",
        "components 7 ▄",
        "components_truth 4 ▄",
        "at step 100",
    ]


def test_of_classes_the_main_score_of_each_is_shown_and_of_others_the_mean(tmp_path):
    values = {"artery": 0.75, "vein": 0.25, "mean": 0.5}
    scores = {f"{name}/{which}": v for name in ("dice", "recall") for which, v in values.items()}
    better = dict.fromkeys(scores, "higher")
    log = [start(score="dice/mean", better=better), event("evaluation", 10, scores=scores)]
    write_lines(tmp_path / "log.jsonl", log)
    rows = panel(view_of(tmp_path, 302), panels.score)
    assert [row.split()[0] for row in rows] == [
        "dice/mean", "dice/artery", "dice/vein", "recall/mean", "at",
    ]  # fmt: skip


def test_the_time_of_a_step_is_shown_in_shares_the_largest_first(shown):
    hint, *parts = panel(shown, panels.time)
    assert hint.startswith("waiting for data: more training.workers or")
    assert "data.cache_gb" in hint
    assert [text.split()[0] for text in parts[:3]] == ["wait", "backward", "forward"]
    assert parts[0] == "wait ━━━╸ 30%" and parts[-1] == "transfer 0%"


def test_a_gpu_that_does_not_wait_has_no_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "wait", 0.2)
    assert "waiting for data" not in text_of(view_of(full_run(tmp_path), 302))


def test_memory_is_shown_against_each_limit_the_tightest_first(shown):
    first, second, tree, *_ = panel(shown, panels.memory)
    assert first.endswith(" 94% 30.0 GB of 32.0 GB, cgroup limit")
    assert second.endswith(" 62% 40.0 GB of 64.0 GB, memory of this machine")
    assert tree.startswith("all processes 20.0 GB ▄▄")


def test_each_process_has_its_memory(shown):
    assert row(shown, panels.memory, "training") == "training 7 90 % 750 MB + 250 MB shared"
    assert row(shown, panels.memory, "worker 0") == "worker 0 8 90 % 750 MB + 250 MB shared"
    assert row(shown, panels.memory, "worker 1") == "worker 1 9 – % 750 MB + 250 MB shared"


def test_a_process_that_stands_still_is_marked(tmp_path):
    processes = [process(8, "worker 0", status="zombie"), process(9, "worker 1", status="sleeping")]
    shown = view_of(full_run(tmp_path, processes=processes), 302)
    assert row(shown, panels.memory, "worker 0").startswith("worker 0 8 90 % zombie ")
    assert row(shown, panels.memory, "worker 1").startswith("worker 1 9 90 % 7")


def test_gpu_host_cache_and_state_are_shown(shown):
    (gpu,) = panel(shown, panels.gpu)
    memory, rest = "40.0 GB of 80.0 GB, 31.0 GB by this process", "load 64 %, 58 °C, 412 W, H100"
    assert gpu == f"━━━━━━╸ 50% {memory}, {rest}"
    assert " ".join(panel(shown, panels.host)) == (
        "load 3.5 of 16 cores · swap 1.0 GB of 8.0 GB used · /dev/shm 3.0 GB of 4.0 GB "
        "free · disk 500.0 GB of 2.0 TB free"
    )
    (cache,) = panel(shown, panels.cache)
    assert cache == "1.0 GB of 4.0 GB · 12 cases · 90 hits · 10 misses · 3 evictions"
    when = time.strftime("%H:%M:%S", time.localtime(NOW + 230))
    assert panel(shown, panels.saved) == [
        f"{when}, 72 s ago: checkpoints/last.pt",
        "at step 100, 541 MB in 1.25 s",
    ]


def test_a_number_and_its_unit_stay_on_one_line_of_a_narrow_column(shown):
    lines = text_of(shown, width=110).splitlines()
    assert sum("  90 %  750 MB + 250 MB" in line for line in lines) == 2
    assert any("at step 100, 541 MB in 1.25 s" in line for line in lines)


def test_a_gpu_whose_driver_has_gone_is_still_named(tmp_path):
    gone = {"index": 0, "name": "NVIDIA H100", "used": None, "total": None, "load": None}
    (gpu,) = panel(view_of(full_run(tmp_path, gpus=[gone]), 302), panels.gpu)
    assert gpu == "0% – of –, H100"


def test_the_newest_events_stand_first_and_troubles_in_their_own_words(shown):
    first, second = panel(shown, panels.events)
    assert first.endswith("trouble worker 3 was killed by signal 9 at 7.1 GB, at step 150")
    assert second.endswith("start at step 0")


def test_of_many_saved_states_the_newest_is_shown(tmp_path):
    saved = [event("saved", s, file="last.pt", seconds=1.0, bytes=1) for s in range(50)]
    write_lines(tmp_path / "log.jsonl", [start(**FAR), *saved])
    assert panel(view_of(tmp_path, 60), panels.saved)[1].startswith("at step 49, ")


def test_a_dead_run_has_causes_and_what_to_do_before_all_else(tmp_path):
    lines = text_of(view_of(full_run(tmp_path / "exp001"), 302 + 3600), width=400).splitlines()
    assert lines[0] == "exp001   DEAD   ended without a last message; last line 1 h 00 min ago"
    assert lines[2].startswith("> probably the kernel's OOM killer: 30.0 GB of 32.0 GB were used")
    assert (
        lines[3].startswith("> python train.py --resume ") and "goes on from step 100" in lines[3]
    )
    assert "run done" not in "".join(lines)


def test_a_resumed_run_says_how_often(tmp_path):
    log = [start(**FAR), step(10), start(10, **FAR, resumed=True), start(10, **FAR, resumed=True)]
    write_lines(tmp_path / "log.jsonl", log)
    again = time.strftime("%H:%M:%S", time.localtime(NOW + 10))
    assert f"resumed 2 ×, last {again}" in text_of(view_of(tmp_path, 20))


# ---------------------------------------------------------------------------- runs with little


def test_an_older_log_without_times_is_shown(tmp_path):
    old = [{"event": "start", "step": 0, "epoch": 0, "versions": {}, "notes": []}]
    old += [{"event": "step", "step": 10, "epoch": 0, "loss": {"total": 0.5}, "lr": 0.01}]
    old += [{"event": "evaluation", "step": 10, "epoch": 0, "scores": {"dice": 0.25}, "cases": {}}]
    write_lines(tmp_path / "log.jsonl", old)
    text = text_of(view_of(tmp_path, 0))
    assert "UNKNOWN" in text and "cannot be shown" not in text and "0.25 at 10" not in text
    for part in ("step 10", "total", "0.5", "dice", "0.25", "system.jsonl has no reading yet"):
        assert part in text


def test_an_empty_folder_is_shown(tmp_path):
    text = text_of(view_of(tmp_path, 0))
    for part in ("nothing has been logged yet", "step 0", "no evaluation yet", "no state yet"):
        assert part in text
    assert "cannot be shown" not in text


def test_a_loss_that_was_not_finite_has_no_value_and_a_gap_in_its_curve(tmp_path):
    losses = [1.0, 3.0, None, 2.0, None]
    log = [step(i, loss={"total": value}, skipped=2) for i, value in enumerate(losses)]
    write_lines(tmp_path / "log.jsonl", [start(**FAR), *log])
    skipped, total = panel(view_of(tmp_path, 9), panels.loss)
    assert total == "total – ▁█ ▅"
    assert skipped == "2 of the last steps made no update"


def test_a_panel_that_cannot_be_shown_says_so_and_the_others_stand(tmp_path):
    full_run(tmp_path, processes=[{"pid": 3}])
    text = text_of(view_of(tmp_path, 302))
    assert "memory  cannot be shown: KeyError('role')" in text
    assert "gpu" in text and "total" in text


def test_codes_of_a_terminal_in_an_error_are_not_passed_on(tmp_path):
    crash = event("crash", 5, error="\x1b[31mbad\x1b[0m\x07")
    write_lines(tmp_path / "log.jsonl", [start(**FAR), crash])
    text = text_of(view_of(tmp_path, 9))
    assert "bad" in text and "\x1b" not in text and "\x07" not in text


# ---------------------------------------------------------------------------- any size


@pytest.mark.parametrize("width", [1, 7, 24, 40, 60, 80, 109, 110, 120, 164, 165, 200, 500])
@pytest.mark.parametrize("height", [None, 1, 3, 8, 15, 24, 40, 60])
def test_no_view_is_larger_than_the_terminal(shown, width, height):
    lines = text_of(shown, width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert height is None or len(lines) <= height


def test_a_terminal_of_80_by_24_has_every_panel_and_says_what_waits(shown):
    text = text_of(shown, 80, 24)
    labels = ("steps", "loss", "score", "time", "memory", "gpu", "host", "cache", "saved", "events")
    for label in labels:
        assert sum(line.startswith(label.ljust(8)) for line in text.splitlines()) == 1, label
    assert "waiting for data" in text and "epoch 2 of 3" in text


def test_what_is_cut_is_counted(tmp_path):
    processes = [process(8 + i, f"worker {i}") for i in range(40)]
    text = text_of(view_of(full_run(tmp_path, processes=processes), 302), 80, 50)
    shown = sum(line.strip().startswith("worker ") for line in text.splitlines())
    assert f"… {40 - shown} more" in text


@pytest.mark.parametrize(("width", "columns"), [(109, 1), (110, 2), (165, 3)])
def test_wide_terminals_have_columns(shown, width, columns):
    first = next(text for text in text_of(shown, width).splitlines() if text.startswith("steps "))
    labels = ("steps", "score", "memory")
    assert sum(f" {label} " in f" {first}" for label in labels) == columns


def test_without_colors_it_is_plain_text_and_with_them_it_is_not(shown):
    plain, colored = io.StringIO(), io.StringIO()
    Console(file=plain, width=90).print(shown)
    Console(file=colored, width=90, force_terminal=True, color_system="256").print(shown)
    assert "\x1b" not in plain.getvalue() and "\x1b[" in colored.getvalue()
    assert "━" in plain.getvalue() and "total" in colored.getvalue()
