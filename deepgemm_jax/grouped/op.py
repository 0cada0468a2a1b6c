"""The declarations of the grouped GEMMs.

Rows are told by the id of their group, one for each: so rows may be divided among devices and
batches folded into rows, whoever's they are. Where neither is the case, and groups follow each
other, the first row and the end of each group spare the kernel the search for them. K-grouped ones
are always told so, for it is the groups that may be divided there.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core.op import Derivative, Op, Params
from ..gemm.layouts import transposed
from ..gemm.op import FP8, Form
from ..gemm.recipes import Pair, of_rows, scales_of
from ..scaled import BLOCK
from . import groups, reference


@dataclasses.dataclass(frozen=True)
class GroupedParams(Params):
    preferred_element_type: Any = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class PlainParams(GroupedParams):
    """Of operands without scales."""

    lhs_dtype: Any = jnp.bfloat16
    rhs_dtype: Any = jnp.bfloat16
    precision: Any = None


@dataclasses.dataclass(frozen=True)
class MaskedParams(GroupedParams):
    expected_m: int | None = None


ALIGNED = 16  # elements of FP8 along K

NO_DERIVATIVE = (
    "Stop the gradient of its operands, or wrap the call in jax.custom_vjp, with the other grouped "
    "products as its gradients: the K-grouped one is that of the weights"
)
QUANTISED = f"its operands are quantised. {NO_DERIVATIVE}"
PLAIN = f"it is one of DeepGEMM's, use ragged_dot. {NO_DERIVATIVE}"


def _divide_k(total, params, *operands):
    """Parts of the sum stay in the accumulator's dtype; the cast is last."""
    dtypes = [x.dtype for x in operands]
    dtype = reference.accumulator(params.preferred_element_type, *dtypes)
    (d,) = total(dataclasses.replace(params, preferred_element_type=dtype), *operands)
    return [d.astype(params.preferred_element_type)]


def _by_transposing(nt: Op, *positions: int) -> dict[str, Any]:
    """How an op computes that is `nt` of the scaled operands there the other way round."""

    def reference(params, *operands):
        arrays = list(operands)
        for i in positions:
            data, scale, ndim = arrays[i], arrays[i + 1], arrays[i].ndim
            # The copy engine wants rows of whole 16 bytes; what fills them up is no group's.
            missing = -data.shape[-2] % ALIGNED
            data = jnp.pad(data, [*[(0, 0)] * (ndim - 2), (0, missing), (0, 0)])
            of_rows = scale.ndim < ndim
            pair = data, scale[..., None] if of_rows else scale
            x = transposed(nt.name, "operand", pair, params.implementation, ndim)
            arrays[i : i + 2] = x.data, scale if of_rows else x.scale
        return nt.bind(params, arrays)

    return {"reference": reference, "composed": True, "batched": True}


def _join_rows(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Of A, B and ids [batch, M]: a batch's rows one after the other, and all of its groups."""
    *others, b, ids = operands
    first = b.shape[1] * jnp.arange(len(ids), dtype=jnp.int32)[:, None]
    ids = jnp.where(ids < 0, groups.PADDING, ids + first)
    return [jax.lax.collapse(x, 0, 2) for x in (*others, b, ids)]


def _join_along_k(operands: Sequence[jax.Array], *, axis: int, scaled: bool) -> list[jax.Array]:
    """The same where groups are parts of K, dim `axis` of A and B."""
    count = 4 if scaled else 2
    arrays, (starts, ends, *c) = operands[:count], operands[count:]
    if scaled:
        # K is last, and each of the batch has blocks of its own.
        missing = [(0, 0), (0, 0), (0, -arrays[0].shape[2] % BLOCK)]
        arrays = [jnp.pad(x, missing) if i % 2 == 0 else x for i, x in enumerate(arrays)]
    first = arrays[0].shape[1 + axis] * jnp.arange(len(starts), dtype=jnp.int32)[:, None]
    return [
        *(jax.lax.collapse(jnp.moveaxis(x, 0, axis), axis, axis + 2) for x in arrays),
        *(jax.lax.collapse(x, 0, 2) for x in (starts + first, ends + first, *c)),
    ]


def _by_kernel(form: Form, reference, **options: Any) -> dict[str, Any]:
    return {"reference": reference, "kernel": form.kernel(), **options}


class Contiguous(NamedTuple):
    """A product of groups of rows, in both of its spellings."""

    by_id: Op  # a, b, the group of each row
    in_order: Op  # a, b, the first row and the end of each group: they follow each other

    @property
    def name(self) -> str:
        return self.by_id.name


def _contiguous(
    name: str, a: dict, b: dict, by_id: dict, in_order: dict, derivative: Derivative, limits=None
) -> Contiguous:
    rest: dict[str, Any] = {
        "results": {"d": "preferred_element_type[m n]"},
        "limits": limits,
        "derivative": derivative,
        "fold": ("m", "n"),
        "whole": ("g",),
        "divide": _divide_k,
    }
    told = {"m_indices": "int32[m]"}, {"starts": "int32[g]", "ends": "int32[g]"}
    op_by_id = Op(name, operands={**a, **b, **told[0]}, **by_id, **rest)

    def by_finding_ids(params, *operands):
        *others, starts, ends = operands
        ids = functools.partial(groups.ids, rows=others[0].shape[-2])
        m_indices = jnp.vectorize(ids, signature="(g),(g)->(m)")(starts, ends)
        return op_by_id.bind(params, [*others, m_indices])

    in_order = {"reference": by_finding_ids, "batched": True, **in_order}
    return Contiguous(
        op_by_id, Op(name, operands={**a, **b, **told[1]}, alone=True, **in_order, **rest)
    )


def _k_grouped(
    name: str, a: dict, b: dict, c: dict, how: dict, derivative: Derivative, limits=None
):
    return Op(
        name,
        operands={**a, **b, "starts": "int32[g]", "ends": "int32[g]", **c},
        results={"d": "preferred_element_type[g m n]"},
        limits=limits,
        **how,
        derivative=derivative,
        fold=("m", "n"),
    )


def _masked(name: str, a: dict, b: dict, how: dict, derivative: str, limits=None):
    return Op(
        name,
        operands={**a, **b, "masked_m": "int32[g]"},
        results={"d": "preferred_element_type[g m n]"},
        limits=limits,
        **how,
        derivative=derivative,
        fold=("g",),
        divide=_divide_k,
    )


def _fp8(name: str, data: str, scale: str) -> dict[str, str]:
    return {f"{name}.data": f"{FP8}[{data}]", f"{name}.scale": f"float32[{scale}]"}


LIMITS = {"n": (16, 1), "k": (16, 16)}
K_LIMITS = {"m": (16, 16), "n": (16, 16)}

A_BF16 = {"a": "bfloat16[m k]"}
C = {"c?": "preferred_element_type[g m n]"}


def _rows(reference: Callable, **form: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a contiguous product in both spellings is computed."""
    by_id, in_order = (Form(groups="contiguous", by_id=by_id, **form) for by_id in (True, False))
    return _by_kernel(by_id, reference, join=_join_rows), {"kernel": in_order.kernel()}


ROWS_NT, ROWS_NN = (
    _rows(
        functools.partial(reference.contiguous, transpose_b=transpose_b),
        scales="none",
        b_mn_major=transpose_b,
    )
    for transpose_b in (False, True)
)
SUMS_TN, SUMS_NT = (
    _by_kernel(
        Form("none", "along_k", a_mn_major=axis == 0, b_mn_major=axis == 0),
        functools.partial(reference.k_grouped, axis=axis),
        join=functools.partial(_join_along_k, axis=axis, scaled=False),
    )
    for axis in (0, 1)
)

# Of A, and of each group's B [N, K] and [K, N].
SCALES = {
    "blocks": ("m k/128", "n/128 k/128", "k/128 n/128"),
    "channels": ("m k/128", "n k/128", "k/128 n"),
    "rows": ("m", "n", "n"),
}


def by_recipe(
    name: str,
    a: Pair,
    b: Pair,
    recipe: Sequence[int] | None = None,
    *,
    b_mn_major: bool = False,
) -> tuple[str, list[jax.Array]]:
    """Which of these scales the operands have, and data and scales as an op of such takes them."""
    (a_data, a_scale), (b_data, b_scale) = a, b
    scales = scales_of(name, a, b, recipe, b_mn_major=b_mn_major)
    if scales == "rows":
        n = b_data.shape[-1 if b_mn_major else -2]
        a_scale = of_rows(a_scale, a_data.shape[:-1])
        b_scale = of_rows(b_scale, (*b_data.shape[:-2], n))
    return scales, [a_data, a_scale, b_data, b_scale]


m_grouped_fp8_gemm_nt_contiguous = {
    scales: _contiguous(
        "m_grouped_fp8_gemm_nt_contiguous",
        _fp8("a", "m k", of_a),
        _fp8("b", "g n k", f"g {of_b}"),
        *_rows(functools.partial(reference.fp8_contiguous, scales=scales), scales=scales),
        QUANTISED,
        LIMITS,
    )
    for scales, (of_a, of_b, _) in SCALES.items()
}
m_grouped_fp8_gemm_nn_contiguous = {
    scales: _contiguous(
        "m_grouped_fp8_gemm_nn_contiguous",
        _fp8("a", "m k", of_a),
        _fp8("b", "g k n", f"g {of_b}"),
        _by_transposing(m_grouped_fp8_gemm_nt_contiguous[scales].by_id, 2),
        _by_transposing(m_grouped_fp8_gemm_nt_contiguous[scales].in_order, 2),
        QUANTISED,
        LIMITS,
    )
    for scales, (of_a, _, of_b) in SCALES.items()
}
m_grouped_bf16_gemm_nt_contiguous = _contiguous(
    "m_grouped_bf16_gemm_nt_contiguous",
    A_BF16,
    {"b": "bfloat16[g n k]"},
    *ROWS_NT,
    PLAIN,
)
m_grouped_bf16_gemm_nn_contiguous = _contiguous(
    "m_grouped_bf16_gemm_nn_contiguous",
    A_BF16,
    {"b": "bfloat16[g k n]"},
    *ROWS_NN,
    PLAIN,
)
m_grouped_fp8_gemm_nt_masked = {
    scales: _masked(
        "m_grouped_fp8_gemm_nt_masked",
        _fp8("a", "g m k", f"g {of_a}"),
        _fp8("b", "g n k", f"g {of_b}"),
        _by_kernel(Form(scales, "masked"), functools.partial(reference.fp8_masked, scales=scales)),
        QUANTISED,
        LIMITS,
    )
    for scales, (of_a, of_b, _) in SCALES.items()
}
m_grouped_bf16_gemm_nt_masked = _masked(
    "m_grouped_bf16_gemm_nt_masked",
    {"a": "bfloat16[g m k]"},
    {"b": "bfloat16[g n k]"},
    _by_kernel(Form("none", "masked"), reference.masked),
    NO_DERIVATIVE,
)
k_grouped_fp8_gemm_nt_contiguous = _k_grouped(
    "k_grouped_fp8_gemm_nt_contiguous",
    _fp8("a", "m k", "m k/128"),
    _fp8("b", "n k", "n k/128"),
    C,
    _by_kernel(
        Form("channels", "along_k"),
        reference.fp8_k_grouped,
        join=functools.partial(_join_along_k, axis=1, scaled=True),
    ),
    QUANTISED,
    K_LIMITS,
)
k_grouped_fp8_gemm_tn_contiguous = _k_grouped(
    "k_grouped_fp8_gemm_tn_contiguous",
    _fp8("a", "k m", "k/128 m"),
    _fp8("b", "k n", "k/128 n"),
    C,
    _by_transposing(k_grouped_fp8_gemm_nt_contiguous, 0, 2),
    QUANTISED,
    K_LIMITS,
)
k_grouped_bf16_gemm_tn_contiguous = _k_grouped(
    "k_grouped_bf16_gemm_tn_contiguous",
    {"a": "bfloat16[k m]"},
    {"b": "bfloat16[k n]"},
    C,
    SUMS_TN,
    NO_DERIVATIVE,
)
k_grouped_bf16_gemm_nt_contiguous = _k_grouped(
    "k_grouped_bf16_gemm_nt_contiguous",
    {"a": "bfloat16[m k]"},
    {"b": "bfloat16[n k]"},
    C,
    SUMS_NT,
    NO_DERIVATIVE,
)


def _bilinear(*cotangents: Callable) -> list[Callable]:
    """The derivative of a product, by `(d, lhs, rhs)` -> the op and the operands of a cotangent."""

    def transpose(product, params, dtype, d, lhs, rhs, *told):
        op, x, y = product(d, lhs, rhs)
        like = dataclasses.replace(
            params, lhs_dtype=x.dtype, rhs_dtype=y.dtype, preferred_element_type=dtype
        )
        return op.bind(like, [x, y, *told])[0]

    return [functools.partial(transpose, product) for product in cotangents]


# What ragged_dot and its derivatives are made of, in any dtypes.
ragged_nn: Contiguous = _contiguous(
    "ragged_dot",
    {"lhs": "lhs_dtype[m k]"},
    {"rhs": "rhs_dtype[g k n]"},
    *ROWS_NN,
    _bilinear(
        lambda d, lhs, rhs: (ragged_nt.in_order, d, rhs),
        lambda d, lhs, rhs: (ragged_contracting, lhs, d),
    ),
)
ragged_nt: Contiguous = _contiguous(
    "ragged_dot_transposed",
    {"lhs": "lhs_dtype[m k]"},
    {"rhs": "rhs_dtype[g n k]"},
    *ROWS_NT,
    _bilinear(
        lambda d, lhs, rhs: (ragged_nn.in_order, d, rhs),
        lambda d, lhs, rhs: (ragged_contracting, d, lhs),
    ),
)
ragged_contracting: Op = _k_grouped(
    "ragged_dot_contracting",
    {"lhs": "lhs_dtype[k m]"},
    {"rhs": "rhs_dtype[k n]"},
    {},
    SUMS_TN,
    _bilinear(
        lambda d, lhs, rhs: (ragged_nt.in_order, rhs, d),
        lambda d, lhs, rhs: (ragged_nn.in_order, lhs, d),
    ),
)
