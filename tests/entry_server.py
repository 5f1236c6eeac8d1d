"""Runs command line entries as real processes, without paying the seconds that importing JAX takes for each.

The server imports what the entries import, then forks: a child has its own arguments, folder and streams, runs
``python -m MODULE`` to its exit code, and makes its own devices. `entries` is the client. A JSON object a line comes
in on stdin, one goes out:

- ``module``, ``arguments``, ``folder``, ``output`` and ``environment`` start a process: its id.
- ``poll`` and such an id: its exit code, minus the signal's number where one ended it, or null while it runs.

When stdin ends, whatever still runs is killed.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback

import tensorflow_datasets  # noqa: F401
import tokenizers  # noqa: F401
import transformers.models.bert  # noqa: F401
from entries import collect_rarely

import sslx.entry
import sslx.pretext.mlm
import sslx.session
import sslx.tasks.text_classification  # noqa: F401


def become(job: dict) -> int:
    """Becomes ``python -m job["module"]``; returns its exit code."""
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = ((os.devnull, os.O_RDONLY), (f"{job['output']}.stdout", write), (f"{job['output']}.stderr", write))
    for stream, (path, mode) in enumerate(files):  # stdin too: the server's lines are not the child's to read
        file = os.open(path, mode, 0o644)
        os.dup2(file, stream)
        os.close(file)
    sys.path[0] = job["folder"]  # as -m has it
    sys.argv = ["", *job["arguments"]]
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(job: dict) -> int:
    """Starts a process that leads a group of its own; returns its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            code = become(job)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.setpgid(process, process)  # here too: who learns the id may use it before the child has come that far
    return process


collect_rarely()  # before forking, so that children share what they do not look through
running = set()
try:
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            process, status = os.waitpid(job["poll"], os.WNOHANG)
            running.discard(process)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = start(job)
            running.add(answer)
        print(json.dumps(answer), flush=True)
finally:
    for process in running:
        os.killpg(process, signal.SIGKILL)
