"""One run in a folder at a time."""

import fcntl
import json
import os
import platform
from contextlib import suppress
from pathlib import Path


class RunLock:
    """An advisory lock on a run's folder; the system drops it when the process ends, however it ends.

    Its file names the holder, {"host", "pid"}, and is empty where the last one let go of it.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / ".lock"
        self._file: int | None = None

    def take(self) -> None:
        """Make the folder where needed and lock it. Raises ValueError when another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"{self.path.parent}: another process is training there; stop it, or choose another run.dir"
            ) from None
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode())

    def release(self) -> None:
        """Let go of what this process holds, if anything."""
        if self._file is not None:
            with suppress(OSError):  # a folder that is gone must not hide what ended the run
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None
