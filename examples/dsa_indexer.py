"""DeepSeek sparse attention: the indexer chooses for each query the keys that attention looks at.

The indexer has a few small heads of its own and one key a token. Shapes are as MaxText has them:
q[b, t, h, d], k[b, s, d] and weights[b, t, h] of the indexer. Runs anywhere:

    python examples/dsa_indexer.py
"""

import functools

import jax
import jax.numpy as jnp

from deepgemm_jax import indexer_topk, mqa_logits

BATCH, TOKENS, INDEX_HEADS, INDEX_DIM, TOP_K = 2, 96, 8, 64, 16
HEADS, HEAD_DIM = 4, 32


def index_logits(q, k, weights):
    """[b, t, s] in float, with a gradient; a query sees the keys up to its own."""
    t, s = q.shape[1], k.shape[1]
    start = jnp.zeros(t, jnp.int32)
    end = jnp.arange(s - t + 1, s + 1, dtype=jnp.int32)
    return jax.vmap(mqa_logits, in_axes=(0, 0, 0, None, None))(q, k, weights, start, end)


def sparse_mask(logits, top_k):
    """[b, t, s]: whether a key is among the query's best."""
    b, t, s = logits.shape
    indices = jax.vmap(lambda x: indexer_topk(x, top_k))(jax.lax.stop_gradient(logits))
    # What a query does not have, -1, goes past the end, where it is dropped.
    indices = jnp.where(indices < 0, s, indices)
    rows = jnp.arange(b)[:, None, None], jnp.arange(t)[:, None]
    return jnp.zeros((b, t, s), bool).at[(*rows, indices)].set(True, mode="drop")


def attention_weights(q, k, mask):
    """[b, heads, t, s] of the main attention."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))


@functools.partial(jax.jit, static_argnames="top_k")
def sparse_attention(indexer, q, k, v, top_k):
    mask = sparse_mask(index_logits(*indexer), top_k)
    return jnp.einsum("bhts,bshd->bthd", attention_weights(q, k, mask), v), mask


@functools.partial(jax.jit, static_argnames="top_k")
@functools.partial(jax.value_and_grad, argnums=0)
def indexer_loss(indexer, q, k, top_k):
    """Cross entropy with the attention's own choice, over the keys that are looked at."""
    logits = index_logits(*indexer)
    mask = sparse_mask(logits, top_k)
    target = jax.lax.stop_gradient(attention_weights(q, k, mask).mean(1))
    guess = jax.nn.log_softmax(jnp.where(mask, logits, -jnp.inf))
    return -jnp.where(mask, target * guess, 0).sum(-1).mean()


def random_inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    indexer = [
        (BATCH, TOKENS, INDEX_HEADS, INDEX_DIM),
        (BATCH, TOKENS, INDEX_DIM),
        (BATCH, TOKENS, INDEX_HEADS),
    ]
    shapes = [*indexer, *[(BATCH, TOKENS, HEADS, HEAD_DIM)] * 3]
    arrays = [jax.random.normal(*item) for item in zip(keys, shapes, strict=True)]
    arrays[2] *= INDEX_HEADS**-0.5 * INDEX_DIM**-0.5
    return arrays[:3], arrays[3:]


def main(steps=20, rate=0.3):
    indexer, (q, k, v) = random_inputs()
    losses = []
    for _ in range(steps):
        loss, gradient = indexer_loss(indexer, q, k, TOP_K)
        indexer = jax.tree.map(lambda x, dx: x - rate * dx, indexer, gradient)
        losses.append(float(loss))
    out, mask = sparse_attention(indexer, q, k, v, TOP_K)
    print(f"each query looks at {int(mask.sum(-1).min())} to {int(mask.sum(-1).max())} keys")
    print(f"the indexer's loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return out, mask, losses


if __name__ == "__main__":
    main()
