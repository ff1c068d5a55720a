"""`bayou export`: a .bayou file as an adapter that other programs take as they are, and what that costs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bayou import skeleton
from bayou.calibrate import tokenizer_of
from bayou.checkpoint import atomic
from bayou.errors import BadInput
from bayou.evaluate import evaluate
from bayou.integrations import gguf, peft
from bayou.integrations.adapter import TABLES, Adapter, Progress
from bayou.integrations.candidate import Candidate
from bayou.restore import appearing

FORMATS = ("peft", "gguf-lora")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    base: str | Path,
    file: str | Path,
    out: str | Path,
    *,
    to: str = "peft",
    rank: int | None = None,
    dtype: str = "float16",
    embeddings: str = "leave",
    exact: bool = False,
    data: str | Path | None = None,
    rows: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    base_revision: str | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write a fine-tune as a LoRA adapter over its base; returns what that keeps and what it loses.

    Args:
        base: folder or Hub id of the base that the file was made against.
        file: a .bayou file; one that leans on no base is refused.
        out: the folder (peft) or file (gguf-lora) to write; it appears whole or not at all.
        to: "peft" (peft, vLLM, SGLang, LoRAX) or "gguf-lora" (llama.cpp).
        rank: of every LoRA: the best of that rank, where the delta has more. None keeps each matrix's own, which only
            low-rank deltas have (not bitdelta's).
        dtype: of A and B: float16, bfloat16 or float32.
        embeddings: "leave" the embedding and the head out, take them as "lora", or "full" (peft: modules_to_save).
        exact: peft: norms and biases too, exactly (modules_to_save, lora_bias).
        data: a text, or .jsonl with prompt and answer: the adapter is compared with the restored fine-tune on it, on
            `rows` of it, drawn by `seed`; both models are in memory then, in fp32.

    Returns:
        path, format, bytes (of the tensors' file), rank (the largest); kinds: kind of tensor -> tensors, how, ranks,
        energy (share of the delta's squared norm that arrives), relative (norm of the delta over that of the base's
        tensors); energy: of all; new_rows: rows of the vocabulary that are lost; warnings: what else is, in words;
        vllm: max_lora_rank and objections, None for gguf-lora; data: what `evaluate` says, or None.

    Raises:
        WrongBase, BadFile, DamagedFile; Unsupported for a file or an architecture that has no such adapter; BadInput
        for options that do not go together, data that cannot be used, an `out` that is there already; BayouError for a
        full disk. Nothing is written then.
    """
    if to not in FORMATS or dtype not in DTYPES:
        raise BadInput(f"--to {to} --dtype {dtype}: choose {' or '.join(FORMATS)}, {', '.join(DTYPES)}")
    target = Path(out)
    _check_out(target, to)
    options = {"rank": rank, "embeddings": embeddings, "exact": exact, "base_revision": base_revision}
    adapter = Adapter(base, file, device=device, **options)  # type: ignore[arg-type]
    if to == "peft":
        peft.check(adapter)
    else:
        gguf.check(adapter, embeddings, exact)
    if data is not None and adapter.new_rows:
        raise BadInput(
            f"--data: the fine-tune has {adapter.new_rows} tokens more than the base, and the adapter leaves them out, "
            "so the two cannot be compared; leave --data out, or take --embeddings full"
        )
    candidate = None if data is None else Candidate(adapter.base.folder, device)
    name = adapter.file.base["id"] or str(base)
    compared = None
    with _made(target, to) as work:
        if to == "peft":
            peft.write(adapter, work, name, DTYPES[dtype], candidate, progress)
        else:
            gguf.write(adapter, work, DTYPES[dtype], candidate, progress)
        adapter.measure()
        if candidate is not None and data is not None:
            compared = _compare(adapter, candidate, Path(data), rows, device, seed)
    delta, lost = (sum(getattr(kind, key) for kind in adapter.kinds.values()) for key in ("delta", "lost"))
    server = peft.vllm(adapter) if to == "peft" else None
    return {
        "path": str(target),
        "format": to,
        "bytes": (target if target.is_file() else target / "adapter_model.safetensors").stat().st_size,
        "rank": max(change.rank for change in adapter.loras),
        "kinds": {name: kind.report() for name, kind in adapter.kinds.items()},
        "energy": 1 - lost / delta if delta else 1.0,
        "new_rows": adapter.new_rows,
        "warnings": _warnings(adapter, to),
        "vllm": server,
        "data": compared,
    }


def _check_out(out: Path, to: str) -> None:
    if to == "gguf-lora":
        if out.exists():
            raise BadInput(f"{out} exists; choose another file")
        if not out.parent.is_dir():
            raise BadInput(f"{out.parent} is not a folder; make it first")
    elif out.exists() and (
        not out.is_dir() or any(out.glob("*.safetensors*")) or (out / "adapter_config.json").exists()
    ):
        raise BadInput(f"{out} exists and holds a model (or is a file); choose another folder")


@contextlib.contextmanager
def _made(out: Path, to: str) -> Iterator[Path]:
    """What is written there comes to lie at `out` at the end: a folder, or a file."""
    if to == "peft":
        with appearing(out) as folder:
            yield folder
    else:
        with atomic(out) as handle:
            yield Path(handle.name)  # gguf opens it by its name: the same file, which `atomic` syncs and renames


def _compare(
    adapter: Adapter, candidate: Candidate, data: Path, rows: int | None, device: str, seed: int
) -> dict[str, Any]:
    """The restored fine-tune and the base with the adapter, on `data`."""
    tokenizer = tokenizer_of({name: adapter.file.read_file(name, adapter.base.folder) for name in adapter.file.files})
    reference = skeleton.build(adapter.file.fine_tune_config(adapter.base.folder))
    places = skeleton.places(reference, adapter.file.tensors())
    skeleton.fill(reference, "", places, adapter.restorer.tensor, device=device)
    return evaluate(reference, candidate.model, tokenizer, data, rows=rows, device=device, seed=seed)


def _warnings(adapter: Adapter, to: str) -> list[str]:
    found = []
    if adapter.new_rows:
        found.append(
            f"{adapter.new_rows} tokens that the fine-tune added are lost, and its tokenizer is not written: the base "
            "has no rows for them"
        )
    grown = max((adapter.rows_beyond(change) for change in adapter.whole if change.kind in TABLES), default=0)
    if grown:
        rows = adapter.restorer.spec(next(c.tensor for c in adapter.whole if c.kind in TABLES))[1][0]
        found.append(
            f"the fine-tune added {grown} tokens: call resize_token_embeddings({rows}) on the base before loading this"
        )
    if to == "peft" and any(change.kind in TABLES for change in adapter.loras):
        found.append("vLLM takes a LoRA of an embedding or head for some architectures only")
    changed = adapter.config_changes()
    if changed:
        found.append(f"the base's settings stay in force where the fine-tune has others: {', '.join(changed)}")
    return found


def table(found: dict[str, Any]) -> Group:
    """`export`'s answer for people."""
    shown = Table(title=Text(f"{found['path']}: {found['bytes']:,} bytes, rank {found['rank']}"))
    for heading in ("", "tensors", "as", "ranks", "energy kept", "delta / base"):
        shown.add_column(heading, justify="left" if heading in ("", "as") else "right")
    for name, kind in found["kinds"].items():
        low, high = kind["ranks"] or (0, 0)
        ranks = "" if not high else str(high) if low == high else f"{low}-{high}"
        relative = "" if kind["relative"] is None else f"{kind['relative']:.5f}"
        words = (str(kind["tensors"]), kind["how"], ranks, f"{100 * kind['energy']:.2f} %", relative)
        shown.add_row(name, *words)
    lines = [f"energy of all of the delta kept: {100 * found['energy']:.2f} %"]
    if found["data"] is not None:
        lines.append("KL from the fine-tune to base + adapter: {kl:.5f} nats a token".format(**found["data"]))
    server = found["vllm"]
    if server and server["objections"]:
        lines.append(f"vLLM will not take it: {'; '.join(server['objections'])}")
    elif server:
        lines.append(f"vLLM: vllm serve BASE --enable-lora --max-lora-rank {server['max_lora_rank']}")
    else:
        lines.append(f"llama.cpp: llama-server -m BASE.gguf --lora {found['path']}")
    lines += [f"warning: {line}" for line in found["warnings"]]
    return Group(shown, *map(Text, lines))
