"""The example of the indexer runs, and does what it says."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "dsa_indexer.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_mask_is_of_the_best_keys(example):
    (q, k, weights), _ = example["random_inputs"]()
    logits = np.asarray(jax.jit(example["index_logits"])(q, k, weights))
    mask = np.asarray(jax.jit(example["sparse_mask"], static_argnums=1)(logits, 5))
    tokens = logits.shape[1]
    seen = np.tril(np.ones((tokens, tokens), bool))
    np.testing.assert_array_equal(np.isfinite(logits), np.broadcast_to(seen, logits.shape))
    np.testing.assert_array_equal(mask.sum(-1)[0], np.minimum(np.arange(tokens) + 1, 5))
    assert not (mask & ~seen).any()
    least = np.where(mask, logits, np.inf).min(-1)
    most = np.where(mask, -np.inf, logits).max(-1)
    assert (least >= most).all()


def test_training_lowers_the_loss(example, capsys):
    out, mask, losses = example["main"](steps=5)
    assert np.isfinite(out).all()
    assert mask.sum(-1).max() == example["TOP_K"]
    assert losses == sorted(losses, reverse=True)
    assert "each query looks at 1 to 16 keys" in capsys.readouterr().out
