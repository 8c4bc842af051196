"""Redaction of credentials and escaping of control characters."""

import json
import pickle

import pytest

from cache_schema import StoreReader
from cache_schema.errors import StoreNotFound
from cache_schema.shown_text import redacted, visible, visible_json, without_credentials
from cache_schema.storage import FsspecStorage

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://user:{SECRET}@host:80/cache", "http://***@host:80/cache"),
        (f"cache=https://{SECRET}@host/a, and b@c", "cache=https://***@host/a, and b@c"),
        (f"'ftp://me:{SECRET}@{SECRET}@host' is", "'ftp://***@host' is"),
        (f"simplecache::http://u:{SECRET}@h/c", "simplecache::http://***@h/c"),
        (
            f"https://h/a?X-Amz-Signature={SECRET}&X-Amz-Date=3",
            "https://h/a?X-Amz-Signature=***&X-Amz-Date=3",
        ),
        (f"https://h/a?sv=1&sig={SECRET}", "https://h/a?sv=1&sig=***"),
        (f'got "/a?v=1&access_token={SECRET}"', 'got "/a?v=1&access_token=***"'),
        ("https://youtube.com/watch?v=id&t=3", "https://youtube.com/watch?v=id&t=3"),
        ("mail me@host about http://host/a", "mail me@host about http://host/a"),
    ],
)
def test_credentials_of_urls_are_taken_out_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown
    assert redacted({"a": [1, text], text: None}) == {"a": [1, shown], shown: None}


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    hostile = "\x1b[2J\x07\r\x7f\x9b\u202eevil\u2066\u2028\ud800"
    shown = visible(f"a\tb\n{hostile}é\N{NO-BREAK SPACE}\N{ZERO WIDTH JOINER}")
    assert shown == (
        "a\tb\n\\x1b[2J\\x07\\x0d\\x7f\\x9b\\u202eevil\\u2066\\u2028\\ud800"
        "é\N{NO-BREAK SPACE}\N{ZERO WIDTH JOINER}"
    )
    text = visible_json(json.dumps({"a": hostile}, ensure_ascii=False))
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == {"a": hostile}


def test_errors_hold_no_credentials_in_other_processes_either() -> None:
    error = StoreNotFound(f"no store in http://u:{SECRET}@host/cache")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == "no store in http://***@host/cache"
        assert SECRET not in repr(one)


def test_a_url_whose_credentials_were_taken_out_is_not_used() -> None:
    for url in ("http://***@host/cache", "http://host/cache?sig=***"):
        with pytest.raises(ValueError, match=r"without its credentials.*give the whole URL again"):
            FsspecStorage(url)
        with pytest.raises(ValueError, match="without its credentials"):
            StoreReader(url)
