"""An interrupt stays one, whatever a library makes of it."""

import pytest

from moe_replay.interrupts import interrupts_kept


def cleaning_up_fails() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise ValueError("Task run is not set")  # noqa: B904 (as Prefect's engine does)


def test_error_raised_while_an_interrupt_is_handled_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        cleaning_up_fails()


def test_error_that_wraps_such_an_error_is_an_interrupt() -> None:
    def wrapped() -> None:
        try:
            cleaning_up_fails()
        except ValueError as error:
            raise RuntimeError("the flow run failed") from error

    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        wrapped()


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(ValueError, match="another"), interrupts_kept():
        raise ValueError("another")
