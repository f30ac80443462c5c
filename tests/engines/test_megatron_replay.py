"""Routes in verl's Megatron router replay, on Megatron-Core's own routers, without a GPU.

Everything but the matrix product of a router is Megatron-Core's and verl's. That product alone needs a GPU and
Transformer Engine in Megatron-Core 0.16, so the routers here multiply by torch.

Shapes: T tokens of all sequences, L MoE layers, K experts per token, E experts, H hidden size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

pytest.importorskip("megatron.core")

from predictors import write_predictor
from safetensors.torch import save_file

from moe_replay.engines.gates import digest_gates
from moe_replay.engines.megatron_replay import MegatronRouters, moe_layers, require_whole_routes
from moe_replay.engines.merged_gates import MergedGates
from moe_replay.engines.training_batch import PassRoutes, TokenSequence
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.routing.trace import RoutingTrace

E, K, H, LAYERS = 8, 2, 16, (1, 2, 3)  # layer 0 is dense
LENGTHS = (5, 3)


@pytest.fixture(scope="module")
def megatron() -> Iterator[Any]:
    """verl's replay patched into Megatron-Core, as its engine does, in a process group of one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VERL_PLATFORM", "cpu")  # read when verl is imported
        from verl.utils.megatron import router_replay_patch, router_replay_utils
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    router_replay_patch.apply_router_replay_patch()
    yield router_replay_utils
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def config_of(**settings: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    whole = {
        "num_layers": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "hidden_size": H,
        "num_attention_heads": 2,
        "num_moe_experts": E,
        "moe_router_topk": K,
        "moe_router_load_balancing_type": "none",
        "moe_enable_routing_replay": True,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**(whole | settings))


class Stage(nn.Module):
    """The routers of some decoder layers, fed one hidden state after the other."""

    def __init__(self, config: Any, layers: tuple[int, ...]):
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe.router import TopKRouter

        class TorchRouter(TopKRouter):
            def gating(self, input: Tensor) -> Tensor:
                return nn.functional.linear(input, self.weight)

        super().__init__()
        self.decoder = nn.ModuleList()
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp"])
        for layer in layers:
            torch.manual_seed(layer)
            router = TorchRouter(config, pg_collection=groups)
            router.set_layer_number(layer + 1)
            nn.init.normal_(router.weight)
            self.decoder.append(router)

    def forward(self, hidden_LTH: Tensor) -> tuple[Tensor, Tensor]:
        """-> weights and choices [L, T, E]"""
        seen = [router(hidden_TH[:, None]) for router, hidden_TH in zip(self.decoder, hidden_LTH, strict=True)]
        weights, chosen = zip(*seen, strict=True)
        return torch.stack(weights), torch.stack(chosen)


def traces(last_missing: bool = True) -> list[RoutingTrace]:
    rng = np.random.default_rng(0)
    ids = [rng.permuted(np.tile(np.arange(E), (n, len(LAYERS), 1)), axis=-1)[..., :K] for n in LENGTHS]
    return [RoutingTrace.from_capture(one[: len(one) - last_missing], len(one), E, LAYERS) for one in ids]


def hidden(layers: tuple[int, ...] = LAYERS) -> Tensor:
    return torch.randn(len(layers), sum(LENGTHS), H, generator=torch.Generator().manual_seed(1))


def routed_experts(routes: list[RoutingTrace]) -> Tensor:
    """The field of a batch."""
    sequences = [TokenSequence(torch.zeros(1), torch.zeros(trace.num_tokens - 1)) for trace in routes]
    return PassRoutes(routes).fields(sequences, E, K, LAYERS)["routed_experts"]


def replay(verl_utils: Any, stage: Stage, config: Any, routes: list[RoutingTrace]) -> None:
    """What verl's engine does with the fields of a micro-batch."""
    from verl.utils.megatron.router_replay_patch import RouterReplayAction

    tokens = torch.nested.as_nested_tensor([torch.zeros(n, dtype=torch.int64) for n in LENGTHS], layout=torch.jagged)
    response = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = verl_utils.align_r3_router_replay_data(routed_experts(routes), tokens)
    mask = verl_utils.build_r3_replay_mask(tokens, response)
    verl_utils.set_router_replay_data(ids, None, config, replay_mask=mask, model=stage)
    verl_utils.set_model_router_replay_action(stage, RouterReplayAction.REPLAY_FORWARD)


def sets(ids_TLK: Any) -> np.ndarray:
    return np.sort(np.asarray(ids_TLK), axis=-1)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("layers", [LAYERS, (2, 3)], ids=["whole model", "last stage"])
def test_routers_of_a_stage_serve_the_routes_of_their_layers(megatron, layers, scores):
    config = config_of(moe_router_score_function=scores)
    stage, routes = Stage(config, layers), traces()
    routers = MegatronRouters([stage])
    assert routers.layers == layers
    free_LTE = stage(hidden(layers))[1]
    own_TLK = routers.live_RLK

    replay(megatron, stage, config, routes)
    weights_LTE, chosen_LTE = stage(hidden(layers))

    row = 0
    for trace in routes:
        for position in range(trace.num_tokens):
            for at, layer in enumerate(layers):
                served = set(chosen_LTE[at, row].nonzero()[:, 0].tolist())
                if trace.valid_T[position]:
                    assert served == set(trace.ids_TLK[position, LAYERS.index(layer)].tolist())
                else:  # the last row of a sequence
                    assert served == set(free_LTE[at, row].nonzero()[:, 0].tolist())
            row += 1
    assert torch.equal(routers.live_RLK, own_TLK)  # the same hidden states, so the same choice of their own
    weights_LTE.square().sum().backward()
    assert all(router.weight.grad.abs().max() > 0 for router in stage.decoder)


def test_what_a_router_got_and_gave_is_kept_for_watched_rows(megatron):
    config = config_of()
    stage, rows = Stage(config, LAYERS), torch.tensor([0, 3, 6])
    routers = MegatronRouters([stage])
    ids_TLK = torch.from_numpy(np.concatenate([one.ids_TLK for one in traces(last_missing=False)]).astype("int64"))
    routers.watch(rows)
    routers.compare(ids_TLK, torch.arange(sum(LENGTHS)) != 4)
    replay(megatron, stage, config, traces())
    stage(hidden())

    expected_LTE = torch.stack([x @ router.weight.T for x, router in zip(hidden(), stage.decoder, strict=True)])
    torch.testing.assert_close(routers.features.hidden_SLH, hidden().transpose(0, 1)[rows])
    torch.testing.assert_close(routers.features.logits_SLE, expected_LTE.transpose(0, 1)[rows])
    covered_TL = expected_LTE.softmax(-1).transpose(0, 1).gather(-1, ids_TLK).sum(-1)
    gap_TL = routers.coverage_gap_RL
    assert gap_TL[4].isnan().all()
    kept = torch.arange(sum(LENGTHS)) != 4
    torch.testing.assert_close(gap_TL[kept], 1 - covered_TL[kept])
    np.testing.assert_array_equal(sets(routers.live_RLK), sets(expected_LTE.topk(K).indices.transpose(0, 1)))

    routers.remove()
    assert all("gating" not in vars(router) for router in stage.decoder)


def test_features_of_routers_that_choose_by_more_than_logits_are_refused(megatron):
    config = config_of(moe_router_score_function="sigmoid")
    stage = Stage(config, LAYERS)
    for router in stage.decoder:
        router.expert_bias = torch.linspace(0, 3, E)
    routers = MegatronRouters([stage])
    routers.watch(torch.arange(4))
    stage(hidden())
    with pytest.raises(ConfigError, match="selection bias"):
        _ = routers.features


def test_nothing_of_a_forward_outlives_the_next_one_or_being_forgotten(megatron):
    stage = Stage(config_of(moe_router_score_function="sigmoid"), LAYERS)
    for router in stage.decoder:
        router.expert_bias = torch.linspace(0, 3, E)
    routers = MegatronRouters([stage])
    routers.watch(torch.arange(4))
    routers.compare(torch.arange(K).expand(sum(LENGTHS), len(LAYERS), K), torch.ones(sum(LENGTHS), dtype=torch.bool))
    stage(hidden())
    assert routers.coverage_gap_RL.shape == (sum(LENGTHS), len(LAYERS))
    with pytest.raises(ValueError, match="zip"):
        stage(hidden()[:0])
    for layer in LAYERS:
        assert layer not in routers._live | routers._calls | routers._strays
    stage(hidden())
    routers.forget()
    with pytest.raises(RoutingMismatch, match="watch, then run"):
        _ = routers.features


def test_chunks_of_a_stage_tell_of_one_forward_together(megatron):
    config = config_of()
    chunks = [Stage(config, LAYERS[:1]), Stage(config, LAYERS[1:])]
    routers = MegatronRouters(chunks)
    routers.watch(torch.arange(4))
    for chunk, part in zip(chunks, hidden().split([1, 2]), strict=True):
        chunk(part)
    torch.testing.assert_close(routers.features.hidden_SLH, hidden().transpose(0, 1)[:4])


def test_recompute_is_not_watched_and_a_forward_that_was_cut_tells_nothing(megatron):
    from torch.utils.checkpoint import checkpoint

    stage = Stage(config_of(), LAYERS)
    routers = MegatronRouters([stage])
    with pytest.raises(RoutingMismatch, match=r"decoder layers \[1, 2, 3\] have not chosen"):
        _ = routers.live_RLK
    weights, _ = checkpoint(stage, hidden().requires_grad_(), use_reentrant=False)
    first = routers.live_RLK
    weights.square().sum().backward()
    assert torch.equal(routers.live_RLK, first)
    with pytest.raises(ValueError, match="zip"):
        stage(hidden()[:2])
    with pytest.raises(RoutingMismatch, match=r"decoder layers \[3\]"):
        _ = routers.live_RLK


def test_gaps_that_verl_would_fill_are_refused(megatron):
    routes = traces()
    require_whole_routes(routed_experts(routes))
    require_whole_routes(routed_experts(traces(last_missing=False)))
    valid_T = np.array([True, False, True, True, True])
    ids_TLK = traces(last_missing=False)[0].ids_TLK * valid_T[:, None, None]
    gap = RoutingTrace(ids_TLK.astype("uint8"), valid_T, E, LAYERS)
    with pytest.raises(RoutingMismatch, match=r"sequence 1 has routes of 4 of its 5 rows.*'fsdp2'"):
        require_whole_routes(routed_experts([routes[1], gap]))


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"pipeline_model_parallel_size": 2}, [(1,), (2, 3)]),
        ({"pipeline_model_parallel_size": 4}, [(), (1,), (2,), (3,)]),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}, [(1, 2), (3,)]),
        ({"pipeline_model_parallel_size": 2, "moe_layer_freq": 1}, [(0, 1), (2, 3)]),
    ],
    ids=str,
)
def test_layers_of_pipeline_stages_are_those_of_the_model_in_order(megatron, settings, stages):
    config = config_of(**settings)
    assert [moe_layers(config, rank) for rank in range(len(stages))] == stages
    assert moe_layers(config) == sum(stages, ())


def test_a_predictor_is_merged_into_the_gates_that_megatron_routers_export(megatron, tmp_path: Path):
    stage, served = Stage(config_of(), LAYERS), Stage(config_of(), LAYERS)
    weights = {layer: router.weight.detach().clone() for layer, router in zip(LAYERS, stage.decoder, strict=True)}
    names = {f"model.layers.{layer}.mlp.gate.weight": weight for layer, weight in weights.items()}
    save_file(names, tmp_path / "model.safetensors")
    predictor, _ = write_predictor(tmp_path / "predictor.safetensors", 0.3, LAYERS, LAYERS, (E, H))
    predicted = EvolutionPredictor.load(predictor).weights

    gates = MergedGates(tmp_path, predictor, LAYERS)
    for name, weight in gates.merge(gates.router_tensors()):
        served.decoder[LAYERS.index(int(name.split(".")[2]))].weight.data.copy_(weight)
    plain, merged = MegatronRouters([stage]), MegatronRouters([served])
    stage(hidden())
    served(hidden())

    logits = [x @ (weights[layer] + predicted[layer]).T for x, layer in zip(hidden(), LAYERS, strict=True)]
    np.testing.assert_array_equal(sets(merged.live_RLK), sets(torch.stack(logits, dim=1).topk(K).indices))
    assert (sets(plain.live_RLK) != sets(merged.live_RLK)).any()
    assert digest_gates(tmp_path, LAYERS) is not None
