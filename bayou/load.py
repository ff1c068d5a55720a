"""`bayou.load`: a transformers model of whatever Bayou wrote: a file over its base, a file alone, a sliced folder."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from bayou.attach import load as load_file
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.sharing.baselines import slicegpt


def load(
    base: str | Path | None,
    file: DeltaFile | str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base_revision: str | None = None,
) -> PreTrainedModel:
    """The model of a .bayou file, with its deltas attached to the base's weights; or of a sliced folder.

    Args:
        base: folder or Hub id of the base that the file was made against; None for a file that leans on none (`bayou
            share`). Alone, it is that file itself, or the folder that `bayou share --method slicegpt` wrote.
        file: a .bayou file, or that folder.
        dtype: of the weights in memory and of the arithmetic.
        device: where the model goes.
        base_revision: of the Hub id; the one that the file names by default.

    See bayou.attach.load for what is attached, and detached. Raises WrongBase unless the base is the one that the file
    was made against; BadInput for none where one is needed; BadFile, DamagedFile, Unsupported.
    """
    alone = file is None
    source = base if file is None else file
    if source is None:
        raise BadInput("nothing to load: give a base and a .bayou file, or one that needs no base")
    if not isinstance(source, DeltaFile) and slicegpt.is_sliced(source):
        return slicegpt.load(source, device=device, dtype=dtype)
    if alone and not isinstance(source, DeltaFile) and (Path(source) / "config.json").is_file():
        raise BadInput(f"{source} is an ordinary model folder; give a .bayou file too, or load it with transformers")
    return load_file(None if alone else base, source, dtype=dtype, device=device, base_revision=base_revision)
