"""The mixture-of-experts layer, on one device or on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._core import compat
from ..quantize import prepare_weight
from ..scaled import ScaledArray
from ..training import Recipe
from .exchange import Wire, choices_to_shards, exchange, from_shards, to_shards
from .experts import local_experts, mlp, scaled
from .routing import expert_load

Router = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]

STRATEGIES = ("all_gather", "all_to_all", "ragged_all_to_all")
LAYOUTS = ("contiguous", "masked")
# Of the weights, by whether they are scaled.
SHAPES = {
    "router": ("H E", ""),
    "bias": ("E", ""),
    "w_down": ("G I H", "G H I"),
    "w_gate_up": ("G H 2 I", "G 2 I H"),
    "shared_down": ("S H", "H S"),
    "shared_gate_up": ("H 2 S", "2 S H"),
}
WIRE_DTYPES = tuple(map(jnp.dtype, (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEParams:
    """The weights of a layer of E experts, hidden size H and intermediate size I.

    Attributes:
      router: float [H, E].
      w_gate_up: [E, H, 2, I], gate before up: a tensor-parallel device has a part of both.
      w_down: [E, I, H].
      bias: None, or float [E]: see `route`.
      shared_gate_up, shared_down: None, or [H, 2, S] and [S, H]: an expert for all tokens.
    """

    router: Any
    w_gate_up: Any
    w_down: Any
    bias: Any = None
    shared_gate_up: Any = None
    shared_down: Any = None

    @classmethod
    def init(
        cls,
        key: jax.Array,
        *,
        hidden: int,
        intermediate: int,
        experts: int,
        shared: int = 0,
        dtype: Any = jnp.float32,
    ) -> "MoEParams":
        """Normal weights that keep the size of what they multiply, and a bias of zeros."""
        keys = iter(jax.random.split(key, 5))

        def normal(fan_in, *shape):
            return jax.random.normal(next(keys), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

        return cls(
            router=normal(hidden, hidden, experts).astype(jnp.float32),
            w_gate_up=normal(hidden, experts, hidden, 2, intermediate),
            w_down=normal(intermediate, experts, intermediate, hidden),
            bias=jnp.zeros(experts),
            shared_gate_up=normal(hidden, hidden, 2, shared) if shared else None,
            shared_down=normal(shared, shared, hidden) if shared else None,
        )

    def quantize(self) -> "MoEParams":
        """The same for serving: experts in FP8, by blocks of 128 × 128, I a multiple of 128.

        The layer then quantises tokens once and moves them so, and has no gradient. Weights are
        `ScaledArray`s with K last: [E, 2, I, H], [E, H, I], [2, S, H] and [H, S].
        """

        def gate_up(w):
            # [..., H, 2, I] as twice as many matrices, [..., 2, I, H].
            w = jnp.moveaxis(w, -2, -3)
            of = prepare_weight(w.reshape(-1, *w.shape[-2:]), layout="kn")
            return jax.tree.map(lambda x: x.reshape(*w.shape[:-2], *x.shape[1:]), of)

        if self.w_down.shape[1] % 128 or (
            self.shared_down is not None and len(self.shared_down) % 128
        ):
            raise ValueError(
                "MoEParams.quantize: intermediate sizes are multiples of 128, got "
                f"{self.w_down.shape} for w_down"
            )
        shared = self.shared_down is not None
        return dataclasses.replace(
            self,
            w_gate_up=gate_up(self.w_gate_up),
            w_down=prepare_weight(self.w_down, layout="kn"),
            shared_gate_up=gate_up(self.shared_gate_up) if shared else None,
            shared_down=prepare_weight(self.shared_down, layout="kn") if shared else None,
        )


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


@dataclasses.dataclass(frozen=True)
class Axes:
    """The mesh axes that a layer inside of `jax.shard_map` is divided along.

    Attributes:
      expert: that experts are divided along, and tokens too: one, or several, the slowest first.
        Tokens then go along one after the other, such as once to each machine and on from there.
      tokens: further axes, one or several, that tokens are divided along, `fsdp`'s name among them
        if there is one.
      tensor: that each expert's I is divided along. Tokens are the same along it.
      fsdp: that weights' H is divided along; they are gathered when they are used, and their
        gradients are reduce-scattered.
    """

    expert: str | tuple[str, ...] | None = None
    tokens: str | tuple[str, ...] = ()
    tensor: str | None = None
    fsdp: str | None = None

    def __post_init__(self):
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"Axes: {', '.join(self.names)}, wanted each mesh axis once")
        if self.fsdp and self.fsdp not in _names(self.tokens):
            raise ValueError(f"Axes: fsdp is {self.fsdp!r}, wanted one of tokens, {self.tokens}")

    @property
    def of_experts(self) -> tuple[str, ...]:
        return _names(self.expert)

    @property
    def of_tokens(self) -> tuple[str, ...]:
        return *_names(self.tokens), *self.of_experts

    @property
    def names(self) -> tuple[str, ...]:
        return *self.of_tokens, *_names(self.tensor)

    def token_spec(self) -> PartitionSpec:
        """Of x [T, H], and of the result."""
        return PartitionSpec(self.of_tokens or None)

    def param_specs(self, params: MoEParams) -> MoEParams:
        """Of the weights: a `PartitionSpec` for each, in both forms."""
        axes = {"G": self.expert, "I": self.tensor, "S": self.tensor, "H": self.fsdp}

        def spec(name):
            w = getattr(params, name)
            dims = SHAPES[name][isinstance(w, ScaledArray)].split()
            whole = name in ("router", "bias")
            spec = PartitionSpec() if whole else PartitionSpec(*map(axes.get, dims))
            return jax.tree.map(lambda _: spec, w)

        return MoEParams(**{name: spec(name) for name in SHAPES})

    def gather(self, params: MoEParams) -> MoEParams:
        """A device's weights with the parts of H that the others along `fsdp` have."""
        if self.fsdp is None:
            return params

        def whole(w, spec):
            if self.fsdp not in spec:
                return w
            return jax.lax.all_gather(w, self.fsdp, axis=spec.index(self.fsdp), tiled=True)

        return jax.tree.map(whole, params, self.param_specs(params))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What a step did, over all devices.

    Attributes:
      load: int32 [E], how many tokens chose each expert.
      dropped: int32 [], how many choices found no room.
    """

    load: jax.Array
    dropped: jax.Array


compat.register_serialization(MoEParams)
compat.register_serialization(MoEStats)


def moe_layer(
    x: Any,
    params: MoEParams,
    router: Router,
    *,
    valid: Any = None,
    strategy: str | Sequence[str] | None = None,
    axes: Axes | None = None,
    capacity_factor: float | None = None,
    dispatch_dtype: Any = None,
    combine_dtype: Any = None,
    layout: str = "contiguous",
    chunks: int = 1,
    recipe: Any = "fp8",
    implementation: str | None = None,
) -> tuple[jax.Array, MoEStats]:
    r"""A mixture of experts, from hidden states to hidden states.

    $$y_t = \text{MLP}_{\text{shared}}(x_t) + \sum_{e \in E_t} w_{te} \text{MLP}_e(x_t), \qquad
    \text{MLP}(x) = (\text{silu}(x W^{gate}) \cdot x W^{up}) W^{down}$$

    On a mesh it is called within `jax.shard_map`, on each device's tokens and weights, with `axes`
    naming the mesh axes. Arrays that Explicit axes divide need no `shard_map`: the layer has one of
    its own, along `axes` or, without, along those that divide tokens, experts and each expert's I.
    How tokens get to the experts' devices is the strategy:

    - `"all_gather"`: each device gathers all tokens and computes what its experts make of them.
      Needs no capacity; bytes grow with the number of shards, so it is for few.
    - `"all_to_all"`: a token goes to each shard that has experts of it, once. What a pair of
      devices exchanges has a fixed capacity.
    - `"ragged_all_to_all"`: the same, with as many bytes as there are tokens; XLA has a fast one
      only for some machines, and refuses it between processes unless told not to.

    Args:
      x: bfloat16 or float32 [T, H].
      params: the weights; from `MoEParams.quantize` to serve, without a gradient.
      router: takes logits, float32 [T, E], and `params.bias`, and gives weights and experts, both
        [T, k], an expert of -1 for none: `functools.partial(route, top_k=8)`. How exact logits are
        is for `jax.default_matmul_precision` to say, as for any product of JAX. The experts of a
        token are distinct: there may be no room for one that is named twice.
      valid: None, or booleans [T]: which tokens count. The others are padding: they go to no
        expert and come back zero, as do their gradients, whatever they hold, NaN too.
      strategy: None where each device has all experts; or how tokens get to them: for all of the
        expert axes, or for each of them. Without `axes` it is "all_gather" if it is None.
      axes: the mesh axes; not needed on one device, nor for arrays that Explicit axes divide.
      capacity_factor: None for room for the worst case, where nothing is dropped; or how much room
        there is as a multiple of what tokens spread evenly would need. It bounds memory. A choice
        that finds none adds nothing to its token, and is counted.
      dispatch_dtype: in which dtype tokens are sent: float8_e4m3fn, with a scale for each 128
        channels, bfloat16 or float32. None is the first if the recipe's forward is in FP8, else
        x's. So are gradients, sent to the experts.
      combine_dtype: in which of these dtypes the experts' sums come back, as do the tokens'
        gradients. None is x's. Tokens' sums over devices are in float32.
      layout: how rows are multiplied: "contiguous", sorted by expert; or "masked", for few tokens:
        each expert has as many rows as there are tokens. Without a gradient.
      chunks: how many parts a device's tokens are divided into, no more than there are of them, so
        that XLA may send one while it computes another.
      recipe: precision of the products, as `training.grouped_mlp` takes it.
      implementation: "cuda" for the kernels, "xla" for plain JAX, None for kernels where there are
        some and plain JAX elsewhere.

    Returns:
      y, [T, H] of x's dtype; and the `MoEStats`, the same on all devices.

    Raises:
      ValueError: a strategy, layout or axes that there are not; weights that do not fit them, x or
        each other; tokens that Explicit axes do not divide; a router's result or a `valid` of
        another length; no chunks or no capacity; a `dispatch_dtype` or `combine_dtype` that is none
        of the above.
      TypeError: a `valid` that is not boolean, experts that are no integers, weights of two kinds.
      NotImplementedError: ragged_all_to_all where XLA would refuse.

    Example:

        >>> import functools
        >>> import jax, jax.numpy as jnp
        >>> from deepgemm_jax.moe import MoEParams, moe_layer, route
        >>> params = MoEParams.init(jax.random.key(0), hidden=128, intermediate=64, experts=4)
        >>> x = jax.random.normal(jax.random.key(1), (6, 128))
        >>> y, stats = moe_layer(x, params, functools.partial(route, top_k=2))
        >>> print(y.shape, stats.load.sum(), stats.dropped)
        (6, 128) 12 0
    """
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"moe_layer: x has shape {x.shape}, wanted [T, H]")
    if axes is None:
        axes = _axes_of(x, params)
        strategy = strategy or ("all_gather" if axes.expert else None)
    strategies = _strategies(strategy, axes)
    if layout not in LAYOUTS:
        raise ValueError(
            f"moe_layer: layout is {layout!r}, wanted {' or '.join(map(repr, LAYOUTS))}"
        )
    if valid is not None:
        valid = jnp.asarray(valid)
        if valid.dtype != bool:
            raise TypeError(f"moe_layer: valid has dtype {valid.dtype}, wanted bool")
        if valid.shape != x.shape[:1]:
            raise ValueError(f"moe_layer: valid has shape {valid.shape}, wanted {x.shape[:1]}")
    if chunks < 1:
        raise ValueError(f"moe_layer: chunks is {chunks}, wanted at least 1")
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(
            f"moe_layer: capacity_factor is {capacity_factor}, wanted None or more than 0"
        )
    served = isinstance(params.w_down, ScaledArray)
    in_fp8 = served or Recipe.of("moe_layer", recipe).forward == "fp8"
    wire = Wire(
        _wire_dtype("dispatch_dtype", dispatch_dtype, jnp.float8_e4m3fn if in_fp8 else x.dtype),
        _wire_dtype("combine_dtype", combine_dtype, x.dtype),
        implementation,
    )
    call = _Call(
        router, strategies, axes, capacity_factor, wire, layout, chunks, recipe, implementation
    )
    # Else this is within a shard_map already.
    for mesh in map(compat.typed_mesh, jax.tree.leaves((x, params))):
        explicit = compat.explicit_axes(mesh)
        if explicit and explicit.issuperset(axes.names):
            return call.over_types(mesh, x, params, valid)
    for axis in axes.names:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            raise ValueError(
                f"moe_layer: axes have {axis!r}, wanted axes of a jax.shard_map that the layer is "
                "called in"
            ) from None
    return call(x, params, valid)


def _axes_of(x: jax.Array, params: MoEParams) -> Axes:
    """As mesh axes that are part of types divide tokens, experts and each expert's I."""
    w_down = jax.tree.leaves(params.w_down)[-1]  # if scaled, the scales: data can be divided more
    tokens, experts = compat.axes_of(x, 0), compat.axes_of(w_down, 0)
    inner = compat.axes_of(w_down, 2 if isinstance(params.w_down, ScaledArray) else 1)
    return Axes(
        expert=experts or None,
        tokens=tuple(axis for axis in tokens if axis not in experts),
        tensor=inner[0] if len(inner) == 1 and inner[0] not in tokens else None,
    )


def _strategies(strategy: str | Sequence[str] | None, axes: Axes) -> Sequence[str]:
    """One for each expert axis."""
    count = len(axes.of_experts)
    each = [strategy] * count if isinstance(strategy, str) else list(strategy or ())
    if len(each) != count or (strategy and not count):
        raise ValueError(
            f"moe_layer: strategy is {strategy!r} for the expert axes {axes.of_experts}, wanted "
            "one or one each, and none for none"
        )
    if unknown := set(each) - set(STRATEGIES):
        raise ValueError(
            f"moe_layer: strategy is {', '.join(sorted(unknown))}, wanted {', '.join(STRATEGIES)}"
        )
    return each


def _check(params: MoEParams, hidden: int) -> None:
    """ValueError or TypeError for weights of one device that fit neither x nor each other."""
    for kind in ("w", "shared"):
        pair = getattr(params, f"{kind}_gate_up"), getattr(params, f"{kind}_down")
        if len({w if w is None else isinstance(w, ScaledArray) for w in pair}) > 1:
            raise TypeError(
                f"moe_layer: params.{kind}_gate_up and params.{kind}_down are of two kinds, wanted "
                "both arrays, or both ScaledArrays of MoEParams.quantize"
            )
    sizes = {"2": 2, "H": hidden}
    for name, shapes in SHAPES.items():
        w = getattr(params, name)
        if w is None:
            continue
        dims = shapes[isinstance(w, ScaledArray)].split()
        known = ", ".join(f"{dim} = {sizes[dim]}" for dim in dims if dim in sizes and dim.isalpha())
        if len(w.shape) != len(dims) or any(
            sizes.setdefault(dim, length) != length
            for dim, length in zip(dims, w.shape, strict=True)
        ):
            raise ValueError(
                f"moe_layer: params.{name} has shape {w.shape}, wanted [{', '.join(dims)}]"
                f" with {known}"
            )


def _wire_dtype(name: str, dtype: Any, default: Any) -> Any:
    if dtype is None:
        return default
    dtype = jnp.dtype(dtype)
    if dtype not in WIRE_DTYPES:
        wanted = ", ".join(x.name for x in WIRE_DTYPES)
        raise ValueError(f"moe_layer: {name} is {dtype}, wanted one of {wanted}")
    return dtype


def _parts(x: Any, chunks: int) -> list[Any]:
    return [None] * chunks if x is None else jnp.array_split(x, chunks)


def _choose(
    router: Router, params: MoEParams, x: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens' experts, -1 for none, and weights."""
    logits = x.astype(jnp.float32) @ params.router.astype(jnp.float32)
    weights, experts = map(jnp.asarray, router(logits, params.bias))
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise TypeError(f"moe_layer: router gives experts of {experts.dtype}, wanted integers")
    if weights.shape != experts.shape or experts.ndim != 2 or len(experts) != len(x):
        raise ValueError(
            f"moe_layer: router gives weights {weights.shape} and experts {experts.shape}, wanted "
            f"[T, k] twice with T = {len(x)}"
        )
    # A router may do without the logits.
    weights, experts, _ = compat.vary_alike([weights, experts, x])
    exists = (experts >= 0) & (experts < params.router.shape[1])
    if valid is not None:
        exists &= valid[:, None]
    return jnp.where(exists, experts, -1), jnp.where(exists, weights, 0)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static of a call."""

    router: Router
    strategies: Sequence[str]
    axes: Axes
    capacity_factor: float | None
    wire: Wire
    layout: str
    chunks: int
    recipe: Any
    implementation: str | None

    def over_types(
        self, mesh: Any, x: jax.Array, params: MoEParams, valid: jax.Array | None
    ) -> tuple[jax.Array, MoEStats]:
        """The layer of arrays whose types are divided along axes of the mesh."""
        axes, tokens = self.axes, self.axes.token_spec()
        parts = math.prod(mesh.shape[axis] for axis in axes.of_tokens)
        if len(x) % parts:
            raise ValueError(
                f"moe_layer: {len(x)} tokens cannot be divided by {parts} along the mesh axes "
                f"{axes.of_tokens}: pad them, and let valid say which count"
            )
        specs = tokens, axes.param_specs(params), None if valid is None else tokens
        layer = jax.shard_map(
            self,
            mesh=mesh,
            in_specs=specs,
            out_specs=(tokens, PartitionSpec()),
            # None named are all, but for what a vmap has divided a batch along.
            axis_names=set() if mesh.are_all_axes_explicit else compat.explicit_axes(mesh),
        )
        operands = jax.tree.map(
            lambda leaf, spec: compat.divided(jnp.asarray(leaf), mesh, spec),
            (x, params, valid),
            specs,
        )
        y, stats = layer(*operands)
        return compat.divided_as(y, x), stats

    def __call__(
        self, x: jax.Array, params: MoEParams, valid: jax.Array | None
    ) -> tuple[jax.Array, MoEStats]:
        """The layer of one device's tokens and weights."""
        if valid is not None:
            # Padding would get into weights' gradients, by NaN or by scales that tokens share.
            x = jnp.where(valid[:, None], x, 0)
        params = self.axes.gather(params)
        _check(params, x.shape[1])
        if not len(x):  # which not every version of XLA:CPU can exchange
            load = jnp.zeros(params.router.shape[1], jnp.int32)
            return x, MoEStats(load, jnp.zeros((), jnp.int32))
        chunks = min(self.chunks, len(x))
        parts = [
            self.experts_of(part, params, *_choose(self.router, params, part, counts))
            for part, counts in zip(_parts(x, chunks), _parts(valid, chunks), strict=True)
        ]
        out = jnp.concatenate([y for y, _ in parts])
        stats = jax.tree.map(lambda *each: sum(each), *(stats for _, stats in parts))
        if params.shared_down is not None:
            out += self.shared_expert(x, params)
        if self.axes.tensor:
            out = jax.lax.psum(out, self.axes.tensor)
        if valid is not None:
            out = jnp.where(valid[:, None], out, 0)
        out = out.astype(x.dtype)
        if self.axes.of_tokens:
            # Beside a product, which fills the GPU, the sum would keep it waiting, or wait for it.
            out, stats = jax.lax.optimization_barrier((out, stats))
            stats = jax.lax.psum(stats, self.axes.of_tokens)
        return out, stats

    def experts_of(
        self, x: Any, params: MoEParams, experts: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, MoEStats]:
        """The routed experts' sums, float32 [T, H], and this device's part of what is counted."""
        num_experts, local = params.router.shape[1], params.w_down.shape[0]
        shards = math.prod(map(jax.lax.axis_size, self.axes.of_experts))
        if local * shards != num_experts:
            raise ValueError(
                f"moe_layer: w_down has {local} experts on each of {shards} shards, router has "
                f"{num_experts}"
            )
        tokens, k = experts.shape
        load = expert_load(experts, num_experts)
        if isinstance(params.w_down, ScaledArray) and self.wire.out == jnp.float8_e4m3fn:
            x = scaled(x, self.implementation)
        ways = []
        sent, count = 1, num_experts  # shards that tokens came from, experts where they are now
        for strategy, axis in zip(self.strategies, self.axes.of_experts, strict=True):
            size = jax.lax.axis_size(axis)
            count //= size
            # Of so many tokens, spread evenly, those that have experts on one more shard.
            evenly = tokens * sent * (1 - (1 - 1 / (sent * size)) ** k)
            way = exchange(strategy, axis, size, experts, count, self._room(len(experts), evenly))
            # What arrives in a row that is nobody's is zero.
            experts, weights = choices_to_shards(way, experts + 1, weights)
            x = to_shards(way, x, self.wire)
            experts = experts - 1 - jax.lax.axis_index(axis) * count
            experts = jnp.where((experts >= 0) & (experts < count), experts, -1)
            ways.append(way)
            sent *= size
        masked = self.layout == "masked"
        y, computed = local_experts(
            x,
            experts,
            weights,
            params.w_gate_up,
            params.w_down,
            rows=self._room(len(experts), tokens * shards * k / num_experts)
            if masked
            else self._room(len(experts) * min(k, local), tokens * k),
            layout=self.layout,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        for way in reversed(ways):
            y = from_shards(way, y, self.wire)
        return y, MoEStats(load, load.sum(dtype=jnp.int32) - computed)

    def _room(self, most: int, evenly: float) -> int:
        """How many of something to make room for that there are at most and on average so many."""
        factor = self.capacity_factor
        return most if factor is None else min(most, math.ceil(factor * evenly))

    def shared_expert(self, x: jax.Array, params: MoEParams) -> jax.Array:
        gate_up, down = jax.tree.map(lambda w: w[None], (params.shared_gate_up, params.shared_down))
        y = mlp(
            x,
            gate_up,
            down,
            jnp.full(1, len(x), jnp.int32),
            None,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        return y.astype(jnp.float32)
