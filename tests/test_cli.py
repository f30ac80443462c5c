"""The command line as a user meets it, in processes of its own. Nothing here trains."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rolled_out_run import rolled_out
from s3fs import S3FileSystem

from moe_replay.archive import storage_retries
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.lease import holding
from moe_replay.cli import main
from moe_replay.data.prompts import PromptTable
from moe_replay.stages.run import Run

Command = Callable[..., subprocess.CompletedProcess[str]]
Refused = Callable[..., str]
KEY, SECRET = "MARKERKEYID", "marker-secret-access-key"


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs `moe-replay WORDS` in an empty folder with an empty home."""
    (tmp_path / "work").mkdir()

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("moe-replay")), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path / "work",
            env={**os.environ, "MOE_REPLAY_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", **environment},
        )

    return run


@pytest.fixture
def refused_apart(command: Command, tmp_path: Path) -> Refused:
    """Runs a command that has to be refused at once, having started and written nothing; returns the message."""

    def run(*words: object, code: int = 2, **environment: str) -> str:
        done = command(*words, **environment)
        assert "Warning" not in done.stderr
        return message_of(done.returncode, done.stdout, done.stderr, code, tmp_path)

    return run


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """As `refused_apart`, in this process."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*words: object, code: int = 2, **environment: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in {"MOE_REPLAY_HOME": str(tmp_path / "home"), **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["moe-replay", *map(str, words)])
            with pytest.raises(SystemExit) as left:
                main()
        return message_of(left.value.code, *capfd.readouterr(), code, tmp_path)

    return run


def message_of(exit_code: object, out: str, told: str, code: int, folder: Path) -> str:
    """What a command told that was refused with `code`."""
    assert exit_code == code, told
    assert out == ""
    assert "Traceback" not in told
    assert told.lower().count("error") >= 1
    made = [path for path in (folder / "home").rglob("*") if path != folder / "home" / "runs"]
    assert made == []
    return told


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return rolled_out(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "words",
    [[], ["run"], ["compare"], ["counterfactual"], ["archive", "load"], ["predictor", "fit"], ["data"]],
    ids=lambda words: " ".join(words) or "moe-replay",
)
def test_help_of_every_command(command, words):
    done = command(*words, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "r9"], "unknown method 'r9': known are grpo, gspo, tis, r2, r3, pr2"),
        (["--set", "rollout.prompt=3"], "unknown config key 'rollout.prompt': did you mean 'prompts'?"),
        (["--set", "rollout.prompts"], "is not key=value"),
        (["--set", "training.mini_steps=3"], "training.mini_steps = 3 does not divide"),
        (["--set", "training.learning_rate=fast"], "training.learning_rate: Input should be a valid number"),
        (["--iterations", "0"], "iterations: Input should be greater than 0"),
        (["--set", "model.path=/no/such/model"], "model.path /no/such/model does not exist"),
        (["--set", "data.train=no-such.parquet"], "there is no Parquet file at no-such.parquet"),
        (["no-such.toml"], "the config no-such.toml can't be read (No such file or directory)"),
        (["--run-id", "../elsewhere"], "run id '../elsewhere' is not usable"),
        (["--run-id", "/tmp/elsewhere", "--json"], "run id '/tmp/elsewhere' is not usable"),
        (["--root", "nosuch://bucket"], "no file system serves nosuch://bucket"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cant_be_is_refused_before_anything_starts(refused, words, told):
    message = refused("run", *words)
    assert told in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--method", "r9"], "unknown method 'r9'"),
        (["run", "--set", "model.path=no-such-owner/model"], "could not be fetched from the hub"),
        (["ran"], "Unknown command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_in_a_process_of_its_own_is_a_message_and_an_exit_code(refused_apart, words, told):
    assert told in refused_apart(*words)


def test_every_wrong_key_of_a_config_is_told(refused, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("iteration = 3\n[rollout]\nprompt = 3\n")
    message = refused("run", path)
    assert "unknown config key 'iteration': did you mean 'iterations'?" in message
    assert "unknown config key 'rollout.prompt': did you mean 'prompts'?" in message


def test_a_config_that_is_no_toml_is_refused(refused, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("iterations = = 3\n")
    assert "is not valid TOML" in refused("run", path)


def test_replay_of_a_dense_model_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "(llama) is dense" in refused("run", "--method", "r3", "--set", f"model.path={tmp_path}")


def test_a_parquet_file_without_verls_columns_is_refused(refused, tmp_path):
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.table({"prompt": ["1+1="], "answer": ["2"]}), path)
    message = refused("run", "--set", f"data.train={path}")
    assert f"{path} lacks data_source, reward_model of verl's schema; its columns are prompt, answer" in message


def test_a_run_id_that_exists_with_another_config_is_refused(refused, run, tmp_path):
    config = run.model.parent / "run.toml"
    before = sorted(Path(run.root).rglob("*"))
    message = refused("run", config, "--run-id", "run-1", "--method", "grpo")
    assert "run run-1 exists with another config: method.name ('r3' -> 'grpo')" in message
    assert sorted(Path(run.root).rglob("*")) == before


def test_a_root_that_cant_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "check the root" in refused("run", "--root", tmp_path / "file" / "runs")


def test_a_home_that_cant_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "can't be made" in refused("run", MOE_REPLAY_HOME=str(tmp_path / "file" / "home"))


def s3_environment(folder: Path) -> dict[str, str]:
    """An S3 endpoint where nobody answers, and no credentials but the environment's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "HOME": str(folder),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Storage gets little time to come back, and its clients read the environment of the test alone."""
    monkeypatch.setattr(storage_retries, "LONGEST_FIRST_WAIT", 0.05)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("words", [["run"], ["archive", "verify", "run-1", "--json"]], ids=" ".join)
def test_storage_that_does_not_answer_is_told_without_credentials(refused, impatient, tmp_path, words):
    secrets = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SECRET}
    message = refused(*words, "--root", "s3://bucket/runs", code=1, **s3_environment(tmp_path), **secrets)
    assert "try again once the storage answers" in message
    assert KEY not in message
    assert SECRET not in message


def test_missing_credentials_are_told(refused_apart, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    message = refused_apart("run", "--root", "s3://bucket/runs", **s3_environment(tmp_path))
    assert "no credentials were found: set AWS_ACCESS_KEY_ID" in message


@pytest.mark.parametrize("words", [["run"], ["status", "run-1"]], ids=" ".join)
def test_a_password_in_the_root_is_refused_and_never_printed(refused, words):
    message = refused(*words, "--root", f"s3://{KEY}:{SECRET}@bucket/runs")
    assert "give those in the environment" in message
    assert KEY not in message
    assert SECRET not in message


@pytest.mark.parametrize("words", [["status"], ["resume"], ["archive", "inspect"], ["archive", "verify"]], ids=" ".join)
def test_a_run_that_does_not_exist_is_told(refused, words):
    assert "there is no run nothing under" in refused(*words, "nothing")
    assert "there is no run nothing under" in refused(*words, "nothing", "--json")


@pytest.mark.parametrize("words", [["rum"], ["run", "--metod", "r3"], ["run", "--iterations", "many"], ["status"]])
def test_a_misspelt_command_line_is_refused(refused, words):
    refused(*words)


def test_status_shows_what_is_committed(command, run):
    done = command("status", "run-1", "--root", run.root, "--json")
    shown = json.loads(done.stdout)
    states = {(row["iteration"], row["stage"]): row["state"] for row in shown["stages"]}
    assert states == {
        (0, "rollout"): "committed",
        (0, "routes"): "committed",
        (0, "training"): "missing",
    }
    assert all((row["bytes"] > 0) == (row["state"] == "committed") for row in shown["stages"])
    assert "committed" in command("status", "run-1", "--root", run.root).stdout


def test_status_shows_who_runs_the_run(command, run):
    words = ("status", "run-1", "--root", run.root)
    with holding(run.store().folder, print):
        running = json.loads(command(*words, "--json").stdout)["running"]
        shown = command(*words).stdout
    assert running["pid"] == os.getpid()
    assert 0 <= running["heartbeat_seconds_ago"] < 60
    assert f"pid {os.getpid()} since {running['since']}, heartbeat " in shown
    assert json.loads(command(*words, "--json").stdout)["running"] is None


def test_a_run_that_is_in_use_is_refused_before_anything_starts(refused, run):
    with holding(run.store().folder, print):
        before = sorted(path for path in Path(run.root).rglob("*") if not path.name.startswith("."))
        message = refused("resume", "run-1", "--root", run.root, code=1)
        assert sorted(path for path in Path(run.root).rglob("*") if not path.name.startswith(".")) == before
    assert f"pid {os.getpid()} runs it since" in message


def test_an_evaluation_that_is_in_use_is_refused_before_anything_starts(refused, run):
    with holding(RunStore(run.root, "scores").folder, print):
        message = refused("evaluate", "--model", "embedded", "--id", "scores", "--root", run.root, code=1)
        assert [path.name for path in (Path(run.root) / "scores").iterdir()] == ["_lease"]
    assert f"pid {os.getpid()} runs it since" in message


def test_inspect_counts_tokens_and_tells_where_routes_come_from(command, run):
    done = command("archive", "inspect", "run-1", "--root", run.root, "--json")
    shown = json.loads(done.stdout)
    assert {key: shown[key] for key in ("tokens", "sequences", "layers", "experts", "top_k")} == {
        "tokens": 30,
        "sequences": 6,
        "layers": 2,
        "experts": 8,
        "top_k": 2,
    }
    assert (shown["captured_rows"], shown["missing_rows"]) == (24, 6)
    assert shown["bytes_per_token"] == shown["bytes"] / 30
    assert shown["provenance"]["origins"][0]["weights_sha256"] == run.model_sha256
    assert "weights_sha256" in command("archive", "inspect", "run-1", "--root", run.root).stdout


@pytest.mark.parametrize(("iteration", "told"), [(3, "no routing archive of iteration 3"), (-1, "is negative")])
def test_an_iteration_without_archive_is_told(refused, run, iteration, told):
    assert told in refused("archive", "inspect", "run-1", "--root", run.root, "--iteration", iteration)


def test_verify_finds_nothing_wrong_with_what_is_whole(command, run):
    done = command("archive", "verify", "run-1", "--root", run.root, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"run_id": "run-1", "artifacts": 2, "problems": [], "removed": []}


def test_verify_lists_every_damaged_object(command, run, tmp_path):
    root = tmp_path / "runs"
    store = RunStore(run.root, "run-1")
    copied = {path: (Path(run.root) / "run-1" / path).read_bytes() for path in _files(Path(run.root) / "run-1")}
    for path, data in copied.items():
        target = root / store.run_id / path
        target.parent.mkdir(parents=True, exist_ok=True)
        damaged = path.endswith("part-00000.parquet") or "/ids/c/1/" in path
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damaged else data)
    done = command("archive", "verify", "run-1", "--root", root, "--json")
    assert done.returncode == 1
    problems = json.loads(done.stdout)["problems"]
    assert ["was altered" in problem for problem in problems] == [True, True]
    plain = command("archive", "verify", "run-1", "--root", root)
    assert (plain.returncode, plain.stdout.count("wrong:")) == (1, 2)


def test_verify_misses_what_something_was_made_from(command, run, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(run.root, root)
    (root / "run-1/iterations/00000/rollout/_committed.json").unlink()
    done = command("archive", "verify", "run-1", "--root", root, "--json")
    assert done.returncode == 1
    [problem] = json.loads(done.stdout)["problems"]
    assert "routes was made from its rollout, but object" in problem
    assert "rollout/_committed.json is missing" in problem


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def test_problems_of_reasoning_gym_are_written_in_verls_schema(command, tmp_path):
    done = command("data", "reasoning-gym", "chain_sum", "out.parquet", "--size", "8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.endswith("--set data.train=out.parquet\n")
    table = PromptTable.open(tmp_path / "work" / "out.parquet")
    assert (len(table), table.data_sources()) == (8, {"reasoning_gym/chain_sum"})


def test_an_unknown_task_of_reasoning_gym_is_refused_with_the_nearest(refused, tmp_path):
    assert "did you mean chain_sum" in refused("data", "reasoning-gym", "chain_sun", "out.parquet")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_port_that_is_taken_is_refused_and_no_server_starts(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is taken; choose another" in refused("ui", "--mlflow-port", port)
