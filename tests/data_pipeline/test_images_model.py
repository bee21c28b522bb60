"""A real model sees packed rows as it sees each document in a row of its own: slots, spans, grids and masks agree."""

import numpy as np
import pytest
import torch

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.stream import ImageTextStream
from data_pipeline.loader import to_torch
from data_pipeline.pack import ImageSamples
from pretrain.models.vlm.config import ConnectorConfig, VLMConfig
from pretrain.models.vlm.model import VLM
from pretrain.models.vlm.tower import PatchConfig, VisionConfig
from pretrain.objectives.causal import CausalConfig, CausalObjective
from tests.data_pipeline.images import WORDS, captioned, encoded, picture, small_tokenizer, write_tar

TOKENIZER = small_tokenizer()
IMAGE = 300
TOWER = VisionConfig(hidden=32, layers=2, heads=2, ffn=48, positions="rope", class_token=True)
CASES = {
    "tower": ({"class_slot": True}, {"vision": TOWER}),
    "merge": ({"merge": 2}, {"connector": ConnectorConfig(merge=2)}),
    "queries": ({"queries": 3}, {"connector": ConnectorConfig(kind="resampler", queries=3, heads=4)}),
    "newline": ({"newline_token": IMAGE + 1}, {}),
}


def model(**parts) -> VLM:
    config = VLMConfig(
        vocab_size=310, hidden=32, layers=2, heads=4, ffn=48, patches=PatchConfig(size=4), image_token=IMAGE, **parts
    )
    made = VLM(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return made


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_give_the_loss_of_their_documents(tmp_path, name) -> None:
    draw = np.random.default_rng(0)
    samples = [captioned(n, *draw.integers(8, 40, 2), " ".join(draw.choice(WORDS, 1 + n))) for n in range(6)]
    pictures = {f"{k}.png": encoded(picture(9 + 8 * k, 30, 5 + k)) for k in range(2)}
    samples.append({"__key__": "two", "txt": "a dog <image> of <image> two", **pictures})
    shard = write_tar(tmp_path / "a.tar", samples)
    alone = [write_tar(tmp_path / f"{number}.tar", [sample]) for number, sample in enumerate(samples)]
    form, parts = CASES[name]
    kind = PictureForm(**({"patch": 4, "image_token": IMAGE, "resize": "native", "max_patches": 36} | form))
    vlm, objective = model(**parts), CausalObjective(CausalConfig(image_attention="both"))

    def loss(batch: ImageSamples) -> float:
        collated = objective.collate(to_torch(batch))
        with torch.no_grad():
            return float(objective.loss(vlm, objective.forward(vlm, collated), collated)["loss"])

    def stream(path) -> ImageTextStream:
        return ImageTextStream(ImageTextDataset(path, TOKENIZER, progress=False), kind, seq_len=128, patches=128)

    packed = stream(shard)
    assert packed.num_samples < len(samples) - 2
    singles = [loss(stream(path).read(0, 1)) for path in alone]
    assert loss(packed.read(0, packed.num_samples)) == pytest.approx(sum(singles), rel=1e-12)
