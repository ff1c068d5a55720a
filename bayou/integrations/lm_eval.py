"""lm-evaluation-harness's model "bayou": a base and a delta over it, or a file that needs no base; nothing is restored.

    python -m bayou.integrations.lm_eval --model bayou --model_args base=BASE,delta=math.bayou --tasks arc_easy

is lm_eval's own command with this model known to it (the harness finds no models of other packages by itself). In
Python, importing this module is enough: lm_eval.simple_evaluate("bayou", {"base": ..., "delta": ...}, ...).
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from bayou import sidecar
from bayou.calibrate import tokenizer_of
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.load import load

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@register_model("bayou")
class Bayou(HFLM):
    """base: folder or Hub id; left out for a file that needs none. delta: a .bayou file. dtype: of the arithmetic.

    The tokenizer is the fine-tune's, from the file, or the base's where the file has none. Other options (batch_size,
    max_length, add_bos_token, prefix_token_id, ...) are those of the harness's "hf". Raises as `bayou.load`.
    """

    def __init__(
        self,
        base: str | None = None,
        delta: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        base_revision: str | None = None,
        **options: Any,
    ) -> None:
        if delta is None or dtype not in DTYPES:
            raise BadInput(f"model_args delta={delta},dtype={dtype}: a .bayou file, and one of {', '.join(DTYPES)}")
        file = DeltaFile(delta)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load(base, file, dtype=DTYPES[dtype], device=place, base_revision=base_revision)
        tokenizer = tokenizer_in(file, base, base_revision)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
        self._told = {"base_root": file.base["root"], "delta_root": file.root, "model_dtype": dtype}

    def get_model_info(self) -> dict[str, Any]:
        """What a report of the harness says of the model: roots, not a Hub's commits, which it would look up."""
        return self._told | {"model_num_parameters": self._model.num_parameters()}


def tokenizer_in(file: DeltaFile, base: str | Path | None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a file's fine-tune; the base's where the file carries none."""
    lender = file.lean_on(base, revision)
    folder = None if lender is None else lender.folder
    files = {name: file.read_file(name, folder) for name in file.files}
    if folder is not None and set(files) <= {"config.json", "generation_config.json"}:
        files = sidecar.carried(folder) | files
    return tokenizer_of(files)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
