"""NVSHMEM in this process: finding and starting its host library, and handing out its symmetric memory.

NVSHMEM belongs to the process, not to a buffer: it is started once, for one group of ranks, and serves every buffer on
those ranks. Stopping it and giving memory back to it are collective, and `Buffer.destroy` is not, so neither is done:
memory of destroyed buffers is kept for the next ones, and NVSHMEM ends with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from .backend import GroupFacts
from .errors import BackendUnavailableError, DeepEPError, PeerTimeoutError, SettingError
from .settings import NvshmemSettings

T = TypeVar("T")
logger = logging.getLogger("deep_ep")

SONAME = "libnvshmem_host.so.3"
LEAST_VERSION = (3, 4, 5)
_PHASE = "construction"
_MAX_PIECES = 256
_SAYS_MORE = "NVSHMEM_DEBUG=INFO says more"
_LATE = "took longer than"

# NVSHMEM's interface, as far as it is used here (host/nvshmemx_api.h, device_host/nvshmem_types.h). Structures begin
# with a version word and keep their size.
_INIT_WITH_UNIQUE_ID = 8
_UNIQUE_ID_BYTES, _ATTRIBUTES_BYTES, _ARGUMENTS_BYTES, _ARGUMENTS_OFFSET = 128, 144, 128, 16
_IS_BOOTSTRAPPED, _IS_INITIALIZED, _IS_LIMITED = 1, 2, 3
_ALIGNMENT = 4096

_TOKEN_BYTES = 16


# --- the library ----------------------------------------------------------------------------------------------------


def find_library() -> Path:
    """The host library: in the folder that ``NVSHMEM_DIR`` names, else in NVSHMEM's wheel.

    Raises `BackendUnavailableError`.
    """
    if directory := os.environ.get("NVSHMEM_DIR"):
        path = Path(directory) / "lib" / SONAME
        if not path.is_file():
            raise BackendUnavailableError(
                f"NVSHMEM_DIR is {directory!r}, which has no lib/{SONAME}. Correct or unset it"
            )
        return path
    found = importlib.util.find_spec("nvidia.nvshmem") if importlib.util.find_spec("nvidia") is not None else None
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(place) / "lib" / SONAME
        if path.is_file():
            return path
    raise BackendUnavailableError(
        "NVSHMEM is not installed. Install nvidia-nvshmem-cu13 or nvidia-nvshmem-cu12, as torch.version.cuda says "
        "(the extras [cu13] and [cu12] of deepep-nvshmem), or name its folder in NVSHMEM_DIR"
    )


_loaded: dict[str, ctypes.CDLL] = {}


def load_library() -> ctypes.CDLL:
    """The host library, its symbols visible to extensions that are loaded later. Touches no GPU and starts nothing.

    Raises `BackendUnavailableError` if it is absent, does not load, or has another version than is needed.
    """
    path = str(find_library())
    if path not in _loaded:
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise BackendUnavailableError(
                f"NVSHMEM's host library does not load: {error}. Reinstall its package"
            ) from error
        _check_version(library, path)
        library.nvshmem_align.restype = ctypes.c_void_p
        library.nvshmem_align.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
        _loaded[path] = library
    return _loaded[path]


def _check_version(library: ctypes.CDLL, path: str) -> None:
    numbers = [ctypes.c_int(), ctypes.c_int(), ctypes.c_int()]
    library.nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    version = tuple(number.value for number in numbers)
    least, major = ".".join(map(str, LEAST_VERSION)), LEAST_VERSION[0]
    if not LEAST_VERSION <= version < (major + 1,):
        raise BackendUnavailableError(
            f"NVSHMEM {'.'.join(map(str, version))} is installed ({path}), and {least} or a later {major}.x is needed. "
            f"Install 'nvidia-nvshmem-cu13>={least},<{major + 1}', or -cu12"
        )


# --- the settings ---------------------------------------------------------------------------------------------------


def variables_of(settings: NvshmemSettings) -> dict[str, str]:
    """The settings in NVSHMEM's own variables, which are its only way to be told."""
    if settings.transport == "ibgda":
        variables = {"NVSHMEM_IB_ENABLE_IBGDA": "1"}
    else:
        variables = {"NVSHMEM_REMOTE_TRANSPORT": settings.transport} if settings.transport else {}
    for name, value in (
        ("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", settings.interface),
        ("NVSHMEM_IB_SL", settings.service_level),
        ("NVSHMEM_IBGDA_NUM_RC_PER_PE", settings.queue_pairs),
        ("NVSHMEM_QP_DEPTH", settings.queue_depth),
        ("NVSHMEM_SYMMETRIC_SIZE", settings.heap_mb and settings.heap_mb << 20),
    ):
        if value is not None:
            variables[name] = str(value)
    return variables


@contextlib.contextmanager
def _told(settings: NvshmemSettings) -> Iterator[None]:
    """NVSHMEM's variables hold what the settings say, inside; a variable that says otherwise is an error."""
    variables = variables_of(settings)
    for name, value in variables.items():
        if os.environ.get(name, value) != value:
            raise SettingError(
                f"environment variable {name} is {os.environ[name]!r} and the settings (DEEPEP_NVSHMEM_...) say "
                f"{value!r}. Leave one of them unset."
            )
    added = [name for name in variables if name not in os.environ]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


# --- the process's NVSHMEM ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Process:
    """What this process knows about its NVSHMEM.

    Attributes:
        pid: of the process that wrote this; a forked one starts afresh.
        token: tells this process from every other one.
        group: the processes that NVSHMEM was started for, in their order; empty before.
        failure: why NVSHMEM cannot be started any more.
        pieces: address and size of all memory, in the order of allocation, which is the same on every rank.
        used: numbers of the pieces that buffers hold.
    """

    pid: int
    token: bytes
    group: bytes = b""
    failure: str = ""
    pieces: list[tuple[int, int]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)


_process: _Process | None = None
_lock = threading.RLock()


def _this_process() -> _Process:
    global _process
    if _process is None or _process.pid != os.getpid():
        _process = _Process(pid=os.getpid(), token=secrets.token_bytes(_TOKEN_BYTES))
    return _process


class SymmetricPiece:
    """Memory at the same place of NVSHMEM's heap on every rank; nobody else uses it until `close`.

    Attributes:
        ptr: its address on this rank.
        num_bytes: its size.
    """

    def __init__(self, process: _Process, number: int) -> None:
        self._process, self._number = process, number
        self.ptr, self.num_bytes = process.pieces[number]
        process.used.add(number)

    def close(self) -> None:
        """Leave it to a later buffer. Local, idempotent; no kernel of this rank may be using it.

        It is used again only when every rank has closed it.
        """
        with _lock:
            self._process.used.discard(self._number)
            self._number = -1


def start(facts: GroupFacts, *, settings: NvshmemSettings, timeout_s: float, backend: str) -> ctypes.CDLL:
    """Start NVSHMEM for these ranks, if that has not been done; gives its host library. Collective.

    Args:
        backend: who asks, for the text of an error.

    Raises:
        BackendUnavailableError: on every rank, in the same words, if NVSHMEM cannot serve these ranks.
    """
    with _lock:
        process, channel = _this_process(), facts.channel
        exchange = Exchange(facts, timeout_s, backend)
        # Who is here, first of all: NVSHMEM itself waits without a deadline.
        tokens = channel.all_gather(process.token, phase=_PHASE, timeout_s=timeout_s)
        group = hashlib.blake2b(b"".join(tokens), digest_size=16).digest()
        exchange.attempt(lambda: _check(facts, process, group))
        library = load_library()
        if not process.group:
            _start(library, facts, settings, exchange)
            process.group = group
        return library


def allocate(
    facts: GroupFacts, *, num_bytes: int, settings: NvshmemSettings, timeout_s: float, backend: str
) -> SymmetricPiece:
    """Memory for one buffer; starts NVSHMEM if that has not been done. Collective.

    Args:
        num_bytes: the same on every rank.

    The rest, and what is raised, as in `start`.
    """
    with _lock:
        library = start(facts, settings=settings, timeout_s=timeout_s, backend=backend)
        exchange = Exchange(facts, timeout_s, backend)
        return SymmetricPiece(_this_process(), _piece(library, facts, _this_process(), num_bytes, exchange))


def _check(facts: GroupFacts, process: _Process, group: bytes) -> None:
    """Raise what keeps this process's NVSHMEM from serving this group."""
    library = load_library()
    if process.failure:
        raise BackendUnavailableError(
            f"NVSHMEM failed before on rank {facts.rank} ({process.failure}). Start new processes"
        )
    if process.group and process.group != group:
        raise BackendUnavailableError(
            f"NVSHMEM of rank {facts.rank}'s process serves another group: it is rank {library.nvshmem_my_pe()} of "
            f"{library.nvshmem_n_pes()} there. NVSHMEM serves one group of processes, in one order, while they live. "
            "Build all buffers of this backend on that group, or start new processes"
        )
    if not process.group and library.nvshmemx_init_status() >= _IS_INITIALIZED:
        _check_place(library, facts, "was started by other code in this process")


def _check_place(library: ctypes.CDLL, facts: GroupFacts, how: str) -> None:
    place = (int(library.nvshmem_my_pe()), int(library.nvshmem_n_pes()))
    if place != (facts.rank, facts.num_ranks):
        raise BackendUnavailableError(
            f"NVSHMEM {how}, and rank {facts.rank} of {facts.num_ranks} is PE {place[0]} of {place[1]} there. Both "
            "have to count the same ranks in the same order"
        )


def _start(library: ctypes.CDLL, facts: GroupFacts, settings: NvshmemSettings, exchange: Exchange) -> None:
    is_running = library.nvshmemx_init_status() >= _IS_INITIALIZED
    running = facts.channel.all_agree(is_running, phase=_PHASE, timeout_s=exchange.timeout_s)
    if all(running):
        if variables_of(settings):
            logger.warning("NVSHMEM was started by other code in this process; DEEPEP_NVSHMEM_... has no effect on it")
        return
    unique_id = ctypes.create_string_buffer(_UNIQUE_ID_BYTES)

    def prepare() -> None:
        if any(running):
            raise BackendUnavailableError(
                f"NVSHMEM runs already on rank {running.index(True)} and not on rank {running.index(False)}. "
                "Start it on all ranks or leave it to this library"
            )
        with _told(settings):
            if facts.rank == 0:
                struct.pack_into("<i", unique_id, 0, (1 << 16) + _UNIQUE_ID_BYTES)
                _check_status(library.nvshmemx_get_uniqueid(unique_id), "did not make an id for the group")

    exchange.attempt(prepare)
    everybodys = facts.channel.all_gather(unique_id.raw, phase=_PHASE, timeout_s=exchange.timeout_s)

    def start_host_library() -> None:
        with _told(settings):
            _bounded(lambda: _init(library, facts, everybodys[0]), facts, exchange.timeout_s, "starting NVSHMEM")

    exchange.attempt(start_host_library, is_last_chance=True)
    logger.info("NVSHMEM serves %d ranks (%s)", facts.num_ranks, find_library())


def _init(library: ctypes.CDLL, facts: GroupFacts, unique_id: bytes) -> None:
    own_id = ctypes.create_string_buffer(unique_id, _UNIQUE_ID_BYTES)
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    struct.pack_into("<i", attributes, 0, (1 << 16) + _ATTRIBUTES_BYTES)
    struct.pack_into("<i", attributes, _ARGUMENTS_OFFSET, (1 << 16) + _ARGUMENTS_BYTES)
    status = library.nvshmemx_set_attr_uniqueid_args(facts.rank, facts.num_ranks, own_id, attributes)
    # Not nvshmemx_init_attr, which ends the process where this one returns.
    _check_status(status or library.nvshmemx_hostlib_init_attr(_INIT_WITH_UNIQUE_ID, attributes), "did not start")
    state = library.nvshmemx_init_status()
    if state == _IS_LIMITED:
        raise BackendUnavailableError(
            "several ranks share a GPU, which NVSHMEM serves only in part. Give each a GPU, or run them under CUDA's "
            "MPS with CUDA_MPS_ACTIVE_THREAD_PERCENTAGE so low that those of a GPU add up to 100"
        )
    if state < (_IS_INITIALIZED if facts.device.type == "cuda" else _IS_BOOTSTRAPPED):
        raise BackendUnavailableError(f"NVSHMEM met its peers and did not set up a GPU (state {state}). {_SAYS_MORE}")
    _check_place(library, facts, "was started")


def _check_status(status: int, what: str) -> None:
    if status != 0:
        raise BackendUnavailableError(f"NVSHMEM {what} (status {status}). {_SAYS_MORE}")


def _piece(library: ctypes.CDLL, facts: GroupFacts, process: _Process, num_bytes: int, exchange: Exchange) -> int:
    """The number of a piece that is free on every rank, or of a new one."""
    if process.pieces:
        # What this rank sent from a piece that it has closed is delivered before anybody uses that piece again.
        late = f"delivering what rank {facts.rank} sent"
        exchange.attempt(lambda: _bounded(library.nvshmem_quiet, facts, exchange.timeout_s, late))
    fits = [n not in process.used and size >= num_bytes for n, (_, size) in enumerate(process.pieces)]
    own = sum(1 << n for n, fit in enumerate(fits) if fit).to_bytes(_MAX_PIECES // 8, "little")
    everybodys = facts.channel.all_gather(own, phase=_PHASE, timeout_s=exchange.timeout_s)
    common = (1 << _MAX_PIECES) - 1
    for mask in everybodys:
        common &= int.from_bytes(mask, "little")
    if common:
        # The smallest that is large enough; pieces are alike on all ranks, so all find the same.
        return min((n for n in range(len(fits)) if common >> n & 1), key=lambda n: (process.pieces[n][1], n))

    new = 0

    def allocate_new() -> None:
        nonlocal new
        if len(process.pieces) == _MAX_PIECES:
            raise BackendUnavailableError(f"{_MAX_PIECES} buffers hold memory of NVSHMEM. Destroy some of them")
        new = _bounded(
            lambda: library.nvshmem_align(_ALIGNMENT, num_bytes), facts, exchange.timeout_s, "getting memory of NVSHMEM"
        )
        if not new:
            raise BackendUnavailableError(
                f"NVSHMEM on rank {facts.rank} has no {num_bytes >> 20} MiB left. Use a smaller window "
                "(DEEPEP_NVSHMEM_WINDOW_MB), or a larger heap (DEEPEP_NVSHMEM_HEAP_MB)"
            )

    exchange.attempt(allocate_new)
    process.pieces.append((new, num_bytes))
    return len(process.pieces) - 1


def _bounded(call: Callable[[], Any], facts: GroupFacts, timeout_s: float, what: str) -> Any:
    """Make a call that may wait for peers for ever; after the deadline a thread is left to wait."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if facts.device.type == "cuda":
                torch.cuda.set_device(facts.device)  # belongs to the thread, and NVSHMEM takes the current one
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"deep_ep: {what}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise PeerTimeoutError(f"{what} {_LATE} {timeout_s:.0f} s on rank {facts.rank}", phase=_PHASE)
    return results[0]


class Exchange:
    """Steps that have to succeed on every rank: one rank's failure is everybody's, in the same words."""

    def __init__(self, facts: GroupFacts, timeout_s: float, backend: str) -> None:
        self._facts, self.timeout_s, self._backend = facts, timeout_s, backend

    def attempt(self, step: Callable[[], T], *, is_last_chance: bool = False) -> T:
        """Make the step; all ranks do. Gives what the step gave.

        After a rank has waited in vain for the others NVSHMEM cannot be used any more; after a last chance that failed
        it cannot either.
        """
        text, cause, result = "", None, None
        try:
            result = step()
        except DeepEPError as error:
            text, cause = str(error), error
        # A rank that has waited in vain is late by its deadline.
        texts = self._facts.channel.gather_texts(text, phase=_PHASE, timeout_s=self.timeout_s * 1.25 + 5)
        failed = [text for text in texts if text]
        if not failed:
            return cast(T, result)
        # Who failed says more than those who waited for it.
        first = next((text for text in failed if _LATE not in text), failed[0])
        if is_last_chance or any(_LATE in text for text in failed):
            _this_process().failure = first
        raise BackendUnavailableError(f"backend '{self._backend}': {first.rstrip('.')}.") from cause
