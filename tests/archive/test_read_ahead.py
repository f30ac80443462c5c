"""Parts come in order, one ahead of the caller and no more."""

import threading

import pytest

from moe_replay.archive.read_ahead import read_ahead


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_parts_come_in_order(number: int) -> None:
    assert list(read_ahead(str, range(number))) == [str(n) for n in range(number)]


def test_the_next_part_is_read_while_the_caller_works_and_the_one_after_is_not() -> None:
    begun = [threading.Event() for _ in range(4)]

    def read(number: int) -> int:
        begun[number].set()
        return number

    parts = read_ahead(read, range(4))
    assert next(parts) == 0

    assert begun[1].wait(10)
    assert not begun[2].is_set()


def test_an_error_is_raised_in_the_place_of_its_part() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise OSError("gone")
        return number

    parts = read_ahead(read, range(4))

    assert [next(parts), next(parts)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(parts)
