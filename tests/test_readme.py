"""README.md says what is so: its commands and options exist, its Python runs, its tables and file names are right."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import typer.core
import typer.main
from pico import perturb, pico

from bayou import cli, methods

CHECKOUT = Path(__file__).resolve().parent.parent
TEXT = (CHECKOUT / "README.md").read_text()
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(language: str, text: str = TEXT) -> list[str]:
    """The contents of the fenced blocks of one language ("" where none is stated)."""
    return [body for stated, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if stated == language]


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    assert found, f"README has no section {title!r}"
    return found[1]


def lines(program: str) -> list[str]:
    """Every line of a block that calls `program`, without its comment."""
    shell = "".join(blocks("") + blocks("sh") + blocks("bash") + blocks("console"))
    return [line.partition("#")[0].strip() for line in shell.splitlines() if line.startswith(program + " ")]


def options(command: str) -> set[str]:
    return {flag for p in command_of(command).params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}


def command_of(words: str) -> typer.core.TyperCommand:
    """The command "verify", or "bench load" of a group."""
    name, _, inner = words.partition(" ")
    return COMMANDS[name].commands[inner] if inner else COMMANDS[name]


def usage(line: str) -> Iterator[str]:
    """What is wrong with a line that calls bayou."""
    _, command, *words = shlex.split(line)
    if command not in COMMANDS:
        yield f"{line}: there is no command {command}"
        return
    inside = getattr(COMMANDS[command], "commands", None)
    if inside is not None:  # a group: its own commands have the options
        inner, *words = words
        if inner not in inside:
            yield f"{line}: there is no command {command} {inner}"
            return
        command = f"{command} {inner}"
    yield from (f"{line}: no option {w}" for w in words if w.startswith("-") and w not in options(command))
    if any(word.startswith("-") and word not in options(command) for word in words):
        return
    try:  # types, missing arguments and excess ones, as the command itself sees them; nothing runs
        command_of(command).make_context("bayou", words)
    except Exception as error:
        yield f"{line}: {error}"


def test_the_commands_are_those_that_there_are() -> None:
    assert [problem for line in lines("bayou") for problem in usage(line)] == []
    assert {line.split()[1] for line in lines("bayou")} == set(COMMANDS)


@pytest.mark.parametrize(
    "line",
    [
        "bayou squeeze BASE FINETUNED -o x",
        "bayou compress BASE FINETUNED -o x --ration 16",
        "bayou compress BASE FINETUNED -o x --ratio much",
        "bayou compress BASE FINETUNED",
        "bayou verify x.bayou y.bayou",
        "bayou bench decompress",
        "bayou bench load --layers 2",
    ],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    assert len(list(usage(line))) == 1


def test_every_option_that_the_text_names_exists() -> None:
    known = {flag for command in COMMANDS for flag in options(command)}
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]*)", re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)))
    assert len(named) >= 3
    assert named - known == set()


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.M)
    called = {line.split()[1] for line in lines("make")}
    assert called and called <= set(targets)


def test_the_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    # Wide enough that its norms, which are stored exactly, leave room at a 16th.
    pico("llama_gqa", "base", hidden_size=256, intermediate_size=512)
    perturb("base", "finetuned")
    ran: dict[str, object] = {}
    exec(code, ran)

    weights = Path("finetuned/model.safetensors").stat().st_size
    assert Path("math.bayou").stat().st_size <= weights / 16
    left = ran["model"]
    assert isinstance(left, transformers.LlamaForCausalLM)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        base, finetuned, restored = (
            transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)(ids).logits
            for name in ("base", "finetuned", "out")
        )
        assert torch.equal(left.float()(ids).logits, base)
    assert (restored - finetuned).norm() < (base - finetuned).norm()


def test_the_table_of_methods_is_complete_and_names_the_default() -> None:
    rows = re.findall(r"^\| `(\w+)`( \(default\))? \|", section("Methods"), re.M)
    assert sorted(name for name, _ in rows) == methods.names()
    (default,) = (p.default for p in COMMANDS["compress"].params if p.name == "method")
    assert [name for name, mark in rows if mark] == [default]


def test_every_file_that_it_points_to_exists() -> None:
    (listing,) = blocks("", section("Where things are"))
    named = re.findall(r"(?<![\w<>/.])(\w+(?:/\w+)*(?:\.py|\.md|/))(?![\w<])", listing)
    assert len(named) >= 15
    absent = [name for name in named if not (CHECKOUT / name).exists() and not (CHECKOUT / "bayou" / name).exists()]
    assert absent == []
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", TEXT) if "://" not in link]
    assert links and [link for link in links if not (CHECKOUT / link).exists()] == []


def test_the_listing_names_every_method() -> None:
    (line,) = (x for x in section("Where things are").splitlines() if x.startswith("bayou/methods/"))
    assert [name for name in methods.names() if name not in line] == []
