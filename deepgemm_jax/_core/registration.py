"""Makes the extension's FFI handlers known to XLA."""

import functools

import jax

from .. import _C


@functools.cache
def register_handlers() -> None:
    """Registers every handler and the types of their states, once a process.

    Types first, for a handler names the type of its state. For CUDA alone: a handler with a state
    that is registered for the CPU keeps the CPU backend from starting.
    """
    for name, capsules in _C.types().items():
        jax.ffi.register_ffi_type(name, capsules, platform="CUDA")
    for name, stages in _C.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")
