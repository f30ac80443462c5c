"""`archive diff`, `export` and `import` as a user meets them."""

import json

import numpy as np
import pytest

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteOrigin, token_digest, write_routes
from moe_replay.cli.app import archive
from moe_replay.cli.exchange import parse_layers
from moe_replay.errors import ConfigError
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.samples import Sample, write_samples

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "mlp_only_layers": [0],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
    "vocab_size": 64,
}
ORIGIN = RouteOrigin(
    source="vllm",
    engine_version="0.28.0",
    dtype="bfloat16",
    weights_sha256="0" * 64,
    layers=(1, 2, 3),
    num_experts=16,
    top_k=4,
)


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs `moe-replay archive WORDS --root ROOT` in this process; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        archive([*map(str, words), "--root", str(tmp_path / "runs")], result_action="return_value")
        return capsys.readouterr().out

    return run


def capture(seed, changed=False):
    """Rows of 6 tokens in decoder layers 0 to 3, of which 0 is dense; with `changed`, other experts from token 3 on."""
    ids_RDK = np.random.default_rng(seed).random((6, 4, 16)).argsort(-1)[..., :4]
    ids_RDK[:, 0] = 0
    if changed:
        ids_RDK[3:, 2] = (ids_RDK[3:, 2] + 1) % 16
    return ids_RDK


def sample(number, changed):
    return Sample(
        sequence_id=number,
        prompt_row=number,
        group=0,
        data_source="none",
        prompt_ids=[number, 1, 2, 3],
        response_ids=[4, 5, 6],
        log_probs=[-1.0, -1.0, -1.0],
        text="",
        reward=0.0,
        truncated=True,
        trace=RoutingTrace.from_capture(capture(number, changed)[:, 1:], 7, 16, (1, 2, 3)),
    )


@pytest.fixture
def runs(tmp_path):
    """Runs one and two of the same 5 rollouts; in run two the routes of rollout 2 part at token 3."""
    for run_id in ("one", "two"):
        store = RunStore(str(tmp_path / "runs"), run_id)
        store.create_run({})
        samples = [sample(number, run_id == "two" and number == 2) for number in range(5)]
        writer = store.begin("rollout", 0, {}, "digest")
        write_samples(writer, samples)
        writer.commit()
        writer = store.begin("routes", 0, {}, "digest")
        write_routes(writer, [(each.trace, each.token_digest) for each in samples], ORIGIN)
        writer.commit()


def dump(path, numbers=range(5)):
    rows = [{"token_ids": [number, 1, 2, 3, 4, 5, 6], "routed_experts": capture(number).tolist()} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dump_of_an_engine_is_imported_and_compared_with_a_run(command, runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    file = dump(tmp_path / "dump.jsonl")
    told = command("import", file, "--run-id", "mydump", "--model", tmp_path / "model", "--source", "vllm")
    assert "imported 5 sequences of 35 tokens into run mydump, iteration 0: 30 rows captured, 5 missing" in told
    assert "archive inspect mydump" in told
    assert "origin 1 source" in command("inspect", "mydump")
    assert "are as committed" in command("verify", "mydump")
    assert json.loads(command("diff", "mydump", "one", "--json"))["agreement"] == 1


def test_layers_and_experts_describe_the_model_of_a_dump(command, tmp_path):
    rows = [np.random.default_rng(seed).random((3, 4, 16)).argsort(-1)[..., :4].tolist() for seed in range(2)]
    lines = [json.dumps({"token_ids": [1, 2, 3, 4], "routed_experts": routes}) for routes in rows]
    (tmp_path / "ok.jsonl").write_text("\n".join(lines))
    told = command("import", "ok.jsonl", "--run-id", "j1", "--layers", "0-3", "--experts", "16", "--source", "vllm")
    assert "imported 2 sequences of 8 tokens into run j1, iteration 0: 6 rows captured, 2 missing" in told
    assert "are as committed" in command("verify", "j1")


def test_gc_removes_what_an_import_that_was_killed_left(command, tmp_path):
    RunStore(str(tmp_path / "runs"), "killed").begin("routes", 0, {}, "digest").write_bytes("routes/zarr.json", b"{}")
    assert "killed/iterations/00000/_attempt-routes-" in command("gc", "--grace", "0s", "--json", "--delete")
    assert not (tmp_path / "runs" / "killed").exists()


def test_a_model_with_code_of_its_own_is_refused_without_running_it(command, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    auto_map = {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "harm", "auto_map": auto_map}))
    (folder / "harm.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    with pytest.raises(ConfigError, match="give --layers and --experts"):
        command("import", dump(tmp_path / "dump.jsonl"), "--run-id", "x", "--model", folder)
    assert not (tmp_path / "harm").exists()


def test_diff_tells_where_two_runs_part(command, runs):
    found = json.loads(command("diff", "one", "two@0", "--json"))
    assert (found["a"], found["b"], found["same_tokens"], found["shared_sequences"]) == ("one@0", "two@0", True, 5)
    assert found["compared_rows"] == 30
    assert found["token_fraction"] == 3 / 30
    assert found["parting"]["positions"] == [3, 3, 3, 3, 3]
    assert (found["parting"]["in_prompt"], found["parting"]["in_response"]) == (1, 0)  # token 3 is the prompt's last
    assert [row["parted_sequences"] for row in found["layers"]] == [0, 1, 0]
    assert (found["worst"][0]["sequence_a"], found["worst"][0]["first_layer"]) == (2, 2)
    plain = command("diff", "one", "two")
    for told in ("same tokens", "by layer", "worst sequences", "--figure diff.png"):
        assert told in plain


def test_diff_draws_a_heat_map(command, runs, tmp_path):
    assert "drew diff.png" in command("diff", "one", "two", "--figure", "diff.png")
    assert (tmp_path / "diff.png").read_bytes()[:4] == b"\x89PNG"


def test_diff_of_other_tokens_says_what_to_do(command, runs, tmp_path):
    command("import", dump(tmp_path / "dump.jsonl", [7]), "--run-id", "other", "--layers", "1-3", "--experts", "16")
    told = command("diff", "one", "other")
    assert "no sequence in common" in told
    assert "RUN@ITERATION" in told


@pytest.mark.parametrize("form", ["parquet", "safetensors", "npz"])
def test_an_export_is_imported_elsewhere(command, runs, form):
    file = f"routes.{form}"
    told = json.loads(command("export", "two", file, "--layers", "1,3", "--json"))
    assert (told["format"], told["tokens"], told["layers"]) == (form, 35, [1, 3])
    command("export", "two", file, "--overwrite")
    assert f"archive import {file}" in command("export", "two", file, "--overwrite")
    command("import", file, "--run-id", "back")
    assert json.loads(command("diff", "two", "back", "--json"))["agreement"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "one", "routes.csv"], "ends with none of .parquet, .safetensors, .npz"),
        (["export", "one", "nowhere/routes.npz"], "there is no folder nowhere"),
        (["export", "one", "routes.npz", "--layers", "1;2"], "write them like 0-11,20"),
        (["export", "one", "routes.npz", "--layers", "3-1"], "the range falls"),
        (["export", "one", "routes.npz", "--layers", "1,99"], "no routes of decoder layers [99]; it has (1, 2, 3)"),
        (["export", "nothing", "routes.npz"], "there is no run nothing"),
        (["diff", "one", "two@last"], "neither a run nor RUN@ITERATION"),
        (["diff", "one", "two@4", "--figure", "diff.jpg"], "does not end with .png"),
        (["diff", "one", "two@4", "--figure", "nowhere/diff.png"], "there is no folder nowhere"),
        (["diff", "one", "two@4"], "no routing archive of iteration 4"),
        (["import", "dump.jsonl", "--run-id", "x"], "--model, or give --layers and --experts"),
        (["import", "dump.jsonl", "--run-id", "x", "--experts", "16"], "give both, or --model"),
        (["import", "dump.jsonl", "--run-id", "x", "--layers", "5-3", "--experts", "16"], "the range falls"),
        (["import", "dump.jsonl", "--run-id", "x", "--layers", "0-99999999999", "--experts", "16"], "below 65536"),
        (["import", "dump.jsonl", "--run-id", "x", "--layers", "65536", "--experts", "16"], "go up to 65536"),
        (["import", "dump.jsonl", "--run-id", "x", "--layers", "1-3", "--experts", "0"], "1 to 65536 experts"),
        (["import", "dump.jsonl", "--run-id", "x", "--model", "org/name"], "org/name gives no model"),
        (["import", "dump.jsonl", "--run-id", "x", "--model", "empty"], "empty gives no model"),
        (["import", "dump.jsonl", "--run-id", "../x", "--layers", "1-3", "--experts", "16"], "is not usable"),
        (["import", "dump.jsonl", "--run-id", "one", "--layers", "1-3", "--experts", "16"], "a run that trains"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cant_be_is_refused(command, runs, tmp_path, words, told):
    dump(tmp_path / "dump.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        command(*words)
    assert told in str(caught.value)
    assert not (tmp_path / "runs" / "x").exists()


def test_layers_are_read_as_ranges():
    assert parse_layers("0-3,7,5-5") == (0, 1, 2, 3, 5, 7)
    assert parse_layers("65535,0000001") == (1, 65535)


def test_token_digests_of_a_dump_are_those_of_a_rollout():
    assert sample(1, False).token_digest == token_digest([1, 1, 2, 3, 4, 5, 6])
