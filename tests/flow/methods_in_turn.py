"""Compare all methods over two iterations on the same engines, then run their variants; prints what came of it.

PR2 by its defaults uses no predictor so early; the variants may. Called as `methods_in_turn.py FOLDER SETTINGS`,
settings as a JSON object of dotted keys.
"""

import json
import sys

from variants import VARIANTS

from flows.compare import compare
from flows.train import train
from moe_replay.config_reading import load_config
from moe_replay.environment import make_home, set_defaults
from moe_replay.methods import PRESETS, Method
from tasks.engines import keeping_engines

if __name__ == "__main__":
    set_defaults()
    make_home()
    settings = {**json.loads(sys.argv[2]), "iterations": 2, "storage.root": sys.argv[1]}
    with keeping_engines():
        compared = compare(load_config(None, settings), [Method.model_validate(name) for name in PRESETS], [0], "all")
        for run_id, variant in VARIANTS.items():
            train(load_config(None, {**settings, **variant}), run_id)
    print(json.dumps(compared._asdict()))
