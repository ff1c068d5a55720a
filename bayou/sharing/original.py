"""The model that is to be shared: its tensors, its sub-layers, and the second moments of its linears' inputs."""

from collections.abc import Callable, Collection, Iterator
from math import prod
from pathlib import Path

from torch import Tensor

from bayou import calibrate, preflight, skeleton
from bayou.checkpoint import Checkpoint, resolve
from bayou.errors import BadInput
from bayou.methods import Gram
from bayou.sharing import layouts

Progress = Callable[[str, int, int], None]
Visit = Callable[[dict[str, Gram]], None]


class Original:
    """A model folder or Hub id, read lazily. Names are disk names, matrices (out, in), fp32, on `device`."""

    def __init__(self, source: str | Path, *, revision: str | None = None, device: str = "cpu") -> None:
        preflight.check_device(device)
        self.device = device
        self.checkpoint = Checkpoint(resolve(source, revision))
        self.folder = self.checkpoint.folder
        self.model = skeleton.build(self.folder)
        self.places = skeleton.places(self.model, self.checkpoint.names())
        self.layers_path, self.layers = skeleton.decoder_layers(self.model)
        shapes = {name: self.checkpoint.shape(name) for name in self.checkpoint.names()}
        self.sublayers = layouts.sublayers(self.layers_path, self.layers, self.places, shapes)
        self.parameters = sum(prod(shape) for shape in shapes.values())

    @property
    def tables(self) -> int:
        """Numbers of embeddings and head."""
        names = (n for n, place in self.places.items() if place.role in ("embedding", "head"))
        return sum(prod(self.checkpoint.shape(name)) for name in names)

    def role(self, name: str) -> str:
        """linear, embedding, head, norm, bias or other."""
        return self.places[name].role if name in self.places else "other"

    def oriented(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the shape that `name` has on disk as a matrix (out, in), fp32."""
        value = value.to(self.device).float()
        return (value.T if self.places[name].transposed else value).contiguous()

    def matrix(self, name: str) -> Tensor:
        """A linear's or table's matrix."""
        return self.oriented(name, self.checkpoint.read(name))

    def windows(self, calibration: str | Path | None, tokens: int | None, length: int, seed: int) -> Tensor | None:
        """Windows of token ids to calibrate on; None where `calibration` is "none"."""
        if calibration == "none":
            return None
        if tokens is None:
            tokens = 32_768 if self.device == "cpu" else 262_144
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or length
        source = None if calibration is None else Path(calibration)
        tokenizer = calibrate.read_tokenizer(self.folder)
        return calibrate.read_tokens(source, tokenizer, tokens=tokens, length=min(length, most), seed=seed)

    def walk(self, windows: Tensor, visit: Visit, progress: Progress) -> None:
        """Run the model over `windows`, a layer at a time; visit({disk name: gram}) after each, of its linears.

        Linears that are given the same input have the same Gram object.
        """
        by_module = {place.path.rpartition(".")[0]: n for n, place in self.places.items() if place.role == "linear"}

        def fill(layer: int | None) -> None:
            skip = self.layers_path if layer is None else None
            prefix = "" if layer is None else f"{self.layers_path}.{layer}"
            skeleton.fill(self.model, prefix, self.places, self.checkpoint.read, device=self.device, skip=skip)

        def seen(_: int, grams: dict[str, Tensor]) -> None:
            wrapped: dict[int, Gram] = {}
            visit(
                {
                    by_module[path]: wrapped.setdefault(id(gram), Gram(gram))
                    for path, gram in grams.items()
                    if path in by_module
                }
            )

        calibrate.walk(
            self.model,
            windows,
            fill=fill,
            empty=lambda layer: skeleton.empty(self.layers[layer]),
            visit=seen,
            device=self.device,
            progress=lambda done, total: progress("layers", done, total),
        )
        skeleton.empty(self.model)

    def grams(self, windows: Tensor | None, names: Collection[str], progress: Progress) -> dict[str, Gram]:
        """The grams of `names`, kept from one walk; empty without windows."""
        found: dict[str, Gram] = {}
        if windows is not None and names:
            self.walk(windows, lambda seen: found.update({n: g for n, g in seen.items() if n in names}), progress)
        return found

    def within(self, sublayer: str) -> Iterator[str]:
        """Disk names under "model.layers.7.mlp". Raises BadInput where there are none."""
        names = [name for name in self.checkpoint.names() if name.startswith(sublayer + ".")]
        if not names:
            raise BadInput(
                f"{self.folder} has no tensors under {sublayer!r}; name a sub-layer, e.g. model.layers.7.mlp"
            )
        yield from names
