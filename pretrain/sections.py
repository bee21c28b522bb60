"""The sections of a recipe that configure nothing of one module alone; others stand beside what they configure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.images.decode import MAX_BYTES, MAX_PIXELS
from parallel.engine import Precision
from parallel.remat import Recompute


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)


class RunConfigSection(Section):
    """`[run]`"""

    dir: str = Field("runs/default", min_length=1, description="Folder of the run's outputs")
    seed: int = Field(1, ge=0, description="Seed of initial weights and data order")
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="auto: continue a run found in the folder; never: refuse one; must: refuse a new one"
    )


class TokenizerConfig(Section):
    """`[tokenizer]`"""

    path: str = Field("", description="Tokenizer folder or file; empty: the one that the shards were built with")


class SourceConfig(Section):
    """One of `[[data.sources]]`"""

    shards: str = Field(
        description="Shards of text or of pictures with text: a path, glob, URL or `pipe:command`, braces expanded"
    )
    name: str = Field("", description="What the run remembers the source by; empty: its shards")
    weight: float | tuple[tuple[int, float], ...] = Field(
        1.0,
        description="Share of samples, over the sum of all sources' weights; [[0, 1.0], [1000000, 0.5]]: another one "
        "from so many tokens of the run on",
    )
    epochs: float = Field(0.0, ge=0, description="Times that the source is read at most; 0: without end")


class PicturesConfig(Section):
    """`[data.pictures]`"""

    resize: Literal["crop", "squash", "native"] = Field(
        "crop",
        description="crop: shorter side to `size`, the middle of the longer; squash: both sides; native: near a "
        "picture's own size and aspect",
    )
    size: int = Field(0, ge=0, description="Pixels of a side, for crop and squash; 0: what the tower's grid has")
    max_patches: int = Field(0, ge=0, description="Patches of a picture, for native; 0: what the tower's grid has")
    placeholder: str = Field("<image>", min_length=1, description="Text that stands for the next picture")
    newline: int = Field(-1, ge=-1, description="Token after each row of a picture (Fuyu); -1: none")
    image_first: bool = Field(True, description="The picture of a caption without placeholder comes before it")
    broken: Literal["skip", "fatal"] = Field("skip", description="Samples that cannot be used: counted, or the end")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="Height x width of a picture; larger ones are broken")
    max_bytes: int = Field(MAX_BYTES, gt=0, description="Bytes of a picture's file; larger ones are broken")
    workers: int = Field(0, ge=0, description="Threads that decode, beside the one that reads ahead")


class CacheConfig(Section):
    """`[data.cache]`"""

    dir: str = Field("~/.cache/pretrain/shards", min_length=1, description="Where shards from elsewhere are kept")
    gb: float = Field(100.0, gt=0, description="Gigabytes (1e9 bytes) of them at most; less where the disk has less")
    retries: int = Field(5, ge=0, description="Further attempts, with growing pauses, after one that failed")
    timeout: float = Field(60.0, gt=0, description="Seconds without a byte that end an attempt")


class DataConfig(Section):
    """`[data]`"""

    seq_len: int = Field(512, gt=0, description="Tokens of one sample")
    sources: tuple[SourceConfig, ...] = Field((), description="Where samples come from; none: a small built-in text")
    temperature: float = Field(
        0.0,
        ge=0,
        description="Also weigh a source by its samples ** (1 / temperature): 1 as large, above: flatter; 0: no",
    )
    shuffle_shards: int = Field(
        0, ge=0, description="Shards whose documents are shuffled together, as many as a cache holds; 0: all"
    )
    skip: str = Field("", description="File of documents to leave out, a line each as `pretrain data ledger` prints it")
    patches: int = Field(0, ge=0, description="Image patches of one sample, all pictures together; 0: text alone")
    pictures: PicturesConfig = Field(PicturesConfig(), description="What becomes of pictures")
    cache: CacheConfig = Field(CacheConfig(), description="Of shards from elsewhere: http(s)://, s3://, gs://, pipe:")
    prefetch: int = Field(2, ge=0, description="Steps read ahead in a background thread")


class TrainConfig(Section):
    """`[train]`"""

    steps: int = Field(100, gt=0, description="Optimizer steps of the whole run")
    stop_at: int = Field(0, ge=0, description="Save and leave at this step, schedule untouched; 0: at the end")
    global_batch: int = Field(16, gt=0, description="Sequences a step, over all processes")
    micro_batch: int = Field(8, gt=0, description="Sequences of one forward and backward pass of one process")
    precision: Precision = Field(
        "bf16", description="bf16: mixed precision around fp32 parameters; fp32; or fp64, to check others against"
    )
    recompute: Recompute = Field("none", description="Activations recomputed in backward: none, selective or full")
    recompute_every: int = Field(1, gt=0, description="Recompute every so many blocks only, 1: all of them")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile: auto turns it on where a compiler exists and the run is long enough"
    )


class CheckpointConfig(Section):
    """`[checkpoint]`"""

    every: int = Field(100, gt=0, description="Steps between checkpoints; the last step is always saved")
    keep: int = Field(3, gt=0, description="Newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="Also keep each whose step is a multiple of this; 0: none")
    best: str = Field("", description="Also keep the best by this number, such as eval_loss; empty: none")
    best_mode: Literal["min", "max"] = Field("min", description="Whether the lowest or the highest is best")
    keep_best: int = Field(1, gt=0, description="How many of the best")
    every_minutes: float = Field(0.0, ge=0, description="Also save when this long has passed since the last; 0: no")
    in_background: bool = Field(
        True, alias="async", description="Training goes on once the tensors are copied to host memory"
    )
    remote: str = Field(
        "", description="Also copy each checkpoint below this URL (s3://, gs://), and fetch newer ones from there"
    )
    busy: Literal["wait", "skip"] = Field(
        "wait", description="A save that is due while another is being written: wait for that one, or skip it"
    )


class EvalConfig(Section):
    """`[eval]`"""

    every: int = Field(0, ge=0, description="Steps between held-out evaluations; 0: none")
    shards: str = Field("", description="Held-out shards: a path or glob")
    max_samples: int = Field(256, gt=0, description="Held-out sequences an evaluation reads at most")


class LogConfig(Section):
    """`[log]`"""

    every: int = Field(10, gt=0, description="Steps between console lines and TensorBoard points")
    spike: float = Field(
        8.0,
        ge=0,
        description="Robust z-score, over the last 100 steps, of a loss whose step's documents are logged; 0: never",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard scalars into the run's folder")
