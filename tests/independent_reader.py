"""A second reader of .bayou files, written from README.md alone (section "The .bayou format, byte by byte"), by someone
who had not seen bayou's code. It checks what the tensors depend on, not every limit on hostile input."""

import hashlib
import json
import re
import sys
from functools import reduce
from io import BytesIO
from pathlib import Path

import independent_steps
import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bf16: its raw bits
NUMPY |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}


def check(good, complaint):
    if not good:
        raise ValueError(complaint)


def safetensors(path):
    """Metadata, tensors as (dtype word, array) in the order of the file, and the bytes before the data."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    check(10 <= start <= min(len(data), 8 + (64 << 20)), "length of the header")
    header, tensors, at = json.loads(str(data[8:start], "utf-8")), {}, start
    meta = header.pop("__metadata__", {})
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        low, high = (start + offset for offset in entry["data_offsets"])
        check(low == at, f"{name}: a gap or an overlap")
        array = data[low:high].view(np.ndarray).view(NUMPY[entry["dtype"]]).reshape(entry["shape"])
        tensors[name], at = (entry["dtype"], array), high
    check(at == len(data), "the data do not end where the file ends")
    return meta, tensors, data[:start].tobytes()


def load(path):
    """The coded matrices as name -> (tensor, part, template, own, bytes), the other entries, and `unchanged`."""
    meta, rest, head = safetensors(path)
    check(meta["format"] == "bayou" and meta["version"].split(".")[0] in "12", "not a .bayou file of version 1 or 2")
    (_, root), (_, digests) = rest.pop(".root"), rest.pop(".digests")
    check(hashlib.sha256(head + digests.tobytes()).digest() == root.tobytes(), "root")
    check(b"".join(hashlib.sha256(a).digest() for _, a in rest.values()) == digests.tobytes(), "digests")
    plan, sites = json.loads(meta["plan"]), {}
    for name, site in zip(list(rest), plan["sites"], strict=False):
        t, own = site if isinstance(site, list) else (site, {})
        template = {"disk": plan["templates"][t]["shape"], "transposed": False} | plan["templates"][t]
        tensor, part = re.fullmatch(r"(.*?)(?:\[(0|[1-9][0-9]*)\])?", name).groups()
        own = own if "reference" in own else own | {"reference": tensor, "part": part and int(part)}
        data, cut = rest[name][1], len(rest.pop(name)[1]) - own.get("steps", 0)
        plain = independent_steps.inflate(data[:cut].tobytes(), template) if own.get("coded") else data[:cut]
        sites[name] = tensor, part, template, own | {"moves": data[cut:].tobytes()}, plain
    return sites, rest, json.loads(meta["unchanged"])


def widen(array, dtype):
    return ((array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array).astype("<f8")


def narrow(x, dtype):
    """One rounding of fp64 to `dtype`; bf16 by way of fp32, rounded to odd."""
    if dtype != "BF16":
        return x.astype(NUMPY[dtype])
    s = x.astype("<f4")
    b = s.view("<u4") - (np.isfinite(s) & (np.abs(s) > np.abs(x)))
    b |= np.isfinite(s) & (s != x)
    return ((b + 0x7FFF + (b >> 16 & 1)) >> 16).astype("<u2")


def section(file, dtype, rows, cols):
    size = rows * cols * np.dtype(dtype).itemsize
    return np.frombuffer(file.read(-(-size // 16) * 16)[:size], dtype).reshape(rows, cols)


def unpack_codes(file, bits, rows, cols):
    codes, low, j = 0, 0, np.arange(cols, dtype="<u4")
    for width in [w for w in (8, 4, 2, 1) if bits & w]:
        words, each = section(file, "<u4", rows, -(-cols * width // 32)), 32 // width
        codes |= (words[:, j // each] >> (j % each * width) & (2**width - 1)) << low
        low += width
    return codes.astype("<f4")


def unpack(file, spec, rows, cols):
    if word := {"f16": "F16", "bf16": "BF16", "f32": "F32"}.get(spec):
        return widen(section(file, NUMPY[word], rows, cols), word).astype("<f4")
    match = re.fullmatch("([1-8])(?:(r|g([1-9][0-9]{0,5}))(z?))?", spec)
    check(match, f"unknown spec {spec}")
    bits, group = int(match[1]), int(match[3] or cols)
    codes, zero, g = unpack_codes(file, bits, rows, cols), np.float32((2**bits - 1) / 2), np.arange(cols) // group
    scale = section(file, "<f2", rows, -(-cols // group)).astype("<f4") if match[2] else np.ones((rows, 1), "<f4")
    zero = unpack_codes(file, bits, 1, scale.size).reshape(scale.shape)[:, g] if match[4] else zero
    return scale[:, g] * (codes - zero)


def terms(template, data):
    """Each term's gain, output scales, input scales (1 if absent) and blocks."""
    file, (out, into) = BytesIO(data), template["shape"]
    for kind, parts, *flags in template["terms"]:
        check(kind in ("Dense", "LowRank") and flags in ([], ["o"], ["i"], ["oi"]), "unknown kind of term")
        gain = float(section(file, "<f4", 1, 4)[0, 0])
        o = section(file, "<f2", 1, out)[0] if "o" in "".join(flags) else np.ones(1)
        i = section(file, "<f2", 1, into)[0] if "i" in "".join(flags) else np.ones(1)
        sizes = [[(u, out, r), (v, r, into)] if kind == "LowRank" else [(u, out, into)] for r, u, v in parts]
        yield gain, o, i, [tuple(unpack(file, *size) for size in block) for block in sizes]
    check(not file.read(), "a site has not the bytes that its plan implies")


def factors(path):
    """Site name -> the dequantised (u, v) of its blocks, (weight,) for Dense, its terms one after the other."""
    return {n: [b for *_, blocks in terms(t, data) for b in blocks] for n, (_, _, t, _, data) in load(path)[0].items()}


def matrix(template, own, data, base):
    """A coded matrix, restored: the sum of its terms and its reference, rounded once."""
    addends, disk, turn = [], tuple(template["disk"]), np.transpose if template["transposed"] else np.asarray
    for gain, o, i, blocks in terms(template, data):
        products = [reduce(np.matmul, [factor.astype("<f8") for factor in block]) for block in blocks]
        addends.append(gain * (o[:, None] * reduce(np.add, products) * i))
    if own["reference"] is not None:
        dtype, array = base[own["reference"]]
        array = array if own.get("part") is None else array[own["part"]]
        check(array.shape[1:] == disk[1:] and len(array) >= disk[0], "shape of the reference")
        addends.append(own.get("gain", 1) * widen(turn(array[: disk[0]]).reshape(template["shape"]), dtype))
    total = reduce(np.add, addends) if addends else np.zeros(template["shape"])
    total = narrow(total, template["dtype"])
    total = independent_steps.move(total, template["dtype"], own["moves"]) if own.get("moves") else total
    return turn(total).reshape(disk)


def restore(path, base_folder=None):
    """Every tensor of the model; of bf16 the bits, as uint16. No base folder: the file leans on no base."""
    (sites, rest, unchanged), shards = load(path), Path(base_folder).glob("*.safetensors") if base_folder else ()
    base = dict(item for shard in shards for item in safetensors(shard)[1].items())
    late = {n for n, (*_, own, _) in sites.items() if str(own["reference"])[:5] == "self:"}  # needs another one whole
    leant = {own["reference"] for n, (*_, own, _) in sites.items() if n not in late} - {None} | set(unchanged)
    for name, found in zip(sorted(leant, key=str.encode), rest[".base"][1].reshape(-1, 32), strict=True):
        line = json.dumps([name, base[name][0], base[name][1].shape]) + "\n"
        check(hashlib.sha256(line.encode() + base[name][1].tobytes()).digest() == found.tobytes(), name)
    exact = {n: item for n, item in rest.items() if n[0] != "."} | {n: base[n] for n in unchanged}
    for name in sorted((*sites, *exact), key=lambda name: 2 * (name in late) - (name in sites)):
        tensor, row, *how = sites.get(name) or re.fullmatch(r"(.*?)(?:\[([1-9][0-9]*):\])?", name).groups()
        word, array = (how[0]["dtype"], matrix(*how, base)[None if row else ...]) if how else exact[name]
        old = base.get(f"self:{tensor}")
        check(int(row or 0) == (len(old[1]) if old else 0), f"{name} stands twice, or out of order")
        base[f"self:{tensor}"] = word, np.concatenate([old[1], array]) if old else array
    return {name[5:]: array for name, (_, array) in base.items() if name[:5] == "self:"}


if __name__ == "__main__":
    for name, tensor in restore(*sys.argv[1:3]).items():
        print(name, tensor.shape, hashlib.sha256(tensor.tobytes()).hexdigest())
