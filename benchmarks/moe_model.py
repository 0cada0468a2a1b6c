"""What a layer's tokens cost on the wire, for 8 to 1,024 shards of the experts, by strategy.

    python benchmarks/moe_model.py docs/scaling.png

prints the table of docs/scaling.md and draws its plot. It is arithmetic on bytes and on two speeds:
that of NVLink, which was measured, and that of the network between nodes, which was not.
"""

import argparse
import math

TOKENS, HIDDEN, INTERMEDIATE, TOP_K, EXPERTS = 4096, 7168, 2048, 8, 256
NODE = 8  # GPUs that NVLink joins
NVLINK = 200e9  # bytes a second that leave a GPU: measured on two H200s
NETWORK = 50e9  # the same between nodes: 400 Gb/s a GPU, a data sheet's figure
FACTOR = 1.25  # room, as a multiple of what even routing needs
FLOPS = 1350e12  # measured, of large FP8 GEMMs

# A row on the wire: FP8 with scales, expert ids and weights out; bfloat16 back.
OUT = HIDDEN + 4 * HIDDEN // 128 + 8 * TOP_K
BACK = 2 * HIDDEN

SHARDS = [2**i for i in range(3, 11)]
GEMMS = TOKENS * TOP_K * 6 * HIDDEN * INTERMEDIATE / FLOPS
STRATEGIES = ("all_gather", "all_to_all", "ragged_all_to_all", "all_to_all twice")


def share(shards):
    """Of tokens, those that have experts on one shard of so many, drawn evenly."""
    experts = max(EXPERTS, shards)
    elsewhere = experts - experts // shards
    return 1 - math.comb(elsewhere, TOP_K) / math.comb(experts, TOP_K)


def rows_out(strategy, n):
    """A GPU's rows to each other GPU of its node, and all that it sends to other nodes."""
    nodes = max(1, n // NODE)
    if strategy == "all_to_all twice":
        # Once to the GPU of the same number in each node, which knows who there is to have it.
        to_node = min(TOKENS, math.ceil(FACTOR * TOKENS * share(nodes)))
        inside = min(nodes * to_node, math.ceil(FACTOR * TOKENS * nodes * share(n)))
        return inside, (nodes - 1) * to_node
    each = {
        "all_gather": TOKENS,
        "all_to_all": min(TOKENS, math.ceil(FACTOR * TOKENS * share(n))),
        "ragged_all_to_all": TOKENS * share(n),
    }[strategy]
    return each, (n - NODE) * each


def cost(strategy, n):
    """Bytes that leave a GPU within its node and to others; and the time of both, at once."""
    to_each, to_others = rows_out(strategy, n)
    # A gathered row enters a node once and is copied there; what comes back is each GPU's own.
    copies = NODE if strategy == "all_gather" else 1
    inside = (NODE - 1) * to_each * (OUT + BACK)
    outside = to_others * (OUT / copies + BACK)
    return inside, outside, max(inside / NVLINK, outside / NETWORK)


def table():
    print("| Shards |", " | ".join(STRATEGIES), "|")
    print("| ---: " * (len(STRATEGIES) + 1) + "|")
    for n in SHARDS:
        cells = []
        for strategy in STRATEGIES:
            inside, outside, time = cost(strategy, n)
            cells.append(f"{inside / 1e6:,.0f} + {outside / 1e6:,.0f} MB, {time * 1e3:,.1f} ms")
        print(f"| {n:,} |", " | ".join(cells), "|")


def draw(path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for strategy in STRATEGIES:
        axes.plot(SHARDS, [cost(strategy, n)[2] * 1e3 for n in SHARDS], "o-", label=strategy)
    axes.axhline(GEMMS * 1e3, color="0.6", linewidth=1)
    axes.annotate("the experts' GEMMs", (SHARDS[-1], GEMMS * 1e3), ha="right", va="top")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="shards of the experts",
        ylabel="ms a layer on the wire, 4,096 tokens a GPU",
    )
    axes.set_xticks(SHARDS, [str(n) for n in SHARDS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plot", nargs="?", help="where to draw it")
    arguments = parser.parse_args()
    table()
    if arguments.plot:
        draw(arguments.plot)
