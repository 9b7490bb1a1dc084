import io
import time

import pytest
from rich.console import Console

from monitoring import formatting as glyphs
from monitoring import health as vitals
from monitoring import panels as sections
from monitoring import view
from tests.monitoring.test_health import GB, event
from tests.monitoring.test_records import NOW, line, read, start, step, write_lines

FAR = {"host": "far", "pid": 7, "created": NOW - 3, "steps": 300, "iterations": 100}
PARTS = {"wait": 0.6, "transfer": 0.0, "draw": 0.2, "forward": 0.4, "loss": 0.2, "backward": 0.6}


def process(pid, role, **changes):
    found = {"pid": pid, "role": role, "rss": GB, "pss": None, "cpu": 90.0, "status": "running"}
    return {**found, **changes}


def full_run(folder, *, number=150, **changes):
    """A run with something of everything, its last line of system.jsonl at NOW + 2 * number."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("validation: {score: surface_dice}\n")
    log = [start(**FAR)]
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
    machine = {"tree": 20 * GB, "rooms": rooms, "oom_kills": 0, "swap": [GB, 8 * GB]}
    machine |= {
        "shm": [3 * GB, 4 * GB],
        "disk": [500 * GB, 2000 * GB],
        "load": [3.5, 3, 3],
        "cores": 16,
    }
    gpu = {"index": 0, "name": "NVIDIA H100", "used": 40 * GB, "total": 80 * GB, "load": 64}
    machine |= {"temperature": 61.0, "gpus": [{**gpu, "temperature": 58, "power": 412}]}
    processes = [process(7, "training"), process(8, "worker 0"), process(9, "worker 1", cpu=None)]
    last = line(number, seconds=10, **{**machine, "processes": processes, **changes})
    earlier = {**last, "time": NOW, "step": 0, "processes": [process(7, "training", pss=GB // 2)]}
    write_lines(folder / "system.jsonl", [earlier, {**last, "time": NOW + 2 * number}])
    return folder


def view_of(folder, seconds):
    """The view at so many seconds after NOW."""
    run, now = read(folder), NOW + seconds
    return RunView(run, health.RunHealth(run).status(now), health.pace(run, now), now)


def text_of(view, width=100, height=None):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    options = console.options.update(height=height)
    return "".join(segment.text for segment in console.render(view, options))


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


def row(shown, begin, width=100):
    """The one line of a view that begins so, without its label; words apart by one space."""
    lines = [text.plain[glyphs.LABEL :] for text in shown.lines(width)]
    (found,) = [" ".join(text.split()) for text in lines if text.startswith(begin)]
    return found


def labeled_with(shown, label, width=100):
    """The line of a view that has this label."""
    lines = [text.plain for text in shown.lines(width)]
    (found,) = [text for text in lines if text.startswith(label.ljust(glyphs.LABEL))]
    return " ".join(found[glyphs.LABEL :].split())


def test_the_head_tells_name_state_place_and_start(shown):
    first, second, *_ = text_of(shown).splitlines()
    assert first == "exp001   RUNNING   last line 2 s ago"
    begun = time.strftime("%H:%M", time.localtime(NOW))
    assert second == f"host far  pid 7  started {begun}, 5 min ago"


def test_steps_and_epoch_are_told_with_what_is_left(shown):
    # 150 steps of 2 s and two more evaluations of 30 s, less 2 s that have gone.
    done = time.strftime("%H:%M", time.localtime(NOW + 302 + 358))
    run = labeled_with(shown, "run").split(" ", 1)
    assert run[1] == f"50% step 150 of 300 · done {done}, in 6 min"
    assert run[0].count("█") == run[0].count("░") == 12
    assert labeled_with(shown, "epoch").endswith(" 50% 2 of 3, step 50 of 100 · 98 s left")
    rate = "2 s/step, 1800 steps/h · 30 s between epochs"
    assert labeled_with(shown, "rate") == rate


def test_each_part_of_the_loss_has_value_change_and_curve(shown):
    # Means of seven lines: 0.8 after 1.5; the first of 15 is in neither.
    assert labeled_with(shown, "loss").startswith("total 0.5000 ▼ 46.7 % ██")
    assert labeled_with(shown, "loss").endswith("▁")
    assert row(shown, "cldice").startswith("cldice 0.5000 0.0 % ▄▄▄▄")
    assert row(shown, "learning rate").startswith("learning rate 0.0003 ▄")


def test_scores_are_told_with_the_best_and_the_one_that_chooses_first(shown):
    assert labeled_with(shown, "score") == "at 100 best"
    lines = [text.plain.split()[:1] for text in sections.scores(shown, 100)]
    assert [words[0] for words in lines[1:]] == ["surface_dice", "dice", "components"]
    assert row(shown, "surface_dice").startswith("surface_dice 0.9000 0.9000 at 100")
    assert row(shown, "components").startswith("components 7 truth 4")


def test_the_time_of_a_step_is_one_bar_with_its_shares(shown):
    shown.plain = True
    bar, *_ = sections.times(shown, 100)
    counts = [bar.plain.count(mark) for mark in "░▓▒█"]  # wait + backward, draw, forward, loss
    assert counts == [36, 6, 12, 6]
    assert "wait 30 %" in text_of(shown) and "forward 20 %" in text_of(shown)


def test_a_gpu_that_waits_for_data_is_said_in_words(tmp_path):
    text = text_of(view_of(full_run(tmp_path / "a"), 302))
    assert "the GPU waits for data: more training.workers" in text
    idle = [process(8, "worker 0", cpu=20.0), process(9, "worker 1", cpu=30.0)]
    text = text_of(view_of(full_run(tmp_path / "b", processes=idle, gpus=[]), 302))
    assert "training waits for data, the workers for the disk: a larger data.cache_gb" in text


def test_a_gpu_that_is_fed_is_not_complained_of(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "wait", 0.2)
    assert "waits for data" not in text_of(view_of(full_run(tmp_path), 302))


def test_memory_is_told_against_each_limit_the_tightest_first(shown):
    first, second, tree, *_ = (text.plain for text in sections.memories(shown, 80))
    assert first.endswith(" 94%  30.0 of 32.0 GB, cgroup limit")
    assert second.endswith(" 62%  40.0 of 64.0 GB, this machine")
    assert " ".join(tree.split()).startswith("all processes 20.0 GB")


def test_each_process_has_its_memory_and_the_newest_share_that_was_measured(shown):
    assert row(shown, "training") == "training 7 1.0 GB 500 MB 90 %"
    assert row(shown, "worker 0") == "worker 0 8 1.0 GB – 90 %"
    assert row(shown, "worker 1") == "worker 1 9 1.0 GB – –"


def test_a_process_that_stands_still_is_marked(tmp_path):
    processes = [process(8, "worker 0", status="zombie"), process(9, "worker 1", status="sleeping")]
    found = view_of(full_run(tmp_path, processes=processes), 302)
    assert row(found, "worker 0").endswith(" zombie") and row(found, "worker 1").endswith(" %")


def test_gpu_host_cache_and_state_are_told(shown):
    gpu = labeled_with(shown, "GPU")
    assert gpu.endswith(" 50% 40.0 of 80.0 GB, load 64 %, 58 °C, 412 W, H100")
    text = " ".join(text_of(shown).split())
    assert "load 3.5 of 16 cores CPU 61 °C swap 1.0 of 8.0 GB used" in text
    assert "/dev/shm 3.0 of 4.0 GB free disk 0.5 of 2.0 TB free" in text
    cache = "1.0 of 4.0 GB 12 cases hit by 90% of reads 3 given back"
    assert labeled_with(shown, "cache") == cache
    when = time.strftime("%H:%M:%S", time.localtime(NOW + 230))
    saved = f"{when}, 72 s ago: last.pt at step 100, 541 MB in 1.2 s"
    assert labeled_with(shown, "saved") == saved


def test_a_gpu_whose_driver_has_gone_is_still_named(tmp_path):
    gone = {"index": 0, "name": "NVIDIA H100", "used": None, "total": None, "load": None}
    found = view_of(full_run(tmp_path, gpus=[gone]), 302)
    assert labeled_with(found, "GPU").endswith("0% – of –, H100")


def test_the_newest_events_stand_first_and_troubles_in_their_own_words(shown):
    found = [" ".join(text.plain.split()) for text in sections.events(shown, 100)]
    assert found[0].endswith("worker 3 was killed by signal 9 at 7.1 GB")
    assert found[1].endswith("saved last.pt at step 100, 541 MB in 1.2 s")
    assert found[2].endswith("start at step 0")


def test_of_many_saved_states_only_the_newest_is_an_event(tmp_path):
    saved = [event("saved", s, file="last.pt", seconds=1.0, bytes=1) for s in range(50)]
    write_lines(tmp_path / "log.jsonl", [start(**FAR), *saved])
    found = [text.plain for text in sections.events(view_of(tmp_path, 60), 100)]
    assert len(found) == 2 and "at step 49" in found[0] and "start" in found[1]


def test_a_dead_run_says_of_what_and_what_to_do_before_all_else(tmp_path):
    found = text_of(view_of(full_run(tmp_path / "exp001"), 302 + 3600), width=400).splitlines()
    assert found[0] == "exp001   DEAD   ended without a word; no sign of life for 1 h 00 min"
    assert found[2].startswith("> probably the kernel's OOM killer: 30.0 of 32.0 GB were taken")
    assert (
        found[3].startswith("> python train.py ") and "--resume goes on from step 100" in found[3]
    )
    assert "done" not in found[5]


def test_a_resumed_run_says_how_often(tmp_path):
    log = [start(**FAR), step(10), start(10, **FAR, resumed=True), start(10, **FAR, resumed=True)]
    write_lines(tmp_path / "log.jsonl", log)
    again = time.strftime("%H:%M", time.localtime(NOW + 10))
    assert f"resumed 2 times, last {again}" in text_of(view_of(tmp_path, 20))


# ---------------------------------------------------------------------------- runs with little


def test_an_older_log_without_times_is_shown(tmp_path):
    old = [{"event": "start", "step": 0, "epoch": 0, "versions": {}, "notes": []}]
    old += [{"event": "step", "step": 10, "epoch": 0, "loss": {"total": 0.5}, "lr": 0.01}]
    old += [{"event": "evaluation", "step": 10, "epoch": 0, "scores": {"dice": 0.25}, "cases": {}}]
    write_lines(tmp_path / "log.jsonl", old)
    text = text_of(view_of(tmp_path, 0))
    assert "UNKNOWN" in text and "cannot be shown" not in text
    for part in (
        "step 10",
        "total",
        "0.5000",
        "dice",
        "0.2500 at 10",
        "system.jsonl tells nothing",
    ):
        assert part in text


def test_an_empty_folder_is_shown(tmp_path):
    text = text_of(view_of(tmp_path, 0))
    for part in ("nothing has been logged yet", "step 0", "no evaluation yet", "no state yet"):
        assert part in text
    assert "cannot be shown" not in text


def test_the_state_that_lies_there_is_told_where_the_log_tells_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"1" * 3_000_000)
    assert labeled_with(view_of(tmp_path, 0), "saved").endswith("ago: last.pt, 3 MB")


def test_a_loss_that_was_not_finite_has_no_value_and_a_gap_in_its_curve(tmp_path):
    losses = [1.0, 3.0, None, 2.0, None]
    log = [step(i, loss={"total": value}, skipped=2) for i, value in enumerate(losses)]
    write_lines(tmp_path / "log.jsonl", [start(**FAR), *log])
    found = view_of(tmp_path, 9)
    assert labeled_with(found, "loss") == "total – ▼ 33.3 % ▁█ ▅"
    assert "2 of the last steps made no update" in text_of(found)


def test_a_section_that_cannot_be_shown_says_so_and_the_others_stand(tmp_path):
    full_run(tmp_path, processes=[{"pid": 3}])
    text = text_of(view_of(tmp_path, 302))
    assert "memories cannot be shown: KeyError('role')" in text
    assert "GPU" in text and "total" in text


def test_codes_of_a_terminal_in_an_error_are_not_passed_on(tmp_path):
    crash = event("crash", 5, error="\x1b[31mbad\x1b[0m\x07")
    write_lines(tmp_path / "log.jsonl", [start(**FAR), crash])
    text = text_of(view_of(tmp_path, 9))
    assert "bad" in text and "\x1b" not in text and "\x07" not in text


# ---------------------------------------------------------------------------- any size


@pytest.mark.parametrize("width", [24, 40, 60, 80, 109, 110, 120, 164, 165, 200, 320])
def test_no_line_is_wider_than_the_terminal(shown, width):
    lines = [text.plain for text in shown.lines(width)]
    assert max(map(len, lines)) <= width
    assert sum(text.startswith("run ") for text in lines) == 1


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("height", [3, 8, 15, 24, 40, 60])
def test_no_view_is_higher_than_the_terminal(shown, width, height):
    assert len(shown.lines(width, height)) <= height


def test_a_terminal_of_80_by_24_has_a_line_of_everything(shown):
    text = text_of(shown, 80, 24)
    labels = ("run", "epoch", "rate", "loss", "score", "time", "memory", "GPU", "host", "cache")
    for label in (*labels, "saved", "events"):
        assert sum(line.startswith(label.ljust(8)) for line in text.splitlines()) == 1, label
    assert "the GPU waits for data" in text and "2 workers up to 1.0 GB" in text


def test_what_is_cut_is_counted(tmp_path):
    processes = [process(8 + i, f"worker {i}") for i in range(40)]
    found = view_of(full_run(tmp_path, processes=processes), 302)
    sections_, height = [[*map(view.Text, "abcdefgh")], [*map(view.Text, "xyz")]], 7
    cut = [line.plain.strip() for line in view._fitted(sections_, height, fixed=False)]
    assert cut == ["a", "b", "c", "… 5 more", "x", "y", "z"]
    assert "40 workers up to 1.0 GB" in text_of(found, 80, 40)


@pytest.mark.parametrize(("width", "columns"), [(109, 1), (110, 2), (165, 3)])
def test_wide_terminals_have_columns(shown, width, columns):
    first = next(text.plain for text in shown.lines(width) if text.plain.startswith("run "))
    assert (
        sum(f" {label}  " in f" {first}" for label in ("run", "time", "score", "memory")) == columns
    )


def test_without_colours_it_is_plain_text_and_with_them_it_is_not(shown):
    plain, coloured = io.StringIO(), io.StringIO()
    Console(file=plain, width=90).print(shown)
    Console(file=coloured, width=90, force_terminal=True, color_system="256").print(shown)
    assert "\x1b" not in plain.getvalue() and "\x1b[" in coloured.getvalue()
    assert "░" in plain.getvalue() and "total" in coloured.getvalue()
