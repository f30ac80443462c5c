"""A run in one figure, and by layer."""

import struct

import numpy as np
import pytest
from run_samples import AGREEMENT_DROP, DIGEST, LAYERS, in_memory, make_run, statistics

from moe_replay.errors import ConfigError
from moe_replay.reports.dashboard import draw_dashboard
from moe_replay.reports.layers import draw_layers, layer_table
from moe_replay.reports.runs import read_results


def is_drawn(path) -> bool:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG\r\n\x1a\n") and width > 1200 and height > 500


def test_a_dashboard_is_drawn_of_a_run_with_predictors(tmp_path):
    results = read_results(make_run(in_memory(), "a", "pr2", iterations=3), extremes=False)
    draw_dashboard(results, tmp_path / "run.png")
    assert is_drawn(tmp_path / "run.png")


def test_a_dashboard_is_drawn_of_a_first_iteration_with_metrics_of_training_alone(tmp_path):
    store = make_run(in_memory(), "a", iterations=0)
    store.begin("training", 0, {}, DIGEST).commit({"mismatch/kl_k3": 0.0})
    results = read_results(store)
    draw_dashboard(results, tmp_path / "run.png")
    assert is_drawn(tmp_path / "run.png")
    with pytest.raises(ConfigError, match="stores no statistics by layer"):
        draw_layers(results, tmp_path / "layers.png")


def test_heat_maps_are_drawn_with_gaps_where_nothing_is_stored(tmp_path):
    store = make_run(in_memory(), "a", iterations=2)
    store.begin("training", 3, {}, DIGEST).commit({"mismatch/kl_k3": 0.1})
    draw_layers(read_results(store), tmp_path / "layers.png")
    assert is_drawn(tmp_path / "layers.png")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    results = read_results(make_run(in_memory(), "a", iterations=1))
    with pytest.raises(ConfigError, match=r"does not end with \.png"):
        draw_dashboard(results, tmp_path / "run.svg")


def test_the_table_by_layer_has_one_row_for_each_layer_and_its_own_numbers():
    found = statistics(np.random.default_rng(0), kappa=3, scale=1.0)
    rows = layer_table(found)
    assert [row["layer"] for row in rows] == list(LAYERS)
    assert rows[1]["agreement_last"] == found.mini_steps[2].agreement_L[1]
    assert rows[1]["agreement_first"] > rows[1]["agreement_last"] + AGREEMENT_DROP
    assert rows[2]["coverage_gap"] == pytest.approx(np.mean([step.coverage_gap_L[2] for step in found.mini_steps]))
    assert rows[0]["deviation_1"] == pytest.approx(0.02)
    load_E = found.load_LE[0]
    assert rows[0]["load_imbalance"] == pytest.approx(max(load_E) / np.mean(load_E))


def test_routers_that_tell_no_coverage_gap_have_no_such_column():
    found = statistics(np.random.default_rng(0), kappa=1, scale=1.0)
    silent = [step.model_copy(update={"coverage_gap_L": ()}) for step in found.mini_steps]
    rows = layer_table(found.model_copy(update={"mini_steps": tuple(silent)}))
    assert "coverage_gap" not in rows[0]
    assert "agreement" in rows[0]
