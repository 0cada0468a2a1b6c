"""Makes the extension's FFI handlers known to XLA."""

import jax

from .. import _C


def register() -> None:
    """Registers every handler and the types of their state, for CUDA alone.

    Types first, for a handler names its state's type. Not for other platforms: a target with a
    state registered there would keep their backends from starting.
    """
    for name, capsules in _C.types().items():
        jax.ffi.register_ffi_type(name, capsules, platform="CUDA")
    for name, handlers in _C.registrations().items():
        jax.ffi.register_ffi_target(name, handlers, platform="CUDA")
