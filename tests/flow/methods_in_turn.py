"""Run two iterations of every method in one process, on the same engines; prints what each run returned.

Called as `methods_in_turn.py FOLDER SETTINGS`, settings as a JSON object of dotted keys.
"""

import json
import sys
from pathlib import Path

from flows.train import train
from moe_replay.config import load_config
from moe_replay.environment import set_defaults
from moe_replay.methods import PRESETS
from tasks.engines import keeping_engines

if __name__ == "__main__":
    set_defaults()
    settings = json.loads(sys.argv[2])
    with keeping_engines():
        done = {
            method: train(
                load_config(
                    None,
                    {**settings, "method": method, "iterations": 2, "storage.root": f"{Path(sys.argv[1]) / method}"},
                ),
                "small",
            )
            for method in PRESETS
        }
    print(json.dumps(done))
