"""Reads the history back from an offline wandb run: LevelDB's log format around protobuf records."""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7  # of the file as of every chunk: checksum, length, type


def records(path: Path) -> list[bytes]:
    """The records of a .wandb file; a record may be cut into chunks at block boundaries."""
    data, position = path.read_bytes(), HEADER
    found, parts = [], []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        position += HEADER
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):  # whole, or the last chunk
            found.append(b"".join(parts))
            parts = []
    return found


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The rows that were logged, nested keys joined by dots."""
    from wandb.proto import wandb_internal_pb2

    [path] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for data in records(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
    return rows
