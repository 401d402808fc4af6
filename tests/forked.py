"""A `python` for tests that starts at once: every run is a fork of a server process that has already imported
torch, transformers and diffusers, which takes seconds. Our own modules are not imported in the server: each
run imports them from its own folder.

    python tests/forked.py --serve FD                           server: imports, then answers requests on FD
    OSV_FORKS=SOCKET python -IS tests/forked.py sampler.py ..   client: asks the server to run sampler.py;
                                                                -c, -m and -u work too

Processes that a run starts with sys.executable, those of torchrun for example, are forks as well.
"""
import json
import os
import signal
import socket
import sys
from contextlib import contextmanager

IMPORTS = ("av", "einops", "PIL.Image", "safetensors.torch", "torch.distributed.run",
           "torch.utils.flop_counter", "tqdm", "transformers.models.clip.modeling_clip",
           "transformers.models.dinov2.modeling_dinov2",
           "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion")


@contextmanager
def forking_python(folder):
    """Writes the executable `python` into `folder` and yields its path. The server runs while this lasts."""
    import shlex
    import subprocess
    import tempfile
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        python, path = folder / "python", f"{short}/forks"      # a socket's path has 107 characters at most
        python.write_text(f"#!/bin/sh\nOSV_FORKS={path} exec "
                          f'{shlex.join([sys.executable, "-IS", os.path.abspath(__file__)])} "$@"\n')
        python.chmod(0o755)
        listener.bind(path)
        listener.listen()
        command = [sys.executable, os.path.abspath(__file__), "--serve", str(listener.fileno())]
        server = subprocess.Popen(command, cwd=folder, pass_fds=[listener.fileno()], start_new_session=True,
                                  env=os.environ | {"OSV_PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""})
        listener.close()                                        # if the server dies, clients fail at once
        yield python
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def serve(fd):
    """Imports, then forks once per request until the tests have ended."""
    import gc
    from importlib import import_module
    parent = os.getppid()
    for name in IMPORTS:
        import_module(name)
    sys.executable = os.environ["OSV_PYTHON"]
    gc.freeze()                                                 # a collection would copy the shared pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)               # the kernel removes the forks that end
    with socket.socket(fileno=fd) as server:
        server.settimeout(5)
        while os.getppid() == parent:                           # so it ends with killed tests, too
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                answer(client)
                os._exit(0)
            client.close()


def answer(client):
    """Runs one request in a process of its own and sends its exit status to the client."""
    from multiprocessing import get_context
    request, files, _, _ = socket.recv_fds(client, 1_000_000, 3)
    process = get_context("fork").Process(target=run, args=(files, *json.loads(request)))
    process.start()
    for file in files:
        os.close(file)
    process.join()
    client.send(bytes([process.exitcode % 256]))


def run(files, argv, folder, environment):
    """Does what `python *argv` does in `folder`, with the client's stdin, stdout and stderr."""
    from runpy import run_module, run_path
    for number, file in enumerate(files):                       # stdin, stdout, stderr
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    argv = argv[argv[0] == "-u":]                               # -u is ignored: output is flushed at the end
    sys.argv = argv
    with excepthook():
        if argv[0] == "-c":
            sys.path[0], code = "", argv.pop(1)
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.path[0] = folder
            run_module(argv.pop(1), run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
            run_path(argv[0], run_name="__main__")


@contextmanager
def excepthook():
    """Does with an exception what Python does at the end of a program, and multiprocessing does not: calls
    sys.excepthook."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def ask(path, argv):
    """Sends the request, with folder, environment, stdin, stdout and stderr, and returns the exit status."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        request = json.dumps([argv, os.getcwd(), dict(os.environ)])
        socket.send_fds(client, [request.encode()], [0, 1, 2])
        return client.recv(1)[0]


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:
        sys.exit(ask(os.environ["OSV_FORKS"], sys.argv[1:]))
