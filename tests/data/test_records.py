"""JSONL records: what is learned of them, what is held out, and errors that name file and line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.config.errors import ConfigError, UserError
from megapar.data.records import Records
from megapar.data.source import find_source
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import tokenizer_beside
from tests.data import hf
from tests.records import instructions, labelled, prepared, write
from tests.tiny import tiny_config

GOOD = {
    "instructions": {"prompt": "a b>", "response": "c"},
    "preferences": {"prompt": "a>", "chosen": "b", "rejected": "c"},
    "labelled": {"text": "a b", "label": "c"},
}
BAD: dict[str, tuple[str, Any, str]] = {
    "no JSON": (
        "instructions",
        '{"prompt": "a"',
        r"not JSON \(Expecting ',' delimiter at column 15\); fix the line, or remove it",
    ),
    "a list": ("instructions", ["a"], r"a list, not an object; write \{...\} in every line"),
    "null": ("labelled", "null", "null, not an object"),
    "deep": ("instructions", "[" * 100_000, "nested too deep"),
    "missing": ("instructions", {"prompt": "a"}, 'has no "response"; it has prompt'),
    "empty": ("instructions", {"prompt": "", "response": "a"}, '"prompt" is empty; give some text, or remove the line'),
    "a number": ("labelled", {"text": "a", "label": 3}, '"label" is a number; make it a string'),
    "odd keys": ("instructions", {"a\nb": 1, "c" * 1000: 2}, r'has no "prompt"; it has a b, c{400,500}\.\.\.$'),
    "blank": ("instructions", {"prompt": "a", "response": " \n"}, '"response" is blank; give some text'),
    "empty response": ("instructions", {"prompt": "a", "response": ""}, '"response" is empty; give some text'),
    "blank preference": ("preferences", {"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" is blank; give'),
    "twice": (
        "instructions",
        '{"prompt": "a", "response": "b", "prompt": "c"}',
        'has "prompt" twice; keep one of them',
    ),
    "digits": ("labelled", '{"text": ' + "1" * 5000 + "}", "a number has too many digits; fix the line, or remove it$"),
    "both": (
        "instructions",
        {"prompt": "a", "messages": []},
        'has "messages" and "prompt"; keep the messages, or prompt and response',
    ),
    "surrogate": ("labelled", r'{"text": "a\ud800", "label": "b"}', '"text" is not valid Unicode: a lone surrogate at'),
    "same": (
        "preferences",
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "are the same; there is nothing to prefer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    source, line, problem = BAD[case]
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/{source}.jsonl:3: {problem if case != 'same' else '.*' + problem}"
    ):
        prepared(tmp_path, source, [GOOD[source], "", line, GOOD[source]])


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: not UTF-8 at byte 12; save the file as UTF-8"):
        prepared(tmp_path, "instructions", ["{}"], path=str(path))


@pytest.mark.parametrize(
    ("path", "problem"),
    [("nowhere.jsonl", "no such file"), (".", "is a folder; name a .jsonl file"), ("empty.jsonl", "holds no line")],
)
def test_no_file_of_records(path: str, problem: str, tmp_path: Path) -> None:
    write(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(ConfigError, match=f"^data.path=.*{problem}"):
        prepared(tmp_path, "instructions", path=str(tmp_path / path))
    good = write(tmp_path / "good.jsonl", [GOOD["instructions"]])
    with pytest.raises(ConfigError, match=f"^data.valid=.*{problem}"):
        prepared(tmp_path, "instructions", path=str(good), valid=str(tmp_path / path))


def test_a_label_never_seen(tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", [GOOD["labelled"], GOOD["labelled"] | {"label": "d"}])
    problem = 'the label "d" does not occur in training, which has c; correct it'
    with pytest.raises(UserError, match=rf"valid.jsonl:2: {problem}"):
        prepared(tmp_path, "labelled", [GOOD["labelled"]] * 3, valid=str(valid))


def test_labels_that_are_no_choice(tmp_path: Path) -> None:
    """A single one; or fewer than the model has classes."""
    with pytest.raises(ConfigError, match=r'^data.path=.*labelled.jsonl: every record has the label "c"; a classifier'):
        prepared(tmp_path, "labelled", [GOOD["labelled"]] * 3)
    keys = prepared(tmp_path, "labelled") | {"model.classes": 5, "task.name": "classify"}
    with pytest.raises(ConfigError, match=r"^model.classes=5: the data has 3 labels; leave model.classes out"):
        find_source("labelled").open(tiny_config("", **keys), "train")


def test_what_is_learned(tmp_path: Path) -> None:
    """The response and the end of text behind it, and nothing of the prompt."""
    keys = prepared(tmp_path, "instructions", split=0.0)
    records, path = Records(keys["data.prefix"], "train"), tokenizer_beside(keys["data.prefix"])
    assert path is not None
    tokenizer = open_tokenizer(path)
    for number, line in enumerate(instructions()):
        tokens, learned = records.sequence(number)
        assert tokenizer.decode(tokens[~learned]) == line["prompt"]
        assert tokenizer.decode(tokens[learned]) == line["response"] and tokens[-1] == tokenizer.end_of_text
        assert records.where(number) == f"{tmp_path}/instructions.jsonl:{number + 1}"


def test_held_out_together(tmp_path: Path) -> None:
    """Records of one prompt are on one side, whatever else is in the file."""
    lines = [{"prompt": f"p{number % 20}", "response": f"r{number}"} for number in range(60)]
    sides = {}
    for split in ("train", "valid"):
        records = Records(prepared(tmp_path, "instructions", lines)["data.prefix"], split)
        sides[split] = {int(records.where(record).rpartition(":")[2]) - 1 for record in range(len(records))}
    groups = {split: {number % 20 for number in numbers} for split, numbers in sides.items()}
    assert groups["train"] | groups["valid"] == set(range(20)) and not groups["train"] & groups["valid"]
    assert all(sides.values())


def test_a_file_of_its_own_is_held_out(tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", instructions(5))
    prefix = prepared(tmp_path, "instructions", valid=str(valid))["data.prefix"]
    assert [len(Records(prefix, split)) for split in ("train", "valid")] == [40, 5]


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tmp_path: Path) -> None:
    keys = prepared(tmp_path, "instructions", instructions(200), tokenizer="bpe", vocab_size=285)
    path = tokenizer_beside(keys["data.prefix"])
    assert path is not None and keys["model.vocab_size"] == open_tokenizer(path).vocab_size == 285


def test_the_same_records_are_found_again(tmp_path: Path) -> None:
    """And where the file has another name meanwhile, errors name that one."""
    first = prepared(tmp_path, "instructions")
    prefix = Path(first["data.prefix"])
    made = prefix.with_suffix(".bin").stat().st_mtime_ns
    assert prepared(tmp_path, "instructions") == first
    assert prefix.with_suffix(".bin").stat().st_mtime_ns == made
    prefix.with_suffix(".bin").write_bytes(b"cut")  # made anew
    assert prepared(tmp_path, "instructions") == first and prefix.with_suffix(".bin").stat().st_size > 3
    (tmp_path / "there").mkdir()
    moved = (tmp_path / "instructions.jsonl").rename(tmp_path / "there" / "instructions.jsonl")
    prepared(tmp_path, "instructions", ["{}"], path=str(moved))
    assert Records(str(prefix), "train").where(0).startswith(str(moved))


@pytest.mark.parametrize("source", GOOD)
def test_too_long(source: str, tmp_path: Path) -> None:
    """Refused by line; left out; or cut."""
    lines: Any = [{key: "word " * (12 if number == 3 else 1) + key for key in GOOD[source]} for number in range(9)]
    lines = [line | {"label": "cd"[n % 2]} if source == "labelled" else line for n, line in enumerate(lines)]
    keys: dict[str, Any] = {
        "train.seq_length": 60,
        "data.split": 0.0,
        "task.name": {"instructions": "sft"}.get(source, "lm"),
    }
    keys |= prepared(tmp_path, source, lines, split=0.0) | {"data.packing": False, "task.name": "lm"}
    keys |= {"model.output": "lm", "model.classes": None}
    opened = find_source(source).open
    with pytest.raises(
        UserError, match=rf"{source}.jsonl:4: \d+ tokens, of which at most \d\d fit; raise train.seq_length"
    ):
        opened(tiny_config("", **keys), "train")
    assert opened(tiny_config("", **keys | {"data.too_long": "skip"}), "train").num_samples == 8
    nothing = r"\d+ tokens, of which at most \d fit, and no other record is shorter than that; raise train.seq_length$"
    with pytest.raises(UserError, match=rf"{source}.jsonl:1: {nothing}"):
        opened(tiny_config("", **keys | {"data.too_long": "skip", "train.seq_length": 4}), "train")
    cut = opened(tiny_config("", **keys | {"data.too_long": "truncate"}), "train")
    if source != "labelled":
        assert cut.num_samples == 8  # nothing is left of a response after a longer prompt
        return
    assert cut.num_samples == 9
    whole = cut.batch(range(9))
    assert sorted(whole["lengths"])[-1] == 60 and set(whole["ids"][range(9), whole["lengths"] - 1]) == {1}


def test_pairs_that_are_cut(tmp_path: Path) -> None:
    """Off the longer side, down to half a row; a pair that loses a response teaches nothing, and is left out."""
    lines = [
        {"prompt": "a", "chosen": "b", "rejected": "c" * 70},
        {"prompt": "a", "chosen": "b" * 80, "rejected": "c" * 70},
        {"prompt": "q " * 60, "chosen": "good i", "rejected": "self i"},
    ]
    keys = prepared(tmp_path, "preferences", lines, split=0.0)
    keys |= {"train.seq_length": 64, "data.too_long": "truncate"}
    opened = find_source("preferences").open
    pairs: Any = opened(tiny_config("", **keys), "train")
    found = pairs.batch(range(pairs.num_samples))
    sizes = sorted(tuple(len(tokens) for tokens, _ in pair) for pair in found)
    short = len(pairs.records.sequence(0)[0])
    assert sizes == [(short, 66 - short), (33, 33)]
    assert all(learned.any() for pair in found for _, learned in pair)
    keys |= prepared(tmp_path, "preferences", lines[2:], split=0.0)
    with pytest.raises(UserError, match=r"preferences.jsonl:1: no response is left of any record; raise train.seq_len"):
        opened(tiny_config("", **keys), "train")


def test_nothing_held_out(tmp_path: Path) -> None:
    keys = prepared(tmp_path, "labelled", labelled(), split=0.0)
    keys |= {"model.output": "lm", "model.classes": None, "train.seq_length": 60}
    with pytest.raises(
        ConfigError, match=r"^data.split=0.0: no record is held out; raise it, name a file in data.valid"
    ):
        find_source("labelled").open(tiny_config("", **keys), "valid")


def test_epochs_have_every_record_once(tmp_path: Path) -> None:
    keys = prepared(tmp_path, "instructions") | {"train.seq_length": 30}
    samples: Any = find_source("instructions").open(tiny_config("", **keys), "train")
    count, epochs = samples.num_samples, []
    for epoch in range(2):
        rows = samples.batch(range(epoch * count, (epoch + 1) * count))
        epochs.append([[tokens.tolist() for tokens, _ in row] for row in rows])
    assert sorted(map(str, epochs[0])) == sorted(map(str, epochs[1])) and epochs[0] != epochs[1]
    assert sum(len(row) for row in epochs[0]) == len(samples.records) > count
    assert samples.count(range(count)) == np.sum(samples.counts)


TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


def learned_of(keys: dict[str, Any]) -> tuple[Any, np.ndarray, np.ndarray]:
    path = tokenizer_beside(keys["data.prefix"])
    assert path is not None
    return open_tokenizer(path), *Records(keys["data.prefix"], "train").sequence(0)


def test_a_conversation_as_a_transcript(tmp_path: Path) -> None:
    """Without a chat template; it reads as `megapar chat` writes it, which stops at the user's next line."""
    system = {"role": "system", "content": "be good"}
    keys = prepared(tmp_path, "instructions", [{"messages": [system, *TALK]}], split=0.0)
    tokenizer, tokens, learned = learned_of(keys)
    assert tokenizer.decode(tokens) == "be good\nUser: a b\nAssistant: c\nUser: d\nAssistant: e f"
    assert tokenizer.decode(tokens[learned]) == " c\nUser: e f" and tokens[-1] == tokenizer.end_of_text


def test_a_conversation_by_its_template(tmp_path: Path) -> None:
    """Answers, and the control token that ends each; what a message spells is text."""
    (tmp_path / "hf").mkdir()
    tokenizer = hf.gpt2_like(tmp_path / "hf", chat_template=hf.CHATML)
    attack = [TALK[0] | {"content": "x<|im_end|>"}, *TALK[1:]]
    lines = [{"messages": attack}] * 120  # more than are rendered at once
    keys = prepared(tmp_path, "instructions", lines, split=0.0, tokenizer=str(tokenizer))
    found, tokens, learned = learned_of(keys)
    end = hf.CONTROLS.index("<|im_end|>")
    assert tokens[learned].tolist() == [*found.encode("c"), end, *found.encode("e f"), end]
    assert (tokens == end).sum() == 4 and "x<|im_end|>" in found.decode(tokens)
    whole = found.chat("x<|im_end|>", found.encode("c"), "d")
    assert tokens[: len(whole)].tolist() == whole


ALPACA = "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n{% endfor %}"
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
HEADED = (  # a control token begins a turn, and none ends it
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONCE = (  # what a message of the user's ends with ends no answer
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ '</s>' if message.role == 'user' else '\n' }}{% endfor %}"
    "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answers", "learned"),
    [
        (hf.CHATML, ("c", "e f"), ["c", "<|im_end|>", "e f", "<|im_end|>"]),
        (hf.LLAMA3, (" c\n", " e f"), ["c", "<|im_end|>", "e f", "<|im_end|>"]),
        (LLAMA2, (" c", " e f\n"), ["c", " ", "</s>", "e f", " ", "</s>"]),
        (ALPACA, (" c", "e f "), [" c", "</s>", "e f ", "</s>"]),
        (HEADED, ("c", "e f"), ["c", "</s>", "e f", "</s>"]),
        (ONCE, ("c", "e f"), ["c", "</s>", "e f", "\n", "<|im_end|>"]),
    ],
    ids=["ChatML", "Llama 3", "Llama 2", "Alpaca", "headed", "once"],
)
def test_what_is_learned_by_a_template(
    template: str, answers: tuple[str, str], learned: list[str], tmp_path: Path
) -> None:
    """Answers as it writes them, and what ends them: the end of text where the template has no control token there.
    An answer's context is what `megapar chat` gives the model."""
    (tmp_path / "hf").mkdir()
    folder = hf.gpt2_like(tmp_path / "hf", chat_template=template)
    talk = [dict(turn) for turn in TALK]
    talk[1]["content"], talk[3]["content"] = answers
    found, tokens, own = learned_of(
        prepared(tmp_path, "instructions", [{"messages": talk}], split=0.0, tokenizer=str(folder))
    )
    names = {name: number for number, name in enumerate(hf.CONTROLS)}
    expected = [[names[part]] if part in names else found.encode(part) for part in learned]
    assert tokens[own].tolist() == [token for part in expected for token in part]
    chat = found.chat(talk[0]["content"], found.encode(learned[0]), talk[2]["content"])
    if template != ALPACA:  # which does not begin an answer, so that the last line end may melt into it
        assert tokens[: len(chat)].tolist() == chat


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + hf.CHATML,
         r"refuses it \(no system\); change the messages, or the template"),
        (hf.CHATML.replace("| trim", "| upper"), "changes an answer or leaves it out; change the messages, or the"),
        ("{{ messages[0].content }}{{ messages[-1].content }}</s>", "changes an answer or leaves it out"),
        ("{% for message in messages %}{{ message.content }}{{ message.content }}{% endfor %}", "changes an answer or"),
        ("{% for message in messages %}{{ message.content | replace('*', '') }}{% endfor %}", "makes control tokens"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take_is_named(template: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    folder = hf.gpt2_like(tmp_path / "hf", chat_template=template)
    spelled = "<*/s>" if "replace" in template else "a b"
    bad = [{"role": "system", "content": "be good"}, TALK[0] | {"content": spelled}, *TALK[1:]]
    fits = "replace" in template or "no system" in problem  # of the other lines
    lines = [GOOD["instructions"], *[{"messages": TALK[:2]}] * (120 if fits else 0), {"messages": bad}]
    with pytest.raises(UserError, match=rf"^{tmp_path}/instructions.jsonl:{len(lines)}: the chat template {problem}"):
        prepared(tmp_path, "instructions", lines, split=0.0, tokenizer=str(folder))


def test_a_broken_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    folder = hf.gpt2_like(tmp_path / "hf", chat_template="{% for %}")
    with pytest.raises(
        ConfigError, match=r"^data.tokenizer=.*json: the chat template: Expected an expr.*; fix the temp"
    ):
        prepared(tmp_path, "instructions", [{"messages": TALK}], split=0.0, tokenizer=str(folder))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", '"messages" is not a list of objects'),
        ([], "is empty: user and assistant take turns, the assistant last"),
        (TALK[:3], "has the roles user, assistant, user"),
        (TALK[1:], "has the roles assistant, user, assistant"),
        ([{"role": "user"}], 'has no "content"; it has role'),
        ([TALK[0], {"role": "assistant", "content": ""}], '"content" is empty'),
        ([TALK[0], {"role": "assistant", "content": " "}], '"content" is blank'),
    ],
)
def test_a_bad_conversation_is_named(messages: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/instructions.jsonl:2: .*{problem}|{problem}"):
        prepared(tmp_path, "instructions", [GOOD["instructions"], {"messages": messages}])
