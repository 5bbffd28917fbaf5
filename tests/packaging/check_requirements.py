"""Asks the package index whether every requirement can be met on each Python: ``check_requirements.py 3.10 3.11 ...``.

Run by ``nox -s packaging``. Nothing is installed. torch and its CUDA libraries are left out, because which of them fits
is the user's choice and a look at them costs gigabytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def requirements(python_version: str) -> list[str]:
    """What all packages and their extras require on that Python, beside each other and torch."""
    projects = [tomllib.loads(path.read_text())["project"] for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
    own = {project["name"] for project in projects}
    lists = [part for p in projects for part in (p["dependencies"], *p.get("optional-dependencies", {}).values())]
    wanted = {}
    for requirement in (Requirement(text) for texts in lists for text in texts):
        applies = requirement.marker is None or requirement.marker.evaluate({"python_version": python_version})
        if applies and requirement.name not in own and not requirement.name.startswith(("torch", "nvidia-")):
            wanted[requirement.name] = f"{requirement.name}{requirement.specifier}"
    return sorted(wanted.values())


def main(python_versions: list[str]) -> int:
    failed = 0
    for version in python_versions:
        wanted = requirements(version)
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--dry-run",
                "--no-deps",
                "--ignore-installed",
                "--quiet",
            ]
            command += ["--target", folder, "--only-binary=:all:", f"--python-version={version}", *wanted]
            done = subprocess.run(command, capture_output=True, text=True)
        print(f"Python {version}: {', '.join(wanted)}: {'can be met' if done.returncode == 0 else 'CANNOT BE MET'}")
        if done.returncode:
            failed += 1
            print(done.stderr, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
