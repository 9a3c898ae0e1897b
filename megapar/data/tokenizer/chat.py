"""Chat templates, rendered where they can do no harm: in Jinja's sandbox, in a process with little time and memory."""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megapar.config.errors import UserError
from megapar.data.tokenizer.contract import LIBRARIES

CPU_S = 5  # processor time of all renderings of a call
MEMORY = 1 << 30  # bytes of that process
SCRIPT = Path(__file__).with_name("render.py")


class TemplateError(Exception):
    """What a template says (raise_exception) or what is wrong with it. number: of the conversation; None: of all"""

    def __init__(self, problem: str, number: int | None = None) -> None:
        super().__init__(problem)
        self.problem, self.number = problem, number


def render(
    template: str, conversations: Sequence[Sequence[tuple[str, str]]], variables: Mapping[str, str], *, answer: bool
) -> list[str]:
    """The text of each conversation of (role, content).

    answer: up to where the next answer begins; else to the end of the last
    variables: bos_token and so on. Raises TemplateError: what the template says, a syntax error, a reach out of the
    sandbox, no end; and UserError where Jinja is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UserError(f"the library jinja2, which renders chat templates, {LIBRARIES}")
    limits = {"cpu_s": CPU_S, "memory": MEMORY}
    said = {"conversations": [list(turns) for turns in conversations], "variables": dict(variables), "answer": answer}
    given = {"template": template, **said, **limits}
    command = [sys.executable, "-P", str(SCRIPT)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, encoding="utf-8")
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise TemplateError(f"does not end within {CPU_S} seconds")
    try:
        written = json.loads(done.stdout)
    except ValueError:
        raise TemplateError(f"broke its process (exit code {done.returncode})") from None
    if "error" in written:
        raise TemplateError(written["error"], written["number"])
    texts: list[str] = written["texts"]
    return texts
