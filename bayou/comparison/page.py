"""report.html: the table, the plot and where in the model each file loses what, in one file that loads nothing else."""

import math
from html import escape
from typing import Any

from bayou.comparison.columns import columns, notes, rows
from bayou.inventory import natural

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em }
body { color: #222; background: #fff }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.figures th, .figures td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd }
.figures td { white-space: nowrap } .figures td.reason { white-space: normal }
.figures th:first-child, .figures td:first-child, .figures td.reason { text-align: left }
.heat td { width: 1.9em; height: 1.6em; font-size: 10px; text-align: center; padding: 0; border: 1px solid #fff }
.heat th { font-weight: normal; font-size: 11px; padding: 0 .5em; text-align: right }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto } .note { color: #555; font-size: 13px }
dt { float: left; clear: left; width: 9em; color: #555 } dd { margin-left: 9em }
"""


def html(state: dict[str, Any], picture: str) -> str:
    """The page of a comparison (rows.compare). picture: its plot as SVG, or "" for none."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>bayou compare: {escape(state['finetuned'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(state['finetuned'])} as a difference from {escape(state['base'])}</h1>",
        _figures(state),
        *(f'<p class="note">{escape(line)}</p>' for line in notes(state)),
        f'<h2>KL and error against bytes</h2><div class="wide">{picture[picture.index("<svg") :]}</div>'
        if picture
        else "",
        _maps(state),
        _settings(state),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _figures(state: dict[str, Any]) -> str:
    headings = ["", *columns(state)]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = ""
    for name, cells in rows(state):
        if len(cells) == 1:
            rest = f'<td class="reason" colspan="{len(headings) - 1}">{escape(cells[0])}</td>'
        else:
            rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr><td>{escape(name)}</td>{rest}</tr>"
    return f'<div class="wide"><table class="figures"><tr>{head}</tr>{body}</table></div>'


def _maps(state: dict[str, Any]) -> str:
    """A map a candidate, all on one scale of colours; the first is open."""
    shown = [row for row in state["candidates"] if row.get("cells")]
    values = [cell["output"] for row in shown for cell in row["cells"] if cell["output"] > 0]
    if not values:
        return ""
    low, high = min(values), max(values)
    parts = [
        "<h2>Error by layer and kind of matrix</h2>",
        '<p class="note">Relative error of the delta\'s output over the calibration text (of the delta itself where '
        "there is none, and for embeddings), in hundredths; colours go by its logarithm, from "
        f"{low:.3g} to {high:.3g}. Point at a cell for both errors.</p>",
    ]
    for number, row in enumerate(shown):
        title = escape(f"{row['method']} 1/{row['asked']:g}")
        is_open = " open" if number == 0 else ""
        parts.append(f"<details{is_open}><summary>{title}</summary>{_map(row['cells'], low, high)}</details>")
    return "\n".join(parts)


def _map(cells: list[dict[str, Any]], low: float, high: float) -> str:
    kinds = sorted({cell["kind"] for cell in cells}, key=natural)
    layers = sorted({cell["layer"] for cell in cells if cell["layer"] is not None})
    by_place = {(cell["kind"], cell["layer"]): cell for cell in cells}
    alone = any(cell["layer"] is None for cell in cells)
    columns = [*layers, *([None] if alone else [])]
    head = "".join(f"<th>{'' if layer is None else layer}</th>" for layer in columns)
    body = ""
    for kind in kinds:
        body += f"<tr><th>{escape(kind)}</th>"
        for layer in columns:
            cell = by_place.get((kind, layer))
            body += "<td></td>" if cell is None else _cell(cell, low, high)
        body += "</tr>"
    return f'<div class="wide"><table class="heat"><tr><th></th>{head}</tr>{body}</table></div>'


def _cell(cell: dict[str, Any], low: float, high: float) -> str:
    value = cell["output"]
    share = 0.0 if value <= 0 or high <= low else (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    # From nearly white to a dark red, on which the figure is white.
    red, green, blue = (round(start + share * (end - start)) for start, end in ((255, 165), (247, 15), (236, 21)))
    place = cell["kind"] if cell["layer"] is None else f"layer {cell['layer']}, {cell['kind']}"
    title = f"{place}: output {value:.4f}, delta {cell['error']:.4f}, {cell['weights']:,} weights"
    ink = "#fff" if share > 0.6 else "#222"
    colours = f"background:rgb({red},{green},{blue});color:{ink}"
    return f'<td style="{colours}" title="{escape(title)}">{100 * value:.0f}</td>'


def _settings(state: dict[str, Any]) -> str:
    names = ("base", "base_revision", "finetuned", "revision", "bayou", "torch", "transformers", "device")
    told = {name: state[name] for name in names} | state["settings"]
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in told.items() if value is not None
    )
    return f"<h2>What was compared</h2><dl>{lines}</dl>"
