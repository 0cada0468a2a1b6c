"""The examples of mixtures of experts run, and do what they say."""

import functools
import runpy
from pathlib import Path

import jax
import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_maxtext_with_another_grouped_gemm():
    results = runpy.run_path(str(EXAMPLES / "maxtext_moe.py"))["main"]()
    wanted = results.pop("jax.lax.ragged_dot")
    for name, tolerance in {"deepgemm_jax, FP8": 0.1, "deepgemm_jax, bfloat16": 0.01}.items():
        for got, want in zip(results[name], wanted, strict=True):
            assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


def test_modules_learn():
    losses = runpy.run_path(str(EXAMPLES / "moe_modules.py"))["main"](steps=3)
    for name in ("fit_nnx", "fit_pytree"):
        first, second, third = losses[name]
        assert third < second < first


def test_training_on_a_mesh_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(jax, "devices", functools.partial(jax.devices, "cpu"))
    main = runpy.run_path(str(EXAMPLES / "ep_train.py"))["main"]
    small = "--mesh data=2,expert=2 --layers 1 --sequences 8 --length 16 --recipe bf16 --steps 8"
    losses = main([*small.split(), "--strategy", "all_to_all"])
    assert losses[-1] < 0.9 * losses[0]
