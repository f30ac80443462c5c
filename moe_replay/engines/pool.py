"""A pair of engines: started when first needed, shared by stages and by runs, replaced when one fails."""

import atexit
import threading
from pathlib import Path

from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess
from moe_replay.errors import ConfigError, EngineStopped, OutOfMemory
from moe_replay.sections import ResourcesConfig, RolloutConfig, TrainingConfig


class EnginePool:
    """One rollout engine and one training engine, each in its own process.

    An engine is only a cache of weights: any of them can be dropped at any time, the next call builds a fresh one.
    """

    def __init__(
        self,
        model: Path,
        weights: str,
        rollout: RolloutConfig,
        training: TrainingConfig,
        logs: Path,
        resources: ResourcesConfig = ResourcesConfig(),  # noqa: B008 (frozen)
    ):
        """`weights` names the weights of `model`, from which both engines start."""
        self._model = model
        self._weights = weights
        self._rollout_config = rollout
        self._training_config = training
        self._resources = resources
        self._logs = logs
        self._running: dict[str, EngineProcess] = {}
        self._ended = False
        self._starting = threading.Lock()
        """So that none is started while, or after, the pool ends."""
        atexit.register(self.close)

    def start(self) -> None:
        """Begin to build both engines without waiting: each spends its first seconds importing.

        Where they take turns on the same devices each is built when a stage first needs it: while the other rests.
        """
        if not self._resources.colocated:
            self.rollout()
            self.training()

    def rollout(self) -> EngineProcess:
        """The process of the vLLM engine (`moe_replay.engines.rollout.RolloutEngine`), or of what drives several."""
        arguments = (self._model, self._weights, self._rollout_config, self._resources)
        return self._get("rollout", "moe_replay.engines.replicas:make_rollout", arguments, rollout.ENVIRONMENT)

    def training(self) -> EngineProcess:
        """The process of the verl engine (`moe_replay.engines.training.TrainingEngine`)."""
        arguments = (self._model, self._weights, self._training_config, self._resources)
        return self._get("training", "moe_replay.engines.training:TrainingEngine", arguments, {})

    def take_smaller_micro_batches(self, failed: OutOfMemory, longest: int) -> int:
        """Have training engines built from now on take half the tokens a forward pass that `failed`; returns them.

        Raises ConfigError where they would not hold the longest sequence that the config allows, of `longest` tokens,
        or a rank's part of it.
        """
        now = failed.micro_batch_tokens or self._training_config.micro_batch_tokens
        sharing = self._resources.training_sequence_parallel_size
        least = -(-longest // sharing)
        if now <= least:
            raise ConfigError(
                f"{failed}; no smaller micro-batch holds a sequence of up to {longest} tokens "
                f"(rollout.max_prompt_tokens + rollout.max_response_tokens) on {sharing} rank(s) that share it: give "
                "it more memory, set training.recompute = true, share sequences among more ranks "
                "(resources.training_sequence_parallel_size), or allow shorter ones"
            )
        smaller = max(now // 2, least)
        self._training_config = self._training_config.model_copy(update={"micro_batch_tokens": smaller})
        return smaller

    def discard(self, name: str) -> None:
        """Stop the `rollout` or `training` engine, so that what comes next starts from a clean one."""
        if engine := self._running.pop(name, None):
            engine.stop()

    @property
    def ended(self) -> bool:
        """Whether it starts no engines any more."""
        return self._ended

    def end(self) -> None:
        """Stop all engines for good: what they are at in other threads ends with EngineStopped, as does a later use."""
        with self._starting:
            self._ended = True
        self.close()

    def close(self) -> None:
        """Stop all engines."""
        for name in list(self._running):
            self.discard(name)
        atexit.unregister(self.close)

    def _get(self, name: str, build: str, arguments: tuple, environment: dict[str, str]) -> EngineProcess:
        with self._starting:
            if self._ended:
                raise EngineStopped(f"no {name} engine is started any more, since the run ends")
            engine = self._running.get(name)
            if engine is None or not engine.alive:
                self.discard(name)
                engine = EngineProcess(build, arguments, name, self._logs / f"{name}.log", environment)
                self._running[name] = engine
            return engine
