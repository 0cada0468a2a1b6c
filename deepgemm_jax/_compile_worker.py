"""Compiles kernel variants in a process of its own: NVRTC serialises the threads of one process.

Runs by path, with the path of the extension and its settings as arguments. Each line in is a JSON
list ``[source, config, arch]``, each line out its answer. Neither JAX nor the caller's ``__main__``
is imported, so a worker starts in milliseconds and takes no GPU memory.
"""

import importlib.util
import json
import signal
import sys


def load_extension(path: str):
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def main(extension: str, cache_dir: str, *nvrtc: str) -> None:
    # Ctrl-C reaches the whole process group, but it is the caller who ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _C = load_extension(extension)
    _C.configure(cache_dir, list(nvrtc))
    for line in sys.stdin:
        try:
            done = _C.compile(*json.loads(line))
            answer = {"cached": done.cached, "seconds": done.seconds}
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
