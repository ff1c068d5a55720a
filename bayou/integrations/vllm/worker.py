"""Packed deltas at full rank in vLLM's worker, in the place of its manager of LoRAs.

vLLM's scheduler, API and cache of prefixes go on to think of LoRAs: at most --max-loras of them in a step, one a
request, --max-cpu-loras kept in the CPU's memory. What they are is this manager's: a .bayou file, verified against the
files of the base, as hooks behind the modules that vLLM has loaded (see rows.py). Nothing of vLLM is changed but one
name, `LRUCacheWorkerLoRAManager` where its model runners look it up, so the version of vLLM is pinned.
"""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayou.checkpoint import Checkpoint, resolve
from bayou.deltafile import DeltaFile
from bayou.errors import BadFile, BadInput, Unsupported
from bayou.integrations.vllm.places import HEAD, Own, Places, footprint
from bayou.integrations.vllm.rows import Routing, RowEmbedding, RowLinear, RowNorm
from bayou.kernels.one_delta import suits
from bayou.serving.resident import check_config
from bayou.serving.tenant import CheckedOnce

VERSION = "0.32"
"""Of vLLM, whose inner workings this knows."""

_PATH = re.compile(r"(?P<path>.*\.bayou)(?:@(?P<root>[0-9a-f]{64}))?", re.DOTALL)
_PROBE = 5
_log = logging.getLogger("vllm.bayou")


def install() -> None:
    """Have vLLM's model runners make this manager. Raises BadInput for another version of vLLM."""
    import vllm

    if not vllm.__version__.startswith(VERSION + "."):
        raise BadInput(
            f"BAYOU_MODE=packed works inside vLLM and knows version {VERSION} only; this is {vllm.__version__}: "
            f"install vllm=={VERSION}.*, or leave BAYOU_MODE out to serve LoRAs"
        )
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    if mixin.LRUCacheWorkerLoRAManager is not Manager:
        mixin.LRUCacheWorkerLoRAManager = Manager


def named(path: Path, root: str) -> str:
    """What stands for a file in vLLM: its content is part of the name, as vLLM keys its cache of prefixes by that."""
    return f"{path}@{root}"


def check(file: DeltaFile, base: Checkpoint) -> None:
    """Raises BayouError unless a file can be served over a base, as far as can be told without vLLM's model."""
    if file.self_contained:
        raise Unsupported(f"{file.path} is a whole model of its own, no difference from a base; bayou restore it")
    file.check_base(base)
    check_config(base.config, file.fine_tune_config(base.folder), file.path)


class Manager:
    """Which deltas are in memory, and in which slots. It has the methods of vLLM's LRUCacheWorkerLoRAManager."""

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device, *_: Any, **__: Any) -> None:
        self.config, self.device = vllm_config, torch.empty(0, device=device).device  # cuda is cuda:0 from here on
        self.slots: list[int | None] = [None] * vllm_config.lora_config.max_loras
        self.kept: OrderedDict[int, Own | None] = OrderedDict()  # None: vLLM's stand-ins while it warms up
        self.pinned: set[int] = set()
        self.files: dict[str, DeltaFile] = {}
        self.routing = Routing(self.device)
        self.hooks: dict[str, RowLinear | RowEmbedding | RowNorm] = {}
        self.reserved: Tensor | None = None

    # ------------------------------------------------------------------------------------------- when vLLM starts

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Put the hooks behind the modules of `model`. Raises Unsupported for a configuration that cannot be served."""
        from vllm.distributed import tensor_model_parallel_all_gather
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from bayou.integrations.vllm import Settings

        refuse(vllm_config)
        settings = Settings.read(os.environ)
        model_config = vllm_config.model_config
        self.dtype: torch.dtype = model_config.dtype
        self.room = None if settings is None else settings.room(self.dtype)
        self.base = CheckedOnce(resolve(model_config.model, model_config.revision))
        self.places = Places(model, LinearBase, VocabParallelEmbedding)
        lines, kernels = len(self.slots), suits(torch.empty(0, dtype=self.dtype, device=self.device))
        for path, module in self.places.modules.items():
            head = path.rpartition(".")[2] == HEAD
            if path not in self.places.cuts:
                self.hooks[path] = RowNorm(self.routing, path, module, lines)
            elif isinstance(module, LinearBase) or head:
                cuts = self.places.cuts[path]
                gather = tensor_model_parallel_all_gather if path in self.places.split else None
                self.hooks[path] = RowLinear(self.routing, path, module, cuts, lines, kernels, gather)
            else:
                self.hooks[path] = RowEmbedding(self.routing, path)
            if head:
                self._behind_head(model, path)
            else:
                module.register_forward_hook(self.hooks[path])
        model.register_forward_hook(self.routing.heard)
        self._probe(model, vllm_config)
        self.places.keep(self.routing.called)
        _log.info(
            "bayou: packed deltas in %d slots behind %d modules, %s at most each; %s",
            *(lines, len(self.places.modules), "any size" if self.room is None else f"{self.room:,} bytes"),
            "kernels multiply by all slots at once" if kernels else "slots are multiplied one after another",
        )
        return model

    def _behind_head(self, model: nn.Module, path: str) -> None:
        """vLLM's heads are never called: the processor of scores beside them multiplies by their weight."""
        processor: Any = getattr(model.get_submodule(path.rpartition(".")[0]), "logits_processor", None)
        if processor is None:
            return  # which the probe will tell
        inner, hook = processor._apply_head, self.hooks[path]
        assert isinstance(hook, RowLinear)

        def applied(head: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
            scores = inner(head, x, bias)
            self.routing.called.add(path)
            hook.add(x, scores, self.routing.of_head(x))
            return scores

        processor._apply_head = applied

    def _probe(self, model: Any, vllm_config: Any) -> None:
        """Run the model once, as vLLM does to see what memory it takes: which modules are called, a row a token?"""
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context

        self.routing.probing = _PROBE
        ids = torch.zeros(_PROBE, dtype=torch.long, device=self.device)
        try:
            with (
                torch.inference_mode(),
                set_current_vllm_config(vllm_config),
                set_forward_context(None, vllm_config, num_tokens=_PROBE),
            ):
                hidden = model(input_ids=ids, positions=torch.arange(_PROBE, device=self.device))
                model.compute_logits(hidden)
        except Exception as error:  # a model may raise anything for a run that it is not made for
            raise Unsupported(
                f"BAYOU_MODE=packed cannot run {type(model).__name__} to see how it computes ({error!s:.200}); leave "
                "BAYOU_MODE out to serve LoRAs"
            ) from error
        self.routing.probing = 0
        if self.places.head is None or self.places.head.path not in self.routing.called:
            raise Unsupported(
                f"BAYOU_MODE=packed finds no head in {type(model).__name__} whose scores it could change; leave "
                "BAYOU_MODE out to serve LoRAs"
            )

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """While vLLM warms up and sees what memory is left: that of full slots is taken."""
        if self.room is not None and self.device.type != "cpu":
            self.reserved = torch.empty(self.room * len(self.slots), dtype=torch.uint8, device=self.device)
        yield
        self.reserved = None

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        """A stand-in, whose rows are the base's."""
        if lora_request.lora_int_id in self.kept:
            return False
        self.kept[lora_request.lora_int_id] = None
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Of a stand-in, which has none."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Deltas are of the language model."""
        return False

    # --------------------------------------------------------------------------------------------- while it runs

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """Begin a step. requests: the deltas in it. mapping: ids of its rows' and scores' deltas, 0 for the base."""
        wanted = {r.lora_int_id: r for r in sorted(requests, key=lambda r: r.lora_int_id)}
        if len(wanted) > len(self.slots):
            raise RuntimeError(f"bayou: {len(wanted)} deltas in a step that has {len(self.slots)} slots")
        for number, request in wanted.items():
            self._hold(request)
            self._place(number, set(wanted))
        if mapping is not None:
            slot = {number: index for index, number in enumerate(self.slots) if number is not None}
            lines = [[slot[i] if i > 0 else -1 for i in ids] for ids in (mapping.index_mapping, mapping.prompt_mapping)]
            self.routing.set(*lines)

    def add_adapter(self, request: Any) -> bool:
        """Read a delta that is not in memory. Raises BayouError, which vLLM answers the client with."""
        if request.load_inplace and request.lora_int_id in self.kept:
            own = self._read(request, again=True)
            self.remove_adapter(request.lora_int_id)
            self.kept[request.lora_int_id] = own
        else:
            self._hold(request, again=True)
        return True

    def _hold(self, request: Any, again: bool = False) -> None:
        number = request.lora_int_id
        if number not in self.kept:
            own = self._read(request, again)
            active = {each for each in self.slots if each is not None} | self.pinned
            idle = [each for each in self.kept if each not in active]
            if len(self.kept) >= self.config.lora_config.max_cpu_loras and idle:
                del self.kept[idle[0]]
            self.kept[number] = own
        self.kept.move_to_end(number)

    def _read(self, request: Any, again: bool) -> Own:
        """again: look at the path anew. Else, within a step, a name means what it has meant to vLLM before, also where
        the file was replaced by another: it was opened once, and stays open.
        """
        name: str = request.lora_path
        found = _PATH.fullmatch(os.path.expanduser(name))
        if found is None:
            raise BadInput(f"{name} is no .bayou file; vLLM serves nothing else with BAYOU_MODE=packed")
        path, root = found["path"], found["root"]
        file = self.files.get(name)
        if file is None or (again and root is None):
            root = root if file is None else file.root
            file = DeltaFile(path)
            if root is not None and file.root != root:
                raise BadFile(f"{path} is another file now; ask again, or load it from another path")
        check(file, self.base)
        needed = footprint(file, self.dtype)
        if self.room is not None and needed > self.room:
            raise BadInput(
                f"{path} takes {needed:,} bytes of memory, and BAYOU_DELTA_MEMORY leaves {self.room:,} to a delta; "
                "start vLLM with more"
            )
        own = self.places.read(file, self.dtype)
        self.files[name] = file
        _log.info("bayou: %s: %s bytes of %s (file %s)", request.lora_name, f"{own.nbytes:,}", path, file.root[:12])
        return own

    def _place(self, number: int, wanted: set[int]) -> None:
        """Give a delta a slot: a free one, else that of the longest unused."""
        if number in self.slots:
            return
        free = [index for index, held in enumerate(self.slots) if held is None]
        if not free:
            order = list(self.kept)
            unused = [each for each in self.slots if each is not None and each not in wanted | self.pinned]
            if not unused:
                raise RuntimeError(f"bayou: all {len(self.slots)} slots hold pinned deltas")
            free = [self.slots.index(min(unused, key=order.index))]
        self._write(free[0], self.kept[number])
        self.slots[free[0]] = number

    def _write(self, slot: int, own: Own | None) -> None:
        for hook in self.hooks.values():
            hook.write(slot, None)  # first, so that two deltas never take the memory of one slot
        if own is None:
            return
        placed = own.to(self.device)
        for path, hook in self.hooks.items():
            if isinstance(hook, RowNorm):
                hook.write(slot, placed.norms.get(path))
            else:
                hook.write(slot, placed.parts.get(path))

    def remove_adapter(self, number: int) -> bool:
        """Let a delta go."""
        self.pinned.discard(number)
        if number in self.slots:
            slot = self.slots.index(number)
            self.slots[slot] = None
            self._write(slot, None)
        return self.kept.pop(number, self) is not self

    def remove_all_adapters(self) -> None:
        """Let all go."""
        for number in list(self.kept):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Keep a delta in memory, and in its slot. Raises ValueError for one that is not there."""
        if number not in self.kept:
            raise ValueError(f"Pinning failed. LoRA {number} is not registered.")
        if len(self.pinned | {number}) >= len(self.slots):
            raise ValueError(f"one of the {len(self.slots)} slots must stay free of pinned deltas")
        self._place(number, {number})
        self.pinned.add(number)
        return True

    def list_adapters(self) -> set[int]:
        """The deltas in memory."""
        return set(self.kept)


def refuse(config: Any) -> None:
    """Raises Unsupported, naming the option, where vLLM would compute in a way that rows cannot be told apart in."""
    parallel, model = config.parallel_config, config.model_config
    found = {
        f"--pipeline-parallel-size {parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "two microbatches at once (--enable-dbo)": parallel.use_ubatching,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "speculative decoding": config.speculative_config is not None,
        f"--runner {model.runner_type}": model.runner_type != "generate",
        "a model of more than text": model.is_multimodal_model,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "compilation and CUDA graphs (give --enforce-eager)": not model.enforce_eager,
    }
    bad = [word for word, there in found.items() if there]
    if bad:
        raise Unsupported(
            f"BAYOU_MODE=packed is not done with {', '.join(bad)}; leave BAYOU_MODE out to serve LoRAs with it"
        )
