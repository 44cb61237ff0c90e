"""Run `python ...` commands in processes forked from this one, which has already imported torch.

Reads a JSON object per line from stdin: argv (the words after `python`), cwd, env, and the files
`out` and `err` for the child's output. Prints the child's exit code as a line.
Only torch and its optimizers are imported in advance: modules that read the environment at import
must do so in the child.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import threading
import traceback
from functools import partial
from pathlib import Path

import torch
import torch._dynamo


def become(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Turn this process into `python *argv`."""
    for fd, name in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    kind, name, *rest = argv if argv[0] in ("-m", "-c") else ("", *argv)
    start = os.path.dirname(os.path.abspath(name)) if not kind else cwd if kind == "-m" else ""
    paths = [path for path in env.get("PYTHONPATH", "").split(":") if path]
    sys.path[:] = [start, *paths, *INSTALLED]
    sys.argv = [kind or name, *rest]
    if any((Path(path) / "sitecustomize.py").exists() for path in paths):
        sys.modules.pop("sitecustomize", None)
        __import__("sitecustomize")
    if kind == "-c":
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


def end(run: partial) -> None:
    """Run, then exit like the interpreter, but without torch's teardown, which takes a second."""
    code = 0
    try:
        run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    INSTALLED = [p for p in sys.path[1:] if p not in os.environ.get("PYTHONPATH", "").split(":")]
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            end(partial(become, **json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
