"""A process that compiles one kernel: python compiling_process.py REQUEST, with REQUEST in JSON.

It prints "ready", waits for a line, compiles, and prints what came of it in JSON.
"""

import ctypes
import json
import resource
import sys
from pathlib import Path


def full_disk():
    """Every file stays empty: a write meets what it meets on a full disk, but for the errno."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def no_privileges():
    """Permission bits do not bind root; they do bind root without its capabilities."""
    version_3, this_process = 0x20080522, 0
    ctypes.CDLL(None).capset(
        (ctypes.c_uint32 * 2)(version_3, this_process), (ctypes.c_uint32 * 6)()
    )


def main(extension, cache, nvrtc, variant, handicap):
    # The extension alone, as compile workers import it: JAX would take a second.
    sys.path.insert(0, str(Path(extension).parent))
    import _C

    _C.configure(cache, nvrtc)
    if handicap:
        {"full_disk": full_disk, "no_privileges": no_privileges}[handicap]()
    print("ready", flush=True)
    sys.stdin.readline()
    compilation = _C.compile(*variant)
    print(
        json.dumps(
            {"size": len(compilation.cubin), "cached": compilation.cached, **_C.statistics()}
        )
    )


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
