"""Mixtures of experts: from a router's logits to the layer's result, on one device or many.

`moe_layer` is the whole layer; `route`, `Permutation`, `permute` and `unpermute` are what it is
made of, for layers of one's own. Parallelism is JAX's: the layer is called within `jax.shard_map`,
whose mesh may span hosts (`jax.distributed.initialize`), and communicates by XLA's collectives.
"""

from .layer import Axes, MoEParams, MoEStats, moe_layer
from .maxtext import grouped_gemm
from .permutation import Permutation, permute, unpermute
from .routing import drop_over_capacity, expert_load, route, update_bias

__all__ = [
    "Axes",
    "MoEParams",
    "MoEStats",
    "Permutation",
    "drop_over_capacity",
    "expert_load",
    "grouped_gemm",
    "moe_layer",
    "permute",
    "route",
    "unpermute",
    "update_bias",
]
