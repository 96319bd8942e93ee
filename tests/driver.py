"""Runs the scripts' command lines for the tests, with a network small enough for seconds.

    python tests/driver.py SCRIPT CHANGES ARGUMENTS…    as `python SCRIPT.py ARGUMENTS…`
    python tests/driver.py                              a server: a line of JSON a command

CHANGES is Python that runs first and sees `script`, `common`, `torch` and `tiny(**changes)`,
which changes Config's TINY. Importing torch takes longer than most commands do: the server
imports it once and forks a child for each process of a command.
"""
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import traceback

import matplotlib.figure  # noqa: F401
import torch
import torchvision  # noqa: F401

import common


def command(name, changes, arguments):
    script = importlib.import_module(name)

    def tiny(**values):
        script.PRESETS["tiny"] = dataclasses.replace(script.PRESETS["tiny"], **values)

    exec(changes, {"script": script, "common": common, "torch": torch, "tiny": tiny})
    sys.argv = [f"{name}.py", *arguments]
    common.run_script(script.main)


def child(job, number):
    """Process `number` of a command: own folder, environment, output and exit status."""
    for stream, path in enumerate((os.devnull, *job["output"][number])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(job["cwd"])
    if job["processes"] > 1:
        os.environ |= {"WORLD_SIZE": str(job["processes"]), "RANK": str(number), "LOCAL_RANK": str(number),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    status = 0
    try:
        command(job["script"], job["changes"], job["arguments"])
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)                       # tearing the copied interpreter down takes a second


def wait(children, seconds):
    """Exit statuses, negative for a signal; what runs longer than that is killed."""
    statuses = {}
    until = time.monotonic() + seconds
    while len(statuses) < len(children):
        for pid in set(children) - set(statuses):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[pid] for pid in children]


def serve():
    while line := sys.stdin.readline():
        job = json.loads(line)
        children = []
        for number in range(job["processes"]):
            pid = os.fork()
            if pid == 0:
                child(job, number)
            children.append(pid)
        print(json.dumps(wait(children, job["seconds"])), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        command(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        serve()
