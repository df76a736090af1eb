"""The engine of one machine: processes, each on a GPU of its own as far as there are GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread

import torch

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
from focuslib.experiments.shards import Shard
from focuslib.experiments.worker import Worker

_ENDS_FIRST = "its error is above; a script that starts workers runs under `if __name__ == '__main__':`"
_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, and CUDA forbids it


class LocalEngine:
    """Processes that share this machine's cores (see engine.Engine). make: makes what a process holds."""

    def __init__(self, workers: int, make: Callable[[], Work] = Worker):
        self.make, self.count = make, workers
        self.running: dict[str, Shard] = {}
        self.refused: list[str] = []
        self._hands: list[_Hand] = []

    @property
    def workers(self) -> int:
        return len(self._hands)

    def __enter__(self) -> LocalEngine:
        self._hands = [_Hand(number, self.count, self.make) for number in range(self.count)]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for hand in self._hands:
            hand.stop(at_once=kind is not None)
        self._hands, self.running = [], {}

    def run(self, queue: Queue) -> Iterator[tuple[Shard, Message]]:
        """See engine.Engine."""
        while True:
            for hand in list(self._hands):
                self._feed(hand, queue)
            busy = {hand.connection: hand for hand in self._hands if hand.given}
            if not busy:
                yield from refuse_rest(queue, self.refused)
                return
            for connection in wait(list(busy)):
                yield from self._receive(busy[connection], queue)  # type: ignore[index]

    def _feed(self, hand: _Hand, queue: Queue) -> None:
        """Give a worker the next shard, and one ahead while there are enough for the others."""
        while len(hand.given) < (AHEAD if len(queue) >= self.count else 1):
            shard = queue.take(hand.held)
            if shard is None:
                return
            try:
                hand.connection.send(shard)
            except OSError:  # it has died; the end of its connection will say so
                queue.put(shard, first=True)
                if not hand.given:
                    self._renew(hand)
                return
            hand.given.append(shard)
            self.running[hand.name] = hand.given[0]

    def _receive(self, hand: _Hand, queue: Queue) -> Iterator[tuple[Shard, Message]]:
        """What a worker has sent, or that it has died."""
        shard = hand.given[0]
        try:
            message = hand.connection.recv()
        except (EOFError, OSError):
            yield from self._lost(hand, queue)
            return
        if message is None:
            hand.starts = 0
            return
        if isinstance(message, Refused):
            self.refused.append(message.why)
            self._take_back(hand, queue)
            hand.stop()
            self._hands.remove(hand)
            return
        if isinstance(message, Report | Fault):
            hand.given.popleft()
            if hand.given:
                self.running[hand.name] = hand.given[0]
            else:
                self.running.pop(hand.name, None)
        yield shard, message

    def _lost(self, hand: _Hand, queue: Queue) -> Iterator[tuple[Shard, Message]]:
        """A process has ended. If it was there, the shard it was at may be why; the others wait again."""
        at = None if hand.starts else hand.given.popleft()
        self._take_back(hand, queue)
        self._renew(hand)
        if at is not None:
            yield at, Fault(DIED, again=True)

    def _renew(self, hand: _Hand) -> None:
        """Start a worker's process again, or give it up."""
        if not hand.restart():
            self._hands.remove(hand)
            self.refused.append(not_started(_ENDS_FIRST))

    def _take_back(self, hand: _Hand, queue: Queue) -> None:
        queue.take_back(hand.given, hand.held)
        hand.given.clear()
        self.running.pop(hand.name, None)


class _Hand:
    """The driver's end of a worker process.

    given: its shards, the one it is at first. starts: how often it was made and did not come; 0: it is there.
    """

    def __init__(self, number: int, count: int, make: Callable[[], Work]):
        self.number, self.count, self.make = number, count, make
        self.name = f"worker {number}"
        self.given: deque[Shard] = deque()
        self.held = Held()
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, self.number, self.count, self.make), daemon=True)
        with _quiet():
            self.process.start()
        theirs.close()  # else the end of the process would not end the connection

    def stop(self, at_once: bool = True) -> None:
        """End the process; it may end by itself where it has no shard."""
        if at_once or self.given:
            self.process.terminate()
        self.connection.close()  # at which it ends
        self.process.join()

    def restart(self) -> bool:
        """Start the process again; returns False if that was in vain before."""
        self.stop()
        if self.starts >= STARTS:
            return False
        self.start()
        return True


@contextmanager
def _quiet() -> Iterator[None]:
    """A process started here shows no bars, progress is the driver's: tqdm reads this when it is imported."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _serve(connection: Connection, number: int, count: int, make: Callable[[], Work]) -> None:
    """A worker process: answers the shards that come, until its parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the driver's, which ends the workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    work = make()
    with suppress(EOFError, BrokenPipeError):  # the driver needs it no longer
        connection.send(None)  # it is there
        while True:
            for message in messages(work, connection.recv()):
                connection.send(message)


def _end_with(parent: BaseProcess) -> None:
    """A worker whose parent was killed must not go on writing beside the next run's."""
    parent.join()
    os._exit(1)
