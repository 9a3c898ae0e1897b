"""What a client of `megapar serve` asks for, in the form of OpenAI's completions."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megapar.config.run_schema import SampleConfig, ServeLimits

NOT_DONE = ("logprobs", "echo", "suffix", "best_of", "presence_penalty", "frequency_penalty", "logit_bias")
IGNORED = ("user",)
MOST_STOPS = 16
NOTHING: tuple[Any, ...] = (None, False, 0, "", {}, [])  # values by which a key asks for nothing


class Refusal(Exception):
    """Why a request is not answered: an HTTP status and what OpenAI's error bodies have."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error", 500: "server_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Completion:
    """A request. prompts: texts, or their tokens; samples: how every choice of a prompt is drawn, the same for all"""

    prompts: list[str | list[int]]
    samples: list[SampleConfig]
    stops: list[str]
    stream: bool
    stream_usage: bool


def parse(body: bytes, model: str, defaults: SampleConfig, limits: ServeLimits) -> Completion:
    """A request's body. model: the name of what is served; defaults: of what a request leaves out. Raises Refusal."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body is no JSON object")
    asked = {key: value for key, value in found.items() if key not in IGNORED}
    if asked.get("best_of") == asked.get("n", 1):
        asked.pop("best_of")  # all of them are the best
    for key in NOT_DONE:
        if asked.pop(key, None) not in NOTHING:
            raise Refusal(400, f"{key} is not supported; leave it out", key)
    if (name := asked.pop("model", None)) not in (None, model):
        raise Refusal(404, f"the model {name!r} is not here; this is {model!r}", "model", "model_not_found")
    take = _Taker(asked)
    prompts = take("prompt", None, _is_prompts, "a text or its tokens, or a list of such")
    stops = take("stop", [], _is_stops, f"a text, or a list of up to {MOST_STOPS} texts, none of them empty")
    count = take("n", 1, _whole(1, limits.max_batch), f"a whole number from 1 to serve.max_batch={limits.max_batch}")
    most = min(defaults.max_tokens, limits.max_tokens)
    allowed = f"a whole number from 1 to serve.max_tokens={limits.max_tokens}"
    tokens = take("max_tokens", most, _whole(1, limits.max_tokens), allowed)
    temperature = take("temperature", defaults.temperature, _number(0.0, 100.0), "a number from 0 to 100")
    top_p = take("top_p", defaults.top_p, _number(1e-12, 1.0), "a number above 0, of at most 1")
    top_k = take("top_k", defaults.top_k, _whole(0, 2**31), "a whole number of at least 0; 0: all")
    seed = take("seed", secrets.randbits(62), _whole(0, 2**63 - 1 - count), "a whole number of at least 0")
    stream = take("stream", False, lambda value: isinstance(value, bool), "true or false")
    usage = take("stream_options", {}, lambda value: isinstance(value, dict), 'an object: {"include_usage": true}')
    if asked:
        raise Refusal(400, f"{next(iter(asked))}: unknown; leave it out", next(iter(asked)))
    facts = {"max_tokens": tokens, "temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    return Completion(
        prompts=prompts if _is_many(prompts) else [prompts],
        samples=[SampleConfig(seed=seed + choice, **facts) for choice in range(count)],
        stops=[stops] if isinstance(stops, str) else stops,
        stream=stream,
        stream_usage=bool(usage.get("include_usage")),
    )


class _Taker:
    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked

    def __call__(self, key: str, default: Any, fits: Callable[[Any], bool], allowed: str) -> Any:
        """The value of a key, which is no longer in what was asked for; null is the default."""
        value = self._asked.pop(key, None)
        if value is None and default is not None:
            return default
        if not fits(value):
            raise Refusal(400, f"{key}={json.dumps(value)[:60]}: must be {allowed}", key)
        return value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_whole(0, 2**31 - 1), value))


def _is_many(value: Any) -> bool:
    return _is_texts(value) or (isinstance(value, list) and bool(value) and all(map(_is_tokens, value)))


def _is_prompts(value: Any) -> bool:
    return isinstance(value, str) or _is_tokens(value) or _is_many(value)


def _is_stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return texts == [] or (_is_texts(texts) and all(texts) and len(texts) <= MOST_STOPS)


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(least: float, most: float) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

    return fits
