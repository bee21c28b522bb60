"""One run in a folder at a time."""

import fcntl
import os
from pathlib import Path


class RunLock:
    """An advisory lock on a run's folder; the system drops it when the process ends, however it ends."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / ".lock"
        self._file: int | None = None

    def take(self) -> None:
        """Make the folder where needed and lock it. Raises ValueError when another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"{self.path.parent}: another process is training there; stop it, or choose another run.dir"
            ) from None

    def release(self) -> None:
        """Let go of what this process holds, if anything."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
