"""MaxText's sparse MoE with its grouped GEMM exchanged for one in FP8.

MaxText sorts tokens by expert and multiplies them in `sparse_matmul` by a function of `lhs, rhs,
group_sizes, precision, preferred_element_type, group_offset`, which is `jax.lax.ragged_dot`,
tokamax's, or Megablox's by its configuration. `deepgemm_jax.moe.grouped_gemm` takes the same. Here
is such a layer in MaxText's shapes, with weights [experts, embed, mlp], and the line that changes:

    python examples/maxtext_moe.py
"""

import functools

import jax
import jax.numpy as jnp

from deepgemm_jax.moe import grouped_gemm

TOKENS, EMBED, MLP, EXPERTS, TOP_K = 256, 256, 128, 8, 2


def sparse_matmul(x, gate, w0, w1, wo, gmm):
    """[tokens, embed] through their experts, as MaxText orders it: permute, three grouped GEMMs,
    unpermute."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(x @ gate), TOP_K)
    order = jnp.argsort(experts.ravel())
    group_sizes = jnp.bincount(experts.ravel(), length=EXPERTS)
    rows = jnp.take(x, order // TOP_K, axis=0)

    def multiply(lhs, rhs):
        return gmm(
            lhs=lhs,
            rhs=rhs,
            group_sizes=group_sizes,
            precision=jax.lax.Precision.DEFAULT,
            preferred_element_type=x.dtype,
            group_offset=None,
        )

    hidden = jax.nn.silu(multiply(rows, w0)) * multiply(rows, w1)
    rows = jnp.take(multiply(hidden, wo), jnp.argsort(order), axis=0)
    return jnp.einsum("tkh,tk->th", rows.reshape(-1, TOP_K, EMBED), weights)


GMM = {
    "jax.lax.ragged_dot": jax.lax.ragged_dot,
    "deepgemm_jax, FP8": grouped_gemm,  # the line that changes
    "deepgemm_jax, bfloat16": functools.partial(grouped_gemm, recipe="bf16"),
}


def random_operands():
    shapes = [(TOKENS, EMBED), (EMBED, EXPERTS)]
    shapes += [(EXPERTS, EMBED, MLP)] * 2 + [(EXPERTS, MLP, EMBED)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape) * (1 if shape == shapes[0] else shape[-2] ** -0.5)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def main():
    """Of each: the result, and the gradient of its square for each operand."""
    results = {}
    for name, gmm in GMM.items():

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=range(5), has_aux=True)
        def both(*operands, gmm=gmm):
            y = sparse_matmul(*operands, gmm)
            return (y**2).sum() / 2, y

        (_, y), gradients = both(*random_operands())
        results[name] = y, *gradients
        wanted = results["jax.lax.ragged_dot"]
        errors = [
            float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
            for got, want in zip(results[name], wanted, strict=True)
        ]
        print(f"{name:24}", *(f"{error:.4f}" for error in errors))
    return results


if __name__ == "__main__":
    main()
