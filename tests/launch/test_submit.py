"""`pretrain submit` where there is no cluster: the script, job.json, the site's file, sweeps, mistakes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import cli
from launch.slurm.checks import file_system
from launch.slurm.cluster import ClusterConfig, forwarded
from launch.slurm.queue import find_nodes, format_time, parse_time
from launch.slurm.script import directive
from launch.slurm.snapshot import write_snapshot
from launch.slurm.sweep import points_of
from tests.small import small_overrides

BASH = shutil.which("bash")
SHELLCHECK = shutil.which("shellcheck")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No commands of SLURM's, and no file of a site."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict]:
    """Script and job.json."""
    code = cli.main(["submit", *arguments, "--dry-run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "is not known: " in printed.err  # whether the cluster has what the job wants
    script, _, record = printed.out.partition("\n{\n")
    return script, json.loads("{" + record)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = cli.main(["submit", "tiny", *arguments, "--dry-run"])
    printed = capsys.readouterr()
    assert code == 2, printed.out
    assert printed.err.startswith("pretrain: error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


VARIANTS = {
    "plain": [],
    "gpus": ["--gpus-per-node", "8", "--nodes", "2", "--time", "1-0", "--constraint", "h100&ib", "--spares", "1"],
    "sweep": ["--sweep", "optim.lr=1e-4,3e-4", "--at-once", "1"],
    "srun": ["--launcher", "srun", "--ranks-per-node", "2", "--cpus-per-rank", "4", "--account", "a", "--qos", "high"],
    "site": ["--cluster", "site.toml", "--env", "HF_HOME"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scripts_are_clean(variant, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "it's $(x); `y` \"#& \\'".replace("\\", "")
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", "/cache")
    venv = folder / "ve$nv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/bin/sh")
    Path("site.toml").write_text(f"venv = '''{venv}'''\nmodules = ['gcc/13.2', 'nccl']\n")
    script, record = dry(capsys, "tiny", "run.dir=runs/o'ne", "train.global_batch=128", *VARIANTS[variant])
    file = tmp_path / "job.sh"
    file.write_text(script)
    assert BASH is not None
    subprocess.run([BASH, "-n", file], check=True)
    if SHELLCHECK is None:
        assert not os.environ.get("PRETRAIN_REQUIRE_SLURM"), "shellcheck is not installed"
        pytest.skip("needs shellcheck")
    done = subprocess.run([SHELLCHECK, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not Path("runs").exists()  # a dry run leaves nothing behind
    assert record["job_ids"] == []


def test_the_script_asks_for_what_was_ordered(capsys, tmp_path):
    script, record = dry(
        capsys,
        "tiny",
        "run.dir=/r",
        "train.global_batch=128",
        *VARIANTS["gpus"],
        "--grace",
        "300",
        "--max-requeues",
        "3",
        "--health",
        "exclude",
    )
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    wanted = ["nodes=3", "gres=gpu:8", "time=1-0", "constraint=h100&ib", "signal=B:USR1@300", "requeue", "exclusive"]
    assert set(wanted) <= set(lines)
    assert "ntasks-per-node=1" in lines
    assert (record["nodes"], record["spares"], record["gpus_per_node"], record["ranks_per_node"]) == (2, 1, 8, 8)
    assert (record["time_limit_s"], record["grace_s"], record["max_requeues"]) == (86400, 300, 3)
    assert record["health"] == "exclude"
    assert "no-kill" in lines  # one node less is no end
    script, record = dry(capsys, "tiny", "run.dir=/r", *VARIANTS["srun"])
    assert "no-kill" not in script
    for shards, kept in ((-1, True), (2, False)):
        text, _ = dry(capsys, "tiny", "run.dir=/r", f"parallel.dp_shard={shards}", "--nodes", "2")
        assert ("#SBATCH --no-kill\n" in text) == kept
    assert "#SBATCH --ntasks-per-node=2\n#SBATCH --cpus-per-task=4\n" in script and "exclusive" not in script
    assert "#SBATCH --signal=B:USR1@120\n" in script and record["launcher"] == "srun"
    script, _ = dry(capsys, "tiny", "run.dir=/r", "--ranks-per-node", "2", "--cpus-per-rank", "4")
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=8\n" in script  # all those of the agent's ranks


def test_containers_are_lists_of_words(capsys, tmp_path, monkeypatch, tiny_shards):
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image.sif"
    image.touch()
    overrides = [*small_overrides(Path("runs/a b"), tiny_shards), "train.global_batch=64"]
    mounts = [str(tmp_path / "runs" / "a b"), str(tmp_path), str(tiny_shards.resolve())]
    _, record = dry(capsys, "tiny", *overrides, "--container", str(image), "--gpus-per-node", "2")
    binds = [word for path in mounts for word in ("--bind", f"{path}:{path}")]
    assert record["rank_python"] == [
        *("apptainer", "exec", "--nv", *binds, "--pwd", str(tmp_path), str(image), "python3"),
    ]
    assert record["srun_options"] == []
    _, record = dry(capsys, "tiny", *overrides, "--container", "pyxis:nvcr.io#nvidia/pytorch:26.01-py3")
    assert record["rank_python"] == ["python3"]
    assert record["srun_options"] == [
        "--container-image=nvcr.io#nvidia/pytorch:26.01-py3",
        f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}",
        f"--container-workdir={tmp_path}",
    ]


def test_the_sites_file_gives_defaults_that_options_replace(capsys, tmp_path):
    home = tmp_path / ".config" / "pretrain"
    home.mkdir(parents=True)
    site = 'partition = "gpu"\naccount = "lab"\ngpus_per_node = 4\n[container]\nkind = "pyxis"\nimage = "site/image"\n'
    (home / "cluster.toml").write_text(site)
    script, record = dry(capsys, "tiny", "run.dir=/r", "train.global_batch=64", "--account", "other")
    assert "#SBATCH --partition=gpu\n#SBATCH --account=other\n" in script
    assert record["ranks_per_node"] == 4 and record["container"]["image"] == "site/image"
    _, record = dry(capsys, "tiny", "run.dir=/r", "--gpus-per-node", "0", "--container", "mine:1")
    assert record["ranks_per_node"] == 1 and record["container"] == {
        "kind": "pyxis",
        "image": "mine:1",
        "mounts": [],
        "python": "python3",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('partion = "gpu"', ["site.toml: unknown key partion (did you mean partition?)"]),
        ('[container]\nimges = "x"', ["unknown key container.imges (did you mean container.image?)"]),
        ("gpus_per_node = -1", ["gpus_per_node = -1"]),
        ('launcher = "mpi"', ["launcher = 'mpi'", "'agent' or 'srun'"]),
        ('partition = "a\\nexit 0"', ["partition", "is no name"]),
        ('modules = ["x\'; rm -rf /"]', ["modules.0", "is no module"]),
        ('environment = ["A=$(x)"]', ["environment.0", "is no name of an environment variable"]),
        ('venv = "/a\\nb"', ["venv", "line breaks"]),
        ('venv = "/no/where"', ["venv = '/no/where'", "/no/where/bin/python is not there"]),
        ('container = {kind = "apptainer"}', ["container.image is not set"]),
        ('container = {kind = "apptainer", image = "/no/where.sif"}', ["/no/where.sif", "no such file"]),
        ('container = {kind = "pyxis", image = "x;y"}', ["container.image", "is no image"]),
        ("a = ", ["site.toml is not valid TOML"]),
    ],
)
def test_mistakes_in_the_sites_file(text, words, capsys, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text(text)
    error = refused(capsys, "--cluster", str(site))
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.stepps=3"], ["unknown key train.stepps (did you mean train.steps?)"]),
        (["parallel.tp=3", "--nodes", "2"], ["tp 3", "but 2 run"]),
        (["--nodes", "2", "--ranks-per-node", "3"], ["train.global_batch"]),
        (["--nodes", "0"], ["--nodes 0: must be at least 1"]),
        (["--ranks-per-node", "4", "--gpus-per-node", "2"], ["--ranks-per-node 4", "--gpus-per-node 2"]),
        (["--ranks-per-node", "-1"], ["ranks_per_node = -1"]),
        (["--time", "soon"], ["time 'soon'", "1-12:00:00"]),
        (["--name", "a b"], ["--name", "'a b'"]),
        (["--name", "x\n#SBATCH --uid=0"], ["--name"]),
        (["run.dir=/a\\b"], ["backslashes"]),
        (["run.dir='''/a\n#SBATCH --uid=0'''"], ["line breaks"]),
        (["--env", "A;B"], ["--env 'A;B'"]),
        (["--env", "NOT_SET_HERE"], ["--env NOT_SET_HERE: is not set"]),
        (["--cluster", "/no/where.toml"], ["--cluster /no/where.toml: no such file"]),
        (["--template", "/no/where.jinja"], ["/no/where.jinja"]),
        (["--sweep", "optim.lr"], ["--sweep 'optim.lr'"]),
        (
            ["--sweep", "train.seed=1..3"],
            ["--sweep, train.seed=1: tiny: unknown key train.seed (did you mean"],
        ),
        (["--sweep", "optim.lr=1e-4", "optim.lr=3e-4"], ["optim.lr is given twice"]),
        (["--sweep", "run.dir=a,b"], ["run.dir", "leave it out"]),
        (["--copy-code", "run.dir=a:b"], ["--copy-code", "a:b"]),
        (["--at-once", "-1"], ["--at-once -1"]),
        (['data.sources=[{shards="/no/*.tar"}]'], ["/no/*.tar", "no file matches"]),
        (["tokenizer.path=/no/tokenizer"], ["/no/tokenizer"]),
        (["run.resume=must"], ['run.resume = "must"']),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_queue(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, *arguments)
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()


def test_without_an_answer_of_slurm_nothing_is_queued(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", "tiny"]) == 2
    assert "is not here: submit from a machine of the cluster, or --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_users_own_template(capsys, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("#!/bin/sh\n# mine\nexec {{ python | quote }} {{ run_dir | quote }}\n")
    script, _ = dry(capsys, "tiny", "run.dir=/a b", "--template", str(template))
    assert script.startswith("#!/bin/sh\n# mine\nexec ") and script.rstrip().endswith(" '/a b'")
    template.write_text("{{ pyhton }}")
    assert "mine.jinja" in (error := refused(capsys, "--template", str(template))) and "'pyhton' is undefined" in error


def test_sweeps(tmp_path):
    points = points_of(["optim.lr=1e-4,3e-4", "run.seed=-1..1"], tmp_path)
    assert [point.run_dir.name for point in points] == ["000", "001", "002", "003", "004", "005"]
    assert points[4].overrides == ["optim.lr=3e-4", "run.seed=0"]
    ladder = points_of(["model.hidden,model.layers=256:4,512:8"], tmp_path)
    assert [point.overrides for point in ladder] == [
        ["model.hidden=256", "model.layers=4"],
        ["model.hidden=512", "model.layers=8"],
    ]
    nested = points_of(["parallel.stage_layers=[1,2],[2,1]", 'data.skip="a,b",c'], tmp_path)
    assert nested[1].overrides == ["parallel.stage_layers=[1,2]", "data.skip=c"] and len(nested) == 4
    for axis in ("a,b=1:2:3", "a=1,,2", "run.seed=5..1", "=1", "run.seed=1..99999999"):
        with pytest.raises(ValueError, match="--sweep"):
            points_of([axis], tmp_path)


def test_a_snapshot_is_written_with_and_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    line = write_snapshot(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"commit.txt", "versions.txt"}
    assert "pydantic==" in (tmp_path / "a" / "versions.txt").read_text()
    assert line.startswith("code: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not in a git repository" in write_snapshot(tmp_path / "b")
    assert (tmp_path / "b" / "commit.txt").read_text().startswith("none: ")


def test_the_environment_is_an_allow_list():
    shell = {"PATH": "/bin", "LC_ALL": "C", "SECRET": "x", "HF_HOME": "/h", "HF_TOKEN": "t", "WANDB_MODE": "offline"}
    shell |= {"BASH_FUNC_x%%": "() { evil; }"}
    assert forwarded(ClusterConfig(), [], shell) == ["LC_ALL", "PATH"]
    assert forwarded(ClusterConfig(environment=("HF_*",)), ["WANDB_MODE"], shell) == [
        *("HF_HOME", "HF_TOKEN", "LC_ALL", "PATH", "WANDB_MODE"),
    ]
    assert forwarded(ClusterConfig(environment=("UNSET",)), [], shell) == ["LC_ALL", "PATH"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("1-0", 86400), ("1-12:30", 131400)),
        *(("2-01:00:05", 176405), ("UNLIMITED", None), ("NONE", None)),
    ],
)
def test_times(text, seconds):
    assert parse_time(text) == seconds
    if seconds is not None:
        assert parse_time(format_time(seconds)) == seconds


def test_file_systems_are_told_apart(tmp_path):
    mounts = "/dev/sda / ext4 rw 0 0\nnas:/x /data nfs4 rw 0 0\ntmpfs /data/my\\040tmp tmpfs rw 0 0\n"
    for path, kind in (("/data/run", "nfs4"), ("/database", "ext4"), ("/data/my tmp/run", "tmpfs"), ("/", "ext4")):
        assert file_system(Path(path), mounts) == kind


def test_gpus_of_nodes_are_read_as_sinfo_writes_them(monkeypatch):
    rows = [
        "n1|host1|64|gpu:h100:8(S:0-1)|idle|h100,ib",
        "n2|host2|64+|gpu:a100:4,gpu:v100:2,mps:8|down*|(null)",
        "n3|host3|2|(null)|mix|(null)",
        "n4|host4|2|gpu:2|drain|(null)",
    ]
    monkeypatch.setattr("launch.slurm.queue.call", lambda *command: "\n".join(rows))
    first, second, third, fourth = find_nodes("any")
    assert first.gpus == {"h100": 8} and first.usable and first.features == {"h100", "ib"}
    assert (second.count_gpus(), second.count_gpus("a100"), second.cpus, second.usable) == (6, 4, 64, False)
    assert third.count_gpus() == 0 and third.usable
    assert fourth.count_gpus() == 2 and not fourth.usable


def test_values_of_directives_are_quoted():
    assert directive("nodes", "2") == "--nodes=2"
    assert directive("output", '/a b"c/%j') == '--output="/a b\\"c/%j"'
