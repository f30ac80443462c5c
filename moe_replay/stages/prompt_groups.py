"""Prompts at work and the responses to them, which may grow in stretches, each under the weights of its time."""

from dataclasses import dataclass, replace

from moe_replay.data.prompts import Prompt
from moe_replay.engines.rollout import Request, Response
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Begun:
    """A response, finished or not, that was sampled in one or more stretches."""

    response: Response
    """Of all stretches, each token with the log-prob that it was sampled at and the route that it was served by."""
    weight_versions: list[int]
    """Of each response token."""
    finished: bool

    @classmethod
    def of(cls, response: Response, weight_versions: list[int], longest: int) -> "Begun":
        """A response as far as it is sampled; where length stopped it, only `longest` tokens are its end."""
        finished = not response.truncated or len(response.response_ids) >= longest
        return cls(response, weight_versions, finished)

    def grown(self, new: Response, version: int, longest: int) -> "Begun":
        """With what came new under weights `version`; raises RoutingMismatch when that is of another prompt or model.

        The last token before, which was never fed then, has the route of the new weights.
        """
        before = self.response
        if new.prompt_ids != before.prompt_ids:
            raise RoutingMismatch(
                f"a response begun to a prompt of {len(before.prompt_ids)} tokens went on after one of "
                f"{len(new.prompt_ids)} others; the tokenizer or the data changed on the way: put them back"
            )
        routed = before.trace.slice_tokens(0, before.trace.num_tokens - 1)
        whole = replace(
            new,
            response_ids=[*before.response_ids, *new.response_ids],
            log_probs=[*before.log_probs, *new.log_probs],
            trace=RoutingTrace.concatenate([routed, new.trace]),
        )
        return Begun.of(whole, [*self.weight_versions, *(version for _ in new.response_ids)], longest)


@dataclass(eq=False)
class PromptGroup:
    """A prompt at work and the responses to it, none for those of which no token was sampled yet."""

    drawn: int
    """Number of the prompt in the order in which the run draws them."""
    prompt: Prompt
    members: list[Begun | None]

    @property
    def unfinished(self) -> list[int]:
        """The responses that are not at their end; the group is trained on once there is none."""
        return [i for i, member in enumerate(self.members) if member is None or not member.finished]

    @property
    def begun(self) -> list[Begun]:
        """The responses of which tokens were sampled."""
        return [member for member in self.members if member is not None]

    def length(self, member: int) -> int:
        """Tokens of a response so far."""
        before = self.members[member]
        return len(before.response.response_ids) if before else 0

    def request(self, member: int, seed: int, most: int | None) -> Request:
        """What to ask for the next stretch of a response."""
        before = self.members[member]
        return Request(self.prompt.messages, seed, tuple(before.response.response_ids) if before else (), most)

    def take(self, member: int, new: Response, version: int, longest: int) -> None:
        """Add a stretch that was sampled under weights `version`."""
        before = self.members[member]
        first = [version] * len(new.response_ids)
        self.members[member] = before.grown(new, version, longest) if before else Begun.of(new, first, longest)

    def versions(self) -> set[int]:
        """The weight versions of its tokens."""
        return {version for member in self.begun for version in member.weight_versions}
