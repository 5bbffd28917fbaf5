"""Finding backends by entry point and choosing one for each mode, alike on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from stevedore import driver, exception, extension

from .backend import (
    ENTRY_POINT_GROUP,
    Backend,
    BufferOptions,
    Environment,
    GroupFacts,
    LowLatencyBackend,
    Mode,
    NormalBackend,
    Obstacle,
    Opened,
    RequestedModes,
)
from .channel import Channel
from .errors import ArgumentError, BackendNotFoundError, BackendUnavailableError, DeepEPError, SettingError

logger = logging.getLogger("deep_ep")

FIRST_PARTY: Mapping[str, str] = {
    "reference": "deepep-reference",
    "nvlink": "deepep-nvshmem",
    "nvshmem": "deepep-nvshmem",
    "ibgda": "deepep-ibgda",
}
"""Backends that ``auto`` may choose, and the distribution that holds each. Others are used only by name."""

AUTO = "auto"


def installed_names() -> list[str]:
    """Names of all installed backends, without loading any."""
    manager = extension.ExtensionManager.__new__(extension.ExtensionManager)
    manager.namespace = ENTRY_POINT_GROUP
    return sorted({entry.name for entry in manager.list_entry_points()})


def load(name: str) -> type[Backend]:
    """The backend class registered as ``name``.

    Raises:
        BackendNotFoundError: nothing of that name is installed; the text names the distribution to install.
        BackendUnavailableError: it is installed and does not load; the cause is chained.
    """
    failures: list[BaseException] = []
    try:
        manager: driver.DriverManager[type[Backend]] = driver.DriverManager(
            ENTRY_POINT_GROUP,
            name,
            invoke_on_load=False,
            on_load_failure_callback=lambda _manager, _entry, error: failures.append(error),
            on_missing_entrypoints_callback=lambda _names: None,
            conflict_resolver=extension.error_on_conflict,
        )
    except exception.MultipleMatches as error:
        raise BackendUnavailableError(
            f"several installed packages register a backend named {name!r}: {error}. Uninstall all but one."
        ) from error
    except exception.NoMatches:
        if failures:
            raise BackendUnavailableError(
                f"backend {name!r} is installed but does not load: {type(failures[0]).__name__}: {failures[0]}"
            ) from failures[0]
        cure = (
            f"Install the package {FIRST_PARTY[name]}." if name in FIRST_PARTY else "Install the package that has it."
        )
        raise BackendNotFoundError(
            f"No backend named {name!r} is installed (found: {', '.join(installed_names()) or 'none'}). {cure}"
        ) from None
    backend = manager.driver
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendUnavailableError(
            f"the entry point {name!r} of {ENTRY_POINT_GROUP} is {backend!r}; it has to be a subclass of "
            "deep_ep.backend.Backend."
        )
    return backend


def local_environment(
    *,
    num_ranks: int | None = None,
    num_nodes: int | None = None,
    device_of_rank: tuple[int, ...] | None = None,
) -> Environment:
    """Facts for `Backend.probe` about this process; creates no CUDA context."""
    num_gpus = torch.cuda.device_count()
    return Environment(
        device_type="cuda" if num_gpus else "cpu",
        num_gpus=num_gpus,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        device_of_rank=device_of_rank,
    )


def obstacles(
    backend: type[Backend], environment: Environment, *, mode: Mode | None = None, options: BufferOptions | None = None
) -> list[Obstacle]:
    """What keeps ``backend`` from serving: its declared limits first, then its own probe."""
    found: list[Obstacle] = []
    can = backend.capabilities
    if mode is not None and mode not in can.modes:
        found.append(Obstacle(cause=f"it does not serve {mode} mode", cure="Choose another backend for this mode"))
    if environment.device_type not in can.devices:
        found.append(
            Obstacle(
                cause=f"it needs {' or '.join(sorted(can.devices))} tensors and this process has only "
                f"{environment.device_type}",
                cure="Run on a machine with GPUs, or use the backend 'reference'",
            )
        )
    if can.max_ranks is not None and (environment.num_ranks or 0) > can.max_ranks:
        found.append(
            Obstacle(
                cause=f"it serves at most {can.max_ranks} ranks, the group has {environment.num_ranks}",
                cure="Use a smaller group or another backend",
            )
        )
    if not can.multi_node and (environment.num_nodes or 1) > 1:
        found.append(
            Obstacle(
                cause=f"it serves one node, the group spans {environment.num_nodes}",
                cure="Use a backend for several nodes",
            )
        )
    if mode == "low_latency" and options is not None and options.enable_shrink and not can.rank_masks:
        found.append(
            Obstacle(cause="it has no rank masks (enable_shrink)", cure="Build the buffer without enable_shrink")
        )
    return found or backend.probe(environment)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The open backends of one buffer.

    Attributes:
        names: backend of each mode that is open.
        auto: modes whose backend was not asked for by name.
    """

    names: Mapping[Mode, str]
    auto: frozenset[Mode]
    normal: NormalBackend | None
    low_latency: LowLatencyBackend | None


def parse_request(backend: str | Mapping[str, str] | None) -> dict[str, str]:
    """A backend argument as ``{mode: name}``; the mode ``""`` means every mode that the backend serves."""
    if backend is None:
        return {}
    if isinstance(backend, str):
        return {} if backend == AUTO else {"": backend}
    if isinstance(backend, Mapping) and set(backend) <= {"", "normal", "low_latency"}:
        return {mode: name for mode, name in backend.items() if name != AUTO}
    raise ArgumentError(
        f"backend is {backend!r}; it has to be a name or a dict with the keys 'normal' and 'low_latency'."
    )


def choose(
    request: Mapping[str, str],
    modes: tuple[Mode, ...],
    environment: Environment,
    facts: GroupFacts,
    options: BufferOptions,
) -> Chosen:
    """Choose and open a backend for each mode. Collective; the same outcome, or the same error, on every rank."""
    names: dict[Mode, str] = {}
    auto: set[Mode] = set()
    channel, timeout_s = facts.channel, options.timeout_s

    by_name = _agree(channel, timeout_s, lambda: _named(request, modes, environment, options))
    for mode, name in by_name.items():
        names[mode] = name
    open_modes: dict[str, list[Mode]] = {}
    for mode in modes:
        if mode in names:
            open_modes.setdefault(names[mode], []).append(mode)
    opened: dict[Mode, Opened] = {}
    for name, its_modes in open_modes.items():
        result = _open(name, its_modes, facts, options)
        opened.update(dict.fromkeys(its_modes, result))

    for mode in modes:
        if mode in names:
            continue
        auto.add(mode)
        refused: dict[str, str] = {}
        candidates = _candidates(mode, environment, options, channel, timeout_s, refused)
        for name in candidates:
            # A backend that is already open for the other mode is opened again: modes own separate memory.
            try:
                opened[mode] = _open(name, [mode], facts, options)
            except BackendUnavailableError as error:
                refused[name] = str(error)
                continue
            names[mode] = name
            break
        else:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items()) or "none is installed"
            raise BackendUnavailableError(
                f"no backend can serve {mode} mode for this group ({reasons}). Install deepep-reference, "
                "which runs anywhere."
            )
        others = "".join(f"; {other} cannot: {why}" for other, why in refused.items())
        lower = candidates[candidates.index(names[mode]) + 1 :]
        others += "".join(f"; {other} could, and has to be named" for other in lower)
        logger.info("backend %s serves %s mode%s", names[mode], mode, others)
        if names[mode] == "reference" and environment.device_type == "cuda":
            logger.warning(
                "%s mode falls back to the slow backend 'reference' on CUDA tensors%s",
                mode,
                others or "; no kernel backend is installed",
            )
    return Chosen(
        names=names,
        auto=frozenset(auto),
        normal=opened["normal"].normal if "normal" in opened else None,
        low_latency=opened["low_latency"].low_latency if "low_latency" in opened else None,
    )


def _named(
    request: Mapping[str, str], modes: tuple[Mode, ...], environment: Environment, options: BufferOptions
) -> dict[Mode, str]:
    """Backends asked for by name, checked on this rank."""
    named: dict[Mode, str] = {}
    for key, name in request.items():
        backend = load(name)
        wanted = [mode for mode in modes if mode == key or key == ""]
        if key == "":
            served = [mode for mode in wanted if mode in backend.capabilities.modes and mode not in request]
            if not served and not any(mode in request for mode in modes):
                # It serves none of the buffer's modes: say so for the first of them.
                served = wanted[:1]
            wanted = served
        for mode in wanted:
            found = obstacles(backend, environment, mode=mode, options=options)
            if found:
                raise BackendUnavailableError(
                    f"backend {name!r} cannot serve {mode} mode here: {'; '.join(map(str, found))}."
                )
            named[mode] = name
    return named


_KINDS: dict[str, type[DeepEPError]] = {
    kind.__name__: kind for kind in (BackendNotFoundError, BackendUnavailableError, ArgumentError, SettingError)
}


def _agree(channel: Channel, timeout_s: float, choose_locally: Callable[[], dict[Mode, str]]) -> dict[Mode, str]:
    """Run a rank's own choice and compare with all: one rank's error becomes everybody's, in the same words."""
    chosen: dict[Mode, str] = {}
    cause: DeepEPError | None = None
    try:
        chosen = choose_locally()
        text = "ok|" + "|".join(f"{mode}={name}" for mode, name in sorted(chosen.items()))
    except DeepEPError as error:
        kind = type(error).__name__ if type(error).__name__ in _KINDS else "BackendUnavailableError"
        text = f"{kind}|{error}"
        cause = error
    texts = channel.gather_texts(text, phase="construction", timeout_s=timeout_s, max_bytes=2048)
    failed = [(rank, t) for rank, t in enumerate(texts) if not t.startswith("ok|")]
    if failed:
        rank, first = failed[0]
        kind_name, _, message = first.partition("|")
        others = f" (first seen on rank {rank} of {channel.num_ranks})" if channel.num_ranks > 1 else ""
        raise _KINDS[kind_name](message + others) from cause
    if len(set(texts)) > 1:
        listing = "; ".join(f"rank {r}: {t.removeprefix('ok|') or AUTO}" for r, t in enumerate(texts))
        raise ArgumentError(f"ranks ask for different backends ({listing}). Ask for the same on every rank.")
    return chosen


def _candidates(
    mode: Mode,
    environment: Environment,
    options: BufferOptions,
    channel: Channel,
    timeout_s: float,
    refused: dict[str, str],
) -> list[str]:
    """First-party backends that every rank could use for ``mode``, best first; fills ``refused`` with the others."""
    able: list[tuple[int, str]] = []
    for name in installed_names():
        if name not in FIRST_PARTY:
            continue
        try:
            backend = load(name)
            if mode not in backend.capabilities.modes:
                continue
            found = obstacles(backend, environment, mode=mode, options=options)
        except BackendUnavailableError as error:
            refused[name] = str(error)
            continue
        if found:
            refused[name] = "; ".join(map(str, found))
        else:
            able.append((backend.capabilities.priority, name))
    own = [name for _, name in sorted(able, reverse=True)]
    everybody = [
        text.split(",") for text in channel.gather_texts(",".join(own), phase="construction", timeout_s=timeout_s)
    ]
    common = [name for name in everybody[0] if name and all(name in names for names in everybody)]
    for name in own:
        if name not in common:
            missing = [r for r, names in enumerate(everybody) if name not in names]
            refused[name] = f"rank {missing[0]} cannot use it"
    return common


def _open(name: str, modes: list[Mode], facts: GroupFacts, options: BufferOptions) -> Opened:
    result = load(name).open(facts, options, RequestedModes(modes=frozenset(modes)))
    for mode in modes:
        if getattr(result, mode) is None:
            raise BackendUnavailableError(
                f"backend {name!r} declares {mode} mode and opened none. Report this to its author."
            )
    return result
