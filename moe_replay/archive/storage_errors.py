"""What a store's errors mean: try again, change something, make room, or there is no such object.

A store's own message may quote keys or signed URLs, so only its type, its error code and the endpoint's host are told.
"""

import errno
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from moe_replay.errors import ConfigError, ReplayError, StorageFull, StorageUnavailable

_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXTS = tuple(os.strerror(number) for number in _FULL)
# Object-store clients are optional dependencies and their network errors are no OSErrors: told by name.
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure", "adlfs"}
_NETWORK_ERRORS = {
    "HTTPClientError",
    "ConnectionError",
    "ClientConnectionError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",
}

# HTTP statuses and S3 error codes after which the same request may succeed; 409 is S3's for writers that met.
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504, 509}
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    # An upload whose completion was answered, but not to us.
    "NoSuchUpload",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_FULL_STATUS = 507
_FULL_CODES = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}

_CREDENTIALS = (
    "the store refused the credentials: correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in "
    "AWS_PROFILE, and see that they are of the endpoint in AWS_ENDPOINT_URL"
)
_EXPIRED = "the credentials have expired: renew them (AWS_SESSION_TOKEN, or log in again) and resume the run"
_PERMISSION = (
    "these credentials may not do that: grant them reading, writing, listing and deleting below the root; without "
    "leave to list, S3 answers so for an object that is not there"
)
_BUCKET = "the bucket does not exist: create it first, or correct the root and the endpoint in AWS_ENDPOINT_URL"
_REGION = "the bucket is in another region: set AWS_REGION to its own, or AWS_ENDPOINT_URL to its endpoint"
_CLOCK = "this machine's clock and the store's differ by more than the store allows, mostly 15 minutes: set the clock"
_NO_CREDENTIALS = (
    "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile that has "
    "them"
)
_PROFILE = "there is no such profile: correct AWS_PROFILE, or add it to the file in AWS_CONFIG_FILE (~/.aws/config)"
_WAYS_OUT = {
    "403": f"{_PERMISSION}; wrong credentials may get this answer too",
    "AccessDenied": _PERMISSION,
    "AllAccessDisabled": _PERMISSION,
    "AuthorizationHeaderMalformed": _REGION,
    "ExpiredToken": _EXPIRED,
    "Forbidden": _PERMISSION,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "NoCredentialsError": _NO_CREDENTIALS,
    "NoSuchBucket": _BUCKET,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "PermanentRedirect": _REGION,
    "ProfileNotFound": _PROFILE,
    "RequestTimeTooSkewed": _CLOCK,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "TokenRefreshRequired": _EXPIRED,
}
_CERTIFICATE = (
    "no encrypted connection could be made: set AWS_CA_BUNDLE to the file with the certificate of the authority that "
    "signed the store's, and see that AWS_ENDPOINT_URL has its host's name and is really https"
)
_CHECK = "check the root, the permissions on it and the credentials in the environment"
_AGAIN = "try again once the storage answers"
_MAKE_ROOM = (
    "no room is left: nothing that is committed was harmed; make room (moe-replay archive gc removes what dead "
    "writers left and what has served), then resume the run"
)


@contextmanager
def storage_errors(action: str, creating: bool = False) -> Iterator[None]:
    """Raise a store's errors as StorageUnavailable, StorageFull or ConfigError (denied), without their text.

    "Not found" passes through, except for a missing bucket and while `creating`: then the bucket or folder is missing.
    """
    try:
        yield
    except ReplayError:
        raise
    except Exception as error:
        kind = _kind_of(error, creating)
        if kind is None:
            raise
        # Not even as a cause: Prefect and the engines' logs keep whole tracebacks.
        raise kind(f"{action} failed ({_reason(error)}); {_way_out(error, kind)}") from None


@contextmanager
def told_of_full_disk(folder: str) -> Iterator[None]:
    """Raise StorageFull where a library could not write below `folder` for want of room; other errors pass."""
    try:
        yield
    except ReplayError:
        raise
    except Exception as error:
        # safetensors and others raise errors of their own, which have but the system's text.
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if not is_full and not any(text in str(error) for text in _FULL_TEXTS):
            raise
        raise StorageFull(f"writing below {folder} failed ({type(error).__name__}); {_MAKE_ROOM}") from error


def may_pass(error: Exception) -> bool:
    """Whether `error` came from a remote store or the way to it, and the same call may succeed a moment later."""
    remote = s3_code(error) is not None or _is_client_error(error) or isinstance(error, ConnectionError | TimeoutError)
    return remote and _kind_of(error, creating=False) is StorageUnavailable


def s3_code(error: Exception) -> str | None:
    """The error code S3 answered with, e.g. `SlowDown`; the HTTP status for an answer without one. None otherwise."""
    answer = _s3_answer(error)
    return None if answer is None else str(answer.get("Error", {}).get("Code", ""))


def redacted(url: str) -> str:
    """`url` without a user name, password or query in it."""
    return re.sub(r"\?.*$", "", re.sub(r"//.*@", "//", url))


def _kind_of(
    error: Exception, creating: bool
) -> type[ConfigError] | type[StorageFull] | type[StorageUnavailable] | None:
    """None for what is no error of a store, or says that there is no such object."""
    if _is_of_certificates(error):
        return ConfigError
    answer = _s3_answer(error)
    if answer is not None:
        status, code = answer.get("ResponseMetadata", {}).get("HTTPStatusCode"), s3_code(error)
        if status == _FULL_STATUS or code in _FULL_CODES:
            return StorageFull
        if status in _PASSING_STATUS or code in _PASSING_CODES:
            return StorageUnavailable
        missing = isinstance(error, FileNotFoundError) and code != "NoSuchBucket" and not creating
        return None if missing else ConfigError
    if isinstance(error, FileNotFoundError):
        return ConfigError if creating else None
    if isinstance(error, OSError) and error.errno in _FULL:
        return StorageFull
    if isinstance(error, OSError):
        denied = isinstance(error, PermissionError) or error.errno in _DENIED
        return ConfigError if denied else StorageUnavailable
    if _is_client_error(error):
        network = any(parent.__name__ in _NETWORK_ERRORS for parent in type(error).__mro__)
        return StorageUnavailable if network else ConfigError
    return None


def _is_of_certificates(error: Exception) -> bool:
    """Whether a store's certificate, or the file that vouches for it, was refused; botocore calls it a lost network."""
    inner = getattr(error, "kwargs", {}).get("error") if _is_client_error(error) else None
    if isinstance(getattr(inner, "os_error", inner), ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return False  # cut while they greeted each other
    # A bundle that is no file, or holds no certificate, is met as the plain error.
    return type(error).__name__ == "SSLError" or isinstance(inner, ssl.SSLError | FileNotFoundError)


def _s3_answer(error: BaseException) -> dict[str, Any] | None:
    # s3fs raises an OSError of its own from botocore's ClientError, which has what S3 said.
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict) and type(one).__module__.split(".")[0] in _CLIENTS:
            return answer
    return None


def _is_client_error(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in _CLIENTS


def _reason(error: Exception) -> str:
    if code := s3_code(error):
        return f"S3 answered {code}"
    number = error.errno if isinstance(error, OSError) else None
    reason = type(error).__name__ + (f", {os.strerror(number)}" if isinstance(number, int) else "")
    endpoint = getattr(error, "kwargs", {}).get("endpoint_url")
    host = urlsplit(str(endpoint)).netloc.rsplit("@", 1)[-1] if endpoint else ""
    return f"{reason} at {host}" if host else reason


def _way_out(error: Exception, kind: type[ReplayError]) -> str:
    if kind is StorageUnavailable:
        return _AGAIN
    if kind is StorageFull:
        return _MAKE_ROOM
    if _is_of_certificates(error):
        return _CERTIFICATE
    if isinstance(error, FileNotFoundError):
        return "the bucket or folder does not exist; create it first" if s3_code(error) is None else _BUCKET
    return _WAYS_OUT.get(s3_code(error) or type(error).__name__, _CHECK)
