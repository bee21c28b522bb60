"""What features of images and texts are good for without training: naming classes, and finding one by the other.

All features have length 1, so that products are cosines. N images, C classes, d width of a feature. Radford et al. 2021
(arXiv:2103.00020), section 3.1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Encode = Callable[[list[str]], Tensor]  # texts -> features [n, d]
AT_ONCE = 1024  # rows of similarities that exist at once


def prompts(names: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
    """Class name -> what an image of it may be called: each template with the name for its `{}`.

    Raises ValueError for a name that comes twice, and for a template without a place for the name.
    """
    if not names or not templates:
        raise ValueError(f"{len(names)} class names and {len(templates)} templates: name at least one of each")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"class name {twice[0]!r} is there twice: every class needs a name of its own")
    if lacking := [template for template in templates if "{}" not in template]:
        raise ValueError(
            f"template {lacking[0]!r} has no {{}} for the name of the class: write it as 'a photo of {{}}'"
        )
    return {name: [template.replace("{}", name) for template in templates] for name in names}


def class_vectors(encode: Encode, classes: Mapping[str, Sequence[str]], *, at_once: int = 256) -> Tensor:
    """[C, d]: for each class the mean of the features of its prompts, of length 1 again."""
    texts = [text for some in classes.values() for text in some]
    parts = [encode(texts[start : start + at_once]) for start in range(0, len(texts), at_once)]
    by_class = torch.cat(parts).split([len(some) for some in classes.values()])
    return torch.stack([F.normalize(features.mean(0), dim=0) for features in by_class])


def classify(images: Tensor, classes: Tensor, k: int = 1) -> Tensor:
    """images [N, d], class vectors [C, d] -> the k nearest classes [N, k], the nearest first."""
    _check_k(k, len(classes), "classes")
    return torch.cat([rows.topk(k, dim=1).indices for rows in _similarities(images, classes)])


def accuracy(images: Tensor, classes: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of images [N, d] whose label [N] is among the k nearest classes."""
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(images)} images and {len(labels)} labels: there must be one for each image, one at least"
        )
    return (classify(images, classes, k) == labels[:, None].to(images.device)).any(1).double().mean().item()


def recall(
    queries: Tensor, others: Tensor, of_query: Tensor, of_other: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """k -> share of queries [Q, d] with one that belongs to them among the k nearest of others [N, d].

    of_query [Q], of_other [N]: who belongs together has the same number; several may (five captions of an image).
    Raises ValueError for a query that nothing belongs to, and for a k that is not 1 to N.
    """
    for k in ks:
        _check_k(k, len(others), "that are searched")
    if len(queries) != len(of_query) or len(others) != len(of_other):
        raise ValueError(
            f"{len(queries)} and {len(others)} features, {len(of_query)} and {len(of_other)} numbers: one each"
        )
    if not len(queries) or not torch.isin(of_query, of_other).all():
        raise ValueError("recall: there is no query, or one that nothing belongs to; leave such queries out")
    ranks = []
    for start, rows in zip(range(0, len(queries), AT_ONCE), _similarities(queries, others), strict=True):
        nearest = of_other[rows.topk(max(ks), dim=1).indices]
        hits = nearest == of_query[start : start + AT_ONCE, None]
        ranks.append(torch.where(hits.any(1), hits.int().argmax(1), len(others)))
    rank = torch.cat(ranks)
    return {k: (rank < k).double().mean().item() for k in ks}


def retrieval(
    images: Tensor, texts: Tensor, of_image: Tensor, of_text: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Both ways: "text_to_image_r1": ..., "image_to_text_r1": ... for each k that there are so many of. Numbers tell
    who belongs together, as in `recall`.
    """
    ways = {"text_to_image": (texts, images, of_text, of_image), "image_to_text": (images, texts, of_image, of_text)}
    return {
        f"{way}_r{k}": share
        for way, args in ways.items()
        for k, share in recall(*args, [k for k in ks if k <= len(args[1])]).items()
    }


def _similarities(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE] @ columns.T


def _check_k(k: int, most: int, what: str) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"k = {k}: must be 1 to {most}, the number of {what}")
