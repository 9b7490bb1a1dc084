"""Tables of scores for a terminal."""

from rich.table import Table

from scoring import metrics
from scoring import report as leaderboard


def print_scores(console, rows, names, unit, cases):
    """A row for each of rows; those after the first `cases` are set apart."""
    several = len(leaderboard.methods_of(rows)) > 1
    table = Table()
    for head in ["case"] + ["method"] * several:
        table.add_column(head, no_wrap=True)
    for name in names:
        table.add_column(heading(name, rows[0]["tolerance"], unit), justify="right")
    for i, row in enumerate(rows):
        if i == cases:
            table.add_section()
        values = [shown(row[name], name) for name in names]
        table.add_row(row["case"], *[row["method"]] * several, *values)
    console.print(table)


def print_leaderboard(console, standings, rank, cases):
    """A row for each `leaderboard.Standing`, of so many cases, by the score named rank."""
    table = Table(title=f"leaderboard by {rank}", title_justify="left")
    table.add_column("method", no_wrap=True)
    for head in ("mean", "95 %", "to the best", "95 %", "ahead", "behind"):
        table.add_column(head, justify="right")
    for one in standings:
        table.add_row(
            one.method,
            shown(one.mean, rank),
            _interval(one.interval),
            "" if one.difference is None else f"{one.difference:+.3f}",
            _interval(one.difference_interval, "+"),
            "" if one.ahead is None else str(one.ahead),
            "" if one.behind is None else str(one.behind),
        )
    console.print(table)
    if 1 < cases < leaderboard.FEW:
        console.print(f"note: of {cases} cases; such intervals are too narrow of so few")


def _interval(found, sign=""):
    return "" if found is None else f"{found[0]:{sign}.3f} to {found[1]:{sign}.3f}"


def heading(name, tolerance, unit):
    if name == "surface_dice":
        return f"surface dice @ {tolerance:g} {unit}".rstrip()
    return "in truth" if name == "components_truth" else name.replace("_", " ")


def shown(value, name):
    """A score for people: counts as they are, means of counts and all else to three digits."""
    if value is None:
        return ""
    if isinstance(value, int) or metrics.entry(name)[0].better is None:
        return f"{value:g}"
    return f"{value:.3f}"
