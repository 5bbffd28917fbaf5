"""Settings from the environment and from a TOML file: one typed table, read once per buffer.

A value that is not accepted is an error that names the variable or the file; nothing is read deep inside and nothing
is written to the environment behind the user's back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import SettingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_FILE = "deepep.toml"
MODES = ("normal", "low_latency")
RDMA_PROVIDERS = ("auto", "software", "nvshmem")
NVSHMEM_TRANSPORTS = ("ibrc", "ibgda", "ibdevx", "ucx", "libfabric", "none")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One environment variable: its name, what it accepts, and what it means."""

    name: str
    accepts: str
    meaning: str
    parse: Callable[[str], Any]


def _positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError(text)
    return value


def _int_between(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError(text)
        return value

    return parse


def _power_of_two(text: str) -> int:
    value = _positive_int(text)
    if value & (value - 1):
        raise ValueError(text)
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.strip().lower()]


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return parse


def _backend(text: str) -> dict[str, str]:
    """``nvlink`` for every mode it serves, or ``normal=nvlink,low_latency=ibgda``."""
    if "=" not in text:
        if not text.strip():
            raise ValueError(text)
        return {"": text.strip()}
    pairs = dict(part.split("=", 1) for part in text.split(","))
    chosen = {mode.strip(): name.strip() for mode, name in pairs.items()}
    if not set(chosen) <= set(MODES) or not all(chosen.values()):
        raise ValueError(text)
    return chosen


VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="DEEPEP_BACKEND",
        accepts="a backend's name, or normal=NAME,low_latency=NAME",
        meaning="the backend of buffers that name none",
        parse=_backend,
    ),
    Variable(
        name="DEEPEP_CONFIG",
        accepts="the path of a TOML file",
        meaning=f"the configuration file; without it {DEFAULT_FILE} in the working directory, if there is one",
        parse=str,
    ),
    Variable(
        name="DEEPEP_RANKS_PER_NODE",
        accepts="a positive integer",
        meaning="ranks of one node; without it the ranks on one host, at most 8",
        parse=_positive_int,
    ),
    Variable(
        name="DEEPEP_TIMEOUT_S",
        accepts="a positive number of seconds",
        meaning="deadline of every wait for another rank (100 s)",
        parse=_positive_float,
    ),
    Variable(
        name="DEEPEP_LL_REDUCE",
        accepts="rank or expert",
        meaning="where low-latency combine sums: on the expert's rank first (rank), or at the source only (expert)",
        parse=_one_of("rank", "expert"),
    ),
    Variable(
        name="DEEPEP_SYMMETRIC_HEAP_MB",
        accepts="a positive integer of MiB",
        meaning="memory that peers can reach, per buffer, if the backend has such (1024, or num_nvl_bytes if larger)",
        parse=_positive_int,
    ),
    Variable(
        name="DEEPEP_LOW_LATENCY_SMS",
        accepts="a positive integer",
        meaning="SMs of low-latency kernels, half of each (the backend's choice)",
        parse=_positive_int,
    ),
    Variable(
        name="DEEPEP_RDMA_PROVIDER",
        accepts="auto, software or nvshmem",
        meaning="who executes RDMA requests that kernels post: a NIC (nvshmem), or a thread of each process (software)",
        parse=_one_of(*RDMA_PROVIDERS),
    ),
    Variable(
        name="DEEPEP_NVSHMEM_WINDOW_MB",
        accepts="a positive number of MiB",
        meaning="backend nvshmem: memory for rows on their way to and from each other node, per buffer; the same on "
        "every rank (24, 32 for two nodes, less beyond nine)",
        parse=_positive_float,
    ),
    Variable(
        name="DEEPEP_NVSHMEM_INTERFACE",
        accepts="the name of a network interface",
        meaning="where ranks meet while NVSHMEM starts, over TCP (NVSHMEM's choice)",
        parse=str,
    ),
    Variable(
        name="DEEPEP_NVSHMEM_TRANSPORT",
        accepts="ibrc, ibgda, ibdevx, ucx, libfabric or none",
        meaning="what NVSHMEM uses between hosts (NVSHMEM's choice)",
        parse=_one_of(*NVSHMEM_TRANSPORTS),
    ),
    Variable(
        name="DEEPEP_NVSHMEM_SERVICE_LEVEL",
        accepts="an integer from 0 to 15",
        meaning="InfiniBand service level of NVSHMEM's traffic (NVSHMEM's choice)",
        parse=_int_between(0, 15),
    ),
    Variable(
        name="DEEPEP_NVSHMEM_QUEUE_PAIRS",
        accepts="a positive integer",
        meaning="queue pairs from each rank to each other one, with the transport ibgda (NVSHMEM's choice)",
        parse=_positive_int,
    ),
    Variable(
        name="DEEPEP_NVSHMEM_QUEUE_DEPTH",
        accepts="a power of two",
        meaning="requests that a queue pair holds (NVSHMEM's choice)",
        parse=_power_of_two,
    ),
    Variable(
        name="DEEPEP_NVSHMEM_HEAP_MB",
        accepts="a positive integer of MiB",
        meaning="NVSHMEM's symmetric heap, where it cannot grow (NVSHMEM's choice)",
        parse=_positive_int,
    ),
    Variable(
        name="DEEPEP_DEBUG",
        accepts="0 or 1",
        meaning="check values inside CUDA tensors too (expert numbers in range), at the price of a host wait",
        parse=_boolean,
    ),
)


@dataclass(frozen=True, kw_only=True)
class NvshmemSettings:
    """How NVSHMEM is started and what it carries, as in `VARIABLES`; ``None`` where nothing was said."""

    window_mb: float | None = None
    interface: str | None = None
    transport: str | None = None
    service_level: int | None = None
    queue_pairs: int | None = None
    queue_depth: int | None = None
    heap_mb: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the environment and the configuration file say; ``None`` where they say nothing.

    Attributes:
        backend: ``{"": name}`` for every mode the backend serves, or a name for each mode.
        ranks_per_node, symmetric_heap_mb, timeout_s, ll_reduce, low_latency_sms, rdma_provider, debug: as in
            `VARIABLES`.
        nvshmem: everything about NVSHMEM.
        tuning: ``{"dispatch": {num_ranks: {field: value}}, "combine": ...}`` as ``deepep tune`` wrote it.
        source: where ``backend`` came from, for messages.
    """

    backend: Mapping[str, str] | None = None
    ranks_per_node: int | None = None
    symmetric_heap_mb: int | None = None
    timeout_s: float | None = None
    ll_reduce: str | None = None
    low_latency_sms: int | None = None
    rdma_provider: str | None = None
    debug: bool = False
    nvshmem: NvshmemSettings = field(default_factory=NvshmemSettings)
    tuning: Mapping[str, Mapping[int, Mapping[str, int]]] = field(default_factory=dict)
    source: str = ""


def read_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The variables that are set, parsed. Raises `SettingError` naming a variable with a bad value."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        text = environ.get(variable.name)
        if text is None or text == "":
            continue
        try:
            values[variable.name] = variable.parse(text)
        except (ValueError, KeyError):
            raise SettingError(
                f"environment variable {variable.name} is {text!r}; it has to be {variable.accepts}."
            ) from None
    return values


def load(environ: Mapping[str, str] | None = None, directory: Path | None = None) -> Settings:
    """Settings of this process: the environment wins over the file.

    Raises:
        SettingError: naming the variable, or the file and key, with a value that is not accepted.
    """
    values = read_environment(environ)
    path = Path(values["DEEPEP_CONFIG"]) if "DEEPEP_CONFIG" in values else None
    if path is None:
        default = (directory or Path.cwd()) / DEFAULT_FILE
        path = default if default.is_file() else None
    table = _read_file(path) if path is not None else {}
    main: dict[str, Any] = table.get("deepep", {})
    backend = values.get("DEEPEP_BACKEND")
    source = "environment variable DEEPEP_BACKEND" if backend else f"file {path}" if "backend" in main else ""
    return Settings(
        backend=backend or main.get("backend"),
        ranks_per_node=values.get("DEEPEP_RANKS_PER_NODE", main.get("ranks_per_node")),
        symmetric_heap_mb=values.get("DEEPEP_SYMMETRIC_HEAP_MB", main.get("symmetric_heap_mb")),
        timeout_s=values.get("DEEPEP_TIMEOUT_S", main.get("timeout_s")),
        ll_reduce=values.get("DEEPEP_LL_REDUCE", main.get("ll_reduce")),
        low_latency_sms=values.get("DEEPEP_LOW_LATENCY_SMS", main.get("low_latency_sms")),
        rdma_provider=values.get("DEEPEP_RDMA_PROVIDER", main.get("rdma_provider")),
        debug=values.get("DEEPEP_DEBUG", main.get("debug", False)),
        nvshmem=NvshmemSettings(
            **{
                field.name: values.get(f"DEEPEP_NVSHMEM_{field.name.upper()}", table.get("nvshmem", {}).get(field.name))
                for field in fields(NvshmemSettings)
            }
        ),
        tuning=table.get("tuning", {}),
        source=source,
    )


_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "backend": (
        "a backend's name or a table with normal and low_latency",
        lambda v: (isinstance(v, str) and bool(v)) or (isinstance(v, dict) and set(v) <= set(MODES)),
    ),
    "ranks_per_node": ("a positive integer", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0),
    "symmetric_heap_mb": ("a positive integer", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0),
    "timeout_s": ("a positive number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0),
    "ll_reduce": ('"rank" or "expert"', lambda v: v in ("rank", "expert")),
    "low_latency_sms": ("a positive integer", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0),
    "rdma_provider": ('"auto", "software" or "nvshmem"', lambda v: v in RDMA_PROVIDERS),
    "debug": ("true or false", lambda v: isinstance(v, bool)),
}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            table: dict[str, Any] = tomllib.load(file)
    except OSError as error:
        raise SettingError(f"configuration file {path} cannot be read: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"configuration file {path} is not TOML: {error}.") from error
    unknown = set(table) - {"deepep", "nvshmem", "tuning"}
    if unknown:
        raise SettingError(f"{path}: unknown table {sorted(unknown)[0]!r}; accepted: deepep, nvshmem, tuning.")
    main = table.get("deepep", {})
    for key, value in main.items():
        if key not in _KEYS:
            raise SettingError(f"{path}: unknown key {key!r} in [deepep]; accepted: {', '.join(_KEYS)}.")
        accepts, is_accepted = _KEYS[key]
        if not is_accepted(value):
            raise SettingError(f"{path}: {key} in [deepep] is {value!r}; it has to be {accepts}.")
    if isinstance(main.get("backend"), str):
        main["backend"] = {"": main["backend"]}
    _check_nvshmem(path, table.get("nvshmem", {}))
    if "tuning" in table:
        table["tuning"] = _tuning(path, table["tuning"])
    return table


def _check_nvshmem(path: Path, table: Mapping[str, Any]) -> None:
    """What the table [nvshmem] may say is what the environment may say."""
    accepted = [field.name for field in fields(NvshmemSettings)]
    variables = {variable.name: variable for variable in VARIABLES}
    for key, value in table.items():
        if key not in accepted:
            raise SettingError(f"{path}: unknown key {key!r} in [nvshmem]; accepted: {', '.join(accepted)}.")
        variable = variables[f"DEEPEP_NVSHMEM_{key.upper()}"]
        try:
            is_accepted = type(value) in (int, float, str) and value != "" and variable.parse(str(value)) == value
        except ValueError:
            is_accepted = False
        if not is_accepted:
            raise SettingError(f"{path}: {key} in [nvshmem] is {value!r}; it has to be {variable.accepts}.")


def _tuning(path: Path, table: Any) -> dict[str, dict[int, dict[str, int]]]:
    tuning: dict[str, dict[int, dict[str, int]]] = {}
    try:
        for operation, by_ranks in table.items():
            if operation not in ("dispatch", "combine"):
                raise KeyError(operation)
            tuning[operation] = {
                int(num_ranks): {key: int(value) for key, value in row.items()} for num_ranks, row in by_ranks.items()
            }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingError(
            f"{path}: [tuning] has to be tables [tuning.dispatch.NUM_RANKS] and [tuning.combine.NUM_RANKS] of integers "
            f"({error!r}). Write it with `deepep tune`."
        ) from error
    return tuning
