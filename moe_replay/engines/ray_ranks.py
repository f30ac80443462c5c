"""Ranks of training under Ray: verl's `RayWorkerGroup` of our `ReplayWorker`, driven from the engine's process.

A batch is cut into equal shares of sequences, after ordering it so that the shares weigh the same; routes, advantages
and sampled rows are fields of the batch and go with their sequences. Ranks that share sequences get the same share, and
the first of them tells what came of it. What comes back is put into the order of the batch again.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.engines.ranks import RouterShape
from moe_replay.engines.ray_cluster import RayCluster, in_one_line
from moe_replay.errors import ConfigError, EngineLost
from moe_replay.sections import ResourcesConfig, TrainingConfig

if TYPE_CHECKING:
    from tensordict import TensorDict

_GRACE_SECONDS = 10.0
"""How long the other ranks have to tell what they died of, once one has failed; they may be waiting for it forever."""


class RayRanks:
    """As many ranks as asked for, each with a GPU of the Ray cluster, or with a CPU where there is none."""

    def __init__(self, training: TrainingConfig, resources: ResourcesConfig):
        self._training = training
        self._resources = resources
        self._cluster = RayCluster(resources.training_world_size, "resources.training_world_size", resources.colocated)
        self._group: Any = None
        self._stuck = False
        """Whether ranks are still at a call that failed on others: they may be waiting for those forever."""
        # verl's modules look for their platform when they are imported, and a driver need not have the workers' device.
        if self._cluster.device == "CPU":
            os.environ["VERL_PLATFORM"] = "cpu"

    def build(self, model: Path) -> RouterShape:
        """Workers are started with the first model and hold another afterwards."""
        if self._group is None:
            self._group = self._start(model)
        return self._ask("build", model)[0]

    def restore(self, folder: Path) -> None:
        """Every rank takes its shard of the optimizer's state."""
        self._ask("load_checkpoint", str(folder))

    def save(self, folder: Path) -> None:
        """Shards are gathered by the first rank, which writes.

        Raises ConfigError when it wrote to another machine's disk.
        """
        self._ask("save_checkpoint", str(folder))
        if not any(folder.iterdir()):
            raise ConfigError(
                f"the first rank wrote its checkpoint to {folder} of its own machine, and this one has nothing there: "
                "with ranks on other machines MOE_REPLAY_HOME must be a folder that all of them share"
            )

    def score(self, batch: "TensorDict") -> dict[str, Any]:
        """A pass without gradient, each rank over its share."""
        return self._compute("infer_batch", batch)

    def step(self, batch: "TensorDict") -> dict[str, Any]:
        """One optimizer step of all ranks."""
        return self._compute("train_batch", batch)

    def _start(self, model: Path) -> Any:
        import ray
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

        from moe_replay.engines.rank_worker import ReplayWorker

        on_gpus = self._cluster.device == "GPU"
        return RayWorkerGroup(
            resource_pool=RayResourcePool([self._resources.training_world_size], use_gpu=on_gpus, max_colocate_count=1),
            ray_cls_with_init=RayClassWithInitArgs(ray.remote(ReplayWorker), model, self._training, self._resources),
            bin_pack=False,  # ranks may lie on several machines
            device_name="cuda" if on_gpus else "cpu",
            worker_env={} if on_gpus else {"VERL_PLATFORM": "cpu"},
        )

    def _compute(self, method: str, batch: "TensorDict") -> dict[str, Any]:
        import ray
        from verl.utils import tensordict_utils as tu

        shares = self._resources.training_shares
        order = self._balanced(batch, shares)
        ordered = tu.index_select_tensor_dict(batch, order)
        tu.assign_non_tensor(ordered, compute_loss=False)
        parts = [ray.put(part) for part in tu.chunk_tensordict(ordered, shares)]
        sharing, stages = (
            self._resources.training_sequence_parallel_size,
            self._resources.training_pipeline_parallel_size,
        )
        # Ranks are numbered share by share, as verl's mesh has them, or stage by stage, as Megatron has them; it is the
        # first rank of a share that tells, and the last stage.
        of_a_stage = [one for one in parts for _ in range(sharing)]
        answers = self._answers(self._group.execute_all_async(method, of_a_stage * stages))
        output: Any = tu.concat_tensordict(answers[-len(of_a_stage) :: sharing])
        metrics: Any = tu.pop(output, "metrics")
        places = sorted(range(len(order)), key=order.__getitem__)
        restored: Any = tu.index_select_tensor_dict(output, places)
        return {"model_output": dict(restored.items()), "loss": [metrics.pop("loss")], "metrics": metrics}

    def _balanced(self, batch: "TensorDict", shares: int) -> list[int]:
        """An order of the sequences whose equal parts are shares of about the same work."""
        from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

        if len(batch) % shares:
            raise ConfigError(
                f"{len(batch)} sequences can't be shared out evenly among {shares} parts of the ranks of training "
                f"(resources.training_world_size = {self._resources.training_world_size}, "
                f"training_sequence_parallel_size = {self._resources.training_sequence_parallel_size}, "
                f"training_pipeline_parallel_size = {self._resources.training_pipeline_parallel_size}); change one of "
                "them"
            )
        ids: Any = batch["input_ids"]
        work = calculate_workload(ids.offsets().diff()).tolist()
        balanced: Any = get_seqlen_balanced_partitions(work, shares, equal_size=True)
        return [place for share in balanced for place in share]

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """What each rank answers to the same call."""
        return self._answers(self._group.execute_all_async(method, *args))

    def _answers(self, asked: list[Any]) -> list[Any]:
        """What the ranks return, in their order.

        Raises what one of them raised; EngineLost when one died, or can't be asked after a call that failed.
        """
        import ray

        if self._stuck:
            raise EngineLost("ranks of training are still at a call that failed on others; a retry starts fresh ones")
        waiting, answers = list(asked), {}
        while waiting:
            (done, *_), waiting = ray.wait(waiting)
            try:
                answers[done] = ray.get(done)
            except Exception as error:
                raise self._failure(error, waiting) from error
        return [answers[one] for one in asked]

    def _failure(self, first: Exception, waiting: list[Any]) -> Exception:
        """What went wrong on the ranks, of which one has told; the others' answers are still `waiting`."""
        import ray
        from ray.exceptions import RayTaskError

        told = [first]
        # One that died takes its connections with it, so that another may have complained first.
        done, stuck = ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE_SECONDS) if waiting else ([], [])
        self._stuck = bool(stuck)
        for one in done:
            try:
                ray.get(one)
            except Exception as error:
                told.append(error)
        died = next((error for error in told if not isinstance(error, RayTaskError)), None)
        if died is None:
            return getattr(first, "cause", None) or first
        return EngineLost(
            f"a rank of training (of {self._resources.training_world_size}) died: {in_one_line(died)}; a retry starts "
            "fresh ones"
        )
