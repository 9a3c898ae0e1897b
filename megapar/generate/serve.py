"""`megapar serve`: one rank of a model that answers requests."""

import json
from pathlib import Path

from megapar.config.run_schema import SampleConfig, ServeConfig
from megapar.console import console
from megapar.generate.desk import Desk
from megapar.generate.run import Writer
from megapar.generate.server import Server
from megapar.generate.tokens import Text
from megapar.parallel.agreement import all_or_none, broadcast_text

HEARTBEAT_S = 10.0  # ranks without work hear that often that there is none


def run_rank(config: ServeConfig, rank: int, world_size: int) -> None:
    """Answer requests for ever, as rank `rank` of `world_size`. Rank 0 has the HTTP server and says before every step
    which texts join and which leave. Raises UserError before it serves."""
    writer = Writer(config, rank, config.serve.max_batch)
    world, device = writer.part.mesh["world"], writer.part.mesh.device
    desk = Desk(config.serve) if rank == 0 else None
    with all_or_none(world, device):
        if desk is not None:
            name = Path(str(config.run.dir)).resolve().name
            media = writer.part.config.model.has_media
            server = Server(config, name, desk, writer.tokenizer, writer.prompt_length, has_media=media)
            server.start()
            print(f"{name} at {server.url}/v1/completions; Ctrl-C ends", file=console(), flush=True)
    pause = min(HEARTBEAT_S, writer.part.mesh.timeout_s / 4)
    texts: dict[int, Text] = {}
    while True:
        order = desk.order(pause) if desk is not None else None
        said = broadcast_text(None if order is None else json.dumps(order), world, device)
        if said is not None:
            _join_and_leave(writer, texts, said)
        if not texts:
            continue
        writer.generator.step(list(texts.values()))
        if desk is not None:
            desk.take(texts)
        for number in [number for number, text in texts.items() if text.ended]:
            writer.generator.leave(texts.pop(number))


def _join_and_leave(writer: Writer, texts: dict[int, Text], said: str) -> None:
    order = json.loads(said)
    for number in order["leave"]:
        writer.generator.leave(texts.pop(number))
    for one in order["join"]:
        texts[one["number"]] = writer.generator.text(one["tokens"], SampleConfig(**one["sample"]))
