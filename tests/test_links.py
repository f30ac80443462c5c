"""Addresses that are stored with runs."""

import pytest

from tasks.links import mlflow_page, without_credentials


@pytest.mark.parametrize(
    ("uri", "base"),
    [
        ("sqlite:////home/me/mlflow.db", "http://127.0.0.1:5000"),
        ("postgresql://me:secret@db/mlflow", "http://127.0.0.1:5000"),
        ("https://mlflow.example.org/", "https://mlflow.example.org"),
        ("https://me:secret@mlflow.example.org:8443/below", "https://mlflow.example.org:8443/below"),
    ],
)
def test_a_runs_page_is_the_servers_and_holds_no_password(uri: str, base: str) -> None:
    assert mlflow_page(uri, "7", "abc") == f"{base}/#/experiments/7/runs/abc"


def test_only_credentials_are_left_out_of_an_address() -> None:
    assert without_credentials("http://u:p@host:1/a@b?c=d#e") == "http://host:1/a@b?c=d#e"
    assert without_credentials("") == ""
