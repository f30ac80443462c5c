"""`moe-replay resume --from-stage` up to where training goes on."""

import io

import pytest
from run_samples import CONFIG

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.superseding import generation_of
from moe_replay.cli.app import app
from moe_replay.cli.superseding import supersede_from
from moe_replay.errors import ConfigError


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def store(tmp_path) -> RunStore:
    """Two iterations, the second not evaluated yet."""
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"config": CONFIG})
    policy = {}
    for iteration in range(2):
        rollout = store.begin("rollout", iteration, policy, "d").commit()
        routes = store.begin("routes", iteration, {"rollout": rollout}, "d").commit()
        inputs = policy | {"rollout": rollout, "routes": routes}
        policy = {"policy": store.begin("training", iteration, inputs, "d").commit()}
        if iteration == 0:
            store.begin("evaluation", iteration, policy, "d").commit()
    return store


def number_committed(store: RunStore) -> int:
    return sum(stage.state == "committed" for n in store.iterations() for stage in store.status(n))


def test_what_is_superseded_is_told_by_iteration(store, capsys):
    supersede_from(store, "training", 0, agreed=True)
    told = capsys.readouterr().err
    assert "supersedes training, evaluation of iteration 0; rollout, routes, training of iteration 1. " in told
    assert "archive gc" in told
    assert number_committed(store) == 2


@pytest.mark.parametrize(("answer", "left"), [("y\n", 6), ("Yes\n", 6), ("n\n", 7), ("\n", 7), ("", 7)])
def test_on_a_terminal_it_is_asked_first(store, monkeypatch, capsys, answer, left):
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if left == 7:
        with pytest.raises(ConfigError, match="nothing was superseded"):
            supersede_from(store, "training", 1, agreed=False)
        assert generation_of(store) == 0
    else:
        supersede_from(store, "training", 1, agreed=False)
    assert "[y/N]" in capsys.readouterr().err
    assert number_committed(store) == left


def test_where_nobody_can_be_asked_it_has_to_be_agreed_beforehand(store, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match="--yes"):
        supersede_from(store, "training", 1, agreed=False)
    assert (number_committed(store), generation_of(store)) == (7, 0)
    capsys.readouterr()
    supersede_from(store, "training", 0, agreed=True, quiet=True)
    assert number_committed(store) == 2
    assert capsys.readouterr().err == ""


def test_nobody_is_asked_when_it_is_agreed(store, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    supersede_from(store, "training", 0, agreed=True)
    assert number_committed(store) == 2


@pytest.mark.parametrize(
    ("stage", "iteration", "told"),
    [
        ("training", 4, "has no iteration 4: it has 0 to 3"),
        ("training", -1, "has no iteration -1"),
        ("predictor", 0, "no stage 'predictor'; it has rollout, routes, training, evaluation"),
        ("../run", 0, "no stage '../run'"),
    ],
)
def test_what_the_run_does_not_have_is_refused(store, stage, iteration, told):
    with pytest.raises(ConfigError) as caught:
        supersede_from(store, stage, iteration, agreed=True)
    assert told in str(caught.value)
    assert number_committed(store) == 7


def test_what_is_not_committed_needs_no_superseding(store, capsys):
    supersede_from(store, "evaluation", 1, agreed=True)
    assert "nothing to supersede" in capsys.readouterr().err
    assert (number_committed(store), generation_of(store)) == (7, 0)


@pytest.mark.parametrize("words", [["--from-stage", "training"], ["--iteration", "1"]])
def test_stage_and_iteration_belong_together(store, tmp_path, words):
    with pytest.raises(ConfigError, match="belong together"):
        app(["resume", "run-1", "--root", str(tmp_path), *words], exit_on_error=False, result_action="return_value")
