"""`megapar bench kernels`: what it counts, what it may call measured, and what it leaves behind."""

import csv
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import triton.testing

from megapar.bench import run, timing
from megapar.bench.config import BenchKernelsConfig
from megapar.bench.plots import plots
from megapar.bench.problem import Work
from megapar.bench.roofline import GPUS, gpu_named, least
from megapar.bench.rows import COLUMNS, Row
from megapar.bench.run import Bench, Point, benches
from megapar.bench.tables import number, terminal
from megapar.bench.timing import Quantiles
from megapar.cli import main
from megapar.inspect.compile import Figures, Spec, spec_of, specs_of
from megapar.kernels import backends
from megapar.kernels.registry import KERNELS
from megapar.kernels.shapes import MODELS
from megapar.launch.pool import WorkerPool
from megapar.report.curves import Curve, Panel, draw_curves
from tests.kernels import cases

A100, H100, B200 = GPUS
FAST = ["shape=[demo]", "tokens=[8,16]", "mode=[forward,full]"]


# ---------------------------------------------------------------------------------------------------------- counted


def test_every_kernel_tells_a_profiler() -> None:
    """Its name, by which no other kernel goes, and what it does and moves."""
    named: dict[str, Any] = {}
    for kernel in KERNELS.values():
        for name, launch in kernel.specs("sm_90").items() if kernel.specs else ():
            if "packed" in name:
                continue  # the same kernels; of packed sequences it reads the lengths, and here is no storage
            told = launch.metadata()
            assert told["name"] == launch.kernel.fn.__name__ and told["bytes"] > 0, name
            assert named.setdefault(told["name"], launch.kernel) is launch.kernel, name
            flops = [value for key, value in told.items() if key.startswith("flops")]
            assert len(flops) == 1 and (flops[0] > 0 or name.startswith(("push", "collect"))), name


def test_every_kernel_is_benchmarked() -> None:
    assert benches() == [function for function, forms in backends().items() if "triton" in forms]


T = 4  # tokens; demo: hidden 128, 4 heads and 2 kv heads of 32, ffn 384, vocabulary 1024, fp32
Q, KV = 4 * T * 4 * 32, 4 * T * 2 * 32
PAIRS = T * (T + 1) // 2
# kernel -> (FLOPs, bytes) forward, and backward
BY_HAND = {
    # q, k, v, o and a log-sum-exp per row and head; two products of 2 * 32 FLOPs for each visible pair of each head.
    # Backward: q, k, v, o, do, log-sum-exp read, dq, dk, dv written; five products.
    "attention": ((4 * 4 * 32 * PAIRS, 2 * Q + 2 * KV + 16 * T), (10 * 4 * 32 * PAIRS, 4 * Q + 4 * KV + 16 * T)),
    # x, y, the weight, one number per row; dy, h, dx, the weight and its gradient, one number per row
    "rmsnorm": ((4 * 128 * T, 4 * (2 * 128 * T + 128 + T)), (9 * 128 * T, 4 * (3 * 128 * T + 256 + T))),
    "layernorm": ((7 * 128 * T, 4 * (2 * 128 * T + 256 + 2 * T)), (13 * 128 * T, 4 * (3 * 128 * T + 384 + 2 * T))),
    # q, k in and out, and the table
    "rope": ((3 * 6 * 32 * T, 2 * (Q + KV) + 4 * 32 * T), (3 * 6 * 32 * T, 2 * (Q + KV) + 4 * 32 * T)),
    "swiglu": ((5 * 384 * T, 4 * 3 * 384 * T), (10 * 384 * T, 4 * 5 * 384 * T)),
    "geglu": ((9 * 384 * T, 4 * 3 * 384 * T), (17 * 384 * T, 4 * 5 * 384 * T)),
    "gelu": ((8 * 384 * T, 4 * 2 * 384 * T), (15 * 384 * T, 4 * 3 * 384 * T)),
    "gelu_erf": ((5 * 384 * T, 4 * 2 * 384 * T), (11 * 384 * T, 4 * 3 * 384 * T)),
    "cross_entropy": ((4 * 1024 * T, 4 * 1024 * T), (3 * 1024 * T, 2 * 4 * 1024 * T)),
    # x, what is added, out, two numbers per token; dout, dx and the numbers
    "dropout": ((3 * 128 * T, 4 * 3 * 128 * T + 16 * T), (2 * 128 * T, 4 * 2 * 128 * T + 16 * T)),
    # x, w, y; dy, w, x, dx, and the weight's gradient read and written
    "matmul": (
        (2 * 128 * 384 * T, 4 * (128 * T + 384 * T + 128 * 384)),
        (4 * 128 * 384 * T, 4 * (2 * 128 * T + 384 * T + 3 * 128 * 384)),
    ),
}
PRODUCTS = ("attention", "matmul")


@pytest.mark.parametrize("kernel", benches())
def test_work_by_hand(kernel: str) -> None:
    forward, backward = (Work(*amounts, kernel in PRODUCTS, "fp32") for amounts in BY_HAND[kernel])
    found = Point(kernel, "demo", "fp32", T).work()
    assert found == {"forward": forward, "backward": backward, "full": forward + backward}


def test_cross_entropy_is_six_bytes_per_logit_in_16_bits() -> None:
    assert Point("cross_entropy", "llama-8b", "bf16", 7).work()["full"].bytes == 6 * 7 * 128256


@pytest.mark.parametrize("kernel", benches())
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_bytes_are_those_of_the_launches(kernel: str, mode: str) -> None:
    """A mode of one launch moves what the launch says; one of several no more than all of them."""
    point = Point(kernel, "llama-8b", "bf16", 96)
    plan = point.problem("meta").plans("sm_90")[mode]
    told = [launch.metadata() for launch in plan.launches]
    work = point.work()[mode]
    if len(told) == 1:
        assert work.bytes == told[0]["bytes"]
        if kernel == "attention":
            assert work.flops == told[0]["flops16"]
    else:
        assert max(one["bytes"] for one in told) < work.bytes < sum(one["bytes"] for one in told)
        # The launches of attention's backward make seven products, of which five are of use.
        assert kernel != "attention" or work.flops * 7 / 5 == sum(one.get("flops16", 0) for one in told)


def test_roofline_by_hand() -> None:
    products = least(Work(989.4e9, 3.35e8, True, "bf16"), H100)
    assert (products.compute_ms, products.memory_ms) == pytest.approx((1.0, 0.1))
    assert (products.ms, products.bound) == (products.compute_ms, "compute")
    moves = least(Work(67e9, 2 * 3.35e9, False, "bf16"), H100)
    assert (moves.compute_ms, moves.ms) == pytest.approx((1.0, 2.0)) and moves.bound == "memory"
    assert least(Work(156e9, 0, True, "fp32"), A100).compute_ms == pytest.approx(1.0)
    # Llama-8B's heads over 4096 tokens: 4 * 128 * 32 * 4096 * 4097 / 2 = 137.5 GFLOP
    assert least(Point("attention", "llama-8b", "bf16", 4096).work()["forward"], B200).ms == pytest.approx(
        0.0611, abs=5e-5
    )
    assert gpu_named("NVIDIA H100 80GB HBM3") is H100 and gpu_named("AMD EPYC, 2 threads") is None


# ---------------------------------------------------------------------------------------------------------- measured


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "bench.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == COLUMNS
    return rows


def stand_in(specs: list[Spec]) -> list[Figures]:
    """For the compiler, which takes seconds to start."""
    return [
        Figures(s.name, s.target, registers=40, shared_bytes=2048, perfect=0.5, overlap=0.1, lockstep=0.25)
        for s in specs
    ]


def test_what_is_read_is_what_is_inspected() -> None:
    """Where both take a kernel's plainest form, the benchmark compiles exactly what `megapar kernels` does."""
    known = {kernel: {anonymous(spec) for spec in specs_of([kernel], ["sm_90"])} for kernel in ("attention", "swiglu")}
    for kernel, shape in (*product(["attention"], MODELS), ("swiglu", "llama-8b"), ("swiglu", "demo")):
        plans = Point(kernel, shape, MODELS[shape].dtype, 4096).problem("meta").plans("sm_90")
        for launch in (launch for plan in plans.values() for launch in plan.launches):
            assert anonymous(spec_of("", launch, "sm_90")) in known[kernel], (kernel, shape, launch.kernel.fn.__name__)


def anonymous(spec: Spec) -> str:
    return repr(replace(spec, name=""))


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a benchmark of two kernels leaves behind on a CPU."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SECONDS", 0.004)
        patch.setattr(run, "find_spec", lambda name: None)
        patch.setattr(run, "compile_all", stand_in)
        providers = "provider=[megapar,torch,flash_attn,liger_kernel]"
        command = ["bench", "kernels", "kernel=[rmsnorm,rope]", "device=cpu", providers, *FAST, f"out={folder}"]
        assert main(command) == 0
    return folder


def test_rows_of_a_cpu(on_a_cpu: Path) -> None:
    rows = read(on_a_cpu)
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("measured", "interpreted", "static")}
    assert len(rows) == sum(map(len, by_kind.values())) and not by_kind["interpreted"]
    keys = [tuple(v for k, v in row.items() if k not in ("p50", "p20", "p80", "unit")) for row in rows]
    assert len(set(keys)) == len(keys)

    # Without a GPU nothing of ours is timed, and nothing that was not asked for is there.
    assert {row["provider"] for row in by_kind["measured"]} == {"torch"}
    assert {row["metric"] for row in by_kind["measured"]} == {"time", "gbps", "memory"}
    assert len(by_kind["measured"]) == 2 * 2 * 2 * 3  # kernels, lengths, modes, metrics
    for row in by_kind["measured"]:
        assert float(row["p50"]) > 0 and "threads" in row["device"] and row["versions"].startswith("megapar ")
        if row["metric"] != "memory":
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])

    ours = [row for row in by_kind["static"] if row["provider"] == "megapar"]
    assert {row["metric"] for row in ours} == {"registers", "spill", "shared_memory", "bound", "lockstep"}
    assert {row["device"] for row in ours} == {"sm_90"} and {row["x"] for row in ours} == {""}
    launches = {(row["kernel"], row["mode"], row["note"]) for row in ours}
    assert launches == {
        ("rmsnorm", "forward", "rmsnorm_forward_kernel"), ("rmsnorm", "backward", "rmsnorm_input_grad_kernel"),
        ("rmsnorm", "backward", "rmsnorm_weight_grad_kernel"), ("rope", "forward", "rope_kernel"),
        ("rope", "backward", "rope_kernel"),
    }  # fmt: skip
    roofline = [row for row in by_kind["static"] if row["provider"] == "roofline"]
    assert len(roofline) == 2 * 2 * 2 * (3 + 3 * 3) and len(ours) + len(roofline) == len(by_kind["static"])
    assert {row["device"] for row in roofline if row["metric"] == "least_time"} == {"A100", "H100", "B200"}


def test_rates_and_memory_follow(on_a_cpu: Path) -> None:
    rows = {(r["kernel"], r["mode"], r["x"], r["metric"]): r for r in read(on_a_cpu) if r["provider"] != "megapar"}
    for kernel, mode, x, metric in rows:
        if metric == "gbps":
            time, moved = rows[kernel, mode, x, "time"], Point(kernel, "demo", "fp32", int(x)).work()[mode].bytes
            rate = rows[kernel, mode, x, "gbps"]
            for mine, other in (("p50", "p50"), ("p20", "p80"), ("p80", "p20")):
                assert float(rate[mine]) == pytest.approx(moved / 1e6 / float(time[other]))
    # RoPE in plain torch holds at least what it returns.
    assert float(rows["rope", "forward", "16", "memory"]["p50"]) >= 16 * 6 * 32 * 4 / 1e6


def test_files_of_a_cpu(on_a_cpu: Path) -> None:
    names = {f"{kernel}_{metric}.svg" for kernel in ("rmsnorm", "rope") for metric in ("time", "gbps", "memory")}
    assert {path.name for path in on_a_cpu.iterdir()} == names | {"bench.csv", "bench.md"}
    for name in names:
        text = (on_a_cpu / name).read_text()
        assert text.count("http") == 1  # the name of SVG's namespace; nothing is fetched
        root = ElementTree.fromstring(text)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * 2  # lengths, modes
    said = (on_a_cpu / "bench.md").read_text()
    for title in ("rmsnorm, demo, fp32: measured on", "machine code", "rope, demo, fp32: least ms by roofline"):
        assert f"## {title}" in said
    assert "No GPU is here, so none of them was timed" in said


def test_ours_alone_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "time_ms", lambda *_: pytest.fail("something was timed"))
    monkeypatch.setattr(run, "compile_all", stand_in)
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    for name in ("rope_time.svg", "attention_memory.svg", "bench.md", "mine.svg"):  # three of an earlier benchmark
        (out / name).write_text("old")
    assert main(["bench", "kernels", "kernel=[rope]", "provider=[megapar]", "device=cpu", *FAST, f"out={out}"]) == 0
    assert {row["kind"] for row in read(out)} == {"static"}
    assert {path.name for path in out.iterdir()} == {"bench.csv", "bench.md", "mine.svg"}
    shown = capsys.readouterr().out
    assert "least ms by roofline" in shown and "machine code" in shown
    assert "rope    demo   sm_90   forward   rope           40        0          2   0.50      0.25" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_absent_libraries_are_a_line_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "flash_attn" else True)
    said: list[str] = []
    assert run._usable(["torch", "flash_attn", "liger_kernel"], "cpu", said.append) == ["torch"]
    assert said == [
        "flash_attn: not installed, left out; pip install flash-attn",
        "liger_kernel: needs a GPU, left out",
    ]
    assert run._usable(["flash_attn", "liger_kernel"], "cuda", said.append) == ["liger_kernel"]
    assert main(["bench", "kernels", "provider=[flash_attn]", "device=cpu"]) == 2
    assert "provider=flash_attn: not installed; pip install flash-attn; or use megapar" in capsys.readouterr().err


def test_on_a_gpu_ours_are_measured_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "compile_all", lambda specs: pytest.fail("compiled"))
    asked = []

    def measure(bench: Bench, point: Point, provider: str, log: run.Log) -> list[Row]:
        asked.append(provider)
        return []

    monkeypatch.setattr(run, "_measure", measure)
    bench = Bench(
        ["rope"], ["megapar", "torch"], ["full"], [Point("rope", "demo", "fp32", 8)], "cuda", False, ["sm_90"]
    )
    assert {row.provider for row in run.run(bench, lambda line: None)} == {"roofline"}
    assert asked == ["megapar", "torch"]


def test_a_gpu_is_timed_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def do_bench(call: Callable[[], Any], **options: Any) -> list[float]:
        calls.append((call, options))
        return [2.0, 1.0, 3.0]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert timing.time_ms(dict, "cuda", 0.1) == Quantiles(p50=2.0, p20=1.0, p80=3.0)
    assert calls == [(dict, {"warmup": 25.0, "rep": 100.0, "quantiles": [0.5, 0.2, 0.8]})]


def test_a_cpu_is_timed_in_milliseconds() -> None:
    """A sleep takes no less than was asked for; how much more is the machine's affair, but not fifty times."""
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        time.sleep(0.02)

    found = timing.time_ms(call, "cpu", 1e-3)
    assert 20.0 <= found.p20 <= found.p50 <= found.p80 and found.p20 < 1000.0
    assert len(calls) >= 3


def test_a_slow_time_is_a_low_rate() -> None:
    assert Quantiles(p50=2.0, p20=1.0, p80=4.0).rate(8.0) == Quantiles(p50=4.0, p20=2.0, p80=8.0)


def test_an_interrupted_sweep_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_measure", interrupt)
    assert (
        main(["bench", "kernels", "provider=[torch]", "device=cpu", "kernel=[rope]", *FAST, f"out={tmp_path}"]) == 130
    )
    assert {row["provider"] for row in read(tmp_path)} == {"roofline"}


def test_a_library_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("no such head\nand more")

    problem = run.Problem({"torch": fail, "liger_kernel": fail}, dict)  # type: ignore[arg-type]
    monkeypatch.setattr(Point, "problem", lambda self, device: problem)
    bench = Bench([], [], ["full"], [], "cpu", False, [])
    said: list[str] = []
    assert run._measure(bench, Point("rope", "demo", "fp32", 8), "liger_kernel", said.append) == []
    assert said == ["liger_kernel: rope, demo, 8 tokens left out: RuntimeError: no such head"]
    with pytest.raises(RuntimeError):
        run._measure(bench, Point("rope", "demo", "fp32", 8), "torch", said.append)


def test_the_way_of_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU the one that torch picks; what is forced by name on a GPU is not offered."""
    monkeypatch.setattr(run, "SECONDS", 0.001)
    command = ["bench", "kernels", "kernel=[attention,matmul,rope]", "device=cpu", "provider=[torch]"]
    assert main([*command, "shape=[demo]", "tokens=[16]", "mode=[full]", f"out={tmp_path}"]) == 0
    notes = {row["kernel"]: row["note"] for row in read(tmp_path) if row["metric"] == "time"}
    assert notes == {"attention": "FLASH_ATTENTION", "matmul": "main_grad.add_(mm)", "rope": ""}
    assert "torch: FLASH_ATTENTION" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "more"), [("cpu", []), ("cuda", ["torch_flash", "torch_cudnn", "torch_fp32"])])
def test_torch_has_more_ways_on_a_gpu(device: str, more: list[str]) -> None:
    config = BenchKernelsConfig(device=device)  # type: ignore[arg-type]
    assert run.understand(config, 1, lambda line: None).providers == ["megapar", "torch", *more]


@pytest.mark.parametrize("kernel, dtype, ways", [
    ("attention", "bf16", {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}),
    ("attention", "fp32", {}),
    ("matmul", "bf16", {"torch_fp32": "main_grad.add_(mm(out_dtype=fp32))"}),
    ("matmul", "fp32", {}),
])  # fmt: skip
def test_every_way_is_of_the_dtypes_that_it_takes(kernel: str, dtype: str, ways: dict[str, str]) -> None:
    providers = Point(kernel, "demo", dtype, 16).problem("cpu").providers
    assert {name: providers[name]().note for name in providers if name.startswith("torch_")} == ways


def test_flash_attention_by_name_computes_the_same() -> None:
    """Forced in torch's CPU form, on keys and values with a head for each query head; either rounds to bf16."""
    problem = Point("attention", "llama-8b", "bf16", 37).problem("cpu")
    picked, forced = (problem.providers[name]() for name in ("torch", "torch_flash"))
    kept = picked.forward(), forced.forward()
    assert torch.equal(kept[0][0], kept[1][0].transpose(1, 2))
    gradients = [x.float() for x in picked.backward(kept[0])]
    by_name = [x.float().transpose(1, 2) for x in forced.backward(kept[1])]
    by_name[1:] = [x.unflatten(2, (-1, 4)).sum(3) for x in by_name[1:]]  # of llama's groups
    for found, expected in zip(by_name, gradients, strict=True):
        assert (found - expected).norm() <= 2 * 2**-8 * expected.norm()


@pytest.mark.parametrize("provider", ["megapar", "torch"])
def test_products_do_the_same_work(provider: str) -> None:
    """Both add their weight gradient to one in fp32, call after call."""
    runner = Point("matmul", "demo", "bf16", 37).problem("cpu").providers[provider]()
    once = runner.backward(runner.forward())[1].clone()
    assert once.dtype == torch.float32 and once.abs().max() > 0
    assert torch.equal(runner.backward(runner.forward())[1], 2 * once)


# ------------------------------------------------------------------------------------------------------- interpreted


def test_providers_compute_the_same(interpreter: WorkerPool) -> None:
    """Outputs and gradients of ours, interpreted, beside torch's, in fp32."""
    for kernel, errors in interpreter.run(cases.run_providers, 1, benches())[0].items():
        # Sums of up to 128 products of numbers of order 1: rounding reaches 4e-6.
        assert len(errors) >= 2 and max(errors) < 1e-5, kernel


def test_interpreted_rows_are_marked_and_not_drawn(interpreter: WorkerPool, tmp_path: Path) -> None:
    command = ["bench", "kernels", "kernel=[rope]", "device=cpu", "kernels.backend=interpret", *FAST, f"out={tmp_path}"]
    assert interpreter.run(cases.run_command, 1, command) == [0]
    rows = read(tmp_path)
    kinds = {(row["provider"], row["kind"]) for row in rows}
    assert kinds == {("megapar", "interpreted"), ("torch", "measured"), ("roofline", "static")}
    assert {row["metric"] for row in rows if row["kind"] == "interpreted"} == {"time"}
    assert "megapar" not in (tmp_path / "rope_time.svg").read_text()
    assert "The times are the interpreter's" in (tmp_path / "bench.md").read_text()


# ------------------------------------------------------------------------------------------------------------- drawn


def row(provider: str, x: int, time: float, kind: Any = "measured", device: str = "NVIDIA H100", **other: Any) -> Row:
    given = {"metric": "time", "unit": "ms", "note": ""} | other
    times = (time, time / 2, time * 2)
    what = ("rope", provider, "full", given["metric"], given["unit"])
    return Row(*what, x, *times, device, "megapar 0", kind, "demo", "fp32", given["note"])


def test_only_measured_rows_are_drawn() -> None:
    assert plots([row("megapar", 8, 1.0, kind="interpreted"), row("roofline", 8, 1.0, kind="static")]) == {}
    floor = row("roofline", 8, 0.5, kind="static", device="H100", metric="least_time", note="memory")
    interpreted = row("megapar", 8, 2.0, kind="interpreted")
    ((name, picture),) = plots([row("torch", 8, 1.0), interpreted, floor]).items()
    assert name == "rope_time.svg" and "torch, 8" in picture and "megapar" not in picture
    assert "stroke-dasharray" in picture and "H100 at its peaks" in picture  # of the GPU that measured


def test_measured_stands_beside_the_least() -> None:
    floors = [
        row("roofline", 8, 0.5, kind="static", device=gpu.name, metric="least_time", note="memory") for gpu in GPUS
    ]
    others = [row("torch", 8, 1.0, metric=metric) for metric in ("gbps", "memory")]
    said = terminal([row("torch", 8, 1.0), *others, *floors])
    assert "0.50 m" in said and "50%" in said and "of least" in said


def test_axes_are_logarithmic() -> None:
    points = [(float(x), float(x) ** 2, float(x) ** 2, float(x) ** 2) for x in (8, 16, 32)]
    text = draw_curves("title", "ms", "tokens", [[Panel("a & b", [Curve("one", "#000000", points)])]])
    circles = [c.attrib for c in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}circle")]
    (x0, y0), (x1, y1), (x2, y2) = ((float(c["cx"]), float(c["cy"])) for c in circles)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x1 > x0  # positions are written with one digit
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y1 < y0


@pytest.mark.parametrize(
    "value,text", [(0.0, "0"), (1.23456, "1.23"), (123456.0, "123456"), (0.000049713, "0.0000497")]
)
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert number(value) == text
    assert math.isclose(float(text), value, rel_tol=5e-3, abs_tol=0)
