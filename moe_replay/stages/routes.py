"""Archiving: the rollout's routes, checked against their tokens, in the form that the rest of the run reads."""

from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.routes import write_routes
from moe_replay.stages.carrying import routed_sequences
from moe_replay.stages.run import Run
from moe_replay.stages.samples import route_origin


def archive_routes(run: Run, iteration: int, rollout: ArtifactRef) -> ArtifactRef:
    """Write and commit the routing archive of a rollout.

    Raises:
        ArchiveCorrupt: the rollout is not as committed.
        RoutingMismatch: routes and tokens do not belong together.
    """
    writer = run.store().begin("routes", iteration, {"rollout": rollout}, run.digest("routes"))
    artifact = run.open(rollout)
    storage = run.config.storage
    provenance = write_routes(
        writer,
        routed_sequences(artifact),
        route_origin(artifact),
        storage.chunk_tokens,
        storage.codec,
        storage.keep_order,
    )
    return writer.commit(attributes={"tokens": provenance.tokens, "missing_rows": provenance.missing_rows})
