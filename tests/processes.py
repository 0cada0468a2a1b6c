"""Python programs in processes of their own."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def start(script: str, *arguments, **environment) -> subprocess.Popen:
    path = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output.splitlines()[-1]


def free_address() -> str:
    """Where processes of one `jax.distributed` may meet: a port that no other socket has, and none
    of those that the system hands out, lest a connection takes it meanwhile."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return f"localhost:{port}"
