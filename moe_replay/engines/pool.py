"""A pair of engines: started when first needed, shared by stages and by runs, replaced when one fails."""

import atexit
from pathlib import Path

from moe_replay.config import RolloutConfig, TrainingConfig
from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess


class EnginePool:
    """One rollout engine and one training engine, each in its own process.

    An engine is only a cache of weights: any of them can be dropped at any time, the next call builds a fresh one.
    """

    def __init__(self, model: Path, weights: str, rollout: RolloutConfig, training: TrainingConfig, logs: Path):
        """`weights` names the weights of `model`, from which both engines start."""
        self._model = model
        self._weights = weights
        self._rollout_config = rollout
        self._training_config = training
        self._logs = logs
        self._running: dict[str, EngineProcess] = {}
        atexit.register(self.close)

    def start(self) -> None:
        """Begin to build both engines without waiting: each spends its first seconds importing."""
        self.rollout()
        self.training()

    def rollout(self) -> EngineProcess:
        """The process of the vLLM engine (`moe_replay.engines.rollout.RolloutEngine`)."""
        arguments = (self._model, self._weights, self._rollout_config)
        return self._get("rollout", "moe_replay.engines.rollout:RolloutEngine", arguments, rollout.ENVIRONMENT)

    def training(self) -> EngineProcess:
        """The process of the verl engine (`moe_replay.engines.training.TrainingEngine`)."""
        arguments = (self._model, self._weights, self._training_config)
        return self._get("training", "moe_replay.engines.training:TrainingEngine", arguments, {})

    def discard(self, name: str) -> None:
        """Stop the `rollout` or `training` engine, so that what comes next starts from a clean one."""
        if engine := self._running.pop(name, None):
            engine.stop()

    def close(self) -> None:
        """Stop all engines."""
        for name in list(self._running):
            self.discard(name)
        atexit.unregister(self.close)

    def _get(self, name: str, build: str, arguments: tuple, environment: dict[str, str]) -> EngineProcess:
        engine = self._running.get(name)
        if engine is None or not engine.alive:
            self.discard(name)
            engine = EngineProcess(build, arguments, name, self._logs / f"{name}.log", environment)
            self._running[name] = engine
        return engine
