"""The page at `/`, which asks several models at once: page.html, and what a browser may do with it."""

import base64
import hashlib
import re
from importlib import resources

TEXT = resources.files("bayou.serving").joinpath("page.html").read_text("utf-8")
"""The whole page; it loads nothing else."""


def _only(element: str) -> str:
    """The source expression that allows what stands in this element of the page, and nothing else."""
    found = re.findall(f"<{element}>(.*?)</{element}>", TEXT, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_only('script')}",
        f"style-src {_only('style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # text never becomes markup, whatever a model says
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
