"""Runs the tests of one exercise at a time, each time in a new process with limits, for grade.py.

Reads requests from stdin and writes a reply to stdout for each, a line of JSON both:

    request {"folder": "..", "exercise": "ex03_consistency", "time_limit": s, "memory_limit": GB}
    reply   {"tests": {test: its first complaint, "" if it passes}, "trouble": why tests are missing, or ""}

Without a folder ("") the tests are listed, not run. A test of a Triton kernel exists only if Triton does.

On Linux the new process is a fork of this one, which has imported torch, the library and the graders, so that
it starts at once and no answer can change the files that the next one is graded with. Elsewhere it is a new
Python, which takes seconds and has no memory limit. Everything runs on the CPU: CUDA reserves more address
space than any sensible limit.

An answer and its tests share a process, so this stops accidents and simple tricks, not an attack. The verdict
of a process counts if it starts with a number that the answer was not given, and if pytest, the graders and
PyTorch's functions are still those of before. Python lets a program find the number and undo its changes. It
can also read and write all files that you can: grade a class in a container.
"""
import builtins
import contextlib
import ctypes
import gc
import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "test_exercises.py"
FORKS = sys.platform == "linux"
sys.path[:0] = [str(ROOT / "exercises"), str(ROOT / "tests"), str(ROOT)]

import conftest  # noqa: E402
import plug  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402

try:
    import triton.language  # noqa: E402
except ImportError:
    triton = None

# The new process runs this code, not the file, which an answer may have changed.
GRADERS = compile(TESTS.read_text(encoding="utf-8"), str(TESTS), "exec")


class Verdicts:
    """A plugin of pytest that selects tests by the beginning of their names. `tests` is {test: complaint},
    `trouble` says why all tests ended early."""

    def __init__(self, prefix):
        self.prefix, self.tests, self.trouble = prefix, {}, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items
                    if item.name.startswith(self.prefix) and (triton or "triton" not in item.name)]

    def pytest_collection_finish(self, session):
        self.tests |= {item.name: "it did not run" for item in session.items}

    def pytest_runtest_logreport(self, report):
        test = report.nodeid.partition("::")[2]
        if not report.passed:                       # in the call, or before or after it
            self.tests[test] = complaint(report)
        elif report.when == "call":
            self.tests[test] = ""

    def pytest_keyboard_interrupt(self, excinfo):
        self.trouble = excinfo.exconly()


def complaint(report):
    """What a test says: the message of a grader, or an error and its traceback; then what was printed."""
    if report.skipped:
        return report.longrepr[-1] if isinstance(report.longrepr, tuple) else "Skipped"
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else report.longreprtext
    text = message.removeprefix("Failed: ")[:2000]
    if not message.startswith("Failed: "):
        text += "\n" + report.longreprtext[-4000:]
    return text + (f"\nprinted:\n{report.capstdout[-2000:]}" if report.capstdout else "")


def functions():
    """{name: (value, code)} of what the graders rely on: the functions and classes of pytest and plug, the
    methods of these classes, and the functions of torch and math. Torch's classes are left out: setting the
    default dtype exchanges some."""
    owners = [module for name, module in list(sys.modules.items())
              if name.split(".")[0] in ("pytest", "_pytest", "pluggy", "plug", __name__)]
    owners += [value for owner in owners for value in list(vars(owner).values()) if isinstance(value, type)]
    owners += [builtins, math, torch, torch.Tensor, torch.nn.functional, torch.utils._pytree]
    return {f"{owner.__name__}.{name}": (value, getattr(value, "__code__", None)) for owner in owners
            for name, value in list(vars(owner).items())
            if callable(value) and not (owner is torch and isinstance(value, type))}


def graders(folder):
    """The module of the graders of a folder of answers, or of "repo"."""
    os.environ["OSV_IMPL"] = folder
    module = sys.modules["test_exercises"] = types.ModuleType("test_exercises")
    module.__file__ = str(TESTS)
    exec(GRADERS, vars(module))
    return module


def codes(module):
    return {name: value.__code__ for name, value in vars(module).items()
            if isinstance(value, types.FunctionType)}


def work(folder, exercise):
    """The reply for a folder of answers. Changes this process: to be called once, in a new one."""
    # The plugin unraisableexception would take most of the time: it collects garbage five times at the end.
    flags = [str(TESTS), "--noconftest", "--tb=short", f"--rootdir={ROOT}", "-p", "no:cacheprovider",
             "-p", "no:unraisableexception"]
    untouched = codes(graders("repo"))
    if folder:
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
    else:
        flags.append("--collect-only")
    verdicts, before = Verdicts(f"test_{exercise[:4]}_" if exercise else "test_ex"), functions()
    try:
        module = graders(folder or "repo")
        pytest.main(flags, plugins=[conftest, verdicts])
        now = codes(module)
        changed = [f"test_exercises.{name}" for name, code in untouched.items() if now.get(name) != code]
    except BaseException as error:                  # KeyboardInterrupt in an answer's file, for example
        return {"tests": {}, "trouble": traceback.format_exception_only(error)[-1].strip()}
    after = functions()
    changed += [name for name, (value, code) in before.items()
                if after.get(name, (None, 0))[0] is not value or after[name][1] is not code]
    if changed:
        return {"tests": {}, "trouble": f"the answer replaces {changed[0]}"}
    return {"tests": verdicts.tests, "trouble": verdicts.trouble}


def prctl(option, value):
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def set_limits(memory):
    """Limits this process to `memory` GB more than it has, and its files to 64 MB. Nothing where this does
    not exist."""
    with contextlib.suppress(ImportError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 26, 2 ** 26))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + int(memory * 2 ** 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def answer(request, nonce, verdict):
    """Writes the nonce and the reply to the file descriptor `verdict`. stdin, stdout and stderr are empty."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    set_limits(request["memory_limit"])
    reply = work(request["folder"], request["exercise"])
    with open(verdict, "w") as file:
        file.write(nonce + json.dumps(reply))


def in_a_fork(request, nonce):
    """Answers a request in a fork of this process -> (what it wrote, its status; None after the limit)."""
    verdict = os.memfd_create("verdict")
    if (child := os.fork()) == 0:
        status = 1
        try:
            prctl(1, signal.SIGKILL)                # PR_SET_PDEATHSIG: ends with its parent
            os.closerange(3, verdict)               # the line to grade.py among them
            answer(request, nonce, os.dup(verdict))
            status = 0
        finally:
            os._exit(status)
    process = os.pidfd_open(child)
    in_time, _, _ = select.select([process], [], [], request["time_limit"])
    os.close(process)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if in_time else None
    # Also the processes that the answer started: those without a parent become children of this one.
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while numbers := children.read_text().split():
        for number in numbers:
            os.kill(int(number), signal.SIGKILL)
            os.waitpid(int(number), 0)
    with open(verdict, "rb") as file:
        file.seek(0)
        return file.read(), status


def in_a_new_python(request, nonce):
    """The same in a new Python, which has half a minute more for its imports."""
    process = subprocess.Popen([sys.executable, __file__, "--once"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        content, _ = process.communicate(f"{nonce}{json.dumps(request)}".encode(), request["time_limit"] + 30)
        return content, process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], None


def serve(request, run):
    """The reply to a request, by a process that `run` starts."""
    nonce = secrets.token_hex(16)
    content, status = run(request, nonce)
    head, reply = content[:len(nonce)], content[len(nonce):]
    if status is None:
        return {"tests": {}, "trouble": f"takes more than {request['time_limit']:g} s"}
    if head == nonce.encode():
        return json.loads(reply)
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return {"tests": {}, "trouble": f"ends its process ({how})"}


def main():
    if "--once" in sys.argv:
        text = sys.stdin.read()
        return answer(json.loads(text[32:]), text[:32], os.dup(1))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()                                     # a collection would copy the pages that forks share
    if FORKS:
        prctl(36, 1)                                # PR_SET_CHILD_SUBREAPER: see in_a_fork
    with contextlib.suppress(BrokenPipeError):          # the grader was killed, and nobody reads the reply
        for line in sys.stdin:
            reply = serve(json.loads(line), in_a_fork if FORKS else in_a_new_python)
            print(json.dumps(reply), file=replies, flush=True)
    os._exit(0)                                     # Triton's extension prints what it leaks otherwise


if __name__ == "__main__":
    main()
