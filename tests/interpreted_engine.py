"""The engine with every kernel in Triton's interpreter: what it gives them (strides, lines, gaps) is what they take.

    TRITON_INTERPRET=1 python tests/interpreted_engine.py FOLDER OUT.json

writes how many answers of a mixed batch are those of the restored models, and which kernels ran.
"""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import tenants
from interpreter import stop_measuring
from tenants import Asked, alone, greedy, prompts

from bayou.serving import tables
from bayou.serving.engine import Engine, Settings
from bayou.serving.sampling import Sampling

KERNELS = ("packed_product", "row_norm", "rotary", "decode_attention", "row_lookup")


def main(folder: Path, out: Path) -> None:
    """See above."""
    stop_measuring()
    ran: Counter[str] = Counter()
    for name in KERNELS:
        module: Any = importlib.import_module(f"bayou.kernels.{name}")
        module.use_triton = lambda _, name=name: ran.update([name]) or True
    tables.compile_ahead = lambda *_: None  # type: ignore[assignment]  # the interpreter has one state for all threads
    base, files = tenants.make(folder)
    names = ("deltacome", "bitdelta", "exact", "base")
    models = {name: alone(base, files.get(name), folder / "restored" / name) for name in names}
    engine = Engine(base, "base", Settings(batch=9, kernels=True))
    try:
        for name in names[:-1]:
            engine.bank.register(name, files[name])
            engine.load(engine.bank.find(name))
        wish = Sampling(3, ignore_eos=True)
        asked = [(name, p, Asked(engine, name, p, wish)) for p in prompts(1, seed=2, longest=9) for name in names]
        equal = sum(answer.wait(900).tokens == greedy(models[name], p, 3) for name, p, answer in asked)
        fixed = engine.model.fixed
    finally:
        engine.close()
    out.write_text(json.dumps({"asked": len(asked), "equal": equal, "fixed": fixed, "ran": ran}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
