"""plot.svg: KL against bytes, and beside it the share of the delta's output that is lost, with the curves of bound.py.

The bound is drawn where it is true, on the axis of that error. It has no place on the axis of KL: KL per lost share
differs between methods, and of one method between sizes, by a factor of ten and more (LOG.md, 2026-11-24).
"""

import io
from typing import Any

from bayou.errors import BadInput

_MARKERS = "osD^vPX*<>"


def check(why: str) -> None:
    """Raises BadInput, before any work, where matplotlib is missing; `why` begins the sentence."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput(f"{why} pip install 'bayou[plot]'") from None


def comparison(state: dict[str, Any]) -> str:
    """The picture of a comparison (rows.compare) as SVG; "" where no candidate differs from the fine-tune at all."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    drawn = [row for row in state["candidates"] if row.get("kl", 0) > 0]
    if not drawn:
        return ""
    names = list(dict.fromkeys(row["method"] for row in drawn))
    lost = [row for row in drawn if row.get("lost", 0) > 0]
    panels = 2 if lost and "curves" in state else 1
    figure = Figure(figsize=(5.6 * panels, 4.4), layout="constrained")
    sizes = [row["bytes"] for row in drawn]
    low, high = min(sizes) / 1.4, max(sizes) * 1.4

    def panel(place: int, key: str, rows: list[dict[str, Any]]) -> Any:
        axes = figure.add_subplot(1, panels, place)
        for number, name in enumerate(names):
            of = sorted((row for row in rows if row["method"] == name), key=lambda row: row["bytes"])
            errors = [row["kl_se"] or 0 for row in of] if key == "kl" else None
            x, y = [row["bytes"] for row in of], [row[key] for row in of]
            marker = _MARKERS[number % len(_MARKERS)]
            axes.errorbar(x, y, yerr=errors, color=f"C{number}", marker=marker, ms=5, lw=1.4, capsize=2, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="mask")
        axes.margins(y=0.1)
        axes.autoscale_view()
        axes.set_xlim(low, high)
        ticks = {state["original"] / ratio: f"1/{ratio:g}" for ratio in sorted({row["asked"] for row in drawn})}
        axes.set_xticks(list(ticks), [f"{word}\n{size / 1e6:.3g}" for size, word in ticks.items()])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"bytes of the file, MB (the fine-tune has {state['original'] / 1e6:.4g})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(True, which="major", lw=0.3, alpha=0.6)
        return axes

    def curve(axes: Any, name: str, style: str, label: str) -> None:
        shown = [(size, error) for size, error in state["curves"][name] if low / 1.2 <= size <= high * 1.2]
        inside = [error for size, error in shown if low <= size <= high]
        if inside:
            bottom, top = axes.get_ylim()
            axes.plot(*zip(*shown, strict=True), color="black", ls=style, lw=1.1, label=label)
            axes.set_ylim(min(bottom, min(inside) / 1.3), top)

    axes = panel(1, "kl", drawn)
    axes.set_ylabel("KL(fine-tune || file), nats a token", fontsize=9)
    if panels == 2:
        right = panel(2, "lost", lost)
        right.set_ylabel("share of the delta's output that is lost", fontsize=9)
        curve(right, "factors", ":", "ideal codes of singular vectors")
        curve(right, "bound", "--", "bound: reverse water-filling")
        right.legend(fontsize=7)
    axes.legend(fontsize=7)
    held = {"answers": "rows of answers", "text": "windows of text"}[state["kind"]]
    axes.set_title(f"{state['rows']} {held}, {state['tokens']:,} tokens", fontsize=9)
    picture = io.StringIO()
    # Nothing in it but what was drawn: no date, and names of parts by their content.
    with matplotlib.rc_context({"svg.hashsalt": "bayou", "svg.fonttype": "none", "font.family": "sans-serif"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(picture, format="svg", metadata=metadata)
    return picture.getvalue()
