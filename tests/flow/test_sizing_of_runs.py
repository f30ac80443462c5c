"""What `moe-replay plan` tells of a run, against what the run stored."""

from pathlib import Path

from compared_runs import Compared

from moe_replay.analysis.sizing import Workload, size_iteration
from moe_replay.archive.evolution import EvolutionArchive
from moe_replay.archive.routes import RouteArchive
from moe_replay.plan import stored_config
from moe_replay.routing.declared import declared_routers


def test_a_run_stores_what_its_sizing_tells(compared: Compared, tmp_path: Path) -> None:
    store = compared.store("pr2")
    config = stored_config(store)
    routes, training, predictor = (store.committed(stage, 1) for stage in ("routes", "training", "predictor"))
    assert routes is not None
    assert training is not None
    assert predictor is not None
    (tmp_path / "config.json").write_bytes(training.read_bytes("checkpoint/huggingface/config.json"))
    archive, evolution = RouteArchive.open(routes), EvolutionArchive.open(training)
    (length,) = {part.stop - part.start for part in archive.sequence_tokens(0, archive.num_sequences)}
    load = Workload(
        sequences=config.rollout.prompts * config.rollout.responses,
        mini_steps=config.training.mini_steps,
        evolution_tokens=config.evolution.tokens,
    )
    told = size_iteration(declared_routers(tmp_path), load, (length,))
    assert told.evolution is not None
    assert told.layers == archive.layers
    assert told.routes[0].tokens == archive.num_tokens
    assert told.routes[0].objects == len(routes.commit.objects)
    assert told.evolution.tokens == evolution.provenance.tokens
    stored = [one for one in training.commit.objects if one.path.startswith("evolution/")]
    assert told.evolution.objects == len(stored)
    (fitted,) = (one.size for one in predictor.commit.objects if one.path == "fitted.safetensors")
    assert told.evolution.predictor_bytes < fitted < told.evolution.predictor_bytes + 4096
