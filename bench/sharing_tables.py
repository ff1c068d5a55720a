"""What bench/sharing.py makes of its results: a table, paired differences, a plot of the loss over tokens."""

import argparse
import json
from pathlib import Path
from typing import Any

import general
import numpy as np


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(arguments: argparse.Namespace) -> None:
    """Print a set as a Markdown table."""
    columns = ["ppl", *(f"{b}{s}" for b in general.BENCHMARKS for s in ("", "_nll"))]
    print("| method | parameters | fewer | tokens | held-out loss | " + " | ".join(columns) + " |")
    print("|" + "---|" * (5 + len(columns)))
    for which in arguments.set:
        for r in lines(Path(arguments.out) / f"sharing-{which}.jsonl"):
            if r["failed"]:
                print(f"| {r['name']} | failed: {r['failed']} |")
                continue
            cells = [r["name"], f"{r['parameters']:,}", f"{r['reduction']:.1%}", f"{r.get('tokens', 0):,}"]
            cells.append(f"{r['held_out']['loss']:.4f}")
            for column in columns if "scores" in r else ():
                error = r["scores"].get(column + "_se")
                cells.append(f"{r['scores'][column]:.4f}" + (f" ± {error:.4f}" if error else ""))
            print("| " + " | ".join(cells) + " |")


def paired(arguments: argparse.Namespace) -> None:
    """Mean difference of two runs, by text and by question, and its standard error: below 0, the first wins."""
    for which in arguments.set:
        single = {r["name"]: r for r in lines(Path(arguments.out) / f"sharing-{which}-single.jsonl")}
        one, two = (single[name] for name in arguments.pair)
        tokens = np.array(one["tokens"])
        values = {"text (nats a token)": (np.array(one["text"]) - np.array(two["text"])) * len(tokens) / tokens.sum()}
        values |= {f"{b} nll": np.array(one[b]["nll"]) - np.array(two[b]["nll"]) for b in general.BENCHMARKS}
        for name, difference in values.items():
            error = difference.std(ddof=1) / len(difference) ** 0.5
            z = difference.mean() / error if error else 0.0
            print(
                f"{which}  {' - '.join(arguments.pair)}  {name}: {difference.mean():+.5f} ± {error:.5f}  (z {z:+.1f})"
            )


def plot(arguments: argparse.Namespace) -> None:
    """Draw the loss over tokens of a set's runs; runs that differ in their seed alone are one line with a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for which in arguments.set:
        families: dict[str, list[np.ndarray]] = {}
        for r in lines(Path(arguments.out) / f"sharing-{which}.jsonl"):
            families.setdefault(r["name"].partition(" seed ")[0], []).append(np.array(r["curve"]))
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name, curves in families.items():
            tokens, losses = curves[0][:, 0] / 1e6, np.stack([curve[:, 1] for curve in curves])
            (line,) = axes.plot(tokens, losses.mean(0), label=name)
            axes.fill_between(tokens, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color())
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel("loss (of the model as it runs: PMR's is partly the original)")
        axes.legend()
        figure.tight_layout()
        figure.savefig(Path(arguments.out) / f"sharing-{which}.png", dpi=120)
