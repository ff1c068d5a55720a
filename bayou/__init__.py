"""Bayou: many fine-tunes of one base, each a small, verified difference from it."""

__all__ = [
    "BayouError",
    "DeltaFile",
    "__version__",
    "attach",
    "compress",
    "detach",
    "evaluate",
    "export",
    "inspect",
    "load",
    "restore",
    "share",
    "verify",
]

# isort: off  (the names below shadow modules of the same name, so these imports must come last and all at once)
from bayou.attach import attach, detach
from bayou.compress import compress
from bayou.deltafile import DeltaFile
from bayou.errors import BayouError
from bayou.evaluate import evaluate
from bayou.integrations.export import export
from bayou.load import load
from bayou.report import inspect, verify
from bayou.restore import restore
from bayou.share import share
from bayou.version import __version__
