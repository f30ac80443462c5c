"""The command line on a machine without a GPU that trains with Megatron, as `megatron_on_cpu` makes it."""

import sys

from moe_replay.engines import megatron_settings

if __name__ == "__main__":
    from moe_replay.cli import main

    megatron_settings.missing_here = list  # as in the training engine's process
    sys.exit(main())
