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
import tune_refit
from auto_bed import EXACT, TABLE, Bed
from quality import load_testbed, machine
from torch import Tensor
from tune_refit import KINDS

from bayou import allocate, decompose, methods
from bayou.decompose import Matrix
from bayou.delta import Delta, Term
from bayou.methods import Site, deltacome, lowrank
from bayou.packed import PLANES, Packed, Spec
from bayou.plan import SiteRecord
from bayou.quantize import Factor, Grid, factorize, gptq

Option = dict[str, Any]
BAND = 16


# ---------------------------------------------------------------------------------------------- decompositions


def basis(bed: Bed, kind: str, white: float) -> Tensor:
    """Left singular vectors (layers, out, k) of delta H^(white/2), by falling singular value."""

    def compute() -> Tensor:
        found = []
        for delta, moment in zip(bed.delta[kind], bed.moment[kind], strict=True):
            a = delta.double()
            if white:
                a = a @ tune_refit.power(moment.double(), white / 2)
            if a.shape[0] <= a.shape[1]:
                u = torch.linalg.eigh(a @ a.T).eigenvectors.flip(-1)
            else:
                u = a @ torch.linalg.eigh(a.T @ a).eigenvectors.flip(-1)
                u = u / u.norm(dim=0).clamp_min(1e-30)
            found.append(u.float())
        return torch.stack(found)

    return bed.kept(f"basis-{kind}-{white}", compute)


def factor(bed: Bed, kind: str, damping: float) -> Factor:
    """GPTQ's factor of the inputs' moments, stacked over layers."""
    source = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(kind, kind)

    def compute() -> Any:
        found = [factorize(moment, damping=damping) for moment in bed.moment[source]]
        return {name: torch.stack([getattr(f, name) for f in found]) for name in ("order", "inverse", "dead")}

    return Factor(**bed.kept(f"factor-{source}-{damping}", compute))


# ---------------------------------------------------------------------------------------------- bits


def entropy_bits(codes: Tensor, band: int = BAND) -> float:
    """Bits of integer codes (ranks, entries) by static tables, one for `band` ranks; tables counted."""
    total = 0.0
    low = int(codes.min()) if codes.numel() else 0
    for part in codes.split(band):
        counts = torch.bincount((part - low).flatten().long())
        counts = counts[counts > 0].double()
        total += float(-(counts * (counts / counts.sum()).log2()).sum()) + 4 * len(counts)
    return total


# ---------------------------------------------------------------------------------------------- linears


class Linears:
    """All matrices of a kind by one option; `at(c)` encodes with the step c."""

    def __init__(self, bed: Bed, kind: str, option: Option, every: int = 1) -> None:
        self.option, self.kind = option, kind
        layers = slice(None, None, every)
        self.delta = bed.delta[kind][layers]
        moment = bed.moment[kind][layers]
        self.moment = moment / moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        self.u = basis(bed, kind, option.get("white", 1.0))[layers]
        whole = factor(bed, kind, option.get("damping", 0.01))
        self.factor = Factor(whole.order[layers], whole.inverse[layers], whole.dead[layers])
        self.v = self.u.mT @ self.delta  # (layers, k, in)
        self.vh = self.v @ self.moment
        self.energy = (self.vh * self.v).sum(-1)  # (layers, k)
        # Geometric mean of the pivots: what a step costs a column once its error is fed back.
        pivots = self.factor.inverse.diagonal(dim1=-2, dim2=-1)
        scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        self.pivot = (-2 * pivots.log()).mean(-1).exp() / scale
        whole_energy = self.energy.sum(-1)
        self.weight = whole_energy.pow(option.get("alpha", 1.0) / 2)
        if option.get("alpha", 1.0) != 1.0:
            self.weight = self.weight * (scale.pow((option["alpha"] - 1) / 2))
        self.weight = self.weight * option.get("kinds", {}).get(kind, 1.0)
        self.weight = self.weight / (self.delta.shape[1] * self.delta.shape[2]) ** (0.5 * option.get("size", 0.5))

    def at(self, c: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u_hat (layers, out, r), v_hat (layers, r, in) fp32, and their codes."""
        option = self.option
        out, width = self.delta.shape[1:]
        step = c * self.weight  # (layers,): root of the error that an entry may have, in the moments' metric
        # A rank is worth its bits where its energy is well above what its entries' errors come to.
        keep = self.energy > option.get("worth", 0.15) * (step**2)[:, None] * (out + width)
        ranks = max(1, int(keep.sum(-1).max()))
        keep = keep[:, :ranks]
        keep[:, 0] = True
        v, u, energy = self.v[:, :ranks], self.u[:, :, :ranks], self.energy[:, :ranks].clamp_min(1e-30)
        v_step = (option.get("v_step", 1.0) * step / self.pivot.sqrt())[:, None, None].expand(-1, ranks, 1)
        grid = Grid(v_step, torch.full_like(v_step, 128.0), torch.full_like(v_step, 255.0))
        v_codes, v_hat = gptq(v * keep[..., None], self.factor, grid)
        v_codes = (v_codes - 128) * keep[..., None]
        v_hat = v_hat * keep[..., None]
        hv = v_hat @ self.moment
        hessian = hv @ v_hat.mT
        if option.get("refit"):
            normal = hessian.double()
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            diagonal.mul_(1 + option["refit"]).add_(1e-6 * diagonal.mean(-1, keepdim=True))
            left = (self.delta @ hv.mT).double() - u.double() @ hessian.double()
            u = u + torch.linalg.solve(normal, left.mT).mT.float() * keep[:, None]
        u_step = (option.get("u_step", 1.0) * step[:, None] / energy.sqrt())[:, None, :]
        u_step = u_step.maximum(u.abs().amax(1, keepdim=True) / 127)  # so that every rank fits into 8 bits
        grid = Grid(u_step, torch.full_like(u_step, 128.0), torch.full_like(u_step, 255.0))
        own = None
        if option.get("u_gptq", True):
            found = [factorize(h, damping=option.get("u_damping", 0.01)) for h in hessian]
            own = Factor(*(torch.stack([getattr(f, n) for f in found]) for n in ("order", "inverse", "dead")))
        u_codes, u_hat = gptq(u * keep[:, None], own, grid)
        u_codes = (u_codes - 128) * keep[:, None]
        return u_hat * keep[:, None], v_hat, u_codes, v_codes

    def nbytes(self, u_codes: Tensor, v_codes: Tensor) -> float:
        """Bytes of all matrices: entropy of the codes, a scale a rank, a scale a row."""
        total = 0.0
        rows = {"rows": 2, "matrix": 0, "ranks": 0, None: 0}[self.option.get("strength", "rows")]
        for u, v in zip(u_codes, v_codes, strict=True):
            used = (u.abs().amax(0) > 0) & (v.abs().amax(1) > 0)
            ranks = int(used.sum())
            bits = entropy_bits(u.T[used]) + entropy_bits(v[used]) if ranks else 0
            total += bits / 8 + 2 * ranks + rows * u.shape[0] + 32
        return total

    def coded(self, u: Tensor, v: Tensor) -> Tensor:
        """The coded deltas (layers, out, in) at the strength that the option asks for."""
        option = self.option
        strength = option.get("strength", "rows")
        wanted_side = self.delta @ self.moment
        coded = u @ v
        own, kept = (wanted_side * self.delta).sum(-1, keepdim=True), (wanted_side * coded).sum(-1, keepdim=True)
        if strength == "rows":
            factor = torch.where((kept > 0) & (own > 0), own / kept, 1.0)
            coded = coded * (factor ** option.get("power", 1.0)).clamp(0.5, 2.0)
        if strength == "matrix":
            coded = coded * (own.sum(-2, keepdim=True) / kept.sum(-2, keepdim=True))
        return coded * option.get("times", 1.0)


def encode_linears(bed: Bed, option: Option, budget: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Coded deltas of all kinds in about `budget` bytes."""
    every = 6
    sample = [Linears(bed, kind, option, every) for kind in KINDS]
    layers = len(bed.names["q_proj"])
    part = len(range(0, layers, every)) / layers
    low, high = -14.0, 4.0
    for _ in range(9):
        middle = (low + high) / 2
        size = sum(one.nbytes(*one.at(2.0**middle)[2:]) for one in sample) / part
        low, high = (low, middle) if size <= budget else (middle, high)
    c = 2.0**high
    found, report = {}, {"c": c}
    total = 0.0
    for kind in KINDS:
        one = Linears(bed, kind, option)
        u, v, u_codes, v_codes = one.at(c)
        size = one.nbytes(u_codes, v_codes)
        total += size
        found[kind] = one.coded(u, v)
        error = found[kind] - one.delta
        lost = ((error @ one.moment) * error).sum((-2, -1)) / one.energy.sum(-1)
        ranks = (v_codes.abs().amax(-1) > 0).sum(-1).float()
        report[kind] = {
            "bytes": round(size),
            "ranks": [int(ranks.min()), round(ranks.mean().item(), 1), int(ranks.max())],
            "u_bits": round(sum(entropy_bits(c.T) for c in u_codes) / (ranks.sum().item() * u_codes.shape[1]), 3),
            "v_bits": round(sum(entropy_bits(c) for c in v_codes) / (ranks.sum().item() * v_codes.shape[2]), 3),
            "error": round(lost.mean().item(), 5),
        }
    report["linear_bytes"] = round(total)
    return found, report


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


# ---------------------------------------------------------------------------------------------- the embedding


def table_site(bed: Bed) -> Site:
    delta = bed.table_delta
    return Site(TABLE, Matrix(tuple(delta.shape), lambda i, j: delta[i:j]), "embedding")


class Table:
    """The embedding by uniform steps and entropy, as the linears; head: how much the head's moment counts."""

    def __init__(self, bed: Bed, option: Option) -> None:
        self.option, self.delta = option, bed.table_delta
        head = option.get("head", 0.0)
        moment = bed.last_moment / bed.last_moment.diagonal().mean()
        self.moment = (1 - head) * torch.eye(len(moment), device=moment.device) + head * moment

        def compute() -> Tensor:
            root = tune_refit.power(self.moment.double(), 0.5)
            gram = root @ (self.delta.T.double() @ self.delta.double()) @ root
            w = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :160]
            return (self.delta.double() @ root @ w).float()

        us = bed.kept(f"table-{head}", compute)  # (V, k), columns' squared norm = energy
        self.energy = us.square().sum(0)
        self.u = us / self.energy.sqrt()
        self.v = self.u.T @ self.delta
        self.factor = factorize(self.moment, damping=0.01)
        self.pivot = (-2 * self.factor.inverse.diagonal().log()).mean().exp()

    def at(self, step: float) -> tuple[Tensor, float, int]:
        """The coded delta, its bytes and ranks."""
        out, width = self.delta.shape
        keep = self.energy > self.option.get("table_worth", 0.15) * step**2 * (out + width)
        ranks = max(1, int(keep.sum()))
        v, u, energy = self.v[:ranks], self.u[:, :ranks], self.energy[:ranks]
        v_step = (step / self.pivot.sqrt()).expand(ranks, 1)
        v_codes, v_hat = gptq(
            v, self.factor, Grid(v_step, torch.full_like(v_step, 2048.0), torch.full_like(v_step, 4095.0))
        )
        u_step = (step / energy.sqrt())[None]
        u_codes = (u / u_step).round().clamp(-2048, 2047)
        size = (entropy_bits(u_codes.T, 1) + entropy_bits(v_codes - 2048, 1)) / 8 + 4 * ranks
        coded = (u_codes * u_step) @ v_hat
        wanted = (self.delta @ self.moment * self.delta).sum()
        kept = (self.delta @ self.moment * coded).sum()
        return coded * (wanted / kept), size, ranks

    def within(self, budget: float) -> tuple[Tensor, float, int]:
        low, high = -16.0, 4.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if self.at(2.0**middle)[1] <= budget else (middle, high)
        return self.at(2.0**high)


# ---------------------------------------------------------------------------------------------- candidates


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
