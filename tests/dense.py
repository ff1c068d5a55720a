"""A .bayou file that loses nothing: every delta stored in fp32, so that attaching it must give the fine-tune itself."""

from collections.abc import Callable
from pathlib import Path

import torch

from bayou import sidecar, skeleton
from bayou.checkpoint import Checkpoint
from bayou.contents import Contents, Exact
from bayou.delta import Dense
from bayou.entry import pack_terms
from bayou.methods import TermLayout
from bayou.packed import Packed
from bayou.plan import SiteRecord

Refer = Callable[[str], str | None]


def dense_file(
    base_folder: Path, tuned_folder: Path, path: Path, *, gain: float = 1.0, refer: Refer | None = None
) -> Path:
    """A file whose deltas are stored in fp32: attached, it gives the fine-tune up to rounding.

    refer: fine-tune's disk name -> its reference's in the base, by default its own name if the base has it.
    """
    base, tuned = Checkpoint(base_folder), Checkpoint(tuned_folder)
    refer = refer or (lambda name: name if name in base else None)
    places = skeleton.places(skeleton.build(tuned_folder), tuned.names())
    sites, exact, unchanged, blobs = [], [], [], []
    for name in tuned.names():
        new, reference = tuned.read(name), refer(name)
        old = None if reference is None else base.read(reference)
        if old is not None and reference == name and old.shape == new.shape and torch.equal(old, new):
            unchanged.append(name)
        elif new.ndim < 2 or old is None or not new.is_floating_point():
            exact.append(Exact(name, tuned.word(name), tuple(new.shape), lambda new=new: new))
        else:
            if len(new) > len(old):
                rows = new[len(old) :].clone()
                exact.append(Exact(f"{name}[{len(old)}:]", tuned.word(name), tuple(rows.shape), lambda rows=rows: rows))
                new = new[: len(old)]
            transposed = places[name].transposed if name in places else False
            three = new.ndim == 3
            for part in range(len(new)) if three else [None]:
                target, source = (new, old[: len(new)]) if part is None else (new[part], old[part])
                difference = target.float() - gain * source.float()
                matrix = difference.T if transposed else difference.flatten(1)
                packed = Packed.floats(matrix.contiguous(), "f32")
                blobs.append(pack_terms([Dense(packed)]))
                sites.append(
                    SiteRecord(
                        name,
                        part,
                        packed.shape,
                        tuple(target.shape),
                        tuned.word(name),
                        transposed,
                        reference,
                        part,
                        gain,
                        places[name].role if name in places else "other",
                        "test",
                        {},
                        (TermLayout("Dense", ((0, "f32", ""),), False, False),),
                    )
                )
    used = {n: base.fingerprint(n) for n in {s.reference for s in sites} | set(unchanged)}
    old_files, new_files = sidecar.carried(base_folder), sidecar.carried(tuned_folder)
    same = {n: sidecar.digest(c) for n, c in new_files.items() if old_files.get(n) == c}
    changed = {n: sidecar.difference(old_files.get(n), c) for n, c in new_files.items() if n not in same}
    contents = Contents(sites, exact, unchanged, "pico", "", used, same, changed)
    contents.write(path, blobs.__getitem__, [0.0] * len(sites))
    return path
