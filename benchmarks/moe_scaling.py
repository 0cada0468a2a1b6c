"""The DeepSeek-V3-shaped layer on the GPUs of this process against one that holds all experts.

    python benchmarks/moe_scaling.py --out benchmarks/results/h200x2_moe.json

Weak scaling: each GPU brings 4,096 tokens, so that a step may at best take as long on all of them
as on one. Times are by the clock, of steps queued one behind the other; the share of communication
is that of NCCL's kernels on the first GPU in a profile of the same steps, and what of it ran beside
other kernels is told from there, too.
"""

import argparse
import concurrent.futures
import datetime
import functools
import glob
import gzip
import json
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepgemm_jax import ScaledArray
from deepgemm_jax.moe import Axes, MoEParams, moe_layer, route

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 7168, 2048, 256, 4096
ROUTER = functools.partial(route, top_k=8, score="sigmoid", n_group=8, topk_group=4, scale=2.5)
AXES = Axes(expert="expert")
FP8, BF16 = jnp.float8_e4m3fn, jnp.bfloat16

# What goes over the wire: tokens out in one dtype, the experts' sums back in the other.
WIRES = {
    "BF16 both ways": {"dispatch_dtype": BF16},
    "FP8 out, BF16 back": {},
    "FP8 both ways": {"combine_dtype": FP8},
}
# name -> options of the layer on all GPUs; where no capacity factor is given, nothing is dropped
VARIANTS = {
    f"{strategy}, {wire}": {"strategy": strategy, "capacity_factor": 1.25, **options}
    for strategy in ("all_gather", "all_to_all")
    for wire, options in WIRES.items()
}
VARIANTS |= {
    f"{name}, two halves": VARIANTS[name] | {"chunks": 2}
    for name in ("all_gather, FP8 out, BF16 back", "all_to_all, FP8 out, BF16 back")
}
VARIANTS["all_gather, nothing dropped"] = {"strategy": "all_gather"}
VARIANTS["ragged_all_to_all"] = {"strategy": "ragged_all_to_all", "capacity_factor": 1.25}


def put(mesh, specs, make):
    """What `make` makes, on the mesh, never whole on one device."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(make, out_shardings=shardings)()


def weights(mesh, axes):
    """In FP8 from the start: in bfloat16 one GPU would hold twice as much."""

    def make():
        key = jax.random.key(0)
        router = jax.random.normal(key, (HIDDEN, EXPERTS)) * HIDDEN**-0.5

        def matrix(seed, *shape):
            bits = jax.random.bits(jax.random.fold_in(key, seed), (EXPERTS, *shape), jnp.uint8)
            # Not NaN, which has all bits but the sign set; magnitudes below 2.
            data = jax.lax.bitcast_convert_type(bits & 0xBF, FP8)
            *batch, n, k = data.shape
            scale = jnp.full((*batch, n // 128, k // 128), k**-0.5)
            return ScaledArray(data, scale)

        gate_up = matrix(1, 2, INTERMEDIATE, HIDDEN)
        return MoEParams(router, gate_up, matrix(2, HIDDEN, INTERMEDIATE), jnp.zeros(EXPERTS))

    return put(mesh, axes.param_specs(jax.eval_shape(make)), make)


def tokens(mesh, spec, count):
    return put(mesh, spec, lambda: jax.random.normal(jax.random.key(1), (count, HIDDEN), BF16))


def step_us(step, *operands, calls=20):
    for _ in range(3):
        jax.block_until_ready(step(*operands))
    start = time.perf_counter()
    for _ in range(calls):
        result = step(*operands)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls * 1e6


def profile(step, *operands, calls=5):
    """Of a step on the first GPU in µs: NCCL's kernels, and what of them ran beside others'."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = step(*operands)
            jax.block_until_ready(result)
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    gpu = min(
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU:0" in event["args"]["name"]
    )
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and "Stream" in event["args"]["name"]
    }
    spans = {True: [], False: []}
    for event in events:
        if event.get("ph") == "X" and event["pid"] == gpu and (gpu, event["tid"]) in streams:
            start = event["ts"]
            spans["nccl" in event["name"].lower()].append((start, start + event["dur"]))
    total, beside = 0.0, 0.0
    others = merged(spans[False])
    for start, end in merged(spans[True]):
        total += end - start
        beside += sum(max(0.0, min(end, e) - max(start, s)) for s, e in others)
    return total / calls, beside / calls


def merged(spans):
    result = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def layer(mesh, params, **options):
    return jax.jit(
        jax.shard_map(
            functools.partial(moe_layer, router=ROUTER, axes=AXES, **options),
            mesh=mesh,
            in_specs=(AXES.token_spec(), AXES.param_specs(params)),
            out_specs=(AXES.token_spec(), P()),
            check_vma=True,
        )
    )


def collectives(mesh, x):
    """How fast one device's tokens of this dtype are sent: name -> step, bytes that leave a GPU."""

    def sharded(function):
        spec = AXES.token_spec()
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))

    others = mesh.size - 1
    part = x.nbytes // mesh.size
    return {
        "all_gather": (
            sharded(lambda x: jax.lax.all_gather(x, "expert", tiled=True)),
            part * others,
        ),
        "all_to_all": (
            sharded(lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)),
            part * others // mesh.size,
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a JSON file for the rows")
    parser.add_argument("--only", default="", help="variants whose names hold this")
    arguments = parser.parse_args()
    devices = jax.devices()
    count = len(devices)
    about = {
        "gpu": f"{count} × {devices[0].device_kind}",
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "shape": f"hidden {HIDDEN}, intermediate {INTERMEDIATE}, {EXPERTS} experts, top 8, "
        f"{TOKENS} tokens a GPU, weights in FP8; room for 1.25 times even loads",
        "method": __doc__.split("\n\n")[2].strip().replace("\n", " "),
    }
    rows = []

    def row(name, us, **fields):
        rows.append({"name": name, "us": round(us, 1), **fields})
        print(json.dumps(rows[-1]), flush=True)
        if arguments.out:
            with open(arguments.out, "w") as file:
                json.dump({"about": about, "rows": rows}, file, indent=1, ensure_ascii=False)
                file.write("\n")

    def mesh_of(devices):
        shape = (len(devices),)
        return jax.make_mesh(shape, ("expert",), axis_types=(AxisType.Auto,), devices=devices)

    alone = mesh_of(devices[:1])
    whole = weights(alone, Axes())
    x = tokens(alone, P(), TOKENS)
    step = jax.jit(functools.partial(moe_layer, router=ROUTER))
    one_us = step_us(step, x, whole)
    row("one GPU", one_us)
    del whole

    mesh = mesh_of(devices)
    params = weights(mesh, AXES)
    x = tokens(mesh, AXES.token_spec(), count * TOKENS)
    for dtype in (BF16, FP8):
        sent = jax.jit(lambda x, dtype=dtype: x.astype(dtype))(x)
        for name, (step, moved) in collectives(mesh, sent).items():
            us = step_us(step, sent)
            row(f"{name} of {sent.dtype}", us, gbs=round(moved / us / 1e3, 1))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        compiled = {
            name: threads.submit(layer(mesh, params, **options).lower(x, params).compile)
            for name, options in VARIANTS.items()
            if arguments.only in name
        }
    for name, future in compiled.items():
        try:
            step = future.result()
            us = step_us(step, x, params)
            fields = {"scaling": round(one_us / us, 3), "dropped": int(step(x, params)[1].dropped)}
            if devices[0].platform == "gpu":
                nccl, beside = profile(step, x, params)
                fields |= {
                    "nccl_us": round(nccl, 1),
                    "nccl_share": round(nccl / us, 3),
                    "nccl_beside_others_us": round(beside, 1),
                }
            row(name, us, **fields)
        except Exception:
            # The next may well succeed, and machines with two GPUs are rare.
            print(f"{name} failed: {traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    main()
