"""The bench program around its one part that needs a GPU, the timer."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import jax
import pytest

from deepgemm_jax import runtime
from deepgemm_jax.__main__ import main
from deepgemm_jax._bench import case, configs, plot, run, timing, training
from deepgemm_jax._bench.registry import BENCHMARKS
from deepgemm_jax._bench.results import References, Results, gpu_slug, kernels_sha256
from deepgemm_jax._core.device import H200

REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY / "benchmarks" / "reference"
GEMM = next(b for b in BENCHMARKS if b.op == "fp8_gemm_nt (1d2d)")
ABOUT = {"gpu": "some GPU", "date": "2026-01-01", "kernels_sha256": "1", "method": "as ever"}


class FakeTimer:
    """Runs what it is given, and says that each call was two kernels."""

    calls = 3

    def __call__(self, call):
        jax.block_until_ready(call())
        return [("kernel", 2.0), ("copy", 0.5)] * self.calls


@pytest.fixture
def no_references(tmp_path):
    return References(tmp_path / "none.json")


@pytest.mark.skipif(not runtime.find_nvrtc(), reason="no NVRTC to compile with")
def test_a_run_writes_the_rows(tmp_path, no_references, capsys):
    path = tmp_path / "results" / "gpu.json"
    shapes = [(24, 144, 272), (1, 16, 16)]
    rows = [(GEMM, shape) for shape in shapes]
    assert run.measure_all(rows, FakeTimer(), Results(path, ABOUT), no_references) == 0

    written = json.loads(path.read_text())
    assert written["about"] == ABOUT
    assert [(row["op"], tuple(row["shape"])) for row in written["rows"]] == [
        (GEMM.op, shape) for shape in shapes
    ]
    for row in written["rows"]:
        m, n, k = row["shape"]
        assert row["us"] == 2.0
        assert row["total_us"] == row["with_quantize_us"] == row["xla_bf16_us"] == 2.5
        assert row["tflops"] == pytest.approx(2 * m * n * k / 2e6, rel=1e-4)
        assert 0 < row["error"] < 0.01
        assert row["compile_ms"] > row["cached_ms"] > 0
        assert row["config"]
        assert "ratio" not in row and "deepgemm_us" not in row
    assert "24×144×272" in capsys.readouterr().out


@pytest.mark.skipif(not runtime.find_nvrtc(), reason="no NVRTC to compile with")
def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    cpu = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: cpu)
    monkeypatch.setattr(run, "ColdTimer", lambda calls, flush_mb: FakeTimer())
    assert (
        main(["bench", "--op", "fp8_gemm_nt", "--shape", "16,32,48", "--out", str(tmp_path)]) == 0
    )
    name = gpu_slug(cpu[0].device_kind)
    about = json.loads((tmp_path / f"{name}.json").read_text())["about"]
    assert about["kernels_sha256"] == kernels_sha256()
    assert "16×32×48" in capsys.readouterr().out


def test_a_training_step_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(training, "COMPILES", 1)
    row = training.measure(2, 40, 128, 64, timer=FakeTimer())
    assert row["us"] == row["bf16_us"] == row["forward_us"] == 2.5
    assert row["quantise_us"] == 2.5 - 3 * 2.5
    assert row["peak_mb"] > 0
    assert 0.01 < row["error"] < 0.1
    training.report(row)
    assert "2×40×128×64" in capsys.readouterr().out


def test_every_config_is_timed(tmp_path, capsys):
    class SlowFirst(FakeTimer):
        """The first config of a shape takes three times as long as the others."""

        first = 6.0

        def __call__(self, call):
            kernels = [("kernel", self.first)] * self.calls
            self.first = 2.0
            return kernels

    results = Results(tmp_path / "configs.json", ABOUT)
    configs.measure_all([(24, 144, 272)], SlowFirst(), results)
    (row,) = json.loads((tmp_path / "configs.json").read_text())["rows"]
    taken, *others = row["candidates"]
    assert others and all(other["us"] == 2.0 for other in others)
    assert taken["us"] == 6.0 and taken["predicted_us"] == min(
        candidate["predicted_us"] for candidate in row["candidates"]
    )
    assert row["over_best"] == 3.0
    assert "3.00 × the best config's" in capsys.readouterr().out


@pytest.mark.skipif(not runtime.find_nvrtc(), reason="no NVRTC to compile with")
def test_a_chain_calls_the_op_as_often_as_it_says(monkeypatch):
    def back_to_back(call):
        return [("kernel", 4.0 * i, 4.0 * i + 3) for i in range(10 * len(call()))]

    monkeypatch.setattr(run, "CHAIN", 5)
    monkeypatch.setattr(run, "timeline", back_to_back)
    row = run.measure_chain(GEMM.case(16, 32, 48))
    assert row["chain_kernel_us"] == 3.0
    assert row["chain_us"] == pytest.approx(4.0 - 1 / 50)


SMALL = {
    "fp8_gemm_nt (1d1d, fp32 out, accumulate)": (32, 48, 144),
    "fp8_gemm_nt (rows)": (24, 144, 272),
    "bf16_gemm_nt": (24, 144, 272),
    "m_grouped_fp8_gemm_nt_contiguous": (3, 20, 48, 144),
    "m_grouped_fp8_gemm_nt_contiguous (aligned)": (3, 20, 48, 144),
    "m_grouped_fp8_gemm_nt_contiguous (skewed)": (4, 20, 48, 144),
    "m_grouped_bf16_gemm_nt_contiguous": (3, 20, 48, 144),
    "ragged_dot": (3, 20, 48, 144),
    "m_grouped_fp8_gemm_nt_masked": (3, 24, 16, 48, 144),
    "k_grouped_fp8_gemm_nt_contiguous": (2, 32, 48, 150),
}


@pytest.mark.parametrize("op", SMALL)
def test_a_case_knows_its_result(op):
    (benchmark,) = (benchmark for benchmark in BENCHMARKS if benchmark.op == op)
    case = benchmark.case(*SMALL[op])
    result = run.compiled(case.program)()
    assert 0 < case.error(result) < 0.02
    assert case.error(result.at[(0,) * result.ndim].add(30)) > 1
    assert case.flops > 0 and case.bytes > 0


def test_a_failed_row_loses_no_other(tmp_path, no_references, capsys):
    def measured_wrongly(*shape):
        case = GEMM.case(*shape)
        return dataclasses.replace(case, error=lambda _: math.nan)

    def broken(*shape):
        raise MemoryError("far too large")

    cases = [GEMM.case, measured_wrongly, broken, GEMM.case]
    rows = [
        (dataclasses.replace(GEMM, case=case), (16, 16, 16 * (i + 1)))
        for i, case in enumerate(cases)
    ]
    results = Results(tmp_path / "gpu.json", ABOUT)
    assert run.measure_all(rows, FakeTimer(), results, no_references) == 2
    assert [row["shape"] for row in results.rows] == [[16, 16, 16], [16, 16, 64]]
    shown = capsys.readouterr().out
    assert "the result is wrong" in shown and "far too large" in shown


def row(*shape, us=10.0, **fields):
    return {"op": GEMM.op, "shape": list(shape), "us": us, **fields}


def test_rows_of_the_same_kernels_are_kept(tmp_path):
    path = tmp_path / "gpu.json"
    Results(path, ABOUT).add(row(1, 2, 3), row(4, 5, 6))

    tomorrow = Results(path, ABOUT | {"date": "2026-01-02"})
    tomorrow.add(row(1, 2, 3, us=5.0))
    assert json.loads(path.read_text())["rows"] == [row(1, 2, 3, us=5.0), row(4, 5, 6)]

    changed = Results(path, ABOUT | {"kernels_sha256": "2"})
    changed.add(row(1, 2, 3))
    assert json.loads(path.read_text())["rows"] == [row(1, 2, 3)]


def test_references_are_found_by_op_and_shape(tmp_path):
    known = {"op": GEMM.op, "shape": [1, 2, 3], "deepgemm_us": 20.0, "floor_us": 1.0}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"rows": [known]}))
    references = References(file)
    assert references.compare(row(1, 2, 3)) == {"deepgemm_us": 20.0, "ratio": 2.0}
    assert references.compare(row(1, 2, 4)) == {}
    assert references.compare(row(1, 2, 3) | {"op": "another"}, GEMM.op)["ratio"] == 2.0


def test_ops_and_shapes_can_be_chosen():
    every = list(run.chosen(BENCHMARKS, None, None))
    assert len(every) == sum(len(benchmark.shapes) for benchmark in BENCHMARKS)
    named = run.chosen(BENCHMARKS, ["fp8_gemm_nt"], [(1, 2, 3)])
    assert {benchmark.op.split(" ")[0] for benchmark, _ in named} == {"fp8_gemm_nt"}
    assert list(run.chosen(BENCHMARKS, [GEMM.op], None)) == [(GEMM, s) for s in GEMM.shapes]


@pytest.mark.parametrize("measured", BENCHMARKS, ids=lambda measured: measured.op)
def test_each_reference_of_an_op_is_measured(measured):
    rows = json.loads((REFERENCE / "h200_deepgemm.json").read_text())["rows"]
    shapes = {tuple(row["shape"]) for row in rows if row["op"] == measured.op}
    assert shapes <= set(measured.shapes)
    assert set(measured.chained) <= set(measured.shapes)


def test_the_floor_is_that_of_the_references(monkeypatch):
    monkeypatch.setattr(case, "cuda_device", lambda: H200)
    rows = json.loads((REFERENCE / "h200_deepgemm.json").read_text())["rows"]
    floors = {(row["op"], *row["shape"]): row["floor_us"] for row in rows}
    for shape in [(1, 576, 7168), (64, 576, 7168)]:
        assert GEMM.case(*shape).floor_us == pytest.approx(floors[GEMM.op, *shape], abs=0.01)


def test_the_digest_is_of_the_kernels_in_csrc():
    csrc = REPOSITORY / "csrc"
    digest = hashlib.sha256()
    for file in sorted(csrc.rglob("*.cuh"), key=lambda file: file.relative_to(csrc).as_posix()):
        digest.update(file.relative_to(csrc).as_posix().encode() + b"\0" + file.read_bytes())
    assert kernels_sha256() == digest.hexdigest()


def test_results_are_named_as_the_references():
    assert gpu_slug("NVIDIA H200") == "h200"
    assert gpu_slug("NVIDIA H100 80GB HBM3") == "h100_80gb_hbm3"


def test_flushes_are_not_counted(monkeypatch):
    """Neither if CUPTI tells kernels in another order, nor if one has the name of a flush."""
    launched = []
    monkeypatch.setattr(timing, "record", lambda run: (launched.clear(), run(), launched[::-1])[2])
    monkeypatch.setattr(timing.ColdTimer, "_flush", lambda self: launched.append(("fill", 1800.0)))

    def call():
        launched.extend([("fill", 1.0), ("kernel", 5.0)])

    timer = timing.ColdTimer(calls=4, flush_mb=1)
    kernels = timer(call)
    assert timing.mean_us(kernels, timer.calls) == 6.0
    assert timing.mean_us(kernels, timer.calls, "kernel") == 5.0
    with pytest.raises(RuntimeError, match="fill"):
        timing.mean_us(kernels, timer.calls, "no such kernel")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row(1, 2, 3, tflops=100.0, gbs=2000.0, floor_us=5.0),
        row(4, 5, 6, tflops=900.0, gbs=300.0, floor_us=9.0, deepgemm_us=11.0),
    ]
    plot.draw(rows, "some GPU", tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
