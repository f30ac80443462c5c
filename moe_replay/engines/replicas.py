"""vLLM engines that share out the prompts of a rollout, each a Ray actor with a device, or several, of its own.

Shares are cut by the config, not by the number of replicas, and each is sampled by itself: whichever replica takes one
gives the same responses. A share that was at work when its replica died goes to another.
"""

import logging
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_replay.engines import rollout
from moe_replay.engines.process import Progress, no_progress
from moe_replay.engines.ray_cluster import RayCluster, in_one_line
from moe_replay.engines.rollout import Request, Response, RolloutEngine, shares_of
from moe_replay.errors import EngineLost
from moe_replay.routing.trace import refuse_dead_capture
from moe_replay.sections import ResourcesConfig, RolloutConfig

_logger = logging.getLogger(__name__)


class Held(NamedTuple):
    """What an engine holds; see the attributes of `RolloutEngine`."""

    weights: str | None
    predictor_sha256: str | None
    merge_fidelity: float | None
    gates_sha256: str | None


class Replica(RolloutEngine):
    """An engine that others ask from their processes."""

    def about(self) -> tuple[int, int, tuple[int, ...], str, int]:
        """(E, K, decoder layers with experts, vLLM's version, process id)."""
        return self.num_experts, self.top_k, self.layers, self.version, os.getpid()

    def held(self) -> Held:
        """What is loaded."""
        return Held(self.weights, self.predictor_sha256, self.merge_fidelity, self.gates_sha256)

    def load_and_tell(self, folder: Path, weights: str, predictor: tuple[Path, str] | None) -> Held:
        """`load`, and what is held afterwards."""
        self.load(folder, weights, predictor)
        return self.held()

    def sample_share(self, requests: Sequence[Request], first: int, temperature: float) -> list[Response]:
        """The responses to a share, whose first request has the number `first` in the batch."""
        prompts = self._tokenize([request.messages for request in requests], first)
        return self._sample(prompts, requests, temperature, no_progress)


class RolloutReplicas:
    """Several engines behind what stages ask of one (`RolloutEngine`)."""

    def __init__(self, model: Path, weights: str, config: RolloutConfig, resources: ResourcesConfig):
        """Raises ConfigError when Ray can't be reached or has no room for them, else as a single engine."""
        self.config = config
        self._colocated = resources.colocated
        self._wanted, self._devices = resources.rollout_replicas, resources.rollout_tensor_parallel_size
        self._build = (model, weights, config, resources)
        key = "resources.rollout_replicas" + (" * rollout_tensor_parallel_size" if self._devices > 1 else "")
        self._cluster = RayCluster(self._wanted * self._devices, key, resources.colocated)
        self._replicas: list[Any] = []
        self._complete()
        self.num_experts, self.top_k, self.layers, self.version, _ = self._of_all("about")[0]
        self._hold(self._of_all("held"))

    @property
    def pids(self) -> list[int]:
        """Process ids of the replicas, on their machines."""
        return [pid for *_, pid in self._of_all("about")]

    def rest(self) -> None:
        """As `RolloutEngine.rest`, in all replicas; one that has died rests already."""
        import ray
        from ray.exceptions import RayActorError

        if not self._colocated:
            return
        for replica, resting in [(one, one.rest.remote()) for one in self._replicas]:
            try:
                ray.get(resting)
            except RayActorError as error:
                self._lose(replica, error)

    def load(self, folder: Path, weights: str, predictor: tuple[Path, str] | None = None) -> None:
        """As `RolloutEngine.load`, in all replicas; those that died are replaced first.

        `folder` and the predictor's file must be where replicas on other machines find them too.
        """
        if (weights, predictor and predictor[1]) == (self.weights, self.predictor_sha256):
            return
        self._complete()
        try:
            self._hold(self._of_all("load_and_tell", folder, weights, predictor))
        except Exception:
            self._hold(self._of_all("held"))
            raise

    def generate(self, requests: Sequence[Request], temperature: float, progress: Progress) -> list[Response]:
        """As `RolloutEngine.generate`. Raises EngineLost when the last replica dies at work."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        shares = shares_of(len(requests), self.config.share)
        waiting, idle = deque(range(len(shares))), deque(self._replicas)
        at_work: dict[Any, tuple[int, Any]] = {}
        sampled: dict[int, list[Response]] = {}
        while len(sampled) < len(shares):
            while waiting and idle:
                number, replica = waiting.popleft(), idle.popleft()
                share = shares[number]
                at_work[replica.sample_share.remote(requests[share], share.start, temperature)] = number, replica
            progress(sum(map(len, sampled.values())), len(requests), "responses")
            (done,), _ = ray.wait(list(at_work), num_returns=1)
            number, replica = at_work.pop(done)
            try:
                sampled[number] = ray.get(done)
                idle.append(replica)
            except RayActorError as error:
                waiting.appendleft(number)
                self._lose(replica, error)
            except RayTaskError as error:
                raise error.cause from error
        responses = [response for number in range(len(shares)) for response in sampled[number]]
        refuse_dead_capture([response.trace for response in responses])
        progress(len(requests), len(requests), "responses")
        return responses

    def _complete(self) -> None:
        """Start as many replicas as are missing; each waits for a device."""
        import ray

        on_gpu = self._cluster.device == "GPU"
        # Ray would give each one thread, and the number of threads decides how sums are rounded.
        threads = {} if on_gpu else {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        variables = {name: os.environ.get(name, value) for name, value in (rollout.ENVIRONMENT | threads).items()}
        actor = ray.remote(Replica).options(
            num_cpus=1 if on_gpu else self._devices,
            num_gpus=self._devices if on_gpu else 0,
            runtime_env={"env_vars": variables},
        )
        self._replicas += [actor.remote(*self._build) for _ in range(self._wanted - len(self._replicas))]

    def _lose(self, replica: Any, error: Exception) -> None:
        self._replicas.remove(replica)
        if not self._replicas:
            raise EngineLost(
                f"the last of {self._wanted} rollout replicas died: {in_one_line(error)}; a retry starts fresh ones"
            ) from error
        _logger.warning("a rollout replica died, its share goes to another: %s", in_one_line(error))

    def _of_all(self, method: str, *args: Any) -> list[Any]:
        """What every replica answers. Raises what one of them raised; EngineLost when one died."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get([getattr(replica, method).remote(*args) for replica in self._replicas])
        except RayActorError as error:
            raise EngineLost(
                f"a rollout replica (of {self._wanted}) died: {in_one_line(error)}; a retry starts fresh ones"
            ) from error
        except RayTaskError as error:
            raise error.cause from error

    def _hold(self, held: list[Held]) -> None:
        """Note what the replicas hold; nothing that can be relied on where they differ."""
        same = held[0] if len(set(held)) == 1 else Held(None, None, None, None)
        self.weights, self.predictor_sha256, self.merge_fidelity, self.gates_sha256 = same


def make_rollout(
    model: Path, weights: str, config: RolloutConfig, resources: ResourcesConfig
) -> RolloutEngine | RolloutReplicas:
    """One engine in this process, or as many replicas as the config asks for. Raises as they do."""
    if resources.rollout_replicas == 1:
        return RolloutEngine(model, weights, config, resources)
    return RolloutReplicas(model, weights, config, resources)
