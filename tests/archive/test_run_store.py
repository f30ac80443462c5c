"""A run in storage: its document, its name, the status of its stages, the root it lies under."""

import pytest
from archive_samples import commit_scores

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import STAGES, RunLayout
from moe_replay.archive.storage import Storage
from moe_replay.errors import ConfigError


def test_status_comes_from_storage_alone(store):
    commit_scores(store, iteration=3)
    store.begin("rollout", 4, {}, "d")
    again = RunStore(store.name.rsplit("/", 1)[0], "run-1")
    assert again.iterations() == [3, 4]
    states = {status.stage: status for status in again.status(3)}
    assert tuple(states) == STAGES
    assert (states["evaluation"].state, states["evaluation"].bytes) == ("committed", len(b"scores{}"))
    assert states["evaluation"].seconds is not None
    assert states["rollout"].state == "missing"
    assert {status.state for status in again.status(4)} == {"missing"}


def test_opening_a_run_creates_nothing(tmp_path):
    store = RunStore(str(tmp_path / "root"), "run-1")
    assert store.iterations() == []
    assert store.commit_of("rollout", 0) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_created_once_and_accepts_the_same_document(store):
    store.create_run({"config": {"lr": 1e-4}, "seed": 1}, about={"versions": {"verl": "1"}})
    store.create_run({"seed": 1, "config": {"lr": 1e-4}}, about={"versions": {"verl": "2"}})
    assert store.read_run() == {"config": {"lr": 1e-4}, "seed": 1, "about": {"versions": {"verl": "1"}}}


def test_a_run_with_another_document_is_refused_by_key(store):
    store.create_run({"config": {"lr": 1e-4, "steps": 2}, "seed": 1})
    with pytest.raises(ConfigError, match=r"config\.lr, new differ \(2 keys\)") as caught:
        store.create_run({"config": {"lr": 2e-4, "steps": 2}, "seed": 1, "new": "secret-value"})
    assert "secret-value" not in str(caught.value)


def test_reading_a_run_that_is_not_there_says_where_it_looked(store):
    with pytest.raises(ConfigError, match="no run run-1"):
        store.read_run()


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "-x", "a" * 65, "a\n", "ü"])
def test_run_ids_are_never_paths(run_id):
    with pytest.raises(ConfigError, match="run id"):
        RunStore("memory://x", run_id)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="evaluation"):
        RunLayout("r").stage(0, "evolve")


def test_a_root_that_can_be_written_is_left_as_it_was(store):
    store.probe_writable()
    assert Storage.at(store.name.rsplit("/", 1)[0]).sizes() == {}


def test_a_root_that_is_a_file_is_a_config_error(tmp_path):
    (tmp_path / "root").write_text("a file")
    with pytest.raises(ConfigError, match="permissions"):
        RunStore(str(tmp_path / "root"), "run-1").probe_writable()


def test_a_root_of_no_known_file_system_is_a_config_error():
    with pytest.raises(ConfigError, match="no file system serves"):
        RunStore("nosuch://bucket", "run-1")
