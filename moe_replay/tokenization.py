"""Chat messages to token ids, the same way when a run is checked and when it rolls out."""

from typing import Any

from moe_replay.errors import ConfigError


def encode_prompt(tokenizer: Any, messages: list[dict[str, Any]], longest: int, name: str) -> list[int]:
    """Token ids of a prompt under the tokenizer's chat template, ready to be answered.

    Raises ConfigError when the tokenizer has no chat template, or the prompt `name` has no or more than `longest`
    tokens.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, and prompts are chat messages; "
            "take the model's instruction-tuned version, or add a chat_template.jinja to its folder"
        )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    if not 0 < len(ids) <= longest:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, rollout.max_prompt_tokens allows 1 to {longest}; prompts are never cut: "
            f"raise the limit or drop the prompt from the data. It begins {str(messages)[:80]!r}"
        )
    return list(ids)
