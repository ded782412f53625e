"""Layers finished side by side, in processes of this machine; the caller finds them in its store."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from logging import LogRecord
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from rk_export.errors import RkExportError
from rk_export.progress import Bar, stage
from rk_export.rewrite.layer_work import LayerWork, collect_logs, log_of, say, unpacked

logger = logging.getLogger(__name__)

# Rounds without a finished layer after which processes are not started again.
_FRUITLESS = 2


def finish_in_processes(work: LayerWork, folder: Path, workers: int) -> None:
    """Finish the missing layers of a model in several processes; what a killed one had goes to another.

    Each process takes its share of this one's threads, and a GPU of its own where there are several.

    Args:
        work: What to do.
        folder: As in `LayerWork.packed`.
        workers: How many processes.

    Raises:
        RkExportError: One of ours from a process, or processes end again and again before a layer is finished.
        OSError: The disk is full.
    """
    packed, fruitless = work.packed(folder), 0
    missing = work.missing
    title = f"finishing layers in {min(workers, len(missing))} processes"
    with stage(title, work.source.layer_count, work.source.layer_count - len(missing)) as bar:
        while missing:
            _round(packed, missing, _devices(work.device, min(workers, len(missing))), bar)
            left = work.missing
            fruitless = fruitless + 1 if left == missing else 0
            if fruitless == _FRUITLESS:
                raise RkExportError(
                    f"the process that had it ended {fruitless} times before any layer was finished",
                    where=f"layer {left[0]}",
                    fix="give less --workers if memory ran out; a script of your own must call this below "
                    'if __name__ == "__main__"',
                )
            if left:
                logger.warning(
                    "a worker was killed: %d layers go to new ones, from layer %d", len(left), left[0]
                )
            missing = left


def _devices(device: torch.device, workers: int) -> list[str]:
    """Return the device of each process."""
    if device.type != "cuda" or device.index is not None:
        return [str(device)] * workers
    return [f"cuda:{number % torch.cuda.device_count()}" for number in range(workers)]


def _round(packed: bytes, layers: Sequence[int], devices: Sequence[str], bar: Bar) -> None:
    """Have processes finish layers until all are, or one of the processes is killed."""
    context = multiprocessing.get_context("spawn")  # a forked process may hang in OpenMP
    # Nothing is ever sent: the other end closes when this process lets go of it, or ends in any way.
    theirs, ours = context.Pipe(duplex=False)
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    pool = ProcessPoolExecutor(len(devices), context, _begin, (packed, queue, threads, theirs))
    try:
        for future in as_completed([pool.submit(_finish, index) for index in layers]):
            say(future.result())
            bar.advance()
        pool.shutdown()
    except BrokenProcessPool:
        logger.debug("the processes end together", exc_info=True)
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        theirs.close()


@dataclass
class _Worker:
    """What a process was given when it began; the work is unpacked with the first layer, so that errors reach the user.

    Args:
        packed: From `LayerWork.packed`.
        device: Its own.
    """

    packed: bytes
    device: str

    @cached_property
    def work(self) -> LayerWork:
        """What to do to each layer."""
        return replace(unpacked(self.packed), device=torch.device(self.device))


_worker: _Worker | None = None  # of this process, where it is one


def _begin(packed: bytes, devices: SimpleQueue[str], threads: int, parent: Connection) -> None:
    """Make a process ready for layers."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that asked ends the others
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")
    collect_logs()
    _worker = _Worker(packed, devices.get())


def _end_with(parent: Connection) -> None:
    """End this process when the one that asked is gone: nobody waits for the layer any more."""
    try:
        parent.recv()
    except EOFError:
        os._exit(1)


def _finish(index: int) -> list[LogRecord]:
    if _worker is None:
        raise RuntimeError("`_begin` comes first")
    return log_of(_worker.work, index)
