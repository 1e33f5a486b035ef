"""
A `python` for rehearsals that has torch and transformers loaded: a server that forks for every command.

why: a rehearsal of seventy commands would spend five seconds of CPU on each one's imports, and less than one
on its work. Scripts of this repository are loaded anew in every fork, so nothing of them is shared.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

# transformers loads the code of a model when it is first named
LIBRARIES = ("torch", "accelerate", "bm25s", "faiss", "transformers.models.bert.modeling_bert")
LIBRARIES += ("transformers.models.t5.modeling_t5", "transformers.models.auto.modeling_auto")

CLIENT = """#!{python} -SE
import json, os, socket, sys
if sys.argv[1:2] == ["-c"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [request], [0, 1, 2])
sys.exit(int(server.recv(8) or 1))
"""


def command(argv):
    """Run [script or -m module, arguments...] as python would; its exit code."""
    try:
        module = argv[0] == "-m"
        sys.argv = argv[module:]
        sys.path[0] = os.getcwd() if module else str(Path(argv[0]).resolve().parent)
        if module:
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(address):
    """For every client: fork, take over its files, folder and environment, run, send the exit code."""
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen(64)
    os.rename(f"{address}.new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        client, _ = listening.accept()
        if os.fork():
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listening.close()
        request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        argv, folder, environment = json.loads(request)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = command(argv)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        client.send(str(code).encode())
        os._exit(code)


@contextlib.contextmanager
def warm_python(folder, environment):
    """The folder that, first in PATH, brings this `python`; its server ends with the block."""
    folder = Path(folder)
    folder.mkdir()
    address = str(folder / "socket")
    (folder / "python").write_text(CLIENT.format(python=sys.executable, address=address))
    (folder / "python").chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], env=environment)
    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the server did not start"
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.05)
        yield folder
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
