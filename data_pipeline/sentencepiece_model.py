"""SentencePiece models: training, and the exact conversion to the ``tokenizers`` library.

The converted tokenizer is the one used everywhere: it is faster, Hugging Face reads it as it is, and it cuts
long documents into words first, which changes no result as long as no piece holds a space after another
letter.
"""

import io
from collections.abc import Iterable
from typing import Any, TypeAlias

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

TRAINABLE = ("bpe", "unigram")
SPACE = "\u2581"  # SentencePiece writes a space as this letter
CHUNK = 4000  # letters; training texts are cut so that no sentence is dropped for its length
PROBE = "def f(x):\n\tprint( 'a  b' )\r\n\n    # naïve Σ 日本語 🎉 e\u0301 --> 3.14159\n  return x\n "
UNIGRAM, BPE = 1, 2  # sentencepiece_model.proto: TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
Message: TypeAlias = Any  # protobuf makes its classes at run time, unseen by type checkers


def train_sentencepiece(texts: Iterable[str], *, model: str, vocab_size: int) -> bytes:
    """Train a lossless model: no normalisation, all spaces kept, bytes for unseen letters, digits one by one.

    Ids 0 to 3 are ``<unk> <s> </s> <pad>``; one thread, so that equal texts give equal bytes.

    Args:
        model: ``"bpe"`` or ``"unigram"``.
    """
    if model not in TRAINABLE:
        raise ValueError(f"tokenizer model {model!r}: must be {' or '.join(TRAINABLE)}")
    pieces = (text[at : at + CHUNK] for text in texts for at in range(0, len(text), CHUNK))
    result = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=result,
            model_type=model,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=16 * CHUNK,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise ValueError(
            f"tokenizer vocab_size {vocab_size}: SentencePiece cannot train it on this text: {reason} Use "
            f"more text or "
            f"another size"
        ) from error
    return result.getvalue()


def convert_sentencepiece(model: bytes, name: str) -> tuple[Tokenizer, dict[str, str]]:
    """The equal ``tokenizers`` tokenizer, and its special tokens by role (``eos_token`` ...).

    Raises:
        ValueError: ``name`` is not a SentencePiece model, or uses a feature with no equal there.
    """
    proto: Message = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # protobuf's DecodeError is no ValueError, and its module moves between versions
        raise ValueError(f"{name}: not a SentencePiece model ({error})") from error
    kind = proto.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"{name}: only unigram and BPE models with spaces before words convert; give a tokenizer.json")
    tokenizer = Tokenizer(_unigram(proto) if kind == UNIGRAM else _bpe(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Metaspace(prepend_scheme="never", split=False)]
    if not any(SPACE in piece.piece.lstrip(SPACE) for piece in proto.pieces):
        steps.append(pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    roles = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id()}
    roles |= {"eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    special = {role: processor.id_to_piece(number) for role, number in roles.items() if number >= 0}
    tokenizer.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)])
    tokenizer.add_tokens([piece.piece for piece in proto.pieces if piece.type == USER])
    if tokenizer.encode(PROBE, add_special_tokens=False).ids != processor.encode(PROBE):
        raise ValueError(
            f"{name}: has no equal in the tokenizers library (ids differ on a probe); give a tokenizer.json"
        )
    return tokenizer, special


def _unigram(proto: Message) -> models.Unigram:
    """Special and byte pieces get a hopeless score, for a text that spells one (``<0x09>``) is not one."""
    floor = 100 * min(piece.score for piece in proto.pieces)
    pieces = [(piece.piece, piece.score if piece.type in (NORMAL, USER) else floor) for piece in proto.pieces]
    return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Message) -> models.BPE:
    """SentencePiece joins the neighbours whose union scores best: every cut of a piece is a merge of its
    rank.
    """
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece in proto.pieces:
        cuts = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
        if piece.piece in normal:
            merges += [
                (-piece.score, vocab[left], vocab[right], left, right)
                for left, right in cuts
                if left in normal and right in normal
            ]
    return models.BPE(
        vocab,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(spec: Message) -> normalizers.Normalizer | None:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps) if steps else None
