"""The floors of the building: imports go down only, and stand at the top of the file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "parallel": {"parallel"},
    "data_pipeline": {"data_pipeline"},
    "checkpoints": {"checkpoints"},
    "pretrain": {"pretrain", "parallel", "data_pipeline", "checkpoints"},
    "launch": {"launch", "pretrain", "parallel", "data_pipeline", "checkpoints"},
}
FILES = sorted(path.relative_to(ROOT) for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it stands at the top level) of every import."""
    tree = ast.parse((ROOT / path).read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", id(node) in top))
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_and_stand_at_the_top(path):
    for module, at_top in imports(path):
        first = module.split(".")[0]
        if first in FLOORS:
            assert first in FLOORS[path.parts[0]], f"{path} imports {module}, which is above it or beside it"
            assert at_top, f"{path} imports {module} inside a function"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[:2] == ("pretrain", "models")], ids=str)
def test_models_know_no_processes(path):
    """Layers and models are plain torch modules, so that one process can test and convert them."""
    modules = [module for module, _ in imports(path)]
    assert not [module for module in modules if module.startswith("torch.distributed")]
    ours = [module for module in modules if module.split(".")[0] in FLOORS]
    tables = {"plan": ("parallel.plan",), "hf": ("checkpoints.hf",), "megatron": ("parallel.engines.megatron_facts",)}
    allowed = tables.get(path.stem.split("_")[0], ())
    assert not [m for m in ours if not m.startswith(("pretrain.models", *allowed))]


def test_the_tree_has_the_agreed_folders():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    outputs = {"runs", "data", "build", "shared", "__pycache__"}  # ignored by git
    folders = {name for name in folders if not name.endswith(".egg-info")}
    assert folders - outputs - {"docs"} == {*FLOORS, "tests"}
