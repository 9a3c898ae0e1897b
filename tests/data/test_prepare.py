"""Preparing: once, the same for everyone, noticed when something changes, refused when something is wrong."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.indexed import IndexedTokens, write_indexed
from megapar.data.manifest import BLOCK, NUM_BLOCKS
from megapar.data.prepare import Prepared, check, open_prepared, prepare
from megapar.data.split import held_out, text_hash
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from tests.data.texts import make_text


def with_changes(config: DataConfig, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, **changes)


def cached(config: DataConfig) -> list[str]:
    return sorted(os.listdir(config.cache or ""))


def test_the_text_comes_back_document_by_document(prepared: Prepared, folder: Path) -> None:
    corpus = IndexedTokens(prepared.prefix)
    tokenizer = open_tokenizer(prepared.tokenizer_path or "")
    assert corpus.num_documents == prepared.documents == 40
    for number, path in enumerate(sorted(folder.iterdir())):
        document = corpus.document(number)
        assert document[-1] == tokenizer.end_of_text == prepared.manifest["end_of_text"]
        assert tokenizer.decode(document) == path.read_text(encoding="utf-8")


def test_what_the_manifest_says(prepared: Prepared, folder: Path) -> None:
    corpus = IndexedTokens(prepared.prefix)
    manifest = json.loads(Path(f"{prepared.prefix}.json").read_text())
    assert manifest == prepared.manifest
    assert (manifest["vocab_size"], manifest["dtype"], manifest["documents"]) == (400, "uint16", 40)
    assert manifest["tokens"] == corpus.num_tokens == prepared.tokens
    assert manifest["max_token"] == corpus.tokens.max() == prepared.max_token < 400
    assert manifest["source"]["name"] == "text"
    assert set(manifest["files"]) == {".bin", ".idx", ".model", ".split.npy"}
    assert str(folder.parent) not in json.dumps(manifest)


def test_it_is_made_once(config: DataConfig) -> None:
    lines: list[str] = []
    first = prepare(config, log=lines.append)
    assert len(lines) == 3
    before = os.stat(f"{first.prefix}.bin").st_mtime_ns
    assert prepare(config, log=lines.append) == first
    assert len(lines) == 3
    assert os.stat(f"{first.prefix}.bin").st_mtime_ns == before
    assert len(cached(config)) == 1


def test_the_tokenizer_sees_no_held_out_text(folder: Path, config: DataConfig) -> None:
    """Text that only held-out documents contain leaves no trace in the tokenizer."""
    paths = sorted(folder.iterdir())
    before = prepare(config)
    hashes = np.array([text_hash(path.read_text(encoding="utf-8")) for path in paths], dtype=np.uint64)
    held = [path for path, out in zip(paths, held_out(hashes, config.split), strict=True) if out]
    assert 0 < len(held) < len(paths)
    for path in held:
        number = 0
        while True:  # a text that is held out as well
            text = f"zqxj{number} " * 400
            if text_hash(text) < int(config.split * 2**64):
                break
            number += 1
        path.write_text(text)
    after = prepare(config)
    assert after.prefix != before.prefix
    assert Path(f"{after.prefix}.model").read_bytes() == Path(f"{before.prefix}.model").read_bytes()
    trained_on_all = prepare(with_changes(config, split=0.0))
    assert Path(f"{trained_on_all.prefix}.model").read_bytes() != Path(f"{before.prefix}.model").read_bytes()


def test_a_changed_file_is_noticed(folder: Path, config: DataConfig) -> None:
    first = prepare(config)
    path = folder / "005.txt"
    info = path.stat()
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-2] + "X\n", encoding="utf-8")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    second = prepare(config)
    assert second.prefix != first.prefix
    assert open_tokenizer(second.tokenizer_path or "").decode(IndexedTokens(second.prefix).document(5)).endswith("X\n")
    (folder / "new.txt").write_text(make_text(99))
    assert prepare(config).documents == 41


def test_other_settings_make_other_files(config: DataConfig) -> None:
    prefixes = {prepare(with_changes(config, **change)).prefix for change in ({}, {"vocab_size": 390}, {"split": 0.1})}
    assert len(prefixes) == 3


def test_a_given_model_is_used(config: DataConfig, tokenizer: Tokenizer) -> None:
    given = with_changes(config, tokenizer=str(tokenizer.path))
    prepared = prepare(given)
    assert Path(f"{prepared.prefix}.model").read_bytes() == tokenizer.path.read_bytes()
    assert prepared.vocab_size == tokenizer.vocab_size
    assert prepare(with_changes(given, vocab_size=7)).prefix == prepared.prefix  # not of its concern


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"path": "/nowhere/at/all"}, r"data\.path=/nowhere/at/all: no such file"),
        ({"tokenizer": "bpee"}, r"data\.tokenizer=bpee: must be bpe or the path"),
        ({"vocab_size": 50}, r"data\.vocab_size=50: .*at least \d+"),
        ({"vocab_size": 50_000}, r"data\.vocab_size=50000: .*at most \d+"),
        ({"split": 1.5}, r"data\.split=1\.5"),
        ({"prefix": "/nowhere/c"}, r"data\.prefix=/nowhere/c: no token files"),
        ({"cache": "/dev/null/x"}, r"data\.cache="),
    ],
)
def test_what_can_not_work_is_refused_and_leaves_nothing(
    config: DataConfig, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepare(with_changes(config, **changes))
    assert not os.path.exists(config.cache or "") or cached(config) == []


def prepare_in_process(config: DataConfig, queue: Any) -> None:
    queue.put(prepare(config).prefix)


def test_several_launchers_at_once(config: DataConfig) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=prepare_in_process, args=(config, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    prefixes = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(prefixes) == 1
    assert len(cached(config)) == 1
    check(prefixes.pop(), "full")


def test_another_launcher_was_faster(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files stand, ours go: whoever mapped them already keeps reading the same."""
    from megapar.data import prepare as module

    make = module.make_token_files
    others: list[int] = []

    def make_after_the_other(*arguments: Any) -> None:
        monkeypatch.setattr(module, "make_token_files", make)
        others.append(os.stat(f"{prepare(config).prefix}.bin").st_ino)
        make(*arguments)

    monkeypatch.setattr(module, "make_token_files", make_after_the_other)
    prepared = prepare(config)
    assert os.stat(f"{prepared.prefix}.bin").st_ino == others[0]
    assert len(cached(config)) == 1
    check(prepared.prefix, "full")


def test_damaged_files_in_the_cache_are_made_anew(config: DataConfig, flip: Callable[[str, int], None]) -> None:
    first = prepare(config)
    data = Path(f"{first.prefix}.bin").read_bytes()
    for damage in (lambda: flip(f"{first.prefix}.bin", 100), lambda: os.unlink(f"{first.prefix}.idx")):
        damage()
        lines: list[str] = []
        assert prepare(config, log=lines.append).prefix == first.prefix
        assert "made anew" in lines[0]
        assert Path(f"{first.prefix}.bin").read_bytes() == data
        assert len(cached(config)) == 1
    Path(f"{first.prefix}.json").write_text("{")
    assert prepare(config).prefix == first.prefix


def test_text_that_changes_meanwhile_is_refused(config: DataConfig, folder: Path) -> None:
    def meddle(line: str) -> None:
        if "trained" in line:
            (folder / "000.txt").write_text(make_text(77), encoding="utf-8")

    with pytest.raises(ConfigError, match=r"data\.path=.*changed while it was read"):
        prepare(config, log=meddle)
    assert cached(config) == []


def test_a_place_of_the_users_own(config: DataConfig, tmp_path: Path, folder: Path) -> None:
    prefix = str(tmp_path / "own" / "corpus")
    first = prepare(config, prefix=prefix)
    assert first.prefix == prefix
    assert sorted(os.listdir(tmp_path / "own")) == [
        f"corpus{end}" for end in (".bin", ".idx", ".json", ".model", ".split.npy")
    ]
    before = os.stat(f"{prefix}.bin").st_mtime_ns
    assert prepare(config, prefix=prefix) == first
    assert os.stat(f"{prefix}.bin").st_mtime_ns == before
    (folder / "new.txt").write_text(make_text(99))
    assert prepare(config, prefix=prefix).documents == 41
    assert prepare(with_changes(config, path=prefix)).documents == 41
    assert prepare(with_changes(config, prefix=prefix)).documents == 41
    with pytest.raises(ConfigError, match="token files already"):
        prepare(with_changes(config, path=prefix), prefix=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="without its ending"):
        prepare(with_changes(config, path=f"{prefix}.bin"))


def test_files_of_others_are_not_overwritten(config: DataConfig, tmp_path: Path) -> None:
    write_indexed(tmp_path / "c", [np.arange(10)], np.int32)
    with pytest.raises(ConfigError, match="not made by megapar"):
        prepare(config, prefix=str(tmp_path / "c"))
    (tmp_path / "d.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"d\.json: offset 0: not a manifest"):
        prepare(config, prefix=str(tmp_path / "d"))


# check: what lies there is what was prepared


def truncate(path: str, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("end", [".bin", ".idx", ".model", ".split.npy"])
@pytest.mark.parametrize("cut", [lambda size: size // 2, lambda size: size - 1, lambda size: 0])
def test_truncated_files_are_refused(prepared: Prepared, mode: Any, end: str, cut: Callable[[int], int]) -> None:
    path = f"{prepared.prefix}{end}"
    size = cut(os.path.getsize(path))
    truncate(path, size)
    with pytest.raises(UserError, match=rf"tokens{end}: offset {size}: "):
        check(prepared.prefix, mode)


@pytest.mark.parametrize("end", [".bin", ".idx", ".model", ".split.npy"])
def test_a_missing_file_is_refused(prepared: Prepared, end: str) -> None:
    os.unlink(f"{prepared.prefix}{end}")
    with pytest.raises(UserError, match=rf"tokens{end}: can't be read"):
        check(prepared.prefix)


@pytest.mark.parametrize("end", [".bin", ".idx", ".model", ".split.npy"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_in_a_small_file_the_quick_check_finds_every_bit(
    prepared: Prepared, flip: Callable[[str, int], None], end: str, share: float
) -> None:
    path = f"{prepared.prefix}{end}"
    flip(path, int(share * (os.path.getsize(path) - 1)))
    with pytest.raises(UserError, match=rf"tokens{end}: offset \d+"):
        check(prepared.prefix, "quick")


@pytest.fixture
def large(tmp_path: Path) -> Prepared:
    """Token files of 12 MB: three times as many blocks as the quick check looks at."""
    rng = np.random.default_rng(0)
    write_indexed(tmp_path / "c", [rng.integers(0, 900, size=6_000_000, dtype=np.uint16)], np.uint16)
    return prepare(DataConfig(path=str(tmp_path / "c")))


def test_a_flipped_bit_is_found_where_the_quick_check_looks_and_everywhere_by_the_full_one(
    large: Prepared, flip: Callable[[str, int], None]
) -> None:
    path = f"{large.prefix}.bin"
    sampled = [offset for offset, _ in large.manifest["files"][".bin"]["blocks"]]
    others = sorted(set(range(0, os.path.getsize(path), BLOCK)) - set(sampled))
    assert len(sampled) == NUM_BLOCKS < len(others)
    for block, quick_finds in [(sampled[0], True), (sampled[31], True), (sampled[-1], True), (others[7], False)]:
        flip(path, block + 1234)
        if quick_finds:
            with pytest.raises(UserError, match=rf"c\.bin: offset {block}: "):
                check(large.prefix, "quick")
        else:
            check(large.prefix, "quick")
            with pytest.raises(
                UserError, match=r"c\.bin: offset \d+: the first change lies between there and \d+"
            ) as caught:
                check(large.prefix, "full")
            low, high = (int(word.strip(":")) for word in str(caught.value).split() if word.strip(":").isdigit())
            assert low <= block + 1234 < high <= low + os.path.getsize(path) // 32
        flip(path, block + 1234)
    check(large.prefix, "full")


def test_files_of_two_corpora_are_not_mixed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        write_indexed(tmp_path / name, [rng.integers(0, 900, size=1000)], np.uint16)
    a = prepare(DataConfig(path=str(tmp_path / "a")))
    os.replace(tmp_path / "b.bin", tmp_path / "a.bin")  # same size, same index
    with pytest.raises(UserError, match=r"a\.bin: offset 0: .*of another corpus"):
        check(a.prefix)
    write_indexed(tmp_path / "a", [rng.integers(0, 900, size=999)], np.uint16)
    with pytest.raises(UserError, match=r"a\.idx: offset 17: tokens 999, the manifest says 1000"):
        check(a.prefix)
    write_indexed(tmp_path / "a", [rng.integers(0, 900, size=1000)], np.int16)
    with pytest.raises(UserError, match=r"a\.idx: offset 17: dtype int16, the manifest says uint16"):
        check(a.prefix)


def edit_manifest(prefix: str, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    change(manifest)
    Path(f"{prefix}.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.pop("format"), "offset 0: not a manifest"),
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.pop("tokens"), "'tokens'"),
        (lambda m: m.update(max_token="7"), "'max_token'"),
        (lambda m: m["files"].pop(".idx"), "'files'"),
        (lambda m: m["files"].update({"/../secret": {}}), "'files'"),
        (lambda m: m["files"][".bin"].pop("blocks"), r"record of \.bin is incomplete"),
    ],
)
def test_a_damaged_manifest_is_refused(
    prepared: Prepared, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    edit_manifest(prepared.prefix, change)
    for use in (check, open_prepared):
        with pytest.raises(UserError, match=rf"tokens\.json: .*{problem}"):
            use(prepared.prefix)


def test_ids_outside_the_vocabulary_are_refused(prepared: Prepared) -> None:
    edit_manifest(prepared.prefix, lambda manifest: manifest.update(vocab_size=300))
    with pytest.raises(UserError, match=r"tokens\.bin: offset \d+: token id \d+; ids must lie in 0\.\.299"):
        check(prepared.prefix)


def test_without_a_manifest_nothing_is_checked(tmp_path: Path) -> None:
    write_indexed(tmp_path / "c", [np.arange(10)], np.int32)
    for use in (check, open_prepared):
        with pytest.raises(UserError, match=r"c\.json: no such file; `megapar data"):
            use(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"data\.verify=fast"):
        check(tmp_path / "c", "fast")  # type: ignore[arg-type]


def test_nothing_here_imports_torch_or_an_unused_tokenizer() -> None:
    modules = "corpus indexed manifest prepare samples split tokenise tokenizer"
    imports = "; ".join(f"import megapar.data.{name}" for name in modules.split())
    libraries = ("torch", "sentencepiece", "tokenizers", "jinja2")
    code = f"import sys; {imports}; print([name for name in {libraries} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def run_with_little_room(*arguments: str, size: int) -> "subprocess.CompletedProcess[str]":
    """`megapar data` where no file may grow beyond `size` bytes, which fails as on a full disk."""
    code = "import resource, sys; from megapar.cli import main\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk_is_one_line(config: DataConfig, folder: Path, tmp_path: Path, tokens: str) -> None:
    text = [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}", "data.vocab_size=400"]
    for place in ([], [f"out={tmp_path / 'mine'}"]):
        done = run_with_little_room(*text, *place, size=1000)
        said = [line for line in done.stderr.splitlines() if not line.startswith("data: ")]
        assert (done.returncode, len(said)) == (2, 1), done.stderr
        assert str(tmp_path) in said[0] and "can't be written (File too large); make room" in said[0]
    assert list((tmp_path / "cache").iterdir()) == []
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for end in (".bin", ".idx"):
        (foreign / f"tokens{end}").write_bytes(Path(f"{tokens}{end}").read_bytes())
    done = run_with_little_room(f"data.path={foreign / 'tokens'}", size=100)
    assert done.returncode == 2 and "make room" in done.stderr.splitlines()[-1], done.stderr
