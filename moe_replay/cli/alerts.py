"""`moe-replay alerts install`: have the Prefect server call a webhook when a run fails, crashes or stalls."""

import json
import os
from datetime import timedelta
from urllib.parse import urlsplit

from moe_replay.cli.console import Json, out
from moe_replay.errors import ConfigError
from moe_replay.servers import require_named_servers

WEBHOOK = "MOE_REPLAY_ALERT_WEBHOOK"
"""Environment variable with the webhook's URL, which often is a credential."""


def install(*, stalled_after: timedelta = timedelta(hours=1), json_: Json = False) -> None:
    """Create or update the automations of the Prefect server that PREFECT_API_URL names.

    Flow runs that give no sign of life become Crashed. With a URL in MOE_REPLAY_ALERT_WEBHOOK, the server posts JSON
    to it when a run fails, crashes or stalls, and when a stability alarm is raised. The URL is kept by the server, in
    the block `moe-replay-alerts`; it need not be given again.

    Parameters
    ----------
    stalled_after
        How long a stage may neither finish nor tell of progress, for example 30m.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "alerts live in a Prefect server, and PREFECT_API_URL names none; start one with moe-replay ui and give "
            "its address, for example PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    webhook = os.environ.get(WEBHOOK) or None
    if webhook is not None and (urlsplit(webhook).scheme not in ("http", "https") or not urlsplit(webhook).netloc):
        raise ConfigError(f"{WEBHOOK} holds no http:// or https:// URL; give the webhook's whole URL")
    require_named_servers()
    from tasks.alerts import install_alerts

    installed = install_alerts(webhook, stalled_after)
    if json_:
        print(json.dumps({"automations": installed}))
        return
    for name in installed:
        out.print(name, highlight=False)
    if len(installed) == 1:
        out.print(f"\nno webhook is known; to be told of failures set {WEBHOOK} and repeat this", highlight=False)
