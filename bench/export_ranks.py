"""What a LoRA keeps of a file: `bayou export --to peft` at several ranks, with the KL on prompts and answers.

    python bench/export_ranks.py BASE math.bayou test.jsonl --ranks own,256,64,16 --rows 100 --out export.jsonl

One JSON line a rank is added to --out: rank asked, rows, device, versions and what `bayou.export` returns. The last two
lines are what PEFT alone takes: embeddings as LoRAs, and everything (embeddings whole, norms exact).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import bayou


def main() -> None:
    """Run it; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("file", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ranks", default="own,256,64,16")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "bayou": bayou.__version__}
    runs: list[dict[str, Any]] = [{"rank": None if r == "own" else int(r)} for r in asked.ranks.split(",")]
    runs += [{"embeddings": "lora"}, {"embeddings": "full", "exact": True}]
    for options in runs:
        with tempfile.TemporaryDirectory() as folder:
            found = bayou.export(
                asked.base,
                asked.file,
                Path(folder) / "out",
                data=asked.data,
                rows=asked.rows,
                device=asked.device,
                **options,
            )
        del found["path"]
        line = {"file": asked.file.name, "options": options, "device": asked.device, "versions": versions, **found}
        with open(asked.out, "a") as out:
            out.write(json.dumps(line) + "\n")
        kl, acc = found["data"]["kl"], found["data"].get("acc")
        print(f"{options}: {found['bytes']:,} bytes, energy {found['energy']:.4f}, KL {kl:.5f}, accuracy {acc}")


if __name__ == "__main__":
    main()
