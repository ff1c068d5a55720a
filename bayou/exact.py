"""Encodes the sites of `--method exact` into the journal: terms that foretell, then the steps to the very bits.

How many bytes a site takes is known when it is encoded. So the journal's note of a site is its Plan, and the file's
Plan is put together of those at the end. Needs no calibration; memory is about twice the largest tensor.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from torch import Tensor

from bayou import clock, coded, inventory, methods, plan, steps
from bayou.checkpoint import DTYPES, Checkpoint
from bayou.delta import Delta
from bayou.encoder import Progress
from bayou.entry import pack_terms
from bayou.errors import BadInput, TooSmall
from bayou.journal import Journal
from bayou.methods import Site
from bayou.plan import SiteRecord
from bayou.workers import Workers


def is_exact(method: str) -> bool:
    """Whether steps to the fine-tune's bits follow what this method encodes."""
    return bool(getattr(methods.get(method), "EXACT", False))


def check(method: str, tables: str, accounting: str, distills: bool) -> None:
    """Raises BadInput for what does not go together with `--method exact`."""
    if is_exact(method) != is_exact(tables):
        raise BadInput(f"--method {method} with embeddings by {tables}: exact is for all of a model, or nothing of it")
    if is_exact(method) and (accounting != "file" or distills):
        raise BadInput(f"--method {method} has nothing to distil and no nominal size; leave these options out")


def encode(
    base: Checkpoint,
    tuned: Checkpoint,
    sites: list[SiteRecord],
    journal: Journal,
    workers: Workers,
    progress: Progress,
) -> list[SiteRecord]:
    """Put every site in the journal that is not there yet; the sites as encoded, with terms and the bytes of steps."""
    mine = workers.shared([float(prod(site.shape)) for site in sites])
    for done, index in enumerate(mine):
        if journal.get(index) is None:
            site, blob = _encoded(sites[index], base, tuned)
            journal.put(index, blob, 0.0, plan.dumps([site]))
        progress("matrices", done + 1, len(mine))
    workers.wait()
    return [plan.loads(journal.note(index) or "", [site.name])[0] for index, site in enumerate(sites)]


def check_size(size: int, limit: int, what: str) -> None:
    """Raises TooSmall where `what` asks for fewer bytes than the file's size."""
    if size > limit:
        raise TooSmall(
            f"{what} is {limit:,} bytes, but this fine-tune bit for bit takes {size:,} bytes; ask for a larger file, "
            "or choose another method",
            size,
        )


def _encoded(site: SiteRecord, base: Checkpoint, tuned: Checkpoint) -> tuple[SiteRecord, bytes]:
    if not site.method:  # equal to the reference
        return site, b""
    module = methods.get(site.method)
    seen = Site(site.name, inventory.delta_matrix(site, base, tuned, "cpu"), site.role)
    options = dict(site.options)
    with clock.step("encode"):
        if options["bands"] == "auto":
            options["bands"], terms = module.foretold(seen)
        else:
            terms = module.encode(seen, **options)
    assert site.reference is not None  # inventory.take makes a site of nothing else
    reference = inventory.read_matrix(base, site.reference, site.reference_part, site, 0, site.shape[0])
    foretold = Delta(site.shape, terms, site.reference, site.gain).restore(reference, DTYPES[site.dtype])

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        rows = steps.chunk_rows(site.shape[1])
        for start in range(0, site.shape[0], rows):
            stop = min(start + rows, site.shape[0])
            yield foretold[start:stop], inventory.read_matrix(tuned, site.tensor, site.part, site, start, stop)

    with clock.step("code steps"):
        section = steps.encode(chunks(), site.shape[1])
    layouts = tuple(methods.layout_of(term) for term in terms)
    raw = pack_terms(terms)
    small = coded.encode(raw, layouts, site.shape)
    found = replace(site, options=options, terms=layouts, steps=len(section), coded=len(small or b""))
    return found, (raw if small is None else small) + section
