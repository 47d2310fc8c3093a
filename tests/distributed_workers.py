"""Processes that run functions of the tests as the ranks of a world, started once and used by many tests."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

RANKS = 4
TIMEOUT = 20
"""Seconds until a collective that not all ranks take part in fails."""
DIED = (False, "the process died")


class RankError(AssertionError):
    """A rank raised, or did not answer."""


class Workers:
    """``RANKS`` idle processes."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 2 * TIMEOUT) -> list[Any]:
        """What a module-level function returns on each rank of a gloo world of ``ranks``, made for this call.

        Raises:
            RankError: with the traceback of every rank that raised; or a rank did not answer within ``timeout`` seconds.
        """
        with tempfile.TemporaryDirectory() as directory:
            message = pickle.dumps((ranks, f"file://{Path(directory) / 'store'}", function, args))
            for pipe in self._pipes[:ranks]:
                pipe.send_bytes(message)
            answers = self._answers(ranks, time.monotonic() + timeout)
        silent = [rank for rank, answer in enumerate(answers) if answer is None]
        if silent or any(answer == DIED for answer in answers):
            self.stop()
            self._start()
        errors = [f"rank {rank}:\n{answer[1]}" for rank, answer in enumerate(answers) if answer and not answer[0]]
        if silent or errors:
            hung = [f"ranks {silent} of {function.__name__} did not answer in {timeout} s"] if silent else []
            raise RankError("\n".join(hung + errors))
        return [answer[1] for answer in answers if answer]

    def _answers(self, ranks: int, until: float) -> list[tuple[bool, Any] | None]:
        answers: list[tuple[bool, Any] | None] = [None] * ranks
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:ranks])}
        while waiting and time.monotonic() < until:
            for pipe in connection.wait(list(waiting), timeout=max(until - time.monotonic(), 0)):
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = DIED
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _serve(pipe: connection.Connection, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            ranks, store, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            timeout = timedelta(seconds=TIMEOUT)
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))
