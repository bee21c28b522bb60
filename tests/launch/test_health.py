"""Health checks of real ranks, with planted faults."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from launch.health import examine, report
from launch.local import free_port
from launch.rundir import read_json
from launch.verdicts import judge
from tests.ranks import run_ranks

SLOW_SECONDS = 9.0


def check(good, other):
    """Four ranks: 1 takes another folder for the run's, 2 is slow, the clock of 3 is an hour ahead."""
    rank = dist.get_rank()
    faults = {
        2: {"matmul": lambda _device: SLOW_SECONDS},
        3: {"clock": lambda: time.time() + 3600},
    }
    return examine(other if rank == 1 else good, rank, host=f"n{rank}", **faults.get(rank, {}))


@pytest.fixture(scope="module")
def checked(tmp_path_factory, tiny_shards):
    folder = tmp_path_factory.mktemp("health")
    run_dir, other = folder / "run", folder / "elsewhere"
    for path in (run_dir, other):
        path.mkdir()
    (run_dir / "submitted.toml").write_text(f'[[data.sources]]\nshards = "{tiny_shards}/train-*.tar"\n')
    return run_dir, run_ranks(check, 4, run_dir, other)


def test_each_planted_fault_is_named_with_its_host(checked):
    findings = judge(checked[1][0])
    by_host = {
        (each["host"], each["kind"]) for each in findings if each["kind"] not in ("twice", "link", "memory", "slow")
    }
    assert by_host == {("n1", "folder"), ("n3", "clock")}
    assert ("n2", "slow") in {(each["host"], each["kind"]) for each in findings}
    texts = " ".join(each["text"] for each in findings)
    assert "rank 3 on n3: its clock is +3600" in texts
    assert "rank 1 on n1 does not see the run's folder" in texts


def test_nodes_that_are_one_machine_are_told(checked):
    assert sum(each["kind"] == "twice" for each in judge(checked[1][0])) == 3


def test_what_is_measured(checked):
    ranks = checked[1][0]
    assert [facts["rank"] for facts in ranks] == [0, 1, 2, 3]
    assert checked[1][1] == ranks, "every rank gets what all said"
    assert [facts["link"]["to"] for facts in ranks] == [1, 2, 3, 0]
    for facts in ranks:
        assert facts["memory_gb"] > 0 and facts["device"] and facts["driver"]
        assert 0 < facts["latency_s"] < 5 and facts["bytes_per_s"] > 1e4
        assert 0 < facts["link"]["latency_s"] < 5 and facts["link"]["bytes_per_s"] > 1e4
    assert abs(ranks[1]["clock_s"]) < 0.5
    assert next(iter(ranks[0]["shards"].values())) > 1000 and ranks[0]["shards"] == ranks[2]["shards"]
    assert not (checked[0] / ".health").exists()


@pytest.mark.parametrize(("policy", "left_out"), [("warn", []), ("exclude", ["n1", "n2"])])
def test_sick_nodes_are_left_out_where_the_policy_says_so(checked, tmp_path, policy, left_out):
    ranks = [facts | {"matmul_s": SLOW_SECONDS if facts["rank"] == 2 else 0.01} for facts in checked[1][0]]
    ranks = [facts | {"memory_gb": 1.0, "link": facts["link"] | {"bytes_per_s": 1e9}} for facts in ranks]
    report(tmp_path, policy, ranks, judge(ranks), 1.0)
    assert read_json(tmp_path / "health.json")["exclude"] == left_out


def facts_of(rank, **changed):
    base = {
        "rank": rank, "host": f"n{rank}", "machine": f"m{rank}", "device_index": 0, "device": "H100", "driver": "1",
        "memory_gb": 70.0, "clock_s": 0.0, "matmul_s": 0.01, "sees_folder": True, "shards": {"a-*.tar": 5},
        "link": {"to": (rank + 1) % 4, "latency_s": 1e-5, "bytes_per_s": 1e10},
    }  # fmt: skip
    return base | changed


@pytest.mark.parametrize(
    ("rank", "changed", "kind", "sick"),
    [
        (1, {"memory_gb": 20.0}, "memory", True),
        (2, {"shards": {"a-*.tar": -1}}, "shards", True),
        (2, {"matmul_s": 0.02}, "slow", True),
        (2, {"driver": "2"}, "device", False),
        (3, {"clock_s": -1.0}, "clock", False),
        (3, {"machine": "m2", "device_index": 1}, "twice", False),
        (3, {"machine": "m2", "host": "n2"}, "twice", False),
        (0, {"link": {"to": 1, "latency_s": 1e-5, "bytes_per_s": 1e9}}, "link", False),
    ],
)
def test_verdicts(rank, changed, kind, sick):
    ranks = [facts_of(i) for i in range(4)]
    assert judge(ranks) == []
    ranks[rank] |= changed
    assert [(each["kind"], each["sick"]) for each in judge(ranks)] == [(kind, sick)]


def linked(nodes, per_node, slow, key="link"):
    """Findings about links of a ring of ranks, those in `slow` (by the rank that they leave) a tenth as fast."""
    size = nodes * per_node
    ranks = [facts_of(rank, host=f"n{rank // per_node}", machine=f"m{rank // per_node}") for rank in range(size)]
    for rank, facts in enumerate(ranks):
        # Within a node they are all as slow as a bad one between nodes: no reason to call them so.
        usual = 1e9 if key == "link" and rank % per_node != per_node - 1 else 1e10
        speed = usual / 10 if rank in slow else usual
        facts |= {"device_index": rank % per_node, "link": {"to": (rank + 1) % size, "bytes_per_s": 1e10}}
        facts[key] = {"to": (rank + 1) % size, "bytes_per_s": speed}
    findings = judge(ranks)
    assert {each["kind"] for each in findings} <= {"link"}
    return findings


def sick(findings):
    return [each["host"] for each in findings if each["sick"]]


@pytest.mark.parametrize("key", ["link", "device_link"])
@pytest.mark.parametrize("per_node", [1, 2, 8])
def test_a_node_all_of_whose_links_to_others_are_weak_is_sick(per_node, key):
    """Each of its ranks has one such link at most, where it has several ranks."""
    bad = {per_node - 1, 2 * per_node - 1}  # from node 0 to 1, from 1 to 2
    assert linked(4, per_node, (), key) == []
    for nodes in (3, 4, 8):
        (found,) = linked(nodes, per_node, bad, key)
        assert (found["host"], found["sick"]) == ("n1", True)
        assert "1, 1 GB/s, the median of the others is 10 GB/s" in found["text"]


def test_a_node_between_two_sick_ones_is_not_to_blame():
    bad = {1, 3, 5, 7}  # those of nodes 1 and 3, and so both of node 2
    assert sick(linked(8, 2, bad)) == ["n1", "n3"]
    assert sick(linked(8, 2, {1, 3, 5})) == ["n1", "n2"], "neighbours that are both sick"


def test_of_one_weak_link_between_good_nodes_nobody_is_sick():
    (found,) = linked(4, 2, {3})
    assert found["host"] is None and not found["sick"]
    assert "rank 3 on n1 to rank 4 on n2: 1 GB/s, the median of links is 10 GB/s" in found["text"]


def test_of_two_nodes_both_are_named():
    (found,) = linked(2, 2, {1})
    assert found["host"] is None and not found["sick"]
    assert "rank 1 on n0 to rank 2 on n1" in found["text"]


def test_a_weak_link_within_a_node_is_judged_by_such_links_and_is_its_own():
    (found,) = linked(4, 2, {2})
    assert (found["host"], found["sick"]) == ("n1", True)
    assert "rank 2 on n1 to rank 3 on n1: 0.1 GB/s, the median of links is 1 GB/s" in found["text"]
    (found,) = linked(2, 4, {5})
    assert (found["host"], found["sick"]) == ("n1", False), "others of the node are good"


def start(run_dir, rank, world, port, *options):
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in own.items()}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "launch.health", str(run_dir), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_reported_by_the_others(tmp_path):
    port = free_port()
    ranks = [start(tmp_path, i, 3, port, "--policy", "fail") for i in (0, 2)]
    try:
        outputs = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1, outputs[0]
    health = json.loads((tmp_path / "health.json").read_text())
    assert "ranks [1] of 3 did not come within" in " ".join(each["text"] for each in health["findings"])
    assert health["seconds"] < 30
