"""README's and LOG.md's tables of quality, from the JSON lines that quality.py wrote.

python bench/tables.py bench/results/sixteen.jsonl [...]                 # KL, accuracy, flips, bytes, both tasks
python bench/tables.py --activations bench/results/sixteen.jsonl [...]   # activation error by thirds of the depth
"""

import argparse
import json
from pathlib import Path
from typing import Any

TASKS = ("intent", "sql")
THIRDS = ("low", "middle", "high")


def read(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """{run: {task: its line}} in the order of the files."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            run = json.loads(line)
            found.setdefault(run["name"], {})[run["task"]] = run
    return found


def scores(found: dict[str, dict[str, Any]]) -> None:
    """One row a run: bytes, and each task's scores."""
    print("| run | bytes | " + " | ".join(f"{t} KL | acc | flips" for t in TASKS) + " |")
    print("|---|---|" + "---|---|---|" * len(TASKS))
    for name, tasks in found.items():
        sizes = "/".join(sorted({f"{run['bytes']:,}" for run in tasks.values()}))
        cells = []
        for task in TASKS:
            score = tasks[task]["score"] if task in tasks else None
            cells += [f"{score['kl']:.5f}", f"{score['acc']:.4f}", f"{score['flip']:.4f}"] if score else [""] * 3
        print(f"| {name} | {sizes} | " + " | ".join(cells) + " |")


def activations(found: dict[str, dict[str, Any]]) -> None:
    """One row a run: squared error of outputs over the delta's own, in each third; all / outlier columns."""
    print("| run | " + " | ".join(f"{task} {third}" for task in TASKS for third in THIRDS) + " |")
    print("|---|" + "---|" * len(TASKS) * len(THIRDS))
    for name, tasks in found.items():
        cells = []
        for task in TASKS:
            measured = tasks.get(task, {}).get("activations")
            for third in THIRDS:
                part = measured and measured[third]
                cells.append(f"{part['all_relative']:.4f} / {part['outliers_relative']:.4f}" if part else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--activations", action="store_true")
    arguments = parser.parse_args()
    (activations if arguments.activations else scores)(read(arguments.files))


if __name__ == "__main__":
    main()
