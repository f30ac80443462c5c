"""Tasks that are tried again, and what is heard of it."""

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL, temporary_settings

from moe_replay.errors import ConfigError, EngineLost
from tasks.retry import hearing_retries, is_transient


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (
            EngineLost("the rollout engine ended\nEnd of its log"),
            [
                "rollout-3 is tried again, attempt 2 of 3: the rollout engine ended\nEnd of its log",
                "rollout-3 is tried again, attempt 3 of 3: the rollout engine ended\nEnd of its log",
            ],
        ),
        (ConfigError("no such model"), []),
    ],
    ids=["transient", "permanent"],
)
def test_what_is_tried_again_is_told_and_the_last_failure_is_not(
    prefect_api: str, error: Exception, heard: list[str]
) -> None:
    @task(task_run_name="rollout-3", retries=2, retry_condition_fn=is_transient, cache_policy=NO_CACHE)
    def fail() -> None:
        raise error

    @flow(persist_result=False)
    def once() -> None:
        fail()

    told: list[str] = []
    server = temporary_settings({PREFECT_API_URL: prefect_api})
    with server, hearing_retries(told.append), pytest.raises(type(error)):
        once()
    assert told == heard
