"""The command line: `megapar COMMAND [group=file] [key=value]`. A command may be two words: `megapar bench kernels`.

Exit codes: 0 done, 1 failed, 2 refused (one line says why), 85 stopped as asked, its state saved (the same command goes
on), 130 interrupted. Nothing is imported before a command needs it: `megapar --help` answers in a tenth of a second.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapar.cli.command import Command
    from megapar.launch.rank import Job

HELP = ("-h", "--help", "help")


@dataclass(frozen=True)
class Invocation:
    """A command line, taken apart but not yet understood."""

    words: str  # the command's name, or the first word of several commands', of which help is asked
    command: "Command | None"
    arguments: list[str]  # overrides
    multirun: bool = False
    info: str | None = None  # config, keys or help


def main(argv: Sequence[str] | None = None, *, entry: str | None = None) -> int:
    """Run a command line and return its exit code.

    entry: "module:function" to call in each rank instead of the command's own
    """
    _prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    from megapar.config.errors import UserError
    from megapar.launch.failure import RankFailure, exit_code

    try:
        code = _run(arguments, entry)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except RankFailure as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print("\n".join(["interrupted", *map(str, interruption.args)]), file=sys.stderr)
        # CPython remembers that an interrupt passed through an exec of text, as dataclasses use it, and would end the
        # process by SIGINT, whatever code it returns. The next exec forgets that.
        exec("")
        return exit_code(interruption)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"{error.filename}: {error.strerror}; use a shorter one", file=sys.stderr)
            return 2
        import traceback

        traceback.print_exc()
        return 1


def _prepare_streams() -> None:
    """Open what the caller left closed of descriptors 0 to 2, before a file of ours gets such a number; and have what a
    terminal can't show written as an escape (a run's path in ASCII, a name that is no UTF-8)."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str], entry: str | None) -> int:
    from megapar.config.errors import UserError
    from megapar.launch.situation import situation

    where = situation()
    if arguments and arguments[0] in ("--version", "-V"):
        import megapar

        print(f"megapar {megapar.__version__}")
        return 0
    if arguments[0] in HELP if arguments else where not in ("torchrun", "srun"):
        from megapar.cli.help import overview

        print(overview())
        return 0
    if where in ("torchrun", "srun"):
        return _external(where, arguments, entry)
    if where == "worker":
        raise UserError("this process is a rank of a run already; start megapar outside of it")
    call = understand(arguments)
    return _info(call) if call.info else _local(call, entry)


def understand(arguments: list[str]) -> Invocation:
    """Take a command line apart. Raises UserError."""
    from megapar.cli.command import commands
    from megapar.config.errors import UserError

    known = commands()
    name, *rest = arguments
    subjects = [other.partition(" ")[2] for other in known if other.startswith(f"{name} ")]
    if subjects and rest and rest[0] in HELP:
        return Invocation(name, None, [], info="help")
    if subjects:
        subject = rest.pop(0) if rest else ""
        if subject not in subjects:
            raise UserError(f"{name} {subject}".strip() + f": say what to {name}: {', '.join(subjects)}")
        name = f"{name} {subject}"
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(known)}"
        raise UserError(f"{name}: unknown command; {hint}")
    command = known[name]
    overrides, multirun, info = _take_folder(command, rest), False, None
    while rest:
        word = rest.pop(0)
        if word in HELP[:2]:
            return Invocation(name, command, [], info="help")
        if word in ("-m", "--multirun"):
            multirun = True
        elif word == "--info" or word.startswith("--info="):
            info = word.partition("=")[2] or (rest.pop(0) if rest and rest[0] in ("config", "keys") else "config")
            if info not in ("config", "keys"):
                raise UserError(f"--info={info}: use --info config, or --info keys")
        else:
            overrides.append(word)
    if multirun and command.sweep is None:
        sweeping = " and ".join(other.name for other in known.values() if other.sweep is not None)
        raise UserError(f"-m: `megapar {name}` runs once; sweeps are for {sweeping}")
    return Invocation(name, command, overrides, multirun, info)


def _take_folder(command: "Command", words: list[str]) -> list[str]:
    """Take the positional words off the front of a command's words: the overrides that they stand for.

    Raises UserError for one too many, and where a key has another value further on.
    """
    from megapar.config.errors import ConfigError, UserError

    taken: dict[str, str] = {}
    for key in command.positionals:
        if words and _is_positional(words[0]):
            taken[key] = words.pop(0)
    if taken and words and _is_positional(words[0]):
        takes = "one folder" if len(command.positionals) == 1 else f"{len(command.positionals)} folders"
        before = " and ".join(taken.values())
        verb = "was" if len(taken) == 1 else "were"
        raise UserError(f"{words[0]}: `megapar {command.name}` takes {takes}, and {before} {verb} given before it")
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in taken and os.path.normpath(value) != os.path.normpath(taken[name]):
            raise ConfigError(
                name, value, f"{taken[name]} before it is short for {name}={taken[name]}; give one of them"
            )
    return [f"{key}={folder}" for key, folder in taken.items()]


def _is_positional(word: str) -> bool:
    return "=" not in word and not word.startswith(("-", "+", "~"))


def _info(call: Invocation) -> int:
    from megapar.cli.compose import compose, group_files, split
    from megapar.cli.help import command_help, config_with_help, key_table, subjects_help

    if call.command is None:
        print(subjects_help(call.words))
    elif call.info == "help":
        print(command_help(call.command, group_files(call.command.name)))
    elif call.info == "keys":
        print(key_table(call.command))
    else:
        print(f"# megapar {' '.join([call.words, *call.arguments])}")
        print(config_with_help(compose(call.words, split(call.arguments))))
    return 0


def _local(call: Invocation, entry: str | None) -> int:
    from megapar.cli.command import Call
    from megapar.cli.compose import compose, split

    assert call.command is not None
    overrides = split(call.arguments)
    if call.multirun:
        assert call.command.sweep is not None
        return call.command.sweep(overrides, entry)
    config = compose(call.command.name, overrides)
    return call.command.run(config, Call(overrides.as_list(), entry))


def _external(where: str, arguments: list[str], entry: str | None) -> int:
    """One rank of many that run this same command line: only the first may speak, and only it composes.

    What is wrong with the line is said where all ranks have met: who left alone would leave the others waiting.
    """
    from megapar.config.errors import UserError
    from megapar.launch import external

    first = external.place(where).rank == 0
    if any(word in HELP[:2] or word.startswith("--info") for word in arguments):
        if first:
            print(f"{where}: help and --info are not for many ranks; ask without {where}", file=sys.stderr)
        return 2

    claims = ExitStack()  # of rank 0, for as long as it lives

    def plan(world_size: int, folder: str | None, copies: list[dict[str, Any]]) -> "Job | None":
        from megapar.cli.command import Call
        from megapar.cli.compose import compose, split
        from megapar.config.keys import changed

        if not arguments:
            raise UserError(f"{where}: no command; start the ranks with one, such as train")
        command, words = _for_many_ranks(where, understand(arguments))
        assert command.plan is not None
        overrides = split(words)
        config = compose(command.name, overrides)
        if folder is not None:
            config = changed(
                config, {"run.dir": folder} | ({"train.resume": "auto"} if hasattr(config, "train") else {})
            )
        return command.plan(config, Call(overrides.as_list(), entry, copies=copies), claims, world_size=world_size)

    with claims:
        return external.launch(where, plan, arguments)


def _for_many_ranks(where: str, call: Invocation) -> "tuple[Command, list[str]]":
    """The command and its overrides. Raises UserError where a command line is not for many ranks."""
    from megapar.config.errors import UserError

    if call.multirun:
        raise UserError(f"-m: a sweep starts its own ranks; run it without {where}")
    if call.command is None or call.command.plan is None:
        raise UserError(f"{call.words}: starts its own processes; run it without {where}")
    return call.command, call.arguments
