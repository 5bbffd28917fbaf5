"""Ranks as processes: a pool of local ones for tests, the demo and the benchmark, and the way in under ``torchrun``.

Importing torch costs seconds and forking a process that has it costs milliseconds, so ranks are forked from one server
process that imported torch once, and a pool keeps them between runs::

    def add_up(context, value):
        total = torch.tensor([value + context.rank])
        torch.distributed.all_reduce(total, group=context.group)
        return int(total)

    with RankPool(4) as pool:
        assert pool.run(add_up, 1) == [10, 10, 10, 10]
        assert pool.run(add_up, 1, num_ranks=2) == [3, 3]

The function, its arguments and its results travel pickled through a pipe between this process and the processes it
started itself. Ranks never exchange pickles with one another.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

_START_TIMEOUT_S = 120.0
_GRACE_S = 10.0
_STACKS_TIMEOUT_S = 10.0
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_preloaded = dict.fromkeys(["torch", "torch.distributed", "deep_ep", __name__])


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """What a function that runs on every rank gets first.

    Attributes:
        rank, num_ranks: of this process in ``group``.
        group: the process group of all ranks that run the function.
        device: where this rank's tensors belong; for CUDA it is the current device already.
    """

    rank: int
    num_ranks: int
    group: dist.ProcessGroup
    device: torch.device


class RankFailure(RuntimeError):
    """The function failed on at least one rank.

    Attributes:
        failures: traceback, or what became of the process, of every rank that failed.
        results: what the other ranks returned.
    """

    def __init__(self, function: str, num_ranks: int, failures: Mapping[int, str], results: Mapping[int, Any]) -> None:
        self.failures = dict(sorted(failures.items()))
        self.results = dict(sorted(results.items()))
        by_text: dict[str, list[int]] = {}
        for rank, text in self.failures.items():
            by_text.setdefault(text.rstrip(), []).append(rank)
        parts = [
            f"--- rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ---\n{text}"
            for text, ranks in by_text.items()
        ]
        failed = f"{len(self.failures)} of {num_ranks} ranks"
        super().__init__(f"{function} failed on {failed}\n" + "\n".join(parts))


class RankPool:
    """Local ranks that stay alive between runs.

    Processes start at the first `run`. If a rank fails, all of them are replaced before the next run, because an
    interrupted collective leaves a group unusable. One run at a time; other threads wait.

    Args:
        max_ranks: processes to keep.
        device: ``"cpu"``, or ``"cuda"``: rank ``r`` gets GPU ``r`` modulo the number of GPUs.
        group_backend: what `torch.distributed.init_process_group` takes. Without it: gloo for CPU tensors, and NCCL for
            CUDA tensors where every rank has its own GPU (NCCL refuses to share one).
    """

    def __init__(
        self,
        max_ranks: int,
        *,
        device: str = "cpu",
        group_backend: str | None = None,
    ) -> None:
        if max_ranks < 1:
            raise ValueError(f"max_ranks is {max_ranks}; a pool needs at least one rank.")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device is {device!r}; a pool runs on 'cpu' or 'cuda'.")
        self.max_ranks = max_ranks
        self.device = device
        self.group_backend = group_backend if group_backend is not None else _default_backend(device, max_ranks)
        self._processes: _Processes | None = None
        self._lock = threading.Lock()
        self._multiprocessing = multiprocessing.get_context("forkserver")
        preload()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        num_ranks: int | None = None,
        timeout_s: float = 120.0,
        grace_s: float = _GRACE_S,
        environment: Mapping[str, str | None] | None = None,
    ) -> list[Any]:
        """Call ``function(context, *args)`` on each of the first ``num_ranks`` ranks.

        Args:
            function: importable by name, that is: defined at the top of a module.
            args: the same on every rank.
            num_ranks: 1 to ``max_ranks``; all without it.
            timeout_s: a rank that has not returned by then has failed.
            grace_s: once a rank has failed, how long the others may go on: what they return or raise helps, waiting
                for a deadline does not.
            environment: variables to set during this run, or to remove (``None``).

        Returns:
            What each rank returned, by rank.

        Raises:
            RankFailure: on any exception, early end or time-out of a rank, with every such rank's traceback.
        """
        num_ranks = self.max_ranks if num_ranks is None else num_ranks
        if not 1 <= num_ranks <= self.max_ranks:
            raise ValueError(f"num_ranks is {num_ranks}; this pool has 1 to {self.max_ranks} ranks.")
        task = _Task.of(function, num_ranks, dict(environment or {}))
        payload = pickle.dumps(args)
        with self._lock:
            if self._processes is None:
                self._processes = _Processes(self)
            try:
                self._processes.form_group(num_ranks)
                results, failures = self._processes.run(task, payload, num_ranks, timeout_s, grace_s)
            except BaseException:
                self._kill()
                raise
            if failures:
                self._kill()
                raise RankFailure(task.qualname, num_ranks, failures, results)
            return [results[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """End the processes. May be called twice; a later `run` starts new ones."""
        with self._lock:
            if self._processes is not None:
                self._processes.stop()
                self._processes = None

    def _kill(self) -> None:
        if self._processes is not None:
            self._processes.kill()
            self._processes = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def preload(*modules: str) -> None:
    """Let the server process import these modules too, so that no rank has to; it starts with the first rank."""
    _preloaded.update(dict.fromkeys(modules))
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_preloaded))


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    num_ranks: int,
    device: str = "cpu",
    timeout_s: float = 120.0,
    grace_s: float = _GRACE_S,
    group_backend: str | None = None,
    environment: Mapping[str, str | None] | None = None,
) -> list[Any]:
    """`RankPool.run` on a pool of its own, which ends with the call."""
    with RankPool(num_ranks, device=device, group_backend=group_backend) as pool:
        return pool.run(function, *args, timeout_s=timeout_s, grace_s=grace_s, environment=environment)


def launched_externally() -> bool:
    """Whether a launcher such as ``torchrun`` started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_external(device: str | torch.device | None = None) -> RankContext:
    """Join the group of the launcher that started this process (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...).

    Args:
        device: ``"cpu"``, ``"cuda"`` (GPU number ``LOCAL_RANK``) or one exact device; CUDA if there is any without it.
    """
    if not launched_externally():
        raise RuntimeError(
            "join_external needs RANK and WORLD_SIZE in the environment. Start this program with torchrun, or let "
            "run_ranks start local ranks."
        )
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        if str(chosen) == "cuda":  # no index
            local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
            chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    return RankContext(rank=dist.get_rank(), num_ranks=dist.get_world_size(), group=group, device=chosen)


# --- the starting process's side ------------------------------------------------------------------------------------


def _default_backend(device: str, max_ranks: int) -> str:
    if device == "cuda" and torch.cuda.device_count() >= max_ranks:
        return "cpu:gloo,cuda:nccl"
    return "gloo"


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Names a function so that another process finds it, also where its module is not on ``sys.path``."""

    module: str
    file: str | None
    qualname: str
    search_path: list[str]
    num_ranks: int
    environment: dict[str, str | None]

    @staticmethod
    def of(function: Callable[..., Any], num_ranks: int, environment: dict[str, str | None]) -> _Task:
        module, qualname = function.__module__, function.__qualname__
        if "<" in qualname:
            raise ValueError(
                f"{qualname} of {module} is defined inside another function, so no other process can find it. "
                "Move it to the top of its module."
            )
        file = getattr(sys.modules.get(module), "__file__", None)
        return _Task(
            module=module,
            file=file,
            qualname=qualname,
            search_path=list(sys.path),
            num_ranks=num_ranks,
            environment=environment,
        )

    def find(self) -> Callable[..., Any]:
        for entry in self.search_path:
            if entry not in sys.path:
                sys.path.append(entry)
        found: Any = self._module()
        for name in self.qualname.split("."):
            found = getattr(found, name)
        result: Callable[..., Any] = found
        return result

    def _module(self) -> Any:
        known = sys.modules.get(self.module)
        if known is not None and (self.file is None or getattr(known, "__file__", None) == self.file):
            return known
        with contextlib.suppress(ImportError):
            module = importlib.import_module(self.module)
            if self.file is None or getattr(module, "__file__", None) == self.file:
                return module
        # Two test folders may hold modules of one name; the file decides. What is a main module there is none here.
        name = "__mp_main__" if self.module == "__main__" else self.module
        spec = importlib.util.spec_from_file_location(name, self.file) if self.file else None
        if spec is None or spec.loader is None:
            raise ImportError(f"{self.module} cannot be imported on this rank")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.module] = module
        spec.loader.exec_module(module)
        return module


class _Processes:
    """The processes of a pool from their start to their end."""

    def __init__(self, pool: RankPool) -> None:
        self.max_ranks = pool.max_ranks
        self._directory = tempfile.TemporaryDirectory(prefix="deep_ep_ranks_")
        # This process serves the rendezvous, so that a free port is taken once and nobody else can grab it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._groups = {pool.max_ranks}
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        for rank in range(pool.max_ranks):
            ours, theirs = pool._multiprocessing.Pipe()
            process = pool._multiprocessing.Process(
                target=_serve,
                args=(
                    rank,
                    pool.max_ranks,
                    pool.device,
                    pool.group_backend,
                    self._store.port,
                    dict(os.environ),
                    self._stack_file(rank),
                    theirs,
                ),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._expect("the start of the ranks", range(pool.max_ranks))

    def form_group(self, num_ranks: int) -> None:
        """Let all ranks make the group of the first ``num_ranks``, once."""
        if num_ranks in self._groups:
            return
        for connection in self._connections:
            connection.send_bytes(b"group")
            connection.send_bytes(pickle.dumps(num_ranks))
        self._expect(f"the group of {num_ranks} ranks", range(self.max_ranks))
        self._groups.add(num_ranks)

    def run(
        self, task: _Task, payload: bytes, num_ranks: int, timeout_s: float, grace_s: float
    ) -> tuple[dict[int, Any], dict[int, str]]:
        for connection in self._connections[:num_ranks]:
            # A rank that ended by itself since the last run is found by `_collect`.
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(b"run")
                connection.send_bytes(pickle.dumps(task))
                connection.send_bytes(payload)
        return self._collect(range(num_ranks), timeout_s, grace_s)

    def stop(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"stop")
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            process.close()
            connection.close()
        self._processes, self._connections = [], []
        self._directory.cleanup()

    def _expect(self, what: str, ranks: Sequence[int]) -> None:
        results, failures = self._collect(ranks, _START_TIMEOUT_S, _GRACE_S)
        if failures:
            self.kill()
            raise RankFailure(what, self.max_ranks, failures, results)

    def _collect(self, ranks: Sequence[int], timeout_s: float, grace_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        """What each rank sent, and the text of each rank that failed."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = {self._connections[rank]: rank for rank in ranks}
        deadline = time.monotonic() + timeout_s
        while waiting:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                when = f"after {timeout_s:.0f} s" if not failures else f"{grace_s:.0f} s after the first failure"
                failures |= self._stacks(list(waiting.values()), when)
                break
            for connection in wait(list(waiting), timeout=remaining):
                rank = waiting.pop(connection)
                try:
                    succeeded, value = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(5.0)
                    failures[rank] = f"the process ended with exit code {self._processes[rank].exitcode}"
                    succeeded = False
                else:
                    (results if succeeded else failures)[rank] = value
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + grace_s)
        return results, failures

    def _stacks(self, ranks: Sequence[int], when: str) -> dict[int, str]:
        """Where each of these ranks is right now, by rank."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        # Each rank writes its own as soon as it gets a processor; what has not grown for a moment is complete.
        deadline = time.monotonic() + _STACKS_TIMEOUT_S
        before, stacks = [""], [self._stack_of(rank) for rank in ranks]
        while (stacks != before or not all(stacks)) and time.monotonic() < deadline:
            time.sleep(0.25)
            before, stacks = stacks, [self._stack_of(rank) for rank in ranks]
        return {
            rank: f"had not returned {when}; its threads were in:\n{stack or '(unknown)'}"
            for rank, stack in zip(ranks, stacks, strict=True)
        }

    def _stack_of(self, rank: int) -> str:
        path = Path(self._stack_file(rank))
        return path.read_text() if path.exists() else ""

    def _stack_file(self, rank: int) -> str:
        return os.path.join(self._directory.name, f"stacks_of_rank_{rank}.txt")


# --- a rank's side --------------------------------------------------------------------------------------------------


def _serve(
    rank: int,
    max_ranks: int,
    device_type: str,
    group_backend: str,
    port: int,
    environment: dict[str, str],
    stack_file: str,
    connection: Connection,
) -> None:
    """Life of one rank: join the group, then do what the pipe says until it closes."""
    # The starting process ends its ranks itself; an interrupt at the terminal reaches them too and only adds noise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The server process keeps the environment of its start.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        try:
            groups, device = _join(rank, max_ranks, device_type, group_backend, port)
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return
        connection.send_bytes(pickle.dumps((True, None)))
        with contextlib.suppress(EOFError, OSError):
            while (command := connection.recv_bytes()) != b"stop":
                if command == b"group":
                    answer = _attempt(_form_group, groups, pickle.loads(connection.recv_bytes()))
                else:
                    task = pickle.loads(connection.recv_bytes())
                    answer = _attempt(_perform, task, connection.recv_bytes(), groups, rank, device)
                connection.send_bytes(answer)
        faulthandler.unregister(signal.SIGUSR1)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _join(
    rank: int, max_ranks: int, device_type: str, group_backend: str, port: int
) -> tuple[dict[int, Any], torch.device]:
    torch.set_num_threads(1)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(group_backend, store=store, rank=rank, world_size=max_ranks)
    return {max_ranks: dist.group.WORLD}, device


def _form_group(groups: dict[int, Any], num_ranks: int) -> None:
    groups[num_ranks] = dist.new_group(list(range(num_ranks)))


def _perform(task: _Task, payload: bytes, groups: dict[int, Any], rank: int, device: torch.device) -> Any:
    function = task.find()  # first, because arguments may be of classes of that module
    args = pickle.loads(payload)
    context = RankContext(rank=rank, num_ranks=task.num_ranks, group=groups[task.num_ranks], device=device)
    with _environment(task.environment):
        return function(context, *args)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _attempt(function: Callable[..., Any], *args: Any) -> bytes:
    """The answer to send back: success and a result, or failure and a traceback."""
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException:  # the caller sees whatever ends the function, `SystemExit` and test outcomes included
        return pickle.dumps((False, traceback.format_exc()))
