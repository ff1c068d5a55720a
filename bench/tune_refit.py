"""Which way of refitting deltacome's factors is truest: variants in memory, all layers of a shape at once.

    python bench/tune_refit.py --testbed PATH/testbed.py --models TB --task intent --device cuda --out FILE.jsonl

Linears alone at a true ratio (14.9), embeddings and norms the fine-tune's own. Calibrates on training rows of the task
and scores on other training rows (see quality.training_rows), never on test rows. A variant has the same bytes as the
published method. One JSON line a variant: KL as made, and with the whole delta times 1.01 and 1.02 (what is left of a
bias towards the base shows there).
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from quality import load_testbed, machine, training_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayou import methods
from bayou.methods import deltacome
from bayou.packed import Spec
from bayou.quantize import factorize, gptq, grid, spread

BANDS = "8x2,3x32,2"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Option = dict[str, Any]
PUBLISHED: Option = {"name": "published"}
FIT: Option = {"refit": True}


def variants() -> list[Option]:
    """Each variant is what it changes from the published method."""
    found: list[Option] = [{"name": "published"}, {"name": "svd, nothing rounded", "exact": True}]
    for strength in ("matrix", "rows", "rows squared", "rows, matrix"):
        found.append({"name": f"svd, {strength} strength", "exact": True, "strength": strength})
        found.append({"name": f"published, {strength} strength", "strength": strength})
        for ridge in (0.1, 0.3, 1.0, 3.0):
            found.append({"name": f"refit {ridge}, {strength}", "refit": True, "ridge": ridge, "strength": strength})
    found.append({"name": "refit 1.0, no strength", "refit": True, "ridge": 1.0})
    best = {"refit": True, "ridge": 1.0, "strength": "rows"}
    found.append({"name": "rows, V clipped", **best, "clip_v": True})
    found.append({"name": "rows, U's scales fitted", **best, "rescale_u": True})
    found.append({"name": "rows, V's scales fitted", **best, "rescale_v": True})
    found.append({"name": "rows, U's and V's scales fitted", **best, "rescale_u": True, "rescale_v": True})
    found.append({"name": "rows, 2 rounds", **best, "rounds": 2})
    for alpha in (0.25, 0.5, 1.0):
        found.append({"name": f"rows, diagonal {alpha}", **best, "diagonal": alpha})
    for white in (0.25, 0.5, 1.0):
        found.append({"name": f"rows, white {white}", **best, "white": white})
        found.append({"name": f"rows, white {white}, ridge .1", **best, "white": white, "ridge": 0.1})
    return found


def power(gram: Tensor, exponent: float) -> Tensor:
    """gram ** exponent of symmetric matrices, damped by a thousandth of the mean eigenvalue."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0) + 1e-3 * values.mean(-1, keepdim=True)
    return (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT


def factors(delta: Tensor, gram: Tensor, rank: int, option: Option) -> tuple[Tensor, Tensor]:
    """u (n, out, rank), v (n, rank, in) of the chosen metric, sqrt(s) on both, in fp64."""
    shape, back = None, None
    if option.get("diagonal"):
        d = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).pow(option["diagonal"] / 2)
        shape, back = torch.diag_embed(d), torch.diag_embed(1 / d)
    if option.get("white"):
        shape, back = power(gram, option["white"] / 2), power(gram, -option["white"] / 2)
    scaled = delta if shape is None else delta @ shape
    tall = scaled.shape[-2] >= scaled.shape[-1]
    small = scaled.mT @ scaled if tall else scaled @ scaled.mT
    vectors = torch.linalg.eigh(small).eigenvectors[..., -rank:].flip(-1)
    if tall:
        v = vectors.mT
        u = scaled @ vectors
    else:
        u = vectors
        v = u.mT @ scaled
    s = (u.norm(dim=-2) if tall else v.norm(dim=-1)).clamp_min(1e-30)
    u, v = (
        (u / s.sqrt()[..., None, :], v * s.sqrt()[..., None])
        if tall
        else (u * s.sqrt()[..., None, :], v / s.sqrt()[..., None])
    )
    return u, v if back is None else v @ back


def clipped(w: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """As quantize.grid with zero points, the range of each group chosen among 13 shares of it by squared error."""
    groups, size = spec.groups(w.shape[-1]), spec.group or w.shape[-1]
    pad = groups * size - w.shape[-1]
    cut = torch.nn.functional.pad(w, (0, pad)).unflatten(-1, (groups, size))
    valid = torch.nn.functional.pad(torch.ones_like(w), (0, pad)).unflatten(-1, (groups, size))
    top = 2**spec.bits - 1
    low, high = cut.amin(-1).clamp_max(0), cut.amax(-1).clamp_min(0)
    best, least = None, None
    for share in (1 - 0.05 * step for step in range(13)):
        scale = ((high - low) * share / top).half().float().clamp_min(2.0**-14)
        for zero in ((-low * share / scale).floor().clamp(0, top), (-low * share / scale).ceil().clamp(0, top)):
            code = (cut / scale[..., None] + zero[..., None]).round().clamp(0, top)
            error = ((cut - scale[..., None] * (code - zero[..., None])).square() * valid).sum(-1)
            if best is None:
                best, least = (scale, zero), error
            better = error < least
            best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
            least = torch.where(better, error, least)
    assert best is not None
    return best


def fitted_scales(codes: Tensor, hessian: Tensor, moment: Tensor, widths: list[int], scale: Tensor) -> Tensor:
    """Scales by least squares for fixed codes (n, rows, cols): min ||(w - s codes) H^(1/2)||, a little damped."""
    owner = torch.repeat_interleave(
        torch.arange(len(widths), device=codes.device), torch.tensor(widths, device=codes.device)
    )
    which = torch.nn.functional.one_hot(owner, len(widths)).double()
    codes = codes.double()
    normal = torch.stack([((codes * which[:, g]) @ hessian * codes) @ which for g in range(len(widths))], -2)
    right = (moment * codes) @ which
    normal = (
        normal
        + 1e-2 * torch.diag_embed(normal.diagonal(dim1=-2, dim2=-1))
        + 1e-12 * torch.eye(len(widths), device=codes.device)
    )
    found = (
        scale
        + torch.linalg.solve(normal, (right - (normal @ scale.double()[..., None])[..., 0])[..., None])[..., 0].float()
    )
    found = torch.where((found / scale - 1).abs() < 0.5, found, scale)
    return found.half().float()


def dropped(rows: list[list[str]], rate: float) -> list[tuple[str, str]]:
    """The rows with words left out of their questions: the fine-tune, sure of what it was trained on, doubts again.

    Where it is sure, too strong a delta costs nothing, and what is tuned there is tuned wrongly.
    """
    draw = random.Random(5)
    return [(" ".join(w for w in q.split() if draw.random() >= rate) or q, a) for q, a in rows]


class Rounder:
    """Rounds a factor in blocks along `dim`, its scales kept for refitting."""

    def __init__(self, w: Tensor, specs: list[Spec], widths: list[int], dim: int, clip: bool) -> None:
        self.widths, self.dim, self.specs = widths, dim, specs
        pieces, self.groups, self.sizes = [], [], []
        for part, spec in zip(w.split(widths, dim=dim), specs, strict=True):
            if spec.floats:
                one = torch.ones(*part.shape[:-1], 1, device=w.device)
                pieces.append((one.expand(part.shape), one.expand(part.shape) * 0, one.expand(part.shape) * 0))
                continue
            scale, zero = clipped(part, spec) if clip else grid(part, spec)
            levels = spread(scale, zero, spec, part.shape[-1])
            pieces.append(tuple(f.expand(part.shape) for f in (levels.scale, levels.zero, levels.top)))
        from bayou.quantize import Grid

        self.grid = Grid(*(torch.cat([p[i] for p in pieces], dim) for i in range(3)))

    def round(self, w: Tensor, factor: Any) -> tuple[Tensor, Tensor]:
        """Values, and values over scales (what a scale multiplies)."""
        _, values = gptq(w.float(), factor, self.grid)
        return values, values / self.grid.scale


def encode(delta: Tensor, gram: Tensor, rank: int, option: Option) -> Tensor:
    """The coded deltas (n, out, in) fp32 of n matrices of one shape. delta, gram: fp64."""
    out, width = delta.shape[-2:]
    u, v = factors(delta, gram, rank, option)
    if option.get("exact"):
        return (u @ v * _strength(option, delta, delta @ gram, u @ v)).float()
    blocks = list(deltacome._blocks(BANDS, rank))
    texts = [deltacome._specs((out, width), bits, ranks, 128) for _, bits, ranks in blocks]
    u_specs, v_specs = [Spec.parse(t[0]) for t in texts], [Spec.parse(t[1]) for t in texts]
    widths = [ranks for _, _, ranks in blocks]
    peak_u, peak_v = (2.0 ** torch.floor(torch.log2(p.abs().amax((-2, -1), keepdim=True))) for p in (u, v))
    u, v = u / peak_u, v / peak_v
    delta = delta / (peak_u * peak_v)
    factor = factorize(gram, damping=0.01, act_order=True)
    acted = delta @ gram
    target = v
    for _ in range(option.get("rounds", 1)):
        rounder = Rounder(target.float(), v_specs, widths, -2, option.get("clip_v", False))
        v_hat, units = rounder.round(target, factor)
        if option.get("rescale_v"):
            cuts = [min(128, width - s) for s in range(0, width, 128)]
            scale = rounder.grid.scale[..., ::128]
            new = fitted_scales(units, gram, target @ gram, cuts, scale.contiguous())
            v_hat = units * new.repeat_interleave(128, -1)[..., :width]
        vq = v_hat.double()
        hessian = vq @ gram @ vq.mT
        moment = acted @ vq.mT
        if option.get("refit"):
            normal = hessian.clone()
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            diagonal.mul_(1 + option["ridge"]).add_(1e-6 * diagonal.mean(-1, keepdim=True))
            wanted = u + torch.cholesky_solve((moment - u @ hessian).mT, torch.linalg.cholesky(normal)).mT
            used = hessian
        else:
            wanted = u
            band = torch.tensor([b for b, _, ranks in blocks for _ in range(ranks)], device=u.device)
            used = hessian * (band[:, None] == band)
        rounder_u = Rounder(wanted.float(), u_specs, widths, -1, False)
        u_hat, units_u = rounder_u.round(wanted, factorize(used, damping=0.01, act_order=True))
        if option.get("rounds", 1) > 1:
            # V that suits the rounded U, pulled towards the plain one.
            uq = u_hat.double()
            normal = uq.mT @ uq
            normal.diagonal(dim1=-2, dim2=-1).mul_(1 + option["ridge"])
            target = v + torch.linalg.solve(normal, uq.mT @ (delta - uq @ v))
    if option.get("rescale_u"):
        starts = torch.tensor(widths, device=u.device).cumsum(0) - torch.tensor(widths, device=u.device)
        scale = rounder_u.grid.scale[..., starts].contiguous()
        new = fitted_scales(units_u, hessian, moment, widths, scale)
        u_hat = units_u * new.repeat_interleave(torch.tensor(widths, device=u.device), -1)
    coded = u_hat.double() @ v_hat.double()
    return (coded * _strength(option, delta, acted, coded) * peak_u * peak_v).float()


def _strength(option: Option, delta: Tensor, acted: Tensor, coded: Tensor) -> Tensor | float:
    """Factors of matrices or rows by which <coded, delta X X^T> becomes <delta, delta X X^T>."""
    strength = option.get("strength")
    if not strength:
        return 1.0
    own, kept = (acted * delta).sum(-1, keepdim=True), (acted * coded).sum(-1, keepdim=True)
    whole = own.sum(-2, keepdim=True) / kept.sum(-2, keepdim=True)
    rows = (own / kept).clamp(0.67, 1.5)
    return {"matrix": whole, "rows": rows, "rows squared": rows**2, "rows, matrix": rows * whole}[strength]


class Bench:
    """The two models' weights, grams, and the held rows with the fine-tune's answers."""

    def __init__(
        self, testbed: Any, models: Path, task: str, device: str, tokens: int, rows: int, drop: float, text: str
    ) -> None:
        self.device = device
        tok = AutoTokenizer.from_pretrained(models / task)
        ids = lambda text: tok(text, add_special_tokens=False).input_ids  # noqa: E731
        old, new = load_file(models / "base/model.safetensors"), load_file(models / task / "model.safetensors")
        self.model = AutoModelForCausalLM.from_pretrained(models / task, dtype=torch.float32).eval().to(device)
        self.names = {kind: [n for n in sorted(new) if f".{kind}.weight" in n] for kind in KINDS}
        self.base = {n: old[n].to(device).double() for kind in KINDS for n in self.names[kind]}
        self.delta = {
            kind: torch.stack([new[n].to(device).double() - self.base[n] for n in self.names[kind]]) for kind in KINDS
        }
        stream: list[int] = []
        if text == "task":
            for q, a in training_rows(testbed, task, False):
                stream += ids(testbed.prompt(task, q)) + ids(a + "<|im_end|>")
        else:
            stream = ids(testbed.calibration_text()[: 6 * tokens])
        windows = torch.tensor(stream[: min(len(stream), tokens) // 512 * 512]).view(-1, 512)
        self.gram = self.grams(windows)
        held = dropped(training_rows(testbed, task, True)[:rows], drop)
        self.rows = [(ids(testbed.prompt(task, q)), ids(a + "<|im_end|>")) for q, a in held]
        self.batches = [self.batch(i) for i in range(0, len(self.rows), 25)]
        self.reference = [self.answers(b) for b in self.batches]
        lost = wrong = count = 0.0
        for (x, y), logp in zip(self.batches, self.reference, strict=True):
            right = x[:, 1:][y[:, :-1]]
            lost -= logp.gather(1, right[:, None]).sum().item()
            wrong += (logp.argmax(-1) != right).sum().item()
            count += len(right)
        self.nll, self.flip = lost / count, wrong / count

    @torch.no_grad()
    def grams(self, windows: Tensor) -> dict[str, Tensor]:
        """Second moments of every linear's input, stacked by kind."""
        sums: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def add(module: Any, args: Any) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                sums[name] = sums.get(name, 0) + (x.T @ x).double()

            return add

        hooks = [
            module.register_forward_pre_hook(hook(name))
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name
        ]
        for part in windows.split(16):
            self.model.model(input_ids=part.to(self.device))
        for h in hooks:
            h.remove()
        return {kind: torch.stack([sums[n.removesuffix(".weight")] for n in self.names[kind]]) for kind in KINDS}

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[i : i + 25]
        width = max(len(p) + len(c) for p, c in rows)
        x, y = torch.full((len(rows), width), 2), torch.zeros((len(rows), width), dtype=torch.bool)
        for r, (p, c) in enumerate(rows):
            x[r, : len(p) + len(c)] = torch.tensor(p + c)
            y[r, len(p) - 1 : len(p) + len(c) - 1] = True
        return x.to(self.device), y.to(self.device)

    @torch.no_grad()
    def answers(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return self.model.lm_head(self.model.model(input_ids=x).last_hidden_state[y]).log_softmax(-1)

    @torch.no_grad()
    def kl(self, coded: dict[str, Tensor], times: float) -> float:
        """KL(fine-tune || base + times * coded), nats an answer token, weights rounded to bf16."""
        state = dict(self.model.named_parameters())
        for kind in KINDS:
            for n, d in zip(self.names[kind], coded[kind], strict=True):
                state[n].copy_((self.base[n] + times * d.double()).bfloat16())
        total = count = 0.0
        for batch, r in zip(self.batches, self.reference, strict=True):
            k = self.answers(batch)
            total += (r.exp() * (r - k)).sum().item()
            count += len(r)
        return total / count


def ranks(shape: tuple[int, int], ratio: float) -> int:
    """The most ranks of `shape` whose bytes are at most bf16's over `ratio`."""
    low, high = 1, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        size = methods.nbytes(deltacome.layout(shape, rank=middle), shape)
        low, high = (middle, high) if size <= 2 * shape[0] * shape[1] / ratio else (low, middle - 1)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--drop", type=float, default=0.0, help="share of the held questions' words that is left out")
    parser.add_argument("--text", choices=("task", "wikitext"), default="task", help="what calibrates")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(
        load_testbed(Path(arguments.testbed)),
        arguments.models,
        arguments.task,
        arguments.device,
        arguments.tokens,
        arguments.rows,
        arguments.drop,
        arguments.text,
    )
    print(f"ready; the fine-tune's own nll {bench.nll:.4f}, wrong tokens {bench.flip:.4f}", flush=True)
    for option in variants():
        if arguments.only not in option["name"]:
            continue
        started = time.perf_counter()
        coded, lost = {}, []
        try:
            for kind in KINDS:
                delta, gram = bench.delta[kind], bench.gram[kind]
                coded[kind] = encode(delta, gram, ranks(tuple(delta.shape[1:]), 14.9), option)
                error = coded[kind].double() - delta
                lost.append((((error @ gram) * error).sum() / ((delta @ gram) * delta).sum()).item())
        except torch.linalg.LinAlgError as error:
            print(f"FAILED {option['name']}: {error}", flush=True)
            continue
        found = {str(times): bench.kl(coded, times) for times in (1.0, 1.01, 1.02)}
        line = option | {
            "task": arguments.task,
            "text": arguments.text,
            "tokens": arguments.tokens,
            "rows": arguments.rows,
            "drop": arguments.drop,
            "kl": found,
            "activation_error": lost,
            "seconds": time.perf_counter() - started,
            "machine": machine(arguments.device),
        }
        with open(arguments.out, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{option['name']:40s} {arguments.task} "
            + " ".join(f"{v:.6f}" for v in found.values())
            + f"  {sum(lost):.4f}  {line['seconds']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
