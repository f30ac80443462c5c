"""vLLM as the rollout engine: responses with log-probs and routes, under weights that are swapped in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.engines.gates import digest_gates
from moe_replay.engines.process import Progress
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace, refuse_dead_capture
from moe_replay.sections import ResourcesConfig, RolloutConfig
from moe_replay.tokenization import encode_prompt

FLOAT32_GATES = "moe_replay_float32_gates"
"""vLLM's load format for routers in float32 (`moe_replay.engines.vllm_gates`)."""

ENVIRONMENT = {
    # One thread of control: requests are batched in the same order each time, so the same seeds give the same bytes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM would pin the cores that the trainer works on too.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    messages: list[dict[str, Any]]
    """Chat messages, as in verl's `prompt` column."""
    seed: int
    """Seed of this response's sampler, so that it depends on nothing else in the batch."""
    begun: tuple[int, ...] = ()
    """Token ids of the response so far, where one is gone on with."""
    max_new_tokens: int | None = None
    """New tokens after which to stop; by default `max_response_tokens` alone bounds the response."""


@dataclass(frozen=True)
class Response:
    """One sampled response of T prompt and response tokens; of one that was gone on with, what is new."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Includes the end-of-sequence token unless truncated."""
    log_probs: list[float]
    """log μ of each response token, at the sampling temperature."""
    text: str
    """Of the whole response, also where it was gone on with."""
    truncated: bool
    """Stopped by its length, not by an end-of-sequence token."""
    trace: RoutingTrace
    """Routes of all T tokens; the last, which was never fed, is missing. Where a response was gone on with: of the last
    token before, which is fed now for the first time, and of the new ones."""


class RolloutEngine:
    """One vLLM engine that captures routes.

    Raises ConfigError when `rollout.gate_dtype` asks for routers that the engine can't hold.
    """

    def __init__(
        self,
        model: Path,
        weights: str,
        config: RolloutConfig,
        resources: ResourcesConfig = ResourcesConfig(),  # noqa: B008 (frozen)
    ):
        from vllm import LLM
        from vllm.platforms import current_platform

        self.config = config
        self._sleeps = resources.colocated and not current_platform.is_cpu()
        self.weights: str | None = weights
        """Which weights are loaded, as the caller named them; none when a load has failed."""
        self.predictor_sha256: str | None = None
        """Which predictor is merged into the routers."""
        self.merge_fidelity: float | None = None
        """Share of the predictor that the routers' precision keeps (`predictor/merge_fidelity` of `docs/methods.md`);
        none without one, and for one that is zero."""
        self._llm = LLM(
            model=str(model),
            dtype=config.dtype,
            load_format=FLOAT32_GATES if config.gate_dtype == "float32" else "auto",
            max_model_len=config.max_prompt_tokens + config.max_response_tokens,
            tensor_parallel_size=resources.rollout_tensor_parallel_size,
            gpu_memory_utilization=config.memory_fraction,
            enable_sleep_mode=self._sleeps,
            enforce_eager=current_platform.is_cpu(),
            enable_return_routed_experts=True,
            # Log-probs at the sampling temperature, as the trainer takes them.
            logprobs_mode="processed_logprobs",
            worker_extension_cls="moe_replay.engines.policy_loader.PolicyLoader",
            disable_log_stats=True,
            seed=0,
        )
        model_config = self._llm.llm_engine.model_config
        self.num_experts = int(model_config.get_num_experts())
        self.top_k = int(model_config.get_num_experts_per_tok())
        self.layers = tuple(self._ask("moe_replay_router_layers"))
        # From the files: vLLM's CPU kernels pack the weights they hold beyond recognition.
        self.gates_sha256 = digest_gates(model, self.layers)
        """Which router weights are loaded, before any predictor is added; none when they can't be told."""
        self._asleep = False
        self.rest()

    def rest(self) -> None:
        """Give the device's memory back until the next call, where training takes turns on it (`resources.colocated`).

        vLLM's sleep mode at level 1: weights wait in host memory, the cache is dropped.
        """
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    @property
    def version(self) -> str:
        """vLLM's version."""
        from importlib.metadata import version

        import vllm

        return getattr(vllm, "__version__", "") or version("vllm")

    def load(self, folder: Path, weights: str, predictor: tuple[Path, str] | None = None) -> None:
        """Swap in the weights of a Hugging Face checkpoint folder, named `weights`, unless they are there already.

        `predictor` is a predictor file and its sha256. The routers then hold W + W_p, summed in float32 and rounded
        once, to the routers' precision. Only routers are read when the weights are there and the predictor is another.

        Raises RoutingMismatch when the predictor doesn't fit the model and ArchiveCorrupt when its file isn't whole;
        the engine then goes on with what it held. After any other error `weights` is None.
        """
        path, sha256 = predictor or (None, None)
        if (weights, sha256) == (self.weights, self.predictor_sha256):
            return
        self._wake()
        fidelity = self._ask("moe_replay_fidelity", str(folder), str(path)) if path else None
        routers_only = weights == self.weights
        self.weights = self.predictor_sha256 = self.merge_fidelity = self.gates_sha256 = None
        self._ask("moe_replay_load", str(folder), path and str(path), routers_only)
        self.gates_sha256 = digest_gates(folder, self.layers)
        self.weights, self.predictor_sha256, self.merge_fidelity = weights, sha256, fidelity

    def generate(self, requests: Sequence[Request], temperature: float, progress: Progress) -> list[Response]:
        """Sample one response for each request, in their order, a share of them at a time.

        Raises:
            ConfigError: a prompt is longer than `max_prompt_tokens`.
            RoutingMismatch: routes are absent, misaligned, or all alike.
        """
        prompts = self._tokenize([request.messages for request in requests])
        responses: list[Response] = []
        for share in shares_of(len(requests), self.config.share):
            told = partial(_add_progress, progress, share.start, len(requests))
            responses += self._sample(prompts[share], requests[share], temperature, told)
        refuse_dead_capture([response.trace for response in responses])
        return responses

    def _sample(
        self, prompts: Sequence[list[int]], requests: Sequence[Request], temperature: float, progress: Progress
    ) -> list[Response]:
        from vllm import SamplingParams

        self._wake()
        # A cached block holds keys, values and routes of the weights it was computed under, and a batch that finds
        # blocks in the cache is computed in another shape than one that doesn't: start each batch without.
        self._llm.reset_prefix_cache()
        sampling = [
            SamplingParams(temperature=temperature, max_tokens=self._room(request), logprobs=0, seed=request.seed)
            for request in requests
        ]
        fed = [[*ids, *request.begun] for ids, request in zip(prompts, requests, strict=True)]
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in fed], sampling, use_tqdm=_progress_bar(progress)
        )
        # Each of vLLM's outputs goes once it is read, so that a batch's routes, which are large, are held once.
        outputs.reverse()
        return [self._response(outputs.pop(), request.begun) for request in requests]

    def _room(self, request: Request) -> int:
        """New tokens that a response may take."""
        left = self.config.max_response_tokens - len(request.begun)
        return left if request.max_new_tokens is None else min(left, request.max_new_tokens)

    def _ask(self, method: str, *args: Any) -> Any:
        """Have every worker of vLLM run a method of `PolicyLoader`; the first one's answer."""
        return self._llm.collective_rpc(method, args=args)[0]

    def _tokenize(self, conversations: list[list[dict[str, Any]]], first: int = 0) -> list[list[int]]:
        tokenizer, longest = self._llm.get_tokenizer(), self.config.max_prompt_tokens
        return [
            encode_prompt(tokenizer, messages, longest, f"prompt {number} of the batch")
            for number, messages in enumerate(conversations, first)
        ]

    def _response(self, output: Any, begun: tuple[int, ...]) -> Response:
        sample = output.outputs[0]
        fed_ids, response_ids = list(output.prompt_token_ids), list(sample.token_ids)
        num_tokens = len(fed_ids) + len(response_ids)
        if sample.routed_experts is None:
            raise RoutingMismatch(
                f"the engine returned no routes for a sequence of {num_tokens} tokens; "
                "its kernel does not report the experts it selects: choose another MoE kernel for vLLM"
            )
        captured = np.asarray(sample.routed_experts)
        if captured.shape[1] <= self.layers[-1]:
            raise RoutingMismatch(
                f"the engine captured {captured.shape[1]} decoder layers, the last with experts is {self.layers[-1]}; "
                "capture and model disagree on the layer map"
            )
        trace = RoutingTrace.from_capture(captured[:, list(self.layers)], num_tokens, self.num_experts, self.layers)
        return Response(
            prompt_ids=fed_ids[: len(fed_ids) - len(begun)],
            response_ids=response_ids,
            log_probs=[step[token].logprob for step, token in zip(sample.logprobs, response_ids, strict=True)],
            text=self._decode([*begun, *response_ids]) if begun else sample.text,
            truncated=sample.finish_reason == "length",
            # What the prefix is routed by now is of no use: its tokens were served by the routes of before.
            trace=trace.slice_tokens(len(fed_ids) - 1, num_tokens) if begun else trace,
        )

    def _decode(self, ids: list[int]) -> str:
        tokenizer: Any = self._llm.get_tokenizer()
        # As vLLM's own detokenizer, which never cleans up.
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def shares_of(requests: int, share: int | None) -> list[slice]:
    """The parts of a batch that are sampled together, each of `share` requests but the last; by default all."""
    step = share or max(1, requests)
    return [slice(start, start + step) for start in range(0, requests, step)]


def _add_progress(progress: Progress, before: int, total: int, done: int, _: int, what: str) -> None:
    progress(before + done, total, what)


def _progress_bar(progress: Progress) -> Any:
    """A tqdm class that reports to `progress` instead of drawing."""
    from tqdm import tqdm

    class Reporter(tqdm):
        def display(self, *args: Any, **kwargs: Any) -> None:
            if str(self.desc).startswith("Processed"):  # vLLM draws bars of their own for rendering and queueing
                progress(int(self.n), int(self.total or 0), "responses")

    return Reporter
