"""`moe-replay archive load` as a user meets it."""

import json

import numpy as np
import pytest
from archive_samples import commit_routes, make_trace, origin_of
from matplotlib.image import imread

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.app import archive
from moe_replay.errors import ConfigError


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs `archive load WORDS` in this process, on routes of iterations 0 and 2; returns what it printed."""
    monkeypatch.setenv("COLUMNS", "160")
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"seed": 1})
    for iteration in (0, 2):
        commit_routes(store, [make_trace(30, seed=n + iteration) for n in range(6)], None, iteration, codec="zstd")

    def run(*words: str) -> str:
        archive(["load", *words, "--root", str(tmp_path)], exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    return run


def test_the_table_has_every_placement_and_what_to_do_next(command):
    out = command("run-1", "--micro-batch-tokens", "60")
    for told in ("iteration 2, on 8 devices", "round robin", "plan of the previous iteration", "3 micro-batches"):
        assert told in out
    assert "hottest expert" in out
    assert "--slots 24     (a replica on each device)" in out.splitlines()[-1]


def test_json_has_every_number_and_the_plan(command):
    study = json.loads(command("run-1", "--devices", "4", "--slots", "20", "--json"))
    assert (study["iteration"], study["previous_iteration"], study["devices"], study["slots"]) == (2, 0, 4, 20)
    assert [(p["placement"], p["slots"]) for p in study["placements"]] == [
        ("linear", 16),
        ("round_robin", 16),
        *[(name, slots) for slots in (16, 20) for name in ("previous", "static", "micro_batch")],
    ]
    assert [layer["layer"] for layer in study["plan"]["layers"]] == [1, 2, 5]
    assert all(len(experts) == 5 for layer in study["plan"]["layers"] for experts in layer["devices"])


def test_the_first_iteration_has_no_plan_of_the_past(command):
    study = json.loads(command("run-1", "--iteration", "0", "--json"))
    assert study["previous_iteration"] is None
    assert "previous" not in {p["placement"] for p in study["placements"]}


def test_routes_of_another_model_make_no_plan(command, tmp_path):
    other = origin_of(num_experts=8, top_k=2)
    commit_routes(RunStore(str(tmp_path), "run-1"), [make_trace(30, 8, 2)], other, iteration=3, codec="zstd")
    assert json.loads(command("run-1", "--json"))["previous_iteration"] is None


def test_the_figure_is_drawn(command, tmp_path):
    figure = tmp_path / "load.png"
    out = command("run-1", "--slots", "24", "--figure", str(figure))
    assert f"drew {figure}" in out
    assert np.ptp(imread(figure)) > 0.5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--devices", "3"], "give 18 slots"),
        (["--slots", "8"], "at least 16 slots"),
        (["--iteration", "1"], "no routing archive of iteration 1"),
        (["--figure", "load.pdf"], "figures are PNG files"),
    ],
)
def test_what_cannot_be_studied_is_refused_with_the_way_out(command, words, told):
    with pytest.raises(ConfigError, match=told):
        command("run-1", *words)
