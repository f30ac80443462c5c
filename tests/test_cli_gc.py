"""`moe-replay archive gc` as a user meets it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from command import arguments

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import STAGES
from moe_replay.cli.app import archive
from moe_replay.cli.gc import gc
from moe_replay.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run of three committed iterations, and what a dead writer left of a fourth."""
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"seed": 1})
    for iteration in range(3):
        for stage in ("rollout", "routes", "training"):
            writer = store.begin(stage, iteration, {}, "d")
            writer.write_bytes("checkpoint/model" if stage == "training" else "part", b"x" * 100)
            writer.commit()
    store.begin("rollout", 3, {}, "d").write_bytes("part", b"half")
    return store


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `archive gc WORDS` in this process; returns what it printed."""

    def run(*words: str) -> str:
        archive(["gc", *words, "--root", str(tmp_path)], exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    return run


def test_by_default_all_runs_are_looked_at_and_nothing_is_changed(store, command):
    before = store.folder.files()
    told = json.loads(command("--grace", "0s", "--keep-iterations", "1", "--json"))
    assert told["deleted"] is False
    assert [row["objects"] for row in told["removable"]] == [2, 1, 1, 1, 1, 1, 1]
    assert sum(row["bytes"] for row in told["removable"]) >= 604
    assert store.folder.files() == before


def test_what_is_deleted_is_gone_and_the_next_look_finds_nothing(store, command):
    assert "removed" in command("run-1", "--grace", "0s", "--keep-last-checkpoint", "--delete")
    assert "nothing to remove" in command("run-1", "--grace", "0s", "--keep-last-checkpoint")
    assert [stage.expired_bytes for stage in store.status(0)] == [0, 0, 100, 0, 0]
    assert len(store.status(0)) == len(STAGES)


def test_a_young_leftover_is_left_alone_and_said_so(store, command):
    told = command()
    assert "left alone: run-1/iterations/00003/_attempt-rollout-" in told
    assert "nothing to remove" in told


def test_the_table_says_what_why_and_how_much_and_how_to_go_on(store, command, monkeypatch):
    monkeypatch.setattr("moe_replay.cli.gc.out.width", 160)
    told = command("run-1", "--grace", "0s", "--older-than", "0s")
    assert re.search(r"run-1/iterations/00000/routes +│ committed more than 0:00:00 ago +│ +1 │ +100", told)
    assert "no commit refers to it" in told
    assert "--delete" in told


@pytest.mark.parametrize(("words", "days"), [("30d", 30.0), ("12h", 0.5), ("90m", 0.0625)])
def test_ages_are_told_in_days_hours_and_minutes(words, days):
    _, bound, _ = archive.parse_args(["gc", "--older-than", words], exit_on_error=False)
    assert bound.arguments["older_than"].total_seconds() == days * 86400


def test_a_run_that_is_not_there_is_refused_before_anything_is_removed(store, command):
    before = store.folder.files()
    with pytest.raises(ConfigError, match="no run other"):
        command("run-1", "other", "--grace", "0s", "--delete")
    assert store.folder.files() == before


@pytest.mark.parametrize("named", [(), ("damaged", "run-1")])
def test_a_run_with_a_damaged_document_does_not_keep_others_from_being_cleaned(store, command, named, tmp_path):
    damaged = RunStore(str(tmp_path), "damaged")
    damaged.create_run({})
    damaged.folder.write("run.json", b"{")
    damaged.begin("rollout", 0, {}, "d").write_bytes("part", b"half")
    before = damaged.folder.files()
    told = json.loads(command(*named, "--grace", "0s", "--delete", "--json"))
    assert [row["name"].split("/")[0] for row in told["removable"]] == ["run-1"]
    assert told["left_alone"][0].startswith("damaged: object ")
    assert damaged.folder.files() == before


def test_no_iteration_to_keep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep at least 1"):
        gc("run-1", keep_iterations=0, root=str(tmp_path))


def test_in_a_pipe_a_row_is_a_line_whatever_the_width_of_a_terminal(store, command, tmp_path):
    words = ("run-1", "--grace", "0s", "--older-than", "0s")
    found = json.loads(command(*words, "--json"))["removable"]
    piped = arguments("archive", "gc", *words, "--root", str(tmp_path))
    narrow = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run(piped, capture_output=True, text=True, timeout=60, env=narrow, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [one["name"] for one in found] + ["all"]
    assert [row.split("│")[2].strip() for row in rows[:-1]] == [one["why"] for one in found]
