"""Runs command line entries as real processes, without paying the seconds that importing JAX takes for each.

The server imports what the entries import, then forks: a child has its own arguments, folder and streams, runs
``python -m MODULE`` to its exit code, and makes its own devices. A JSON object a line comes in on stdin, one goes out:

- ``module``, ``arguments``, ``folder``, ``output`` and optionally ``environment`` run to the end: its exit code.
- The same with ``background`` goes on by itself: its process id.
- ``poll`` and such a process id: its exit code, minus the signal's number where one ended it, or null while it runs.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback

import tensorflow_datasets  # noqa: F401
import tokenizers  # noqa: F401
import transformers.models.bert  # noqa: F401

import sslx.entry
import sslx.pretext.mlm
import sslx.session
import sslx.tasks.text_classification  # noqa: F401


def child(job: dict) -> int:
    """Becomes ``python -m job["module"]``; returns its exit code."""
    os.chdir(job["folder"])
    os.environ.update(job.get("environment", {}))
    for stream, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{job['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
    sys.argv = ["", *job["arguments"]]
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    job = json.loads(line)
    if "poll" in job:
        ended, status = os.waitpid(job["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
        continue
    process = os.fork()
    if process == 0:
        code = child(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = None if job.get("background") else os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps(process if code is None else code), flush=True)
