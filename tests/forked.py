"""A `python` for tests that starts at once: each run is forked from a process that has imported torch,
transformers and diffusers (seconds). Of our own modules it has none: those come from the run's own folder.

    python tests/forked.py --serve FD                           imports; does what comes in there
    OSV_FORKS=SOCKET python -IS tests/forked.py sampler.py ..   has it done there; -c, -m and -u too

What a run starts with sys.executable, torchrun's processes for one, it starts in this way as well.
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
    """The path of such a `python`, in `folder`; while this lasts its server does."""
    import shlex
    import subprocess
    import tempfile
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        python, path = folder / "python", f"{short}/forks"      # a socket's path is at most a hundred letters
        python.write_text(f"#!/bin/sh\nOSV_FORKS={path} exec "
                          f'{shlex.join([sys.executable, "-IS", os.path.abspath(__file__)])} "$@"\n')
        python.chmod(0o755)
        listener.bind(path)
        listener.listen()
        command = [sys.executable, os.path.abspath(__file__), "--serve", str(listener.fileno())]
        server = subprocess.Popen(command, cwd=folder, pass_fds=[listener.fileno()], start_new_session=True,
                                  env=os.environ | {"OSV_PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""})
        listener.close()                                        # if the server dies nobody shall wait for it
        yield python
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def serve(fd):
    import gc
    from importlib import import_module
    parent = os.getppid()
    for name in IMPORTS:
        import_module(name)
    sys.executable = os.environ["OSV_PYTHON"]
    gc.freeze()                                                 # a collection would copy what is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)               # nobody waits for those that serve
    with socket.socket(fileno=fd) as server:
        server.settimeout(5)
        while os.getppid() == parent:                           # not longer than the tests
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
    """Runs what the client asks for, and tells it the exit status."""
    from multiprocessing import get_context
    request, files, _, _ = socket.recv_fds(client, 1_000_000, 3)
    process = get_context("fork").Process(target=run, args=(files, *json.loads(request)))
    process.start()
    for file in files:
        os.close(file)
    process.join()
    client.send(bytes([process.exitcode % 256]))


def run(files, argv, folder, environment):
    """In the fork: what `python *argv` does."""
    from runpy import run_module, run_path
    for number, file in enumerate(files):                       # stdin, stdout, stderr
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    argv = argv[argv[0] == "-u":]                               # here, everything is written at the end
    sys.argv = argv
    if argv[0] == "-c":
        sys.path[0], code = "", argv.pop(1)
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.path[0] = folder
        run_module(argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
        run_path(argv[0], run_name="__main__")


def ask(path, argv):
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
