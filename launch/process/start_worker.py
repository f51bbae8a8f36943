"""How does a worker come out of the fork server? Ray's raylet runs this for each:

    python start_worker.py SOCKET WORKER_SCRIPT ARGUMENT ...

It hands its command, environment, folder and files to the server, whose fork goes on as that command, and ends. Where
no server answers it becomes the command itself. Imports nothing but what Python brings.
"""

import json
import os
import socket
import sys


def ask(address: str, command: list[str]) -> bool:
    """Whether a fork runs the command."""
    request = {"command": command, "cwd": os.getcwd(), "environment": dict(os.environ)}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.connect(address)
            socket.send_fds(server, [b" "], [0, 1, 2])
            server.sendall(json.dumps(request).encode())
            server.shutdown(socket.SHUT_WR)
            return server.recv(1) == b"!"
    except OSError:
        return False


if __name__ == "__main__":
    if not ask(sys.argv[1], sys.argv[2:]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
