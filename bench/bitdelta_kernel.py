"""BitDelta's 1-bit product: our kernel beside the Triton kernel that its authors published, same shapes, one GPU.

    python bench/bitdelta_kernel.py --theirs PATH/binary_gemm_kernel.py --out bench/results/bitdelta-kernel-h100.json

--theirs: bitdelta/binary_gemm_kernel.py of https://github.com/FasterDecoding/BitDelta (not part of Bayou; fetch it).
The seven products of a Llama-2-7B layer, one row of each of T tenants, random signs, as one CUDA graph each, over
deltas enough that no cache holds them. Both are compared with the formula x @ (2 b - 1) before they are timed. Theirs
has no scale (its caller multiplies), ours has.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou.benchmarks import kernels, record
from bayou.benchmarks.terms import LAYER, signs


def their_product(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """binary_bmm of their file: (T, rows, in) fp16, (T, in / 32, out) int32 -> (T, rows, out)."""
    spec = importlib.util.spec_from_file_location("binary_gemm_kernel", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[Tensor, Tensor], Tensor] = module.binary_bmm
    return found


def as_signs(packed: Tensor) -> Tensor:
    """(T, in / 32, out) int32 -> (T, in, out) of -1 and 1, fp32: bit k of word j is row 32 j + k."""
    bits = (packed[:, :, None] >> torch.arange(32, device=packed.device)[:, None]) & 1
    return bits.flatten(1, 2).float() * 2 - 1


def theirs(product: Callable[[Tensor, Tensor], Tensor], tenants: int) -> dict[str, float]:
    """Microseconds of the layer with their kernel, and its relative error."""
    runs: list[Callable[[], Any]] = []
    error, nbytes = 0.0, 0
    while nbytes < kernels.COLD:
        for shapes in LAYER:
            x = torch.randn(tenants, 1, shapes[0][1], device="cuda", dtype=torch.float16)
            for out, width in shapes:
                b = torch.randint(-(2**31), 2**31 - 1, (tenants, width // 32, out), dtype=torch.int32, device="cuda")
                if not nbytes:
                    wanted = torch.bmm(x[:2].float(), as_signs(b[:2]))
                    error = max(error, kernels.relative(product(x, b)[:2], wanted))
                runs.append(lambda x=x, b=b: product(x, b))
                nbytes += b.nbytes
    layers = len(runs) // sum(len(shapes) for shapes in LAYER)
    return {"us": kernels.timed(runs) / layers * 1e6, "error": error, "bytes": nbytes / layers}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 4, 16, 64])
    a = parser.parse_args()
    product, rows = their_product(a.theirs), []
    with torch.inference_mode():
        for tenants in a.tenants:
            ours = kernels.decode(tenants, LAYER, signs, tune=True, plain=False)
            found = {
                "tenants": tenants,
                "ours": {key: ours[key] for key in ("us", "over_floor", "error", "bytes")},
                "theirs": theirs(product, tenants),
            }
            found["times"] = found["theirs"]["us"] / found["ours"]["us"]
            rows.append(found)
            print(json.dumps(found), flush=True)
    record.write(a.out, {"benchmark": "bitdelta kernel", "rows": rows, **record.surroundings("cuda")})


if __name__ == "__main__":
    main()
