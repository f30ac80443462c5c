"""An interrupt stays one, whatever a library makes of it."""

import signal

import pytest

from moe_replay.interrupts import interruptible, interrupts_kept, raise_lost_interrupt


def interrupted_while_cleaning_up() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("Task run is not set")  # noqa: B904 (as Prefect's engine does)


def interrupt_dropped() -> None:
    try:
        interrupted_while_cleaning_up()
    except ValueError:
        return  # as where a progress report may fail


def test_error_that_an_interrupt_became_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        interrupted_while_cleaning_up()


def test_a_process_that_is_asked_to_end_is_interrupted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_that_is_pressed_again_does_not_break_off_what_ends_because_of_it() -> None:
    ended = []

    def pressed_twice() -> None:
        with interruptible():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        pressed_twice()
    assert ended


def test_one_run_of_many_that_was_interrupted_is_no_failed_run() -> None:
    failed = []

    def runs() -> None:
        with interruptible():
            try:
                with interrupts_kept():
                    interrupted_while_cleaning_up()
            except Exception as error:
                failed.append(error)

    with pytest.raises(KeyboardInterrupt):
        runs()
    assert failed == []


def test_dropped_interrupt_comes_back_before_long_work() -> None:
    def works() -> None:
        with interruptible():
            interrupt_dropped()
            raise_lost_interrupt()
            pytest.fail("long work was begun")

    with pytest.raises(KeyboardInterrupt):
        works()


def test_dropped_interrupt_comes_back_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        interrupt_dropped()


def test_without_an_interrupt_errors_pass_as_they_are_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="another"), interruptible():
        raise ValueError("another")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_is_forgotten_when_the_command_is_over() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
    raise_lost_interrupt()
