"""The view of a run for a terminal of any size: a panel for each subject, in one to three columns.

    console.print(RunView(run, status, now))

Each panel is a function of a view that returns something to print, None if it has nothing to show;
its name is its label. Where the height is limited, as in a live view, lists are shortened.
"""

from dataclasses import dataclass

from rich.console import Group
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from monitoring import health
from monitoring.formatting import clock, duration, format_bytes, format_share, number, sparkline
from monitoring.records import RunRecords, few_names

COLUMN, MOST_COLUMNS = 55, 3  # characters of a column at least, unless it is the only one
ROWS = 40, 12, 7, 4, 2, 1  # of each list, tried until the height is enough
LABEL, CURVE, BAR = 8, 60, 16  # widths in characters; of curves and bars at most
WAITING = 0.15  # of a step: a larger share spent waiting for data is said in words
STANDING_STILL = "zombie", "stopped", "disk-sleep"  # states of a process that does not run
# Colors of medium brightness, to be read on a dark and on a light background.
FAINT, GOOD, WARNING, BAD, FILL = "grey50", "green4", "dark_orange3", "red3", "steel_blue"
STATES = {health.RUNNING: GOOD, health.DONE: "dodger_blue3", health.STOPPED: WARNING}
STATES |= {health.CRASHED: BAD, health.DEAD: BAD, health.UNKNOWN: "grey42"}
EVENTS = {"trouble": BAD, "crash": BAD, "stop": WARNING, "start": "", "end": GOOD}


@dataclass
class RunView:
    """What the records of a run say at the time `now`, in seconds since 1970.

    rows: of each list, at most; width: of a column, in characters.
    """

    run: RunRecords
    status: health.Status
    now: float
    rows: int = ROWS[0]
    width: int = 80

    def __rich_console__(self, console, options):
        for self.rows in ROWS:
            content = self._layout(options.max_width)
            lines = console.render_lines(content, options.update(height=None), pad=False)
            if options.height is None or len(lines) <= options.height:
                break
        for line in lines[: options.height]:
            while line and line[-1].text.isspace():
                line.pop()
            for text, style, _ in line:  # in an error there may be codes of a terminal
                yield Segment("".join(filter(str.isprintable, text)), style)
            yield Segment.line()

    def _layout(self, width):
        panels = steps, score, memory, loss, time, gpu, saved, cache, host
        count = min(MOST_COLUMNS, max(1, width // COLUMN))
        gap = 2 if count > 1 else 0
        self.width = width // count - gap
        grid = Table.grid(padding=(0, gap, 0, 0), pad_edge=True)
        for _ in range(count):  # with a width, as rich would measure all that is in them
            grid.add_column(width=self.width)
        grid.add_row(*(self._stack(panels[i::count], self.width) for i in range(count)))
        return Group(head(self), grid, self._stack([events], width))

    def _stack(self, panels, width):
        """Panels below each other, their labels at the left."""
        stack = Table.grid(padding=(0, 1, 0, 0))
        stack.add_column(style="bold", width=LABEL - 1)
        stack.add_column(width=max(1, width - LABEL))
        for panel in panels:
            try:
                content = panel(self)
            except Exception as error:  # what a log of another version holds may raise anything
                content = Text(f"cannot be shown: {error!r}", BAD)
            if content is not None:
                stack.add_row(panel.__name__, Padding(content, (0, 0, self.rows > 2, 0)))
        return stack

    def bar(self, part, total, full=1.0):
        """Two cells: a bar, and the percentage; BAD in color above the share `full`."""
        share = part / total if part is not None and total else 0.0
        color = BAD if share > full else FILL
        style = {"style": "grey35", "complete_style": color, "finished_style": color}
        width = max(1, min(BAR, self.width // 6))
        return ProgressBar(total=1.0, completed=share, width=width, **style), f"{share:4.0%}"

    def table(self, rows):
        """Rows of cells, the last left out and counted if too many; only the last column wraps."""
        if len(rows) > self.rows:
            rest = Text(f"… {len(rows) - self.rows + 1} more", FAINT)
            rows = [*rows[: self.rows - 1], (rest,)] if self.rows > 2 else rows[: self.rows]
        grid, count = Table.grid(padding=(0, 2, 0, 0)), max(map(len, rows), default=0)
        for index in range(count):
            grid.add_column(no_wrap=index < count - 1)
        for row in rows:
            grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        return grid if rows else None


@dataclass
class Curve:
    """A sparkline as wide as there is room."""

    values: list

    def __rich_console__(self, console, options):
        yield Text(sparkline(self.values, min(CURVE, options.max_width)), "deep_sky_blue3")


def head(view):
    """Name, state, where and since when; for a run that ended too early why, and what to do."""
    run, status, now = view.run, view.status, view.now
    color = STATES[status.state]
    state = (f" {status.state.upper()} ", f"bright_white on {color}")
    first = Text.assemble((run.folder.resolve().name, "bold"), "  ", state, "  ", status.text)
    facts = [f"{k} {v}" for k in ("host", "pid") if (v := run.start.get(k) or run.reading.get(k))]
    starts = [e["time"] for e in run.events if e["event"] == "start" and "time" in e]
    if starts:
        facts.append(f"started {clock(starts[0], now)}, {duration(now - starts[0])} ago")
    if len(starts) > 1:
        facts.append(f"resumed {len(starts) - 1} ×, last {clock(starts[-1], now)}")
    notes = [Text(f"> {note}", color) for note in status.notes]
    lines = Group(first, Text(" · ".join(facts), FAINT), *notes)
    return Padding(lines, (0, 0, view.rows > 2, 0))


def steps(view):
    """How far the run is, when it and its epoch will be done, and how fast it goes."""
    pace, lines = health.pace(view.run, view.now), []
    text = f"step {pace.step} of {pace.steps or '–'}"
    if pace.epoch:
        text += f", epoch {pace.epoch} of {pace.epochs}"
    if view.status.state == health.RUNNING and pace.run_left is not None:
        end = f"{clock(view.now + pace.run_left, view.now)}, in {duration(pace.run_left)}"
        lines.append(f"run done {end} · epoch in {duration(pace.epoch_left)}")
    rate = "no step has been logged since the start"
    if pace.step_seconds:
        rate = f"{number(pace.step_seconds)} s/step, {3600 / pace.step_seconds:.0f} steps/h"
    if pace.between_epochs is not None:
        rate += f" · {duration(pace.between_epochs)} between epochs"
    return Group(view.table([(*view.bar(pace.step, pace.steps), text)]), *lines, rate)


def events(view):
    """Starts, ends and troubles of the run, the newest first."""
    rows = []
    for event in reversed(view.run.events):
        kind = event["event"]
        if kind in EVENTS:
            when = Text(clock(event.get("time"), view.now), FAINT)
            texts = [event.get(key) for key in ("text", "reason", "error")]
            texts += [f"at step {event['step']}", "resumed" if event.get("resumed") else ""]
            text = ", ".join(" ".join(str(text).split()) for text in texts if text)
            rows.append((when, Text(kind, EVENTS[kind]), text))
    return view.table(rows)


def saved(view):
    """The state that a resumed run would go on from: when, which file, how long it took."""
    saves = [event for event in view.run.events if event["event"] == "saved"]
    if not saves:
        return Text("no state yet", FAINT)
    last, when = saves[-1], saves[-1].get("time", view.now)
    return Group(
        f"{clock(when, view.now)}, {duration(view.now - when)} ago: {last.get('file')}",
        f"at step {last['step']}, {format_bytes(last.get('bytes'))} in "
        f"{number(last.get('seconds'))} s",
    )


def loss(view):
    """Each part of the loss: its last value and its curve; the total first."""
    events = view.run.steps
    last, rows = (events or [{}])[-1], []
    for name in sorted(last.get("loss") or {}, key=lambda name: (name != "total", name)):
        style = "bold" if name == "total" else ""
        curve = Curve([(event.get("loss") or {}).get(name) for event in events])
        rows.append((Text(name, style), Text(number(last["loss"][name]), style), curve))
    if last.get("lr") is not None:
        curve = Curve([event.get("lr") for event in events])
        rows.append((Text("learning rate", FAINT), Text(number(last["lr"]), FAINT), curve))
    if last.get("skipped"):
        text = Text(f"{last['skipped']} of the last steps made no update", BAD)
        return Group(text, view.table(rows))
    return view.table(rows)


def score(view):
    """The scores of the last evaluation, and the best with its step; the one that chooses first."""
    run, main, rows = view.run, view.run.start.get("score"), []
    if not run.evaluations:
        return Text("no evaluation yet", FAINT)
    step, last = run.evaluations[-1]
    base = str(main).partition("/")[0]

    def order(name):
        return name != main, name.partition("/")[0] != base, run.best(name)[0] is None, name

    for name in sorted(few_names(last, main), key=order):
        value, best_step = run.best(name)
        best = "" if value is None else f"best {number(value)} at {best_step}"
        style = "bold" if name == main else ""
        curve = Curve([scores.get(name) for _, scores in run.evaluations])
        rows.append((Text(name, style), Text(number(last[name]), style), Text(best, FAINT), curve))
    return view.table([*rows, (Text("at step", FAINT), Text(str(step), FAINT))])


def time(view):
    """Where the time of the last steps went, the largest share first; waiting is said in words."""
    seconds = {k: v or 0 for k, v in ((view.run.steps or [{}])[-1].get("seconds") or {}).items()}
    total, rows = sum(seconds.values()), []
    for name, value in sorted(seconds.items(), key=lambda part: -part[1]):
        rows.append((name, *view.bar(value, total, WAITING if name == "wait" else 1)))
    if seconds.get("wait", 0) <= WAITING * total:
        return view.table(rows)
    hint = "waiting for data: more training.workers or, where these are idle, data.cache_gb"
    return Group(Text(hint, BAD), view.table(rows))


def memory(view):
    """What the run uses of each limit, the tightest first, and what each process uses."""
    reading = view.run.reading
    if not reading:
        return Text("system.jsonl has no reading yet", FAINT)
    limits, processes = [], []
    for free, total, what in sorted(reading.get("rooms") or ()):
        text = f"{format_share(total - free, total)}, {what}"
        limits.append((*view.bar(total - free, total, health.FULL), text))
    curve = Curve([line.get("tree") for line in view.run.readings])
    tree = ("all processes", format_bytes(reading.get("tree")), curve)
    for process in reading.get("processes") or ():
        rss, shared = process.get("rss") or 0, process.get("shared") or 0
        sizes = f"{format_bytes(rss - shared)} + {format_bytes(shared)} shared"
        state = process["status"] if process.get("status") in STANDING_STILL else ""
        cpu = f"{number(process.get('cpu'))} % {state}"
        processes.append((process["role"], str(process["pid"]), cpu.rstrip(), sizes))
    return Group(*(view.table(rows) for rows in (limits, [tree], processes) if rows))


def gpu(view):
    """Memory, load, temperature and power of each GPU, and what the run keeps of its memory."""
    rows, units = [], {"load": "load {:.0f} %", "temperature": "{:.0f} °C", "power": "{:.0f} W"}
    for gpu in view.run.reading.get("gpus") or ():
        used, total = gpu.get("used"), gpu.get("total")
        texts = [text.format(gpu[key]) for key, text in units.items() if gpu.get(key) is not None]
        if gpu.get("reserved"):
            texts.insert(0, f"{format_bytes(gpu['reserved'])} by this process")
        texts = [format_share(used, total), *texts, str(gpu.get("name")).removeprefix("NVIDIA ")]
        rows.append((*view.bar(used, total, health.FULL_GPU), ", ".join(texts)))
    return view.table(rows)


def host(view):
    """Load, swap, shared memory, disk: what else the machine reports."""
    reading, texts = view.run.reading, []
    if reading.get("load"):
        texts.append(f"load {reading['load'][0]:.1f} of {reading.get('cores') or '–'} cores")
    names = {"swap": "swap {} used", "shm": "/dev/shm {} free", "disk": "disk {} free"}
    texts += [t.format(format_share(*reading[k])) for k, t in names.items() if reading.get(k)]
    if reading.get("new_oom_kills"):
        texts.append(f"OOM kills {reading['new_oom_kills']}")
    return Text(" · ".join(texts)) if texts else None


def cache(view):
    """What the cache of case files holds, by the last epoch."""
    epochs = [event for event in view.run.events if event["event"] == "epoch"]
    counts = (epochs or [{}])[-1].get("cache") or {}
    if not counts.get("budget"):
        return None
    texts = [format_share(counts.get("bytes"), counts["budget"])]
    texts += [f"{counts[name]} {name}" for name in ("cases", "hits", "misses", "evictions")]
    return Text(" · ".join(texts))
