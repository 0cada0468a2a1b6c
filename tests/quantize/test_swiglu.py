"""The activations, gating or not, and their gradients against float64."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cast_oracles import FP8

from deepgemm_jax import ScaledArray
from deepgemm_jax.quantize import (
    activation_quantize,
    activation_quantize_backward,
    swiglu_quantize,
    swiglu_quantize_backward,
)

erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": gelu_tanh,
}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_kind = pytest.mark.parametrize("gated", [True, False])


def inputs(m, h, gated, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(m, 2 * h if gated else h)) * 3).astype(dtype)
    dy = rng.normal(size=(m, h)).astype(dtype)
    return x, dy, rng.random(m).astype(np.float32)


def assert_quantised(result: ScaledArray, wanted, dtype):
    """Within half a step of what it stands for, and scaled so that the largest fits just so."""
    assert result.dtype == dtype
    assert result.shape == wanted.shape
    assert result.recipe[-1] in (128, wanted.shape[-1])
    info = ml_dtypes.finfo(dtype)
    scale = np.asarray(
        ScaledArray(np.ones(wanted.shape, np.float32), result.scale).dequantize(), np.float64
    )
    error = abs(np.asarray(result.dequantize(), np.float64) - wanted)
    step = np.maximum(abs(wanted) * float(info.eps), scale * float(info.smallest_subnormal))
    # Beside that, what float32 loses in the activation.
    assert (error <= step * 0.51 + 1e-6 * scale * float(info.max)).all()
    for block in range(-(-wanted.shape[-1] // 128)):
        columns = np.s_[:, block * 128 : (block + 1) * 128]
        largest = abs(wanted[columns]).max(axis=1) / float(info.max)
        np.testing.assert_allclose(scale[columns][:, 0], largest, rtol=1e-4)


def halves(x, gated):
    """What is activated, and what that is multiplied by."""
    x = x.astype(np.float64)
    return np.split(x, 2, axis=1) if gated else (x, np.ones_like(x))


@each_kind
@each_activation
@pytest.mark.parametrize(
    ("weighted", "m", "h", "dtype"), [(True, 7, 300, FP8[0]), (False, 130, 128, FP8[1])]
)
def test_forward(activation, gated, weighted, m, h, dtype):
    x, _, weights = inputs(m, h, gated)
    function = swiglu_quantize if gated else activation_quantize
    call = jax.jit(functools.partial(function, activation=activation, dtype=dtype))
    result = call(x, weights) if weighted else call(x)
    gate, up = halves(x, gated)
    wanted = ACTIVATIONS[activation](gate) * up
    assert_quantised(result, wanted * weights[:, None] if weighted else wanted, dtype)


@each_kind
@each_activation
@pytest.mark.parametrize(
    ("weighted", "m", "h", "dtype"),
    [(True, 7, 300, FP8[0]), (False, 130, 64, FP8[1]), (True, 0, 64, FP8[0])],
)
def test_backward(activation, gated, weighted, m, h, dtype):
    x, dy, weights = inputs(m, h, gated)
    function = swiglu_quantize_backward if gated else activation_quantize_backward
    call = jax.jit(functools.partial(function, activation=activation, dtype=dtype))
    dx, d_weights = call(x, dy, weights) if weighted else call(x, dy)
    gate, up = halves(x, gated)
    f = ACTIVATIONS[activation]
    step = 1e-5
    slope = (f(gate + step) - f(gate - step)) / (2 * step)
    given = dy.astype(np.float64)
    if weighted:
        wanted = (given * f(gate) * up).sum(axis=1)
        magnitude = abs(given * f(gate) * up).sum(axis=1)
        assert d_weights.dtype == jnp.float32
        assert (abs(np.asarray(d_weights, np.float64) - wanted) <= 1e-5 * magnitude).all()
        given = given * weights[:, None]
    else:
        assert d_weights is None
    parts = [given * up * slope, given * f(gate)] if gated else [given * slope]
    assert_quantised(dx, np.concatenate(parts, axis=1), dtype)


def test_extreme_gates_are_finite():
    x = np.zeros((3, 256), np.float32)
    x[:, 128:] = 1
    x[0, :128], x[1, :128], x[2, :128] = 1e30, -1e30, -200
    for activation in ACTIVATIONS:
        y = np.asarray(swiglu_quantize(x, activation=activation).dequantize())
        np.testing.assert_allclose(y[0], 1e30, rtol=1e-5)
        assert (y[1:] == 0).all()
        dx, _ = swiglu_quantize_backward(x, np.ones((3, 128), np.float32), activation=activation)
        assert np.isfinite(np.asarray(dx.dequantize())).all()


def test_nan_stays_in_its_block():
    x = np.ones((3, 512), np.float32)
    x[1, 5] = np.nan
    x[2, 256 + 200] = np.inf
    y = np.asarray(swiglu_quantize(x).dequantize())
    wanted = np.zeros(y.shape, bool)
    wanted[1, :128] = wanted[2, 128:] = True
    np.testing.assert_array_equal(np.isnan(y), wanted)


X = jnp.ones((4, 256), jnp.bfloat16)
DY = jnp.ones((4, 128), jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: swiglu_quantize(X[:, :3]), ValueError, "x has i = 3, .* multiple of 2"),
        (lambda: swiglu_quantize(X[0]), ValueError, "x has shape"),
        (lambda: swiglu_quantize(X, jnp.ones(5)), ValueError, r"weights has shape \(5,\)"),
        (lambda: swiglu_quantize(X, jnp.ones(4, int)), TypeError, "weights has dtype int32"),
        (lambda: swiglu_quantize(X, activation="relu"), ValueError, "activation is 'relu'.*'silu'"),
        (lambda: swiglu_quantize(X, dtype=jnp.int8), ValueError, "dtype is int8"),
        (lambda: swiglu_quantize_backward(X, X), ValueError, r"dy has shape \(4, 256\)"),
        (lambda: swiglu_quantize_backward(X, DY.astype(int)), TypeError, "dy has dtype int32"),
        (lambda: activation_quantize(X, activation="relu"), ValueError, "activation is 'relu'"),
        (lambda: activation_quantize_backward(X, DY), ValueError, r"dy has shape \(4, 128\)"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=f"^(swiglu|activation)_quantize(_backward)?: .*{words}"):
        call()


@pytest.mark.parametrize("function", [swiglu_quantize, activation_quantize])
def test_derivative_names_the_backward(function):
    with pytest.raises(NotImplementedError, match=f"{function.__name__}_backward computes"):
        jax.grad(lambda x: function(x).dequantize().sum())(jnp.ones((2, 256)))
