"""What each loss repairs that BCE + soft Dice leave: plain gradient descent on the logits.

    python benchmarks/repair.py                        # the table, and docs/repair.png
    python benchmarks/repair.py --picture other.png

A prediction with one fault descends BCE + Dice (0.5 each), the same and one term more ("added"),
and all three with weights of the same sum (0.25, 0.25, 0.5: "in place"), at one rate. Printed is
the number of steps until p > 0.5 has the topology of the target (for the displaced sheet: is the
target). The picture shows the probabilities at the step at which the added term was done.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime.composite_loss import composite_loss
from topology.persistence import betti_numbers

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "repair.png"
BASE = {"weighted_bce": {"weight": 0.5}, "soft_dice": {"weight": 0.5}}
HALF = {name: {"weight": 0.25} for name in BASE}
SURE = 2.0  # logits of the first prediction are this and its negative
MOST = 1000  # steps


def broken_bar():
    target = torch.zeros(9, 9, 24)
    target[3:6, 3:6, 2:22] = 1
    fault = target.clone()
    fault[..., 10:14] = 0
    return fault, target, (4,)


def bridged_sheets():
    target = torch.zeros(12, 16, 16)
    target[3:5] = target[8:10] = 1
    fault = target.clone()
    fault[5:8, 8, 8] = 1
    return fault, target, (slice(None), 8)


def sheet_with_a_pinhole():
    target = torch.zeros(9, 16, 16)
    target[4] = 1
    fault = target.clone()
    fault[4, 8, 8] = 0
    return fault, target, (4,)


def displaced_sheet():
    target, fault = torch.zeros(2, 16, 16, 16)
    target[6:8] = fault[8:10] = 1
    return fault, target, (slice(None), 8)


def same_topology(mask, target):
    return betti_numbers(mask) == betti_numbers(target)


CASES = {  # fault, term, weight that is added, rate, when it is done
    "broken bar": (broken_bar, "cldice", 0.5, 50.0, same_topology),
    "bridge of one voxel": (bridged_sheets, "toploss", 0.5, 50.0, same_topology),
    "pinhole": (sheet_with_a_pinhole, "toploss", 0.5, 50.0, same_topology),
    "displaced sheet": (displaced_sheet, "surface_distance", 1.0, 200.0, torch.equal),
}


def descend(fault, target, terms, rate, done, most=MOST):
    """(steps until done or None, logits then)."""
    logits = ((fault * 2 - 1) * SURE)[None, None].requires_grad_()
    for step in range(most + 1):
        if done(logits.detach()[0, 0] > 0, target > 0):
            return step, logits.detach()[0, 0]
        total, _ = composite_loss(logits, target[None, None], None, terms)
        (gradient,) = torch.autograd.grad(total, logits)
        logits.data -= rate * gradient
    return None, logits.detach()[0, 0]


def repair(name):
    """Steps of BCE + Dice, with the term added, with it in place of half; slices to look at."""
    make, term, weight, rate, done = CASES[name]
    fault, target, place = make()
    steps, repaired = descend(fault, target, {**BASE, term: {"weight": weight}}, rate, done)
    alone, _ = descend(fault, target, BASE, rate, done)
    in_place, _ = descend(fault, target, {**HALF, term: {"weight": 0.5}}, rate, done)
    _, then = descend(fault, target, BASE, rate, lambda *_: False, most=steps or MOST)
    shown = [target, *(torch.sigmoid(x) for x in ((fault * 2 - 1) * SURE, then, repaired))]
    return alone, steps, in_place, [x[place] for x in shown]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", default=PICTURE)
    options = parser.parse_args()
    rows = {name: repair(name) for name in CASES}
    heads = ("term", "rate", "BCE+Dice", "added", "in place")
    print(f"{'fault':20s}" + "".join(f"{head:>17s}" for head in heads))
    for name, (*steps, _) in rows.items():
        cells = (
            CASES[name][1],
            f"{CASES[name][3]:g}",
            *("never" if n is None else n for n in steps),
        )
        print(f"{name:20s}" + "".join(f"{cell:>17}" for cell in cells))
    draw(rows, options.picture)


def draw(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.5), dpi=80, layout="constrained")
    axes = figure.subplots(len(rows), 4)
    for line, (name, (alone, steps, _, shown)) in zip(axes, rows.items(), strict=True):
        term = CASES[name][1]
        titles = ["target", "before", f"BCE + Dice, {steps} steps", f"+ {term}, {steps} steps"]
        for axis, title, picture in zip(line, titles, shown, strict=True):
            axis.imshow(picture, cmap="magma", vmin=0, vmax=1, aspect="equal")
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=10)
        line[2].set_xlabel(f"repaired after {alone} steps", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
