"""Reading pictures against webdataset + PIL, and packing by two budgets against first come, first packed.

    python -m tests.bench.bench_images [--pictures 2000] [--rounds 5]

JPEGs of 256 x 256 to 224 x 224: pictures/s of whole epochs; the candidates take turns; medians over the rounds, ratios
to webdataset of the same run. Energon takes part where it is installed. Then the costs of packed rows on 8 ranks.
"""

import argparse
import contextlib
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.decode import decode, simplejpeg
from data_pipeline.images.form import PictureForm
from data_pipeline.images.pack import Rows, pack_rows, packing_cost
from data_pipeline.images.pairs import PairStream
from data_pipeline.images.stream import ImageTextStream
from data_pipeline.images.write import ImageText, write_image_shards
from data_pipeline.loader import Loader
from data_pipeline.pack import permutation, permuted
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

try:
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon.tools.prepare import command as prepare_energon
except ImportError:
    prepare_energon = None

SIZE = 224
BATCH = 32
SHARDS = 4
RANKS = 8
WORDS = ("a", "red", "blue", "old", "small", "dog", "cat", "house", "tree", "boat", "standing", "near", "under", "the")


def make_pictures(count: int) -> Iterator[ImageText]:
    """Coloured blobs with grain: JPEGs of quality 90 and about 24 kB, as photographs of this size have."""
    rng = np.random.default_rng(0)
    for number in range(count):
        blobs = Image.fromarray(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8)).resize((256, 256))
        pixels = np.asarray(blobs) + rng.normal(0, 6, (256, 256, 1))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        caption = " ".join(rng.choice(WORDS, rng.integers(5, 20)))
        yield ImageText(f"{number:06d}", [("jpg", file.getvalue())], caption)


def plain(image: Image.Image) -> np.ndarray:
    """What is usual: shorter side to 224, the middle, channels first."""
    image = image.convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.ascontiguousarray(np.asarray(image.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1))


def encode_sample(sample: tuple[Image.Image, bytes], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    return plain(sample[0]), tokenizer.encode(sample[1].decode())


def collate(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, list[np.ndarray]]:
    return torch.from_numpy(np.stack([image for image, _ in samples])), [tokens for _, tokens in samples]


def pil_loop(shards: list[Path]) -> int:
    count = 0
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    file = archive.extractfile(member)
                    assert file is not None
                    plain(Image.open(io.BytesIO(file.read())))
                    count += 1
    return count


def webdataset_loader(shards: list[Path], tokenizer: Tokenizer, workers: int) -> DataLoader:
    split = webdataset.split_by_worker if workers else None
    dataset = (
        webdataset.WebDataset([str(path) for path in shards], shardshuffle=False, workersplitter=split)
        .decode("pilrgb", only=["jpg"])
        .to_tuple("jpg", "txt")
        .map(lambda sample: encode_sample(sample, tokenizer))
    )
    more = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    return DataLoader(dataset, batch_size=BATCH, collate_fn=collate, num_workers=workers, **more)


def energon_loader(shards: list[Path], tokenizer: Tokenizer, workers: int) -> Any:
    """Energon over the same shards, prepared by its own command; pictures become arrays as webdataset's do here."""
    fields = json.dumps({"image": "jpg", "caption": "txt"})
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--force-overwrite"]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_energon(
            [str(shards[0].parent), *options, "--field-map", fields, "--no-progress"], standalone_mode=False
        )

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="pilrgb")

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            sample.image = torch.from_numpy(plain(sample.image))
            sample.caption = torch.from_numpy(tokenizer.encode(sample.caption).astype(np.int64))
            return sample

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    options = {"shuffle_buffer_size": None, "max_samples_per_sequence": None, "task_encoder": Encoder()}
    dataset = get_train_dataset(str(shards[0].parent), batch_size=BATCH, worker_config=config, **options)
    return get_loader(dataset, watchdog_timeout_seconds=None)


def loop(loader: Any, count: int, size: Callable[[Any], int]) -> int:
    """An epoch's pictures out of a loader, whether it ends or not."""
    done = 0
    for batch in loader:
        done += size(batch)
        if done >= count:
            break
    return done


def ours(stream: PairStream | ImageTextStream, threads: bool) -> int:
    """One epoch; the pictures are those that arrive."""
    done, rows = 0, BATCH if isinstance(stream, PairStream) else BATCH // 4
    with Loader(stream, global_batch=rows, micro_batch=rows, prefetch=2 if threads else 0) as loader:
        for _ in range(stream.num_samples // rows):
            images = next(loader)[0][0]["images"]
            done += int((images.amax(1) + 1).sum())
    return done


def measure(folder: Path, pictures: int, rounds: int) -> None:
    shards = write_image_shards(make_pictures(pictures), folder, shard_samples=-(-pictures // SHARDS))
    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, vocab_size=340)
    begin = time.perf_counter()
    dataset = ImageTextDataset(shards, tokenizer, progress=False)
    print(f"{pictures} pictures indexed in {time.perf_counter() - begin:.2f} s, once", flush=True)
    form = PictureForm(patch=16, image_token=0, size=SIZE)
    pairs = {threads: PairStream(dataset, form, seq_len=32, workers=threads) for threads in (0, 2)}
    packed = ImageTextStream(dataset, form, seq_len=1024, patches=1024, workers=2)
    loaders = {workers: webdataset_loader(shards, tokenizer, workers) for workers in (0, 2)}
    candidates: dict[str, Callable[[], int]] = {
        "PIL loop": lambda: pil_loop(shards),
        "webdataset + PIL, no worker": lambda: loop(loaders[0], pictures, lambda batch: len(batch[0])),
        "ours, pairs, no thread": lambda: ours(pairs[0], False),
        "webdataset + PIL, 2 workers": lambda: loop(loaders[2], pictures, lambda batch: len(batch[0])),
        "ours, pairs, 2 threads": lambda: ours(pairs[2], True),
        "ours, packed rows, 2 threads": lambda: ours(packed, True),
    }
    if prepare_energon is not None:
        for workers in (0, 2):
            energon = energon_loader(shards, tokenizer, workers)
            candidates[f"Energon, {workers or 'no'} worker{'s' if workers else ''}"] = lambda e=energon: loop(
                e, pictures, lambda batch: len(batch.image)
            )
    report(candidates, rounds)


def report(candidates: dict[str, Callable[[], int]], rounds: int) -> None:
    """Medians by the clock and by the CPU time of all processes, which others on the machine disturb less."""
    rates: dict[str, list[tuple[float, float]]] = {label: [] for label in candidates}
    for _ in range(rounds + 1):  # the first, which starts workers, does not count
        for label, work in candidates.items():
            begin, begin_cpu = time.perf_counter(), cpu_seconds()
            count = work()
            rates[label].append((count / (time.perf_counter() - begin), count / (cpu_seconds() - begin_cpu)))
    medians = {label: np.median(found[1:], axis=0) for label, found in rates.items()}
    print(f"{'candidate':<30} {'pictures/s':>10} {'best':>6} {'ratio':>6} {'/CPU s':>8} {'ratio':>6}")
    for label, (clock, cpu) in medians.items():
        best = max(found[0] for found in rates[label][1:])
        peer = medians["webdataset + PIL, 2 workers" if "2" in label else "webdataset + PIL, no worker"]
        print(f"{label:<30} {clock:>10,.0f} {best:>6,.0f} {clock / peer[0]:>6.2f} {cpu:>8,.0f} {cpu / peer[1]:>6.2f}")


def cpu_seconds() -> float:
    """Of this process and its workers, those that have ended as well."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (own, *own.children(recursive=True)))


def compare_pixels(count: int = 200) -> None:
    """How far the pictures lie from a full decode and a bicubic resize."""
    errors = []
    for sample in make_pictures(count):
        data = sample.pictures[0][1]
        wanted = plain(Image.open(io.BytesIO(data))).transpose(1, 2, 0).astype(int)
        errors.append(np.abs(decode(data, SIZE, SIZE, crop=True) - wanted))
    found = np.stack(errors)
    decoder = "libjpeg-turbo at 7/8" if simplejpeg is not None else "Pillow"
    print(
        f"pixels by {decoder}: mean difference {found.mean():.2f} of 255, 99.9 % below {np.quantile(found, 0.999):.0f}"
    )


def first_come(tokens: np.ndarray, patches: np.ndarray, order: np.ndarray, seq_len: int, budget: int) -> Rows:
    """A row is closed when the next sample does not fit."""
    first, used = [0], [0, 0]
    for place, sample in enumerate(order.tolist()):
        if used[0] + tokens[sample] > seq_len or used[1] + patches[sample] > budget:
            first.append(place)
            used = [0, 0]
        used = [used[0] + int(tokens[sample]), used[1] + int(patches[sample])]
    return Rows(order, np.array([*first, len(order)]))


def compare_packing(samples: int = 100_000) -> None:
    """A log-normal mix: captions of 3 to 1,000 tokens, pictures of 4 to 1,024 patches, 4 patches a token."""
    rng = np.random.default_rng(0)
    patches = rng.lognormal(5, 1, samples).clip(4, 1024).astype(np.int64) // 4 * 4
    tokens = patches // 4 + rng.lognormal(4, 1, samples).clip(3, 1000).astype(np.int64)
    order = permutation(samples, 1, 0)
    for seq_len, budget in ((2048, 4096), (4096, 8192), (8192, 16384)):
        begin = time.perf_counter()
        two = pack_rows(tokens, patches, order, seq_len=seq_len, budget=budget)
        seconds = time.perf_counter() - begin
        candidates = {"two budgets": two, "first come": first_come(tokens, patches, order, seq_len, budget)}
        for label, rows in candidates.items():
            sums = [np.add.reduceat(amounts[rows.members], rows.first[:-1]) for amounts in (tokens, patches)]
            count = len(rows.first) - 1
            steps = count // RANKS
            shuffled = permuted(np.arange(steps * RANKS), count, 1, 0)
            laid = [amounts[shuffled].reshape(steps, RANKS) for amounts in sums]
            cost = packing_cost(laid[0], laid[1], seq_len=seq_len, budget=budget, ranks=RANKS)
            print(
                f"S {seq_len:>5} P {budget:>6} {label:<12} rows {count:>6}  max/mean {cost.max_over_mean:.3f} (worst "
                f"{cost.worst:.3f})  padding: tokens {cost.token_padding:.1%} patches {cost.patch_padding:.1%}",
                flush=True,
            )
        print(f"      packed {samples / seconds:,.0f} samples/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare_packing()
    compare_pixels()
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):
        measure(Path(name), options.pictures, options.rounds)


if __name__ == "__main__":
    main()
