"""The products of a linear layer, dense or grouped, in either precision.

An operand in FP8 is a `ScaledArray`, one in bfloat16 an array: what the operands are says in which
precision a product is computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core import compat, sums
from ..gemm import bf16_gemm_nn, bf16_gemm_nt, bf16_gemm_tn, fp8_gemm_1d1d, fp8_gemm_1d2d
from ..grouped import (
    groups,
    k_grouped_bf16_gemm_tn_contiguous,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
)
from ..quantize import per_token_cast_to_fp8, prepare_weight, quantize_transpose
from ..scaled import ScaledArray
from .recipe import Recipe

Operand = Any  # ScaledArray | jax.Array

MULTIPLE = 16  # of the dim that an FP8 product contracts
KEPT = "deepgemm_jax.activations"  # how policies of jax.checkpoint call what gradients need


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Which rows are whose in a grouped layer."""

    sizes: jax.Array  # int32 [T], of all groups
    first: jax.Array | None  # int32 [], the group of the first matrix; None if each has one
    count: int = dataclasses.field(metadata={"static": True})  # of matrices

    def told(self, sizes: jax.Array, rows: int) -> dict[str, jax.Array]:
        """How a grouped product is told which rows are whose, if the groups have these sizes."""
        if self.first is None:
            return {"group_sizes": sizes}
        starts, ends = groups.shard(*sums.spans(sizes, rows), rows, self.first, self.count)
        return {"group_offsets": jnp.concatenate([starts[:1], ends])}


class Summed(NamedTuple):
    """Rows as an operand of the product that sums over them."""

    operand: Operand  # [rows, channels], but in FP8 [channels, rows]
    sizes: Any  # int32 [T], how many of these rows each group has; None where there are no groups


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of a layer; `of` is None where it is dense."""

    recipe: Recipe
    input: Any  # the type of its input and of the input's gradient
    implementation: str | None

    def operands(
        self, x: jax.Array, of: Groups | None, times: str, summed: str
    ) -> tuple[Operand, Summed]:
        """x as an operand of `times` and of `sum`, in these precisions."""
        narrow = x.astype(jnp.bfloat16)
        rows: Operand = narrow
        columns = Summed(narrow, None if of is None else of.sizes)
        if summed == "fp8" and of is not None:
            rows, *transposed = quantize_transpose(x, of.sizes, implementation=self.implementation)
            columns = Summed(*transposed)
        elif summed == "fp8":
            # Of no rows, too, there is a product.
            missing = -x.shape[0] % MULTIPLE if x.shape[0] else MULTIPLE
            padded = jnp.pad(x, ((0, missing), (0, 0)))
            rows, across = quantize_transpose(padded, implementation=self.implementation)
            rows, columns = rows[: x.shape[0]], Summed(across, None)
        elif times == "fp8":
            rows = per_token_cast_to_fp8(x, implementation=self.implementation)
        return rows if times == "fp8" else narrow, columns

    def times(
        self, x: Operand, w: jax.Array, of: Groups | None, *, transposed: bool = False
    ) -> jax.Array:
        """x w or x wᵀ. Rows of no group are zero."""
        product: Callable[..., jax.Array]
        options: dict[str, Any] = {
            "preferred_element_type": self.input.dtype,
            "implementation": self.implementation,
        }
        if of is not None:
            options |= of.told(of.sizes, x.shape[0])
        if isinstance(x, ScaledArray):
            product = fp8_gemm_1d2d if of is None else m_grouped_fp8_gemm_nt_contiguous
            return product(x, self.narrow_weight(w, transposed), **options)
        if of is None:
            product = bf16_gemm_nt if transposed else bf16_gemm_nn
        elif transposed:
            product = m_grouped_bf16_gemm_nt_contiguous
        else:
            product = m_grouped_bf16_gemm_nn_contiguous
        return product(x, w.astype(jnp.bfloat16), **options)

    def narrow_weight(self, w: jax.Array, transposed: bool) -> ScaledArray:
        """w in FP8 for x w or for x wᵀ.

        Both come of one call, which XLA makes once where the other is in the same program.
        """
        forward, backward = prepare_weight(
            w, layout="kn", transposed=True, implementation=self.implementation
        )
        return backward if transposed else forward

    def sum(
        self,
        x: Summed,
        dy: Summed,
        of: Groups | None,
        w: jax.Array,
        main_grad: jax.Array | None,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """xᵀ dy, of each group, as the gradients of the weight and of its main gradient.

        If there is a main gradient, the sum of both is its, and the weight has none.
        """
        product: Callable[..., jax.Array]
        dtype = w.dtype if main_grad is None else jnp.dtype(jnp.float32)
        options: dict[str, Any] = {
            "preferred_element_type": dtype,
            "implementation": self.implementation,
        }
        scaled = isinstance(x.operand, ScaledArray)
        if main_grad is not None:
            main_grad = _one_for_each(main_grad, (x, dy))
        if of is None:
            product = fp8_gemm_1d1d if scaled else bf16_gemm_tn
        else:
            rows = x.operand.shape[1 if scaled else 0]
            options |= of.told(dy.sizes, rows)
            product = (
                k_grouped_fp8_gemm_nt_contiguous if scaled else k_grouped_bf16_gemm_tn_contiguous
            )
        dw = product(x.operand, dy.operand, main_grad, **options)
        dw = compat.divided_as(dw, w if main_grad is None else main_grad)
        return (dw, None) if main_grad is None else (None, dw)


@jax.custom_batching.custom_vmap
def _one_for_each(main_grad: jax.Array, operands: Any) -> jax.Array:
    """The main gradient, if no batch shares it: the sum over the batch would hold it many times."""
    return main_grad


@_one_for_each.def_vmap
def _(axis_size, batched, main_grad, operands):
    if not batched[0]:
        raise ValueError(
            "a main gradient is the same for a batch of gradients: give each its own, and sum them "
            "at last"
        )
    return main_grad, True
