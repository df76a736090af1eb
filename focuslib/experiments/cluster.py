"""The engine of a Ray cluster: its actors hold the models, on whichever nodes Ray finds room for them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from focuslib.errors import UserError, needs_extra
from focuslib.experiments.cell import Cell
from focuslib.experiments.engine import (
    AHEAD,
    DIED,
    STARTS,
    Fault,
    Held,
    Message,
    Queue,
    Refused,
    Report,
    Work,
    messages,
    not_started,
    refuse_rest,
)
from focuslib.experiments.identity import package_versions, source_digest
from focuslib.experiments.shards import Shard
from focuslib.experiments.worker import Worker
from focuslib.models.base import Needs

PAUSE = 1.0  # seconds after which to look whether a node has come


class RayEngine:
    """Workers on the nodes of a Ray cluster (see engine.Engine).

    Ray places them, on nodes that come later too, and makes each anew that was lost with its process or its node.

    Parameters
    ----------
    count
        Workers, at most; those that no node has room for wait for one.
    address
        Of a running cluster; "auto": of the one that this machine is in. None makes one of this machine alone, which
        listens on the loopback address only.
    make
        Makes what a worker holds.
    """

    def __init__(self, count: int, address: str | None = None, make: Callable[[], Work] = Worker):
        self.count, self.address, self.make = count, address, make
        self.running: dict[str, Shard] = {}
        self.refused: list[str] = []
        self._hands: list[_Hand] = []
        self._aside: list[_Hand] = []  # refused, but not ended: another worker would be placed where they are
        self._ray: Any = None

    @property
    def workers(self) -> int:
        return sum(hand.starting is None for hand in self._hands)

    def __enter__(self) -> RayEngine:
        self._ray = connect(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self._hands + self._aside:
            hand.end()
        self._hands, self._aside, self.running = [], [], {}
        self._ray.shutdown()

    def run(self, queue: Queue) -> Iterator[tuple[Shard, Message]]:
        """See engine.Engine."""
        while True:
            self._adjust(queue)
            for hand in self._hands:
                self._feed(hand, queue)
            if not self._hands or not (len(queue) or any(hand.given for hand in self._hands)):
                yield from refuse_rest(queue, self.refused)
                return
            waited = {hand.waits_for: hand for hand in self._hands if hand.waits_for is not None}
            ready, _ = self._ray.wait(list(waited), num_returns=len(waited), timeout=0, fetch_local=False)
            if not ready:
                ready, _ = self._ray.wait(list(waited), timeout=PAUSE, fetch_local=False)
            for each in ready:
                yield from self._receive(waited[each], queue)

    def _adjust(self, queue: Queue) -> None:
        """Have as many workers as the queue has use for, each with what the models of its shards need."""
        groups = queue.groups()
        for hand in list(self._hands):
            if groups and not hand.given and hand.needs not in groups:  # its place may be needed by others
                self._hands.remove(hand)
                queue.let_go(hand.held)
                hand.end()
        for needs, shards in groups.items():
            there = sum(hand.needs == needs for hand in self._hands)
            for _ in range(there, min(self.count - len(self.refused), shards)):
                self._hands.append(_Hand(self._ray, needs, self.make))

    def _feed(self, hand: _Hand, queue: Queue) -> None:
        """Give a worker the next shard, and one ahead while there are enough for the others."""
        while hand.starting is None and len(hand.given) < (AHEAD if len(queue) >= len(self._hands) else 1):
            shard = queue.take(hand.held, hand.needs)
            if shard is None:
                return
            hand.give(shard)
            self.running[hand.name] = hand.given[0][0]

    def _receive(self, hand: _Hand, queue: Queue) -> Iterator[tuple[Shard, Message]]:
        """What a worker has sent, or that it is there, or that it was lost."""
        try:
            message = hand.next()
        except self._ray.exceptions.RayError as error:
            lost = [shard for shard, _ in hand.given]
            self._take_back(hand, queue, lost[1:])
            if not hand.restart():
                self._hands.remove(hand)
                self.refused.append(not_started(_first_line(error)))
            if lost:
                yield lost[0], Fault(f"{DIED} ({type(error).__name__})", again=True)
            return
        if message is None:
            return
        if isinstance(message, Refused):
            self.refused.append(message.why)
            self._take_back(hand, queue, [shard for shard, _ in hand.given])
            self._hands.remove(hand)
            self._aside.append(hand)
            return
        shard = hand.given[0][0]
        if isinstance(message, Report | Fault):
            hand.given.popleft()
            self.running.pop(hand.name, None)
            if hand.given:
                self.running[hand.name] = hand.given[0][0]
        yield shard, message

    def _take_back(self, hand: _Hand, queue: Queue, shards: list[Shard]) -> None:
        queue.take_back(shards, hand.held)
        hand.given.clear()
        self.running.pop(hand.name, None)


class _Hand:
    """The driver's end of a worker.

    given: its shards with what they send, the one it is at first. starting: the worker says here when it is there;
    None: it is. starts: how often it was made and did not come; 0: it is there.
    """

    def __init__(self, ray: Any, needs: Needs, make: Callable[[], Work]):
        self.ray, self.needs, self.make = ray, needs, make
        self.name, self.starts = "", 0
        self.given: deque[tuple[Shard, Any]] = deque()
        self.held = Held()
        self.starting: Any = None
        self.start()

    @property
    def waits_for(self) -> Any:
        """What the next message comes from; None: nothing is due."""
        return self.starting or (self.given[0][1] if self.given else None)

    def start(self) -> None:
        offline = os.environ.get("HF_HUB_OFFLINE", "1")
        self.starts += 1
        self.actor = (
            self.ray.remote(_Host)
            .options(
                num_cpus=1,
                num_gpus=self.needs.gpus,
                memory=int(self.needs.memory_gb * 1e9),
                runtime_env={"env_vars": {"HF_HUB_OFFLINE": offline, "TQDM_DISABLE": "1"}},
            )
            .remote(self.make)
        )
        self.starting = self.actor.ready.remote(source_digest(), package_versions())

    def give(self, shard: Shard) -> None:
        """Send a shard, behind those the worker has."""
        self.given.append((shard, self.actor.answer.options(num_returns="streaming").remote(shard)))

    def next(self) -> Message | None:
        """The message that is ready; None: the worker is there. Raises RayError if the worker is lost."""
        if self.starting is None:
            return self.ray.get(next(self.given[0][1]))
        self.name, problem = self.ray.get(self.starting)
        self.starting, self.starts = None, 0
        return Refused(problem) if problem else None

    def restart(self) -> bool:
        """Have Ray make the worker anew, here or on another node; returns False if that was in vain before."""
        if self.starts >= STARTS:
            return False
        self.start()
        return True

    def end(self) -> None:
        self.ray.kill(self.actor)


class _Host:
    """The actor: what a worker holds, in a process of its own on some node."""

    def __init__(self, make: Callable[[], Work]):
        self.make, self.work = make, None

    def ready(self, source: str, packages: dict[str, str]) -> tuple[str, str | None]:
        """The worker's name, and why the driver cannot have it. Its node must run the driver's code and packages."""
        node, other = node_state(source, packages)
        if other:
            return node, other
        self.work = self.make()
        return f"{node} {os.getpid()}", None

    def answer(self, shard: Shard) -> Iterator[Message]:
        """See engine.Work."""
        assert self.work is not None  # it is given no shard before it is ready
        yield from messages(self.work, shard)


def connect(address: str | None) -> Any:
    """The ray package, connected to a cluster (see RayEngine). Raises UserError if there is no such cluster, or no ray.

    A cluster of this machine alone listens on the loopback address, and has a token, as Ray makes one.
    """
    local = address is None or address.partition(":")[0] in ("127.0.0.1", "localhost")
    if local:  # else Ray takes the machine's outer address for 127.0.0.1, and listens on all it has; read at import
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to nobody
    try:
        import ray
    except ModuleNotFoundError:
        raise needs_extra("engine ray", "cluster") from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'} ({_first_line(error)})") from error
    if address is None and ray.util.get_node_ip_address() != "127.0.0.1":  # ray was imported before
        ray.shutdown()
        raise UserError("Ray would listen on this machine's outer addresses; do not import ray before focuslib")
    return ray


def missing_on_nodes(address: str, cells: Iterable[Cell]) -> list[str]:
    """One line for each thing that cells need and a node of a cluster lacks, or has in another version."""
    models = list(dict.fromkeys((cell.model, cell.checkpoint) for cell in cells))
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    ray = connect(address)
    try:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look, looks = ray.remote(_lacks), {}
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked = look.options(num_cpus=0, scheduling_strategy=there)
                looks[node["NodeID"]] = asked.remote(models, datasets, source_digest(), package_versions())
        lines = []
        for number, lacking in looks.items():
            try:
                lines += ray.get(lacking)
            except ray.exceptions.RayError as error:
                lines.append(f"node {number}: could not be asked ({_first_line(error)})")
        return lines
    finally:
        ray.shutdown()


def _lacks(
    models: list[tuple[str, str | None]], datasets: list[str], source: str, packages: dict[str, str]
) -> list[str]:
    """On a node: a line for each thing that it lacks."""
    from focuslib.experiments.check import data, weights

    node, other = node_state(source, packages)
    lacking = [weights(model, checkpoint) for model, checkpoint in models] + [data(dataset) for dataset in datasets]
    return ([other] if other else []) + [f"node {node}: {line}" for line in lacking if line != "there"]


def node_state(source: str, packages: dict[str, str]) -> tuple[str, str | None]:
    """On a node: its address, and what it has of another version than the driver, in a line."""
    from ray.util import get_node_ip_address

    node = get_node_ip_address()
    here = source_digest()
    if here != source:
        return node, f"node {node} has another version of focuslib's source ({here} for {source}); make them alike"
    other = {name: version for name, version in package_versions().items() if packages[name] != version}
    said = ", ".join(f"{name} {version} for {packages[name]}" for name, version in other.items())
    return node, f"node {node} has other packages ({said}); make them alike" if other else None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
