"""Addresses of pages about a run, so that Prefect's UI leads to MLflow's and back, and how commands name a run."""

from urllib.parse import urlsplit

from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from moe_replay.servers import HOST, MLFLOW_PORT


def prefect_page() -> str:
    """Of the present flow run in Prefect's UI: PREFECT_UI_URL, by default the server that PREFECT_API_URL names."""
    return without_credentials(url_for("flow-run", obj_id=flow_run.id) or "")


def mlflow_page(tracking_uri: str, experiment_id: str, mlflow_run_id: str) -> str:
    """Of a run in MLflow's UI: the tracking server's, or where `moe-replay ui` shows a database by default."""
    is_server = tracking_uri.startswith(("http://", "https://"))
    base = without_credentials(tracking_uri).rstrip("/") if is_server else f"http://{HOST}:{MLFLOW_PORT}"
    return f"{base}/#/experiments/{experiment_id}/runs/{mlflow_run_id}"


def without_credentials(url: str) -> str:
    """The URL without the user and password that it may hold: pages are stored and shown in plain text."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
