"""Memory that ran out, told from an engine's other errors without importing what raises them."""

_TYPES = {"OutOfMemoryError"}
"""torch's, of an accelerator."""
_TEXTS = ("can't allocate memory", "No available memory for the cache blocks", "Free memory on device")
"""torch's allocator of a CPU, then vLLM where its share of a GPU does not do."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it came of, is an allocation that failed."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        told = isinstance(one, RuntimeError | ValueError) and any(text in str(one) for text in _TEXTS)
        if told or isinstance(one, MemoryError) or type(one).__name__ in _TYPES:
            return True
        one = one.__cause__ or one.__context__
    return False
