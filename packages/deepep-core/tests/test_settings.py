"""Settings from the environment and from a file: what is accepted, what wins, and what a bad value is told."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from deep_ep import SettingError, settings
from deep_ep.settings import NvshmemSettings

ACCEPTED = {
    "window_mb": (0.5, 32),
    "interface": ("eth0", "ib0"),
    "transport": ("ibrc", "ibgda"),
    "service_level": (0, 15),
    "queue_pairs": (1, 4),
    "queue_depth": (64, 1024),
    "heap_mb": (1, 2048),
}
REFUSED = {
    "window_mb": ("0", "-1", "inf", "much"),
    "transport": ("tcp", "IBRC"),
    "service_level": ("16", "-1", "0.5"),
    "queue_pairs": ("0", "many"),
    "queue_depth": ("0", "63", "0x40"),
    "heap_mb": ("0", "1.5"),
}


def test_every_setting_of_nvshmem_has_a_variable() -> None:
    names = {f"DEEPEP_NVSHMEM_{field.name.upper()}" for field in fields(NvshmemSettings)}
    assert names == {v.name for v in settings.VARIABLES if v.name.startswith("DEEPEP_NVSHMEM_")}
    assert set(ACCEPTED) == {field.name for field in fields(NvshmemSettings)}
    assert settings.load({}, Path("/nowhere")).nvshmem == NvshmemSettings()


@pytest.mark.parametrize("name", ACCEPTED)
def test_environment_wins_over_the_file(tmp_path: Path, name: str) -> None:
    in_file, in_environment = ACCEPTED[name]
    (tmp_path / "deepep.toml").write_text(f"[nvshmem]\n{name} = {in_file!r}\n")
    assert settings.load({}, tmp_path).nvshmem == NvshmemSettings(**{name: in_file})
    environment = {f"DEEPEP_NVSHMEM_{name.upper()}": str(in_environment)}
    assert settings.load(environment, tmp_path).nvshmem == NvshmemSettings(**{name: in_environment})


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in REFUSED.items() for text in texts])
def test_bad_value_is_an_error_that_names_variable_or_file_and_key(tmp_path: Path, name: str, text: str) -> None:
    variable = f"DEEPEP_NVSHMEM_{name.upper()}"
    with pytest.raises(SettingError, match=f"environment variable {variable} is '{text}'; it has to be"):
        settings.load({variable: text}, tmp_path)
    is_number = text.lstrip("-").replace(".", "").isdigit()
    (tmp_path / "deepep.toml").write_text(f"[nvshmem]\n{name} = {text if is_number else repr(text)}\n")
    with pytest.raises(SettingError, match=rf"deepep\.toml: {name} in \[nvshmem\] is .*; it has to be"):
        settings.load({}, tmp_path)


@pytest.mark.parametrize("line", ["window_mb = true", "service_level = '3'", "interface = 5", "interface = ''"])
def test_file_takes_no_value_of_another_type(tmp_path: Path, line: str) -> None:
    (tmp_path / "deepep.toml").write_text(f"[nvshmem]\n{line}\n")
    with pytest.raises(SettingError, match=r"in \[nvshmem\] is"):
        settings.load({}, tmp_path)


def test_unknown_key_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "deepep.toml").write_text("[nvshmem]\nqps = 3\n")
    with pytest.raises(SettingError, match="unknown key 'qps' in \\[nvshmem\\]; accepted: window_mb, interface"):
        settings.load({}, tmp_path)
