"""What Prefect, MLflow and the engines must find in the environment before they are imported."""

import os
import sys
from pathlib import Path

from moe_replay.errors import ConfigError
from moe_replay.places import home_folder


def make_home() -> Path:
    """MOE_REPLAY_HOME, made where it is not there yet. Raises ConfigError when that can't be done."""
    home = home_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"MOE_REPLAY_HOME {home} can't be made ({error.strerror}); set it to a folder of yours"
        ) from None
    return home


def set_defaults() -> None:
    """Keep state under MOE_REPLAY_HOME and send no telemetry; whatever the user has set stays."""
    home = home_folder()
    defaults = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_MEMO_STORE_PATH": str(home / "prefect" / "memo_store.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        # Prefect's default serializer is pickle, which is never read here.
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        # In memory, leases of concurrency limits would be lost whenever the server restarts.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # By default each state of a task is a write of its own. In SQLite a request that writes at the same moment is
        # refused, and the client waits two seconds before it asks again.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        # Signs of life, from which the automation of `alerts install` tells flow runs whose process was killed.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # The first start of Prefect's own temporary server makes its database.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # Standard output is for what a command says.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    if not sys.stderr.isatty():
        # Bars of Hugging Face's libraries are for people.
        defaults["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
