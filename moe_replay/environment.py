"""What Prefect, MLflow and the engines must find in the environment before they are imported."""

import os

from moe_replay.config import home_folder


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
        # The first start of Prefect's own temporary server makes its database.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
