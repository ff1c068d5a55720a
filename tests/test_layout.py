"""The shape of the code: imports go one way, files stay short, nothing is unpickled, the API is documented.

All but the last tests read the sources only, so that they also hold for a file that nothing imports yet.
"""

import ast
import inspect
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "bayou"

# A module may import those to its left only. methods/ is one room: its files may share among themselves.
ORDER = (
    *(
        "version",
        "errors",
        "clock",
        "bars",
        "packed",
        "entropy",
        "steps",
        "kernels",
        "delta",
        "quantize",
        "decompose",
        "methods",
        "plan",
        "outcome",
        "allocate",
    ),
    *(
        "checkpoint",
        "sidecar",
        "contents",
        "entry",
        "coded",
        "staging",
        "deltafile",
        "journal",
        "skeleton",
        "inventory",
        "restore",
    ),
    *("restore", "moments", "standins", "calibrate", "momentfiles", "attached", "borrowed", "attach"),
    *("schedule", "objective", "distillation", "preflight"),
    *("ahead", "workers", "turns", "spending", "encoder", "exact", "compress", "evaluate", "smallest", "report"),
    *("sharing", "load", "share", "comparison", "serving", "integrations", "benchmarks", "cli"),
)
ENTRANCES = ("__init__", "__main__")  # may import any module; no module imports them

SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = SOURCES + sorted(p for room in ("tests", "examples") for p in (CHECKOUT / room).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def room(path: Path) -> str:
    """The name in ORDER that a source file belongs to: bayou/methods/lowrank.py -> methods."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of bayou in the file, also inside functions and under TYPE_CHECKING."""
    parents = path.relative_to(CHECKOUT).parent.parts
    for node in ast.walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in bayou/a.py is `from bayou import x`
            prefix = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join((*prefix, *([node.module] if node.module else [])))
            targets = [f"{module}.{alias.name}" for alias in node.names] if module == "bayou" else [module]
        for target in targets:
            parts = target.split(".")
            if parts[0] == "bayou":
                yield node.lineno, parts[1] if len(parts) > 1 else "__init__"


def against_the_order(path: Path, source: str) -> list[str]:
    """Each import of the file that goes to the right in ORDER or to an entrance, as a readable line."""
    here = room(path)
    if here in ENTRANCES:
        return []
    if here not in ORDER:
        return [f"{named(path)} has no place in ORDER"]
    wrong = []
    for line, there in imported(path, source):
        if there not in ORDER:
            wrong.append(f"{named(path)}:{line} imports bayou.{there}, which is no module of ORDER")
        elif there != here and ORDER.index(there) > ORDER.index(here):
            wrong.append(f"{named(path)}:{line} imports {there}, which comes after {here}")
    return wrong


def unsafe(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything in the source that runs code or reads pickles from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            pickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
            found += [(node.lineno, f"imports {m}") for m in modules if m.split(".")[0] in pickles]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call in ("eval", "exec", "compile", "torch.load"):
                found.append((node.lineno, f"calls {call}"))
            trusted = [k for k in node.keywords if k.arg == "trust_remote_code"]
            if any(not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in trusted):
                found.append((node.lineno, "trusts remote code"))
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    strangers = {room(p) for p in SOURCES} - {*ORDER, *ENTRANCES}
    assert not strangers, f"give {sorted(strangers)} a place in ORDER"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_go_one_way(path: Path) -> None:
    assert against_the_order(path, path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from bayou.cli import main",
        "import bayou.cli",
        "from bayou import cli",
        "from . import cli",
        "from .cli import main",
        "def late():\n    from bayou import cli",
        "from bayou import __version__",
        "from bayou.unheard import thing",
    ],
)
def test_the_order_is_really_checked(source: str) -> None:
    assert len(against_the_order(PACKAGE / "delta.py", source)) == 1
    assert against_the_order(PACKAGE / "delta.py", "from bayou.packed import Packed") == []


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load(p)", "eval(s)", "f(trust_remote_code=True)"],
)
def test_unsafe_calls_are_really_found(source: str) -> None:
    assert len(unsafe(source)) == 1
    assert unsafe("model.eval(); f(trust_remote_code=False); re.compile(s)") == []


def test_no_junk_drawers() -> None:
    assert [
        named(p) for p in EVERYTHING if p.stem in ("utils", "util", "helpers", "helper", "base", "misc", "common")
    ] == []


def test_files_stay_short() -> None:
    lines = {named(p): len(p.read_text().splitlines()) for p in EVERYTHING}
    limit = {name: 150 if name == "bayou/delta.py" else 400 for name in lines}
    assert {name: n for name, n in lines.items() if n > limit[name]} == {}


def public() -> list[str]:
    import bayou

    return sorted(bayou.__all__)


def test_the_public_names_exist_and_are_few() -> None:
    import bayou

    assert len(public()) == len(set(public())) <= 15
    assert [name for name in public() if not hasattr(bayou, name)] == []


def test_the_public_functions_are_documented_and_annotated() -> None:
    import bayou

    lacking = []
    for name in public():
        thing = getattr(bayou, name)
        if not callable(thing):
            continue
        if not (thing.__doc__ or "").strip():
            lacking.append(f"{name} has no docstring")
        if inspect.isfunction(thing):
            hints = typing.get_type_hints(thing)
            wanted = [*inspect.signature(thing).parameters, "return"]
            lacking += [f"{name}: {w} has no annotation" for w in wanted if w not in hints]
    assert lacking == []


def test_the_version_is_that_of_the_package() -> None:
    import bayou

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert project["version"] == bayou.__version__
