"""What a user's shell says of other stores, servers and databases, which the stack and its clients must not follow."""

import os
import re

_SYSTEMS = "AWS|MLFLOW|PREFECT"
_KEPT = (
    "AWS_MAX_ATTEMPTS",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
    "MLFLOW_PORT",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL",
    "PREFECT_LOGGING_LEVEL",
    "PREFECT_PORT",
)
"""Settings of these systems that name no place and no credentials. There are too many others to know each."""
_FOREIGN = re.compile(rf"(?!(?:{'|'.join(_KEPT)})$)(?:{_SYSTEMS})_[A-Z0-9_]*|MOE_REPLAY_ROOT")

FORGET_IN_SHELL = f"""\
for moe_replay_name in $(awk 'BEGIN {{ for (name in ENVIRON) if (name ~ /^({_SYSTEMS})_[A-Z0-9_]*$/) print name }}')
do case $moe_replay_name in {"|".join(_KEPT)}) ;; *) unset "$moe_replay_name" ;; esac
done
unset moe_replay_name"""
"""Does in a shell what `forget_foreign_settings` does in this process."""


def forget_foreign_settings() -> None:
    """Take out of the environment what may name a store, a server, a database or credentials that are not the stack's.

    Call it before the defaults of this project are set, since some of them go by these names.
    """
    for name in list(os.environ):
        if _FOREIGN.fullmatch(name):
            del os.environ[name]
