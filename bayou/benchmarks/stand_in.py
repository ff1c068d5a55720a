"""Files that stand in for a real base and its fine-tunes, made in seconds: true names, shapes, Plans and sizes.

The base is a sparse file of zeros, so that checking a delta against it is the real check at its real cost; a delta has
random codes and small scales, so that what is computed with it is finite.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bayou import allocate, inventory, methods, skeleton
from bayou.benchmarks.pair import Shape
from bayou.benchmarks.terms import term
from bayou.checkpoint import Checkpoint, Output, header_bytes
from bayou.compress import EMBEDDING_RATE
from bayou.contents import Contents
from bayou.entry import pack_terms
from bayou.methods import deltacome
from bayou.plan import SiteRecord


@contextmanager
def cache(folder: Path) -> Iterator[None]:
    """Fingerprints of the made-up base go to a cache of their own."""
    before = os.environ.get("BAYOU_CACHE")
    os.environ["BAYOU_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["BAYOU_CACHE"]
        if before is not None:
            os.environ["BAYOU_CACHE"] = before


def base(folder: Path, shape: Shape) -> Checkpoint:
    """Write the base to a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config(shape.layers)))
    outputs = [Output(name, "BF16", size, lambda: []) for name, size in sorted(shape.tensors(shape.layers))]
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header_bytes(outputs, {"format": "pt"}))
        file.truncate(file.tell() + sum(output.nbytes for output in outputs))
    return Checkpoint(folder)


def tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer with a word for each token, to the base's folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w2").save_pretrained(folder)


def randomise(model: PreTrainedModel) -> None:
    """Random numbers of trained weights' deviation in the place of the zeros, in memory."""
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)


def delta_file(path: Path, base: Checkpoint, ratio: float, seed: int = 0) -> int:
    """Write a delta over `base` at 1/ratio of its bytes, by deltacome's layouts; returns its bytes."""
    places = skeleton.places(skeleton.build(base.folder), base.names())
    tables = dict(deltacome.EMBEDDINGS)
    ways = {False: ("deltacome", methods.check("deltacome", {})), True: (str(tables.pop("method")), {})}
    ways[True] = (ways[True][0], methods.check(ways[True][0], tables))
    sites: list[SiteRecord] = []
    for name in sorted(base.names(), key=inventory.natural):
        size, role = base.shape(name), places[name].role
        if len(size) == 2:
            chosen = ways[role in allocate.TABLES]
            matrix = (size[0], size[1])
            sites.append(
                SiteRecord(name, None, matrix, matrix, "BF16", False, name, None, 1.0, role, *chosen, terms=())
            )
    unchanged = [name for name in base.names() if len(base.shape(name)) == 1]
    used = base.fingerprints(base.names())
    config = hashlib.sha256((base.folder / "config.json").read_bytes()).hexdigest()

    def contents(chosen: list[SiteRecord]) -> Contents:
        return Contents(chosen, [], unchanged, "", "", used, {"config.json": config}, {})

    def blob(index: int) -> bytes:
        site = sites[index]
        return pack_terms([term(layout, site.shape, device="cpu") for layout in site.terms])

    torch.manual_seed(seed)
    limit = int(base.nbytes / ratio)
    sites, _ = allocate.within(sites, limit, lambda s: contents(s).nbytes(), embedding_rate=EMBEDDING_RATE)
    return contents(sites).write(path, blob, [0.0] * len(sites))
