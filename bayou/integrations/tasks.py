"""`bayou eval --tasks`: a model on tasks of lm-evaluation-harness, with the fine-tune beside it where there is one."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from bayou.calibrate import read_tokenizer
from bayou.checkpoint import resolve
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.evaluate import read_model
from bayou.load import load
from bayou.sharing.baselines.slicegpt import is_sliced


def evaluate_tasks(
    base: str | Path | None,
    file: str | Path,
    tasks: Sequence[str],
    *,
    finetuned: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 16,
    chat: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a model in fp32, and on the fine-tune that it stands for.

    Args:
        base, file: as for `bayou.load`; the file may also be an ordinary model folder.
        tasks: names of tasks, groups or tags. include_path: a folder of YAML files with more of them; they may load
            local data sets, and run the Python that they name. A built-in task's data come from the Hub.
        finetuned: folder or Hub id; left out, only the file is scored.
        limit: documents of each task, the first ones; None is all. shots: examples before each; None is the task's own.
        batch: rows at a time. chat: put prompts through the tokenizer's chat template.

    Returns:
        tasks: name -> metric -> value, se (its standard error, None where the task has none), and with a fine-tune
        reference, reference_se; a metric of a filter other than "none" is "metric,filter". documents: name -> scored.
        limit, shots, chat: what was asked. harness: its version.

    Raises:
        BadInput where lm-eval is not installed, a task is not known or cannot be run; and as `bayou.load`.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        from bayou.integrations.lm_eval import Bayou
    except ImportError as error:
        raise BadInput(f"--tasks needs lm-evaluation-harness ({error}): pip install 'bayou[eval]'") from None
    if not tasks or (limit is not None and limit < 1):
        raise BadInput(f"--tasks {','.join(tasks)} --limit {limit}: name a task, and 1 document at least")
    if include_path is not None and not Path(include_path).is_dir():
        raise BadInput(f"--include-path {include_path} is not a folder of task files")
    with _quiet():
        manager = _manager(tasks, include_path)
        if unknown := [name for name in tasks if not manager.match_tasks([name])]:
            raise BadInput(f"lm-eval {lm_eval.__version__} knows no task {', '.join(unknown)}; `lm-eval ls tasks`")

        def scored(model: Any) -> dict[str, Any]:
            try:
                return lm_eval.simple_evaluate(
                    model,
                    tasks=list(tasks),
                    num_fewshot=shots,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    apply_chat_template=chat,
                )
            except (ValueError, OSError) as error:
                raise BadInput(f"--tasks {','.join(tasks)}: {str(error)[:500]}") from error

        def plain(model: PreTrainedModel, folder: Path) -> Any:
            tokenizer = read_tokenizer(folder)
            return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)

        path = Path(file)
        if path.is_dir():
            model = load(path, device=device) if is_sliced(path) else read_model(path, device)
            ours = scored(plain(model, path))
            del model
        else:
            lender = None if base is None or DeltaFile(path).self_contained else str(base)
            ours = scored(Bayou(lender, str(path), device=device, batch_size=batch))
        reference = None
        if finetuned is not None:
            folder = resolve(finetuned)
            reference = scored(plain(read_model(folder, device), folder))
    found = {name: _metrics(one) for name, one in ours["results"].items()}
    if reference is not None:
        for name, one in reference["results"].items():
            for metric, values in _metrics(one).items():
                found[name][metric] |= {"reference": values["value"], "reference_se": values["se"]}
    documents = {name: count["effective"] for name, count in ours["n-samples"].items()}
    asked = {"limit": limit, "shots": shots, "chat": chat}
    return {"tasks": found, "documents": documents, **asked, "harness": lm_eval.__version__}


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Where the harness looks for tasks; the 15,000 files of its own are read only where they may be wanted."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    return own if set(tasks) <= set(own.all_subtasks) else TaskManager(include_path=str(include_path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of whatever model it has not loaded itself."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {"value": .5, "se": .01}} of {"alias": ..., "acc,none": .5, "acc_stderr,none": .01}."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = result.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            found[name] = {"value": value, "se": error if isinstance(error, int | float) else None}
    return found


def table(found: dict[str, Any]) -> Table:
    """`evaluate_tasks`'s answer for people."""
    shown = Table(title=f"lm-evaluation-harness {found['harness']}")
    compared = any("reference" in values for metrics in found["tasks"].values() for values in metrics.values())
    shown.add_column("task")
    shown.add_column("metric")
    for heading in ("documents", *(["fine-tune"] if compared else []), "candidate"):
        shown.add_column(heading, justify="right")

    def figure(value: float, error: float | None) -> str:
        return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    for name, metrics in found["tasks"].items():
        for metric, values in metrics.items():
            cells = [figure(values["reference"], values["reference_se"])] if "reference" in values else []
            shown.add_row(
                name, metric, str(found["documents"].get(name, "")), *cells, figure(values["value"], values["se"])
            )
    return shown
