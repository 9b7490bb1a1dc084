"""What gpu_check.py measures by name, and what is asked of its figures."""

LIMITS_GB = (16, 12, 10, 8, 7, 6, 5, 4, 3.5, 3, 2.5)  # of the ladder
PLAIN_TERMS = ("weighted_bce", "soft_dice")
ALL, PLAIN, RECOMPUTED = "ours, all terms", "ours, BCE + Dice", "ours, all terms, recomputing"
PATCHES = "patches: largest difference of image; voxels of target, valid"
CURVES = "30 steps: loss in fp32, bf16, fp16"
RESUMED = "deterministic: resumed equals straight, bit for bit"


def peers_step(results):
    """Seconds of the fastest one."""
    rows = [row for name, row in results["step"].items() if not name.startswith("ours")]
    return min(row["s"] for row in rows if isinstance(row, dict) and "s" in row)


def worst(results, start, which=None):
    """The largest figure of the rows of `equal` that begin like this."""
    found = [value for name, value in results["equal"].items() if name.startswith(start)]
    return max(value if which is None else value[which] for value in found)


def ladder_end(results):
    """The least memory under which a step went on, with the gradient of one that had enough."""
    rows = {limit: results["ladder"].get(f"{limit} GB", ["not run"])[0] for limit in LIMITS_GB}
    good = [limit for limit, outcome in rows.items() if isinstance(outcome, float)]
    return min(limit for limit in good if rows[limit] < 0.05)  # bf16, and other convolutions


def fastest(results, whose):
    return min(s for name, s in results["inference"].items() if name.startswith(whose))


# (what, its figure from the results, how it must compare, with what, what is aimed at)
TARGETS = (
    ("equal: image of patches", lambda r: r["equal"][PATCHES]["image"], "<=", 1e-4, ""),
    ("equal: voxels of target", lambda r: r["equal"][PATCHES]["target"], "<=", 0, ""),
    ("equal: voxels of valid", lambda r: r["equal"][PATCHES]["valid"], "<=", 0, ""),
    ("equal: losses", lambda r: worst(r, "loss ", 0), "<=", 1e-6, ""),
    ("equal: gradients of losses", lambda r: worst(r, "loss ", 1), "<=", 1e-5, ""),
    ("equal: distances", lambda r: worst(r, "truncated_edt"), "<=", 1e-6, ""),
    ("equal: windows in fp32", lambda r: worst(r, "windows fp32"), "<=", 1e-5, ""),
    ("equal: windows in bf16", lambda r: worst(r, "windows bf16"), "<=", 1e-2, ""),
    ("equal: windows in fp16", lambda r: worst(r, "windows fp16"), "<=", 2e-3, ""),
    (
        "equal: loss after 30 steps, by precision",
        lambda r: max(r["equal"][CURVES]) - min(r["equal"][CURVES]),
        *("<=", 0.01, ""),
    ),
    ("ladder: GB under which a step goes on", ladder_end, "<=", 3, ""),
    ("tests: exit status", lambda r: r["tests"]["exit status"], "<=", 0, ""),
    (
        "train: resumed equals straight",
        lambda r: int(r["train"][RESUMED]),
        *(">=", 1, ""),
    ),
    ("train: share of waiting", lambda r: r["train"]["wait share"], "<=", 0.01, ""),
    ("train: GPU load, percent", lambda r: r["train"]["GPU load, percent"], ">=", 95, ""),
    ("train: seconds of a step", lambda r: r["train"]["step seconds"], "<=", 0.10, "aim 0.08"),
    ("step: seconds, all terms", lambda r: r["step"][ALL]["s"], "<=", 0.10, "aim 0.08"),
    (
        "step: fastest peer / ours of all terms",
        lambda r: peers_step(r) / r["step"][ALL]["s"],
        *(">=", 1.3, "aim 1.6"),
    ),
    (
        "step: time of all terms / of BCE + Dice",
        lambda r: r["step"][ALL]["s"] / r["step"][PLAIN]["s"],
        *("<=", 1.1, ""),
    ),
    (
        "step: memory of all terms / of BCE + Dice",
        lambda r: r["step"][ALL]["GB"] / r["step"][PLAIN]["GB"],
        *("<=", 1.1, ""),
    ),
    ("step: GB, all terms", lambda r: r["step"][ALL]["GB"], "<=", 14, ""),
    ("step: GB, recomputing", lambda r: r["step"][RECOMPUTED]["GB"], "<=", 8, ""),
    (
        "inference: MONAI's seconds / ours",
        lambda r: fastest(r, "MONAI") / fastest(r, "ours"),
        *(">=", 1.0, ""),
    ),
)


def judge(results, sections, small):
    """(what, {"verdict", "value", "asked"}) of the targets of these sections."""
    for name, figure, way, bar, aim in TARGETS:
        if name.split(":")[0] not in sections:
            continue
        try:
            value = figure(results)
        except (KeyError, TypeError, ValueError):  # it was not reached, or had an error
            yield name, {"verdict": "not measured"}
            continue
        met = value <= bar if way == "<=" else value >= bar
        verdict = "not judged, it is small" if small else "met" if met else "NOT MET"
        asked = f"{way} {bar}" + f" ({aim})" * bool(aim)
        yield name, {"verdict": verdict, "value": round(value, 9), "asked": asked}
