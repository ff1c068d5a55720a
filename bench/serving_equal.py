"""Are the answers of a mixed batch those of each restored model by itself? Counts them, greedy, token for token.

    python bench/serving_equal.py BASE --delta sql=sql.bayou --prompts sql=sql_test.jsonl --rows 50 -o equal.json

Every prompt of every tenant is in one queue, in turns, so that most steps hold rows of all of them and of the base. A
first difference counts as a tie where the restored model's two best scores are less than 1e-3 apart there; in fp32
there must be no other difference, in 16 bits the rate of equal answers is what this is for.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bayou.benchmarks import record
from bayou.restore import restore
from bayou.serving.engine import Engine, Piece, Settings
from bayou.serving.sampling import Sampling

CLOSE = 1e-3


def served(engine: Engine, asked: list[tuple[str, list[int]]], tokens: int) -> list[list[int]]:
    """The answers, all asked for at once."""
    answers: list[list[int]] = [[] for _ in asked]
    failed: list[BaseException] = []
    left = threading.Semaphore(0)

    def hearer(i: int) -> Any:
        def hear(piece: Piece) -> None:
            failed.extend([piece.refused] if piece.refused is not None else [])
            answers[i].extend(chosen.token for chosen in piece.chosen)
            if piece.last:
                left.release()

        return hear

    for i, (name, prompt) in enumerate(asked):
        tenant = engine.bank.find(name)
        assert tenant is not None
        engine.submit(tenant, prompt, Sampling(max_tokens=tokens), hearer(i))
    for _ in asked:
        left.acquire()
    if failed:
        raise failed[0]
    return answers


def compare(model: Any, asked: list[list[int]], answers: list[list[int]], tokens: int, device: str) -> dict[str, Any]:
    """How many are equal to the model's own, and how far apart the two best scores are where one is not."""
    gaps, equal = [], 0
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        if wanted == answer:
            equal += 1
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(wanted, answer, strict=False)) if a != b), min(len(wanted), len(answer))
        )
        scores = model(torch.tensor([[*prompt, *wanted[:at]]], device=device)).logits[0, -1].float()
        best, second = scores.topk(2).values.tolist()
        gaps.append(best - second)
    ties = sum(gap < CLOSE for gap in gaps)
    rate = equal / len(asked)
    return {
        "asked": len(asked),
        "equal": equal,
        "rate": rate,
        "ties": ties,
        "differing": len(gaps) - ties,
        "gaps": gaps,
    }


def pairs(words: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (word.partition("=") for word in words)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--prompts", action="append", required=True, metavar="NAME=JSONL", help="rows with a prompt")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unpack", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="decode in steps of fixed shape: graphs on a GPU")
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    files, texts = pairs(given.delta), pairs(given.prompts)
    dtype = getattr(torch, given.dtype)
    many = len(files) * given.rows * 2
    settings = Settings(
        batch=given.batch,
        queue=many,
        dtype=dtype,
        device=given.device,
        unpack=given.unpack,
        kernels=given.kernels or None,
    )
    engine = Engine(given.base, "base", settings)
    for name, file in files.items():
        engine.bank.register(name, file)
    prompts = {}
    for name, path in texts.items():
        tenant = engine.bank.find(name)
        assert tenant is not None
        lines = path.read_text().splitlines()[: given.rows]
        prompts[name] = [
            tenant.voice.tokenizer.inner(json.loads(line)["prompt"], add_special_tokens=False).input_ids
            for line in lines
        ]
    asked = [(name, prompts[name][i]) for i in range(given.rows) for name in prompts if i < len(prompts[name])]
    asked += [("base", prompt) for name in prompts for prompt in prompts[name][: given.rows // 5]]
    started = time.perf_counter()
    answers = served(engine, asked, given.tokens)
    seconds = time.perf_counter() - started
    engine.close()
    found: dict[str, Any] = {"dtype": given.dtype, "device": given.device, "tokens": sum(map(len, answers))}
    found |= {"seconds": seconds, "fixed_shape": engine.model.fixed}
    found |= {"machine": record.surroundings(given.device), "models": {}}
    for name in ("base", *prompts):
        with tempfile.TemporaryDirectory() as scratch:
            folder = (
                given.base if name == "base" else restore(given.base, files[name], Path(scratch) / "m", dtype="float32")
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(given.device)
        mine = [(prompt, answer) for (who, prompt), answer in zip(asked, answers, strict=True) if who == name]
        found["models"][name] = compare(model, [p for p, _ in mine], [a for _, a in mine], given.tokens, given.device)
        print(name, found["models"][name], flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
