"""The runs of bench/sharing.py: what each set holds, and the student that a run trains.

A run is a dict: name; method (deltallm; search: the plan of bayou.sharing.search; plan: a Shared from a file; base; or
one of bayou.sharing.baselines.METHODS); reduce, the share of parameters to remove; tokens and rate (peak learning rate)
of the training, 0 tokens for none; and options:
    init (zero, svd, whitened, whitened+gain, als, no-base), layout, kinds, blocks, rank, count
    pmr (bernoulli, blend or None), lora (rank of LoRA on the rest; 0 none), whole (the rest trained whole instead),
    rest (the rate of the rest over the rate of the factors), seed (of draws and random factors)
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou.checkpoint import atomic
from bayou.methods import Gram
from bayou.sharing import Shared, Tie, baselines, draft, layouts, search
from bayou.sharing.baselines.baseline import count
from bayou.sharing.original import Original
from bayou.sharing.student import Replacement, apply, twin
from bayou.sharing.train import Pupil

Run = dict[str, Any]
SIZES = {"12": 0.12, "24": 0.24}
RIVALS: dict[str, Run] = {
    "deltallm": {"method": "deltallm", "init": "whitened+gain", "pmr": "bernoulli"},
    "deltallm without PMR": {"method": "deltallm", "init": "whitened+gain", "pmr": None},
    "searched plan + LoRA": {"method": "search", "kinds": "all", "pmr": "bernoulli", "lora": 32},
    "searched plan + LoRA, without PMR": {"method": "search", "kinds": "all", "pmr": None, "lora": 32},
    "searched plan + LoRA, own rate": {"method": "search", "kinds": "all", "pmr": None, "lora": 32, "rest": 30.0},
    "searched plan, all trained": {"method": "search", "kinds": "all", "pmr": None, "whole": True, "rest": 1.0},
    "no-base control": {"method": "deltallm", "init": "no-base", "pmr": "bernoulli"},
    **{name: {"method": name} for name in baselines.METHODS},
    # The control of "all trained": the strongest rivals, trained whole as well.
    "shortgpt, all trained": {"method": "shortgpt", "whole": True},
    "lastlayers, all trained": {"method": "lastlayers", "whole": True},
}
RATES = {
    "deltallm": (3e-4, 1e-3, 3e-3),
    "search": (1e-4, 3e-4, 1e-3),
    "lastlayers": (3e-4, 1e-3, 3e-3),
    "other": (1e-3, 3e-3, 1e-2),
}
"""Whose best is in the middle of what was seen to work; on 2026-11-24 the rivals' were at the upper edge (LOG.md)."""
BLOCKS = (8, 12, 16, 20, 24)  # of deltallm.md 8(b)


def rates(method: str, whole: bool = False) -> tuple[float, ...]:
    """The three learning rates that a method is tuned over; whole: with all of its parameters trained."""
    return RATES["search"] if whole else RATES.get(method, RATES["other"])


def runs(
    which: str,
    *,
    tokens: int,
    tune_tokens: int,
    best: Callable[[str, str], float],
    plans: Mapping[str, str] | None = None,
) -> list[Run]:
    """The runs of a set. best(rival, size) is the learning rate that tuning chose for the rival at "12" or "24".

    plans: name -> file of save_shared, for the sets tuneplans and plans.
    """
    if which in ("tuneplans", "plans"):
        planned = [
            {"name": name, "rival": name, "method": "plan", "file": file, "pmr": "bernoulli", "tokens": tokens}
            for name, file in (plans or {}).items()
        ]
        if which == "plans":
            return [{**run, "rate": best(run["name"], "plans")} for run in planned]
        return [
            {**run, "name": f"{run['name']} rate {rate:g}", "tokens": tune_tokens, "rate": rate}
            for rate in rates("deltallm")
            for run in planned
        ]
    if which in ("tune12", "tune24"):
        common = {"reduce": SIZES[which[4:]], "tokens": tune_tokens}
        return [
            {"name": f"{name} rate {rate:g}", "rival": name, **options, **common, "rate": rate}
            for rate_index in range(3)
            for name, options in RIVALS.items()
            for rate in (rates(options["method"], options.get("whole", False))[rate_index],)
        ]
    if which in ("main12", "main24"):
        size = which[4:]
        return [
            {"name": name, **options, "reduce": SIZES[size], "tokens": tokens, "rate": best(name, size)}
            for name, options in RIVALS.items()
        ]
    if which in ("shrunk12", "shrunk24"):
        return [
            {"name": f"{name} untrained", **options, "reduce": SIZES[which[6:]], "tokens": 0, "rate": 0.0}
            for name, options in RIVALS.items()
        ]
    if which == "untrained":
        return list(_untrained())
    if which == "pmr":
        kinds = {"none": None, "bernoulli": "bernoulli", "blend": "blend"}
        return [
            {**_delta(f"pmr {name} seed {seed}", tune_tokens, best, pmr=pmr), "seed": seed}
            for seed in range(3)
            for name, pmr in kinds.items()
        ]
    if which == "ablation":
        inits = ("zero", "svd", "whitened", "whitened+gain", "als", "no-base")
        # Attentions alone hold too little for 12 %: they are compared with MLPs at 5 %.
        changes: dict[str, Run] = {f"init {init}": {"init": init} for init in inits} | {
            "sequential": {"layout": "sequential"},
            "sequential, all kinds": {"layout": "sequential", "kinds": "all"},
            "sequential, attention, 5 %": {"layout": "sequential", "kinds": "attention", "reduce": 0.05},
            "sequential, mlp, 5 %": {"layout": "sequential", "reduce": 0.05},
            "delta + LoRA 8": {"lora": 8},
            "delta + LoRA 32": {"lora": 32},
        }
        return [_delta(name, tune_tokens, best, **options) for name, options in changes.items()]
    if which == "base":
        return [{"name": "base", "method": "base", "tokens": 0, "rate": 0.0}]
    raise SystemExit(f"no set {which!r}")


def _delta(name: str, tokens: int, best: Callable[[str, str], float], **options: Any) -> Run:
    return {
        "name": name,
        **RIVALS["deltallm"],
        "reduce": 0.12,
        "tokens": tokens,
        "rate": best("deltallm", "12"),
        **options,
    }


def _untrained() -> Iterator[Run]:
    """deltallm.md 8(b), with the control that it lacks."""
    tied = {"method": "deltallm", "blocks": BLOCKS, "rank": 144, "tokens": 0, "rate": 0.0}
    yield {"name": "untouched", "method": "base", "tokens": 0, "rate": 0.0}
    yield {"name": "dropped", "method": "drop", "blocks": BLOCKS, "tokens": 0, "rate": 0.0}
    yield {**tied, "name": "tied, no delta", "init": "svd", "rank": 0}
    for init in ("svd", "whitened", "whitened+gain", "no-base", "als"):
        yield {**tied, "name": f"tied, {init}", "init": init}


def save_shared(path: Path, shared: Shared) -> None:
    """Write a Shared: factors in fp16 (safetensors), the rest in the metadata."""
    tensors = {f"{leaf}.{i}": getattr(tie, leaf).half() for i, tie in enumerate(shared.ties) for leaf in ("u", "v")}
    ties = [[tie.tensor, tie.reference, tie.gain] for tie in shared.ties]
    with atomic(path) as file:
        file.write(save(tensors, {"ties": json.dumps(ties), "dropped": json.dumps(shared.dropped)}))


def load_shared(path: Path) -> Shared:
    """Read what save_shared wrote."""
    with safe_open(path, "pt") as file:
        stated = {key: json.loads(value) for key, value in file.metadata().items()}
        ties = tuple(
            Tie(name, reference, gain, file.get_tensor(f"u.{i}").float(), file.get_tensor(f"v.{i}").float())
            for i, (name, reference, gain) in enumerate(stated["ties"])
        )
    return Shared(ties, tuple(stated["dropped"]))


@dataclass
class Subject:
    """A run's student: what is trained, and what is counted and scored when that is done."""

    run: Run
    pupil: Pupil | None
    finish: Callable[[], tuple[PreTrainedModel, Shared | None]]
    parameters: int
    description: dict[str, Any]


class Maker:
    """Makes the students of one base; what closed forms need (grams) is measured once."""

    def __init__(self, folder: Path, teacher: PreTrainedModel, windows: Tensor, plans: Path) -> None:
        """teacher: the base on the device, in the dtype to train in. windows: to calibrate on. plans: their folder."""
        self.folder, self.teacher, self.windows, self.plans = folder, teacher, windows, plans
        self.device = str(next(teacher.parameters()).device)
        self.dtype = next(teacher.parameters()).dtype
        self.total = count(teacher)
        self._grams: dict[str, Gram] = {}
        self._rivals: dict[tuple[str, float], baselines.Baseline] = {}
        self._original: Original | None = None

    def subject(self, run: Run) -> Subject:
        """The student of a run, ready to be trained."""
        if run["method"] in baselines.METHODS:
            return self._rival(run)
        anchors: dict[str, Tensor] = {}
        if run["method"] == "base":
            shared = Shared(())
        elif run["method"] == "drop":
            shared = Shared((), tuple(f"model.layers.{block}.mlp" for block in run["blocks"]))
        elif run["method"] == "plan":
            shared = load_shared(Path(run["file"]))
        elif run["method"] == "search":
            shared = self._searched(run)
        else:
            shared, anchors = self._closed_form(run)
        return self._student(run, shared, anchors)

    def _student(self, run: Run, shared: Shared, anchors: dict[str, Tensor]) -> Subject:
        model = twin(self.teacher)
        removed = sum(model.get_parameter(tie.tensor).numel() for tie in shared.ties)
        removed += sum(count(model.get_submodule(name)) for name in shared.dropped)
        added = sum(tie.u.numel() + tie.v.numel() for tie in shared.ties)
        for name, matrix in anchors.items():  # a learned base: the teacher keeps its own
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(matrix.to(self.device, self.dtype), requires_grad=False)
        pmr = run.get("pmr")
        schedule = (
            None
            if pmr is None
            else Replacement(blend=pmr == "blend", seed=run.get("seed", 0), **run.get("schedule", {}))
        )
        student = apply(
            model,
            shared,
            replacement=schedule,
            train_gain=True,
            lora_rank=run.get("lora", 0),
            rest=run.get("whole", False),
            seed=run.get("seed", 0),
        )
        pupil = None
        if run["tokens"]:
            multiples = student.multiples(run.get("rest", 1.0))
            pupil = Pupil(
                run["name"], model, tuple(student.parameters()), run["rate"], student.advance, multiples=multiples
            )

        def finish() -> tuple[PreTrainedModel, Shared | None]:
            with torch.no_grad():  # what a file holds: factors in fp16
                for module in student.tied:
                    module.u.copy_(module.u.half())
                    module.v.copy_(module.v.half())
            return student.finish(), Shared(student.factors(), shared.dropped)

        blocks = sorted({int(tie.tensor.split(".")[2]) for tie in shared.ties})
        ranks = sorted({tie.u.shape[1] for tie in shared.ties})
        described = {"delta_blocks": blocks, "ranks": ranks, "gains": [round(tie.gain, 4) for tie in shared.ties]}
        return Subject(run, pupil, finish, self.total - removed + added, described)

    def _rival(self, run: Run) -> Subject:
        key = run["method"], run["reduce"]
        if key not in self._rivals:
            self._rivals[key] = baselines.share(
                key[0], self.folder, reduce=key[1], windows=self.windows, device=self.device, dtype=self.dtype
            )
        found = replace(self._rivals[key], model=copy.deepcopy(self._rivals[key].model))
        pupil = None
        if run["tokens"]:
            if run.get("whole"):
                trained = tuple(found.model.float().requires_grad_(True).parameters())
            else:
                trained = tuple(found.trainable(seed=run.get("seed", 0)))
            pupil = Pupil(run["name"], found.model, trained, run["rate"])
        described = {k: v for k, v in found.description.items() if k not in ("similarity", "block_influence")}
        return Subject(run, pupil, lambda: (found.finish(), None), found.parameters, described)

    def _closed_form(self, run: Run) -> tuple[Shared, dict[str, Tensor]]:
        """The ties of a layout and an initialisation, and learned anchors (als) by name."""
        dial = layouts.Dial(
            layout=run.get("layout", "alternating"),
            kinds=run.get("kinds", "mlp"),
            reduce=run.get("reduce"),
            rank=run.get("rank"),
            count=run.get("count"),
            blocks=tuple(run.get("blocks", ())),
        )
        return draft.closed_form(self.original, dial, run["init"], lambda _: self._measured(), seed=run.get("seed", 0))

    @property
    def original(self) -> Original:
        """The base as the closed forms read it."""
        if self._original is None:
            self._original = Original(self.folder, device=self.device)
        return self._original

    def _searched(self, run: Run) -> Shared:
        """The plan that bayou.sharing.search finds for a reduction; kept in a file, for it takes minutes."""
        path = self.plans / f"searched-{run['kinds']}-{run['reduce']:g}.shared"
        if not path.exists():
            dial = layouts.Dial(kinds=run["kinds"], reduce=run["reduce"])
            save_shared(path, search.search(self.original, dial, self.windows, lambda *_: None))
        return load_shared(path)

    def _measured(self) -> dict[str, Gram]:
        """Second moments of every linear's input, from one walk."""
        if not self._grams:
            names = [name for sub in self.original.sublayers.values() for name in sub.tensors()]
            self._grams = self.original.grams(self.windows, names, lambda *_: None)
        return self._grams


def scaled(run: Run, factor: float) -> Run:
    """The run with its tokens scaled, for a quick look at everything."""
    run = copy.copy(run)
    run["tokens"] = int(run["tokens"] * factor)
    return run
