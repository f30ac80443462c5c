"""`moe-replay compare` and `dashboard` as a user meets them."""

import json

import pytest
from run_samples import DIGEST, make_run

from moe_replay.cli.app import app
from moe_replay.errors import ConfigError


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs `moe-replay WORDS --root ROOT` in this process; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        app([*map(str, words), "--root", str(tmp_path / "runs")], exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    return run


@pytest.fixture
def runs(tmp_path):
    """Ids of runs of two methods from two seeds."""
    made = [
        make_run(tmp_path / "runs", f"{method}-{seed}", method, seed, scale=scale)
        for method, scale in (("grpo", 1.0), ("r3", 0.1))
        for seed in (0, 1)
    ]
    return [store.run_id for store in made]


def test_runs_are_compared_in_a_table_with_verdicts_and_the_way_on(runs, command, monkeypatch):
    monkeypatch.setattr("moe_replay.cli.compare.out.width", 140)
    told = command("compare", *runs)
    assert "against grpo" in told
    assert "Mismatch KL(k3), against grpo: lower: r3" in told
    assert "Reward, last third, against grpo: too few values: r3" in told
    assert "With 2 seeds a method intervals are too narrow" in told
    assert "compare grpo-0 grpo-1 r3-0 r3-1 --out report --root" in told


def test_json_is_the_whole_comparison_and_nothing_else(runs, command):
    (group,) = json.loads(command("compare", *runs, "--baseline", "r3", "--json"))["groups"]
    assert group["baseline"] == "r3"
    assert group["methods"][0]["runs"] == [{"run_id": "grpo-0", "seed": 0}, {"run_id": "grpo-1", "seed": 1}]


def test_a_report_is_written_where_asked(runs, command, tmp_path):
    told = command("compare", *runs, "--out", "report")
    assert "wrote report/report.html, with figures" in told
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "compare grpo-0 grpo-1 r3-0 r3-1 --out report --root" in page


def test_quiet_names_the_report_and_says_nothing_else(runs, command):
    assert command("compare", *runs, "--out", "report", "--quiet") == "report/report.html\n"
    assert command("compare", *runs, "--quiet") == ""


def test_what_says_how_to_train_is_refused_where_nothing_is_trained(runs, command):
    with pytest.raises(ConfigError, match="--seeds, --iterations say how to train"):
        command("compare", *runs, "--iterations", "4", "--seeds", "3")


def test_a_comparison_that_can_not_be_is_refused_before_anything_is_trained(command, runs):
    with pytest.raises(ConfigError, match="give one or the other"):
        command("compare", *runs, "--methods", "grpo")
    with pytest.raises(ConfigError, match="the baseline 'tis' is none of the methods to train, grpo, r3; add it"):
        command("compare", "--methods", "grpo,r3", "--baseline", "tis")
    with pytest.raises(ConfigError, match="run c-pr2-s0 of the comparison"):
        command("compare", "--methods", "grpo,pr2", "--seeds", "0", "--name", "c", "--set", "training.mini_steps=1")
    for setting in ("method.clip_low=0.1", "seed=7", "tracking.comparison=mine"):
        with pytest.raises(ConfigError, match=f"--set {setting.partition('=')[0]}: a comparison sets method, seed"):
            command("compare", "--methods", "grpo,r3", "--set", setting)
    with pytest.raises(ConfigError, match="seeds are whole numbers"):
        command("compare", "--methods", "grpo", "--seeds", "one")


def test_no_run_and_a_wrong_run_are_refused(runs, command):
    with pytest.raises(ConfigError, match="name runs to compare, or methods to train"):
        command("compare")
    with pytest.raises(ConfigError, match="no run other"):
        command("compare", *runs, "other")


def test_a_dashboard_is_drawn_and_what_it_lacks_is_told(runs, command, tmp_path):
    store = make_run(tmp_path / "runs", "live", iterations=1)
    store.begin("rollout", 1, {}, DIGEST).commit()
    told = command("dashboard", "live", "run.png", "--layers", "layers.png")
    assert "drew run.png and layers.png of 1 iterations; iterations not completed: 1" in told
    assert (tmp_path / "run.png").exists()
    assert (tmp_path / "layers.png").exists()


def test_a_figure_that_could_not_be_written_is_refused_before_anything_is_read(command):
    with pytest.raises(ConfigError, match="no folder"):
        command("dashboard", "not-looked-for", "nowhere/run.png")
