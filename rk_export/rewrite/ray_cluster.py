"""Layers finished side by side by the nodes of a Ray cluster, which share their storage with this machine.

Ray gives a layer whose worker died to another one. A finished layer comes back as files in the store.
"""

from __future__ import annotations

import functools
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any

from rk_export.errors import InputError, RkExportError
from rk_export.manifest import library_versions
from rk_export.progress import Bar, stage
from rk_export.rewrite.layer_work import LayerWork, collect_logs, log_of, say, unpacked

_RETRIES = 3  # of a layer whose worker died
_KNOCK_SECONDS = 10


@dataclass(frozen=True)
class _Shared:
    """What a node must have in common with the machine that asks.

    Args:
        marker: A file that was just made where layers are kept.
        versions: Of the libraries that decide the result.
    """

    marker: Path
    versions: dict[str, str]

    def check(self) -> None:
        """Refuse a node that would make something else, or put it elsewhere.

        Raises:
            InputError: Names the node.
        """
        node = socket.gethostname()
        if not self.marker.is_file():
            raise InputError(
                f"the node {node} does not see this folder",
                where=str(self.marker.parent),
                fix="put output and model on storage that all nodes mount at the same path",
            )
        here = library_versions()
        if other := sorted(name for name, version in self.versions.items() if here.get(name) != version):
            raise InputError(
                f"the node {node} has another version of {', '.join(other)}",
                where="--ray",
                fix="install the same versions on all nodes",
            )


def finish_on_cluster(work: LayerWork, folder: Path, address: str) -> None:
    """Finish the missing layers of a model on a cluster.

    Args:
        work: What to do.
        folder: As in `LayerWork.packed`; the nodes see it.
        address: Of the cluster: HOST:PORT of its head, or auto.

    Raises:
        InputError: If Ray is not installed, the cluster is not reached, or a node does not see the files.
        RkExportError: One of ours from a node, or a layer whose workers die again and again.
        OSError: The disk is full.
    """
    missing = work.missing
    with _connected(address) as ray, tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as marker:
        shared = _Shared(Path(marker.name).resolve(), library_versions())
        needs = {"num_gpus": 1} if work.device.type == "cuda" else {"num_cpus": 1}
        finish = ray.remote(max_retries=_RETRIES, **needs)(_finish)
        packed = ray.put(work.packed(folder))
        pending = {finish.remote(packed, shared, index): index for index in missing}
        title = f"finishing layers on the cluster {address}"
        with stage(title, work.source.layer_count, work.source.layer_count - len(missing)) as bar:
            try:
                _collect(ray, pending, bar)
            finally:
                for reference in pending:
                    ray.cancel(reference, force=True)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Give the module of Ray while this process is connected to a cluster; a connection that was there stays."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed", where="--ray", fix="pip install 'rk-export[ray]', on every node"
        ) from error
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            _knock(address)
            ray.init(address=address, logging_level=WARNING, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"no Ray cluster is reached there: {reason}",
                where=f"--ray {address}",
                fix="start one with `ray start --head`, and give the HOST:PORT that it prints",
            ) from error
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def _knock(address: str) -> None:
    """Find out at once whether somebody listens at HOST:PORT: Ray itself tries for a quarter of an hour.

    Raises:
        OSError: Nobody does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _collect(ray: Any, pending: dict[Any, int], bar: Bar) -> None:
    """Wait for the layers; what is finished leaves `pending`."""
    while pending:
        (done, *_), _ = ray.wait(list(pending))
        index = pending.pop(done)
        try:
            say(ray.get(done))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RkExportError | OSError):
                raise error.cause from None
            if isinstance(error.cause, ModuleNotFoundError):
                raise InputError(
                    f"a node cannot load rk-export: {error.cause}",
                    where="--ray",
                    fix="install the same rk-export on all nodes",
                ) from error
            raise
        except ray.exceptions.WorkerCrashedError as error:
            raise RkExportError(
                f"the process that had it ended {_RETRIES + 1} times before it was finished",
                where=f"layer {index}",
                fix="give the nodes more memory, or look into Ray's logs",
            ) from error
        bar.advance()


def _finish(packed: bytes, shared: _Shared, index: int) -> list[LogRecord]:
    """Finish a layer, in a process of a node."""
    shared.check()
    return log_of(_work_of(packed), index)


@functools.lru_cache(maxsize=1)
def _work_of(packed: bytes) -> LayerWork:
    """Return the work, unpacked once in a process, whose logs go to the process that asks from now on."""
    collect_logs()
    return unpacked(packed)
