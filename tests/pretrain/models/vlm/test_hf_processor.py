"""A PNG and a prompt through the exported folder's own processor and model, beside our model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, SiglipImageProcessor

from checkpoints.hf.pictures import PictureSteps, read_steps
from data_pipeline.images.decode import decode
from pretrain.config import load_run_config
from pretrain.data import picture_form
from pretrain.load import Trained, load_trained
from pretrain.models.vlm.hf_probe import pack
from tests.checkpoints.hf.tiny import load_tokenizer, tiny_tokenizer
from tests.pretrain.models.vlm.test_hf import CASES
from tests.pretrain.models.vlm.tiny_hf import MEAN, STD, edit_run, export_run, import_run, save_hf

SIDE, IMAGE_TOKEN = 24, 300
PROMPT = "the quick <image> fox jumps"


def with_tokenizer(folder: Path, *tokens: str) -> Path:
    """A trained tokenizer of 300 tokens and these."""
    tiny_tokenizer().save(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def draw(path: Path, size: tuple[int, int] = (61, 47)) -> Image.Image:
    noise = torch.randint(256, (6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(noise.numpy()).resize(size).save(path)
    return Image.open(path)


def crop(picture: Image.Image) -> Image.Image:
    """The shorter side to SIDE, the middle of the longer."""
    width, height = picture.size
    scaled = picture.resize((int(width * SIDE / height), SIDE), Image.Resampling.BICUBIC)
    left = (scaled.width - SIDE) // 2
    return scaled.crop((left, 0, left + SIDE, SIDE))


def squash(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def our_logits(trained: Trained, picture: Image.Image, folder: Path) -> torch.Tensor:
    """From pixels and text alone, with nothing of transformers but the tokenizer."""
    cfg = trained.config.model
    pixels = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    )
    pictures, places = pack(pixels, cfg.patches.size, cfg.vision.class_token)
    before, after = (load_tokenizer(folder).encode(text) for text in PROMPT.split("<image>"))
    tokens = torch.tensor([before + [IMAGE_TOKEN] * places.shape[1] + after])
    slots = torch.full(tokens.shape, -1, dtype=torch.int32)
    slots[0, len(before) : len(before) + places.shape[1]] = places[0].int()
    with torch.inference_mode():
        return trained.model.logits(trained.model(tokens, pictures=pictures, slots=slots))


def their_logits(folder: Path, picture: Image.Image) -> torch.Tensor:
    inputs = AutoProcessor.from_pretrained(folder)(images=picture, text=PROMPT, return_tensors="pt")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("name", "kept", "resize"),
    [
        ("clip-llama", False, "crop"),
        ("clip-llama", True, "squash"),
        ("siglip-qwen2", True, "squash"),
        ("siglip-qwen2", True, "crop"),
        ("siglip-normed", False, "squash"),
    ],
)
def test_a_png_and_a_prompt_give_the_same_logits(name: str, kept: bool, resize: str, tmp_path: Path) -> None:
    """The export's processor does what the run did with pictures, as the import's did if nobody says else."""
    theirs, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    save_hf(CASES[name] | {"image_token_index": IMAGE_TOKEN}, theirs)
    if name == "siglip-qwen2":
        size = {"height": SIDE, "width": SIDE}
        SiglipImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(theirs)
    import_run(theirs, run)
    assert load_run_config(run).data.pictures.resize == "squash"
    edit_run(run, f"data.pictures.resize={resize}")
    export_run(run, out, tokenizer=with_tokenizer(tmp_path / "tokenizer", "<image>"), keep=kept)

    picture = draw(tmp_path / "picture.png")
    trained = load_trained(run)
    does, other = (squash, crop) if resize == "squash" else (crop, squash)
    ours, expected = our_logits(trained, does(picture), out), their_logits(out, picture)
    assert (our_logits(trained, other(picture), out) - expected).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    content = json.loads((out / "processor_config.json").read_text())
    of_import = kept and resize == "squash" and name == "clip-llama"  # a CLIPImageProcessor that does not crop
    assert content["image_processor"]["image_processor_type"] == (
        "CLIPImageProcessor" if of_import or resize == "crop" else "SiglipImageProcessor"
    )


def test_a_picture_as_training_reads_it_gives_the_same_logits(tmp_path: Path) -> None:
    """A square one: of others, transformers rounds the longer side to whole pixels before it cuts, we do not."""
    save_hf(CASES["clip-llama"] | {"image_token_index": IMAGE_TOKEN}, tmp_path / "hf")
    run, out = tmp_path / "run", tmp_path / "out"
    import_run(tmp_path / "hf", run)
    edit_run(run, "data.pictures.resize=crop")
    export_run(run, out, tokenizer=with_tokenizer(tmp_path / "tokenizer"), keep=False)
    picture = draw(tmp_path / "picture.png", (53, 53))
    pixels = decode((tmp_path / "picture.png").read_bytes(), SIDE, SIDE, crop=True)

    form = picture_form(load_run_config(run))
    patches = form.patches(pixels)
    packed, _ = pack(torch.tensor(pixels).permute(2, 0, 1)[None], 8, class_token=True)
    assert torch.equal(packed.patches[0], torch.from_numpy(patches))
    assert torch.equal(packed.grid[0], torch.from_numpy(form.cells((3, 3))))
    ours = our_logits(load_trained(run), Image.fromarray(pixels), out)
    torch.testing.assert_close(ours, their_logits(out, picture), rtol=0, atol=1e-4)


def test_a_tokenizer_without_the_image_token_gets_it(tmp_path: Path) -> None:
    """A run whose image token is the one after its tokenizer's last."""
    save_hf(CASES["clip-llama"] | {"image_token_index": 300}, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", tokenizer=with_tokenizer(tmp_path / "tokenizer"), keep=False)
    ids = AutoProcessor.from_pretrained(tmp_path / "out")(
        images=draw(tmp_path / "picture.png"), text=PROMPT, return_tensors="pt"
    ).input_ids[0]
    before, after = (load_tokenizer(tmp_path / "tokenizer").encode(text) for text in PROMPT.split("<image>"))
    assert ids.tolist() == before + [300] * 9 + after
    assert len(load_tokenizer(tmp_path / "run/tokenizer")) == 300  # the run's own is left alone


def test_an_image_token_of_another_name_keeps_it(tmp_path: Path) -> None:
    save_hf(CASES["clip-llama"] | {"image_token_index": 301}, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    tokenizer = with_tokenizer(tmp_path / "tokenizer", "<other>", "<|picture|>")
    export_run(tmp_path / "run", tmp_path / "out", tokenizer=tokenizer)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ids = processor(images=draw(tmp_path / "picture.png"), text="the <|picture|>", return_tensors="pt").input_ids
    assert (ids == 301).sum() == 9


@pytest.mark.parametrize(("token", "message"), [(301, "which it lacks"), (9, "its '.*', is not what it reads")])
def test_an_image_token_that_no_text_gives_is_refused(token: int, message: str, tmp_path: Path) -> None:
    save_hf(CASES["clip-llama"] | {"image_token_index": token}, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ValueError, match=f"tokenizer: model.image_token = {token}, {message}") as caught:
        export_run(tmp_path / "run", tmp_path / "out", tokenizer=with_tokenizer(tmp_path / "tokenizer"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pictures.size=16"], "data.pictures.size = 16: the exported model takes squares of 24 pixels alone"),
        (["data.pictures.newline=5"], "data.pictures.newline = 5: a LlavaProcessor puts no token after a row"),
    ],
)
def test_steps_that_no_processor_does_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    save_hf(CASES["clip-llama"], tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    edit_run(tmp_path / "run", *overrides)
    with pytest.raises(ValueError) as caught:
        export_run(tmp_path / "run", tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24, "do_center_crop": True},
            "crop",
        ),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "do_resize": True}, "squash"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 24}, "size = "),
        ({"image_processor_type": "LlavaImageProcessor", "size": 24, "crop_size": 24, "do_pad": True}, "do_pad = True"),
        ({"image_processor_type": "CLIPImageProcessor", "do_resize": False}, "do_resize = False"),
        ({"image_processor_type": "NoImageProcessor"}, "transformers cannot load its image processor"),
    ],
)
def test_what_a_folder_says_of_pictures(images: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """Older files too, with one number for a size."""
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    if expected in ("crop", "squash"):
        assert read_steps(tmp_path, patch=8) == PictureSteps(expected, 24)
        return
    with pytest.raises(ValueError) as caught:
        read_steps(tmp_path, patch=8)
    assert expected in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
