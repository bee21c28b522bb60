"""What a trained model says of pictures it has not seen, beside what stands with them; as figures and as a page."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.images.form import PictureForm
from data_pipeline.images.pairs import PairStream
from data_pipeline.loader import to_torch
from data_pipeline.pack import ImageSamples
from data_pipeline.tokenizer import Tokenizer
from pretrain.load import Trained
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.layers.cache import KVCache
from pretrain.models.vlm.model import Pictures
from pretrain.zero_shot import class_vectors, classify, retrieval

AT_ONCE = 64  # pictures


class Said(NamedTuple):
    """A picture uint8 [height, width, 3], the text that stands with it, and what the model says."""

    picture: np.ndarray
    expected: str
    said: str

    @property
    def right(self) -> bool:
        return self.said.strip() == self.expected.strip()


def caption(trained: Trained, stream: PairStream, limit: int, max_new_tokens: int) -> Iterator[Said]:
    """The likeliest caption of each of the stream's first `limit` pictures, token by token."""
    both = trained.config.objective.image_attention == "both"
    tokenizer = stream.dataset.tokenizer
    for samples in _batches(stream, limit):
        sides = samples.grid.max(1) + 1
        for shape in np.unique(sides, axis=0):  # those of one shape have as many tokens
            rows = np.flatnonzero((sides == shape).all(1))
            ids, slots = (torch.from_numpy(t) for t in stream.form.tokens((int(shape[0]), int(shape[1])), 0))
            pictures = _pictures(samples, rows)
            ids, slots = ids.expand(len(rows), -1), slots.expand(len(rows), -1)
            new = _likeliest(trained.model, ids, slots, pictures, both, max_new_tokens)
            for row, tokens in zip(rows.tolist(), new.tolist(), strict=True):
                picture, expected = _pixels(samples, row, stream.form), _expected(samples, row, tokenizer)
                yield Said(picture, expected, _text(tokens, tokenizer))


def name(trained: Trained, stream: PairStream, limit: int, classes: dict[str, list[str]]) -> Iterator[Said]:
    """Which class's prompts each of the stream's first `limit` pictures is nearest to: the first prompt of it."""
    tokenizer = stream.dataset.tokenizer
    vectors = class_vectors(partial(encode_texts, trained, stream), classes)
    prompts = [some[0] for some in classes.values()]
    for samples in _batches(stream, limit):
        rows = np.arange(len(samples.tokens))
        with torch.inference_mode():
            images = trained.model.encode_images(_pictures(samples, rows))
        for row, best in enumerate(classify(images, vectors)[:, 0].tolist()):
            yield Said(_pixels(samples, row, stream.form), _expected(samples, row, tokenizer), prompts[best])


def retrieve(trained: Trained, stream: PairStream, limit: int) -> dict[str, float]:
    """Recall both ways among the stream's first `limit` pictures and their captions: "text_to_image_r1", ... Equal
    captions are one, which all their pictures belong to.
    """
    features, texts = [], []
    for samples in _batches(stream, limit):
        rows = np.arange(len(samples.tokens))
        with torch.inference_mode():
            features.append(trained.model.encode_images(_pictures(samples, rows)))
        texts += [_expected(samples, row, stream.dataset.tokenizer) for row in rows.tolist()]
    known = list(dict.fromkeys(texts))
    images, captions = torch.cat(features), encode_texts(trained, stream, known)
    of_image, of_caption = torch.tensor([known.index(text) for text in texts]), torch.arange(len(known))
    return retrieval(images, captions, of_image, of_caption)


@torch.inference_mode()
def encode_texts(trained: Trained, stream: PairStream, texts: list[str]) -> Tensor:
    """Features [n, d] of texts, tokenised and cut as the stream's captions are."""
    tokenizer = stream.dataset.tokenizer
    tokens = np.full((len(texts), stream.seq_len), tokenizer.eos_id, np.int32)
    lengths = []
    for row, ids in zip(tokens, tokenizer.encode_batch(texts), strict=True):
        ids = ids[: stream.seq_len - 1]
        row[: len(ids)] = ids
        lengths.append(len(ids) + 1)
    features: Tensor = trained.model.encode_texts(torch.from_numpy(tokens), torch.tensor(lengths))
    return features


def write_page(said: Sequence[Said], title: str, path: Path) -> None:
    """One self-contained HTML page: each picture, what stands with it, what was said; wrong ones first."""
    right = sum(one.right for one in said)
    cards = "\n".join(_card(one) for one in sorted(said, key=lambda one: one.right))
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>body{{font:15px system-ui;margin:2rem;background:#fff;color:#222}}"
        "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.8rem}"
        "figure{margin:0;padding:.6rem;border:2px solid #3a7d44;border-radius:.4rem}figure.wrong{border-color:#b3261e}"
        "img{width:6rem;image-rendering:pixelated;display:block;margin-bottom:.4rem}"
        "@media(prefers-color-scheme:dark){body{background:#161616;color:#e4e4e4}}</style>"
        f"<h1>{escape(title)}</h1><p>{right} of {len(said)} right ({right / len(said):.1%}). Wrong ones come first.</p>"
        f"<main>\n{cards}\n</main></html>\n"
    )


def _card(one: Said) -> str:
    file = BytesIO()
    Image.fromarray(one.picture).save(file, "PNG")
    kind = "right" if one.right else "wrong"
    return (
        f"<figure class={kind}><img alt='' src='data:image/png;base64,{b64encode(file.getvalue()).decode()}'>"
        f"<b>{escape(one.said) or '(nothing)'}</b><br>{escape(one.expected)}</figure>"
    )


def _batches(stream: PairStream, limit: int) -> Iterator[ImageSamples]:
    last = min(limit, stream.num_samples)
    for start in range(0, last, AT_ONCE):
        samples = stream.read(start, min(AT_ONCE, last - start))
        held = np.flatnonzero((samples.images >= 0).any(1))  # not those that could not be decoded
        yield ImageSamples(*(array[held] for array in samples))


def _pictures(samples: ImageSamples, rows: np.ndarray) -> Pictures:
    own = to_torch(ImageSamples(*(array[rows] for array in samples)))
    return Pictures.packed(own["patches"], own["images"], own["grid"])


@torch.inference_mode()
def _likeliest(model: Any, ids: Tensor, slots: Tensor, pictures: Pictures, both: bool, max_new_tokens: int) -> Tensor:
    """New tokens [B, max_new_tokens] after image tokens [B, S]."""
    cache, found = KVCache(), []
    mask = AttentionMask(spans=torch.zeros_like(ids)) if both else None
    hidden = model(ids, mask, cache=cache, pictures=pictures, slots=slots)
    for _ in range(max_new_tokens):
        found.append(model.logits(hidden[:, -1]).argmax(-1))
        hidden = model(found[-1][:, None], cache=cache)
    return torch.stack(found, dim=1)


def _text(tokens: list[int], tokenizer: Tokenizer) -> str:
    end = tokens.index(tokenizer.eos_id) if tokenizer.eos_id in tokens else len(tokens)
    return tokenizer.decode([token for token in tokens[:end] if token < tokenizer.vocab_size])


def _expected(samples: ImageSamples, row: int, tokenizer: Tokenizer) -> str:
    return _text(samples.tokens[row].tolist(), tokenizer)


def _pixels(samples: ImageSamples, row: int, form: PictureForm) -> np.ndarray:
    """The picture that the model got, put together again."""
    grid, p = samples.grid[row], form.patch
    rows, columns = (grid.max(0) + 1).tolist()
    picture = np.zeros((rows, columns, p, p, 3), np.uint8)
    for place in np.flatnonzero((samples.images[row] >= 0) & (grid[:, 0] >= 0)).tolist():
        picture[tuple(grid[place])] = samples.patches[row, place].reshape(3, p, p).transpose(1, 2, 0)
    return picture.swapaxes(1, 2).reshape(rows * p, columns * p, 3)
