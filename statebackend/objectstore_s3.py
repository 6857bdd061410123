"""The S3 driver of `FsspecObjectStore`, on s3fs.

Create-if-absent is ``If-None-Match: *`` on the PUT (or on the completion of a multipart upload), which S3
answers with 412 when there is an object. s3fs's listing cache and instance cache are off: they would hide what
another process wrote. Reads are one GET each, without the HEAD that s3fs sends by default.

Nothing is tried again in here (s3fs and botocore are told so), since there is one place for it. (One exception is out
of reach: aiohttp repeats a request when a connection that was used before is closed without an answer, so that a create
can meet its own object as ``EXISTS``, which its caller has to expect anyway.)

===========================================  ===========================  =========================================
answer                                       becomes                      tried again
===========================================  ===========================  =========================================
404 ``NoSuchKey`` to a read                  `ObjectMissingError`         no
412 ``PreconditionFailed`` to a create       ``EXISTS``                   no
409 ``ConditionalRequestConflict``           `StorageUnavailableError`    yes; a create by the one who committed, with
                                                                          the same bytes: it was not applied, and
                                                                          whether another one was is not known yet
5xx, 429, ``RequestTimeout``, broken         `StorageUnavailableError`    yes, with full jitter
uploads, connection refused or lost
no complete answer in ``timeout_s``          `StorageUnavailableError`    yes; it may still take effect
403, no or expired credentials, no such      `StorageUnavailableError`    no: the same answer would come again. An
bucket, other 3xx and 4xx, 501               from `RefusedError`          operator can mend it, and nothing is lost
===========================================  ===========================  =========================================

``timeout_s`` is enforced here and not by botocore, whose read timeout does not cover a server that never answers an
``Expect: 100-continue``: such a PUT would wait for minutes on a thread of the pool.
The requests of all S3 stores of a process run on fsspec's own I/O thread (a daemon), which a fork does not inherit.
"""

# ruff: noqa: D102, SLF001  (methods as in `FsspecDriver`; fsspec's coroutines are public and begin with _)
from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

from aiobotocore.session import AioSession
from aiohttp import ClientError as HttpError
from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError, PartialCredentialsError
from fsspec.asyn import sync

from statebackend.objectstore_base import Data, RefusedError, is_refusal
from statebackend.objectstore_drivers import FsspecDriver

__all__ = ["S3Driver", "s3_options"]

_CONNECT_TIMEOUT_S = 5.0
_MISSING = {"NoSuchKey", "NoSuchVersion", "404"}
_EXISTS = {"PreconditionFailed", "412"}
_RANGE = {"InvalidRange", "416"}


def s3_options(storage_options: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """The user's options for s3fs, with every cache off and no retries inside; the user's own win."""
    config = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": min(_CONNECT_TIMEOUT_S, timeout_s),
        "read_timeout": timeout_s,
        **storage_options.get("config_kwargs", {}),
    }
    forced = {"use_listings_cache": False, "skip_instance_cache": True, "config_kwargs": config}
    return {"session": _session(storage_options.get("profile")), **storage_options, **forced}


def _session(profile: str | None) -> AioSession:
    """A session that shares nothing but botocore's descriptions of the service, whose parsing takes 0.1 to 0.4 s."""
    session = AioSession(profile=profile)
    session.register_component("data_loader", _service_descriptions())
    return session


@cache
def _service_descriptions() -> Any:
    return AioSession().get_component("data_loader")


class S3Driver(FsspecDriver):
    """An s3fs filesystem made with `s3_options`; paths are ``bucket/key``."""

    def __init__(self, fs: Any, timeout_s: float) -> None:
        super().__init__(fs)
        fs.retries = 1  # tries in all, of s3fs around those of botocore
        self._timeout_s = timeout_s

    def read(self, path: str, start: int, end: int | None) -> bytes:
        if end is not None and end <= start and (start < 0) == (end < 0):
            return self.read(path, 0, 1)[:0]  # HTTP has no empty range; and a missing object is missing
        try:  # always with a range, for the whole object too: without one s3fs asks for the size first
            return bytes(self._call(self._fs._cat_file, path, start=start, end=end))
        except OSError as error:
            if _code(error) in _RANGE:
                return b""
            raise

    def write(self, path: str, data: Data) -> None:
        self._call(self._fs._pipe_file, path, bytes(memoryview(data)))

    def create(self, path: str, data: Data) -> bool:
        try:
            self._call(self._fs._pipe_file, path, bytes(memoryview(data)), mode="create")
        except FileExistsError:
            return False
        return True

    def list(self, directory: str) -> list[str]:
        return list(self._call(self._fs._find, directory))

    def delete(self, path: str) -> None:
        self._call(self._fs._rm_file, path)

    def _call(self, coroutine: Callable[..., Awaitable[Any]], path: str, *args: Any, **options: Any) -> Any:
        try:
            return sync(self._fs.loop, coroutine, path, *args, timeout=self._timeout_s, **options)
        except (OSError, BotoCoreError, HttpError) as error:
            raise _failure(error) from error


def _failure(error: Exception) -> OSError:
    """What the error is to the caller of a driver, by the table above."""
    response = _response(error)
    code, status = _code(error), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    message = f"{code or type(error).__name__}: {error}"
    if code in _EXISTS or isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, message)
    if code in _MISSING or (isinstance(error, FileNotFoundError) and not response):
        return FileNotFoundError(errno.ENOENT, message)
    if isinstance(error, TimeoutError):
        return TimeoutError(errno.ETIMEDOUT, message)
    if code in _RANGE:
        return OSError(errno.EINVAL, message)
    local = PermissionError | NoCredentialsError | PartialCredentialsError | ParamValidationError
    if isinstance(error, local) or is_refusal(status, code):
        return RefusedError(errno.EACCES, message)
    return OSError(errno.EIO, message)


def _response(error: BaseException | None) -> dict[str, Any]:
    """The parsed answer of the server behind an error of s3fs, which chains it; empty when there was none."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))
