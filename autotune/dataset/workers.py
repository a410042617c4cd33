"""Makes blocks of lines in several processes, and gives them back in order."""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from autotune.dataset.lines import Block
from autotune.dataset.making import Made, Recipe, RowMaker
from autotune.errors import AutotuneError, SetupFaultError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

# Below this starting processes takes longer than they save.
PARALLEL_BYTES = 8 << 20
_MAX_WORKERS = 32
_PR_SET_PDEATHSIG = 1
_JOIN_S = 5.0

Make = Callable[[Iterable[Block]], Iterator[Made]]


def usable_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0))


@contextmanager
def makers(recipe: Recipe, size_bytes: int) -> Iterator[Make]:
    """Give a function that makes blocks in order: here for small data, else in processes.

    Raises:
        InputMissingError: the tokenizer cannot be loaded, or lacks a chat template.
        SetupFaultError: a process died.
    """
    count = min(usable_cores(), _MAX_WORKERS)
    if size_bytes < PARALLEL_BYTES or count == 1:
        yield lambda blocks: map(RowMaker(recipe).make, blocks)
        return
    pool = _Pool(recipe, count)
    try:
        yield pool.make
    finally:
        pool.close()


class _Pool:
    """Processes that each make one block at a time.

    A block is sent only to a process that waits for one: with both sides sending, neither would
    read.
    """

    def __init__(self, recipe: Recipe, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, SpawnProcess] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, recipe, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = process

    def make(self, blocks: Iterable[Block]) -> Iterator[Made]:
        """Yield what each block becomes, in the order of the blocks."""
        waiting = enumerate(blocks)
        at_work: dict[Connection, int] = {}
        done: dict[int, Made] = {}
        turn = 0
        for connection in self._workers:
            self._receive(connection)
            self._hand_out(connection, waiting, at_work)
        while at_work:
            ready: list[Any] = list(wait(list(at_work)))
            for connection in ready:
                done[at_work.pop(connection)] = self._receive(connection)
                self._hand_out(connection, waiting, at_work)
            while turn in done:
                yield done.pop(turn)
                turn += 1

    def _hand_out(
        self,
        connection: Connection,
        waiting: Iterator[tuple[int, Block]],
        at_work: dict[Connection, int],
    ) -> None:
        following = next(waiting, None)
        if following is not None:
            number, block = following
            connection.send(block)
            at_work[connection] = number

    def _receive(self, connection: Connection) -> Made:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionError):
            process = self._workers[connection]
            process.join(_JOIN_S)
            msg = (
                f"a process that tokenises died (exit status {process.exitcode}): a negative status"
                " is a signal, and -9 mostly means that the host ran out of memory"
            )
            raise SetupFaultError(msg) from None
        if isinstance(answer, AutotuneError):
            raise answer
        made: Made = answer
        return made

    def close(self) -> None:
        for connection, process in self._workers.items():
            connection.close()
            process.terminate()
        for process in self._workers.values():
            process.join(_JOIN_S)


def _work(connection: Connection, recipe: Recipe, parent: int) -> None:
    """Answer each block; the first answer says that the tokenizer is loaded, or why it is not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # A terminal's Ctrl-C goes to all; the parent decides and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        maker = RowMaker(recipe)
    except AutotuneError as error:
        connection.send(error)
        return
    connection.send(None)
    # Nothing that is made of a row refers to itself, so looking for cycles would find none.
    gc.freeze()
    gc.disable()
    while True:
        try:
            block = connection.recv()
        except EOFError:
            return
        connection.send(maker.make(block))
