"""`bayou serve`: the process around the server: its options, its socket, and how it ends."""

import contextlib
import json
import logging
import resource
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayou.errors import BadInput, BayouError

if TYPE_CHECKING:
    from bayou.serving.engine import Engine
    from bayou.serving.roster import Roster

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    base: Annotated[str, typer.Argument(help="The base: a model folder or a Hub id.")],
    delta: Annotated[list[str] | None, typer.Option(help="A file to serve, NAME=FILE; may be given often.")] = None,
    delta_dir: Annotated[
        Path | None, typer.Option(help="Serve the .bayou files of this folder, by name; and load others from it.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the base; its folder's name unless given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="BAYOU_API_KEY", help="What clients must send; better in the environment.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Deltas on the device at most, e.g. 8GB.")] = "8GB",
    host_memory: Annotated[str, typer.Option(help="Deltas kept beside a GPU, in page-locked memory.")] = "32GB",
    max_tenants: Annotated[int, typer.Option(help="Deltas on the device at once.")] = 256,
    max_batch: Annotated[int, typer.Option(help="Answers in the making at once.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt and its answer.")] = 2048,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait; more are refused with 429.")] = 256,
    max_body: Annotated[str, typer.Option(help="Bytes of a request.")] = "2MiB",
    prefill: Annotated[int, typer.Option(help="Tokens of prompts that are read in one step.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; float32 on the CPU, else bfloat16.")
    ] = None,
    base_bits: Annotated[int, typer.Option(help="4 holds the base's linears in 4 bits; 16 as they are.")] = 16,
    unpack: Annotated[
        bool,
        typer.Option("--unpack", help="CPU: hold deltas as fp32, faster and up to 16 times as large."),
    ] = False,
    drain: Annotated[int, typer.Option(help="Seconds that answers have to end in after SIGTERM.")] = 30,
    base_revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")] = False,
) -> None:
    """Answer OpenAI's API for a base and its deltas, each request naming its own; ends on SIGTERM or Ctrl-C."""
    try:
        import uvicorn

        from bayou.serving.server import application
    except ImportError as error:
        raise BadInput(f"serving needs {error.name}: pip install 'bayou[serve]'") from None
    from bayou.restore import parse_size
    from bayou.serving.engine import Settings

    started = time.perf_counter()
    bounds = {"--max-tenants": max_tenants, "--max-batch": max_batch, "--max-length": max_length, "--prefill": prefill}
    bounds |= {"--max-queue": max_queue, "--drain": drain}
    for option, value in bounds.items():
        if value < 1:
            raise BadInput(f"{option} {value}: at least 1")
    if unpack and device != "cpu":
        raise BadInput(f"--unpack is for the CPU; on {device} the packed deltas are multiplied as they are")
    if delta_dir is not None and not delta_dir.is_dir():
        raise BadInput(f"--delta-dir {delta_dir} is not a folder")
    most_body = parse_size(max_body)
    settings = Settings(
        parse_size(memory),
        parse_size(host_memory),
        max_tenants,
        max_batch,
        max_length,
        max_queue,
        prefill,
        _dtype(dtype, device),
        device,
        unpack,
        base_bits=base_bits,
    )
    _allow_many_files()
    logging.basicConfig(level=logging.INFO, format="bayou: %(message)s")
    with _listen(host, port) as listening:
        engine, roster = _open(base, name, base_revision, settings, delta or [], delta_dir)
        app = application(engine, roster, key=api_key, body=most_body)
        if api_key is None and host not in _LOOPBACK:
            print(f"warning: anyone who reaches {host} can use this server; give --api-key", flush=True)
        address = listening.getsockname()
        url = f"http://[{address[0]}]:{address[1]}" if ":" in address[0] else f"http://{address[0]}:{address[1]}"
        ready, count = time.perf_counter() - started, len(engine.bank.names())
        print(f"serving {engine.bank.base.name} and {count} deltas on {url} after {ready:.1f} s", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=drain, server_header=False)
        # uvicorn takes no more connections, lets those that are open end, and then raises the signal once more.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            engine.close()
    totals = app.state.metrics.totals()
    print("ended after {answers} answers, {tokens} tokens".format(**totals))
    if as_json:
        print(json.dumps(totals))


def _allow_many_files() -> None:
    """Every client and every delta is an open file; the limit that a shell starts with is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))


def _dtype(word: str | None, device: str) -> Any:
    import torch

    words = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    word = word or ("float32" if device == "cpu" else "bfloat16")
    if word not in words:
        raise BadInput(f"--dtype {word}: choose float32, float16 or bfloat16")
    return words[word]


def _listen(host: str, port: int) -> socket.socket:
    """The socket is bound before the base is read: a taken port is known at once."""
    if not 0 <= port < 65536:
        raise BadInput(f"--port {port}: 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BadInput(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _open(
    base: str, name: str | None, revision: str | None, settings: Any, deltas: list[str], folder: Path | None
) -> tuple["Engine", "Roster"]:
    from bayou.checkpoint import resolve
    from bayou.serving.engine import Engine
    from bayou.serving.roster import Roster, check_name

    found = resolve(base, revision)
    called = name or (base if not Path(base).is_dir() else found.resolve().name)
    engine = Engine(found, check_name(called), settings)
    try:
        for pair in deltas:
            word, equals, path = pair.partition("=")
            if not equals:
                raise BadInput(f"--delta {pair!r}: write NAME=FILE, e.g. --delta sql=sql.bayou")
            engine.bank.register(check_name(word), Path(path))
        roster = Roster(engine, folder)
        for file, error in roster.register_all():
            print(f"left out: {file.name}: {error}", flush=True)
        return engine, roster
    except BayouError:
        engine.close()
        raise
