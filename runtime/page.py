"""The page of a sweep: one HTML file that needs no other and no network."""

import base64
import html
from pathlib import Path

from monitoring.formatting import format_bytes
from scoring import report
from volumes import atomic

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1.5em;
  color: #222; background: #fff }
h1 { font-size: 1.6em } h2 { font-size: 1.15em; margin-top: 2em }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.failed td:last-child, tr.stopped td:last-child { white-space: normal; min-width: 16em }
th { cursor: pointer; background: #f3f3f3 } th:hover { background: #e4e4e4 }
th[data-order="1"]::after { content: " \\25b2" } th[data-order="-1"]::after { content: " \\25bc" }
div.wide + div.wide { margin-top: 1.2em }
tr.failed td, tr.stopped td { color: #b00020 }
img { max-width: 100%; height: auto } p.note { color: #555; max-width: 60em }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
"""
# A click on a heading sorts by it, a second one the other way; what is no number goes last.
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const order = head.dataset.order == "-1" ? 1 : -1;
  for (const other of table.querySelectorAll("th")) delete other.dataset.order;
  head.dataset.order = order;
  const text = row => row.cells[column].textContent;
  const texts = [...body.rows].map(text).filter(t => t);
  const numbers = texts.every(t => !isNaN(parseFloat(t)));
  const before = (a, b) => numbers ? parseFloat(a) - parseFloat(b) : a.localeCompare(b);
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [text(a), text(b)];
    return !x || !y ? !x - !y : order * before(x, y);
  }));
};
"""


def write_page(path, title, tables, notes, entries, *, names, pictures, sweep_file):
    """Write the page of a sweep.

    tables: [(headings, rows of texts)], and notes under them; entries: lines of the ledger; names:
    of the scores, the main one first; pictures: [(title, bytes of a PNG)].
    """
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>Variants</h2>"]
    parts += [_table(heads, texts) for heads, texts in tables]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    parts += ["<h2>Runs</h2>", _runs(entries, names)]
    for heading, png in pictures:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        heading = html.escape(heading)
        parts.append(f'<h2>{heading}</h2><img alt="{heading}" src="{source}">')
    text = html.escape(Path(sweep_file).read_text(encoding="utf-8"))
    parts.append(f"<h2>{html.escape(str(sweep_file))}</h2><pre>{text}</pre>")
    content = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + f"\n<script>{SCRIPT}</script></html>\n"
    )
    with atomic.replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")


def _runs(entries, names):
    """The table of the runs."""
    texts = []
    for entry in entries:
        scores = [report.format_score(entry["scores"].get(name), name) for name in names]
        memory = [format_bytes(entry[key]) for key in ("peak_memory", "peak_gpu_memory")]
        status = f"{entry['status']}: {entry['reason']}" if entry["reason"] else entry["status"]
        texts.append([entry["run"], *scores, f"{entry['seconds']:.0f} s", *memory, status])
    heads = ["run", *names, "training", "memory", "GPU memory", "status"]
    return _table(heads, texts, [entry["status"] for entry in entries])


def _table(heads, texts, classes=None):
    """A table of texts that sorts by click; classes: of its rows."""
    head = "".join(f"<th>{html.escape(text.replace('_', ' '))}</th>" for text in heads)
    body = "\n".join(
        f'<tr class="{kind}">{"".join(f"<td>{html.escape(text)}</td>" for text in row)}</tr>'
        for kind, row in zip(classes or [""] * len(texts), texts, strict=True)
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
