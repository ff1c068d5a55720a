"""Text of a model's own, to distil on where the user gives none: what the fine-tune writes is what it is used for.

Sampled at temperature 1 from all of the vocabulary, as LLM-QAT does (https://arxiv.org/abs/2305.17888). Every second
window begins with the bos token, where the model has one, the others with a token drawn from the vocabulary; a text
that ends (eos) is followed by another.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def windows(
    model: PreTrainedModel,
    count: int,
    length: int,
    *,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(count, length) int64 token ids on the CPU, the same for the same seed and device.

    progress: called with tokens a window done, and all.
    """
    config, device = model.config.get_text_config(), next(model.parameters()).device
    draw = torch.Generator(device=device).manual_seed(seed)
    ends = torch.tensor(_ids(config.eos_token_id), device=device)
    start = (_ids(config.bos_token_id) + [None])[0]
    found = []
    for first in range(0, count, batch):
        rows = min(batch, count - first)
        opening = torch.randint(config.vocab_size, (rows, 1), generator=draw, device=device)
        if start is not None:
            opening[::2] = start
        made, cache = [opening], None
        for step in range(length - 1):
            # A model without such a cache (Mamba) is given all of it again.
            output = (
                model(input_ids=torch.cat(made, dim=1), use_cache=True)
                if cache is None
                else model(input_ids=made[-1], past_key_values=cache, use_cache=True)
            )
            cache = getattr(output, "past_key_values", None)
            chosen = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=draw)
            made.append(torch.where(torch.isin(made[-1], ends), opening, chosen))
            if progress is not None:
                progress(first // batch * (length - 1) + step + 1, -(-count // batch) * (length - 1))
        found.append(torch.cat(made, dim=1).cpu())
    return torch.cat(found)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
