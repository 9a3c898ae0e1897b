"""The command line: `megapar COMMAND [group=file] [key=value]`. A command may be two words: `megapar bench kernels`.

Exit codes: 0 done, 1 failed, 2 refused (one line says why), 130 interrupted. Nothing is imported before a command
needs it: `megapar --help` answers in a tenth of a second.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

HELP = ("-h", "--help", "help")


@dataclass(frozen=True)
class Invocation:
    """A command line, taken apart but not yet understood."""

    command: str
    arguments: list[str]  # overrides
    multirun: bool = False
    info: str | None = None  # config, keys or help


def main(argv: Sequence[str] | None = None, *, entry: str | None = None) -> int:
    """Run a command line and return its exit code.

    entry: "module:function" to call in each rank instead of the command's own
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in HELP:
        from megapar.helptext import overview

        print(overview())
        return 0
    if arguments[0] in ("--version", "-V"):
        import megapar

        print(f"megapar {megapar.__version__}")
        return 0
    from megapar.config.errors import UserError
    from megapar.launch.failure import RankFailure

    try:
        return _run(arguments, entry)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except RankFailure as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception:
        import traceback

        traceback.print_exc()
        return 1


def _run(arguments: list[str], entry: str | None) -> int:
    from megapar.config.errors import UserError
    from megapar.launch.situation import situation

    where = situation()
    if where in ("torchrun", "srun"):
        return _external(where, arguments, entry)
    if where == "worker":
        raise UserError("this process is a rank of a run already; start megapar outside of it")
    call = understand(arguments)
    return _info(call) if call.info else _local(call, entry)


def understand(arguments: list[str]) -> Invocation:
    """Take a command line apart. Raises UserError."""
    from megapar.config.errors import UserError
    from megapar.config.schema import COMMANDS

    command, *rest = arguments
    subjects = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{command} ")]
    if subjects and rest and rest[0] in HELP:
        return Invocation(command, [], info="help")
    if subjects:
        subject = rest.pop(0) if rest else ""
        if subject not in subjects:
            raise UserError(f"{command} {subject}".strip() + f": say what to {command}: {', '.join(subjects)}")
        command = f"{command} {subject}"
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UserError(f"{command}: unknown command; {hint}")
    overrides, multirun, info = [], False, None
    while rest:
        word = rest.pop(0)
        if word in HELP[:2]:
            return Invocation(command, [], info="help")
        if word in ("-m", "--multirun"):
            multirun = True
        elif word == "--info" or word.startswith("--info="):
            info = word.partition("=")[2] or (rest.pop(0) if rest and rest[0] in ("config", "keys") else "config")
            if info not in ("config", "keys"):
                raise UserError(f"--info={info}: use --info config, or --info keys")
        else:
            overrides.append(word)
    if multirun and command != "train":
        raise UserError(f"-m: `megapar {command}` runs once; sweeps are for train")
    return Invocation(command, overrides, multirun, info)


def _info(call: Invocation) -> int:
    from megapar.compose import compose, group_files, split
    from megapar.config.schema import COMMANDS
    from megapar.helptext import command_help, config_with_help, key_table, subjects_help

    if call.info == "help":
        known = call.command in COMMANDS
        print(command_help(call.command, group_files(call.command)) if known else subjects_help(call.command))
        return 0
    if call.info == "keys":
        print(key_table(call.command))
        return 0
    print(f"# megapar {' '.join([call.command, *call.arguments])}")
    print(config_with_help(compose(call.command, split(call.arguments))))
    return 0


def _local(call: Invocation, entry: str | None) -> int:
    from megapar import commands
    from megapar.compose import compose, split

    overrides = split(call.arguments)
    if call.multirun:
        from megapar.sweep import sweep

        return sweep(overrides, entry)
    config = compose(call.command, overrides)
    if call.command == "data":
        return commands.data(config)
    if call.command == "kernels":
        return commands.kernels(config)
    if call.command == "bench kernels":
        return commands.bench_kernels(config)
    if call.command == "bench overlap":
        return commands.bench_overlap(config)
    if call.command == "schedule":
        return commands.schedule(config)
    if call.command == "verify":
        return commands.verify(config, overrides.as_list())
    from megapar.launch.local import launch

    with ExitStack() as claims:
        job = commands.plan(config, overrides.as_list(), claims, entry=entry)
        launch(job)
        if call.command == "train":
            commands.draw(job)
    return 0


def _external(where: str, arguments: list[str], entry: str | None) -> int:
    """One rank of many that run this same command line: only the first may speak, and only it composes."""
    from megapar.config.errors import UserError
    from megapar.launch import external
    from megapar.launch.rank import Job

    first = external.place(where).rank == 0
    try:
        call = understand(arguments)
        if call.info:
            raise UserError(f"{where}: help and --info are not for many ranks; ask without {where}")
        if call.multirun:
            raise UserError(f"-m: a sweep starts its own ranks; run it without {where}")
        if call.command not in ("train", "generate"):
            raise UserError(f"{call.command}: starts its own processes; run it without {where}")
    except UserError as error:
        if first:
            print(error, file=sys.stderr)
        return 2

    claims = ExitStack()  # of rank 0, for as long as it lives

    def plan(world_size: int) -> Job:
        from megapar import commands
        from megapar.compose import compose, split

        overrides = split(call.arguments)
        config = compose(call.command, overrides)
        return commands.plan(config, overrides.as_list(), claims, world_size=world_size, entry=entry)

    with claims:
        return external.launch(where, plan)


if __name__ == "__main__":
    sys.exit(main())
