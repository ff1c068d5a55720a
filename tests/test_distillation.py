"""Distilling: the KL to the fine-tune falls, the codes and the size stay, and what does not help is not kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

import bayou
from bayou import cli, distillation, objective, skeleton
from bayou.attach import load
from bayou.checkpoint import Checkpoint
from bayou.delta import Delta, Dense, LowRank
from bayou.deltafile import DeltaFile
from bayou.distillation import asked, samples, training
from bayou.distillation.student import Student, TrainedDelta
from bayou.distillation.training import Recipe
from bayou.distillation.values import Values
from bayou.errors import BadInput, Unsupported
from bayou.evaluate import read_model
from bayou.methods import lowrank
from bayou.packed import Packed, Spec

TEXT = torch.randint(5, pico.VOCAB, (24, 32), generator=torch.Generator().manual_seed(3))
UNSEEN = torch.randint(5, pico.VOCAB, (16, 32), generator=torch.Generator().manual_seed(4))
FEW: dict[str, Any] = {"ratio": 6, "calibration": TEXT}


def kl(base: Path, tuned: Path, file: Path, text: Tensor = UNSEEN) -> float:
    return objective.measure(load(base, file), text, read_model(tuned))[1]


def codes(file: Path) -> dict[str, list[Tensor]]:
    """The planes and zero points of all matrices, by site."""
    opened = DeltaFile(file)
    packed = {name: [p for term in opened.delta(name).terms for p in term.factors()] for name in opened.sites}
    return {name: [p.parts[i] for p in every for i in range(len(p.parts)) if p.parts[i].dtype == torch.int32]
            for name, every in packed.items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "gemma3", "gpt2", "qwen2", "mixtral"])
def test_the_kl_falls_on_text_that_training_has_not_seen(tmp_path: Path, kind: str) -> None:
    base = pico.pico(kind, tmp_path / "base")
    tuned = pico.perturb(base, tmp_path / "tuned", scale=0.1)
    options = FEW | {"ratio": 3 if kind == "gpt2" else 6}  # a gpt2 of 128 words is mostly its positions
    plain = bayou.compress(base, tuned, tmp_path / "plain", **options)
    report = bayou.compress(base, tuned, tmp_path / "a", **options, distill_steps=60)
    told = report.distilled
    assert told["kept"] and told["steps"] == 60 and told["held"] == 2 and told["text"] == "given"
    assert told["after"] < (0.99 if kind == "mixtral" else 0.9) * told["before"]  # experts keep their values
    assert plain.distilled == {} and report.bytes == plain.bytes
    before, after = kl(base, tuned, tmp_path / "plain"), kl(base, tuned, tmp_path / "a")
    assert after < (0.99 if kind == "mixtral" else 0.9) * before
    old, new = codes(tmp_path / "plain"), codes(tmp_path / "a")
    assert all(torch.equal(a, b) for name in old for a, b in zip(old[name], new[name], strict=True))
    assert DeltaFile(tmp_path / "a").verify()


def test_what_the_report_says_is_so_of_the_file(base: Path, tuned: Path, tmp_path: Path) -> None:
    """The numbers are rounded to what the file stores before the KL is measured."""
    told = bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=30).distilled
    bayou.compress(base, tuned, tmp_path / "plain", **FEW)
    order = torch.randperm(len(TEXT), generator=torch.Generator().manual_seed(0))
    held = TEXT[order[: told["held"]]]
    assert kl(base, tuned, tmp_path / "plain", held) == pytest.approx(told["before"], rel=1e-3)
    assert kl(base, tuned, tmp_path / "a", held) == pytest.approx(told["after"], rel=1e-3)
    assert told["curve"][0] == (0, told["before"]) and min(value for _, value in told["curve"]) == told["after"]


def test_what_is_trained_never_goes_through_the_kernels(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they would suit; they know nothing of gradients."""
    monkeypatch.setattr("bayou.attached.suits", lambda _: True)
    monkeypatch.setattr("bayou.attached.one_delta", lambda *_, **__: pytest.fail("a kernel was asked for"))
    assert bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=3).distilled["steps"] == 3


def test_norms_are_trained_and_keep_their_dtype(base: Path, tuned: Path, tmp_path: Path) -> None:
    bayou.compress(base, tuned, tmp_path / "plain", **FEW)
    bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=40)
    old, new = DeltaFile(tmp_path / "plain"), DeltaFile(tmp_path / "a")
    assert old.exact == new.exact and any("norm" in name for name in old.exact)
    moved = [name for name in old.exact if not torch.equal(old.read_exact(name), new.read_exact(name))]
    assert any("norm" in name for name in moved)
    assert all(old.exact_dtype(name) == new.exact_dtype(name) for name in old.exact)
    before = Checkpoint(tuned)
    worst = max(((new.read_exact(n) - before.read(n)).abs().max() / before.read(n).abs().max()).item() for n in moved)
    assert worst < 0.1


@pytest.mark.parametrize("method", ["lowrank", "bitdelta"])
@pytest.mark.parametrize("calibration", [None, "none"])
def test_without_a_text_the_fine_tune_writes_its_own(
    base: Path, tuned: Path, tmp_path: Path, method: str, calibration: str | None
) -> None:
    options: dict[str, Any] = {"method": method, "ratio": 4, "calibration": calibration}
    seen: list[str] = []
    report = bayou.compress(
        base, tuned, tmp_path / "a", **options, distill_steps=30, progress=lambda step, *_: seen.append(step)
    )
    assert report.distilled["text"] == "the fine-tune's own" and "sample" in seen
    assert report.distilled["after"] < 0.95 * report.distilled["before"]
    bayou.compress(base, tuned, tmp_path / "b", **options, distill_steps=30)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    bayou.compress(base, tuned, tmp_path / "c", **options, distill_steps=30, seed=1)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_samples_are_seeded_and_begin_anew_after_an_end(tuned: Path) -> None:
    model = read_model(tuned)
    first = samples.windows(model, 6, 40, batch=4, seed=0)
    assert first.shape == (6, 40) and torch.equal(first, samples.windows(model, 6, 40, batch=4, seed=0))
    assert not torch.equal(first, samples.windows(model, 6, 40, batch=4, seed=1))
    assert first[[0, 2, 4], 0].tolist() == [1, 1, 1]  # bos
    model.config.eos_token_id = list(range(pico.VOCAB))  # every token ends a text: the window's first comes again
    again = samples.windows(model, 2, 5, batch=2, seed=0)
    assert torch.equal(again, again[:, :1].expand(2, 5))


def test_a_model_without_a_cache_samples_the_same(tuned: Path) -> None:
    model = read_model(tuned)
    wanted = samples.windows(model, 4, 12, batch=4, seed=0)
    plain = model.forward
    model.forward = lambda **given: plain(**given | {"use_cache": False})
    assert torch.equal(samples.windows(model, 4, 12, batch=4, seed=0), wanted)


def test_samples_follow_the_model_s_own_probabilities(tuned: Path) -> None:
    """Of many windows from bos, the second tokens are as frequent as the model says (total variation)."""
    model = read_model(tuned)
    found = samples.windows(model, 8000, 2, batch=2000, seed=0)[::2, 1]
    wanted = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
    share = found.bincount(minlength=pico.VOCAB) / len(found)
    assert (share - wanted).abs().sum() / 2 < 0.1 < (share - 1 / pico.VOCAB).abs().sum() / 2


def test_what_does_not_help_leaves_the_file_as_it_was(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(training, "RATES", dict.fromkeys(training.RATES, 10.0))
    plain = bayou.compress(base, tuned, tmp_path / "plain", **FEW)
    report = bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=5)
    told = report.distilled
    assert not told["kept"] and told["best"] == 0 and told["after"] == told["before"]
    assert told["curve"][-1][1] > told["before"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "plain").read_bytes() and report.errors == plain.errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_never_kept(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any, bad: float
) -> None:
    monkeypatch.setattr(training, "RATES", dict.fromkeys(training.RATES, bad))
    bayou.compress(base, tuned, tmp_path / "plain", **FEW)
    assert not bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=3).distilled["kept"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "plain").read_bytes()


class Clock:
    """Time that only steps (1 s, or `later` from the tenth on) and measurements (2 s) take."""

    def __init__(self, monkeypatch: Any, later: float = 1.0) -> None:
        self.now, self.later, self.done = 0.0, later, 0
        for module in (training, asked):
            monkeypatch.setattr(module, "time", self)
        for name in ("_gradients", "_measure"):
            monkeypatch.setattr(training._Run, name, self._taking(getattr(training._Run, name), name))

    def monotonic(self) -> float:
        return self.now

    def _taking(self, real: Any, name: str) -> Any:
        def taken(run: Any, *arguments: Any) -> Any:
            self.done += name == "_gradients"
            self.now += 2.0 if name == "_measure" else 1.0 if self.done < 10 else self.later
            return real(run, *arguments)

        return taken


def test_minutes_are_a_limit(base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As many steps are taken as fit, and the same number of steps asked for gives the same bytes."""
    with monkeypatch.context() as patch:
        Clock(patch)
        told = bayou.compress(base, tuned, tmp_path / "a", **FEW, distill=1).distilled
        assert 52 < told["seconds"] <= 60 and 44 < told["steps"] == told["curve"][-1][0]
        assert told["tokens"] == told["steps"] * 4 * 32
        none = bayou.compress(base, tuned, tmp_path / "c", **FEW, distill=0.05).distilled
        assert none["steps"] == 0 and not none["kept"] and none["seconds"] == 3
    bayou.compress(base, tuned, tmp_path / "b", **FEW, distill_steps=told["steps"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_machine_that_becomes_slower_stops_at_the_limit(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    Clock(monkeypatch, later=3.0)
    told = bayou.compress(base, tuned, tmp_path / "a", **FEW, distill=1).distilled
    assert 10 < told["steps"] < 30 and 50 < told["seconds"] <= 62
    assert told["kept"] and told["after"] < told["before"]


def test_an_interruption_loses_only_the_distilling(base: Path, tuned: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = FEW | {"distill_steps": 6}
    bayou.compress(base, tuned, tmp_path / "whole", **options)

    def stop(step: str, done: int, total: int) -> None:
        if step == "distil" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bayou.compress(base, tuned, tmp_path / "a", **options, progress=stop)
    held = sorted(path.name for path in (tmp_path / "a.journal").iterdir())
    assert "draft.bayou" not in held and not (tmp_path / "a").exists()
    encoded: list[str] = []
    bayou.compress(base, tuned, tmp_path / "a", **options, progress=lambda step, *_: encoded.append(step))
    assert "layers" not in encoded and (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "a.journal").exists()


def test_coded_terms_are_distilled_as_well(base: Path, tuned: Path, tmp_path: Path) -> None:
    bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=5)
    bayou.compress(base, tuned, tmp_path / "b", **FEW, distill_steps=5, entropy=True)
    one, two = DeltaFile(tmp_path / "a"), DeltaFile(tmp_path / "b")
    assert any(site.coded for site in two.sites.values())
    for name in one.sites:
        assert torch.equal(one.delta(name).materialize(), two.delta(name).materialize())


def test_a_grown_vocabulary_and_an_untied_head(tmp_path: Path) -> None:
    base = pico.pico("llama_tied", tmp_path / "base")
    tuned = pico.perturb(base, tmp_path / "tuned", scale=0.1, grow_vocab=3, untie=True)
    bayou.compress(base, tuned, tmp_path / "plain", **FEW)
    told = bayou.compress(base, tuned, tmp_path / "a", **FEW, distill_steps=40).distilled
    assert told["kept"] and kl(base, tuned, tmp_path / "a") < 0.95 * kl(base, tuned, tmp_path / "plain")
    old, new = DeltaFile(tmp_path / "plain"), DeltaFile(tmp_path / "a")
    heads = ["lm_head.weight", "model.embed_tokens.weight"]
    assert all(not torch.equal(old.delta(n).materialize(), new.delta(n).materialize()) for n in heads)


# ------------------------------------------------------------------------------------------ the numbers


def a_lowrank(spec_u: str, spec_v: str) -> LowRank:
    """(40, 50) of ranks 2 + 9, in floats and in codes."""
    draw = torch.Generator().manual_seed(0)

    def packed(rows: int, cols: int, word: str) -> Packed:
        spec = Spec.parse(word)
        if spec.floats:
            return Packed.floats(torch.randn(rows, cols, generator=draw), word)
        groups = spec.groups(cols)
        made = torch.randint(2**spec.bits, (rows, cols), generator=draw, dtype=torch.uint8)
        scales = torch.rand(rows, groups, generator=draw) + 0.5 if groups else None
        zeros = torch.randint(2**spec.bits, (rows, groups), generator=draw, dtype=torch.uint8)
        return Packed.codes(made, spec, scales, zeros if spec.zeros else None)

    blocks = ((packed(40, 2, "f16"), packed(2, 50, "8g16z")), (packed(40, 9, spec_u), packed(9, 50, spec_v)))
    scale = torch.rand(40, generator=draw).half() + 0.5
    return LowRank(blocks, 0.75, output_scale=scale, input_scale=torch.rand(50, generator=draw).half() + 0.5)


@pytest.mark.parametrize(
    ("spec_u", "spec_v"), [("3g4z", "2g16"), ("2r", "8g16"), ("f16", "f16"), ("5g128", "bf16"), ("1", "4")]
)
def test_a_trained_delta_computes_what_the_delta_does_and_stores_it(spec_u: str, spec_v: str) -> None:
    dense = Dense(a_lowrank("3g4z", "2g16").blocks[1][1], 1.5)  # (9, 50)
    for delta in (Delta((40, 50), (a_lowrank(spec_u, spec_v),)), Delta((9, 50), (dense, dense), gain=2.0)):
        trained = TrainedDelta(delta, torch.float32)
        Values(list(trained.pieces()), torch.float32)
        x, ids = torch.randn(3, 50), torch.tensor([[0, 3], [8, 3]])
        torch.testing.assert_close(trained.apply(x), delta.apply(x), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(trained.lookup(ids), delta.lookup(ids), rtol=1e-4, atol=1e-3)
        again = Delta(delta.shape, trained.stored())
        assert torch.equal(again.materialize(), delta.materialize())
        old, new = ([p for t in d.terms for f in t.factors() for p in f.parts] for d in (delta, again))
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_a_step_s_gradient_is_that_of_the_stored_number() -> None:
    """Against differences of the loss, where a stored number is moved by hand."""
    delta = Delta((40, 50), (a_lowrank("3g4z", "2g16"),))
    trained = TrainedDelta(delta, torch.float32)
    values = Values(list(trained.pieces()), torch.float32)
    x, w = torch.randn(64, 50, dtype=torch.float64).float(), torch.randn(64, 40)
    (trained.apply(x) * w).sum().backward()
    values.collect()
    for kind, step in values.parameters():
        assert step.grad is not None and step.grad.abs().sum() > 0, kind
        for at in (0, len(step) - 1):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    step[at] += sign * 0.05
                values.make()
                ends.append((trained.apply(x) * w).sum().item())
                with torch.no_grad():
                    step[at] -= sign * 0.05
            assert (ends[0] - ends[1]) / 0.1 == pytest.approx(step.grad[at].item(), rel=0.03, abs=0.5)


def test_a_tied_head_and_its_embedding_train_one_set_of_numbers(tmp_path: Path) -> None:
    base = pico.pico("llama_tied", tmp_path / "base")
    tuned = pico.perturb(base, tmp_path / "tuned")
    bayou.compress(base, tuned, tmp_path / "a", ratio=6, calibration="none")
    file, teacher = DeltaFile(tmp_path / "a"), skeleton.build(tuned)
    places = skeleton.places(teacher, file.tensors())
    student = Student(base, file, places, dtype=torch.float32, device=torch.device("cpu"))
    head, table = student.model.get_output_embeddings(), student.model.get_input_embeddings()
    assert isinstance(head.delta, TrainedDelta) and head.delta is table.delta
    leaf = next(head.delta.pieces()).leaf
    gradients = []
    for use in (lambda: head(torch.ones(1, 64)).sum(), lambda: table(torch.tensor([[5]])).sum()):
        leaf.grad.zero_()
        use().backward()
        gradients.append(leaf.grad.clone())
    leaf.grad.zero_()
    (head(torch.ones(1, 64)).sum() + table(torch.tensor([[5]])).sum()).backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    torch.testing.assert_close(leaf.grad, gradients[0] + gradients[1])


def test_in_bf16_gains_stay_fp32() -> None:
    """As a large model is trained on a GPU: a gain's step of .001 would be lost in bf16."""
    delta = Delta((40, 50), (replace(a_lowrank("3g4z", "2g16"), output_scale=None, input_scale=None),))
    trained = TrainedDelta(delta, torch.bfloat16)
    values = Values(list(trained.pieces()), torch.bfloat16)
    kinds = {kind: step for kind, step in values.parameters() if kind == "gains"}
    with torch.no_grad():
        kinds["gains"] += 0.001
    values.make()
    assert trained.stored()[0].gain == pytest.approx(0.75 * 1.001, abs=1e-6)
    dtypes = {piece.kind: piece.leaf.dtype for piece in trained.pieces()}
    assert dtypes == {"floats": torch.bfloat16, "scales": torch.bfloat16, "gains": torch.float32}


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": 1, "distill_steps": 5}, r"give --distill \(1 minutes\) or --distill-steps \(5\), not both"),
        ({"distill": -1}, "--distill -1: minutes of 0 or more"),
        ({"distill": float("nan")}, "--distill nan: minutes of 0 or more"),
        ({"distill": 1, "distill_what": "gains"}, "gains are fitted in steps, --distill-steps 200"),
        ({"distill_steps": -1}, "--distill-steps -1: a number of 0 or more"),
        ({"distill_what": "gains"}, "--distill-what gains needs --distill-steps"),
        ({"distill_what": "norms"}, "--distill-what norms: choose all or gains"),
        ({"distill_steps": 5, "calibration": TEXT[:1]}, "too little text to distil on"),
        ({"distill": 1, "method": "exact"}, "--method exact has nothing to distil"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_the_work(
    base: Path, tuned: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        bayou.compress(base, tuned, tmp_path / "a", **({"calibration": "none", "ratio": 1} | options))
    assert list(tmp_path.iterdir()) == []


def test_logits_of_an_unknown_kind_are_refused_before_the_work(base: Path, tuned: Path, tmp_path: Path) -> None:
    model = skeleton.build(tuned)
    model.config.logit_scale = 0.5
    wanted = distillation.ask(lowrank, 5.0, None, "all", 0)
    with pytest.raises(Unsupported, match="multiplies its logits by logit_scale"):
        wanted.suits(model)
    distillation.ask(lowrank, None, None, "all", 0).suits(model)


@pytest.mark.parametrize("steps", [0, 3])
def test_the_command_tells_what_came_of_it(base: Path, tuned: Path, tmp_path: Path, capsys: Any, steps: int) -> None:
    words = ["compress", str(base), str(tuned), "-o", str(tmp_path / "a"), "--ratio", "6", "--calibration", "none"]
    with pytest.raises(SystemExit):
        cli.main([*words, *(["--distill-steps", "3"] if steps else ["--distill", "0.0001"]), "--json"])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["distilled"]
    assert found["steps"] == steps
    if not steps:
        assert "distilled: not one step fitted into the time" in out
    else:
        assert f"KL {found['before']:.5f} -> {found['after']:.5f} on 9 held-back windows; 3 steps on" in out


def test_what_did_not_help_is_told() -> None:
    told = {"what": "all", "text": "given", "kept": False, "before": 0.5, "after": 0.5, "steps": 7, "held": 2}
    said = distillation.words(told | {"tokens": 1000, "seconds": 2.0})
    assert said.endswith("did not help (KL 0.50000 on 2 held-back windows); the file is as it was")
    assert distillation.words({"what": "gains", "steps": 200, "seconds": 1.0}) == "gains, 200 steps"


def test_the_schedule_is_measured_so_often_and_no_oftener() -> None:
    assert [Recipe().every(steps) for steps in (1, 100, 200, 201, 4000)] == [25, 25, 25, 26, 500]
