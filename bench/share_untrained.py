"""DeltaLLM without training: five MLPs tied to the block before, by every closed form; perplexity of held-out text.

    python bench/share_untrained.py --testbed PATH/testbed.py --model TB/base

The table of issue 3, "Must show" 1. MLPs of blocks 8, 12, 16, 20, 24, each tied to the block before; rank 144 for gate,
up and down. Calibrated on corpus_train; perplexity as `testbed.py general` takes it: the first 60 documents of
corpus_heldout, 512 tokens each, over all tokens but the first. Every variant is written as a .bayou file and loaded
from it. One JSON line a variant is appended to OUT; variants that are there already are not repeated.
"""

import argparse
import importlib.util
import json
import math
import platform
import random
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor

import bayou
from bayou import calibrate
from bayou.sharing import Shared, Tie, ties
from bayou.sharing.original import Original
from bayou.sharing.sharedfile import write
from bayou.sharing.ties import Metric

BLOCKS = (8, 12, 16, 20, 24)
VARIANTS = ("untouched", "dropped", "tied, no delta", "svd", "whitened", "whitened+gain", "no-base", "als")


def load_testbed(path: Path) -> ModuleType:
    """The test bed's script as a module."""
    spec = importlib.util.spec_from_file_location("testbed", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, texts: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood over all tokens but each text's first."""
    total, tokens = 0.0, 0
    for ids in texts:
        x = torch.tensor([ids], device=model.device)
        logp = model(input_ids=x, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= float(logp.gather(1, x[0, 1:, None]).double().sum())
        tokens += len(ids) - 1
    return math.exp(total / tokens)


def shared(variant: str, original: Original, grams: dict, rank: int) -> tuple[Shared, dict[str, Tensor]]:
    """The shared model of a variant, and the values of learned anchors."""
    subs = [(original.sublayers[b, "mlp"], original.sublayers[b - 1, "mlp"]) for b in BLOCKS]
    if variant == "untouched":
        return Shared(()), {}
    if variant == "dropped":
        return Shared((), tuple(mine.name for mine, _ in subs)), {}
    made: list[Tie] = []
    values: dict[str, Tensor] = {}
    for mine, theirs in subs:
        for leaf in mine.matrices:
            name, anchor = f"{mine.name}.{leaf}", f"{theirs.name}.{leaf}"
            own, other = original.matrix(name), original.matrix(anchor)
            metric = Metric(grams[name])
            if variant == "als":
                both = {anchor: Metric(grams[anchor]), name: metric}
                dtype = original.checkpoint.dtype(anchor)
                learned = ties.learn(anchor, {anchor: other, name: own}, both, rank, dtype=dtype)
                made += learned.ties
                values[anchor] = learned.base
                continue
            how, r = ("svd", 0) if variant == "tied, no delta" else (variant, rank)
            made.append(ties.fit(name, own, (anchor, other), metric, r, how))
    return Shared(tuple(made)), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "share-untrained.jsonl")
    parser.add_argument("--rank", type=int, default=144)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    testbed = load_testbed(arguments.testbed)
    original = Original(arguments.model, device=arguments.device)
    tokenizer = calibrate.read_tokenizer(arguments.model)
    heldout = testbed.documents("corpus_heldout")[: arguments.documents]
    texts = [ids for ids in (calibrate.encode(tokenizer, text)[:512] for text in heldout) if len(ids) > 8]
    done = set()
    if arguments.out.exists():
        done = {json.loads(line)["variant"] for line in arguments.out.read_text().splitlines()}
    with tempfile.TemporaryDirectory() as folder:
        training = Path(folder) / "train.jsonl"
        sample = random.Random(0).sample(testbed.documents("corpus_train"), 2000)
        training.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample), encoding="utf-8")
        windows = original.windows(training, arguments.tokens, 512, 0)
        involved = {n for b in BLOCKS for block in (b, b - 1) for n in original.sublayers[block, "mlp"].tensors()}
        grams = original.grams(windows, involved, lambda *_: None)
        for variant in VARIANTS:
            if variant in done:
                continue
            started = time.perf_counter()
            plan, values = shared(variant, original, grams, arguments.rank)
            fitted = time.perf_counter() - started
            report = write(original, plan, Path(folder) / "a.bayou", tensors=values)
            model = bayou.load(None, Path(folder) / "a.bayou", device=arguments.device)
            found = {
                "variant": variant,
                "ppl": perplexity(model, texts),
                "rank": arguments.rank,
                "gains": [tie.gain for tie in plan.ties],
                "parameters": report.parameters,
                "bytes": report.bytes,
                "calibration_tokens": arguments.tokens,
                "documents": len(texts),
                "scored_tokens": sum(len(ids) - 1 for ids in texts),
                "fit_seconds": fitted,
                "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
                "versions": {
                    "bayou": bayou.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
            }
            print(json.dumps(found), flush=True)
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
