"""What fp8_gemm_nt becomes for a GPU, told from the lowered text: no GPU is needed."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import random_like, random_problem

from deepgemm_jax import (
    bf16_gemm_nt,
    explain,
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_fp8_gemm_nn_contiguous,
)
from deepgemm_jax._core import op
from deepgemm_jax._core.device import H200, Device
from deepgemm_jax.gemm.config import Problem, candidates, choose

TARGET = "deepgemm_jax_gemm"


def lower(function, *operands) -> str:
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    return re.findall(rf"custom_call @{TARGET}.*", text)


def test_kernel_is_called_with_its_layouts_and_config():
    a, b = random_problem(0, 130, 200, 400)
    (call,) = calls(lower(fp8_gemm_nt, a, b))
    problem = Problem(m=130, n=200, k=400, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
    layouts = re.search(r"operand_layouts = \[(.*?)\], ", call)[1]
    assert re.findall(r"dense<\[(.*?)\]>", layouts) == ["1, 0", "0, 1", "1, 0", "1, 0"]
    assert 'arch = "sm_90a"' in call
    assert "num_sms = 132" in call
    assert f"tensor<{len(vars(choose(problem, H200)))}xi64>" in call
    assert "output_operand_aliases" not in call


def test_c_may_become_d():
    a, b = random_problem(0, 130, 200, 400)
    (call,) = calls(lower(fp8_gemm_nt, a, b, random_like(0, 130, 200, 400, jnp.bfloat16)))
    assert re.search(r"output_operand_alias<output_tuple_indices = \[\], operand_index = 4", call)


def test_nothing_is_launched_for_no_rows():
    assert not calls(lower(fp8_gemm_nt, *random_problem(0, 0, 200, 400)))


@pytest.mark.parametrize(
    ("axes", "n", "operands"),
    [
        ((0, None), 200, ["390x400x", "390x4x", "200x400x", "2x4x"]),  # more rows
        ((None, 0), 256, ["130x400x", "130x4x", "768x400x", "6x4x"]),  # more columns
        ((None, 0), 200, ["3x130x400x", "3x130x4x", "3x200x400x", "3x2x4x"]),
        ((0, 0), 200, ["3x130x400x", "3x130x4x", "3x200x400x", "3x2x4x"]),
    ],
)
def test_vmap_makes_one_call(axes, n, operands):
    a, b = random_problem(0, 130, n, 400, (3,))
    a, b = (
        x if axis == 0 else jax.tree.map(lambda leaf: leaf[0], x)
        for x, axis in zip((a, b), axes, strict=True)
    )
    (call,) = calls(lower(jax.vmap(fp8_gemm_nt, in_axes=axes), a, b))
    assert re.findall(r"tensor<([\dx]+)f", call)[:4] == operands


def test_rows_scales_stay_column_major_in_a_batch():
    (call,) = calls(lower(jax.vmap(fp8_gemm_nt), *random_problem(0, 130, 200, 400, (3,))))
    layouts = re.search(r"operand_layouts = \[(.*?)\], ", call)[1]
    assert re.findall(r"dense<\[(.*?)\]>", layouts)[1] == "1, 2, 0"


def test_implementation():
    a, b = random_problem(0, 130, 200, 400)
    plain, kernel = (
        functools.partial(fp8_gemm_nt, implementation=name) for name in ("xla", "cuda")
    )
    assert not calls(lower(plain, a, b))
    assert calls(lower(kernel, a, b))
    with pytest.raises(NotImplementedError, match="fp8_gemm_nt has no kernel for cpu"):
        jax.jit(kernel).lower(a, b)


def test_plain_jax_launches_nothing_where_operands_are_transposed():
    def plain(gemm, *operands, **options):
        return lower(functools.partial(gemm, implementation="xla", **options), *operands)

    def operand(*shape):
        scale = jnp.ones([*shape[:-2], *(-(-n // 128) for n in shape[-2:])])
        return jnp.ones(shape, jnp.float8_e4m3fn), scale

    def rows(k, m):
        return jnp.ones((k, m), jnp.float8_e4m3fn), jnp.ones((k // 128, m))

    a, b = (jnp.ones((256, 512), jnp.float8_e4m3fn), jnp.ones((256, 4))), operand(512, 128)
    sizes = jnp.array([100, 30])
    assert "custom_call" not in plain(fp8_gemm_nn, a, b)
    assert "custom_call" not in plain(fp8_gemm_tn, rows(512, 64), rows(512, 128))
    assert "custom_call" not in plain(fp8_gemm_tt, rows(512, 64), operand(128, 512))
    assert "custom_call" not in plain(
        m_grouped_fp8_gemm_nn_contiguous, a, operand(2, 512, 128), group_sizes=sizes
    )
    assert "custom_call" not in plain(
        k_grouped_fp8_gemm_tn_contiguous, rows(256, 64), rows(256, 128), group_sizes=sizes
    )


def test_gpu_without_kernel(monkeypatch, caplog):
    monkeypatch.setattr(op, "cuda_device", lambda: Device("sm_80", 108, 166912, 2039))
    a, b = random_problem(0, 131, 200, 400)
    with caplog.at_level(logging.WARNING, "deepgemm_jax"):
        assert not calls(lower(fp8_gemm_nt, a, b))
        assert not calls(lower(lambda a, b: fp8_gemm_nt(a, b) * 2, a, b))
    assert [record.message for record in caplog.records] == [
        "fp8_gemm_nt has no kernel for sm_80, only for sm_90a: plain JAX takes its place"
    ]
    with pytest.raises(NotImplementedError, match="fp8_gemm_nt has no kernel for sm_80"):
        lower(functools.partial(fp8_gemm_nt, implementation="cuda"), a, b)


def test_config_that_is_given_is_taken():
    a, b = random_problem(0, 130, 200, 400)
    problem = Problem(m=130, n=200, k=400, batch=1, out_dtype=jnp.bfloat16, accumulate=False)
    *_, (config, _) = candidates(problem, H200)
    assert config != choose(problem, H200)
    (call,) = calls(lower(functools.partial(fp8_gemm_nt, config=config), a, b))
    integers = ", ".join(map(str, config.integers))
    assert f"config = dense<[{integers}]>" in call


def test_config_that_does_not_fit():
    a, b = random_problem(0, 130, 200, 400)
    problem = Problem(m=130, n=200, k=400, batch=1, out_dtype=jnp.float32, accumulate=False)
    config = choose(problem, H200)
    with pytest.raises(ValueError, match="fp8_gemm_nt: .*config"):
        jax.eval_shape(functools.partial(fp8_gemm_nt, config=config), a, b)


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "cuda")])
def test_export_round_trip(platforms):
    a, b = random_problem(0, 33, 130, 144)
    exported = export.export(
        jax.jit(fp8_gemm_nt),
        platforms=platforms,
        disabled_checks=[export.DisabledSafetyCheck.custom_call(TARGET)],
    )(a, b)
    exported = export.deserialize(exported.serialize())
    assert (TARGET in exported.mlir_module()) == ("cuda" in platforms)
    if "cpu" in platforms:
        a, b = jax.device_put((a, b), jax.devices("cpu")[0])
        np.testing.assert_array_equal(exported.call(a, b), fp8_gemm_nt(a, b))


def test_export_with_any_number_of_rows():
    a, b = random_problem(0, 33, 130, 144)
    (m,) = export.symbolic_shape("m")
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((m, x.shape[1]), x.dtype), a)
    exported = export.export(jax.jit(fp8_gemm_nt), platforms=("cpu",))(rows, b)
    a, b = jax.device_put((a, b), jax.devices("cpu")[0])
    np.testing.assert_array_equal(exported.call(a, b), fp8_gemm_nt(a, b))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh_lowers_for_a_gpu(mesh, kind):
    a, b = random_problem(0, 64, 1024, 512)
    with mesh(kind):
        a, b = (
            jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), P(axis)))
            for x, axis in ((a, "x"), (b, "y"))
        )
        text = lower(fp8_gemm_nt, a, b)
    if kind == AxisType.Auto:
        # XLA calls back for the device's part when it has chosen the shardings.
        assert "CustomSPMDPartitioning" in text
        assert "sdy.sharding_rule" in text
    else:
        (call,) = calls(text)
        assert re.findall(r"tensor<([\dx]+)f", call)[:3] == ["32x512x", "32x4x", "256x512x"]


def test_manual_mesh_lowers_for_a_gpu(mesh):
    a, b = random_problem(0, 64, 1024, 512)
    with mesh(AxisType.Auto):
        text = lower(
            jax.shard_map(fp8_gemm_nt, in_specs=(P("x"), P("y")), out_specs=P("x", "y")), a, b
        )
    (call,) = calls(text)
    assert re.findall(r"tensor<([\dx]+)f", call)[:3] == ["32x512x", "32x4x", "256x512x"]


def test_what_is_explained_may_have_arguments_that_are_no_arrays():
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    options = {"preferred_element_type": jnp.float32, "implementation": "cuda"}
    [found] = explain(bf16_gemm_nt, x, b=x, **options)
    assert found.problem.out_dtype == jnp.float32
    [found] = explain(lambda xs, options: bf16_gemm_nt(*xs, **options), [x, x], options)
    assert found.problem.out_dtype == jnp.float32
