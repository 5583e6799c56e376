"""The roll call: every rank reports to rank 0 through the key-value store before any collective, so that who does not come has a name."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from poet_megatron.errors import UserError
from poet_megatron.health.control import GRACE_SECONDS, bounded, missing
from poet_megatron.health.report import FAIL, OK, WARN, Finding
from poet_megatron.health.roster import Launch, Member, Roster, and_join, spans

CHECK = "roll call"
REFUSED_PAUSE = 0.2


class NotAllCame(Exception):
    """The roll call failed.

    Attributes:
        finding: what to say about it.
        nodes: ranks by node, of those that came.
    """

    def __init__(self, finding: Finding, nodes: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__(finding.what)
        self.finding = finding
        self.nodes = nodes or {}


def open_stores(launch: Launch, timeout: float) -> tuple[dist.Store, dist.Store]:
    """Two connections to the key-value store, for the control of steps and for process groups; rank 0 serves it if the launcher does not.

    Raises:
        UserError: rank 0 cannot serve it.
        NotAllCame: this rank cannot reach it within `timeout` seconds.
    """
    port = launch.port
    stores: list[dist.Store] = []
    if launch.rank == 0 and not launch.agent_store:
        server = _serve(launch, timeout)
        stores.append(server)
        port = server.port
    deadline = time.monotonic() + timeout
    while len(stores) < 2:
        stores.append(_connect(launch, port, deadline))
    control, collectives = (dist.PrefixStore(f"poet_megatron/health/{launch.attempt}", store) for store in stores)
    return control, dist.PrefixStore("collectives", collectives)


def _serve(launch: Launch, timeout: float) -> dist.TCPStore:
    try:
        return dist.TCPStore(launch.address, launch.port, None, True, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(
            f"rank 0 on {launch.node} cannot serve port {launch.port} at MASTER_ADDR={launch.address} ({_first_line(error)}): "
            f"set MASTER_ADDR to a name or address of {launch.node} and MASTER_PORT to a port that no other job uses"
        ) from error


def _connect(launch: Launch, port: int, deadline: float) -> dist.Store:
    """A connection; tried with a plain socket first, since torch's client writes a stack trace for every failure."""
    reason = _unreachable(launch.address, port, deadline)
    if not reason:
        left = max(deadline - time.monotonic(), 1.0)
        made: list[dist.Store] = []
        outcome = bounded(lambda: made.append(_client(launch.address, port, left)), left)
        if made:
            return made[0]
        reason = outcome.error
    raise NotAllCame(
        Finding(
            CHECK,
            FAIL,
            f"rank {launch.rank} on {launch.node} cannot reach rank 0 at {launch.address}:{port}: {reason}",
            "is rank 0 running, is MASTER_ADDR its node and MASTER_PORT its port, and does no firewall stand between the nodes?",
            ranks=(0,),
        )
    )


def _client(address: str, port: int, seconds: float) -> dist.Store:
    return dist.TCPStore(address, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)


def _unreachable(address: str, port: int, deadline: float) -> str:
    """Try until a connection is accepted: "", or the last reason why not."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return ""
        except OSError as error:
            if time.monotonic() + REFUSED_PAUSE > deadline:
                return error.strerror or str(error) or type(error).__name__
            time.sleep(REFUSED_PAUSE)


def roll_call(store: dist.Store, launch: Launch, timeout: float) -> tuple[Roster, list[Finding]]:
    """Everybody reports to rank 0, which tells everybody who is there.

    Raises:
        NotAllCame: on every rank that came, if another did not within `timeout` seconds.
    """
    start = time.monotonic()
    try:
        members, finding = _call(store, launch, start + timeout)
    except RuntimeError as error:  # the store is gone, and with it rank 0
        what = f"rank {launch.rank} on {launch.node} lost rank 0 at {launch.address}:{launch.port} during the roll call"
        raise NotAllCame(Finding(CHECK, FAIL, what, "read the output of rank 0", ranks=(0,))) from error
    if finding:
        raise NotAllCame(finding, Roster(members).nodes)
    roster = Roster(members)
    return roster, [Finding(CHECK, OK, f"all {launch.size} came within {time.monotonic() - start:.1f} s"), *_odd_ranks(roster)]


def _call(store: dist.Store, launch: Launch, deadline: float) -> tuple[list[Member], Finding | None]:
    """Who is there, and what is wrong with it."""
    _claim(store, launch)
    store.set(f"here/{launch.rank}", json.dumps(asdict(Member(launch.rank, launch.size, launch.local_rank, launch.node))))
    if launch.rank == 0:
        _take(store, launch, deadline)
    elif missing(store, ["roster"], deadline + GRACE_SECONDS):
        server = f"{launch.address}:{launch.port}"
        what = f"rank {launch.rank} on {launch.node} reached {server}, but rank 0 did not answer in time"
        raise NotAllCame(Finding(CHECK, FAIL, what, "is the port another job's? set another MASTER_PORT", ranks=(0,)))
    answer = json.loads(store.get("roster"))
    finding = answer["finding"] and Finding(**answer["finding"] | {key: tuple(answer["finding"][key]) for key in ("ranks", "nodes")})
    return [Member(**member) for member in answer["members"]], finding


def _claim(store: dist.Store, launch: Launch) -> None:
    """Nobody else may have this rank's number."""
    if store.add(f"claimed/{launch.rank}", 1) > 1:
        other = json.loads(store.get(f"here/{launch.rank}"))["node"] if store.check([f"here/{launch.rank}"]) else "elsewhere"
        what = f"two processes are rank {launch.rank}: one on {launch.node}, one on {other}"
        store.set("twice", what)
        raise NotAllCame(Finding(CHECK, FAIL, what, "every task needs its own RANK; under srun start tasks through launch/slurm/rank.sh"))


def _take(store: dist.Store, launch: Launch, deadline: float) -> None:
    """Rank 0 waits for the others and publishes the roster, with what is wrong with it."""
    keys = [f"here/{rank}" for rank in range(launch.size)]
    absent = missing(store, keys, deadline)
    came = [Member(**json.loads(store.get(key))) for rank, key in enumerate(keys) if rank not in absent]
    twice = store.get("twice").decode() if store.check(["twice"]) else ""
    finding = _absent(launch, absent, came, twice) if absent else _disagreeing(launch, came)
    answer = {"members": [asdict(member) for member in came], "finding": asdict(finding) if finding else None}
    store.set("roster", json.dumps(answer))


def _absent(launch: Launch, absent: Sequence[int], came: Sequence[Member], twice: str) -> Finding:
    nodes, without_rank = _nodes_of_absent(launch, absent, came)
    seen = spans(member.rank for member in came)
    hints = [f"nobody came from {and_join(nodes)}"] if nodes else []
    hints += [f"{node} sent only rank{'s' if ',' in ranks or '-' in ranks else ''} {ranks}" for node, ranks in without_rank.items()]
    hints += [twice] if twice else []
    return Finding(
        CHECK,
        FAIL,
        f"rank{'s' if len(absent) > 1 else ''} {spans(absent)} of {launch.size} did not come in time (came: {seen})"
        + (f"; {', '.join(hints)}" if hints else ""),
        f"read the output of these ranks: did they start, and can they reach {launch.address}:{launch.port} from there? "
        "Slow imports from a shared file system need a longer --timeout",
        ranks=tuple(absent),
        nodes=(*nodes, *without_rank),
    )


def _nodes_of_absent(launch: Launch, absent: Sequence[int], came: Sequence[Member]) -> tuple[list[str], dict[str, str]]:
    """Nodes of the allocation that nobody came from, and by node the ranks of incomplete ones, as far as they can be known."""
    present = {member.node for member in came}
    nodes = [node for node in launch.expected_nodes if node not in present]
    groups = {rank // launch.local_size for rank in absent} if launch.local_size else set()
    incomplete = {member.node for member in came if launch.local_size and member.rank // launch.local_size in groups}
    return nodes, {node: spans(member.rank for member in came if member.node == node) for node in sorted(incomplete)}


def _disagreeing(launch: Launch, came: Sequence[Member]) -> Finding | None:
    odd = [member for member in came if member.size != launch.size]
    if not odd:
        return None
    names = Roster(came).name(member.rank for member in odd)
    what = f"{names}: WORLD_SIZE is {odd[0].size}, on rank 0 it is {launch.size}"
    return Finding(CHECK, FAIL, what, "give all tasks of one launch the same WORLD_SIZE", ranks=tuple(member.rank for member in odd))


def _odd_ranks(roster: Roster) -> list[Finding]:
    """Two ranks of a node with one LOCAL_RANK: two nodes with one name, or a faulty launcher."""
    found = []
    for node, ranks in roster.nodes.items():
        local = [roster.members[rank].local_rank for rank in ranks]
        twice = sorted({number for number in local if local.count(number) > 1})
        if twice:
            what = f"ranks {spans(ranks)} all say that they are on {node}, and LOCAL_RANK {spans(twice)} is taken more than once"
            fix = "set LOCAL_RANK per node; if these are several machines of one name, figures by node below mix them"
            found.append(Finding(CHECK, WARN, what, fix, ranks=ranks, nodes=(node,)))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
