"""Candidates for the method `auto`, in memory, at true whole-file bytes: what each ingredient is worth.

    python bench/auto_ablation.py --testbed PATH/testbed.py --models TB --task intent --device cuda --keep FOLDER \
        --ratio 16 32 64 --set entropy --out FILE.jsonl

See auto_bed.py for what is scored. "deltacome" is the package's own method and allocation. Entropy-coded candidates
have one uniform step for all ranks of a matrix, nothing clipped, and are charged the entropy of their codes (static
tables of 16 ranks each, 4 bits a symbol for the table), their scales in fp16 and the same exact bytes as all; step
sizes are found by bisection on every sixth layer, and the bytes that the whole then has are in the line. One JSON line
a candidate.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from auto_bed import EXACT, TABLE, Bed
from auto_entropy import Option, Table, encode_linears, entropy_bits
from quality import load_testbed, machine
from torch import Tensor
from tune_refit import KINDS

from bayou import allocate, decompose, methods
from bayou.decompose import Matrix
from bayou.delta import Delta, Term
from bayou.methods import Site, deltacome, lowrank
from bayou.packed import PLANES, Packed, Spec
from bayou.plan import SiteRecord


def site_records(bed: Bed, option: Option) -> list[SiteRecord]:
    """Every matrix of the model, as compress takes stock of them, for the option's method."""
    method = option["method"]
    chosen = methods.check(method, option.get("options", {}))
    tables = {"method": "lowrank", "bits": 4} | option.get("table", {})
    table_method = tables.pop("method")
    common = {"part": None, "dtype": "BF16", "transposed": False, "reference_part": None, "gain": 1.0, "terms": ()}
    found = []
    for kind in KINDS:
        for name in bed.names[kind]:
            shape = tuple(bed.delta[kind].shape[1:])
            own = {"tensor": name, "reference": name, "shape": shape, "disk_shape": shape, "role": "linear"}
            found.append(SiteRecord(**own, **common, method=method, options=chosen))
    shape = tuple(bed.table_delta.shape)
    own = {"tensor": TABLE, "reference": TABLE, "shape": shape, "disk_shape": shape, "role": "embedding"}
    found.append(SiteRecord(**own, **common, method=table_method, options=methods.check(table_method, tables)))
    return found


def symbols(packed: Packed) -> Tensor:
    """The codes of a Packed."""
    spec = packed.spec
    planes = packed.parts[: len(PLANES[spec.bits])]
    return Packed(Spec(spec.bits), packed.shape, planes).unpack() + (2**spec.bits - 1) / 2


def coded_bytes(terms: tuple[Term, ...]) -> float:
    """Bytes of low-rank terms if their codes were entropy-coded (and nothing else)."""
    total = 0.0
    for u, v in (block for term in terms for block in term.blocks):
        for packed, codes in ((u, None), (v, None)):
            if packed.spec.floats:
                total += packed.spec.nbytes(*packed.shape)
                continue
            codes = symbols(packed)
            bits = entropy_bits(codes.T if packed is u else codes)
            scales = packed.shape[0] * packed.spec.groups(packed.shape[1])
            total += bits / 8 + scales * (2 + packed.spec.zeros * packed.spec.bits / 8)
    return total + 16


class Remembered:
    """Decompositions of a method's modules from the bed's folder: they do not change with what is rounded."""

    def __init__(self, bed: Bed, most: int = 256) -> None:
        self.bed, self.most, self.site = bed, most, ""

    def svd(self, matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """decompose.svd."""
        if rank > self.most:
            return decompose.svd(matrix, rank)
        u, s, v = self.bed.kept(f"svd-{self.site}", lambda: decompose.svd(matrix, self.most))
        return u[:, :rank].contiguous(), s[:rank].contiguous(), v[:rank].contiguous()


def encode_by_method(bed: Bed, option: Option, ratio: float) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The deltas that a method's file of so many bytes gives: linears, embedding; and what is to be told of it."""
    records = site_records(bed, option)
    limit = int(bed.nbytes / ratio) - EXACT
    records = allocate.allocate(records, limit, embedding_rate=option.get("embedding_rate", 0.5))
    report: dict[str, Any] = {}
    memory = Remembered(bed)
    deltacome.svd = lowrank.svd = memory.svd  # type: ignore[assignment]
    grams: dict[int, list[methods.Gram]] = {}
    coded: dict[str, Tensor] = {}
    entropy = 0.0
    by_name = {record.tensor: record for record in records}
    for kind in KINDS:
        moment = bed.moment[kind]
        shared = grams.setdefault(id(moment), [methods.Gram(part) for part in moment])
        parts = []
        for i, name in enumerate(bed.names[kind]):
            record, delta = by_name[name], bed.delta[kind][i]
            memory.site = name
            site = Site(name, Matrix(record.shape, lambda a, b, d=delta: d[a:b]), "linear", shared[i])
            terms = methods.get(record.method).encode(site, **record.options)
            entropy += coded_bytes(terms)
            parts.append(Delta(record.shape, terms).materialize().float())
        coded[kind] = torch.stack(parts)
        error, delta = coded[kind] - bed.delta[kind], bed.delta[kind]
        lost = ((error @ moment) * error).sum((-2, -1)) / ((delta @ moment) * delta).sum((-2, -1))
        report[kind] = {
            "rank": record.options.get("rank"),
            "bytes": record.nbytes,
            "error": round(lost.mean().item(), 5),
        }
    record = by_name[TABLE]
    memory.site = TABLE

    def table_terms() -> Any:
        terms = methods.get(record.method).encode(table_site(bed), **record.options)
        return Delta(record.shape, terms).materialize().bfloat16(), coded_bytes(terms)

    chosen = "-".join(f"{v}" for v in record.options.values()).replace("/", "_")
    table, table_entropy = bed.kept(f"table-{record.method}-{chosen}", table_terms)
    total = sum(one.nbytes for one in records)
    report |= {
        "linear_bytes": total - record.nbytes,
        "table_bytes": record.nbytes,
        "table_rank": record.options["rank"],
    }
    report |= {"linears_if_entropy_coded": round(entropy), "table_if_entropy_coded": round(table_entropy)}
    return coded, table.float(), report


def table_site(bed: Bed) -> Site:
    delta = bed.table_delta
    return Site(TABLE, Matrix(tuple(delta.shape), lambda i, j: delta[i:j]), "embedding")


def candidates(which: str) -> Iterator[Option]:
    """The candidates of a set; each says what it changes."""
    published = {"method": "deltacome", "options": {"refit": "none"}}
    if which == "deltacome":  # the strong baseline: its best share of the embedding
        for rate in (0.25, 0.5, 1.0):
            yield {"name": f"deltacome, embedding rate {rate}", **published, "embedding_rate": rate}
    if which == "entropy":
        for share in (0.1, 0.06, 0.16):  # of the bytes, for the embedding
            yield {"name": f"entropy, share {share}", "share": share}
        for white in (0.0, 0.5):
            yield {"name": f"entropy, white {white}", "share": 0.1, "white": white}
        for strength in ("matrix", None):
            yield {"name": f"entropy, strength {strength}", "share": 0.1, "strength": strength}
        for alpha in (0.5, 0.75):
            yield {"name": f"entropy, alpha {alpha}", "share": 0.1, "alpha": alpha}
        for worth in (0.03, 0.08, 0.3):
            yield {"name": f"entropy, worth {worth}", "share": 0.1, "worth": worth}
        for step in (0.7, 1.4):
            yield {"name": f"entropy, V's step x {step}", "share": 0.1, "v_step": step}
        for ridge in (1.0, 3.0):
            yield {"name": f"entropy, U refitted, ridge {ridge}", "share": 0.1, "refit": ridge}
        for head in (0.5, 0.9):
            yield {"name": f"entropy, head {head}", "share": 0.1, "head": head}
    if which == "kinds":  # what each kind of matrix is worth: its steps finer or coarser, all else the same
        for kind in KINDS:
            for times in (0.7, 1.4):
                yield {"name": f"entropy, {kind} x {times}", "share": 0.1, "kinds": {kind: times}}


def perform(bed: Bed, option: Option, ratio: float) -> Option:
    """Encode everything in about the fine-tune's bytes over `ratio`, and score."""
    budget = bed.nbytes / ratio - EXACT
    started = time.perf_counter()
    if "method" in option:
        coded, table, report = encode_by_method(bed, option, ratio)
    else:
        table, table_bytes, ranks = Table(bed, option).within(option["share"] * budget)
        coded, report = encode_linears(bed, option, budget - table_bytes)
        report |= {"table_bytes": round(table_bytes), "table_ranks": ranks}
    total = report["linear_bytes"] + report["table_bytes"] + EXACT
    seconds = time.perf_counter() - started
    result = option | {"task": bed.task, "ratio": ratio, "bytes": round(total), "true_ratio": bed.nbytes / total}
    result |= {"report": report, "seconds": seconds}
    result["kl"] = bed.kl(coded, table)
    if bed.apart:
        result["kl_linears"], result["kl_table"] = bed.kl(coded, None), bed.kl(None, table)
        result["kl_1.01"] = bed.kl(coded, table, 1.01)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--drop", type=float, default=None, help="share of words left out; .25 for intent, .08 for sql")
    parser.add_argument("--text", choices=("task", "wikitext"), default="task", help="what calibrates")
    parser.add_argument("--ratio", type=float, nargs="+", default=[16.0, 32.0, 64.0])
    parser.add_argument("--set", default="entropy", dest="which", help="deltacome, entropy or kinds")
    parser.add_argument("--only", default="")
    parser.add_argument("--apart", action="store_true", help="also linears and embedding alone, and linears x 1.01")
    parser.add_argument("--keep", type=Path, required=True, help="folder for what does not change")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    drop = arguments.drop if arguments.drop is not None else {"intent": 0.25, "sql": 0.08}[arguments.task]
    parts = (arguments.device, arguments.text, arguments.tokens, arguments.rows, drop, arguments.keep)
    bed = Bed(load_testbed(Path(arguments.testbed)), arguments.models, arguments.task, *parts)
    bed.apart = arguments.apart
    for option in candidates(arguments.which):
        if arguments.only not in option["name"]:
            continue
        for ratio in arguments.ratio:
            line = perform(bed, option, ratio)
            line |= {"text": arguments.text, "tokens": arguments.tokens, "rows": arguments.rows, "drop": drop}
            line["machine"] = machine(arguments.device)
            with open(arguments.out, "a") as file:
                file.write(json.dumps(line) + "\n")
            more = " ".join(f"{k} {line[k]:.6f}" for k in line if k.startswith("kl_"))
            print(
                f"{option['name']:32s} {bed.task} 1/{line['true_ratio']:.2f} KL {line['kl']:.6f} {more} "
                f"{line['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
