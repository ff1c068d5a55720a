"""How far a compressed model's activations are from the fine-tune's: the paper's table, by thirds of the depth.

arXiv 2406.08903, section 6.5: squared error of each linear's output on the task's text, given the fine-tune's own
input, in the first, middle and last third of the layers; over all output columns, and over the outlier columns, the
1 % of largest mean magnitude. Also relative to what the delta itself contributes there.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

THIRDS = ("low", "middle", "high")


@torch.no_grad()
def activation_error(base: Path, tuned: Path, made: Path, texts: list[str], device: str) -> dict[str, dict[str, float]]:
    """{third: {"all", "outliers": mean squared error; "all_relative", "outliers_relative": over the delta's own}}."""
    tok = AutoTokenizer.from_pretrained(tuned)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval().to(device)
    old, new = load_file(base / "model.safetensors"), load_file(made / "model.safetensors")
    depth = model.config.num_hidden_layers
    sums = {third: dict.fromkeys(("all", "outliers", "all_delta", "outliers_delta", "n", "m"), 0.0) for third in THIRDS}

    def hook(name: str, third: str) -> Any:
        lost = new[f"{name}.weight"].to(device).float()
        moved = old[f"{name}.weight"].to(device).float()

        def measure(module: nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            size = y.reshape(-1, y.shape[-1]).abs().mean(0)
            outliers = size.topk(max(1, len(size) // 100)).indices
            error = (x @ (lost - module.weight).T).square()
            own = (x @ (moved - module.weight).T).square()
            total = sums[third]
            total["all"] += error.sum().item()
            total["all_delta"] += own.sum().item()
            total["outliers"] += error[:, outliers].sum().item()
            total["outliers_delta"] += own[:, outliers].sum().item()
            total["n"] += error.numel()
            total["m"] += error[:, outliers].numel()

        return measure

    hooks = [
        module.register_forward_hook(hook(name, THIRDS[int(name.split(".")[2]) * 3 // depth]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    for text in texts:
        ids = torch.tensor([tok(text, add_special_tokens=False).input_ids], device=device)
        model.model(input_ids=ids)
    for handle in hooks:
        handle.remove()
    return {
        third: {
            "all": t["all"] / t["n"],
            "outliers": t["outliers"] / t["m"],
            "all_relative": t["all"] / t["all_delta"],
            "outliers_relative": t["outliers"] / t["outliers_delta"],
        }
        for third, t in sums.items()
    }
