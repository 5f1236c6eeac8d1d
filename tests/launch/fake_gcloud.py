"""A stand-in for gcloud: takes only documented flags, keeps one queued resource, and plays what a test has written.

The play (``$PLAY``, JSON) has ``lives``, one for each request. Of a life, ``states`` are what describing it gives in
turn (the last one stays), and ``jobs`` what the service on its first worker is in turn once it has been started:
``running``, ``done``, ``failed CODE`` or ``unreachable``. What is run on the workers runs here, under ``$WORKER``, with
stand-ins for their commands on PATH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# From `gcloud compute tpus queued-resources COMMAND --help`, Google Cloud SDK 528; WIDE are the flags of every command.
WIDE = {"project", "quiet", "format"}
DOCUMENTED = {
    "create": {
        *("zone", "runtime-version", "accelerator-type", "topology", "type", "node-id", "node-count", "node-prefix"),
        *(
            "async",
            "data-disk",
            "description",
            "guaranteed",
            "internal-ips",
            "labels",
            "metadata",
            "metadata-from-file",
        ),
        *("network", "range", "reserved", "scopes", "service-account", "spot", "subnetwork", "tags"),
        *("valid-after-duration", "valid-after-time", "valid-until-duration", "valid-until-time"),
    },
    "describe": {"zone"},
    "delete": {"zone", "async", "force"},
    "ssh": {
        *("zone", "batch-size", "dry-run", "force-key-file-overwrite", "node", "plain", "ssh-flag", "ssh-key-file"),
        *("strict-host-key-checking", "worker", "command", "output-directory", "internal-ip", "tunnel-through-iap"),
    },
}
SUBSTATES = {"running": "running", "done": "exited", "missing": "dead"}


def turn(items: list[str]) -> str:
    """The next of a play's items; the last one stays."""
    return items.pop(0) if len(items) > 1 else items[0]


def main(arguments: list[str], play: dict) -> int:
    if arguments[:2] == ["auth", "print-access-token"]:
        return int(not play.get("logged_in", True))
    assert arguments[:3] == ["compute", "tpus", "queued-resources"], arguments
    command, name, *rest = arguments[3:]
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in rest)
    unknown = set(flags) - DOCUMENTED[command] - WIDE
    if unknown:
        print(f"ERROR: unrecognized arguments: {unknown}", file=sys.stderr)
        return 2
    life = play.get("life")
    if command != "describe" and "systemctl show" not in flags.get("command", ""):
        play["calls"].append([command, name, flags])
    if command == "create":
        if not play["lives"]:
            print("ERROR: INVALID_ARGUMENT: no such accelerator type", file=sys.stderr)
            return 1
        play["life"] = {"started": False} | play["lives"].pop(0)
    elif life is None:
        print("ERROR: (gcloud.compute.tpus.queued-resources) NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    elif command == "describe":
        state = turn(life["states"])
        if state == "offline":
            print("ERROR: gcloud crashed (TransportError): no route to host", file=sys.stderr)
            return 1
        print(state)
    elif command == "delete":
        play["life"] = None
    elif "systemctl show" in flags["command"]:
        job = turn(life["jobs"]) if life["started"] else "missing"
        if job == "unreachable":
            return 255
        print(f"SubState={SUBSTATES.get(job, 'failed')}\nExecMainStatus={job.rpartition(' ')[2] if ' ' in job else 0}")
    else:
        life["started"] |= "systemd-run" in flags["command"]
        worker = os.environ | {"HOME": os.environ["WORKER"], "PATH": os.environ["WORKER"] + ":/usr/bin:/bin"}
        return subprocess.run(["bash", "-c", flags["command"]], env=worker, cwd=os.environ["WORKER"]).returncode
    return 0


if __name__ == "__main__":
    file = Path(os.environ["PLAY"])
    written = json.loads(file.read_text())
    code = main(sys.argv[1:], written)
    file.write_text(json.dumps(written))
    sys.exit(code)
