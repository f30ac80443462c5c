"""What is made of errors of storage, and that they tell no credentials."""

import errno
import traceback

import pytest

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.storage import storage_errors
from moe_replay.errors import ConfigError, StorageFull, StorageUnavailable


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(errno.EACCES, "key AKIA123 denied"), ConfigError),
        (OSError(errno.EROFS, "AKIA123"), ConfigError),
        (TimeoutError("AKIA123"), StorageUnavailable),
        (ConnectionResetError(errno.ECONNRESET, "AKIA123"), StorageUnavailable),
        (OSError(errno.EBUSY, "SlowDown AKIA123"), StorageUnavailable),
        (OSError(errno.EDQUOT, "AKIA123"), StorageFull),
    ],
)
def test_storage_errors_say_whether_to_retry_and_never_quote_the_store(error, kind):
    with pytest.raises(kind) as caught, storage_errors("reading s3://bucket/x"):
        raise error
    assert "s3://bucket/x" in str(caught.value)
    assert "AKIA123" not in str(caught.value)


def test_the_clients_credential_and_network_errors_are_told_apart():
    exceptions = pytest.importorskip("botocore.exceptions")
    with pytest.raises(ConfigError), storage_errors("writing"):
        raise exceptions.NoCredentialsError()
    with pytest.raises(StorageUnavailable), storage_errors("writing"):
        raise exceptions.EndpointConnectionError(endpoint_url="http://user:secret@host")


def test_credentials_in_a_url_are_not_told():
    with pytest.raises(ConfigError) as caught:
        RunStore("nosuch://user:secret@host/path?token=secret", "run-1")
    assert "secret" not in str(caught.value)


def test_what_a_store_says_of_credentials_is_in_no_traceback(capsys):
    with pytest.raises(StorageUnavailable) as caught, storage_errors("reading s3://bucket/x"):
        raise ConnectionResetError("signed with AWSSECRET/word by https://host/x?sig=AWSSECRET")
    assert "AWSSECRET" not in "".join(traceback.format_exception(caught.value))
