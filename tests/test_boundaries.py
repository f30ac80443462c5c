"""What may be imported where, by what is loaded; pyproject.toml has the same rules for what is written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("moe_replay", "tasks", "flows") for path in (ROOT / folder).rglob("*.py"))
ENGINES = {"torch", "transformers", "vllm", "verl", "ray"}
SERVICES = {"prefect", "mlflow"}
UNPICKLERS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "torch.load"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level packages that a fresh interpreter holds after importing `modules`."""
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "module", ["moe_replay.config", "moe_replay.routing.trace", "moe_replay.archive", "moe_replay.cli"]
)
def test_config_routes_archive_and_command_line_load_no_engine_and_no_service(module):
    modules = [name for name in map(module_name, CODE) if name == module or name.startswith(f"{module}.")]
    assert not loaded_by(modules) & (ENGINES | SERVICES)


def test_the_command_line_starts_without_what_only_some_commands_need():
    assert not loaded_by(["moe_replay.cli"]) & (ENGINES | SERVICES | {"numpy", "zarr", "pyarrow", "fsspec"})


def test_flows_and_tasks_load_without_any_engine():
    modules = [name for name in map(module_name, CODE) if name.split(".")[0] in ("flows", "tasks")]
    assert "flows.train" in modules
    assert not loaded_by(modules) & ENGINES


def test_nothing_unpickles():
    """What storage holds is never run: no unpickler, no pickling serializer, no array of objects."""
    found = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)[:60]}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if _unpickles(node)
    ]
    assert found == []


def _unpickles(node: ast.AST) -> bool:
    match node:
        case ast.Attribute():
            return ast.unparse(node) in UNPICKLERS
        case ast.ImportFrom(module=module):
            return any(f"{module}.{name.name}" in UNPICKLERS for name in node.names)
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            return True
        case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
            return True
    return False


def test_no_file_of_the_repository_holds_a_credential():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    shapes = re.compile(
        rb"A(KIA|SIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|-----BEGIN [A-Z ]*PRIVATE KEY"
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    assert [str(path) for path in files if path.is_file() and shapes.search(path.read_bytes())] == []
