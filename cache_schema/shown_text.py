"""Making text safe to display and save: redacted credentials, escaped control characters."""

import html
import re
from collections.abc import Sequence
from typing import Any

REDACTED = "***"
"""Replaces a credential."""

_USER_INFO = re.compile(r"(?<=://)[^/\s?#]*@")
_SECRET = re.compile(
    r"([?&;](?:sig|pw|pwd|key|[\w.-]{0,64}(?:signature|token|secret|passw|credential|auth|"
    r"(?:api|access|account|shared)[_-]?key)[\w.-]{0,64})=)[^&;\s#'\"<>]+",
    re.IGNORECASE,
)

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # category Cc without tabs and line ends
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    "\u2028\u2029\ud800-\udfff]"  # other line separators, surrogates
)


def first_few(texts: Sequence[str], most: int) -> str:
    """Join texts for a message: at most `most` of them, and the number of the others."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def without_credentials(text: str) -> str:
    """Replace user and password of each URL, and secrets in URL queries, by `***`."""
    return _SECRET.sub(rf"\1{REDACTED}", _USER_INFO.sub(f"{REDACTED}@", text))


def escape_html(value: object) -> str:
    """Make a value safe to show in elements and quoted attributes of a page."""
    return html.escape(visible(without_credentials(str(value))), quote=True)


def redacted(value: Any) -> Any:
    """Copy JSON values, applying `without_credentials` to each text."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def lacks_credentials(url: str) -> bool:
    """Whether credentials were redacted from a URL."""
    return f"://{REDACTED}@" in url or f"={REDACTED}" in url


def visible(text: str) -> str:
    r"""Escape control characters and bidirectional marks, for example as `\x1b`.

    Tabs and line ends are kept. A terminal would execute the others, whatever their origin.
    """
    return _CONTROL.sub(lambda found: _escape(found[0], short=True), text)


def visible_json(text: str) -> str:
    """`visible` for JSON text, with escapes that decode to the same characters."""
    return _CONTROL.sub(lambda found: _escape(found[0], short=False), text)


def _escape(character: str, *, short: bool) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if short and code < 0x100 else f"\\u{code:04x}"
