"""What a student is trained on: (1 - a) CE(labels) + a KL(teacher || student) on the final logits.

The logits of a batch over the whole vocabulary would be by far the largest tensor of a step, so they are made a few
thousand positions at a time, in two stages: the loss's gradient with respect to the final hidden states (and the
head), chunk by chunk, and then one backward pass through the model from there.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayou.errors import BadInput, Unsupported


@dataclass(frozen=True)
class Loss:
    """Means over the predicted positions, in nats, as scalars on the device (holding them needs no sync)."""

    total: Tensor
    ce: Tensor
    kl: Tensor


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """ids (windows, length) -> what the head is given, (windows, length, d)."""
    decoder = getattr(model, "get_decoder", None)
    if decoder is None:
        raise BadInput(f"{type(model).__name__} has no get_decoder(); give a causal language model of transformers")
    output: Tensor = decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return output


def head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from final hidden states to logits, soft-capped where the model does that.

    Raises Unsupported for a model that has none, or scales its logits in a way unknown here.
    """
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if linear is None:
        raise Unsupported(f"{type(model).__name__} has no head that gives logits, by which training goes")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise Unsupported(f"{type(model).__name__} multiplies its logits by {name}, which training does not know")
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found: Tensor = linear(hidden)
        return found if cap is None else torch.tanh(found / cap) * cap

    return logits


class Taught:
    """The teacher's logits on a batch, made a chunk of positions at a time.

    teacher, ids (windows, length): one forward. keep: hold the logits once made (positions x vocabulary numbers), for
    several students to learn from.
    """

    def __init__(self, teacher: nn.Module, ids: Tensor, *, chunk: int, keep: bool = False) -> None:
        with torch.no_grad():
            self._parts = hidden_states(teacher, ids)[:, :-1].flatten(0, 1).split(chunk)
        self._head, self._keep = head(teacher), keep
        self._kept: dict[int, Tensor] = {}

    def logits(self, i: int) -> Tensor:
        """Of chunk i: (positions, vocabulary)."""
        if i in self._kept:
            return self._kept[i]
        with torch.no_grad():
            made = self._head(self._parts[i])
        if self._keep:
            self._kept[i] = made
        return made


def loss(
    student: nn.Module,
    ids: Tensor,
    *,
    alpha: float,
    taught: Taught | None = None,
    chunk: int = 4096,
    weight: float | None = None,
    compiled: bool = False,
) -> Loss:
    """The loss of `student` on windows of token ids; with `weight`, also its gradients.

    Args:
        ids: (windows, length); position t predicts token t + 1, the last predicts nothing.
        alpha: share of the KL; above 0 it needs `taught`, the teacher on the same ids in chunks of the same size.
        chunk: positions whose logits are in memory at once, in fp32.
        weight: None computes no gradient; else weight * total is back-propagated (1 / forwards of a step).
        compiled: fuse the work on the logits with torch.compile.
    """
    if alpha > 0 and taught is None:
        raise BadInput(f"alpha {alpha} needs a teacher; give one, or alpha 0")
    learns = weight is not None
    with torch.set_grad_enabled(learns):
        hidden = hidden_states(student, ids)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten().split(chunk)
    pieces = [part.requires_grad_(learns and hidden.requires_grad) for part in hidden.detach().split(chunk)]
    logits, scale = head(student), 1 / len(hidden)
    rows = _compiled_rows() if compiled else _rows
    ce, kl = (torch.zeros((), device=ids.device) for _ in range(2))
    for i, part in enumerate(pieces):
        with torch.set_grad_enabled(learns):
            found = logits(part)
        with torch.no_grad():
            wanted = None if taught is None or alpha == 0 else taught.logits(i)
            nll, apart, gradient = rows(found.detach(), wanted, targets[i], alpha)
            ce += nll * scale
            kl += apart * scale
        if weight is not None and found.requires_grad:  # not where every delta module is switched off
            found.backward(gradient.mul_(weight * scale).to(found.dtype))
    if learns and hidden.requires_grad:
        gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in pieces]
        hidden.backward(torch.cat(gradients))
    return Loss((1 - alpha) * ce + alpha * kl, ce, kl)


def _rows(logits: Tensor, taught: Tensor | None, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of CE and KL over rows of logits (n, vocabulary), and the total's gradient with respect to them, in fp32.

    Both gradients are known in closed form: p - onehot(target), and p - q for a teacher's probabilities q.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    nll = -log_p.gather(1, targets[:, None]).sum()
    gradient = log_p.exp()
    apart = torch.zeros_like(nll)
    if taught is not None:
        log_q = torch.log_softmax(taught.float(), dim=-1)
        q = log_q.exp()
        apart = (q * (log_q - log_p)).sum()
        gradient = gradient - alpha * q
    gradient = gradient.scatter_add(1, targets[:, None], gradient.new_full((len(targets), 1), alpha - 1))
    return nll, apart, gradient


@functools.cache
def _compiled_rows() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_rows)


@torch.no_grad()
def measure(
    student: nn.Module, windows: Tensor, teacher: nn.Module | None = None, *, batch: int = 16, chunk: int = 4096
) -> tuple[float, float]:
    """Mean CE to the text, and mean KL(teacher || student) (0 without a teacher), nats a token, over windows."""
    device = next(student.parameters()).device
    ce = kl = 0.0
    for part in windows.split(batch):
        ids = part.to(device)
        taught = None if teacher is None else Taught(teacher, ids, chunk=chunk)
        found = loss(student, ids, alpha=0.0 if teacher is None else 0.5, taught=taught, chunk=chunk)
        ce += float(found.ce) * len(part) / len(windows)
        kl += float(found.kl) * len(part) / len(windows)
    return ce, kl
