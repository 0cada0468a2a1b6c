"""`Op`: what an op is, said once, and every rule that JAX wants of a primitive."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from . import compat
from .batching import Batcher
from .device import Device, cuda_device
from .partition import Division
from .registration import register_handlers
from .signature import Array, Signature

logger = logging.getLogger("deepgemm_jax")

# Why there is none, or the rules of an op that is linear in its operands.
Derivative = str | Sequence[Callable]


@dataclasses.dataclass(frozen=True)
class Params:
    """The static parameters of a call. An op derives its own from these."""

    implementation: str | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How XLA calls an op on a GPU."""

    target: str  # the FFI target's name
    archs: tuple[str, ...]
    # (params, operands' types, device) -> the FFI attributes
    attributes: Callable[[Any, Sequence[Any], Device], Mapping[str, Any]]
    # operands and results whose last two dims lie the other way round in memory
    column_major: tuple[str, ...] = ()
    # operand -> the result that may take its memory
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # operands' types -> memory that the kernel needs besides, as results that nobody sees
    scratch: Callable[[Sequence[Any]], Sequence[jax.core.ShapedArray]] = lambda operands: ()
    # (params, operands' types) -> what of them it does not take, if so: the reference then does
    refuses: Callable[[Any, Sequence[Any]], str | None] = lambda params, operands: None


def check_implementation(name: str, implementation: str | None) -> None:
    if implementation not in (None, "cuda", "xla"):
        raise ValueError(
            f"{name}: implementation is {implementation!r}, wanted None, 'cuda' or 'xla'"
        )


class Op:
    """An op, from which its JAX primitive is made.

    Args:
      name: how errors call it.
      operands, results: name -> array, in the notation of `signature.py`.
      limits: factor -> (least length, what the length must be a multiple of).
      reference: `(params, *operands)` -> list of results, in plain JAX: the lowering wherever
        there is no kernel.
      kernel: the lowering on a GPU, if there is one.
      composed: whether the reference is made of other ops, which look for kernels of their own.
      derivative: why there is none and what to do instead, for who asks for one; or, of an op that
        is linear in each of its first operands, their cotangents, as `compat.make_bilinear` has
        them.
      check: `(params, operands)`, raises for what the signature does not say.
      alone: whether kernels are for calls that are neither divided among devices nor a batch. The
        reference then takes those whole: it is made of other ops, which can be either.
      batched: whether reference and kernel take one batch dim in front of all arrays.
      join: where they do not, the operands of a batch, with one such dim each -> those of one call,
        whose results have the batch in their first dims.
      fold: factors into which a batch may be folded, the best first.
      whole: factors that are never divided among devices.
      divide: `(total, params, *operands)` -> list of results, for when a contracted factor is
        divided among devices: `total(params, *operands)` is the op on the pieces, summed over the
        devices. Without it a contracted factor is not divided.
    """

    def __init__(
        self,
        name: str,
        *,
        operands: Mapping[str, str],
        results: Mapping[str, str],
        reference: Callable,
        derivative: Derivative,
        kernel: Kernel | None = None,
        composed: bool = False,
        alone: bool = False,
        limits: Mapping[str, tuple[int, int]] | None = None,
        check: Callable | None = None,
        batched: bool = False,
        join: Callable | None = None,
        fold: Sequence[str] = (),
        whole: Sequence[str] = (),
        divide: Callable | None = None,
    ):
        register_handlers()
        self.name = name
        self.reference = reference
        self.kernel = kernel
        self.composed = composed
        self.alone = alone
        self.derivative = derivative
        self.check = check
        self.divide = divide
        self.join = join
        self.signature = Signature(name, operands, results, limits or {})
        self.batcher = Batcher(self.signature, fold, batched or join is not None)
        self.whole = {
            *whole,
            *(() if divide else self.signature.contracted),
            *self.signature.static,
        }
        self.primitive = compat.make_primitive(
            name,
            abstract_eval=self._abstract_eval,
            jvp=self._jvp,
            batch=self._batch,
            lower={
                "cuda": functools.partial(self._lower, on_gpu=True),
                None: functools.partial(self._lower, on_gpu=False),
            },
        )
        if not isinstance(derivative, str):
            compat.make_bilinear(self.primitive, derivative)

    def __call__(self, *operands: jax.Array, params: Params) -> Any:
        """The op's result or results; ValueError or TypeError for operands that do not fit."""
        check_implementation(self.name, params.implementation)
        self.signature.check(operands, params)
        if self.check is not None:
            self.check(params, operands)
        results = self.bind(params, operands)
        return results if len(results) > 1 else results[0]

    def bind(self, params: Params, operands: Sequence[Any]) -> list[Any]:
        """The results, unchecked."""
        return self.primitive.bind(*compat.vary_alike(operands), params=params)

    # Tracing: one plain primitive, which every transformation can follow.

    def _abstract_eval(self, *avals, params):
        if len({compat.varying_axes(aval) for aval in avals}) > 1:
            raise ValueError(f"{self.name}: operands vary along different mesh axes: {avals}")
        call = self.signature.match([aval.shape for aval in avals], params)
        division = Division(self.signature, self.whole, avals, params)
        specs = division.specs(division.results, division.typed_cut())
        return [
            avals[0].update(
                shape=call.batch + array.shape(call.sizes),
                dtype=array.allowed(params)[0],
                weak_type=False,
                sharding=NamedSharding(division.mesh, spec),
            )
            for array, spec in zip(self.signature.results, specs, strict=True)
        ]

    def _jvp(self, primals, tangents, *, params):
        raise NotImplementedError(f"{self.name} has no derivative: {self.derivative}")

    def _batch(self, operands, batch_dims, *, params):
        operands = [
            jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0)
            for x, dim in zip(operands, batch_dims, strict=True)
        ]
        # Whether the lowering will know what to do with it had better be said now.
        self.batcher.targets(self.signature.match([x.shape for x in operands], params))
        results = self.bind(params, operands)
        return results, [0] * len(results)

    # Lowering: divided among devices, then without batch dims, then the kernel or the reference.

    def _lower(self, ctx, *operands, params, on_gpu):
        where = cuda_device().arch if on_gpu else " or ".join(compat.platforms(ctx))
        has_kernel = self._has_kernel(where, params, on_gpu)
        call = self.signature.match([aval.shape for aval in ctx.avals_in], params)
        division = Division(self.signature, self.whole, ctx.avals_in, params)
        function: Callable[..., Any]
        partitioned = compat.partitioned(ctx, division.mesh)
        explicit = compat.explicit_axes(division.mesh)
        if self.alone and (partitioned or explicit or call.batch):
            function = functools.partial(self.reference, params)
        elif partitioned:
            function = division.by_compiler(functools.partial(self._piece, params))
        elif explicit:
            function = division.by_types(functools.partial(self._piece, params))
        elif not self.batcher.is_plain(call):
            function = self.batcher.plain(functools.partial(self.bind, params), call)
        elif call.batch and self.join:
            function = functools.partial(self._joined, params, call)
        elif has_kernel and self._kernel_takes(params, ctx.avals_in):
            return self._lower_kernel(ctx, operands, params)
        else:
            function = functools.partial(self.reference, params)
        return compat.lower_fun(function)(ctx, *operands)

    def _joined(self, params, call, *operands):
        assert self.join is not None
        results = self.bind(params, self.join(operands))
        return [
            y.reshape(call.batch + array.shape(call.sizes))
            for array, y in zip(self.signature.results, results, strict=True)
        ]

    def _has_kernel(self, arch: str, params: Params, on_gpu: bool) -> bool:
        if params.implementation == "xla" or self.composed:
            return False
        archs = self.kernel.archs if self.kernel else ()
        if arch in archs:
            return True
        message = f"{self.name} has no kernel for {arch}"
        if archs:
            message += f", only for {', '.join(archs)}"
        if params.implementation == "cuda":
            raise NotImplementedError(message)
        if on_gpu:
            _warn_once(f"{message}: plain JAX takes its place")
        return False

    def _kernel_takes(self, params: Params, avals: Sequence[Any]) -> bool:
        assert self.kernel is not None
        # A kernel with nothing to do launches nothing, which a CUDA graph cannot hold.
        if any(0 in aval.shape for aval in avals):
            return False
        refused = self.kernel.refuses(params, avals)
        if refused:
            message = f"{self.name} has no kernel for {refused}"
            if params.implementation == "cuda":
                raise NotImplementedError(message)
            _warn_once(f"{message}: plain JAX takes its place")
        return not refused

    def _piece(self, params, operands, contracted_axes):
        """One device's part of a call whose contraction is divided along these mesh axes."""
        if not contracted_axes:
            return self.bind(params, operands)
        assert self.divide is not None  # else contracted factors are whole

        def total(params, *operands):
            return [jax.lax.psum(x, contracted_axes) for x in self.bind(params, operands)]

        return self.divide(total, params, *operands)

    def _lower_kernel(self, ctx, operands, params):
        assert self.kernel is not None
        arrays = self.signature.operands[: len(operands)]
        names = [array.name for array in self.signature.results]
        scratch = self.kernel.scratch(ctx.avals_in)
        call = jax.ffi.ffi_lowering(
            self.kernel.target,
            operand_layouts=self._layouts(arrays, ctx.avals_in),
            result_layouts=[
                *self._layouts(self.signature.results, ctx.avals_out),
                *(_minor_to_major(aval.ndim) for aval in scratch),
            ],
            operand_output_aliases={
                number: names.index(self.kernel.aliases[array.name])
                for number, array in enumerate(arrays)
                if array.name in self.kernel.aliases
            },
        )
        results = call(
            ctx.replace(avals_out=[*ctx.avals_out, *scratch]),
            *operands,
            **self.kernel.attributes(params, ctx.avals_in, cuda_device()),
        )
        return results[: len(ctx.avals_out)]

    def _layouts(self, arrays: Sequence[Array], avals: Sequence[Any]) -> list[tuple[int, ...]]:
        assert self.kernel is not None
        return [
            _minor_to_major(aval.ndim, array.name in self.kernel.column_major)
            for array, aval in zip(arrays, avals, strict=True)
        ]


def _minor_to_major(ndim: int, column_major: bool = False) -> tuple[int, ...]:
    dims = tuple(reversed(range(ndim)))
    return (dims[1], dims[0], *dims[2:]) if column_major else dims


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
