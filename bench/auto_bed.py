"""What bench/auto_ablation.py scores candidates on: two models' weights, input moments, and doubtful training rows.

Training rows with words left out of their questions (tune_refit.dropped), never test rows; whole models, embedding
included. What does not change from candidate to candidate (moments, decompositions, the fine-tune's own last hidden
states) is kept in a folder, so that a candidate costs its rounding and one forward over the rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import training_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune_refit import KINDS, dropped

TABLE = "model.embed_tokens.weight"
EXACT = 70_272 + 47_300
"""Bytes of a file that are the same for every candidate: norms, header with the Plan, digests."""


class Bed:
    """One task. moment: of each kind, (layers, in, in) a token; q, k, v share theirs, as gate and up do.

    apart: whether candidates' linears and embedding are scored by themselves too.
    """

    apart = False

    def __init__(
        self, testbed: Any, models: Path, task: str, device: str, text: str, tokens: int, rows: int, drop: float,
        keep: Path,
    ) -> None:  # fmt: skip
        self.device, self.task, self.keep = device, task, keep / f"{task}-{text}-{tokens}"
        self.keep.mkdir(parents=True, exist_ok=True)
        tok = AutoTokenizer.from_pretrained(models / task)
        ids = lambda line: tok(line, add_special_tokens=False).input_ids  # noqa: E731
        old, new = load_file(models / "base/model.safetensors"), load_file(models / task / "model.safetensors")
        self.nbytes = sum(w.numel() * w.element_size() for w in new.values())
        self.model = AutoModelForCausalLM.from_pretrained(models / task, dtype=torch.float32).eval().to(device)
        self.names = {kind: [n for n in sorted(new, key=_layer) if f".{kind}.weight" in n] for kind in KINDS}
        self.base = {n: old[n].to(device) for kind in KINDS for n in self.names[kind]}
        self.base_table = old[TABLE].to(device)
        self.table_delta = (new[TABLE].float() - old[TABLE].float()).to(device)
        self.delta = {
            kind: torch.stack([new[n].float() - old[n].float() for n in self.names[kind]]).to(device) for kind in KINDS
        }
        self.own_table = new[TABLE].float().to(device)
        self.moment, self.last_moment = self.kept("moments", lambda: self._moments(ids, testbed, text, tokens))
        held = dropped(training_rows(testbed, task, True)[:rows], drop)
        pairs = [(ids(testbed.prompt(task, q)), ids(a + "<|im_end|>")) for q, a in held]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        self.batches = [self._batch(pairs[i : i + 20]) for i in range(0, len(pairs), 20)]
        self.reference = self.kept(f"hidden-{rows}-{drop}", lambda: [self._hidden(b) for b in self.batches])

    def kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, from the folder where it is there."""
        path = self.keep / f"{name}.pt"
        if not path.exists():
            torch.save(compute(), path)
        return torch.load(path, map_location=self.device)

    @torch.no_grad()
    def _moments(self, ids: Any, testbed: Any, text: str, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
        stream: list[int] = []
        if text == "task":
            for q, a in training_rows(testbed, self.task, False):
                stream += ids(testbed.prompt(self.task, q)) + ids(a + "<|im_end|>")
        else:
            stream = ids(testbed.calibration_text()[: 6 * tokens])
        windows = torch.tensor(stream[: min(len(stream), tokens) // 512 * 512]).view(-1, 512)
        sums: dict[str, Tensor] = {}
        wanted = {
            n.removesuffix(".weight") for k in ("q_proj", "o_proj", "gate_proj", "down_proj") for n in self.names[k]
        }
        wanted |= {"lm_head"}

        def hook(name: str) -> Any:
            def add(module: Any, args: Any) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                sums[name] = sums.get(name, 0) + x.T @ x

            return add

        named = self.model.named_modules()
        hooks = [m.register_forward_pre_hook(hook(name)) for name, m in named if name in wanted]
        for part in windows.split(8):
            self.model(input_ids=part.to(self.device), logits_to_keep=part.shape[1])
        for h in hooks:
            h.remove()
        count = windows.numel()
        found = {}
        for kind in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            found[kind] = torch.stack([sums[n.removesuffix(".weight")] / count for n in self.names[kind]])
        found["k_proj"] = found["v_proj"] = found["q_proj"]
        found["up_proj"] = found["gate_proj"]
        return found, sums["lm_head"] / count

    def _batch(self, pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        width = max(len(p) + len(c) for p, c in pairs)
        x, y = torch.full((len(pairs), width), 2), torch.zeros((len(pairs), width), dtype=torch.bool)
        for r, (p, c) in enumerate(pairs):
            x[r, : len(p) + len(c)] = torch.tensor(p + c)
            y[r, len(p) - 1 : len(p) + len(c) - 1] = True
        return x.to(self.device), y.to(self.device)

    @torch.no_grad()
    def _hidden(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model.model(input_ids=batch[0]).last_hidden_state[batch[1]]

    @torch.no_grad()
    def kl(self, coded: dict[str, Tensor] | None, table: Tensor | None, times: float = 1.0) -> float:
        """KL(fine-tune || base + coded), nats an answer token; None = the fine-tune's own linears or embedding."""
        state = dict(self.model.named_parameters())
        for kind in KINDS:
            for i, n in enumerate(self.names[kind]):
                d = self.delta[kind][i] if coded is None or kind not in coded else times * coded[kind][i]
                state[n].copy_((self.base[n].float() + d).bfloat16())
        own = self.own_table if table is None else (self.base_table.float() + table).bfloat16().float()
        state[TABLE].copy_(own)
        return self.scored(own)

    def scored(self, own: Tensor) -> float:
        """KL(fine-tune || model as it stands), nats an answer token; own: its embedding, which is its head."""
        total = count = 0.0
        for batch, hidden in zip(self.batches, self.reference, strict=True):
            for theirs, ours in zip(hidden.split(512), self._hidden(batch).split(512), strict=True):
                r, k = (theirs @ self.own_table.T).log_softmax(-1), (ours @ own.T).log_softmax(-1)
                total += (r.exp() * (r - k)).sum().item()
                count += len(r)
        return total / count


def _layer(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[2]) if parts[2].isdigit() else -1, name)
