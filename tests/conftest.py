"""What every test shares: one thread a process, no network, the test bed's models where they can be built."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch or transformers is imported, so that the processes that tests start inherit it too.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pico  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)

CHECKOUT = Path(__file__).resolve().parent.parent


def _builder() -> Path:
    """Where the test bed's builder should be: $BAYOU_TESTBED (script or folder), else beside the checkout."""
    named = os.environ.get("BAYOU_TESTBED")
    path = Path(named) if named else CHECKOUT.parent / "shared" / "testbed" / "testbed.py"
    return path / "testbed.py" if path.is_dir() else path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fingerprints are cached in a folder of the session's own, also by the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYOU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def testbed() -> Path:
    """A folder with the Hugging Face folders base, intent and sql (bf16, 0.27 GB each) and nothing else.

    Built once per version of the builder, into the system's folder for temporary files; xdist's workers wait
    for the first of them to finish. Skips the test where the builder is absent; one that fails is a failure.
    """
    builder = _builder()
    if not builder.is_file():
        where = "BAYOU_TESTBED names no file" if "BAYOU_TESTBED" in os.environ else "no test bed beside the checkout"
        pytest.skip(f"{where} ({builder.name} not found; set BAYOU_TESTBED to its path)")
    version = hashlib.sha256(builder.read_bytes()).hexdigest()[:12]
    cache = Path(tempfile.gettempdir()) / f"bayou-testbed-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        pytest.fail(f"the cache folder {cache} belongs to another user; set TMPDIR to a folder of your own")
    models = cache / version
    with FileLock(cache / f"{version}.lock"):
        if not models.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as fresh:
                command = [sys.executable, str(builder), "build", fresh]
                environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
                built = subprocess.run(command, capture_output=True, text=True, env=environment)
                if built.returncode:
                    pytest.fail(f"{builder.name} build failed:\n{built.stderr[-2000:]}", pytrace=False)
                (Path(fresh) / "done").mkdir()
                for name in ("base", "intent", "sql"):
                    (Path(fresh) / name).rename(Path(fresh) / "done" / name)
                (Path(fresh) / "done").rename(models)  # one step: half-built models are never seen
    return models


@pytest.fixture(scope="session")
def shallow(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test bed's base and intent with every fifth of their 30 layers: real numbers of all depths, in a third of the
    time, for what is done matrix by matrix."""
    root = tmp_path_factory.mktemp("shallow")
    for name in ("base", "intent"):
        shutil.copytree(testbed / name, root / name)
        config = json.loads((root / name / "config.json").read_text())
        kept = range(0, config["num_hidden_layers"], 5)
        (root / name / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(kept)}))
        whole = load_file(testbed / name / "model.safetensors")
        parts = {key: tensor for key, tensor in whole.items() if ".layers." not in key}
        for key in whole.keys() - parts.keys():
            front, _, rest = key.partition(".layers.")
            layer, _, part = rest.partition(".")
            if int(layer) in kept:
                parts[f"{front}.layers.{kept.index(int(layer))}.{part}"] = whole[key]
        save_file(parts, root / name / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A pico base and the delta files of its tenants, by name: see tenants.py."""
    import tenants

    return tenants.make(tmp_path_factory.mktemp("tenants"))


@pytest.fixture(scope="module")
def references(made: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The restored models of `made`, and its base, in fp32."""
    import tenants

    base, files = made
    root = tmp_path_factory.mktemp("restored")
    return {name: tenants.alone(base, file, root / name) for name, file in [("base", None), *files.items()]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for the test bed's models carries the marker: `-m "not testbed"` leaves it out."""
    for item in items:
        if "testbed" in getattr(item, "fixturenames", ()):
            item.add_marker("testbed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model."""
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """A fine-tune of `base`."""
    return pico.perturb(base, base.with_name("tuned"))
