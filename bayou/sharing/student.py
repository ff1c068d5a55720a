"""A shared model that can be trained: DeltaLLM's student, with Progressive Module Replacement.

DeltaLLM (https://arxiv.org/abs/2501.18596): a tied matrix is W = gain * anchor + u v, the anchor being another
layer's weight; u, v (and gain, if wanted) are trained, all else is frozen, has LoRAs or is trained whole. During
training a *switch* stands around each group of tied matrices (the MLP or the attention of a layer): it runs the
original or the delta module.

PMR draws as BERT-of-Theseus (https://arxiv.org/abs/2002.02925) does: one Bernoulli draw a module and forward, for
the whole batch. The probability rises linearly, the modules nearest the output first:

    p_l(t) = clip(start + slope * t + lead * depth_l, 0, 1)     t: share of the tokens done, depth_l: 0 .. 1

and is 1 for all in the last phase. `blend` is the deterministic alternative: y = (1 - p) original + p delta.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bayou import skeleton
from bayou.errors import BadInput, Unsupported
from bayou.sharing import Shared, Tie, lora, whole


@dataclass(frozen=True)
class Replacement:
    """When delta modules take the originals' places: see the module's text.

    start, slope, lead: p0, k and c of the schedule, with t the share of all tokens. final: the share of the tokens, at
    the end, for which every module is replaced (at least .2). blend: mix instead of drawing. seed: of the draws.
    """

    start: float = 0.3
    slope: float = 1.2
    lead: float = 0.2
    final: float = 0.2
    blend: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.2 <= self.final <= 1:
            raise BadInput(f"a final phase of {self.final} of the tokens: it must be between .2 and 1")
        if not (0 <= self.start <= 1 and self.slope >= 0 and self.lead >= 0):
            raise BadInput(f"start {self.start}, slope {self.slope}, lead {self.lead}: start in 0..1, none negative")

    def probability(self, progress: float, depth: float) -> float:
        """p_l(t) for t = `progress` and a module at `depth` (1 is the one nearest the output)."""
        if progress >= 1 - self.final:
            return 1.0
        return min(1.0, max(0.0, self.start + self.slope * progress + self.lead * depth))


class TiedLinear(nn.Module):
    """x -> gain * x @ anchor.T + (x @ v.T) @ u.T + bias.

    The anchor is a module that belongs to another layer: it is looked at, not owned, so its weight is held once and
    is listed once among the parameters. u (out, rank) and v (rank, in) are fp32, cast to x's dtype in use.
    """

    def __init__(self, tie: Tie, inner: nn.Linear, *, train_gain: bool) -> None:
        super().__init__()
        device = inner.weight.device
        self.tensor, self.reference = tie.tensor, tie.reference
        self.u = nn.Parameter(tie.u.detach().float().clone().contiguous().to(device))
        self.v = nn.Parameter(tie.v.detach().float().clone().contiguous().to(device))
        based = tie.reference is not None
        self.gain = nn.Parameter(torch.tensor(tie.gain if based else 0.0, device=device), train_gain and based)
        self.bias = inner.bias
        self.plain = tie.gain == 1 and not train_gain
        self._anchor: nn.Module | None
        self.look_at(None)

    def look_at(self, anchor: nn.Module | None) -> None:
        """Take `anchor`, an nn.Linear or LoRALinear elsewhere in the model, for the reference."""
        self.__dict__["_anchor"] = anchor  # past nn.Module, which would make a child of it

    @property
    def anchor(self) -> nn.Module | None:
        """The module whose weight is the reference; None without one."""
        return self.__dict__["_anchor"]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = functional.linear(functional.linear(x, self.v.to(x.dtype)), self.u.to(x.dtype))
        anchor = self.anchor
        if anchor is not None:
            # With LoRA the anchor is what it will be once merged: both its users see the same matrix.
            is_lora = isinstance(anchor, lora.LoRALinear)
            shared = anchor.product(x) if is_lora else functional.linear(x, anchor.weight)  # type: ignore[operator, arg-type]
            y = (shared if self.plain else self.gain * shared) + y
        return y if self.bias is None else y + self.bias

    def tie(self) -> Tie:
        """The tie as it is now, on the CPU."""
        u, v = (part.detach().float().cpu().clone() for part in (self.u, self.v))
        return Tie(self.tensor, self.reference, float(self.gain.detach()) if self.reference is not None else 0.0, u, v)


class Dropped(nn.Module):
    """A sub-layer that adds nothing: zeros, in the form that the decoder layer expects of it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.attention = "attention" in type(original).__name__.lower()
        self.layer_idx = getattr(original, "layer_idx", None)

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Any:
        """(batch, tokens, d) -> zeros of that shape; with no attention weights beside them for an attention."""
        zeros = torch.zeros_like(hidden_states)
        if not self.attention:
            return zeros
        if past_key_values is not None and self.layer_idx is not None:
            # The first layer's keys are where transformers looks how long a cache is: keys of no width, 0 bytes.
            keys = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
            past_key_values.update(keys, keys, self.layer_idx)
        return zeros, None


class Switch(nn.Module):
    """Runs `delta` where amount is 1, `original` where it is 0, a mix of both in between."""

    def __init__(self, original: nn.Module, delta: nn.Module) -> None:
        super().__init__()
        self.original, self.delta = original, delta
        self.set(1.0)

    def set(self, amount: float) -> None:
        """The delta module's share, 0..1."""
        self.amount = amount
        self.mode = "delta" if amount >= 1 else "original" if amount <= 0 else "mix"  # what torch.compile can guard on

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's that it stands for."""
        if self.mode == "delta":
            return self.delta(*args, **kwargs)
        first = self.original(*args, **kwargs)
        if self.mode == "original":
            return first
        second = self.delta(*args, **kwargs)
        if isinstance(first, tuple):  # an attention's second value is its weights, which nobody asked for
            return (torch.lerp(first[0], second[0], self.amount), *second[1:])
        return torch.lerp(first, second, self.amount)


class Student:
    """A model with ties in it; `model` is the transformers model itself, changed in place."""

    def __init__(
        self, model: PreTrainedModel, switches: dict[str, Switch], tied: list[TiedLinear], schedule: Replacement | None
    ) -> None:
        self.model = model
        self.switches = switches
        self.tied = tied
        self.schedule = schedule
        self.changed: dict[str, Tensor] = {}
        self.parts: list[whole.Part] = []  # of the rest, where that is trained whole

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: u and v of each tie (and its gain), A and B of each LoRA, or the rest whole."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def multiples(self, rest: float) -> tuple[float, ...]:
        """For each of `parameters()`: 1 for what is of a tie, `rest` for all else."""
        own = {id(parameter) for parameter in self.of_ties()}
        return tuple(1.0 if id(parameter) in own else rest for parameter in self.parameters())

    def of_ties(self) -> list[nn.Parameter]:
        """u, v and gain of every tie, trained or not."""
        return [parameter for module in self.tied for parameter in (module.u, module.v, module.gain)]

    def advance(self, progress: float, forward: int) -> float:
        """Set the switches for forward number `forward`, at `progress` (0..1) of the tokens; share that is replaced.

        The draws are a function of the schedule's seed and `forward`: nothing need be kept to go on after a stop.
        """
        if self.schedule is None or not self.switches:
            return 1.0
        generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + forward)
        draws = torch.rand(len(self.switches), generator=generator).tolist()
        last = max(1, len(self.switches) - 1)
        for i, (switch, draw) in enumerate(zip(self.switches.values(), draws, strict=True)):
            chance = self.schedule.probability(progress, i / last)
            switch.set(chance if self.schedule.blend else float(draw < chance))
        return sum(switch.amount for switch in self.switches.values()) / len(self.switches)

    def factors(self) -> tuple[Tie, ...]:
        """The ties as trained."""
        return tuple(module.tie() for module in self.tied)

    def finish(self) -> PreTrainedModel:
        """Let go of the originals and merge the LoRAs; the model is then what a file of it would load as."""
        for path, switch in self.switches.items():
            self.model.set_submodule(path, switch.delta)
        self.switches = {}
        paths = {id(module): path for path, module in lora.inside(self.model)}
        merged = lora.merge(self.model)
        for module in self.tied:
            module.look_at(merged.get(id(module.anchor), module.anchor))
        self.changed |= {f"{paths[key]}.weight": linear.weight.detach() for key, linear in merged.items()}
        settled = {id(part.parameter) for part in whole.settle(self.parts)}
        self.parts = []
        self.changed |= {path: p.detach() for path, p in self.model.named_parameters() if id(p) in settled}
        return self.model

    def dense(self) -> dict[str, Tensor]:
        """Path of each parameter of the rest that training changed ("model.layers.3.mlp.up_proj.weight") -> its value.

        After `finish`. Empty for delta-only training.
        """
        return self.changed


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the very same parameters and buffers: tying one leaves the other as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def apply(
    model: PreTrainedModel,
    shared: Shared,
    *,
    replacement: Replacement | None = None,
    train_gain: bool = False,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    rest: bool = False,
    seed: int = 0,
) -> Student:
    """Tie and drop what `shared` says, in place.

    Args:
        model: a causal language model with its weights, of any device and dtype. Everything of it is frozen.
        replacement: PMR's schedule; None runs the delta modules from the start.
        train_gain: whether the gains are trained beside u and v.
        lora_rank: above 0, LoRA of this rank on all linears of the decoder layers that are not tied ("delta-layer
            tuning with LoRA"), scaled by lora_alpha / lora_rank; merged by `finish`.
        rest: train all that is neither tied nor dropped whole, embeddings, norms and anchors too; see sharing.whole.

    Raises:
        BadInput: a name that the model has not, a shape that does not fit, an anchor that is tied or dropped, LoRA on
            what is trained whole.
        Unsupported: a tie of something other than a whole nn.Linear.
    """
    if rest and lora_rank:
        raise BadInput(f"LoRA of rank {lora_rank} on the rest, and the rest trained whole: choose one")
    layers, _ = skeleton.decoder_layers(model)
    model.requires_grad_(False)
    names = [name for tie in shared.ties for name in (tie.tensor, tie.reference) if name is not None]
    paths = _linear_paths(model, names)
    _check(shared, paths, layers)
    groups: dict[str, nn.Module] = {}
    for tie in shared.ties:
        group = _group(paths[tie.tensor], layers)
        groups.setdefault(group, _copy(model.get_submodule(group)))
    for name in shared.dropped:
        path = _dropped_path(name, layers)
        try:
            original = model.get_submodule(path)
        except AttributeError:
            raise BadInput(f"the model has no sub-layer {name!r}") from None
        groups[path] = Dropped(original)
    tied = []
    for tie in shared.ties:
        group = _group(paths[tie.tensor], layers)
        leaf = paths[tie.tensor][len(group) + 1 :]
        inner = groups[group].get_submodule(leaf)
        assert isinstance(inner, nn.Linear)  # _linear_paths saw to it
        if (tie.u.shape[0], tie.v.shape[1]) != tuple(inner.weight.shape) or tie.u.shape[1] != tie.v.shape[0]:
            found = f"u {tuple(tie.u.shape)} and v {tuple(tie.v.shape)}"
            raise BadInput(f"{tie.tensor} is {tuple(inner.weight.shape)}; {found} do not fit")
        module = TiedLinear(tie, inner, train_gain=train_gain)
        groups[group].set_submodule(leaf, module)
        tied.append(module)
    switches = {}
    for path in sorted(groups, key=lambda p: [int(x) if x.isdigit() else x == "mlp" for x in p.split(".")]):
        switches[path] = Switch(model.get_submodule(path), groups[path])
        model.set_submodule(path, switches[path])
    originals = tuple(switch.original for switch in switches.values())
    if lora_rank:
        lora.add(model.get_submodule(layers), rank=lora_rank, alpha=lora_alpha, seed=seed, skip=originals)
    for module in tied:
        if module.reference is not None:
            path = paths[module.reference]
            group = _group(path, layers)
            # An anchor may stand in a group of which other matrices are tied: it is the delta module's then.
            home = f"{group}.delta{path[len(group) :]}" if group in switches else path
            module.look_at(model.get_submodule(home))
    student = Student(model, switches, tied, replacement)
    if rest:
        student.parts = whole.unfreeze(model, skip=originals, but=student.of_ties())
    return student


def _copy(module: nn.Module) -> nn.Module:
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _linear_paths(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Disk name -> path of the nn.Linear whose whole weight it is."""
    places = skeleton.places(model, names)
    found = {}
    for name in names:
        if name not in places:
            raise BadInput(f"the model has no tensor {name!r}")
        place = places[name]
        path, _, leaf = place.path.rpartition(".")
        if place.index is not None or place.converted or leaf != "weight":
            raise Unsupported(f"{name} is not a whole weight of the loaded model: it cannot be tied")
        if type(model.get_submodule(path)) is not nn.Linear:
            kind = type(model.get_submodule(path)).__name__
            raise Unsupported(f"{name} is the weight of a {kind}; only those of nn.Linear can be tied")
        found[name] = path
    return found


def _group(path: str, layers: str) -> str:
    """The MLP or attention that a linear belongs to: "model.layers.3.mlp" for ...3.mlp.up_proj."""
    inner = path.removeprefix(layers + ".").split(".")
    if not path.startswith(layers + ".") or len(inner) < 3:
        raise Unsupported(f"{path} is not inside the attention or the MLP of a layer: it cannot be tied")
    return ".".join([layers, *inner[:2]])


def _dropped_path(name: str, layers: str) -> str:
    parts = name.split(".")
    if len(parts) < 3 or not parts[-2].isdigit():
        raise BadInput(f'{name!r} is no sub-layer; write e.g. "model.layers.7.mlp"')
    return ".".join([layers, *parts[-2:]])


def _check(shared: Shared, paths: dict[str, str], layers: str) -> None:
    tensors = [tie.tensor for tie in shared.ties]
    if len(set(tensors)) != len(tensors):
        raise BadInput(f"{next(name for name in tensors if tensors.count(name) > 1)} is tied twice")
    dropped = {_dropped_path(name, layers) for name in shared.dropped}
    for tie in shared.ties:
        if _group(paths[tie.tensor], layers) in dropped:
            raise BadInput(f"{tie.tensor} is tied, and the sub-layer it belongs to is dropped; choose one")
        if tie.reference is None:
            continue
        if tie.reference in tensors:
            raise BadInput(f"{tie.tensor} refers to {tie.reference}, which is tied itself; refer to one that is kept")
        if paths[tie.reference].startswith(tuple(path + "." for path in dropped)):
            raise BadInput(f"{tie.tensor} refers to {tie.reference}, whose sub-layer is dropped; refer to a kept one")
