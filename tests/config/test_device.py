"""Which device a run gets on a machine with GPUs, and what is refused there. The GPUs are a number here."""

from typing import Any

import pytest

from megapar.cli.compose import compose, split
from megapar.config.check import check
from megapar.config.derive import resolve, resolve_forward
from megapar.config.errors import ConfigError
from megapar.config.keys import changed
from megapar.config.run_schema import GenerateConfig
from megapar.config.schema import TrainConfig, VerifyConfig
from megapar.kernels import INTERPRET

SIZES: dict[str, Any] = {"model.vocab_size": 64}


def resolved(kind: type, gpus: int, **values: Any) -> Any:
    config = resolve(changed(kind(), SIZES | values), num_gpus=gpus)
    check(config, num_gpus=gpus)
    return config


@pytest.mark.parametrize(
    ("backend", "gpus", "device"), [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("interpret", 1, "cpu")]
)
def test_auto(backend: str, gpus: int, device: str) -> None:
    values = {"kernels.backend": backend}
    assert resolved(TrainConfig, gpus, **values).train.device == device
    assert resolve_forward(changed(GenerateConfig(), values), num_gpus=gpus).device == device


def test_interpreted_generation_is_cut_for_no_gpu() -> None:
    config = changed(GenerateConfig(), {"kernels.backend": "interpret", "parallel.auto": True})
    assert resolve_forward(config, num_gpus=4).parallel.tp == 1


def test_the_demo_runs_on_a_cpu_whatever_is_visible() -> None:
    demo = compose("train", split(["experiment=demo"]))
    assert resolved(TrainConfig, 1).train.device == "cuda"
    config = resolve(demo, num_gpus=1, vocab_size=1024)
    check(config, num_gpus=1)
    assert (config.train.device, str(config.parallel.layout)) == ("cpu", "tp2pp2dp2")


@pytest.mark.parametrize("kind", [TrainConfig, VerifyConfig])
def test_interpreted_kernels_on_a_gpu_are_refused(kind: type) -> None:
    values = {"kernels.backend": "interpret", "train.device": "cuda", "train.dtype": "fp32"}
    with pytest.raises(ConfigError, match=r"^kernels.backend=interpret: .*on a CPU, not on cuda; use cpu"):
        resolved(kind, 1, **values)


def test_interpreted_symmetric_memory_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapar.kernels.interprets", lambda: True)
    values = {"train.device": "cuda", "parallel.tp": 2, "parallel.dp": 1, "parallel.tp_overlap": "symmetric"}
    with pytest.raises(ConfigError, match=rf"^parallel.tp_overlap=symmetric: {INTERPRET} is set, .*; unset it"):
        resolved(TrainConfig, 2, **values)


def test_verify_takes_as_many_ranks_as_there_are_gpus() -> None:
    config = resolved(VerifyConfig, 2, **{"train.device": "cuda"})
    assert config.layouts == ["single", "dp2", "pp2", "tp2"]
    assert resolved(VerifyConfig, 1, **{"train.device": "cuda"}).layouts == ["single"]
    assert "tp4" in resolved(VerifyConfig, 8, **{"train.device": "cuda"}).layouts
    assert "tp2pp2dp2" in resolved(VerifyConfig, 2).layouts and "single" not in resolved(VerifyConfig, 2).layouts


@pytest.mark.parametrize(
    ("gpus", "layouts", "line"),
    [
        (0, ["single"], r"^train.device=cuda: no GPU is visible; use cpu"),
        (2, ["tp2", "tp4"], r"^layouts=tp4: needs 4 GPUs, 2 visible; use train.device=cpu, or leave it out$"),
    ],
)
def test_verify_refuses_more(gpus: int, layouts: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        resolved(VerifyConfig, gpus, **{"train.device": "cuda", "layouts": layouts})


@pytest.mark.parametrize(
    ("kind", "gpus", "device", "bucket", "timeout"),
    [
        (TrainConfig, 0, "cpu", 1_000_000, 300.0),
        (TrainConfig, 1, "cuda", 40_000_000, 1800.0),
        (VerifyConfig, 1, "cpu", 1_000_000, 60.0),
        (VerifyConfig, 1, "cuda", 40_000_000, 1800.0),
    ],
)
def test_buckets_and_timeouts_fit_the_device(kind: Any, gpus: int, device: str, bucket: int, timeout: float) -> None:
    config = resolved(kind, gpus, **{"train.device": device})
    assert (config.parallel.bucket_size, config.train.timeout.total_seconds()) == (bucket, timeout)
    given = resolved(kind, gpus, **{"train.device": device, "parallel.bucket_size": 7, "train.timeout_s": 9.0})
    assert (given.parallel.bucket_size, given.train.timeout_s) == (7, 9.0)
