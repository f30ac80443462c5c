"""LoRA on two ranks under Ray against one rank in process, on the CPU."""

from pathlib import Path

import numpy as np
import pytest
from passes import BATCH, ROUTES
from safetensors.numpy import load_file
from trainer import LAYERS, E, Trainer, largest_difference
from training_calls import make_config

from moe_replay.config import RunConfig
from moe_replay.engines.process import EngineProcess

pytestmark = pytest.mark.slow


def config_of(ranks: int, train_routers: bool) -> RunConfig:
    lora = {"rank": 4, "alpha": 8, "train_routers": train_routers}
    training = {"micro_batch_tokens": 24, "learning_rate": 1e-3, "lora": lora}
    return make_config(training, resources={"training_world_size": ranks})


def written(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("train_routers", [False, True], ids=["frozen routers", "trained routers"])
def test_two_ranks_train_adapters_as_one_does_and_go_on_from_its_checkpoint(
    bench: EngineProcess, model: Path, tmp_path: Path, train_routers: bool
) -> None:
    log = tmp_path / "training.log"
    process = EngineProcess("training_calls:Bench", (), "training", log, {"OMP_NUM_THREADS": "1"})
    one, two = Trainer(bench), Trainer(process)
    try:
        for ranks, trainer in enumerate((one, two), start=1):
            assert trainer.open_model(model, config_of(ranks, train_routers)) == (E, 2, LAYERS)
            trainer.step(BATCH, ROUTES)
            trainer.save(tmp_path / f"{ranks} first")
        # Each goes on from what the other wrote.
        two.load_weights(tmp_path / "1 first", "of one rank", True)
        one.load_weights(tmp_path / "2 first", "of two ranks", True)
        seen = [trainer.step(BATCH, ROUTES) for trainer in (one, two)]
        for ranks, trainer in enumerate((one, two), start=1):
            trainer.save(tmp_path / f"{ranks} then")
    finally:
        process.stop()

    assert largest_difference(seen[0].log_probs, seen[1].log_probs) < 1e-5
    assert seen[1].loss == pytest.approx(seen[0].loss, abs=1e-5)
    assert seen[1].grad_norm == pytest.approx(seen[0].grad_norm, rel=1e-4)
    for point in ("first", "then"):
        by_one, by_two = written(tmp_path / f"1 {point}"), written(tmp_path / f"2 {point}")
        assert by_one.keys() == by_two.keys()
        for file, tensors in by_one.items():
            assert tensors.keys() == by_two[file].keys()
            for name, value in tensors.items():
                np.testing.assert_allclose(by_two[file][name], value, rtol=0, atol=1e-5, err_msg=f"{file} {name}")
