"""A pico base with eight fine-tunes of it, stored in all ways, and what each of them answers by itself."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from dense import dense_file
from pico import perturb, pico
from transformers import PreTrainedModel

from bayou.compress import compress
from bayou.restore import restore
from bayou.serving.engine import Engine, Piece
from bayou.serving.sampling import Sampling
from bayou.serving.tenant import Tenant

NAMES = ("dense", "gain", "lowrank", "bitdelta", "deltacome", "grown", "second", "exact")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def make(root: Path, architecture: str = "llama_gqa") -> tuple[Path, dict[str, Path]]:
    """The base's folder and the file of each of NAMES."""
    base = pico(architecture, root / "base")
    files = {}
    for seed, name in enumerate(NAMES, 1):
        tuned = perturb(base, root / name, seed=seed, scale=0.3, grow_vocab=3 if name == "grown" else 0)
        if name == "gain":  # ends where the others do not, and speaks in turns
            (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40], "temperature": 0.5}))
            (tuned / "chat_template.jinja").write_text(TEMPLATE)
        out = root / "files" / f"{name}.bayou"
        out.parent.mkdir(exist_ok=True)
        if name in ("lowrank", "bitdelta", "deltacome"):
            small = {"calibration": "none"} if name == "deltacome" else {}
            compress(base, tuned, out, method=name, ratio=4, distill_steps=0, **small)
        elif name == "exact":
            compress(base, tuned, out, method="lowrank", ratio=1.5, keep=("embeddings", "norms"), options={"bits": 8})
        else:
            dense_file(base, tuned, out, gain=0.75 if name == "gain" else 1.0)
        files[name] = out
    return base, files


def alone(base: Path, file: Path | None, out: Path) -> PreTrainedModel:
    """What `bayou restore --dtype float32` gives, as transformers loads it; the base itself without a file."""
    folder = base if file is None else restore(base, file, out, dtype="float32")
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens, the most likely ones, whatever they are."""
    made, next_ids, past = [], torch.tensor([list(prompt)]), None
    with torch.no_grad():
        while len(made) < count:
            found = model(next_ids, past_key_values=past, use_cache=True)
            past, next_ids = found.past_key_values, found.logits[:, -1:].argmax(-1)
            made.append(next_ids.item())
    return made


def gap(model: PreTrainedModel, tokens: Sequence[int]) -> float:
    """How far the best score for the token that follows is above the second best."""
    with torch.no_grad():
        first, second = model(torch.tensor([list(tokens)])).logits[0, -1].topk(2).values.tolist()
    return first - second


@dataclass
class Heard:
    """All pieces of one answer."""

    pieces: list[Piece]
    tokens: list[int]
    text: str
    reason: str | None
    refused: Exception | None


class Asked:
    """One request to the engine, whose pieces are collected."""

    def __init__(self, engine: Engine, tenant: Tenant | str, prompt: Sequence[int], sampling: Sampling) -> None:
        self.pieces: list[Piece] = []
        self._done = threading.Event()
        found = engine.bank.find(tenant) if isinstance(tenant, str) else tenant
        assert found is not None
        (self.answer,) = engine.submit(found, prompt, sampling, self._hear)

    def _hear(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.last:
            self._done.set()

    def wait(self, seconds: float = 180) -> Heard:
        """What was heard, to the end."""
        assert self._done.wait(seconds), "no answer came to an end"
        tokens = [chosen.token for piece in self.pieces for chosen in piece.chosen]
        last = self.pieces[-1]
        return Heard(self.pieces, tokens, "".join(piece.text for piece in self.pieces), last.reason, last.refused)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random prompts of 1 to `longest` printable characters."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(5, 101, (length,), generator=g).tolist() for length in lengths]
