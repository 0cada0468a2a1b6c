"""The MoE layer on GPUs: on one, on two of one process, and on one of each of two."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe.cases import TOKENS, dense, error, problem, router, value_and_gradients
from oracles import put
from processes import free_address, start

from deepgemm_jax.moe import Axes, MoEParams, moe_layer
from deepgemm_jax.moe.exchange import FALLBACK

pytestmark = pytest.mark.gpu

TOLERANCE = {"bf16": 0.01, "fp8": 0.1}
AXES = Axes(expert="expert")
LAYER = (Path(__file__).parents[1] / "moe" / "layer_process.py").read_text()


@pytest.fixture(scope="module")
def expected():
    """On the CPU: operands, their result and gradients."""
    with jax.default_device(jax.devices("cpu")[0]):
        operands = (*problem(shared=128), np.arange(TOKENS) % 7 != 3)
        return jax.tree.map(np.asarray, (operands, value_and_gradients(dense)(*operands)))


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_result_and_gradients(expected, recipe):
    operands, (wanted, wanted_gradients) = expected

    def layer(x, params, valid):
        return moe_layer(x, params, router, valid=valid, recipe=recipe)

    (y, stats), gradients = value_and_gradients(layer)(*put(operands, "cuda"))
    assert error(y, wanted) < TOLERANCE[recipe]
    assert error(gradients, wanted_gradients) < 1.5 * TOLERANCE[recipe]
    assert stats.dropped == 0


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_serving(expected, layout):
    (x, params, _, valid), (wanted, _) = expected
    x, params, valid = put((x, params, valid), "cuda")
    layer = jax.jit(functools.partial(moe_layer, router=router, layout=layout))
    with jax.default_matmul_precision("highest"):
        y, _ = layer(x.astype(jnp.bfloat16), jax.jit(MoEParams.quantize)(params), valid=valid)
    assert error(y, wanted) < TOLERANCE["fp8"]


@pytest.mark.multigpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_two_gpus(expected, strategy, recipe):
    operands, (wanted, wanted_gradients) = expected
    devices = jax.local_devices(backend="cuda")[:2]
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)
    tokens = AXES.token_spec()
    specs = tokens, AXES.param_specs(operands[1]), tokens, tokens

    def layer(x, params, valid):
        return moe_layer(
            x, params, router, valid=valid, strategy=strategy, axes=AXES, recipe=recipe
        )

    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            layer, in_specs=(*specs[:2], tokens), out_specs=(tokens, P()), check_vma=True
        )
        operands = jax.device_put(
            operands, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        )
        (y, stats), gradients = value_and_gradients(sharded)(*operands)
    assert error(y, wanted) < TOLERANCE[recipe]
    assert error(gradients, wanted_gradients) < 1.5 * TOLERANCE[recipe]
    assert stats.dropped == 0


def two_processes(strategy: str, recipe: str, flags: str):
    address = free_address()
    return [
        start(
            LAYER,
            address,
            i,
            2,
            strategy,
            recipe,
            JAX_PLATFORMS="cuda",
            CUDA_VISIBLE_DEVICES=str(i),
            XLA_PYTHON_CLIENT_PREALLOCATE="false",
            XLA_FLAGS=flags,
        )
        for i in range(2)
    ]


@pytest.mark.multigpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_two_processes(strategy, recipe):
    flags = f"--{FALLBACK}=true" if strategy == "ragged_all_to_all" else ""
    for process in two_processes(strategy, recipe, flags):
        output, _ = process.communicate(timeout=300)
        # It compares by itself. What it says at last may not be its last line: so may a library's.
        assert process.returncode == 0, output


@pytest.mark.multigpu
def test_ragged_all_to_all_between_processes_says_which_flag_it_needs():
    for process in two_processes("ragged_all_to_all", "bf16", ""):
        output, _ = process.communicate(timeout=300)
        assert process.returncode != 0
        assert f"XLA_FLAGS=--{FALLBACK}=true" in output
