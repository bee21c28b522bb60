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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_of_the_readme_run(tmp_path):
    blocks = [block for block in BLOCKS if not block.startswith("make ")]
    assert len(blocks) == len(BLOCKS) - 1 >= 3
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    script = "set -euo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming runs/tiny at step 60" in done.stdout
    generated = re.findall(r"^def main\(.*", done.stdout, re.MULTILINE)
    assert len(generated) == 3
    assert generated[0] == generated[1] == generated[2]  # ours, transformers', and ours after the import
