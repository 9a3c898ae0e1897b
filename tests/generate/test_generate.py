"""`megapar generate`: from a run directory to text."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megapar.config.derive import resolve, resolve_forward
from megapar.config.file import dump, load_config
from megapar.config.keys import changed
from megapar.config.run_schema import GenerateConfig
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import MODEL
from megapar.data.tokenizer.train import train_bpe
from megapar.generate.prompts import read_prompts
from megapar.generate.run import in_order
from megapar.launch.pool import WorkerPool
from tests.data.texts import make_text
from tests.generate import jobs

PROMPT = "alpha  naïve 中文\n"


def generate(pool: WorkerPool, run_dir: Path, ranks: int = 1, **values: Any) -> Any:
    """What the ranks say; the text goes to `out`."""
    given = {"run.dir": str(run_dir), "prompt": PROMPT, "sample.max_tokens": 20, "out": str(run_dir / "out.txt")}
    config = resolve_forward(changed(GenerateConfig(), given | values))
    lines = pool.run(jobs.generate, ranks, config)
    assert len(set(lines)) == 1, "every rank ends alike"
    return lines[0]


def test_writes_prompt_and_continuation_in_any_layout(pool: WorkerPool, trained: Path) -> None:
    texts = []
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {}), (4, {"parallel.tp": 2, "parallel.pp": 2})]
    for ranks, layout in layouts:
        assert generate(pool, trained, ranks, dtype="fp64", **layout) is None
        texts.append((trained / "out.txt").read_text(encoding="utf-8"))
    assert texts[0].startswith(PROMPT)
    assert len(texts[0]) > len(PROMPT) + 20
    assert texts[0] == texts[1]
    assert generate(pool, trained, dtype="bf16", **{"sample.seed": 5}) is None
    assert (trained / "out.txt").read_text(encoding="utf-8") != texts[0]


def test_another_checkpoint(pool: WorkerPool, trained: Path) -> None:
    texts = []
    for step in ("", "checkpoints/step-00000001", "checkpoints/step-00000002"):
        values: dict[str, Any] = {"checkpoint.load": str(trained / step), "sample.temperature": 3.0}
        assert generate(pool, trained, **values) is None
        texts.append((trained / "out.txt").read_text(encoding="utf-8"))
    assert texts[0] == texts[2] != texts[1]


def test_prompts_of_a_file(pool: WorkerPool, trained: Path, tmp_path: Path) -> None:
    """Each is continued as it is alone, in any layout and company, in the order of the file."""
    prompts = ["alpha", "naïve", "中", "a", "beta"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    expected = []
    for text in prompts:
        assert generate(pool, trained, prompt=text, dtype="fp64") is None
        expected.append((trained / "out.txt").read_text(encoding="utf-8").removesuffix("\n"))
    layouts: list[tuple[int, str, dict[str, Any]]] = [
        (1, "txt", {"batch_size": 2}), (4, "jsonl", {"parallel.tp": 2, "parallel.pp": 2}),
    ]  # fmt: skip
    for ranks, kind, values in layouts:
        given = {"prompt": "", "prompt_file": str(tmp_path / f"prompts.{kind}"), "dtype": "fp64"}
        assert generate(pool, trained, ranks, **given, **values) is None
        lines = [json.loads(line) for line in (trained / "out.txt").read_text(encoding="utf-8").splitlines()]
        assert [line["prompt"] for line in lines] == prompts
        assert [line["prompt"] + line["completion"] for line in lines] == expected


def test_in_order() -> None:
    """As soon as can be, whatever ends first."""
    seen: list[str] = []
    come: list[int] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for number in (2, 0, 1, 4, 3, 5):
            come.append(number)
            yield number, str(number)

    for one in in_order(numbered()):
        seen.append(f"{one} after {len(come)}")
    assert seen == ["0 after 2", "1 after 3", "2 after 3", "3 after 5", "4 after 5", "5 after 6"]


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "a.jsonl": ('{"prompt": "x"}\n\n{"prompt": \n', "a.jsonl:3: not JSON (Expecting value at column "),
    "b.jsonl": ('{"prompt": 1}\n', 'b.jsonl:1: "prompt" is a number; make it a string'),
    "c.jsonl": ("[]", "c.jsonl:1: a list, not an object"),
    "d.txt": (" \n\n", "d.txt: holds no prompt; write one a line"),
    "e.txt": ("alpha\n" + "beta " * 50, "e.txt:2: "),
    "f.txt": (b"alpha\n\xff", "f.txt:2: not UTF-8 at byte 0; save the file as UTF-8"),
}


@pytest.mark.parametrize("name", [*BAD_FILES, "none.txt"])
def test_bad_files_of_prompts(pool: WorkerPool, trained: Path, tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES.get(name) or (None, "none.txt: can't be read (No such file or directory)")
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = generate(pool, trained, 1, prompt="", prompt_file=str(tmp_path / name))
    assert expected in line and "\n" not in line
    if name == "e.txt":
        assert "tokens, the model's context holds train.seq_length=8; shorten the prompt" in line


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def test_no_checkpoint(pool: WorkerPool, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    assert f"{copy}: holds no checkpoint" in generate(pool, copy, 2, **{"parallel.tp": 2})


def test_no_tokenizer(pool: WorkerPool, copy: Path) -> None:
    (copy / MODEL).unlink()
    assert f"{copy / MODEL}: missing" in generate(pool, copy)


def test_other_tokenizer(pool: WorkerPool, copy: Path, tmp_path: Path) -> None:
    texts = [make_text(seed + 50) for seed in range(8)]
    train_bpe(texts, 380, copy / MODEL)
    assert f"{copy / MODEL}: not the tokenizer of this checkpoint" in generate(pool, copy, 2, **{"parallel.pp": 2})
    train_bpe(texts, 410, copy / MODEL)
    assert open_tokenizer(copy / MODEL).vocab_size == 410
    assert "has 410 tokens, the run's model 403" in generate(pool, copy)


def test_out_that_can_not_be_written(pool: WorkerPool, trained: Path) -> None:
    """Only rank 0 writes; the other must not wait for it."""
    line = generate(pool, trained, 2, **{"parallel.tp": 2, "out": str(trained / "nothing" / "out.txt")})
    assert line.startswith("out=")
    assert "can't be written (No such file or directory)" in line


def test_checkpoint_of_another_model(pool: WorkerPool, trained: Path, copy: Path) -> None:
    other = resolve(changed(load_config(copy), {"model.ffn": 48}))
    (copy / "config.yaml").write_text(dump(other))
    assert "model.ffn=48: " in generate(pool, copy)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    for name, line in (("a.txt", "alpha"), ("a.jsonl", '{"prompt": "alpha"}')):
        (tmp_path / name).write_text(f"{line}\r\n{line}", encoding="utf-8-sig")
        assert [prompt.text for prompt in read_prompts(str(tmp_path / name))] == ["alpha", "alpha"]
