"""The README's commands, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"quickstart", "test"} <= named <= targets


def run(blocks: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    script = "set -euo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=1180, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_of_the_readme_run(tmp_path):
    blocks = [block for block in BLOCKS if not block.startswith("make ") and "digits" not in block]
    assert len(blocks) == len(BLOCKS) - 2 >= 3
    done = run(blocks, tmp_path)
    assert "resuming runs/tiny at step 60" in done.stdout
    generated = re.findall(r"^def main\(.*", done.stdout, re.MULTILINE)
    assert len(generated) == 3
    assert generated[0] == generated[1] == generated[2]  # ours, transformers', and ours after the import


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_digits_of_the_readme(tmp_path, monkeypatch):
    """Also what it promises: held-out digits are named and captioned."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = run([block for block in BLOCKS if "digits" in block], tmp_path)
    shares = [float(share) for share in re.findall(r"of 367 right \((.*)%\)", done.stdout)]
    assert len(shares) == 3 and "as llava:" in done.stdout
    assert shares[0] >= 90 and min(shares[1:]) >= 85
    assert all((tmp_path / f"digits-{page}.html").read_text().count("<figure") == 367 for page in ("clip", "vlm"))
