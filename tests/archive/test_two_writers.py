"""Two writers of one stage, on a store where each request of theirs may come at any time."""

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_store import Killed, Turns, stepped_run

from moe_replay.archive.artifacts import ArtifactRef
from moe_replay.archive.removal import remove
from moe_replay.archive.retention import find_removable
from moe_replay.errors import ConfigError

PATHS = ("a", "b/c")


def write_stage(store, content: bytes) -> ArtifactRef:
    writer = store.begin("evaluation", 0, {}, "d")
    for path in PATHS:
        writer.write_bytes(path, content)
    return writer.commit()


def contents(store, ref) -> set[bytes]:
    return {store.open(ref).read_bytes(path) for path in PATHS}


schedules = st.lists(st.integers(0, 1), max_size=40)
kills = st.dictionaries(st.integers(0, 1), st.integers(0, 20), max_size=2)


@pytest.mark.parametrize("puts_conditionally", [True, False])
@settings(max_examples=150, deadline=None)
@given(schedule=schedules, killed=kills, same=st.booleans())
def test_no_order_of_two_writers_and_no_kill_leaves_a_commit_that_is_not_whole(
    puts_conditionally, schedule, killed, same
):
    store = stepped_run(puts_conditionally)
    data = [b"first", b"first" if same else b"other"]
    results = Turns([lambda: write_stage(store, data[0]), lambda: write_stage(store, data[1])]).play(schedule, killed)
    assert all(isinstance(result, ArtifactRef | ConfigError | Killed) for result in results)
    ref = store.commit_of("evaluation", 0)
    refs = [result for result in results if isinstance(result, ArtifactRef)]
    if ref is None:
        assert refs == []
        ref = write_stage(store, b"third")
    elif puts_conditionally:
        assert set(refs) <= {ref}
    assert store.verify(ref) == []
    assert len(contents(store, ref)) == 1
    assert store.find("evaluation", 0, {}, "d") == ref


@settings(max_examples=150, deadline=None)
@given(schedule=schedules, died_after=st.integers(0, 20))
def test_what_was_found_of_a_dead_writer_may_be_removed_while_its_successor_commits(schedule, died_after):
    store = stepped_run(True)
    store.create_run({})
    root = store.name.rsplit("/", 1)[0]
    Turns([lambda: write_stage(store, b"first")]).play([], {0: died_after})
    found = find_removable(store, grace=timedelta(0)).removable
    if (ref := store.commit_of("evaluation", 0)) is None:
        ref, _ = Turns(
            [lambda: write_stage(store, b"first"), lambda: [remove(root, removable) for removable in found]]
        ).play(schedule, {})
    assert isinstance(ref, ArtifactRef)
    assert store.verify(ref) == []


@settings(max_examples=100, deadline=None)
@given(schedule=schedules)
def test_of_two_writers_that_live_one_commits_and_the_other_is_told(schedule):
    store = stepped_run(True)
    results = Turns([lambda: write_stage(store, b"first"), lambda: write_stage(store, b"other")]).play(schedule, {})
    refused = [result for result in results if isinstance(result, ConfigError)]
    assert len(refused) == 1
    (ref,) = [result for result in results if isinstance(result, ArtifactRef)]
    assert contents(store, ref) == {(b"first", b"other")[results.index(ref)]}
