"""Every row against its floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .case import PEAK_TFLOPS, peak_gbs
from .results import Row


def draw(rows: Sequence[Row], gpu: str, path: Path) -> None:
    """A roofline, and each row's time as a multiple of the least that its floor allows."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot, for want of matplotlib: pip install 'deepgemm_jax[bench]'")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (roof, floor) = plt.subplots(
        1, 2, figsize=(13, 3 + 0.19 * len(rows)), layout="constrained"
    )
    figure.suptitle(f"deepgemm_jax on {gpu}")

    gbs = peak_gbs()
    for kind, peak in PEAK_TFLOPS.items():
        roof.plot([1, peak * 1e3 / gbs, 1e4], [gbs / 1e3, peak, peak], color="0.6", linewidth=1)
        roof.annotate(f"{kind} {peak:.0f}", (1e4, peak), ha="right", va="bottom", color="0.4")
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        roof.scatter(
            [row["tflops"] * 1e3 / row["gbs"] for row in own],
            [row["tflops"] for row in own],
            label=op,
            s=16,
        )
    roof.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOPS")
    roof.legend(loc="lower right")

    labels = [f"{row['op']} {'×'.join(map(str, row['shape']))}" for row in rows]
    for field, label, marker in (("us", "deepgemm_jax", "o"), ("deepgemm_us", "DeepGEMM", "|")):
        known = [i for i, row in enumerate(rows) if field in row]
        times = [rows[i][field] / rows[i]["floor_us"] for i in known]
        floor.scatter(times, known, label=label, marker=marker, zorder=2)
    floor.axvline(1, color="0.6", linewidth=1)
    floor.set_yticks(range(len(rows)), labels, fontsize=7)
    floor.set(xscale="log", xlabel="time over floor", ylim=(len(rows) - 0.5, -0.5))
    ticks = [1, 1.5, 2, 3, 5, 10]
    floor.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    floor.minorticks_off()
    floor.grid(axis="y", color="0.9")
    floor.legend(loc="upper right")

    figure.savefig(path, dpi=110)
    plt.close(figure)
