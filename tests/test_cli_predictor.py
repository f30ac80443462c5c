"""`moe-replay predictor` as a user meets it."""

import json
from pathlib import Path

import pytest
from predictor_samples import LAYERS, PLANTED, make_run, train, train_and_fit

from moe_replay.cli.app import predictor
from moe_replay.cli.predictor import fit
from moe_replay.errors import ConfigError
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.stages.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three iterations with predictors."""
    run = make_run(tmp_path_factory.mktemp("runs"))
    train_and_fit(run, 3)
    return run


@pytest.fixture
def command(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs `predictor WORDS` in this process on a wide terminal; returns what it printed."""
    monkeypatch.setattr("moe_replay.cli.predictor.out.width", 160)

    def words(*given: str, root: str = run.root) -> str:
        predictor([*given, "--root", root], exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    return words


def test_report_shows_what_the_run_stored(run, command):
    told = json.loads(command("report", "run-1", "--json"))
    assert told["iteration"] == 2
    assert [layer["factor"] > 0 for layer in told["layers"]] == [layer == PLANTED for layer in LAYERS]
    assert json.loads(command("report", "run-1", "--iteration", "0", "--json"))["iteration"] == 0


def test_tables_name_evidence_layers_and_what_to_do_next(command):
    told = command("report", "run-1")
    assert "1 of 2" in told
    assert "±" in told
    assert "KL not lowered enough" in told
    assert "predictor fit run-1 --iteration 2 --root " in told
    first = command("report", "run-1", "--iteration", "0")
    assert "nothing: there is no fit before it" in first


def test_fit_by_the_runs_settings_is_what_the_run_has(command):
    assert json.loads(command("fit", "run-1", "--json")) == json.loads(command("report", "run-1", "--json"))


def test_fit_with_other_settings_changes_nothing_in_the_run(run, command, tmp_path):
    before = run.store().folder.files()
    told = command("fit", "run-1", "--set", "predictor.objective=delta_kl", "--out", str(tmp_path / "made"))
    assert "delta_kl" in told
    assert run.store().folder.files() == before
    made = EvolutionPredictor.load(tmp_path / "made" / "predictor.safetensors")
    assert (list(made.weights), made.provenance.objective) == ([PLANTED], "delta_kl")
    assert json.loads((tmp_path / "made" / "report.json").read_text())["objective"] == "delta_kl"


def test_evolution_alone_is_enough_to_fit(command, tmp_path):
    bare = make_run(tmp_path, method="r3", evolution__record=True)
    for iteration in range(3):
        train(bare, iteration)
    told = json.loads(command("fit", "run-1", "--json", root=str(tmp_path)))
    assert (told["iteration"], told["layers"][0]["factor"] > 0) == (2, True)
    served = told["layers"][0]["served"]
    assert served["factors"][0]["kl"] < served["kl_zero"]
    with pytest.raises(ConfigError, match="no predictors of any iteration"):
        command("report", "run-1", root=str(tmp_path))


def test_gains_are_drawn(command, tmp_path):
    for words in (["report"], ["fit", "--set", "predictor.judged_on=held_out"]):
        path = tmp_path / f"{words[0]}.png"
        assert f"drew {path}" in command(words[0], "run-1", "--figure", str(path), *words[1:])
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_fit_that_nothing_judged_is_not_drawn(command, tmp_path):
    with pytest.raises(ConfigError, match="no evidence to draw"):
        command("report", "run-1", "--iteration", "0", "--figure", str(tmp_path / "gains.png"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "training.learning_rate=1"], "depends on the section predictor alone"),
        (["--set", "predictor.rigde=1"], "did you mean 'ridge'?"),
        (["--set", "predictor.ridge=-1"], "greater than 0"),
        (["--iteration", "7"], "no router evolution of iteration 7; it has that of 0, 1, 2"),
        (["--figure", "gains.pdf"], "figures are PNG files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_fitted_is_told(command, words, told):
    with pytest.raises(ConfigError, match=told):
        command("fit", "run-1", *words)


def test_nothing_is_written_into_the_run(run, tmp_path):
    inside = Path(run.root) / "run-1" / "iterations"
    with pytest.raises(ConfigError, match="which is never changed"):
        fit("run-1", out_=inside, root=run.root)
