"""Sharing against plain quantisation at equal bytes: is a shared model still worth anything once both are quantised?

    python bench/sharing_bytes.py --base BASE --testbed PATH/testbed.py --shared 12=main12-deltallm.shared 24=... \\
        --out bench/results/sharing-bytes.jsonl
    python bench/sharing_bytes.py --out bench/results/sharing-bytes.jsonl --plot frontier.png

Plain quantisation is the dense model with its linears in b bits by GPTQ (embeddings in 8 at least). The shared models
are trained ones (sharing_runs.save_shared), their anchors and other linears in b bits likewise, their deltas by
Delta-CoMe's bands or in 8 bits. Every point is a file that is written, loaded and scored: perplexity on the test bed's
held-out text, and KL(original || file), nats a token. Calibration: the test bed's training text.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quality import load_testbed, machine
from sharing_runs import load_shared
from torch import Tensor

import bayou
from bayou import calibrate
from bayou.methods import Gram
from bayou.sharing import Shared
from bayou.sharing.baselines.baseline import load
from bayou.sharing.original import Original, Progress, Visit
from bayou.sharing.sharedfile import write

BANDS = "8x2,3x32,2"
BITS = (8, 6, 5, 4, 3)
DELTAS: dict[str, dict[str, Any]] = {
    "deltas in 8 bits": {"delta_method": "lowrank", "delta_options": {"bits": 8}},
    f"deltas {BANDS}": {"delta_method": "deltacome", "delta_options": {"bands": BANDS}},
    "deltas 8x16,4": {"delta_method": "deltacome", "delta_options": {"bands": "8x16,4"}},
}


class Walked(Original):
    """An original that is walked once: all its grams are kept for the files that follow."""

    kept: list[dict[str, Gram]] | None = None

    def walk(self, windows: Tensor, visit: Visit, progress: Progress) -> None:
        """As Original's, from the second time on out of memory."""
        if self.kept is None:
            self.kept = []
            super().walk(windows, self.kept.append, progress)
        for grams in self.kept:
            visit(grams)


def points(shared: dict[str, Shared]) -> list[tuple[str, Shared, dict[str, Any]]]:
    """(name, what is shared, options of the file) of every point."""
    found: list[tuple[str, Shared, dict[str, Any]]] = [("dense, 16 bits", Shared(()), {})]
    found += [(f"dense, {bits} bits", Shared(()), {"anchor_bits": bits, "quantise": "all"}) for bits in BITS]
    for size, plan in shared.items():
        found.append((f"deltallm {size} %, 16 bits", plan, {}))
        for bits in BITS[:4]:
            for name, options in DELTAS.items():
                if bits in (8, 5) or name.endswith("bits"):
                    common = {"anchor_bits": bits, "quantise": "all"}
                    found.append((f"deltallm {size} %, {bits} bits, {name}", plan, common | options))
    return found


@torch.no_grad()
def score(model: torch.nn.Module, texts: list[list[int]], taught: list[Tensor] | None) -> tuple[float, float]:
    """Perplexity, and mean KL(taught || model), over all tokens; taught: log-probabilities in fp16."""
    nll = apart = 0.0
    tokens = 0
    for i, text in enumerate(texts):
        ids = torch.tensor([text], device=next(model.parameters()).device)
        log_p = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        nll -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        if taught is not None:
            log_q = taught[i].to(log_p.device).float()
            apart += float((log_q.exp() * (log_q - log_p)).sum())
        tokens += len(text) - 1
    return torch.tensor(nll / tokens).exp().item(), apart / tokens


def measure(a: argparse.Namespace) -> None:
    """Write, load and score every point that is not in the results yet."""
    testbed, original = load_testbed(a.testbed), Walked(a.base, device=a.device)
    tokenizer = calibrate.read_tokenizer(a.base)
    heldout = testbed.documents("corpus_heldout")[:60]
    texts = [ids for ids in (calibrate.encode(tokenizer, text)[:512] for text in heldout) if len(ids) > 8]
    done = {json.loads(line)["name"] for line in a.out.read_text().splitlines()} if a.out.exists() else set()
    shared = {size: load_shared(Path(path)) for size, path in (pair.split("=", 1) for pair in a.shared)}
    base = load(a.base, device=a.device)
    with torch.no_grad():
        taught = [
            base(input_ids=torch.tensor([t], device=a.device)).logits[0, :-1].float().log_softmax(-1).half().cpu()
            for t in texts
        ]
    with tempfile.TemporaryDirectory() as folder:
        training = Path(folder) / "train.jsonl"
        sample = random.Random(0).sample(testbed.documents("corpus_train"), 2000)
        training.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample), encoding="utf-8")
        windows = original.windows(training, a.calibration, 512, 0)
        for name, plan, options in points(shared):
            if name in done:
                continue
            started = time.perf_counter()
            file = Path(folder) / "point.bayou"
            report = write(original, plan, file, windows=windows, **options)
            written = time.perf_counter() - started
            ppl, apart = score(bayou.load(None, file, device=a.device), texts, taught)
            found = {
                "name": name,
                "bytes": report.bytes,
                "parameters": report.parameters,
                "ppl": ppl,
                "kl": apart,
                "options": options,
                "seconds": written,
                "calibration_tokens": a.calibration,
                "scored_tokens": sum(len(t) - 1 for t in texts),
                "machine": machine(a.device),
            }
            print(json.dumps(found), flush=True)
            with open(a.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(found) + "\n")


def plot(results: Path, picture: Path) -> None:
    """KL against bytes, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [json.loads(line) for line in results.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for family in ("dense", "deltallm 12 %", "deltallm 24 %"):
        own = sorted((r["bytes"] / 1e6, r["kl"]) for r in found if r["name"].startswith(family) and r["kl"] > 1e-5)
        axes.loglog(*zip(*own, strict=True), "o-" if family == "dense" else "o", label=family)
    axes.set_xlabel("file, MB")
    axes.set_ylabel("KL to the original, nats a token (held-out text)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--testbed", type=Path)
    parser.add_argument("--shared", nargs="*", default=[], help="PERCENT=FILE of trained models")
    parser.add_argument("--calibration", type=int, default=32_768)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    if a.plot:
        plot(a.out, a.plot)
    else:
        measure(a)


if __name__ == "__main__":
    main()
