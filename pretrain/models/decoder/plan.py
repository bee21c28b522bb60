"""How a decoder is spread over processes."""

from typing import Any

from parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a decoder with this config."""
    return Plan(blocks="layers.*")
