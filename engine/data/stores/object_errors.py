"""Errors of the libraries for object stores: those of a taken name, those that may be transient, and remedies."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb
from typing import Any

from engine.data.stores.file_errors import remedy_of
from engine.errors import first_line

_FOREIGN = {"aiobotocore", "botocore", "s3fs", "gcsfs", "google", "aiohttp", "requests", "urllib3", "fsspec"}

_GO_ON = "what is committed is kept, and the same command continues"
NO_BUCKET = "there is no such bucket; create it, or correct the address (or that of the endpoint)"
_DENIED = (
    "access denied{reason}; the credentials of this machine must be allowed to list, read, write and delete there"
    " (s3:ListBucket, GetObject, PutObject, DeleteObject; on GCS storage.objectAdmin)"
)
_NO_CREDENTIALS = {
    "s3": "no credentials are found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the"
    " machine a role, here and on every machine with workers",
    "gs": "no credentials are found; set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account, here"
    " and on every machine with workers",
}
_UNREACHABLE = {
    "s3": "the endpoint cannot be reached{reason}; look at the network and at AWS_ENDPOINT_URL",
    "gs": "the endpoint cannot be reached{reason}; look at the network and at STORAGE_EMULATOR_HOST",
}
_SETTINGS = (
    "a setting is not understood{reason}; correct AWS_ENDPOINT_URL (http:// or https:// and a host), or another AWS_"
    " variable, or the files that AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE name"
)
_NO_FILE = {
    "s3": "correct the variable that names it (AWS_CA_BUNDLE, AWS_WEB_IDENTITY_TOKEN_FILE)",
    "gs": "correct GOOGLE_APPLICATION_CREDENTIALS",
}
_THROTTLED = (
    "the store asks for fewer requests{reason}, after all retries; use fewer workers or a larger samples_per_shard, or"
    f" set AWS_RETRY_MODE=adaptive and AWS_MAX_ATTEMPTS=10 ({_GO_ON})"
)
_FAILING = f"the store fails{{reason}}, after all retries ({_GO_ON})"
_BROKEN = f"the connection breaks off{{reason}}, after all retries; look at the network ({_GO_ON})"
_TOO_LARGE = "the store does not take an object of this size{reason}; use a smaller output.samples_per_shard"
_THROTTLES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "ServiceUnavailable",
    "503", "429",
}  # fmt: skip
# Transient errors, which are worth a retry: exceptions by class name (most are of libraries that are loaded only where
# they are used), error codes of S3, and HTTP status codes.
_UNREACHED = {
    "ConnectionError", "HTTPClientError", "TimeoutError", "ClientConnectionError", "FSTimeoutError", "gaierror",
    "Timeout",
}  # fmt: skip
_BROKEN_OFF = {
    "ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError",
    "ChunkedEncodingError", "ContentDecodingError", "ContentLengthError", "ChecksumError", "FlexibleChecksumError",
    "ProtocolError", "HttpProcessingError", "JSONDecodeError", "IncompleteUploadError",
}  # fmt: skip
_PASSING_CODES = _THROTTLES | {
    "InternalError", "InternalFailure", "InternalServerError", "RequestTimeout", "RequestTimeoutException",
    "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict",
    "BandwidthLimitExceeded",
}  # fmt: skip
_PASSING_STATES = {408, 409, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529}
_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "GoogleAuthError", "ProfileNotFound",
    "TokenRetrievalError",
}  # fmt: skip
# Responses of stores that do not know the condition.
_UNKNOWN_CODES = {"NotImplemented", "InvalidArgument", "InvalidRequest", "UnsupportedHeader", "MethodNotAllowed"}


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _response(error: BaseException, read: Callable[[Any], Any]) -> Any:
    """Part of the response of S3 behind an error; None where there is none."""
    for link in _chain(error):
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            return read(link.response)  # type: ignore[attr-defined]
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, where it is known."""
    status = _response(error, lambda response: response["ResponseMetadata"]["HTTPStatusCode"])
    code = getattr(error, "code", None)
    return status if status is not None else code if isinstance(code, int) else None


def _code(error: BaseException) -> str:
    code = _response(error, lambda response: response["Error"]["Code"])
    return str(code if code is not None else getattr(error, "code", "") or "")


def is_taken(error: BaseException) -> bool:
    """Whether a conditional request was refused, as the name is taken."""
    return isinstance(error, FileExistsError) or status_of(error) == 412 or _code(error) == "PreconditionFailed"


def is_unknown_condition(error: BaseException) -> bool:
    """Whether a conditional request was refused, as the store does not know the condition."""
    return status_of(error) == 501 or _code(error) in _UNKNOWN_CODES


def is_too_large(error: BaseException) -> bool:
    """Whether a request was refused as it is too large."""
    return status_of(error) == 413 or _code(error) in ("EntityTooLarge", "MaxMessageLengthExceeded")


def max_size_of(error: BaseException) -> int | None:
    """The largest size that a store accepts, where the error states it."""
    text = _response(error, lambda response: response["Error"]["MaxSizeAllowed"])
    return int(text) if str(text).isdigit() else None


def is_empty_range(error: BaseException) -> bool:
    """Whether a range of an empty object was requested."""
    return status_of(error) == 416 or _code(error) == "InvalidRange" or "InvalidRange" in str(error)


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}


def may_pass(error: BaseException) -> bool:
    """Whether an error of the libraries may be transient: the network, a busy or failing store, a truncated body."""
    kinds = _kinds(error)
    if isinstance(error, (FileNotFoundError, PermissionError)) or kinds & _CREDENTIALS or is_taken(error):
        return False
    if kinds & (_UNREACHED | _BROKEN_OFF):
        return True
    return status_of(error) in _PASSING_STATES or _code(error) in _PASSING_CODES


def is_foreign(error: BaseException) -> bool:
    """Whether an error is of one of the libraries, not of this program; a bad answer of GCS is a bare `ValueError`."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    if isinstance(error, (ValueError, RuntimeError)):
        modules += [frame.f_globals.get("__name__", "") for frame, _ in list(walk_tb(error.__traceback__))[-1:]]
    return any(module.partition(".")[0] in _FOREIGN for module in modules)


def remedy(error: Exception, scheme: str) -> str:
    """The remedy for an error of the libraries."""
    kinds = _kinds(error)
    code, text = _code(error), first_line(getattr(error, "strerror", None) or error, type(error).__name__)[:300]
    reason = f" ({code}: {text})" if code and code not in text else f" ({text})"
    if code == "NoSuchBucket" or text == NO_BUCKET:
        return NO_BUCKET
    if kinds & _CREDENTIALS:
        return _NO_CREDENTIALS[scheme] + ("" if "NoCredentialsError" in kinds else f" ({text})")
    if "PermissionError" in kinds or text.startswith("Forbidden") or status_of(error) in (401, 403):
        return _DENIED.format(reason=reason)
    if code in _THROTTLES or status_of(error) in (429, 503):
        return _THROTTLED.format(reason=reason)
    if is_too_large(error):
        return _TOO_LARGE.format(reason=reason)
    if kinds & _BROKEN_OFF:
        return _BROKEN.format(reason=reason)
    if kinds & _UNREACHED:
        return f"{_UNREACHABLE[scheme].format(reason=f' ({text})')} ({_GO_ON})"
    if isinstance(error, FileNotFoundError):
        return "there is no such object"
    if may_pass(error):
        return _FAILING.format(reason=reason)
    if scheme == "s3" and (
        isinstance(error, ValueError) or kinds & {"ConfigParseError", "InvalidRetryConfigurationError"}
    ):
        return _SETTINGS.format(reason=reason)
    if isinstance(error, OSError) and not _response(error, bool) and error.errno is not None:
        if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(tempfile.gettempdir()):
            return f"the library reads {os.fsdecode(error.filename)}: {error.strerror}; {_NO_FILE[scheme]}"
        return f"the local folder {tempfile.gettempdir()}: {remedy_of(error)}; TMPDIR names another"
    return f"the store refuses{reason} ({_GO_ON})"
