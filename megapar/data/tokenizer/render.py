"""A process of its own, started by `chat.py`: renders a chat template. Reads and writes one JSON object."""

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MOST = 10_000_000  # characters


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, around what an assistant said: a mark for other uses of a template."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """A reach out of it ends the rendering, also where Jinja would write nothing in its place."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


def raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def compiled(template: str) -> jinja2.Template:
    """Raises what Jinja may."""
    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def render(template: jinja2.Template, turns: list[list[str]], variables: dict[str, str], answer: bool) -> str:
    """A conversation of [role, content]. answer: up to where the next answer begins. Raises what a template may."""
    messages = [{"role": role, "content": content} for role, content in turns]
    text = template.render(messages=messages, add_generation_prompt=answer, **variables)
    if len(text) > MOST:
        raise jinja2.TemplateError(f"writes more than {MOST:,} characters")
    return text


def main() -> None:
    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (given["cpu_s"], given["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
    texts: list[str] = []
    number: int | None = None  # of the conversation
    try:
        template = compiled(given["template"])
        for turns in given["conversations"]:
            number = len(texts)
            texts.append(render(template, turns, given["variables"], given["answer"]))
        said: dict[str, Any] = {"texts": texts}
    except Exception as error:  # whatever a template does
        kind = "" if isinstance(error, jinja2.TemplateError) else type(error).__name__
        said = {"error": " ".join([kind, *str(error).split()]).strip(" .")[:500], "number": number}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
