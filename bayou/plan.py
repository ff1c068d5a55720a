"""The Plan: what stands for each coded tensor. JSON, stored in the file that it produced.

A *template* says how a matrix is stored and how it was made; sites of the same shape share one, so that the Plan of
a model of 200 matrices is a few hundred bytes and a number a site:

    {"templates": [{"shape": [1536, 576], "dtype": "BF16", "method": "deltacome", "options": {"rank": 170},
                    "terms": [["LowRank", [[2, "f16", "8g128z"], [32, "3g128z", "3g128z"], ...]]]}, ...],
     "sites": [0, 0, [1, {"reference": "model.embed_tokens.weight"}], ...]}

in the order of the file's entries, which also give the names. A site's reference is the base's tensor of its own name
unless it says otherwise; `null` is none, `self:NAME` is the tensor NAME of the file's own model (layer sharing).
`"steps": N` says that N bytes of steps follow the terms (`--method exact`), `"coded": N` that the terms are
entropy-coded, in N bytes.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from bayou.errors import BadFile
from bayou.methods import TermLayout, nbytes
from bayou.packed import ALIGN, Spec

KINDS = ("Dense", "LowRank")
MAX_DIMENSION = 2**27
MAX_RANK_BLOCK = 128
SELF = "self:"
"""Begins a reference to a tensor of the file's own model."""
MAX_DIMENSIONS = 8
STEPPED = ("BF16", "F16", "F32")
"""Dtypes of which a site can have steps."""
MAX_STEPS = 2**40
MAX_UNREFERENCED = 2**31
"""Elements of a site without a reference: no tensor of the base vouches for its size, only a few bytes of terms."""
EXPANSION = 1024
"""Elements that a byte of the file may stand for, in matrices whose size no tensor of a base vouches for."""
_PART = re.compile(r"(.*)\[(0|[1-9][0-9]{0,8})\]", re.DOTALL)


@dataclass(frozen=True)
class SiteRecord:
    """One coded matrix: a whole 2-D tensor, or one index of the first dimension of a 3-D tensor.

    tensor: disk name in the fine-tune. part: index along dimension 0, or None. shape: (out, in) of the terms.
    disk_shape: shape of the tensor (or part) on disk; the transpose of `shape` for a Conv1D, more than two dimensions
    for a convolution kernel. A tensor with rows beyond the reference's has them in an exact entry "name[rows:]".
    dtype: safetensors' word. reference: disk name in the base, or "self:" and a disk name of the file's own model, or
    None; reference_part: index along its dimension 0. gain multiplies it. steps: bytes of the steps that move what
    reference and terms give to the fine-tune's very bits (see steps.py); 0 for none. coded: bytes of the terms as they
    are stored, where they are entropy-coded (see coded.py); 0 where not.
    """

    tensor: str
    part: int | None
    shape: tuple[int, int]
    disk_shape: tuple[int, ...]
    dtype: str
    transposed: bool
    reference: str | None
    reference_part: int | None
    gain: float
    role: str
    method: str
    options: dict[str, Any] = field(hash=False)
    terms: tuple[TermLayout, ...]
    steps: int = 0
    coded: int = 0

    @property
    def name(self) -> str:
        """The entry's name in the file."""
        return self.tensor if self.part is None else f"{self.tensor}[{self.part}]"

    @property
    def anchor(self) -> str | None:
        """The tensor of the file's own model that the site refers to, or None."""
        return self.reference[len(SELF) :] if self.reference and self.reference.startswith(SELF) else None

    @property
    def base_reference(self) -> str | None:
        """The base's tensor that the site refers to, or None."""
        return None if self.anchor is not None else self.reference

    @property
    def nbytes(self) -> int:
        """Bytes of the entry."""
        return (self.coded or nbytes(self.terms, self.shape)) + self.steps


def split_name(name: str) -> tuple[str, int | None]:
    """ "experts.w[3]" -> ("experts.w", 3); a name without an index has part None."""
    match = _PART.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def dumps(sites: list[SiteRecord]) -> str:
    """The Plan of `sites` as compact JSON."""
    templates: list[dict[str, Any]] = []
    known: dict[str, int] = {}
    entries: list[Any] = []
    for site in sites:
        template: dict[str, Any] = {"shape": site.shape, "dtype": site.dtype, "role": site.role}
        if site.disk_shape != site.shape:
            template["disk"] = site.disk_shape
        if site.transposed:
            template["transposed"] = True
        if site.method:
            template |= {"method": site.method, "options": site.options}
        template["terms"] = [_term(term) for term in site.terms]
        key = json.dumps(template, sort_keys=True)
        if key not in known:
            known[key] = len(templates)
            templates.append(template)
        own: dict[str, Any] = {}
        if (site.reference, site.reference_part) != (site.tensor, site.part):
            own["reference"] = site.reference
            if site.reference_part is not None:
                own["part"] = site.reference_part
        if site.gain != 1.0:
            own["gain"] = site.gain
        if site.steps:
            own["steps"] = site.steps
        if site.coded:
            own["coded"] = site.coded
        entries.append([known[key], own] if own else known[key])
    return json.dumps({"templates": templates, "sites": entries}, separators=(",", ":"))


def _term(term: TermLayout) -> list[Any]:
    stored = [term.kind, [[rank, u, v] for rank, u, v in term.parts]]
    if term.output_scale or term.input_scale:
        stored.append("o" * term.output_scale + "i" * term.input_scale)
    return stored


def loads(text: str, names: list[str]) -> list[SiteRecord]:
    """The sites of a Plan whose entries have these names, in order. Raises BadFile for anything not as specified."""
    try:
        plan = json.loads(text)
        templates = [_template(entry) for entry in plan["templates"]]
        entries = plan["sites"]
        if len(entries) != len(names):
            raise ValueError(f"{len(entries)} sites, but {len(names)} entries")
        return [_site(name, entry, templates) for name, entry in zip(names, entries, strict=True)]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise BadFile(
            f"the Plan is not well-formed ({error}); the file was not written by Bayou, or is damaged"
        ) from None


def _integer(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is not an integer from {least} to {most}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _word(value: Any) -> str:
    """A role or a method's name: both are printed, so they must not hold what a screen would act upon."""
    if not re.fullmatch(r"[a-z0-9_]{0,40}", _text(value)):
        raise ValueError(f"{value!r:.60} is not a word")
    return _text(value)


def _template(entry: dict[str, Any]) -> dict[str, Any]:
    shape = tuple(_integer(n, 1, MAX_DIMENSION) for n in entry["shape"])
    disk = tuple(_integer(n, 1, MAX_DIMENSION) for n in entry.get("disk", shape))
    transposed = entry.get("transposed") is True
    matrix = disk[::-1] if transposed else (disk[0], prod(disk[1:]))
    if len(shape) != 2 or len(disk) > MAX_DIMENSIONS or matrix != shape:
        raise ValueError(f"shape {shape} on disk {disk}")
    options = entry.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"options {options!r}")
    return {
        "shape": shape,
        "disk_shape": disk,
        "dtype": _text(entry["dtype"]),
        "transposed": transposed,
        "role": _word(entry.get("role", "linear")),
        "method": _word(entry.get("method", "")),
        "options": options,
        "terms": tuple(_layout(term) for term in entry["terms"]),
    }


def _layout(term: list[Any]) -> TermLayout:
    kind, parts = term[0], term[1]
    scales = _text(term[2]) if len(term) > 2 else ""
    if kind not in KINDS or not parts or scales not in ("", "o", "i", "oi"):
        raise ValueError(f"unknown term {term!r}; a newer Bayou may read it")
    checked = []
    for rank, u, v in parts:
        _integer(rank, 0 if kind == "Dense" else 1, 0 if kind == "Dense" else MAX_RANK_BLOCK)
        Spec.parse(_text(u))
        if kind == "LowRank":
            Spec.parse(_text(v))
        elif v != "":
            raise ValueError(f"a Dense term with a second format {v!r}")
        checked.append((rank, u, v))
    if kind == "Dense" and len(checked) != 1:
        raise ValueError(f"a Dense term of {len(checked)} parts")
    return TermLayout(kind, tuple(checked), "o" in scales, "i" in scales)


def _site(name: str, entry: Any, templates: list[dict[str, Any]]) -> SiteRecord:
    index, own = (entry, {}) if isinstance(entry, int) else entry
    tensor, part = split_name(name)
    if tensor.startswith(SELF):
        raise ValueError(f"a site of the name {name!r:.80}")
    if part is not None:
        _integer(part, 0, MAX_DIMENSION)
    reference: str | None = tensor
    reference_part = part
    if "reference" in own:
        reference = None if own["reference"] is None else _text(own["reference"])
        reference_part = _integer(own["part"], 0, MAX_DIMENSION) if "part" in own else None
    gain = own.get("gain", 1.0)
    if not isinstance(gain, (int, float)) or isinstance(gain, bool) or gain != gain or abs(gain) > 1e30:
        raise ValueError(f"gain {gain!r}")
    template = templates[_integer(index, 0, len(templates) - 1)]
    steps = _integer(own.get("steps", 0), 0, MAX_STEPS)
    if steps and (reference is None or reference.startswith(SELF) or template["dtype"] not in STEPPED or steps % ALIGN):
        raise ValueError(f"{steps} bytes of steps for a site of {template['dtype']} and reference {reference!r:.80}")
    coded, whole = _integer(own.get("coded", 0), 0, MAX_STEPS), nbytes(template["terms"], template["shape"])
    if coded and (coded % ALIGN or not coded < whole <= EXPANSION * coded):
        raise ValueError(f"{coded} bytes for terms of {whole}")
    if reference is None and (not template["terms"] or prod(template["shape"]) > MAX_UNREFERENCED):
        raise ValueError(f"site {name!r} of {template['shape']} with no reference, {len(template['terms'])} terms")
    return SiteRecord(
        tensor=tensor,
        part=part,
        reference=reference,
        reference_part=reference_part,
        gain=float(gain),
        steps=steps,
        coded=coded,
        **template,
    )


def check_anchors(sites: Iterable[SiteRecord], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BadFile, naming the site, unless each `self:` reference is to a tensor that it can be made from.

    shapes: of every floating tensor of the model that is exact or whose sites have no `self:` reference, so a chain or
    a cycle is refused as a name that is not among them.
    """
    for site in sites:
        if site.anchor is None:
            continue
        shape = shapes.get(site.anchor)
        if shape is None:
            raise BadFile(
                f"site {site.name!r} refers to {site.reference!r}, which the file does not hold as an exact floating "
                "tensor, nor as a site that refers to no other layer itself"
            )
        if site.reference_part is not None:
            shape = shape[1:] if (site.reference_part,) < shape[:1] else ()
        if len(shape) != len(site.disk_shape) or shape[1:] != site.disk_shape[1:] or shape[0] < site.disk_shape[0]:
            raise BadFile(f"site {site.name!r} is {site.disk_shape}, its reference {site.reference!r} {shape}")


def check_expansion(sites: Collection[SiteRecord], nbytes: int) -> None:
    """Raises BadFile where `nbytes` of a file claim to be many huge matrices: one that shares another needs no byte."""
    vouched = {site.tensor for site in sites} - {site.tensor for site in sites if site.base_reference is None}
    free = [site for site in sites if site.base_reference is None and site.anchor not in vouched]
    claimed = sum(prod(site.shape) for site in free)
    if claimed > EXPANSION * nbytes:
        raise BadFile(
            f"{nbytes:,} bytes claim matrices of {claimed:,} elements that no base has; more than {EXPANSION} a byte "
            "are refused"
        )
