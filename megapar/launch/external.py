"""Ranks that torchrun or srun has started, one process each, all running the same command.

Global rank 0 plans the run (composes, validates, prepares data, writes the run directory) and publishes the job, or the
line that refuses it, over a TCPStore; the others wait for it there and never import Hydra.
"""

import ctypes
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from typing import Any

from megapar.config.errors import UserError
from megapar.launch import guard
from megapar.launch.copies import Held, copies_of_torchrun, held
from megapar.launch.machine import threads_per_rank
from megapar.launch.rank import Job, run

MEET_S = 300.0  # until rank 0 has opened the store
PLAN_S = 4 * 3600.0  # until rank 0 has prepared data and published the job
RESOLVE_S = 8.0  # until the first host's name has an address
REFUSAL_S = 4.0  # until every rank has read a refusal


Planner = Callable[[int, str | None, list[Held]], Job | None]


@dataclass(frozen=True)
class Place:
    """Where a rank stands and where it meets the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    port: int
    agent_store: bool  # torchrun's agent already serves a store at host:port
    job: str  # tells this one from others that may use the same store
    node: int  # which of the hosts this is
    nodes: int


def place(situation: str, env: Mapping[str, str] | None = None) -> Place:
    """This rank's place from the environment of torchrun or srun. Raises UserError for an incomplete one."""
    env = os.environ if env is None else env
    try:
        return _from_srun(env) if situation == "srun" else _from_torchrun(env)
    except KeyError as error:
        raise UserError(
            f"{situation}: the environment lacks {error.args[0]}; start the ranks with torchrun or srun"
        ) from None


def _from_torchrun(env: Mapping[str, str]) -> Place:
    world, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
    on_host = int(env.get("LOCAL_WORLD_SIZE", world))
    return Place(
        rank=rank,
        world_size=world,
        local_rank=int(env.get("LOCAL_RANK", rank)),
        local_world_size=on_host,
        host=env["MASTER_ADDR"],
        port=int(env["MASTER_PORT"]),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        job=env.get("TORCHELASTIC_RUN_ID", ""),
        node=int(env.get("GROUP_RANK", rank // on_host)),
        nodes=int(env.get("GROUP_WORLD_SIZE", -(-world // on_host))),
    )


def _from_srun(env: Mapping[str, str]) -> Place:
    job, step = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", "0"))
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
    return Place(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=_tasks_on_node(env),
        host=env.get("MEGAPAR_MASTER_ADDR") or first_host(nodes),
        # Every rank derives the same port; steps and jobs that share a node get different ones.
        port=int(env.get("MEGAPAR_MASTER_PORT") or 20000 + (job * 31 + step * 7) % 12000),
        agent_store=False,
        job=f"{job}.{step}",
        node=int(env.get("SLURM_NODEID", "0")),
        nodes=int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", "1")),
    )


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """Tasks on this node: SLURM writes one number per node, `4(x2),3` for two nodes of four and one of three."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or 1)
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


def first_host(nodes: str) -> str:
    """First host of a SLURM node list such as `n[1-2,7]`."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        problem = f"srun: scontrol can't expand the node list {nodes}"
        raise UserError(f"{problem}; set MEGAPAR_MASTER_ADDR to the first host") from None


def launch(situation: str, plan: Planner, words: list[str]) -> int:
    """Be one rank of a run that torchrun or srun started. Returns the exit code: 2 when the run was refused.

    plan: called on global rank 0 only, with the number of ranks, the run directory if torchrun has started them again,
        and what hosts have of the run in memory; makes the job (None: there is nothing to do) or raises UserError
    words: of the command line, which must be the same on all ranks
    """
    here = place(situation)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_torchrun()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(here.local_world_size)))
    of_all = open_store(here)
    from torch.distributed import PrefixStore

    name = ask(of_all, here)
    store = PrefixStore(f"megapar/{here.job}/{name}", of_all)
    if here.local_rank == 0 and here.nodes > 1:
        store.set(f"copies/{here.node}", json.dumps(held()))
    compare(store, here, words)
    if here.rank == 0:
        try:
            answer(of_all, here, name)
            refuse_other_commands(store, here)
            hosts = range(here.nodes if here.nodes > 1 else 0)
            copies = [json.loads(_wait(store, f"copies/{node}", MEET_S)) for node in hosts]
            planned = plan(here.world_size, earlier_folder(store), copies)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            return _leave(store, here, {"refusal": str(error)})
        except BaseException as error:
            _leave(store, here, {"refusal": f"rank 0 failed while it planned the run: {type(error).__name__}"})
            raise
        if planned is None:
            return _leave(store, here, {"done": True})
        job = planned
        keep_folder(store, job.folder)
        store.set("plan", json.dumps({"job": asdict(job)}))
    else:
        plan_text = json.loads(_wait(store, "plan", PLAN_S))
        if "job" not in plan_text:
            return _leave(store, here, plan_text)
        job = Job(**plan_text["job"])
    stop_at = job.stop_at if here.rank == 0 else None  # of rank 0's clock
    job = replace(job, threads=threads_per_rank(here.local_world_size), stop_at=stop_at)
    if here.node != 0 and job.copies is not None:
        job = replace(job, copies=_copies(store, here))
    os.environ.setdefault("LOCAL_RANK", str(here.local_rank))
    tied = _tie(store, here, job)
    if tied is None:
        run(job, here.rank, here.world_size, store)
    else:
        run(replace(job, board=tied.board), here.rank, here.world_size, store, tied.end)
    return 0


def _copies(store: Any, here: Place) -> str:
    """The folder of copies on this host, another than rank 0's; its first rank makes it. Raises UserError."""
    key = f"copies/{here.node}/folder"
    if here.local_rank == 0:
        try:
            store.set(key, str(copies_of_torchrun().folder))
        except UserError:
            store.set(key, "")
            raise
    if not (folder := _wait(store, key, MEET_S).decode()):
        raise UserError(f"checkpoint.replicate: no copies can be had on host {here.node}")
    return folder


def _tie(store: Any, here: Place, job: Job) -> guard.Tie | None:
    """Have this host's guard watch this rank; the first rank here starts it. None: nobody watches."""
    if job.watchdog_s is None or not hasattr(os, "memfd_create"):
        return None
    if here.local_rank == 0:
        name = here.host if here.node == 0 else socket.gethostname()
        store.set(f"guard/{here.node}", guard.start(here.nodes, name))
    mine, first = (_wait(store, f"guard/{node}", MEET_S) for node in (here.node, 0))
    try:
        return guard.tie(guard.address(mine), guard.address(first), here.rank, job)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"rank {here.rank} is not watched: its host's guard does not answer ({error})", file=sys.stderr, flush=True
        )
        return None


def die_with_torchrun() -> None:
    """Have the kernel end this process when torchrun's agent, which is its parent, has gone. Who sets the variables by
    hand may start ranks from a shell that does not stay, so it is for torchrun's own alone."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    parent = os.getppid()  # 1 where torchrun is all that a container runs
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it has gone meanwhile
        os._exit(1)


def earlier_folder(store: Any) -> str | None:
    """The run directory of the ranks that torchrun's agent started before these; None: these are the first."""
    kept = _of_all_attempts(store)
    return kept.get("folder").decode() if kept.check(["folder"]) else None


def keep_folder(store: Any, folder: str) -> None:
    """Leave a run directory for ranks that the same agent starts again."""
    _of_all_attempts(store).set("folder", folder)


def _of_all_attempts(store: Any) -> Any:
    from torch.distributed import PrefixStore

    return PrefixStore(f"megapar/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", store.underlying_store)


def compare(store: Any, here: Place, words: list[str]) -> None:
    """Hold this rank's command line against rank 0's, and leave word of a difference for rank 0."""
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    if here.rank == 0:
        store.set("command", json.dumps({"digest": digest, "words": words}))
        return
    first = json.loads(_wait(store, "command", MEET_S))
    if first["digest"] != digest:
        store.set("different", f"rank {here.rank}: {_difference(first['words'], words)}; start all ranks alike")
    store.add("compared", 1)


def _difference(first: list[str], mine: list[str]) -> str:
    """The first words in which two command lines differ."""
    pairs = zip_longest(first, mine)
    theirs, ours = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    if ours is None:
        return f"its command line lacks {theirs}, which rank 0 has"
    return f"its command line has {ours}, where rank 0 has {theirs or 'no more'}"


def refuse_other_commands(store: Any, here: Place) -> None:
    """On rank 0: raise UserError if a rank has another command line."""
    while store.add("compared", 0) < here.world_size - 1:
        time.sleep(0.02)
    if store.check(["different"]):
        raise UserError(store.get("different").decode())


def refuse_unknown_host(host: str) -> None:
    """Raise UserError for a name that is not resolved within RESOLVE_S."""
    remedy = "give an address: MASTER_ADDR for torchrun, MEGAPAR_MASTER_ADDR for srun"
    found: list[Any] = []

    def resolve() -> None:
        try:
            found.append(socket.getaddrinfo(host, None))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=resolve, name="resolve", daemon=True)
    thread.start()
    thread.join(RESOLVE_S)
    if not found:
        raise UserError(f"{host}: no answer to what this name's address is within {RESOLVE_S:.0f} s; {remedy}")
    if isinstance(found[0], Exception):
        raise UserError(f"{host}: this name has no address ({found[0]}); {remedy}")


def open_store(here: Place) -> Any:
    """The store that all ranks share: of rank 0, or torchrun's agent's, which earlier starts have used, too."""
    refuse_unknown_host(here.host)
    from torch.distributed import DistNetworkError, TCPStore

    serve = here.rank == 0 and not here.agent_store
    wait = timedelta(seconds=MEET_S)
    try:
        return TCPStore(here.host, here.port, is_master=serve, timeout=wait, wait_for_workers=False)
    except DistNetworkError as error:
        if not serve:
            raise UserError(
                f"rank {here.rank}: no store of rank 0 at {here.host}:{here.port} within {MEET_S:.0f} s"
            ) from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"port {here.port}: can't be served ({reason}); set MEGAPAR_MASTER_PORT to a free one"
        ) from None


def ask(store: Any, here: Place) -> str:
    """A name of this start that all of its ranks know, and none of an earlier one; rank 0 makes it. torchrun's agents
    have none: each counts its own restarts, and one that took a lost host's place begins at 0, with the store of all.

    A rank asks with a word of its own, which `answer` answers.
    """
    if here.rank == 0:
        return secrets.token_hex(8)
    word = secrets.token_hex(8)
    store.set(f"megapar/{here.job}/asks/{here.rank}", word)
    name = _wait(store, f"megapar/{here.job}/answer/{word}", MEET_S).decode()
    store.add(f"megapar/{here.job}/{name}/came", 1)
    return name


def answer(store: Any, here: Place, name: str) -> None:
    """On rank 0: tell all ranks the name of this start. Raises UserError where one does not come."""
    answered: set[bytes] = set()  # words of ranks that have gone, too
    deadline = time.monotonic() + MEET_S
    while (came := store.add(f"megapar/{here.job}/{name}/came", 0)) < here.world_size - 1:
        if time.monotonic() > deadline:
            problem = f"{came + 1} of {here.world_size} ranks came within {MEET_S:.0f} s"
            raise UserError(f"{problem}; see what ended the others")
        for rank in range(1, here.world_size):
            asks = f"megapar/{here.job}/asks/{rank}"
            if store.check([asks]) and (word := store.get(asks)) not in answered:
                answered.add(word)
                store.set(f"megapar/{here.job}/answer/{word.decode()}", name)
        time.sleep(0.02)


def _wait(store: Any, key: str, seconds: float) -> bytes:
    store.wait([key], timedelta(seconds=seconds))
    return store.get(key)


def _leave(store: Any, here: Place, plan: dict[str, Any]) -> int:
    """Leave together: a rank that exits first may take the store, or the others' chance to exit as it does, with it.

    plan: that rank 0 publishes: `refusal`, a line, or `done`. Returns the exit code.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others as soon as one has exited
    if here.rank == 0:
        store.set("plan", json.dumps(plan))
    deadline = time.monotonic() + REFUSAL_S
    store.add("leaving", 1)
    while time.monotonic() < deadline:
        try:
            if store.add("leaving", 0) >= here.world_size:
                break
        except Exception:  # the store has gone: so has rank 0, and everybody has read what it said
            break
        time.sleep(0.02)
    if here.rank == 0 and not here.agent_store:
        time.sleep(0.2)  # keep serving while the others read the count
    sys.stdout.flush()
    sys.stderr.flush()
    return 2 if "refusal" in plan else 0
