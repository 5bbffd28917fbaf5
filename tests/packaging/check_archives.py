"""Looks into the built sdists and wheels: ``python tests/packaging/check_archives.py DIST``.

Run by ``nox -s packaging`` after building. Every complaint is collected, so that one run shows them all.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
UNWANTED = re.compile(r"(^|/)(__pycache__|\.nox|\.venv|build|\.hypothesis)/|\.(pyc|o)$")


def sdist_members(path: Path) -> dict[str, bytes]:
    """File contents by path inside the archive's one top folder."""
    with tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {m.name.split("/", 1)[1]: archive.extractfile(m).read() for m in files}  # type: ignore[union-attr]


def wheel_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def tree_files(package: Path) -> set[str]:
    """What git holds or would add of a package, relative to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."]
    listed = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (package / name).is_file()}


def machine_paths(members: dict[str, bytes]) -> list[str]:
    """Files that name a folder of the machine that built them."""
    traces = [str(folder).encode() for folder in (ROOT, Path.home()) if len(folder.parts) > 1]
    pattern = re.compile(b"|".join(re.escape(trace) + rb"(?=[/\"'\s\0]|$)" for trace in traces))
    return [name for name, data in members.items() if pattern.search(data)]


def check_sdist(package: Path, members: dict[str, bytes]) -> list[str]:
    """What is wrong with the sdist of one package."""
    wrong = [f"lacks {name}" for name in sorted(tree_files(package) - set(members)) if name != ".gitignore"]
    wrong += [f"carries {name}" for name in members if UNWANTED.search(name)]
    wrong += [f"names a folder of this machine in {name}" for name in machine_paths(members)]
    if members.get("LICENSE") != (ROOT / "LICENSE").read_bytes():
        wrong.append("has no LICENSE, or another one than the repository")
    return wrong


def check_wheel(package: Path, members: dict[str, bytes]) -> list[str]:
    """What is wrong with the wheel of one package."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    tops = {name.split("/", 1)[0] for name in members}
    info = next(top for top in tops if top.endswith(".dist-info"))
    sources = {path.name for path in (package / "src").iterdir() if not path.name.startswith(("_", "."))}
    sources = {name for name in sources if not name.endswith(".egg-info")}

    wrong = [f"puts {name} beside its own modules" for name in sorted(tops - sources - {info})]
    wrong += [f"lacks {name}" for name in sorted(sources - tops)]
    wrong += [f"carries {name}" for name in members if UNWANTED.search(name)]
    wrong += [f"names a folder of this machine in {name}" for name in machine_paths(members)]
    in_tree = {name.removeprefix("src/") for name in tree_files(package) if name.startswith("src/")}
    wrong += [f"lacks {name}" for name in sorted(in_tree - set(members))]
    for name in sources:
        if "." not in name and f"{name}/py.typed" not in members:
            wrong.append(f"has no {name}/py.typed: type checkers would ignore its hints")
    if not any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in members):
        wrong.append("has no LICENSE")

    entry_points = configparser.ConfigParser(delimiters=("=",))
    entry_points.optionxform = str  # type: ignore[assignment,method-assign]
    entry_points.read_string(members.get(f"{info}/entry_points.txt", b"").decode())
    for group, declared in project.get("entry-points", {}).items():
        found = dict(entry_points[group]) if entry_points.has_section(group) else {}
        if found != declared:
            wrong.append(f"registers {found} under {group}; pyproject.toml declares {declared}")

    metadata = members[f"{info}/METADATA"].decode()
    for line in metadata.splitlines():
        if line.startswith("Requires-Dist: torch") and "==" in line:
            wrong.append(f"pins torch ({line}): it would replace the one that is installed")
    if not re.search(r"^Requires-Python: >=3\.10$", metadata, re.MULTILINE):
        wrong.append("does not declare Python >= 3.10")
    return wrong


def main(dist: Path) -> int:
    complaints: list[str] = []
    archives = sorted([*dist.glob("*.tar.gz"), *dist.glob("*.whl")])
    if not archives:
        complaints.append(f"no archive in {dist}")
    for path in archives:
        package = ROOT / "packages" / path.name.split("-")[0].replace("_", "-")
        if path.suffix == ".whl":
            members = wheel_members(path)
            wrong = check_wheel(package, members)
        else:
            members = sdist_members(path)
            wrong = check_sdist(package, members)
        size = f"{len(members)} files, {path.stat().st_size / 1024:.0f} KiB"
        print(f"{path.name}: {size}: {'WRONG' if wrong else 'as expected'}")
        complaints += [f"{path.name} {complaint}" for complaint in wrong]
    print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
