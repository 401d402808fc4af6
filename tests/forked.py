"""A `python` for tests that starts at once: each run is forked from a process that has imported torch,
transformers and diffusers (seconds). Of our own modules it has none: those come from the run's own folder.

    python tests/forked.py --serve FD                           imports; does what comes in there, in turn
    OSV_FORKS=SOCKET python -IS tests/forked.py sampler.py ..   has it done there; -c and -m too
"""
import json
import os
import socket
import sys

IMPORTS = ("av", "einops", "PIL.Image", "safetensors.torch", "torch.utils.flop_counter", "tqdm",
           "transformers.models.clip.modeling_clip", "transformers.models.dinov2.modeling_dinov2",
           "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion")


def serve(fd):
    import gc
    from importlib import import_module
    from multiprocessing import get_context
    for name in IMPORTS:
        import_module(name)
    gc.freeze()                                                 # a collection would copy what is shared
    with socket.socket(fileno=fd) as server:
        while True:
            client, _ = server.accept()
            with client:
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
