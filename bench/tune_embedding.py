"""What scaling the rows of a coded embedding to their full strength is worth: the embedding alone is replaced.

    python bench/tune_embedding.py --testbed PATH/testbed.py --models TB --task intent --device cuda --out FILE.jsonl

Scored as tune_refit.py does: on training rows with words left out, never on test rows.
"""

import argparse
import json
from pathlib import Path

import torch
import tune_refit
from quality import load_testbed, machine
from safetensors.torch import load_file

from bayou.decompose import Matrix
from bayou.delta import Delta
from bayou.methods import Site, lowrank

NAME = "model.embed_tokens.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    testbed = load_testbed(Path(arguments.testbed))
    bench = tune_refit.Bench(
        testbed, arguments.models, arguments.task, arguments.device, 1024, arguments.rows, arguments.drop, "task"
    )
    folders = (arguments.models / "base", arguments.models / arguments.task)
    old, new = (load_file(f / "model.safetensors")[NAME].to(arguments.device).float() for f in folders)
    delta = new - old
    site = Site(NAME, Matrix(tuple(delta.shape), lambda i, j: delta[i:j]), "embedding")

    def kl(coded: torch.Tensor) -> float:
        table = bench.model.get_parameter(NAME)
        with torch.no_grad():
            table.copy_((old + coded).bfloat16())
        total = count = 0.0
        for batch, reference in zip(bench.batches, bench.reference, strict=True):
            own = bench.answers(batch)
            total += (reference.exp() * (reference - own)).sum().item()
            count += len(reference)
        return total / count

    for bits, rank in ((4, 32), (4, 72), (4, 112), (16, 34)):
        coded = Delta(tuple(delta.shape), lowrank.encode(site, rank=rank, bits=bits)).materialize().float()
        wanted, kept = (delta * delta).sum(1, keepdim=True), (coded * delta).sum(1, keepdim=True)
        rows = torch.where(kept > 0.5 * wanted, wanted / kept, 1.0)
        whole = (wanted.sum() / kept.sum()).item()
        found = {
            "task": arguments.task,
            "bits": bits,
            "rank": rank,
            "energy": 1 / whole,
            "plain": kl(coded),
            "matrix strength": kl(coded * whole),
            "rows strength": kl(coded * rows),
            "machine": machine(arguments.device),
        }
        with open(arguments.out, "a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
