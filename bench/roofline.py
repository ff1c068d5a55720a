"""What limits each launch of the packed product: bytes, instructions or tensor cores, read by Nsight Compute.

    python bench/roofline.py run --file FILE --ncu-csv roofline.csv        # starts itself again under ncu
    python bench/roofline.py table roofline.csv --out bench/results/roofline-h100.json

FILE: of `bayou bench compress --layers 2 --keep FILE`. One row a tenant, T of 1, 16 and 64, the launches of a
Llama-2-7B layer's four groups. Each figure is a share of what the unit can do at most, over the launch's time.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "instructions issued",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "integer units",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "fma units",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "dram__bytes_read.sum": "bytes read",
}
TENANTS = (1, 16, 64)


def launches(file: Path) -> None:
    """Compile and warm up, then launch everything once with the profiler on."""
    import torch

    from bayou.benchmarks.kernels import Group
    from bayou.benchmarks.terms import LAYER, Stored

    terms = Stored(file)
    with torch.inference_mode():
        for tenants in TENANTS:
            groups = [Group(shapes, terms, tenants) for shapes in LAYER]
            cold = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
            for group in groups:
                group.run()
            torch.cuda.synchronize()
            for group in groups:
                for stage in group.table.stages:
                    cold.zero_()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    group.launch(stage)
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                    print(json.dumps({"tenants": tenants, "shapes": group.shapes, "launch": stage}), flush=True)


def run(arguments: argparse.Namespace) -> None:
    """This script under ncu; its own lines name the launches in their order."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(METRICS), "--log-file", str(arguments.ncu_csv)]
    command += [sys.executable, __file__, "launches", "--file", str(arguments.file)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    named = [line for line in said.splitlines() if line.startswith('{"tenants"')]
    arguments.ncu_csv.with_suffix(".names").write_text("\n".join(named) + "\n")


def table(arguments: argparse.Namespace) -> None:
    """Join ncu's rows with the launches' names; print and write."""
    text = [line for line in arguments.csv.read_text().splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(text) if row["ID"].isdigit()]  # the row below the head holds units
    names = [json.loads(line) for line in arguments.csv.with_suffix(".names").read_text().splitlines()]
    if len(rows) != len(names):
        raise SystemExit(f"{len(rows)} launches were profiled, {len(names)} were named")
    found: list[dict[str, Any]] = []
    for name, row in zip(names, rows, strict=True):
        figures = {label: float(row[metric].replace(",", "")) for metric, label in METRICS.items()}
        found.append(name | figures)
        print(name["tenants"], name["shapes"][0], name["launch"], {k: round(v, 1) for k, v in figures.items()})
    arguments.out.write_text(
        json.dumps({"benchmark": "roofline", "units": "% of peak", "rows": found}, indent=1) + "\n"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first, second, third = verbs.add_parser("run"), verbs.add_parser("launches"), verbs.add_parser("table")
    for verb in (first, second):
        verb.add_argument("--file", type=Path, required=True)
    first.add_argument("--ncu-csv", type=Path, required=True)
    third.add_argument("csv", type=Path)
    third.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    {"run": run, "launches": lambda a: launches(a.file), "table": table}[a.verb](a)


if __name__ == "__main__":
    main()
