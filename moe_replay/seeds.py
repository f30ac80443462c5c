"""Seeds that depend on what is being done, not on when: the root of "same config, same bytes"."""

import hashlib


def derive_seed(seed: int, *what: str | int) -> int:
    """A 31-bit seed for one purpose of one run, e.g. `derive_seed(config.seed, "rollout", iteration, row)`.

    Independent of process, platform and Python's hash seed.
    """
    text = "/".join([str(seed), *(str(part) for part in what)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
