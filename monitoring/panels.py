"""What a view says of a run, a section at a time: lines of text that are so many characters wide.

Each section is a function (view, width) that returns a list of texts of rich, empty if there is
nothing to say. Of a `view.View` they read run, verdict, pace, now, plain and compact.
"""

import textwrap

from rich.text import Text

from monitoring import health as vitals
from monitoring.formatting import (
    BAD,
    FAINT,
    FILL,
    LABEL,
    bars,
    clock,
    duration,
    flowing,
    labeled,
    number,
    size,
    sizes,
    table,
    with_curves,
)

WAITS = 0.15  # of a step: more than this spent waiting for data is said in words
IDLE = 50.0  # percent of a core: workers below it wait themselves, for the disk
# Colours of middling brightness, to be read on a dark and on a light background.
STATES = {
    vitals.RUNNING: "bright_white on green4",
    vitals.DONE: "bright_white on dodger_blue3",
    vitals.STOPPED: "bright_white on dark_orange3",
    vitals.CRASHED: "bright_white on red3",
    vitals.DEAD: "bright_white on red3",
    vitals.UNKNOWN: "bright_white on grey42",
}
PARTS = {
    "wait": "red3",
    "transfer": "dark_orange3",
    "draw": "dark_goldenrod",
    "forward": "deep_sky_blue3",
    "loss": "medium_purple3",
    "backward": "steel_blue",
    "optimiser": "grey50",
}
PATTERNS = "░▓▒█"  # of the parts of a bar, where there are no colours
GPU_FACTS = ("load", "load {:.0f} %"), ("temperature", "{:.0f} °C"), ("power", "{:.0f} W")
FULL_GPU = 0.97  # of its memory; what torch keeps for itself counts as taken
MARKS = {"trouble": BAD, "crash": BAD, "stop": "dark_orange3", "end": "green4"}


# ---------------------------------------------------------------------------- the whole run


def head(view, width):
    """Name, state, where and since when; for a run that ended too early why, and what to do."""
    run, verdict = view.run, view.verdict
    lines = [Text.assemble((run.folder.resolve().name, "bold"), "  ")]
    lines[0].append(f" {verdict.state.upper()} ", STATES[verdict.state])
    if len(lines[0]) + 2 + len(verdict.text) <= width:
        lines[0].append(f"  {verdict.text}")
    else:
        lines += map(Text, textwrap.wrap(verdict.text, width))
    where = flowing([((fact, FAINT),) for fact in _where(view)], width)
    lines += where[:1] if view.compact else where
    for note in verdict.notes:
        wrapped = textwrap.wrap(note, width, initial_indent="> ", subsequent_indent="  ")
        lines += [Text(line, STATES[verdict.state].split()[-1]) for line in wrapped]
    return lines


def _where(view):
    """Host, process, start and resumes, as texts."""
    run, now = view.run, view.now
    last = vitals.last_line(run)
    known = {name: run.start.get(name) or last.get(name) for name in ("host", "pid")}
    facts = [f"{name} {value}" for name, value in known.items() if value is not None]
    starts = [event for event in run.events if event["event"] == "start"]
    if starts and starts[0].get("time"):
        ago = duration(now - starts[0]["time"])
        facts.append(f"started {clock(starts[0]['time'], now, seconds=False)}, {ago} ago")
    if len(starts) > 1:
        times = "once" if len(starts) == 2 else f"{len(starts) - 1} times"
        last = clock(starts[-1].get("time"), now, seconds=False)
        facts.append(f"resumed {times}, last {last}")
    return facts


def progress(view, width):
    """How far the run and its epoch are, when they will be done, and how fast it goes."""
    pace, room = view.pace, width - LABEL
    rate = labeled("rate", [Text(_rate(pace))])
    if not pace.steps:
        return labeled("run", [Text(f"step {pace.step}")]) + rate
    rows = [(pace.step / pace.steps, _far(view), FILL)]
    if pace.iterations:
        rows.append((pace.in_epoch / pace.iterations, _epoch(view), FILL))
    run, *epoch = bars(rows, room)
    return labeled("run", [run]) + labeled("epoch", epoch) + rate


def _far(view):
    """Texts on the run, from long to short."""
    pace = view.pace
    texts = [f"step {pace.step} of {pace.steps}", f"{pace.step}/{pace.steps}"]
    if view.verdict.state != vitals.RUNNING or pace.run_left is None:
        return texts
    finish = clock(view.now + pace.run_left, view.now, seconds=False)
    left = f"done {finish}, in {duration(pace.run_left)}"
    return [f"{text} · {left}" for text in texts] + [f"{texts[1]} · done {finish}"]


def _epoch(view):
    """Texts on the epoch, from long to short."""
    pace = view.pace
    of = "" if pace.epochs is None else f" of {pace.epochs}"
    texts = [f"{pace.epoch}{of}, step {pace.in_epoch} of {pace.iterations}", f"{pace.epoch}{of}"]
    if view.verdict.state == vitals.RUNNING and pace.epoch_left is not None:
        texts = [f"{text} · {duration(pace.epoch_left)} left" for text in texts]
    return texts


def _rate(pace):
    if pace.seconds is None:
        return "no step has been logged since the start"
    text = f"{number(pace.seconds)} s/step, {3600 / max(pace.seconds, 1e-9):.0f} steps/h"
    if pace.between is not None:
        text += f" · {duration(pace.between)} between epochs"
    return text


def events(view, width):
    """The run's history, the newest first: troubles, starts, ends, and the last saved state."""
    told = _history(view.run, 3 if view.compact else 12)
    times = [clock(event.get("time"), view.now) for event in told]
    column = max(map(len, times), default=0) + 2
    lines, indent = [], column + 9
    for event, when in zip(told, times, strict=True):
        kind, words = event["event"], " ".join(_told(event).split())
        first, *others = textwrap.wrap(words, max(20, width - LABEL - indent)) or [""]
        marked = (f"{kind:9}", MARKS.get(kind, ""))
        lines.append(Text.assemble((f"{when:{column}}", FAINT), marked, first))
        lines += [Text(" " * indent + line) for line in others]
    return labeled("events", lines)


def _history(run, count):
    """The last events that are worth a line, the newest first; of saved states only one."""
    found, kinds = [], {"trouble", "saved", "start", "stop", "crash", "end"}
    for event in reversed(run.events):
        if event["event"] in kinds:
            found.append(event)
            kinds -= {event["event"]} & {"saved"}
        if len(found) == count:
            break
    return found


def _told(event):
    """One event in words."""
    kind, step = event["event"], event.get("step")
    if kind == "trouble":
        return str(event.get("text") or event.get("kind") or "")
    if kind == "saved":
        took = f" in {event['seconds']:.1f} s" if event.get("seconds") is not None else ""
        return f"{_name(event.get('file'))} at step {step}, {size(event.get('bytes'))}{took}"
    if kind == "start":
        return f"at step {step}" + (", resumed" if event.get("resumed") else "")
    reason = event.get("reason") or event.get("error") or ""
    return f"at step {step}" + (f": {reason}" if reason else "")


def _name(file):
    return str(file or "state").rsplit("/", 1)[-1]


# ---------------------------------------------------------------------------- learning


def losses(view, width):
    """Each part of the loss: its last value, its change, its curve; the total first."""
    run, recent = view.run, view.run.recent
    last = (recent or run.steps or [{}])[-1]
    parts = last.get("loss") or {}
    names = sorted(parts, key=lambda name: (name != "total", name))
    rows = []
    for name in names:
        values = [(event.get("loss") or {}).get(name) for event in recent]
        style = "bold" if name == "total" else ""
        rows.append([(name, style), (number(parts[name]), style), (_change(values), FAINT)])
    curves = [_curve(run, "loss", name) for name in names]
    if last.get("lr") is not None:
        rows.append([("learning rate", FAINT), (number(last["lr"]), FAINT), ("", "")])
        curves.append(_curve(run, "lr"))
    if view.compact:
        rest = [(f"{name} {value}",) for (name, _), (value, _), _ in rows[1:]]
        lines = with_curves(rows[:1], curves[:1], width - LABEL) + flowing(rest, width - LABEL)
    else:
        lines = with_curves(rows, curves, width - LABEL)
    if last.get("skipped"):
        lines.append(Text(f"{last['skipped']} of the last steps made no update", BAD))
    return labeled("loss", lines)


def _curve(run, *keys):
    """The values that stand under these keys, one in the other, in step events, oldest first."""
    values = run.steps
    for key in keys:
        values = [(value or {}).get(key) for value in values]
    return values


def _change(values):
    """Of the mean of the last lines, ten at most, against as many before them, in percent."""
    values = [value for value in values if isinstance(value, int | float)]
    count = min(10, len(values) // 2)
    if not count or not (before := sum(values[-2 * count : -count])):
        return ""
    percent = 100 * (sum(values[-count:]) / before - 1)
    arrow = " " if abs(percent) < 0.05 else "▲" if percent > 0 else "▼"
    return f"{arrow} {abs(percent):.1f} %"


def scores(view, width):
    """The scores of the last evaluation, and the best with its step; the one that chooses first."""
    found = vitals.evaluations(view.run)
    if not found:
        return labeled("score", [Text("no evaluation yet", FAINT)])
    chooses = (view.run.config.get("validation") or {}).get("score")
    step, last = found[-1]
    names = [name for name in last if name != "components_truth"]
    names.sort(key=lambda n: (n != chooses, n.endswith("_loss"), n == "components", n))
    rows = [[("", ""), (f"at {step}", FAINT), ("best", FAINT)]]
    for name in names:
        value, at = vitals.best_score(view.run, name)
        if name == "components" and "components_truth" in last:
            best = f"truth {number(last['components_truth'])}"
        else:
            best = "" if value is None else f"{number(value)} at {at}"
        style = "bold" if name == chooses else ""
        rows.append([(name, style), (number(last[name]), style), (best, FAINT)])
    curves = [[], *([one.get(name) for _, one in found] for name in names)]
    if view.compact:
        rest = [(f"{name} {value}",) for (name, _), (value, _), _ in rows[2:]]
        lines = with_curves(rows[1:2], curves[1:2], width - LABEL)
        return labeled("score", lines + flowing(rest, width - LABEL))
    return labeled("score", with_curves(rows, curves, width - LABEL))


def times(view, width):
    """Where the time of the last steps went, as one bar; in words if it went into waiting."""
    seconds = (view.run.recent or view.run.steps or [{}])[-1].get("seconds") or {}
    parts = [(name, value) for name, value in seconds.items() if value]
    total = sum(value for _, value in parts)
    if not total:
        return []
    room = min(60, width - LABEL)
    whole, texts, reached = Text(), [], 0.0
    for index, (name, value) in enumerate(parts):
        begin, reached = round(reached / total * room), reached + value
        mark = PATTERNS[index % len(PATTERNS)] if view.plain else "█"
        style = PARTS.get(name, "")
        whole.append(mark * (round(reached / total * room) - begin), style)
        texts.append(((mark + " ", style), f"{name} {100 * value / total:.0f} %"))
    waits = seconds.get("wait", 0) > WAITS * total
    hint = [Text(_waiting(view.run), BAD)] * waits
    return labeled("time", [whole, *hint, *flowing(texts, width - LABEL)])


def _waiting(run):
    line = vitals.last_line(run)
    who = "the GPU waits" if line.get("gpus") else "training waits"
    workers = [one for one in line.get("processes") or () if one["role"].startswith("worker")]
    busy = [one["cpu"] for one in workers if one.get("cpu") is not None]
    if busy and sum(busy) < IDLE * len(busy):
        return f"{who} for data, the workers for the disk: a larger data.cache_gb"
    return f"{who} for data: more training.workers"


# ---------------------------------------------------------------------------- the machine


def memories(view, width):
    """What the run takes against each limit, the tightest first, and what each process takes."""
    line, room = vitals.last_line(view.run), width - LABEL
    if not line:
        return labeled("memory", [Text("system.jsonl tells nothing", FAINT)])
    rooms = sorted(line.get("rooms") or (), key=lambda one: one[0])
    lines = bars([_room(*one) for one in rooms[: 1 if view.compact else None]], room)
    tree = [[("all processes", ""), (size(line.get("tree")), "")]]
    lines += with_curves(tree, [[one.get("tree") for one in view.run.samples]], room)
    found = line.get("processes") or []
    lines += _roles(found, room) if view.compact else _processes(view.run, found)
    return labeled("memory", lines)


def _room(free, total, what):
    """What `bars` takes of a limit."""
    taken, share = sizes(total - free, total), (total - free) / total if total else 0.0
    texts = [f"{taken}, {what.removeprefix('memory of ')}", taken]
    return share, texts, BAD if share > vitals.FULL else FILL


def _roles(found, room):
    """What processes take, those that share the first word of their role together."""
    texts, roles = [], [one["role"].split(" ")[0] for one in found]
    for role in dict.fromkeys(roles):
        taken = [one.get("rss") or 0 for one, own in zip(found, roles, strict=True) if own == role]
        name = role if len(taken) == 1 else f"{len(taken)} {role}s up to"
        texts.append((f"{name} {size(max(taken))}",))
    return flowing(texts, room) if texts else []


def _processes(run, found):
    """A row for each process: memory with shared pages in full and by proportion, and CPU."""
    rows = [[(text, FAINT) for text in ("process", "pid", "RSS", "PSS", "CPU", "")]]
    for one in found:
        pss = next((p for p in map(_own(one["pid"]), reversed(run.lines)) if p is not None), None)
        cpu = "–" if one.get("cpu") is None else f"{one['cpu']:.0f} %"
        odd = one.get("status") in ("zombie", "stopped", "disk-sleep")
        status = one["status"] if odd else ""
        texts = (one["role"], str(one["pid"]), size(one.get("rss")), size(pss), cpu)
        rows.append([*((text, "") for text in texts), (status, BAD)])
    return table(rows) if found else []


def _own(pid):
    """A function of a line of system.jsonl: the proportional size that it tells of a process."""
    return lambda line: next(
        (one.get("pss") for one in line.get("processes") or () if one.get("pid") == pid), None
    )


def gpus(view, width):
    """Memory, load, temperature and power of each GPU."""
    rows = []
    for gpu in vitals.last_line(view.run).get("gpus") or ():
        used, total = gpu.get("used"), gpu.get("total")
        share = used / total if used is not None and total else 0.0
        facts = [sizes(used, total)]
        facts += [text.format(gpu[key]) for key, text in GPU_FACTS if gpu.get(key) is not None]
        name = str(gpu.get("name") or "").removeprefix("NVIDIA ")
        texts = [", ".join([*facts, name]), ", ".join(facts), ", ".join(facts[:3])]
        rows.append((share, texts, BAD if share > FULL_GPU else FILL))
    return labeled("GPU", bars(rows, width - LABEL))


def host(view, width):
    """Load, temperature, swap, shared memory, disk: what else the machine tells."""
    line, texts = vitals.last_line(view.run), []
    if line.get("load"):
        texts.append(f"load {line['load'][0]:.1f} of {line.get('cores') or '–'} cores")
    if (degrees := _newest(view.run, "temperature")) is not None:
        texts.append(f"CPU {degrees:.0f} °C")
    for key, name in (("swap", "swap"), ("shm", "/dev/shm"), ("disk", "disk")):
        first, total = line.get(key) or (None, None)
        if total:
            texts.append(f"{name} {sizes(first, total)} {'used' if key == 'swap' else 'free'}")
    if line.get("oom_kills"):
        texts.append(f"OOM kills {line['oom_kills']}")
    return labeled("host", flowing([(text,) for text in texts], width - LABEL)) if texts else []


def _newest(run, key):
    """The newest value of a key of system.jsonl that is not null, or None."""
    return next((x[key] for x in reversed(run.lines) if x.get(key) is not None), None)


def cache(view, width):
    """What the cache of case files holds, by the last epoch."""
    ended = [event for event in view.run.events if event["event"] == "epoch"]
    counts = (ended[-1].get("cache") if ended else None) or {}
    if not counts.get("budget"):
        return []
    texts = [sizes(counts.get("bytes"), counts["budget"]), f"{counts.get('cases')} cases"]
    reads = (counts.get("hits") or 0) + (counts.get("misses") or 0)
    texts += [f"hit by {counts['hits'] / reads:.0%} of reads"] if reads else []
    texts += [f"{counts['evictions']} given back"] if counts.get("evictions") else []
    return labeled("cache", flowing([(text,) for text in texts], width - LABEL))


def saved(view, width):
    """The state that a resumed run would go on from: when, which file, how long it took."""
    last = next((e for e in reversed(view.run.events) if e["event"] == "saved"), None)
    path = view.run.folder / "checkpoints" / "last.pt"
    if last is not None:
        when, text = last.get("time"), _told(last)
    elif path.exists():
        when, text = path.stat().st_mtime, f"last.pt, {size(path.stat().st_size)}"
    else:
        return labeled("saved", [Text("no state yet", FAINT)])
    ago = "" if when is None else f", {duration(view.now - when)} ago"
    texts = [(clock(when, view.now) + ago + ":",), (text,)]
    return labeled("saved", flowing(texts, width - LABEL))
