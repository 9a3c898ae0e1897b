"""Sinks of rows: what they hold, and that one that fails costs no row of metrics.jsonl."""

import csv
import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megapar.config.errors import ConfigError
from megapar.config.schema import TrainConfig
from megapar.train.sinks import Sink, sink_kinds
from megapar.train.sinks.csv import Csv
from megapar.train.sinks.tensorboard import TensorBoard
from megapar.train.sinks.wandb import Wandb, run_id
from tests.tiny import tiny_config
from tests.train.wandb_file import records

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5, "exposed_comm_s": {"tp": 0.5, "pp": 0.25}},
    {"step": 1, "val_loss": 2.25, "val_bits_per_char": None},
    {"step": 2, "loss": 2.0, "exposed_comm_s": {"tp": 0.125, "pp": 0.0}},
]


def config_of(folder: Path, **values: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    return tiny_config("nothing", **{"run.dir": str(folder), "logger.wandb.mode": "offline"} | values)


def fill(kind: type[Sink], config: TrainConfig, rows: list[dict[str, Any]], first_step: int = 1) -> list[str]:
    """What was warned of."""
    warnings: list[str] = []
    sink = kind(config, first_step, warnings.append)
    for row in rows:
        sink.log(row)
    sink.close()
    return warnings


def test_every_sink_is_found_and_none_is_wanted_unasked(tmp_path: Path) -> None:
    assert [kind.name for kind in sink_kinds()] == ["csv", "tensorboard", "wandb"]
    asked = config_of(tmp_path, **{"logger.wandb.mode": "disabled"})
    assert not any(kind.wanted(asked) for kind in sink_kinds())


def test_csv_has_a_table_of_each_kind_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert fill(Csv, config_of(tmp_path), ROWS) == []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    later = {"step": 2, "loss": 1.75, "exposed_comm_s": {"tp": 0.0, "pp": 0.0}}
    assert fill(Csv, config_of(tmp_path), [later], first_step=2) == []
    with open(tmp_path / "steps.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "loss": "2.5", "exposed_comm_s/tp": "0.5", "exposed_comm_s/pp": "0.25"},
            {"step": "2", "loss": "1.75", "exposed_comm_s/tp": "0.0", "exposed_comm_s/pp": "0.0"},
        ]
    assert (tmp_path / "evaluations.csv").read_text().splitlines() == ["step,val_loss,val_bits_per_char", "1,2.25,"]


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Of TensorBoard's event files: a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    assert fill(TensorBoard, config_of(tmp_path), ROWS) == []
    assert scalars(tmp_path / "tensorboard") == [
        *((1, "loss", 2.5), (1, "exposed_comm_s/tp", 0.5), (1, "exposed_comm_s/pp", 0.25), (1, "val_loss", 2.25)),
        *((2, "loss", 2.0), (2, "exposed_comm_s/tp", 0.125), (2, "exposed_comm_s/pp", 0.0)),
    ]


def test_tensorboard_without_its_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger\.tensorboard=true: needs tensorboardX: pip install"):
        TensorBoard.refuse(config_of(tmp_path))


def wandb_run(folder: Path) -> Any:
    """The record that begins the newest offline run of a run directory, once it is there: wandb writes on its own."""
    from wandb.proto import wandb_internal_pb2

    path = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))[-1]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for data in records(path):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                return record.run
        time.sleep(0.05)
    raise AssertionError("no run in it")


def test_wandb_has_name_group_config_and_an_id_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is exported; the id stays when the run goes on. Nothing lies in the temporary folder."""
    pytest.importorskip("wandb")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.setenv(name, "exported")
    ids = []
    for point in ("first", "second", "first"):
        config = config_of(tmp_path / point, **{"logger.wandb.group": "a sweep", "optim.lr": 0.125})
        assert fill(Wandb, config, ROWS[:1]) == []
        run = wandb_run(tmp_path / point)
        assert (run.run_group, run.display_name) == ("a sweep", point)
        logged = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert logged["optim"]["lr"] == 0.125 and logged["parallel"]["tp"] == 1
        ids.append(run.run_id)
        assert run.run_id == run_id(tmp_path / point)
    assert ids[0] == ids[2] != ids[1] and "exported" not in ids
    assert list(temporary.iterdir()) == []


class Failing(Sink):
    name = "failing"

    def write(self, row: Mapping[str, Any]) -> None:
        raise OSError("no route to host")


def test_a_sink_that_fails_is_said_once(tmp_path: Path) -> None:
    said = fill(Failing, config_of(tmp_path), ROWS)
    assert said == ["failing stopped (OSError: no route to host); metrics.jsonl has every row"]
