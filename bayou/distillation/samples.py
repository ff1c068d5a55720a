"""Text of a model's own, to distil on where the user gives none: what the fine-tune writes is what it is used for.

Sampled at temperature 1 from all of the vocabulary, as LLM-QAT does (https://arxiv.org/abs/2305.17888). Every second
window begins with the bos token, where the model has one, the others with a token drawn from the vocabulary; a text
that ends (eos) is followed by another.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bayou.errors import Unsupported


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

    progress: called with tokens a window done, and all. Raises Unsupported for a model that cannot go on from a cache.
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
        ids, cache, made = opening, None, [opening]
        for step in range(length - 1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise Unsupported(f"{type(model).__name__} has no cache to sample with; give a text by --calibration")
            chosen = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=draw)
            ids = torch.where(torch.isin(ids, ends), opening, chosen)
            made.append(ids)
            if progress is not None:
                progress(first // batch * (length - 1) + step + 1, -(-count // batch) * (length - 1))
        found.append(torch.cat(made, dim=1).cpu())
    return torch.cat(found)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
