"""A layer compressed the way that the paper's code does it, as the yardstick for ours.

For each matrix a full SVD; for each of three bands of its singular vectors, and each of the four groups of matrices
with one input, a pass over the calibration text for V's Hessian and one for U's, then a pass for the band's outputs: 27
passes a layer, a window at a time. Every matrix and band has a Hessian, a factorisation and a loop over its columns of
its own, in PyTorch operations. (The paper's code also rebuilds the dense weight for every window; this does not.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from bayou import clock, skeleton
from bayou.benchmarks import record
from bayou.benchmarks.pair import MemoryCheckpoint, Shape
from bayou.methods.deltacome import parse_bands

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Matrices of a layer with one input."""

BANDS = "8x2,3x32,2"


def layer(
    base: MemoryCheckpoint, tuned: MemoryCheckpoint, shape: Shape, windows: Tensor, ranks: dict[str, int], device: str
) -> dict[str, Any]:
    """Do layer 0 so, to the same `ranks` by name; seconds, steps and passes."""
    words = [word for group in GROUPS for word in group]
    names = {word: name for word in words for name in shape.linears() if f".{word}_" in name}
    model = skeleton.build(tuned.folder)
    places = skeleton.places(model, tuned.names())
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    path, layers = skeleton.decoder_layers(model)
    skeleton.fill(model, "", places, tuned.read, dtype=dtype, device=device, skip=path)
    skeleton.fill(model, f"{path}.0", places, tuned.read, dtype=dtype, device=device)
    block = layers[0]
    passes = 0
    sums: dict[str, Tensor] = {}

    def run(watched: tuple[str, ...], project: dict[str, Tensor]) -> None:
        """One pass over the text; sums the moments of the inputs of `watched`, multiplied by `project` first."""
        nonlocal passes
        passes += 1
        sums.clear()
        hooks = [
            _module(block, names[word]).register_forward_pre_hook(_summing(sums, word, project)) for word in watched
        ]
        with clock.step("passes"):
            for ids in windows.split(1):
                hidden = model.get_input_embeddings()(ids.to(device))
                positions = torch.arange(ids.shape[1], device=device)[None]
                embedded = model.get_decoder().rotary_emb(hidden, positions)
                block(hidden, attention_mask=None, position_embeddings=embedded)
        for hook in hooks:
            hook.remove()

    with clock.measuring() as steps, clock.exact(lambda: record.finish(device)), clock.step("other"), torch.no_grad():
        factors = {}
        for word, name in names.items():
            full = f"model.layers.0.{name}"
            delta = tuned.read(full).to(device).float() - base.read(full).to(device).float()
            with clock.step("svd"):
                u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            factors[word] = (u * s, vh)
        start = dict.fromkeys(names, 0)
        for bits, count in parse_bands(BANDS):
            for group in GROUPS:
                run(group, {})
                rounded, band = {}, {}
                for word in group:
                    stop = ranks[names[word]] if count is None else start[word] + count
                    band[word], start[word] = slice(start[word], stop), stop
                    with clock.step("column loops"):
                        rounded[word] = column_loop(factors[word][1][band[word]], sums[word], bits)
                run(group, {word: v.to(dtype) for word, v in rounded.items()})
                for word in group:
                    with clock.step("column loops"):
                        column_loop(factors[word][0][:, band[word]], sums[word], bits)
            run((), {})
    seconds = sum(steps.values())
    return {"seconds": seconds, "passes": passes, "steps": {name: {"seconds": s} for name, s in steps.items()}}


def _module(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name.removesuffix(".weight"))


def _summing(sums: dict[str, Tensor], word: str, project: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        with clock.step("moments"):
            x = args[0].flatten(0, -2)
            x = (x @ project[word].T if word in project else x).float()
            sums[word] = x.T @ x if word not in sums else sums[word].addmm_(x.T, x)

    return hook


def column_loop(w: Tensor, hessian: Tensor, bits: int, group: int = 128, damping: float = 0.01) -> Tensor:
    """GPTQ of `w` (rows, cols) with asymmetric groups and act-order, column by column; the rounded values."""
    rows, cols = w.shape
    top = 2**bits - 1
    scale, zero = torch.empty_like(w), torch.empty_like(w)
    for first in range(0, cols, group):
        part = w[:, first : first + group]
        low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
        step = ((high - low) / top).clamp_min(1e-8)
        scale[:, first : first + group], zero[:, first : first + group] = step, (-low / step).round()
    h = hessian.double()  # in fp32, as in the paper's code, this may fail; on a GPU with fp64 units it is as fast
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean() + 1e-8
    order = diagonal.argsort(descending=True)
    h, w, scale, zero = h[order][:, order], w[:, order].clone(), scale[:, order], zero[:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    for first in range(0, cols, 128):
        last = min(first + 128, cols)
        errors = torch.zeros(rows, last - first, device=w.device)
        for j in range(first, last):
            code = torch.clamp(torch.round(w[:, j] / scale[:, j] + zero[:, j]), 0, top)
            value = scale[:, j] * (code - zero[:, j])
            error = (w[:, j] - value) / inverse[j, j]
            w[:, j:last] -= error[:, None] * inverse[j, j:last][None]
            w[:, j] = value
            errors[:, j - first] = error
        w[:, last:] -= errors @ inverse[first:last, last:]
    return w[:, order.argsort()]
