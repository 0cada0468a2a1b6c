"""One process of many that have a part of the layer each, and compare it with the whole."""

import functools
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe.cases import dense, error, problem, router

from deepgemm_jax.moe import Axes, moe_layer

TOLERANCE = {"bf16": 0.02, "fp8": 0.15}

jax.config.update("jax_default_matmul_precision", "highest")
address, process, processes, strategy, recipe = sys.argv[1:]
jax.distributed.initialize(address, int(processes), int(process))
x, params, d = problem()


def both(layer):
    "The result, and the gradient of its product with d for the tokens."

    def run(x, params, d):
        y, pullback, *stats = jax.vjp(lambda x: layer(x, params), x, has_aux=layer is not dense)
        return (y, pullback(d)[0]), stats

    return jax.jit(run)


wanted, _ = both(dense)(x, params, d)
mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
axes = Axes(expert="expert")
specs = axes.token_spec(), axes.param_specs(params), axes.token_spec()


def put(leaf, spec):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda i: leaf[i])


layer = functools.partial(moe_layer, router=router, strategy=strategy, axes=axes, recipe=recipe)
with jax.set_mesh(mesh):
    sharded = jax.shard_map(layer, in_specs=specs[:2], out_specs=(specs[0], P()), check_vma=True)
    result, (stats,) = both(sharded)(*jax.tree.map(put, (x, params, d), specs))


def close(got, wanted):
    for shard in got.addressable_shards:
        assert error(shard.data, np.asarray(wanted)[shard.index]) < TOLERANCE[recipe]


jax.tree.map(close, result, wanted)
assert stats.dropped == 0
print("close")
