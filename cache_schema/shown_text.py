"""Text as it may be shown and kept: without the credentials of URLs, with controls made visible."""

import re
from typing import Any

REDACTED = "***"
"""Stands in the place of a credential."""

_USER_INFO = re.compile(r"(?<=://)[^/\s?#]*@")
_SECRET = re.compile(
    r"([?&;](?:sig|pw|pwd|key|[\w.-]{0,64}(?:signature|token|secret|passw|credential|auth|"
    r"(?:api|access|account|shared)[_-]?key)[\w.-]{0,64})=)[^&;\s#'\"<>]+",
    re.IGNORECASE,
)

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # category Cc without tabs and line ends
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of text
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and halves of characters
)


def without_credentials(text: str) -> str:
    """The text with `***` for user and password of each URL, and for secrets in queries."""
    return _SECRET.sub(rf"\1{REDACTED}", _USER_INFO.sub(f"{REDACTED}@", text))


def redacted(value: Any) -> Any:
    """A copy of JSON values, each text of them `without_credentials`."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def lacks_credentials(url: str) -> bool:
    """Whether a URL is one that credentials were taken out of."""
    return f"://{REDACTED}@" in url or f"={REDACTED}" in url


def visible(text: str) -> str:
    r"""The text with control characters and turns of direction escaped, such as `\x1b`.

    Tabs and line ends stay. A terminal would obey the others, whoever wrote them.
    """
    return _CONTROL.sub(lambda found: _escape(found[0], short=True), text)


def visible_json(text: str) -> str:
    """`visible` for JSON, where the escapes stand within strings and mean the same characters."""
    return _CONTROL.sub(lambda found: _escape(found[0], short=False), text)


def _escape(character: str, *, short: bool) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if short and code < 0x100 else f"\\u{code:04x}"
