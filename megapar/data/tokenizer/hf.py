"""Hugging Face's `tokenizer.json`, by the library `tokenizers`, with the special tokens and chat template beside it."""

import json
import re
import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from megapar.config.errors import ConfigError, UserError
from megapar.data.tokenizer.chat import TemplateError, render
from megapar.data.tokenizer.contract import (
    PROBE,
    SPACE_MARK,
    Message,
    Piece,
    RefusedConversation,
    Tokenizer,
    check_unicode,
    encode_around_marks,
    refused,
)
from megapar.data.tokenizer.files import JSON, files_of
from megapar.data.tokenizer.pieces import token_bytes

CONFIG, SPECIAL, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
CONTROLS = ("bos_token", "eos_token", "sep_token", "pad_token", "cls_token", "mask_token")


ROLES = ("user", "assistant")
AT_ONCE = 100  # conversations that a process renders, which has little time


class _MakesControls(TemplateError):
    problem = "the template makes control tokens of it"


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, whose control tokens are written only by `end_of_text` and by a chat template.

    Control tokens are the file's special tokens, but for the one for unknown text, and those that the files beside it
    name (eos_token and so on). Text that spells one is encoded as any other text. Truncation and padding are off, and
    no token is put around a text. Raises ConfigError where a file can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._files = path, files_of(path)
        self._settings = {name: _object(self._files[name]) for name in (CONFIG, SPECIAL) if name in self._files}
        self._names = self._special_tokens()
        spec = _without_traps(_described(path))
        try:
            self._model: Any = tokenizers.Tokenizer.from_str(json.dumps(spec))
            vocabulary = self._model.get_vocab(with_added_tokens=True)
            if not vocabulary:
                raise ValueError("it has no tokens")
            self.vocab_size = max(vocabulary.values()) + 1
        except Exception as error:  # the library raises no narrower one
            problem = f"tokenizers {tokenizers.__version__} can't read it ({_line(error)}); give another {JSON}"
            raise refused(path, problem) from None
        self._model.encode_special_tokens = True  # as text
        unknown = _unknown(spec["model"])
        named = {self._names[name] for name in CONTROLS if name in self._names}
        special = {token["content"] for token in spec["added_tokens"] if token["special"]} - {unknown}
        self._controls = {content: vocabulary[content] for content in sorted(special | named) if content in vocabulary}
        # An unknown character is no control token, though the same token may be named as that of padding.
        self._never = {token for content, token in self._controls.items() if content != unknown}
        self._bytes = token_bytes(spec, vocabulary, set(self._controls.values()))
        self._mark: list[int] = []
        if self._bytes is not None and f"<0x{SPACE_MARK.encode()[0]:X}>" in vocabulary:
            self._mark = [vocabulary[f"<0x{byte:02X}>"] for byte in SPACE_MARK.encode()]
        added = [token["content"] for token in spec["added_tokens"]]
        probes = [PROBE, "", "a", " a", "a ", *(f"{content}  {content}a" for content in added)]
        if self._bytes is not None and [self.decode(ids) for ids in self.encode_batch(probes)] != probes:
            self._bytes, self._mark = None, []

    def _special_tokens(self) -> dict[str, str]:
        """Text of bos_token and so on, and of unk_token, where the files beside the main one name them."""
        found = {}
        for settings in (self._settings.get(SPECIAL, {}), self._settings.get(CONFIG, {})):
            for name in (*CONTROLS, "unk_token"):
                value = settings.get(name)
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str) and content:
                    found[name] = content
        return found

    @property
    def end_of_text(self) -> int:
        name = next((name for name in ("eos_token", "sep_token") if name in self._names), None)
        if name is None:
            problem = f'nothing beside it names the token that separates documents; write {CONFIG} with {{"eos_token": '
            raise refused(self.path, problem + '"..."}')
        if (token := self._model.token_to_id(self._names[name])) is None:
            raise refused(
                self.path, f"has no {self._names[name]!r}, which is the {name} beside it; name a token that it has"
            )
        return int(token)

    @property
    def classified(self) -> tuple[list[int], list[int]]:
        if "cls_token" not in self._names:
            return super().classified
        first, last = (self._named(name) for name in ("cls_token", "sep_token"))
        return [token for token in [first] if token is not None], [token for token in [last] if token is not None]

    @property
    def mask(self) -> int | None:
        return self._named("mask_token")

    def _named(self, name: str) -> int | None:
        """Id of a special token by its role."""
        content = self._names.get(name)
        return None if content is None else self._model.token_to_id(content)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_unicode(text)
        plain = [text for text in texts if not (self._mark and SPACE_MARK in text)]
        encoded = iter(self._encodings(self._model.encode_batch_fast, plain))
        return [
            encode_around_marks(text, self.encode, self._mark)
            if self._mark and SPACE_MARK in text
            else self._without_controls(text, next(encoded).ids)
            for text in texts
        ]

    def _encodings(self, encode: Any, texts: list[str]) -> list[Any]:
        """The library's encodings, by one of its methods. Raises ConfigError where the file lets it stumble."""
        try:
            found: list[Any] = encode(texts, add_special_tokens=False)
            return found
        except Exception as error:  # the library raises no narrower one
            raise refused(self.path, f"can't encode a text ({_line(error)}); give another {JSON}") from None

    def _without_controls(self, text: str, ids: list[int]) -> list[int]:
        """The ids of `text`, in smaller pieces where a model such as Unigram finds a control token's text in it."""
        if self._never.isdisjoint(ids):
            return ids
        [encoding] = self._encodings(self._model.encode_batch, [text])
        found = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [begin + 1 for token, (begin, _) in found if token in self._never]
        parts = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
        if not all(parts):
            token = next(content for content, token in self._controls.items() if token in ids)
            raise UserError(f"{self.path}: text with {token!r} can't be told from that control token; remove it there")
        return [token for part in parts for token in self.encode(part)]

    def _text(self, tokens: list[int]) -> str:
        if self._bytes is not None:
            return super()._text(tokens)
        controls = set(self._controls.values())
        text: str = self._model.decode([token for token in tokens if token not in controls], skip_special_tokens=False)
        return text

    def chat(self, prompt: str, *more: str | Sequence[int]) -> list[int]:
        """See `Tokenizer.chat`. A message makes no control token, whatever it spells.

        For that its control tokens' texts pass through the template under other names, and so do answers. Where a
        template builds one all the same, as by removing letters from the prompt, it is refused.
        """
        turns = [(ROLES[number % 2], turn) for number, turn in enumerate((prompt, *more))]
        try:
            [parts] = self._rendered([turns], answer=True)
            if more:  # as in training
                [before] = self._rendered([turns[:-1]], answer=False)
                parts = self._with_ends(parts, self._ending(before))
        except _MakesControls:
            raise ConfigError("prompt", ascii(prompt), f"{_MakesControls.problem}; write it another way") from None
        except TemplateError as error:
            problem = f"the chat template: {error.problem}; fix the template, or leave chat out"
            raise ConfigError("chat", True, problem) from None
        return [token for ids, _ in parts for token in ids]

    def conversations(self, given: Sequence[Sequence[Message]]) -> list[list[Piece]]:
        if not self.has_template:
            return super().conversations(given)
        found: list[list[Piece]] = []
        for first in range(0, len(given), AT_ONCE):
            batch = given[first : first + AT_ONCE]
            try:
                found += self._learnable(batch)
            except TemplateError as error:
                if error.number is None:
                    raise refused(self.path, f"the chat template: {error.problem}; fix the template") from None
                makes = isinstance(error, _MakesControls)
                why = "makes control tokens of it" if makes else f"refuses it ({error.problem})"
                problem = f"the chat template {why}; change the messages, or the template"
                raise RefusedConversation(first + error.number % len(batch), problem) from None
            except RefusedConversation as error:
                raise RefusedConversation(first + error.number, error.problem) from None
        return found

    def _learnable(self, given: Sequence[Sequence[Message]]) -> list[list[Piece]]:
        """See `Tokenizer.conversations`; numbers in errors may count the conversations more than once around."""
        answers = iter(self.encode_batch([answer for one in self._written(given) for answer in one]))
        turns = [[(role, next(answers) if role == "assistant" else text) for role, text in one] for one in given]
        return [self._with_ends(parts, self._ending(parts)) for parts in self._rendered(turns, answer=False)]

    def _written(self, given: Sequence[Sequence[Message]]) -> list[list[str]]:
        """The answers of each conversation as the template writes them, which may trim them. Raises
        RefusedConversation where it writes something else, or does not write each once."""
        nonce = str(uuid.uuid4().int)
        marked = [[(role, f"{nonce}:" if role == "assistant" else text) for role, text in one] for one in given]
        texts = self._by_template([*given, *marked], answer=False)
        found = []
        for number, (one, text) in enumerate(zip(given, texts, strict=False)):
            before, *between = texts[len(given) + number].split(f"{nonce}:")
            answers = [content for role, content in one if role == "assistant"]
            at, written = len(before), []
            for answer, behind in zip(answers, between, strict=False):
                shape = next((shape for shape in _trimmed(answer) if text.startswith(shape + behind, at)), None)
                if shape is None:
                    break
                written.append(shape)
                at += len(shape + behind)
            if not text.startswith(before) or len(written) != len(answers) or at != len(text):
                problem = "the chat template changes an answer or leaves it out; change the messages, or the template"
                raise RefusedConversation(number, problem)
            found.append(written)
        return found

    def _ending(self, parts: Sequence[Piece]) -> list[int]:
        """What a template writes behind the last answer, up to its first control token; nothing where it has none."""
        last = max((number for number, (_, answer) in enumerate(parts) if answer), default=-1)
        behind = parts[last + 1][0]
        return next((behind[: at + 1] for at, token in enumerate(behind) if token in self._never), [])

    def _with_ends(self, parts: Sequence[Piece], ending: list[int]) -> list[Piece]:
        """With the ending as a part of every answer that it stands behind; the others get an end-of-text token."""
        found: list[Piece] = []
        for ids, answer in parts:
            if found and found[-1][1]:
                ends = bool(ending) and ids[: len(ending)] == ending
                found[-1] = ([*found[-1][0], *(ending if ends else [self.end_of_text])], True)
                ids = ids[len(ending) :] if ends else ids
            found.append((ids, answer))
        return found

    def _rendered(
        self, given: Sequence[Sequence[tuple[str, str | Sequence[int]]]], *, answer: bool
    ) -> list[list[Piece]]:
        """Conversations of (role, text, or token ids of an answer) as the template writes them: token ids, and whether
        they are an answer's. Raises _MakesControls, and what `render` does."""
        nonce = str(uuid.uuid4().int)  # digits: no filter of a template changes them
        contents = sorted(self._controls, key=len, reverse=True)
        spelled = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        pieces: list[Sequence[int]] = [self.encode(content) for content in contents]

        def hidden(turn: str | Sequence[int]) -> str:
            if isinstance(turn, str):
                check_unicode(turn)
                return spelled.sub(lambda found: f"{nonce}:{contents.index(found[0])}:", turn)
            pieces.append(turn)
            return f"{nonce}:{len(pieces) - 1}:"

        said = [[(role, hidden(turn)) for role, turn in turns] for turns in given]
        plain = [[(role, "x") for role, _ in turns] for turns in given]
        texts = [re.split(f"{nonce}:([0-9]+):", text) for text in self._by_template([*said, *plain], answer)]
        found = []
        for number, (whole, alone) in enumerate(zip(texts[: len(given)], texts[len(given) :], strict=True)):
            parts: list[Piece] = []
            for place, part in enumerate(whole):
                ids = list(pieces[int(part)]) if place % 2 else self._with_controls(part)
                parts.append((ids, bool(place % 2) and int(part) >= len(contents)))
            expected = [token for token in self._with_controls(alone[0]) if token in self._never]
            if [token for ids, _ in parts for token in ids if token in self._never] != expected:
                raise _MakesControls(_MakesControls.problem, number)
            found.append(parts)
        return found

    def _by_template(self, conversations: Sequence[Sequence[tuple[str, str]]], answer: bool) -> list[str]:
        if (template := self._template()) is None:
            problem = f"{self.path} has no chat template; leave it out, or put {TEMPLATE} beside it"
            raise ConfigError("chat", True, problem)
        return render(template, conversations, self._names, answer=answer)

    @property
    def has_template(self) -> bool:
        return self._template() is not None

    @property
    def answer_ends(self) -> frozenset[int]:
        return frozenset(self._never) if self.has_template else frozenset()

    def _with_controls(self, text: str) -> list[int]:
        def encode(part: str) -> list[int]:
            [encoding] = self._encodings(self._model.encode_batch_fast, [part])
            ids: list[int] = encoding.ids
            return ids

        self._model.encode_special_tokens = False
        try:
            return encode_around_marks(text, encode, self._mark) if self._mark else encode(text)
        finally:
            self._model.encode_special_tokens = True

    def _template(self) -> str | None:
        """The chat template: a file of its own, or in the configuration."""
        if TEMPLATE in self._files:
            return _read(self._files[TEMPLATE]).decode("utf-8", errors="replace")
        template = self._settings.get(CONFIG, {}).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


def _trimmed(text: str) -> list[str]:
    """A text as templates may write it: as it is, or without white space, or line ends, at its sides."""
    return [text, *(trim(text, which) for which in (None, "\n") for trim in (str.strip, str.lstrip, str.rstrip))]


def _unknown(model: dict[str, Any]) -> str | None:
    """Text of the token for what the vocabulary can't write."""
    if model.get("unk_id") is not None:  # Unigram's
        content: str = model["vocab"][model["unk_id"]][0]
        return content
    return model.get("unk_token")


def _without_traps(spec: dict[str, Any]) -> dict[str, Any]:
    """The file without what cuts, pads or varies encodings."""
    added = [{**token, "special": bool(token.get("special"))} for token in spec.get("added_tokens") or []]
    model = {**spec["model"], "dropout": None} if "dropout" in spec["model"] else spec["model"]
    return {**spec, "truncation": None, "padding": None, "added_tokens": added, "model": model}


def _described(path: Path) -> dict[str, Any]:
    """What `tokenizer.json` says, the parts that we read being what they must. Raises ConfigError."""
    spec = _object(path)
    added = spec.get("added_tokens") or []
    if not isinstance(spec.get("model"), dict):
        raise refused(path, f'no tokenizer ("model" is missing); give a {JSON} of Hugging Face, or a .model file')
    if not isinstance(added, list) or not all(
        isinstance(one, dict) and isinstance(one.get("content"), str) for one in added
    ):
        raise refused(path, f'"added_tokens" is no list of tokens; give another {JSON}')
    return spec


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise refused(path, f"can't be read ({error.strerror})") from None


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ConfigError."""
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise refused(path, f"broken JSON ({_line(error)}); fetch the file anew") from None
    if not isinstance(found, dict):
        raise refused(path, f"not a JSON object; give Hugging Face's {JSON} and what belongs to it")
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
