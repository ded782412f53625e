"""The chat page at ``/``: one static file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parent / "static" / "index.html"
_INLINE = re.compile(rb"<(script|style)(?:\s[^>]*)?>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class ChatPage:
    """The page as it is sent.

    Args:
        body: Its bytes.
        policy: Its Content-Security-Policy: its own scripts and styles by their hashes, and this server alone.
    """

    body: bytes
    policy: str


@cache
def read_page(path: Path = PAGE) -> ChatPage | None:
    """Return the page, or None where the package has none."""
    if not path.is_file():
        return None
    body = path.read_bytes()
    # A browser hashes the text after it made line ends equal; the file has no others.
    hashes: dict[bytes, list[str]] = {b"script": [], b"style": []}
    for kind, text in _INLINE.findall(body):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    return ChatPage(body, _policy(" ".join(hashes[b"script"]), " ".join(hashes[b"style"])))


def _policy(scripts: str, styles: str) -> str:
    parts = {
        "default-src": "'none'",
        "script-src": scripts or "'none'",
        "style-src": styles or "'none'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())
