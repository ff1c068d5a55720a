"""The paper's Figure 3 from `bayou bench kernels`: time against batch and against hidden size, PyTorch and our kernel.

python bench/kernel_figures.py bench/results/kernels-h100.json --out docs/figure3.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

LINES = (("pytorch_us", "PyTorch: unpack, multiply", "s--"), ("us", "Bayou's kernel", "o-"), ("floor_us", "floor", ":"))


def panel(axes: Axes, points: list[dict[str, Any]], along: str, fixed: str, value: int) -> None:
    """One curve a kernel, over `along`, where `fixed` is `value`."""
    here = sorted((p for p in points if p[fixed] == value), key=lambda p: p[along])
    for key, label, style in LINES:
        axes.plot([p[along] for p in here], [p[key] for p in here], style, label=label)
    axes.set(xscale="log", yscale="log", xlabel=along, ylabel="microseconds", title=f"{fixed} {value}")
    axes.set_xticks([p[along] for p in here], [str(p[along]) for p in here])
    axes.minorticks_off()


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    found = json.loads(a.results.read_text())
    points = found["figure3"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panel(left, points, "batch", "hidden", 4096)
    panel(right, points, "hidden", "batch", max(p["batch"] for p in points if p["batch"] <= 16))
    left.legend()
    figure.suptitle(f"One square matrix, a delta at ratio 16 for each row of the batch; {found['gpu']}")
    figure.savefig(a.out, dpi=150)


if __name__ == "__main__":
    main()
