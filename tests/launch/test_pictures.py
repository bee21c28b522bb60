"""Runs on pictures: the same after a resume, mixed with text by weight, and what they say of held-out ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.build import build
from data_pipeline.images.write import CLASSES
from data_pipeline.sources.digits import write_digits
from launch.cli import main
from parallel.world import World
from pretrain.caption import Said, write_page
from pretrain.config import resolve
from pretrain.data import open_datasets
from pretrain.mixture import open_stream
from pretrain.train import train

ALONE = World(0, 1, torch.device("cpu"))
SMALL = ["model.layers=1", "model.hidden=32", "model.ffn=48", "model.heads=4", "model.kv_heads=2", "train.compile=off"]
SMALL += ["train.global_batch=4", "train.micro_batch=2", "log.tensorboard=false", "schedule.warmup=1", "eval.every=0"]
TOWER = ["model.vision.layers=1", "model.vision.hidden=16", "model.vision.heads=2", "model.vision.ffn=24"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert write_digits(folder) == {"train": 1430, "heldout": 367}
    text = folder / "story.txt"
    text.write_text("a handwritten seven is written by hand. " * 200)
    build([text], folder / "text", tokenizer=str(folder / "tokenizer"), workers=1, progress=False)
    return folder


def words(digits: Path, run: Path, *more: str) -> list[str]:
    sources = f'[{{shards="{digits}/train-*.tar"}}, {{shards="{digits}/text/train-*.tar", weight=0.5}}]'
    return [
        *(f"run.dir={run}", f"tokenizer.path={digits}/tokenizer", f"data.sources={sources}"),
        *(f"eval.shards={digits}/heldout-*.tar", *SMALL, *more),
    ]


@pytest.mark.parametrize(("recipe", "more"), [("digits-vlm", TOWER), ("digits-vlm-free", ["data.pictures.workers=2"])])
def test_a_run_that_was_stopped_is_the_one_that_was_not(digits, tmp_path, recipe, more):
    for run, stops in (("whole", [4]), ("halves", [2, 4])):
        for stop in stops:
            config = resolve(recipe, words(digits, tmp_path / run, *more, "train.steps=4", f"train.stop_at={stop}"))[0]
            train(config, ALONE)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "halves")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    files = [sorted((tmp_path / run / "checkpoints/step-00000004/model").glob("*")) for run in ("whole", "halves")]
    ours, theirs = ({n: t for file in some for n, t in load_file(file).items()} for some in files)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_text_and_pictures_are_mixed_by_weight(digits, tmp_path):
    config = resolve("digits-vlm", words(digits, tmp_path))[0]
    samples = open_stream(config, open_datasets(config, lambda action: action())).read(0, 90)
    seen = (samples.images >= 0).any(1)
    assert 55 <= int(seen.sum()) <= 65  # two thirds
    assert (samples.slots[~seen] < 0).all() and (samples.targets[~seen] >= 0).mean() > 0.5
    assert ((samples.slots >= 0) == (samples.tokens[:, :-1] == 320)).all()


def test_what_a_model_says_is_compared_with_what_stands_there(digits, tmp_path, capsys):
    train(resolve("digits-vlm", words(digits, tmp_path / "run", *TOWER, "train.steps=2"))[0], ALONE)
    page = tmp_path / "page.html"
    assert main(["caption", str(tmp_path / "run"), "--limit", "20", "--max-new-tokens", "3", "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "of 20 right" in said and "for 'a handwritten " in said
    assert page.read_text().count("<figure") == 20 == page.read_text().count("data:image/png")
    for other in (["zero-shot", "--template", "a handwritten {}"], ["retrieve"]):
        assert main([*other, str(tmp_path / "run")]) == 2
        assert 'is of model.family = "vlm", not "dual"' in capsys.readouterr().err
    assert main(["caption", str(tmp_path / "run"), "--shards", f"{digits}/text/train-*.tar"]) == 2
    assert "hold text alone" in capsys.readouterr().err
    assert json.loads((digits / CLASSES).read_text())[7] == "seven"


def test_what_transformers_cannot_compute_is_not_exported(digits, tmp_path, capsys):
    run = tmp_path / "run"
    train(resolve("digits-vlm-free", words(digits, run, "train.steps=2"))[0], ALONE)
    assert main(["checkpoint", "export", str(run), str(tmp_path / "out")]) == 2
    assert 'objective.image_attention = "both", but transformers lets image tokens see' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_page_shows_the_wrong_ones_first_and_escapes_what_was_said(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    write_page([Said(picture, "a", "a"), Said(picture, "b", "<script>")], "T & T", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "1 of 2 right (50.0%)" in html and "&lt;script&gt;" in html and "<script>" not in html
    assert html.index("class=wrong") < html.index("class=right") and "T &amp; T" in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer.path=", "tokenizer.path is not set; name the text's tokenizer"),
        ("data.pictures.size=12", r"model.vision.grid = \[4, 4\] knows 4 x 4 places of 2 pixels"),
        (
            'objective.image_attention="both" parallel.cp=2 parallel.cp_method="ring"',
            "cannot do objective.image_attention",
        ),
        ("data.pictures.size=5", "size 5: must be a multiple of patch 2"),
        ("data.pictures.broken=ignore", "data.pictures.broken"),
    ],
)
def test_a_mistake_in_what_becomes_of_pictures(digits, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(resolve("digits-vlm", words(digits, tmp_path / "run", *TOWER, *change.split()))[0], ALONE)


def test_pictures_for_a_model_that_sees_none(digits, tmp_path):
    sources = f'data.sources=[{{shards="{digits}/train-*.tar"}}]'
    with pytest.raises(ValueError, match=r"hold pictures, but data.patches = 0"):
        train(resolve("tiny", [sources, f"run.dir={tmp_path}/run"])[0], ALONE)
