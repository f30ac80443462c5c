"""What only a separate process can show: what an import pulls in."""

import os
import subprocess
import sys
from pathlib import Path

from moe_replay.archive import artifacts


def test_the_archive_imports_without_torch_engines_or_prefect():
    package = Path(artifacts.__file__ or "").parent
    stems = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
    modules = ["moe_replay.routing.trace", *(f"moe_replay.archive.{stem}" for stem in stems)]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'vllm', 'verl', 'ray', 'prefect'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
