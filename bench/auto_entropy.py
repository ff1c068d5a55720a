"""Entropy-coded candidates of bench/auto_ablation.py: one uniform step for all ranks of a matrix, nothing clipped.

Reverse water-filling by a classical transform code: singular directions in the inputs' metric, a common step, GPTQ's
feedback, and static tables of BAND ranks each, whose entropy (4 bits a symbol for the table) is what a matrix costs.
Linears: all matrices of a kind. Table: the embedding.
"""

from typing import Any

import torch
import tune_refit
from auto_bed import Bed
from torch import Tensor
from tune_refit import KINDS

from bayou.quantize import Factor, Grid, factorize, gptq

Option = dict[str, Any]
BAND = 16


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


def entropy_bits(codes: Tensor, band: int = BAND) -> float:
    """Bits of integer codes (ranks, entries) by static tables, one for `band` ranks; tables counted."""
    total = 0.0
    low = int(codes.min()) if codes.numel() else 0
    for part in codes.split(band):
        counts = torch.bincount((part - low).flatten().long())
        counts = counts[counts > 0].double()
        total += float(-(counts * (counts / counts.sum()).log2()).sum()) + 4 * len(counts)
    return total


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
