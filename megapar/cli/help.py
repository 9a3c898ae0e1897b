"""What `--help` and `--info` print, made from the commands, their keys and the files in `conf/`.

Imports neither Hydra nor torch, and for `megapar --help`, which is to answer at once, no more than the commands' keys.
"""

from collections.abc import Mapping
from typing import Any

from megapar.cli.command import Command, commands

END = "...\n"  # what YAML writes after a bare scalar


def overview() -> str:
    """`megapar --help`"""
    lines = [
        "Train Transformers in tensor x pipeline x data parallel, on CPUs and GPUs, and check that layouts agree.",
        "",
    ]
    lines += ["usage: megapar COMMAND [group=file] [key=value] ...", "", "commands:"]
    lines += _table([(command.name, command.about) for command in commands().values()])
    lines += ["", "options:"]
    lines += _table(
        [
            ("COMMAND --help", "groups, most used keys and examples of a command"),
            ("COMMAND --info config", "every key of the composed configuration, with a description"),
            ("train -m ...", "a sweep over every combination of key=a,b; started again, it goes on where it stopped"),
            ("--version", "print the version"),
        ]
    )
    return "\n".join([*lines, "", "Start with: megapar train"])


def command_help(command: Command, files: Mapping[str, list[str]]) -> str:
    """`megapar COMMAND --help`; `files`: the names in each group of the command."""
    from megapar.config.keys import keys

    known, name = keys(command.config), command.name
    folder = "".join(f"[{word}] " for word in command.positionals.values())
    lines = [f"megapar {name}: {command.about}", "", f"usage: megapar {name} {folder}[group=file] [key=value] ..."]
    lines += [f"       {word} is short for {key}={word}" for key, word in command.positionals.items()]
    lines += ["", "examples:"] if command.examples else []
    for line, text in command.examples:
        lines += [f"  {line}", f"      {text}"]
    if files:
        lines += ["", "groups, and the files to choose from:"]
        choices = {name: " ".join(names) or "(none yet)" for name, names in files.items()}
        if "parallel" in choices:
            choices["parallel"] += ", or a layout such as tp2pp2dp2"
        lines += _table(list(choices.items()), width=92)
    lines += ["", "most used keys:"] if command.most_used else []
    lines += _table([(key, known[key].help) for key in command.most_used])
    verbatim = [key for key, facts in known.items() if facts.verbatim]
    lines += ["", "Every key: " + f"megapar {name} --info config"]
    taken = f"Taken as they stand after the first =: {', '.join(verbatim)}. " if verbatim else ""
    lines += [f"{taken}Lists are written [a,b]."]
    return "\n".join(lines)


def subjects_help(command: str) -> str:
    """`megapar bench --help`: what a command of several subjects does to each."""
    found = [one for name, one in commands().items() if name.startswith(f"{command} ")]
    rows = [(f"{one.name} --help", one.about) for one in found]
    return "\n".join([f"usage: megapar {command} SUBJECT [key=value] ...", "", "subjects:", *_table(rows)])


def config_with_help(config: Any) -> str:
    """A config as YAML that can be read back, the description of each key as an aligned comment beside it."""
    from megapar.config.keys import groups, keys
    from megapar.config.parse import to_dict

    lines: list[tuple[str, str]] = []
    _render(to_dict(config), "", keys(type(config)), groups(type(config)), lines)
    width = min(44, max(len(text) for text, comment in lines if comment))
    return "\n".join(f"{text:<{width}}  # {comment}" if comment else text for text, comment in lines)


def key_table(command: Command) -> str:
    """Every key of a command with its description, without values."""
    from megapar.config.keys import keys

    return "\n".join(_table([(key, facts.help) for key, facts in keys(command.config).items()]))


def _render(
    node: Mapping[str, Any], prefix: str, known: Mapping[str, Any], described: Mapping[str, str], lines: list[Any]
) -> None:
    import yaml

    indent = "  " * prefix.count(".")
    for name, value in node.items():
        key = prefix + name
        if key in described:
            lines += [(f"{indent}# {described[key]}", ""), (f"{indent}{name}:", "")]
            _render(value, key + ".", known, described, lines)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 30)
            lines.append((f"{indent}{name}: {text.removesuffix(END).strip()}", known[key].help))


def _table(rows: list[tuple[str, str]], width: int = 0) -> list[str]:
    """Two aligned columns; the second is wrapped at `width` characters, 0: never."""
    import textwrap

    first = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, text in rows:
        parts = textwrap.wrap(text, width) if width and text else [text]
        lines.append(f"  {name:<{first}}  {parts[0]}")
        lines += [f"  {'':<{first}}  {part}" for part in parts[1:]]
    return lines
