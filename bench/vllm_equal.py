"""Are vLLM's answers in one mixed batch those of each restored model by itself? Counts them, greedy, token for token.

    BAYOU_MODE=packed BAYOU_DELTAS=deltas VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora \
        --max-loras 2 --enforce-eager --dtype float32 --served-model-name base
    python bench/vllm_equal.py BASE --delta sql=deltas/sql.bayou --prompts sql=sql_test.jsonl --rows 50 -o equal.json

Every prompt of every tenant, and some to the base, are asked for at once. What counts as equal, and as a tie, is as in
serving_equal.py; the first request of each name, in which its file is verified and read, is timed apart.
"""

import argparse
import json
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from serving_equal import compare, pairs

from bayou.benchmarks import record
from bayou.calibrate import read_tokenizer
from bayou.restore import restore


def complete(url: str, model: str, prompt: list[int], tokens: int) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--prompts", action="append", required=True, metavar="NAME=JSONL", help="rows with a prompt")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="of the restored models, as vLLM's")
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    files, texts = pairs(given.delta), pairs(given.prompts)
    tokenizer, prompts = read_tokenizer(given.base), {}
    for name, path in texts.items():
        lines = path.read_text().splitlines()[: given.rows]
        prompts[name] = [tokenizer(json.loads(line)["prompt"], add_special_tokens=False).input_ids for line in lines]
    asked = [(name, prompts[name][i]) for i in range(given.rows) for name in prompts if i < len(prompts[name])]
    asked += [("base", prompt) for name in prompts for prompt in prompts[name][: given.rows // 5]]
    with urllib.request.urlopen(f"{given.url}/version") as answer:
        found: dict[str, Any] = {"vllm": json.load(answer)["version"], "dtype": given.dtype}
    found |= {"machine": record.surroundings("cpu"), "first_request_s": {}}
    for name in ("base", *prompts):
        started = time.perf_counter()
        complete(given.url, name, asked[0][1], 1)
        found["first_request_s"][name] = time.perf_counter() - started
    started = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(lambda one: complete(given.url, *one, given.tokens), asked))
    found |= {"seconds": time.perf_counter() - started, "tokens": sum(map(len, answers)), "models": {}}
    for name in ("base", *prompts):
        with tempfile.TemporaryDirectory() as work:
            folder = given.base
            if name != "base":
                folder = Path(work) / name
                restore(given.base, files[name], folder, dtype=given.dtype)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, given.dtype))
            mine = [i for i, (tenant, _) in enumerate(asked) if tenant == name]
            both = [asked[i][1] for i in mine], [answers[i] for i in mine]
            found["models"][name] = compare(model, *both, given.tokens, "cpu")
        print(name, {key: value for key, value in found["models"][name].items() if key != "gaps"}, flush=True)
    print({key: value for key, value in found.items() if key != "models"})
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
