"""Ranks that are slower than the others, from the pace in their heartbeats: no collective is added.

None are found on GPUs, where a rank's own time is not known (`pretrain.heartbeat.Heartbeat`).
"""

import time
from pathlib import Path
from statistics import median_high
from typing import Any

from launch.rundir import append_line, heartbeat_file, read_json
from pretrain.heartbeat import WRITE_SECONDS, Heartbeat
from pretrain.history import now

FILE = "stragglers.jsonl"
SLOWER = 1.3  # times the others' median, of the time that a rank does not wait for others
SHARE = 0.1  # of the step that this costs at least


class Stragglers:
    """Rank 0 reads the paces of all ranks once a window of steps, and logs those that stand out twice in a row: in
    `stragglers.jsonl` and, when they begin to, on the console.
    """

    def __init__(self, run_dir: Path, size: int) -> None:
        self.run_dir, self.size = run_dir, size
        self._window, self._due = 0, 0.0
        self._before, self._known = set[int](), set[int]()

    def look(self, beat: Heartbeat) -> None:
        """Called often; does something once the other ranks' files hold the paces of a window."""
        if beat.window != self._window and not self._due:  # else they would put the look off for ever
            self._window, self._due = beat.window, time.monotonic() + 2 * WRITE_SECONDS
        if not 0 < self._due <= time.monotonic():
            return
        self._due = 0.0
        found = {rank: read_json(heartbeat_file(self.run_dir, rank)) for rank in range(self.size)}
        slow = find_stragglers({rank: pace for rank, pace in found.items() if pace and pace.get("window")})
        lasting = [row for row in slow if row["rank"] in self._before]
        for row in lasting:
            append_line(self.run_dir / FILE, {"time": now(), "step": beat.step, **row})
            if row["rank"] not in self._known:
                print(
                    f"straggler: rank {row['rank']} on {row['host']} takes {row['seconds']:.3g} s a step of its own, "
                    f"the others {row['median']:.3g} s" + (", most of it waiting for data" if row["data"] else ""),
                    flush=True,
                )
        self._before, self._known = {row["rank"] for row in slow}, {row["rank"] for row in lasting}


def find_stragglers(beats: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of heartbeats by rank those that hold the others up: {"rank", "host", "seconds" a step, "median" of the others,
    "data": whether waiting for data takes most of it}. Beats without "own_s" are left out.
    """
    rows = []
    known = {rank: beat for rank, beat in beats.items() if beat["own_s"] is not None}
    for rank, beat in known.items():
        others = [each["own_s"] for other, each in known.items() if other != rank]
        if not others:
            continue
        usual = median_high(others)
        if beat["own_s"] > SLOWER * usual and beat["own_s"] - usual > SHARE * beat["step_s"]:
            data = beat["data_s"] > beat["own_s"] / 2
            rows.append(
                {"rank": rank, "host": beat["host"], "seconds": beat["own_s"], "median": round(usual, 4), "data": data}
            )
    return rows
