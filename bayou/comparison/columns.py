"""The table of a comparison: one list of columns for the terminal and for the page."""

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]

WIDTH = 120
"""Columns of text that the table takes."""


def _with_error(row: Row, name: str, digits: int) -> str:
    error = row.get(f"{name}_se")
    return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _decibels(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:.1f}"


def columns(state: dict[str, Any]) -> dict[str, Callable[[Row], str]]:
    """Heading -> what a row with a file has there."""
    found: dict[str, Callable[[Row], str]] = {
        "bytes": lambda row: f"{row['bytes']:,}",
        "1/": lambda row: f"{row['ratio']:.2f}",
        "KL": lambda row: _with_error(row, "kl", 5),
        "NLL": lambda row: f"{row['nll']:.4f}",
    }
    if state["kind"] == "answers":
        found["accuracy"] = lambda row: _with_error(row, "acc", 4)
    else:
        found["perplexity"] = lambda row: f"{row['ppl']:.3f}"
    found["flips"] = lambda row: f"{row['flip']:.4f}"
    if any("lost" in row for row in state["candidates"]):
        found["lost"] = lambda row: f"{100 * row['lost']:.3g} %" if "lost" in row else ""
        found["dB"] = lambda row: _decibels(row, "decibels")
        found["dB f."] = lambda row: _decibels(row, "decibels_factors")
    found["s"] = lambda row: f"{row['seconds']:.0f}"
    return found


def rows(state: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, cells of a file, or the reason alone why there is none), the fine-tune itself first."""
    chosen, reference = columns(state), state["reference"]
    own = {"bytes": f"{state['original']:,}", "1/": "1", "KL": "0", "NLL": f"{reference['nll']:.4f}"}
    own |= {"flips": "0"}
    own |= {"accuracy": _with_error(reference, "acc", 4)} if "acc" in reference else {}
    own |= {"perplexity": f"{reference['ppl']:.3f}"} if "ppl" in reference else {}
    found = [("the fine-tune", [own.get(heading, "") for heading in chosen])]
    for row in state["candidates"]:
        cells = [row["reason"]] if "reason" in row else [cell(row) for cell in chosen.values()]
        found.append((f"{row['method']} 1/{row['asked']:g}", cells))
    return found


def notes(state: dict[str, Any]) -> list[str]:
    """What stands under the table."""
    found = ["KL: of the fine-tune to the file, nats a token. flips: share of tokens whose argmax differs"]
    if "calibration" in state["shared"]:
        found[0] += f". s: seconds without the calibration, done once in {state['shared']['calibration']:.0f}"
    if "curves" in state:
        found.append(
            "lost: share of the delta's output over the calibration text that the file has not. dB: above the bound, "
            "reverse water-filling over the spectra for Gaussian deltas of known covariance. dB f.: above ideal codes "
            "of singular vectors, which is no bound"
        )
    return found + [f"warning: {line}" for line in state["warnings"]]


def table(state: dict[str, Any]) -> Group:
    """The comparison for people."""
    held = {"answers": "rows of answers", "text": "windows of text"}[state["kind"]]
    title = Text(f"{state['rows']} {held}, {state['tokens']:,} tokens of {state['settings']['data']}")
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("", no_wrap=True)
    for heading in columns(state):
        shown.add_column(heading, justify="right", no_wrap=True)
    reasons = []
    for name, cells in rows(state):
        if len(cells) == 1:
            shown.add_row(name, "none")
            reasons.append(f"{name}: {cells[0]}")
        else:
            shown.add_row(name, *cells)
    return Group(shown, *(Text(line) for line in reasons + notes(state)))
