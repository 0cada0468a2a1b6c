"""Block quantisation to e4m3 in plain jax.numpy, for the demo and the benchmarks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128
E4M3_MAX = 448.0


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x[m, k]`` in e4m3 with one scale for each row and 128 columns: ``[m, ceil(k / 128)]``."""
    return _quantize(x, 1)


def quantize_blocks(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``w[n, k]`` in e4m3 with one scale for each block of 128 × 128."""
    return _quantize(w, BLOCK)


def _quantize(x: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    padded = jnp.pad(x.astype(jnp.float32), ((0, -m % rows), (0, -k % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // rows, rows, -1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=(1, 3))
    scale = jnp.where(largest > 0, largest / E4M3_MAX, 1.0)
    data = (blocks / scale[:, None, :, None]).astype(jnp.float8_e4m3fn)
    return data.reshape(padded.shape)[:m, :k], scale
