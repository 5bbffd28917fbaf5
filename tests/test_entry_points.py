"""A backend from a repository of its own is installed from its folder, found, chosen, used and held to the suite."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parent / "fixtures" / "miniature-backend"

USE = """
import os, sys
import torch
import torch.distributed as dist
from deep_ep import Buffer, registry

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
buffer = Buffer(dist.group.WORLD, *eval(sys.argv[1], {}), **eval(sys.argv[2], {}))
x = torch.arange(32, dtype=torch.bfloat16).view(2, 16)
per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(torch.tensor([[0, 3], [-1, -1]]), 4)
recv_x, _, _, _, handle, _ = buffer.dispatch(
    x, num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank
)
assert torch.equal(recv_x, x[:1])
combined, _, _ = buffer.combine(recv_x, handle)
assert torch.equal(combined, torch.stack([x[0], torch.zeros_like(x[1])]))
print(buffer.backends["normal"], buffer.backends.get("low_latency", ""), type(buffer._normal_backend).__module__)
buffer.destroy()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages into which pip installed the miniature backend, as a user would."""
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip and hatchling to build the miniature backend without a network")
    source = tmp_path_factory.mktemp("checkout") / "miniature-backend"
    shutil.copytree(FIXTURE, source)
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=300)
    return target


@pytest.fixture
def program(installed, tmp_path):
    """Runs Python with the installed backend on the path, in a directory of its own."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEEPEP_")}
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean | {"PYTHONPATH": str(installed), "GLOO_SOCKET_IFNAME": "lo"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def chosen(finished: subprocess.CompletedProcess[str]) -> list[str]:
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


def test_installed_backend_is_listed_without_being_loaded(program):
    listing = "import sys; from deep_ep import registry; print(*registry.installed_names())"
    finished = program("-c", f"{listing}; assert 'miniature_backend' not in sys.modules")
    assert "miniature" in chosen(finished)


def test_backend_is_chosen_by_argument(program):
    assert chosen(program("-c", USE, "()", "{'backend': 'miniature'}")) == ["miniature", "miniature_backend"]


def test_backend_is_chosen_by_environment_variable(program):
    finished = program("-c", USE, "()", "{}", DEEPEP_BACKEND="miniature")
    assert chosen(finished) == ["miniature", "miniature_backend"]


def test_backend_is_chosen_by_the_file_an_environment_variable_names(program, tmp_path):
    (tmp_path / "settings.toml").write_text('[deepep]\nbackend = "miniature"\n')
    finished = program("-c", USE, "()", "{}", DEEPEP_CONFIG=str(tmp_path / "settings.toml"))
    assert chosen(finished) == ["miniature", "miniature_backend"]


def test_backend_is_chosen_by_the_file_in_the_working_directory(program, tmp_path):
    (tmp_path / "deepep.toml").write_text('[deepep]\nbackend = "miniature"\n')
    assert chosen(program("-c", USE, "()", "{}")) == ["miniature", "miniature_backend"]


def test_backend_of_others_is_never_chosen_unasked(program):
    assert chosen(program("-c", USE, "()", "{}"))[0] == "reference"


def test_mode_that_the_backend_does_not_serve_goes_to_another(program):
    options = "{'low_latency_mode': True, 'backend': 'miniature'}"
    assert chosen(program("-c", USE, "(0, 1 << 16)", options)) == ["miniature", "reference", "miniature_backend"]


def test_mode_that_the_backend_does_not_serve_cannot_be_asked_of_it(program):
    options = "{'low_latency_mode': True, 'backend': {'low_latency': 'miniature'}}"
    finished = program("-c", USE, "(0, 1 << 16)", options)
    assert finished.returncode != 0
    assert "backend 'miniature' cannot serve low_latency mode here" in finished.stderr


def test_backend_passes_the_conformance_suite_from_its_own_folder(program, tmp_path):
    tests = tmp_path / "miniature-backend" / "tests"
    shutil.copytree(FIXTURE / "tests", tests)
    finished = program("-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", str(tests))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = finished.stdout.strip().splitlines()[-1]
    num_passed = int(summary.split(" passed")[0].split()[-1])
    assert num_passed >= 40, finished.stdout
    assert "does not serve low_latency mode" in finished.stdout, "skipped parts say why"


def test_suite_finds_a_mistake_in_a_backend(program, installed, tmp_path):
    """The same suite on the same backend with one mistake: the sum forgets the second bias."""
    broken = tmp_path / "broken"
    shutil.copytree(installed, broken)
    module = broken / "miniature_backend" / "__init__.py"
    sound = module.read_text()
    assert "for bias in request.biases:" in sound
    module.write_text(sound.replace("for bias in request.biases:", "for bias in request.biases[:1]:"))
    tests = tmp_path / "tests"
    shutil.copytree(FIXTURE / "tests", tests)
    finished = program(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "biases", str(tests), PYTHONPATH=str(broken)
    )
    assert finished.returncode == 1, finished.stdout
    assert "2 failed, 4 passed" in finished.stdout, finished.stdout
    assert "combined_x differs in" in finished.stdout
