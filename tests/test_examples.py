"""The examples run and find what they claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def test_losses_over_ranks_equal_those_of_one_process() -> None:
    done = run(EXAMPLES / "train_moe.py", "--ranks", "2", "--steps", "14")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses agree" in done.stdout


def test_training_with_wrong_gradients_is_found(tmp_path: Path) -> None:
    source = (EXAMPLES / "train_moe.py").read_text()
    wrong = source.replace("parameter.grad /= num_ranks", "parameter.grad /= 1 if is_expert else num_ranks")
    assert wrong != source
    copy = tmp_path / "examples" / "train_moe.py"
    copy.parent.mkdir()
    copy.write_text(wrong)
    (tmp_path / "text.md").write_bytes(b"".join(f.read_bytes() for f in sorted(EXAMPLES.glob("*")) if f.is_file()) * 2)
    done = run(copy, "--ranks", "2", "--steps", "25")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "THE LOSSES DIFFER" in done.stdout
