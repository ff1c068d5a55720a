"""Second moments kept on disk: one calibration for several compressions of the same model (`bayou compare`).

One safetensors file a layer, the moments of each input once, however many modules are given it; `key`, written last,
says that all are there, and of which windows. A compression makes of them, byte for byte, what it makes of its own.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from bayou import calibrate, skeleton
from bayou.checkpoint import atomic
from bayou.errors import BadInput
from bayou.inventory import Reads
from bayou.skeleton import Place


class MomentFiles:
    """The moments of one model's inputs over `windows`, in `folder`; `make` finds them, once."""

    def __init__(self, folder: Path, windows: Tensor) -> None:
        self.folder, self.windows = folder, windows
        self._key = json.dumps([list(windows.shape), calibrate.digest(windows)])

    @property
    def complete(self) -> bool:
        """Whether all layers are there."""
        key = self.folder / "key"
        return key.is_file() and key.read_text() == self._key

    def check(self, windows: Tensor) -> None:
        """Raises BadInput unless the moments are there, and those of these windows."""
        if not self.complete or calibrate.digest(windows) != calibrate.digest(self.windows):
            raise BadInput(f"{self.folder} has not the moments of this calibration; make them first, of the same text")

    def make(
        self,
        tuned: Reads,
        model: PreTrainedModel,
        places: dict[str, Place],
        device: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Walk the fine-tune, whose skeleton is `model`, over the windows; nothing where that has been done."""
        if self.complete:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _, layers = skeleton.decoder_layers(model)
        place = torch.device(device)
        calibrate.walk(
            model,
            self.windows,
            fill=lambda layer: calibrate.fill(model, places, tuned.read, layer, place),
            empty=lambda layer: skeleton.empty(layers[layer]),
            visit=self._put,
            device=place,
            progress=progress,
        )
        skeleton.empty(model)
        with atomic(self.folder / "key") as file:
            file.write(self._key.encode())

    def layers(self) -> list[int]:
        """The layers, in order; the last may be an untied head."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors"))

    def where(self) -> dict[str, int]:
        """Module path -> layer."""
        found: dict[str, int] = {}
        for layer in self.layers():
            with safe_open(self.folder / f"{layer}.safetensors", "pt") as file:
                found |= dict.fromkeys(json.loads(file.metadata()["index"]), layer)
        return found

    def get(self, layer: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Module path -> moments, (in, in) fp32; modules of one input have one tensor, as `calibrate.walk` gives it."""
        with safe_open(self.folder / f"{layer}.safetensors", "pt", device=str(device)) as file:
            index = json.loads(file.metadata()["index"])
            moments = [file.get_tensor(str(number)) for number in range(len(set(index.values())))]
        return {name: moments[number] for name, number in index.items()}

    def _put(self, layer: int, grams: dict[str, Tensor]) -> None:
        distinct = {id(gram): gram for gram in grams.values()}
        numbers = {key: number for number, key in enumerate(distinct)}
        index = {name: numbers[id(gram)] for name, gram in grams.items()}
        tensors = {str(numbers[key]): gram.cpu().contiguous() for key, gram in distinct.items()}
        with atomic(self.folder / f"{layer}.safetensors") as file:
            file.write(save(tensors, {"index": json.dumps(index)}))
