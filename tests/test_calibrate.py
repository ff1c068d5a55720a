"""The walk sees what a plain forward of the loaded model sees, and leaves no trace in the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pico import NAMES, pico, tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayou import skeleton
from bayou.calibrate import read_tokens, walk
from bayou.errors import BadInput
from bayou.moments import correction

VISION = ("llava", "qwen2_vl")
IDS = torch.randint(4, 128, (6, 21), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Any:
    """All of the model, as transformers loads it, in fp32."""
    vision = json.loads((folder / "config.json").read_text())["model_type"] in VISION
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


class Streamed:
    """A skeleton of the folder's model, and the walk's callbacks that fill and empty its layers from disk."""

    def __init__(self, folder: Path) -> None:
        self.disk = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        self.model = skeleton.build(folder)
        self.places = skeleton.places(self.model, self.disk)
        self.path, self.layers = skeleton.decoder_layers(self.model)
        self.filled: list[int] = []
        self.grams: dict[str, Tensor] = {}

    def fill(self, i: int | None) -> None:
        prefix = "" if i is None else f"{self.path}.{i}"
        skip = self.path if i is None else None
        skeleton.fill(self.model, prefix, self.places, self.disk.__getitem__, skip=skip)
        if i is not None:
            self.filled.append(i)

    def empty(self, i: int) -> None:
        skeleton.empty(self.layers[i])
        self.filled.remove(i)

    def visit(self, i: int, grams: dict[str, Tensor]) -> None:
        assert self.filled == ([i] if i < len(self.layers) else [])
        self.grams.update(grams)

    def walk(self, ids: Tensor = IDS, **options: Any) -> dict[str, Tensor]:
        callbacks = {"fill": self.fill, "empty": self.empty, "visit": self.visit}
        walk(self.model, ids, **{**callbacks, "batch": 2, **options})
        return self.grams


def plain_grams(model: nn.Module, paths: set[str], ids: Tensor = IDS) -> dict[str, Tensor]:
    """x^T x in fp64 of the first argument of every module of `paths`, in one forward of the whole model."""
    grams = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0].double().flatten(0, -2)
            grams[path] = grams.get(path, 0) + x.T @ x

        return keep

    for path, module in model.named_modules():
        if path in paths:
            module.register_forward_pre_hook(hook(path), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids)
    return grams


def modules(model: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize("name", NAMES)
def test_grams_are_those_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    folder = pico(name, tmp_path / name)
    streamed, loaded = Streamed(folder), load(folder)
    before = modules(streamed.model)
    grams = streamed.walk()
    assert modules(streamed.model) == before
    assert not streamed.filled and all(p.is_meta for p in streamed.layers.parameters())

    wanted = {
        path
        for path, module in loaded.named_modules()
        if path.startswith(streamed.path + ".")
        and (isinstance(module, nn.Linear | Conv1D) or type(module).__name__.endswith(("Experts", "Router")))
    }
    if name not in ("gpt2", "gemma3", "llama_tied"):
        wanted.add("lm_head")
    assert set(grams) == wanted
    plain = plain_grams(loaded, wanted)
    for path in wanted:
        error = (grams[path] - plain[path]).norm() / plain[path].norm()
        assert grams[path].dtype == torch.float32 and error < 2e-6, (path, error)


def test_modules_with_one_input_share_one_gram(tmp_path: Path) -> None:
    grams = Streamed(pico("qwen3_moe", tmp_path / "m")).walk()
    attention = "model.layers.0.self_attn."
    assert grams[attention + "q_proj"] is grams[attention + "k_proj"] is grams[attention + "v_proj"]
    assert grams["model.layers.1.mlp.gate"] is grams["model.layers.1.mlp.experts"]
    assert len({id(gram) for gram in grams.values()}) == 2 * 3 + 1  # q, o and experts of two layers; the head


@pytest.mark.parametrize("windows,batch", [(1, 8), (3, 1), (21, 5), (9, 4)])
def test_grams_do_not_depend_on_how_windows_are_cut(windows: int, batch: int, tmp_path: Path) -> None:
    """Qwen2-VL has 3 kinds of position; 21 windows are as many as a window has tokens (20 are used)."""
    ids = torch.randint(4, 128, (windows, 21), generator=torch.Generator().manual_seed(windows))
    folder = pico("qwen2_vl", tmp_path / "m")
    grams = Streamed(folder).walk(ids, batch=batch)
    plain = plain_grams(load(folder), set(grams), ids[: 20 if windows == 21 else windows])
    assert all((grams[path] - plain[path]).norm() / plain[path].norm() < 2e-6 for path in grams)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma3", "mixtral"])
def test_compressed_layers_feed_the_next_ones(name: str, tmp_path: Path) -> None:
    folder = pico(name, tmp_path / name)

    def shrink(i: int, model: nn.Module, path: str) -> None:
        with torch.no_grad():
            for parameter in model.get_submodule(f"{path}.{i}").parameters():
                parameter.mul_(0.7)

    class Shrinking(Streamed):
        def visit(self, i: int, grams: dict[str, Tensor]) -> None:
            super().visit(i, grams)
            if i < len(self.layers):
                shrink(i, self.model, self.path)

    last = f"{Streamed(folder).path}.1."
    compressed = Shrinking(folder).walk(keep="compressed")
    finetuned = Shrinking(folder).walk(keep="finetuned")  # what visit does to the layer goes no further
    original = Streamed(folder).walk()
    for path in original:
        assert torch.equal(finetuned[path], original[path]), path
        if not path.startswith(last) and path != "lm_head":
            assert torch.equal(compressed[path], original[path]), path

    loaded = load(folder)
    shrink(0, loaded, last[:-3])
    plain = plain_grams(loaded, {path for path in original if path.startswith(last)})
    for path, gram in plain.items():
        assert (compressed[path] - gram).norm() / gram.norm() < 2e-6
        assert (original[path] - gram).norm() / gram.norm() > 1e-3
    if "lm_head" in original:
        shrink(1, loaded, last[:-3])
        gram = plain_grams(loaded, {"lm_head"})["lm_head"]
        assert (compressed["lm_head"] - gram).norm() / gram.norm() < 2e-6


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = pico("llama_gqa", tmp_path / "m")
    first, second = Streamed(folder).walk(), Streamed(folder).walk()
    assert all(torch.equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize("failing", ["fill", "visit", "empty", "progress"])
def test_an_exception_leaves_the_model_as_it_was(failing: str, tmp_path: Path) -> None:
    streamed = Streamed(pico("llama_gqa", tmp_path / "m"))
    before = modules(streamed.model)

    def fail(*_: object) -> None:
        if failing != "fill" or streamed.filled:  # the weights outside the layers are filled first
            raise KeyError("on purpose")

    def fill(i: int | None) -> None:
        streamed.fill(i)
        fail()

    with pytest.raises(KeyError, match="on purpose"):
        streamed.walk(**{failing: fill if failing == "fill" else fail})
    assert modules(streamed.model) == before
    assert all(not module._forward_pre_hooks for module in streamed.model.modules())
    if failing != "empty":
        assert not streamed.filled


def test_progress_and_bad_arguments(tmp_path: Path) -> None:
    streamed = Streamed(pico("llama_tied", tmp_path / "m"))
    seen: list[tuple[int, int]] = []
    streamed.walk(progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(BadInput, match="keep must be"):
        streamed.walk(keep="both")
    with pytest.raises(BadInput, match="300 tokens .* 256 positions"):
        streamed.walk(torch.zeros(2, 300, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ read_tokens


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_windows_of_the_default_text() -> None:
    ids = read_tokens(None, tokenizer(), tokens=1000, length=64)
    assert ids.shape == (15, 64) and ids.dtype == torch.int64
    assert torch.equal(ids, read_tokens(None, tokenizer(), tokens=1000, length=64))
    assert not torch.equal(ids, read_tokens(None, tokenizer(), tokens=1000, length=64, seed=1))


def test_a_text_file_is_cut_into_documents_and_joined_with_eos(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join("abc" * 300 for _ in range(9)))  # 900 letters a paragraph: 3 a document
    ids = read_tokens(path, tokenizer(), tokens=10**6, length=50)
    text = tokenizer().decode(ids.flatten())
    assert text.count("</s>") == 3 - (8110 - ids.numel() > 0) and ids.shape == (162, 50)
    assert set(text.replace("</s>", "")) == set("abc\n")


def test_jsonl_of_each_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one"}, {"prompt": "2+2=", "answer": "4"})
    with path.open("a") as file:
        file.write("\n")  # blank lines are nothing
    text = tokenizer().decode(read_tokens(path, tokenizer(), tokens=12, length=12)[0])
    assert text in ("one</s>2+2=4</s>", "2+2=4</s>one</s>")
    chatty = tokenizer()
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    path = write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    ids = read_tokens(path, chatty, tokens=100, length=40)
    assert ids.shape == (1, 9) and chatty.decode(ids[0]) == "[user]hi</s>"  # one window, shorter than asked
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadInput, match="b.jsonl, line 1: the chat template .* roles must alternate"):
        read_tokens(path, chatty, tokens=10, length=5)


def test_every_window_starts_with_the_bos_of_a_tokenizer_that_sets_one(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = tokenizer()
    starting._tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    ids = read_tokens(write(tmp_path / "a.jsonl", {"text": "abcdefgh"}), starting, tokens=12, length=4)
    assert [starting.decode(window) for window in ids] == ["<s>abc", "<s>def", "<s>gh</s>"]


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a JSON list"),
        ('{"text": 3}', 'line 2: "text" must be a string; it is 3'),
        ('{"prompt": "x"}', 'line 2: "answer" must be a string; it has prompt'),
        ('{"question": "x"}', 'line 2 has neither "text" .* it has question'),
        ('{"messages": []}', 'line 2 has "messages", but the tokenizer has no chat template'),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(BadInput, match=message):
        read_tokens(path, tokenizer(), tokens=10, length=5)


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read .*absent.txt: No such file"):
        read_tokens(tmp_path / "absent.txt", tokenizer(), tokens=10, length=5)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"not UTF-8 text \(byte 3\)"):
        read_tokens(tmp_path / "latin.txt", tokenizer(), tokens=10, length=5)
    (tmp_path / "empty.txt").write_text(" \n\n \n")
    with pytest.raises(BadInput, match="empty.txt has no text"):
        read_tokens(tmp_path / "empty.txt", tokenizer(), tokens=10, length=5)
    with pytest.raises(BadInput, match="0 tokens in windows of 5"):
        read_tokens(None, tokenizer(), tokens=0, length=5)


# ------------------------------------------------------------------------------------------------ two streams


class Corrected(Streamed):
    """Halves every matrix of a layer as its input comes by, and keeps what it was shown, input by input."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stages: list[tuple[int, set[str]]] = []
        self.lacking: dict[str, Tensor] = {}

    def visit(self, i: int, grams: dict[str, Tensor], lacking: dict[str, Tensor] | None = None) -> None:  # type: ignore[override]
        super().visit(i, grams)
        assert lacking is not None
        self.lacking |= lacking
        self.stages.append((i, set(grams)))
        for path in grams if i < len(self.layers) else ():
            for parameter in self.model.get_submodule(path).parameters(recurse=False):
                parameter.mul_(0.9)

    @contextmanager
    def begin(self) -> Iterator[None]:
        table = self.model.get_input_embeddings().weight
        with torch.no_grad():
            table[:, ::2] *= 0.8
        yield
        with torch.no_grad():
            table[:, ::2] /= 0.8


def inputs(model: nn.Module, paths: set[str]) -> dict[str, Tensor]:
    """What each module is given in a plain forward, (tokens, in) fp64."""
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[path] = (args or tuple(kwargs.values()))[0].double().flatten(0, -2).clone()

        return keep

    hooks = [
        module.register_forward_pre_hook(hook(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path in paths
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for one in hooks:
        one.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_corrected_compares_two_models_input_by_input(name: str, tmp_path: Path) -> None:
    """Against plain forwards of the fine-tune, and of the model that all the overwriting makes."""
    folder = pico(name, tmp_path / name)
    streamed = Corrected(folder)
    grams = streamed.walk(keep="corrected", begin=streamed.begin)
    assert all(p.is_meta for p in streamed.layers.parameters())

    loaded = load(folder)
    theirs = inputs(loaded, set(grams))
    table = loaded.get_input_embeddings()
    tied = table.weight is loaded.get_output_embeddings().weight
    with torch.no_grad():
        table.weight[:, ::2] *= 0.8
        for path in grams:
            for parameter in () if path == "lm_head" else loaded.get_submodule(path).parameters(recurse=False):
                parameter.mul_(0.9)
    ours = inputs(loaded, set(grams))
    assert set(streamed.lacking) == set(grams) and (tied or "lm_head" in grams)
    for path, y in ours.items():
        for found, wanted in ((grams[path], y.T @ y), (streamed.lacking[path], (theirs[path] - y).T @ y)):
            assert (found - wanted).norm() < 1e-5 * (y.T @ y).norm(), path
        assert streamed.lacking[path].norm() > 1e-3 * grams[path].norm()
    layers = [stage for stage in streamed.stages if stage[0] < len(streamed.layers)]
    assert all(not (one & other) for (_, one), (_, other) in combinations(layers, 2))
    assert [i for i, paths in layers if not paths] == list(range(len(streamed.layers)))


def test_corrected_stages_are_the_inputs_in_the_order_of_the_forward(tmp_path: Path) -> None:
    streamed = Corrected(pico("llama_gqa", tmp_path / "m"))
    streamed.walk(keep="corrected", begin=streamed.begin)
    first = [{path.rpartition(".")[2] for path in paths} for i, paths in streamed.stages if i == 0]
    assert first == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}, set()]


def test_a_correction_brings_the_outputs_nearer() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=g) @ torch.randn(24, 24, generator=g)
    y = 0.8 * x + 0.1 * torch.randn(500, 24, generator=g)
    w = torch.randn(10, 24, generator=g)
    gram, lacking = y.T @ y, (x - y).T @ y
    lost = [
        float(((x @ w.T) - y @ (w + w @ correction(gram, lacking, ridge)).T).norm())
        for ridge in (1e9, 1.0, 0.1, 0.01, 1e-9)
    ]
    assert lost[0] == pytest.approx(float(((x - y) @ w.T).norm()), rel=1e-5)
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.3 * lost[0]
    best = torch.linalg.lstsq(y.double(), (x @ w.T).double()).solution
    assert lost[-1] == pytest.approx(float(((x @ w.T).double() - y.double() @ best).norm()), rel=1e-4)
    assert torch.equal(correction(torch.zeros(3, 3), torch.zeros(3, 3), 1.0), torch.zeros(3, 3))
