"""What every command of ``python -m statebackend`` is told in the same way: the store, and how to reach it.

``--storage-option KEY=VALUE`` may hold a secret, so nothing here repeats a value: no error, no help; `Redacted`
takes them out of the messages of libraries.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "OPTIONS_HELP",
    "Redacted",
    "add_storage_option",
    "options_of_others",
    "positive",
    "storage_options",
    "store_parser",
]

OPTIONS_HELP = """\
storage options:
  --storage-option KEY=VALUE is handed to the filesystem of the store (fsspec's for that URL, or obstore). A dot in
  KEY nests. VALUE is text, except: true and false; env:NAME is the value of an environment variable, which keeps a
  secret off the command line; json:… is any JSON value. What the filesystem finds in the environment by itself
  (AWS_ACCESS_KEY_ID, AWS_PROFILE, …) needs no option. For S3:
    --storage-option endpoint_url=http://localhost:9000 --storage-option key=env:MY_KEY \\
    --storage-option secret=env:MY_SECRET --storage-option client_kwargs.region_name=eu-central-1
    --storage-option anon=true
  Other stores that a command reaches (the new one of a clone, the parent of a branch) get the same options if their
  URL has the same protocol, unless they have their own by --storage-option-of.
"""

_SHORTEST_SECRET = 4
"""Shorter values are in too many words to be taken out of them."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One KEY=VALUE; the value is never shown."""

    path: tuple[str, ...]
    value: Any = field(repr=False)


def store_parser(*, others: bool = False) -> argparse.ArgumentParser:
    """The parent of a command's parser: URL and storage options; ``others``: also those of other stores."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("url", metavar="URL", help="the store: a directory or an fsspec URL")
    add_storage_option(parser)
    if others:
        parser.add_argument(
            "--storage-option-of", action="append", default=[], nargs=2, metavar=("URL", "KEY=VALUE"), dest="of_other",
            help="the same for another store that this one reads or that is made from it",
        )  # fmt: skip
    return parser


def add_storage_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--storage-option``, which `storage_options` reads and `Redacted` keeps out of messages."""
    parser.add_argument(
        "--storage-option", action="append", default=[], type=_option, metavar="KEY=VALUE", dest="storage_option",
        help="how to reach it (endpoint, credentials), any number of times; see python -m statebackend --help",
    )  # fmt: skip


def storage_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the options of a command say; None if there are none. Raises ``ValueError``."""
    return _nested(args.storage_option)


def options_of_others(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Storage options of other stores by their URL, as given. Raises ``ValueError``."""
    found: dict[str, list[_Option]] = {}
    for url, text in args.of_other:
        try:
            found.setdefault(url, []).append(_option(text))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--storage-option-of {url}: {error}") from None
    return {url: _nested(options) or {} for url, options in found.items()}


def positive(text: str) -> int:
    """A count of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, not {text!r}")
    return int(text)


class Redacted:
    """Takes the values of the storage options of a command out of messages."""

    def __init__(self, args: argparse.Namespace) -> None:
        given = [*getattr(args, "storage_option", ()), *_options_of_others(args)]
        texts = {text for option in given for text in _texts(option.value) if len(text) >= _SHORTEST_SECRET}
        self._secrets = sorted(texts, key=len, reverse=True)

    def __call__(self, error: object) -> str:
        """The message of an error, or any text, without them."""
        text = str(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _options_of_others(args: argparse.Namespace) -> list[_Option]:
    found = []
    for _, text in getattr(args, "of_other", ()):
        try:
            found.append(_option(text))
        except argparse.ArgumentTypeError:
            continue
    return found


def _option(text: str) -> _Option:
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise argparse.ArgumentTypeError("expected KEY=VALUE")  # the text may be a secret whose key was forgotten
    return _Option(path, _value(key, value))


def _value(key: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("env:"):
        if (found := os.environ.get(text[4:])) is None:
            raise argparse.ArgumentTypeError(f"{key}: there is no environment variable {text[4:]}")
        return found
    if text.startswith("json:"):
        try:
            return json.loads(text[5:])
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"{key}: not JSON: {error.msg} at character {error.pos}") from None
    return text


def _nested(options: Iterable[_Option]) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for option in options:
        *above, last = option.path
        into = found
        for name in above:
            into = into.setdefault(name, {})
            if not isinstance(into, dict):
                raise ValueError(f"storage option {'.'.join(option.path)}: {name} has a value of its own already")
        if last in into:
            raise ValueError(f"storage option {'.'.join(option.path)} is given twice")
        into[last] = option.value
    return found or None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]
