"""Layer by layer, with each delta corrected for what the layers before it have lost: what that is worth in KL.

    python bench/corrected_targets.py --testbed PATH/testbed.py --models TB --task intent --keep FOLDER \
        --ratio 64 --only "plain" "corrected, ridge 1" --out FILE.jsonl

Ranks alone, those of deltacome at 1/16 or 1/64; nothing is rounded, embedding and norms are the fine-tune's own. A
linear of the fine-tune is given x and has to give W x; in the compressed model it is given y instead, and W0 y is there
already. So its delta D is not approximated as it is, but as

    D* = D + W E[(x - y) y^T] (E[y y^T] + ridge)^-1         ("corrected": the least-squares fit of W x by (W0 + D*) y)

"and the residual" also asks o_proj and down_proj for what the residual stream lacks. D* is cut to its rank by SVD
(metric 0) or in the metric E[y y^T] (1), and each row gets its full strength back. Scored as auto_bed.py says.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tune_refit
from auto_bed import Bed
from quality import load_testbed, machine, training_rows
from torch import Tensor, nn
from transformers import AutoTokenizer
from tune_refit import KINDS

RANKS = {
    16.0: dict(zip(KINDS, (108, 55, 55, 108, 151, 151, 173), strict=True)),
    64.0: dict(zip(KINDS, (23, 9, 9, 23, 31, 31, 38), strict=True)),
}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "metric 1": {"metric": 1.0},
    "on compressed activations": {"sequential": True},
    "corrected, ridge .3": {"ridge": 0.3},
    "corrected, ridge 1": {"ridge": 1.0},
    "corrected, ridge 3": {"ridge": 3.0},
    "corrected once a layer, ridge 1": {"ridge": 1.0, "once": True},
    "corrected and the residual, ridge .1": {"ridge": 0.1, "residual": True},
    "corrected and the residual, ridge 1": {"ridge": 1.0, "residual": True},
    "corrected, ridge 1, metric 1": {"ridge": 1.0, "metric": 1.0},
    "corrected, ridge 1, metric .5": {"ridge": 1.0, "metric": 0.5},
}


def cut(delta: Tensor, moment: Tensor, rank: int, metric: float) -> Tensor:
    """The best approximation of a rank, in the metric moment^metric."""
    d = delta.double()
    a = d
    if metric:
        damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        a = d @ tune_refit.power(damped, metric / 2)
    if a.shape[0] <= a.shape[1]:
        u = torch.linalg.eigh(a @ a.T).eigenvectors[:, -rank:]
    else:
        u = a @ torch.linalg.eigh(a.T @ a).eigenvectors[:, -rank:]
        u = u / u.norm(dim=0)
    return (u @ (u.T @ d)).float()


def strengthened(delta: Tensor, coded: Tensor, moment: Tensor) -> Tensor:
    """Each row at its full strength, as deltacome's refit `rows`."""
    wanted = delta @ moment
    own, kept = (wanted * delta).sum(-1, keepdim=True), (wanted * coded).sum(-1, keepdim=True)
    return coded * torch.where((kept > 0) & (own > 0), own / kept, 1.0).clamp(0.5, 2.0)


@contextmanager
def listening(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the layer's linears are given, by the last of their names; "middle": the residual stream after attention."""
    heard: dict[str, Tensor] = {}

    def hear(name: str) -> Any:
        return lambda _, given: heard.__setitem__(name, given[0].reshape(-1, given[0].shape[-1]))

    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    hooks = [modules[group[0]].register_forward_pre_hook(hear(group[0])) for group in GROUPS]
    hooks.append(modules["post_attention_layernorm"].register_forward_pre_hook(hear("middle")))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


class Chain:
    """The fine-tune and its compressed self, a layer after the other, over the same windows."""

    def __init__(self, bed: Bed, windows: Tensor) -> None:
        self.bed, self.windows = bed, windows
        body = bed.model.model
        self.layers = body.layers
        places = torch.arange(windows.shape[1], device=windows.device)[None]
        self.start = body.embed_tokens(windows)
        length = windows.shape[1]
        mask = torch.full((length, length), float("-inf"), device=windows.device).triu(1)[None, None]
        self.given = {"attention_mask": mask, "position_ids": places}
        self.given["position_embeddings"] = body.rotary_emb(self.start, places)

    def through(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's output, and what its linears were given."""
        with listening(layer) as heard:
            y = layer(x, **self.given)
        return (y[0] if isinstance(y, tuple) else y), heard

    def compress(self, ranks: dict[str, int], variant: dict[str, Any]) -> dict[str, Tensor]:
        """The deltas of all layers by a variant."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        theirs = ours = self.start
        for index, layer in enumerate(self.layers):
            linears = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
            whole = {kind: linears[kind].weight.clone() for kind in KINDS}
            after, heard = self.through(layer, theirs)
            here, apart = heard, "ridge" in variant or "sequential" in variant
            for group in GROUPS:
                if apart and (group == GROUPS[0] or not variant.get("once")):
                    here = self.through(layer, ours)[1]
                x, y = heard[group[0]], here[group[0]]
                moment = y.T @ y / len(y)
                for kind in group:
                    delta = self.bed.delta[kind][index]
                    target = delta
                    if "ridge" in variant:
                        lacking = (x - y) @ whole[kind].T
                        if variant.get("residual") and kind == "o_proj":
                            lacking = lacking + (theirs - ours).reshape(lacking.shape)
                        if variant.get("residual") and kind == "down_proj":
                            lacking = lacking + heard["middle"] - here["middle"]
                        ridge = variant["ridge"] * moment.diagonal().mean() * torch.eye(len(moment), device=y.device)
                        normal = (moment + ridge).double()
                        target = delta + torch.linalg.solve(normal, (y.T @ lacking / len(y)).double()).T.float()
                    coded = cut(target, moment, ranks[kind], variant.get("metric", 0.0))
                    coded = strengthened(target, coded, moment)
                    found[kind].append(coded)
                    linears[kind].weight.copy_(whole[kind] - delta + coded)
            ours = self.through(layer, ours)[0]
            theirs = after
            for kind in KINDS:
                linears[kind].weight.copy_(whole[kind])
        return {kind: torch.stack(parts) for kind, parts in found.items()}


def windows_of(testbed: Any, folder: Path, task: str, text: str, tokens: int) -> Tensor:
    """Windows of 512 tokens of other training rows, or of wikitext."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = lambda line: tokenizer(line, add_special_tokens=False).input_ids  # noqa: E731
    stream: list[int] = []
    if text == "wikitext":
        stream = ids(testbed.calibration_text()[: 6 * tokens])
    else:
        for question, answer in training_rows(testbed, task, False):
            stream += ids(testbed.prompt(task, question)) + ids(answer + "<|im_end|>")
    return torch.tensor(stream[: min(len(stream), tokens) // 512 * 512]).view(-1, 512)


@torch.no_grad()
def main() -> None:
    """Score the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--testbed", "--models", "--keep", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--text", choices=("task", "wikitext"), default="task")
    parser.add_argument("--ratio", type=float, nargs="+", default=[64.0])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    a = parser.parse_args()
    drop = {"intent": 0.25, "sql": 0.08}[a.task]
    testbed = load_testbed(a.testbed)
    bed = Bed(testbed, a.models, a.task, a.device, a.text, a.tokens, a.rows, drop, a.keep)
    windows = windows_of(testbed, a.models / a.task, a.task, a.text, a.tokens).to(a.device)
    chain = Chain(bed, windows)
    for ratio in a.ratio:
        for name in a.only:
            bed.kl(None, None)  # which puts the fine-tune's own weights back
            started = time.perf_counter()
            coded = chain.compress(RANKS[ratio], VARIANTS[name])
            line = {"name": name, "task": a.task, "ratio": ratio, "text": a.text, "tokens": windows.numel()}
            line |= {"rows": a.rows, "seconds": time.perf_counter() - started, "kl": bed.kl(coded, None)}
            line |= {"kl_1.02": bed.kl(coded, None, 1.02), "machine": machine(a.device)}
            with open(a.out, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{name}: KL {line['kl']:.6f}, x 1.02 {line['kl_1.02']:.6f}, {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
