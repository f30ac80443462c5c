"""Evaluation: the new policy's answers to held-out problems, scored. Runs in the process of the rollout engine."""

import io
import json
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_replay.archive.commits import ArtifactRef
from moe_replay.data.prompts import PromptTable
from moe_replay.data.rewards import score
from moe_replay.engines.process import Progress
from moe_replay.engines.rollout import Request
from moe_replay.stages.rollout import load_policy
from moe_replay.stages.run import Run

if TYPE_CHECKING:
    from moe_replay.engines.rollout import RolloutEngine

SOLVED = 1.0
"""Score from which a sample counts as solved in pass@n."""


def evaluate_policy(
    engine: "RolloutEngine", progress: Progress, run: Run, iteration: int, policy: ArtifactRef
) -> ArtifactRef:
    """Score as many answers as asked for to every problem of every benchmark; commit scores and their summary.

    The sampling seeds do not depend on the iteration, so that two policies meet the same luck.
    """
    writer = run.store().begin("evaluation", iteration, {"policy": policy}, run.digest("evaluation"))
    load_policy(engine, run, policy)
    rows, metrics = [], {}
    for name, file in sorted(run.benchmarks.items()):
        scored = _score_benchmark(engine, progress, run, name, file.open())
        rows += scored
        metrics |= summarize(name, [(row["problem"], row["score"]) for row in scored])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    writer.write_bytes("scores.parquet", buffer.getvalue())
    writer.write_bytes("summary.json", json.dumps(metrics, sort_keys=True, indent=2).encode())
    engine.rest()
    return writer.commit(metrics=metrics, attributes={"weights_sha256": policy.sha256})


def summarize(benchmark: str, scores: list[tuple[int, float]]) -> dict[str, float]:
    """`eval/<benchmark>/avg_at_n`, `pass_at_n` from (problem, score) of each sample."""
    by_problem = defaultdict(list)
    for problem, value in scores:
        by_problem[problem].append(value)
    return {
        f"eval/{benchmark}/avg_at_n": float(np.mean([np.mean(values) for values in by_problem.values()])),
        f"eval/{benchmark}/pass_at_n": float(np.mean([max(values) >= SOLVED for values in by_problem.values()])),
    }


def _score_benchmark(
    engine: "RolloutEngine", progress: Progress, run: Run, name: str, table: PromptTable
) -> list[dict]:
    settings = run.config.evaluation
    samples = settings.samples_of.get(name, settings.samples)
    asked = [(prompt, sample) for prompt in table.rows() for sample in range(samples)]
    requests = [Request(prompt.messages, run.seed("evaluation", name, prompt.row, sample)) for prompt, sample in asked]
    responses = engine.generate(requests, settings.temperature, progress)
    return [
        {
            "benchmark": name,
            "problem": prompt.row,
            "sample": sample,
            "text": response.text,
            "score": score(prompt.data_source, response.text, prompt.ground_truth, prompt.extra_info),
            "truncated": response.truncated,
        }
        for (prompt, sample), response in zip(asked, responses, strict=True)
    ]
