"""The training loop: objective, schedule, resuming, losses that are not numbers, several students, processes."""

import functools
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import pico
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bayou import objective, skeleton
from bayou.checkpoint import Checkpoint
from bayou.errors import BadInput, DamagedFile, Diverged, JournalMismatch, Unsupported
from bayou.sharing import Shared, Tie, lora
from bayou.sharing.student import Replacement, Student, apply, twin
from bayou.sharing.train import Fitted, Progress, Pupil, Recipe, fit, packed

WINDOWS = torch.randint(5, 100, (16, 16), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(batch=4, every=5, alpha=0.5, warmup=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico("llama_gqa", tmp_path_factory.mktemp("train") / "model", num_hidden_layers=4)


@pytest.fixture
def teacher(folder: Path) -> PreTrainedModel:
    return model_of(folder)


def model_of(folder: Path) -> PreTrainedModel:
    checkpoint = Checkpoint(folder)
    model = skeleton.build(folder)
    skeleton.fill(model, "", skeleton.places(model, checkpoint.names()), checkpoint.read)
    return model


def student_of(teacher: PreTrainedModel, *, seed: int = 0, rank: int = 0, pmr: bool = True) -> Student:
    ties = []
    for kind in ("gate_proj", "up_proj", "down_proj"):
        out, into = teacher.get_submodule(f"model.layers.2.mlp.{kind}").weight.shape
        g = torch.Generator().manual_seed(seed)
        name = f"model.layers.2.mlp.{kind}.weight"
        ties.append(
            Tie(name, name.replace(".2.", ".1."), 0.5, torch.zeros(out, 4), torch.randn(4, into, generator=g) * 0.1)
        )
    schedule = Replacement(seed=seed) if pmr else None
    return apply(twin(teacher), Shared(tuple(ties)), replacement=schedule, train_gain=True, lora_rank=rank)


def pupil_of(student: Student, name: str = "one", rate: float = 0.01) -> Pupil:
    return Pupil(name, student.model, tuple(student.parameters()), rate, student.advance)


def run(teacher: PreTrainedModel, recipe: Recipe = RECIPE, **options: object) -> tuple[Student, Fitted]:
    student = student_of(teacher)
    return student, fit([pupil_of(student)], teacher, WINDOWS, recipe, tokens=20 * 64, **options)  # type: ignore[arg-type]


def same(a: Student, b: Student) -> bool:
    return all(
        torch.equal(x.u, y.u) and torch.equal(x.v, y.v) and x.gain == y.gain
        for x, y in zip(a.factors(), b.factors(), strict=True)
    )


def test_the_loss_is_what_the_formula_says_and_so_are_its_gradients(teacher: PreTrainedModel) -> None:
    student = student_of(teacher, pmr=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    ids = WINDOWS[:3]
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)
    found = student.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    ce = functional.cross_entropy(found, ids[:, 1:].flatten())
    p = wanted.softmax(-1)
    kl = (p * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    (0.7 * ce + 0.3 * kl).backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.grad = None
    taught = objective.Taught(teacher, ids, chunk=7, keep=True)
    got = objective.loss(
        student.model,
        ids,
        alpha=0.3,
        taught=taught,
        chunk=7,
        weight=1.0,
    )
    assert torch.allclose(got.ce, ce, atol=1e-5) and torch.allclose(got.kl, kl, atol=1e-5)
    assert torch.allclose(got.total, 0.7 * ce + 0.3 * kl, atol=1e-5)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert torch.equal(taught.logits(0), wanted[:7]) and taught.logits(0) is taught.logits(0)
    assert objective.measure(student.model, ids)[1] == 0
    ce2, kl2 = objective.measure(student.model, ids, teacher, batch=2)
    assert math.isclose(ce2, ce.item(), abs_tol=1e-5) and math.isclose(kl2, kl.item(), abs_tol=1e-5)
    assert objective.measure(teacher, ids, teacher)[1] == pytest.approx(0, abs=1e-6)


def test_a_trained_head_gets_its_gradient(teacher: PreTrainedModel) -> None:
    model = twin(teacher)
    model.lm_head.weight = nn.Parameter(teacher.lm_head.weight.detach().clone())
    ids = WINDOWS[:2]
    functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    wanted = model.lm_head.weight.grad
    model.lm_head.weight.grad = None
    objective.loss(model, ids, alpha=0.0, chunk=5, weight=1.0)
    assert wanted is not None and torch.allclose(model.lm_head.weight.grad, wanted, atol=1e-6)


def test_training_lowers_the_loss_and_touches_nothing_else(teacher: PreTrainedModel) -> None:
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    steps: list[Progress] = []
    student, fitted = run(teacher, replace(RECIPE, alpha=1.0), progress=steps.append)
    curve = fitted.outcomes[0].curve
    assert fitted.finished and fitted.steps == len(curve) == len(steps) == 20
    assert [point[3] for point in curve[16:]] == [1.0] * 4  # the final phase
    full = student_of(teacher, pmr=False)
    start = objective.measure(full.model, WINDOWS, teacher)
    end = objective.measure(student.model, WINDOWS, teacher)
    assert end[1] < 0.95 * start[1]
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert steps[-1].tokens == fitted.tokens == 20 * 64


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    recipe = Recipe(warmup=0.1, floor=0.1)
    factors = [recipe.factor(step, 100) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55) and 0.1 < factors[99] < 0.101
    assert Recipe(warmup=0).factor(0, 1) == 1.0


def test_cutting_a_batch_into_forwards_changes_nothing_but_the_draws(teacher: PreTrainedModel) -> None:
    results = []
    for micro in (None, 2):
        student = student_of(teacher, pmr=False)
        fit([pupil_of(student)], teacher, WINDOWS, replace(RECIPE, micro=micro), tokens=5 * 64)
        results.append(student.factors())
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.u, b.u, atol=1e-4) and torch.allclose(a.v, b.v, atol=1e-4)


def test_students_trained_together_learn_what_each_learns_alone(teacher: PreTrainedModel) -> None:
    alone = []
    for seed in (0, 1):
        student = student_of(teacher, seed=seed)
        fit([pupil_of(student, rate=0.01 * (seed + 1))], teacher, WINDOWS, RECIPE, tokens=6 * 64)
        alone.append(student)
    together = [student_of(teacher, seed=seed) for seed in (0, 1)]
    pupils = [pupil_of(s, str(i), 0.01 * (i + 1)) for i, s in enumerate(together)]
    fitted = fit(pupils, teacher, WINDOWS, RECIPE, tokens=6 * 64)
    assert [outcome.name for outcome in fitted.outcomes] == ["0", "1"]
    assert same(alone[0], together[0]) and same(alone[1], together[1]) and not same(*together)


def test_each_parameter_has_its_multiple_of_the_rate(teacher: PreTrainedModel) -> None:
    students = [student_of(teacher, rank=2) for _ in range(3)]
    pupils = [replace(pupil_of(s), multiples=s.multiples(x)) for s, x in zip(students, (1, 0, 5), strict=True)]
    plain = student_of(teacher, rank=2)
    for pupil in [*pupils, pupil_of(plain)]:
        fit([pupil], teacher, WINDOWS, RECIPE, tokens=5 * 64)
    first, still, fast = ([m.b for _, m in lora.inside(student.model)] for student in students)
    assert same(students[0], plain)
    assert all(not b.any() for b in still) and all(b.any() for b in first)
    assert all(b.norm() > 2 * a.norm() for a, b in zip(first, fast, strict=True))


def test_lora_is_trained_with_the_deltas(teacher: PreTrainedModel) -> None:
    student = student_of(teacher, rank=2)
    fit([pupil_of(student)], teacher, WINDOWS, RECIPE, tokens=10 * 64)
    trained = objective.measure(student.model, WINDOWS, teacher)
    student.finish()
    assert objective.measure(student.model, WINDOWS, teacher) == pytest.approx(trained, abs=1e-4)
    assert objective.measure(teacher, WINDOWS, teacher)[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("after", [1, 7, 19])
def test_a_stopped_run_goes_on_to_the_same_result(teacher: PreTrainedModel, tmp_path: Path, after: int) -> None:
    whole, fitted = run(teacher)
    path = tmp_path / "deep" / "checkpoint"

    def stop(progress: Progress) -> None:
        if progress.step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(teacher, checkpoint=path, progress=stop)
    assert path.exists() == (after >= 5)
    again, found = run(teacher, checkpoint=path)
    assert same(whole, again) and found.outcomes == fitted.outcomes
    once_more, found = run(teacher, checkpoint=path)  # it was done: nothing happens
    assert same(whole, once_more) and found.outcomes == fitted.outcomes


def test_a_time_limit_ends_a_run_in_between(teacher: PreTrainedModel, tmp_path: Path) -> None:
    whole, fitted = run(teacher)
    for turn in range(30):
        student, found = run(teacher, checkpoint=tmp_path / "c", stop_after=0.0)
        assert found.steps == min(20, turn + 1)
        if found.finished:
            break
    assert found.finished and same(whole, student) and found.outcomes == fitted.outcomes


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_result(teacher: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    whole, fitted = run(teacher)
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import test_train
        test_train.run(test_train.model_of(Path(sys.argv[1])), checkpoint=Path(sys.argv[2]),
                       progress=lambda p: (print(p.step, flush=True), __import__("time").sleep(0.05)))
    """)
    path = tmp_path / "checkpoint"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    command = [sys.executable, "-c", script, str(folder), str(path)]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -9 and path.exists()
    again, found = run(teacher, checkpoint=path)
    assert same(whole, again) and found.outcomes == fitted.outcomes


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(teacher: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "c"
    run(teacher, checkpoint=path)
    with pytest.raises(JournalMismatch, match="other students, data or recipe"):
        run(teacher, replace(RECIPE, alpha=0.9), checkpoint=path)
    run(teacher, replace(RECIPE, every=3, chunk=11), checkpoint=path)  # these do not matter
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedFile, match="not a training checkpoint"):
        run(teacher, checkpoint=path)


class _Poison:
    """Makes a student's loss NaN at the given calls."""

    def __init__(self, student: Student, calls: set[int]) -> None:
        self.count, self.calls = 0, calls
        student.model.lm_head.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.count += 1
        return output * float("nan") if self.count in self.calls else output


def test_a_nan_sends_the_run_back_to_the_checkpoint_with_a_smaller_step(
    teacher: PreTrainedModel, tmp_path: Path
) -> None:
    student, other = student_of(teacher), student_of(teacher, seed=1)
    _Poison(student, {8, 13})
    pupils = [pupil_of(student), pupil_of(other, "other", 0.02)]
    fitted = fit(pupils, teacher, WINDOWS, RECIPE, tokens=20 * 64, checkpoint=tmp_path / "c")
    one, two = fitted.outcomes
    assert one.returns == 2 and one.failed is None and one.rate == pytest.approx(0.01 * 0.09)
    assert len(one.curve) == len(two.curve) == 20 and two.rate == 0.02
    assert all(math.isfinite(point[0]) for point in one.curve)
    alone = student_of(teacher, seed=1)
    fit([pupil_of(alone, "other", 0.02)], teacher, WINDOWS, RECIPE, tokens=20 * 64)
    assert same(alone, other)


def test_a_third_nan_is_the_end_of_that_student_only(teacher: PreTrainedModel) -> None:
    student, other = student_of(teacher), student_of(teacher, seed=1)
    _Poison(student, set(range(3, 100)))
    fitted = fit([pupil_of(student), pupil_of(other, "other")], teacher, WINDOWS, RECIPE, tokens=6 * 64)
    assert fitted.outcomes[0].failed is not None and "take a lower learning rate" in fitted.outcomes[0].failed
    assert fitted.outcomes[1].failed is None and len(fitted.outcomes[1].curve) == 6
    broken = student_of(teacher)
    _Poison(broken, set(range(1, 100)))
    with pytest.raises(Diverged, match="step 1, again after 2 returns"):
        fit([pupil_of(broken)], teacher, WINDOWS, RECIPE, tokens=6 * 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, as it traces
def test_compiled_norms_and_loss_change_nothing(teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(teacher)
    objective._compiled_rows.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traced, not built
    compiled, fitted = run(teacher, replace(RECIPE, compile=True))
    objective._compiled_rows.cache_clear()
    assert len(fitted.outcomes[0].curve) == 20
    for a, b in zip(whole.factors(), compiled.factors(), strict=True):
        assert torch.allclose(a.u, b.u, atol=1e-4) and torch.allclose(a.v, b.v, atol=1e-4)


def test_what_cannot_be_trained_is_refused(teacher: PreTrainedModel) -> None:
    student = student_of(teacher)
    for recipe, windows, pupils, message in (
        (replace(RECIPE, batch=5, micro=2), WINDOWS, [pupil_of(student)], "no multiple"),
        (RECIPE, WINDOWS[:0], [pupil_of(student)], "must be"),
        (RECIPE, WINDOWS, [], "nothing to train"),
        (RECIPE, WINDOWS, [Pupil("x", teacher, (), 0.1)], "nothing to train"),
    ):
        with pytest.raises(BadInput, match=message):
            fit(pupils, teacher, windows, recipe)
    with pytest.raises(BadInput, match="needs a teacher"):
        fit([pupil_of(student)], None, WINDOWS, RECIPE)
    with pytest.raises(BadInput, match="get_decoder"):
        objective.hidden_states(nn.Linear(2, 2), WINDOWS)
    teacher.config.logit_scale = 0.5
    with pytest.raises(Unsupported, match="logit_scale"):
        objective.head(teacher)


def test_without_a_teacher_only_the_text_counts(teacher: PreTrainedModel) -> None:
    student = student_of(teacher)
    fitted = fit([pupil_of(student)], None, WINDOWS, replace(RECIPE, alpha=0.0), tokens=3 * 64)
    assert all(loss == ce and kl == 0 for loss, ce, kl, _ in fitted.outcomes[0].curve)


def test_tokens_are_packed_into_windows() -> None:
    assert packed(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(BadInput, match="do not fill"):
        packed(torch.arange(3), 4)


def test_a_soft_cap_is_part_of_the_head(tmp_path: Path) -> None:
    model = model_of(pico("gemma3", tmp_path / "m", final_logit_softcapping=2.0))
    ids = WINDOWS[:2]
    with torch.no_grad():
        found = objective.head(model)(objective.hidden_states(model, ids))
        assert torch.allclose(found, model(input_ids=ids).logits, atol=1e-5) and found.abs().max() <= 2


@pytest.mark.slow
def test_several_processes_share_out_the_batch(teacher: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole = student_of(teacher, pmr=True)
    fit([pupil_of(whole)], teacher, WINDOWS, RECIPE, tokens=5 * 64)
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import test_train
        teacher = test_train.model_of(Path(sys.argv[1]))
        student = test_train.student_of(teacher)
        test_train.fit([test_train.pupil_of(student)], teacher, test_train.WINDOWS, test_train.RECIPE, tokens=5 * 64,
                       checkpoint=Path(sys.argv[2]))
    """)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    children = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29713",
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / "c")]
        children.append(subprocess.Popen(command, env=environment))
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    again = student_of(teacher, pmr=True)
    fit([pupil_of(again)], teacher, WINDOWS, replace(RECIPE, micro=4), tokens=5 * 64, checkpoint=tmp_path / "c")
    for a, b in zip(whole.factors(), again.factors(), strict=True):
        assert torch.allclose(a.u, b.u, atol=1e-4)
