"""Which kernel a call takes, and why."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .._core.device import Device
from .config import AnyConfig, Problem, candidates

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)

_listener: contextvars.ContextVar[list | None] = contextvars.ContextVar("explain", default=None)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One GEMM of a program: its problem, the config taken, and all configs with the seconds that
    the cost model predicts."""

    problem: Problem
    config: AnyConfig
    candidates: list[tuple[AnyConfig, float]]

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for config, seconds in self.candidates:
            mark = "*" if config == self.config else " "
            lines.append(f"{mark} {seconds * 1e6:9.2f} µs  {config}")
        return "\n".join(lines)


def explain(function: Callable, *args: Any, **kwargs: Any) -> list[Explanation]:
    """Tells how each GEMM in a function will run on this machine's GPU, or on an H200 if it has
    none, without running it.

    Args:
      function: any that `jax.jit` takes.
      args, kwargs: its arguments, and trees of them, as arrays or as `jax.ShapeDtypeStruct`. All
        else, such as numbers, strings and dtypes, reaches it as it is.

    Returns:
      An `Explanation` for each GEMM that a kernel computes, in the order in which they are lowered,
      one for all that are alike, which JAX lowers once. Each prints as its problem and a line for
      every config that there is for it, the best first, with the time that the cost model predicts,
      and a star at the one taken.

    Example:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from deepgemm_jax import bf16_gemm_nt, explain
        >>> x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
        >>> [gemm] = explain(bf16_gemm_nt, x, x)
        >>> gemm.problem.m, gemm.candidates[0][0] == gemm.config
        (4096, True)
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, _ARRAYS)}

    # A function of its own, which JAX has not lowered before: then it would tell nothing.
    @jax.jit
    def program(arrays):
        args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)])
        return function(*args, **kwargs)

    with _listening() as found:
        program.trace(arrays).lower(lowering_platforms=("cuda",))
    return found


def tell(problem: Problem, config: AnyConfig, device: Device) -> None:
    """Lets who asked to explain know of a config that was taken."""
    found = _listener.get()
    if found is not None:
        found.append(Explanation(problem, config, candidates(problem, device)))


@contextlib.contextmanager
def _listening() -> Iterator[list[Explanation]]:
    found: list[Explanation] = []
    token = _listener.set(found)
    try:
        yield found
    finally:
        _listener.reset(token)
