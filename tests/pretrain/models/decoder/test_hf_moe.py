"""Mixtral, Qwen3-MoE and OLMoE, beyond the round trips of test_hf.py: other files, refusals, planted bugs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints.hf.brand import Misfit, choose_brand
from checkpoints.hf.folder import read_config
from checkpoints.hf.ops import Row, Stack
from checkpoints.hf.verify import NotEqual
from checkpoints.store import CheckpointStore
from launch.commands.convert import native_tensors
from parallel.materialise import named_tensors
from parallel.world import World
from pretrain.config import resolve, validate, write_config
from pretrain.load import load_trained
from pretrain.models.decoder import hf
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.hf import BRANDS
from pretrain.train import train
from tests.checkpoints.hf.tiny import CASES, VOCAB, checkpoint_command, make_model, save_model
from tests.small import small_overrides

MOE_CASES = ["mixtral", "qwen3-moe", "qwen3-moe-some", "olmoe"]


def tensors_of(run: Path) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in named_tensors(load_trained(run).model)[0].items()}


# --- files that hold the same model in other ways ---


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
@pytest.mark.parametrize("name", MOE_CASES)
def test_files_with_stacked_experts_are_the_same_model(name: str, bare: bool, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory and writes on request; of them `export` makes one tensor an expert."""
    model = make_model(CASES[name])
    each, stacked = tmp_path / "each", tmp_path / "stacked"
    model.save_pretrained(each)
    model.save_pretrained(stacked, save_original_format=False)
    before, other = load_file(each / "model.safetensors"), load_file(stacked / "model.safetensors")
    assert any(key.endswith("experts.gate_up_proj") for key in other) and len(other) < len(before)
    if bare:
        other = {key.removeprefix("model."): tensor for key, tensor in other.items()}
        save_file(other, stacked / "model.safetensors", metadata={"format": "pt"})

    assert checkpoint_command("import", stacked, tmp_path / "run") == 0
    assert checkpoint_command("export", tmp_path / "run", tmp_path / "back") == 0
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def with_experts(folder: Path, key: str, experts: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: experts}))


@pytest.mark.parametrize("asked", [4, 6])
@pytest.mark.parametrize(("name", "key"), [("mixtral", "num_local_experts"), ("qwen3-moe", "num_experts")])
def test_another_number_of_experts_than_the_config_asks_for(name: str, key: str, asked: int, tmp_path: Path) -> None:
    theirs = save_model(CASES[name], tmp_path / "hf")
    with_experts(theirs, key, asked)
    if key == "num_experts":  # the config as older transformers wrote it
        config = json.loads((theirs / "config.json").read_text())
        config.pop("num_local_experts", None)
        (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"hf has 5 experts in a layer, but its config asks for {asked}$"):
        checkpoint_command("import", theirs, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_number_of_stacked_experts(tmp_path: Path) -> None:
    make_model(CASES["olmoe"]).save_pretrained(tmp_path / "hf", save_original_format=False)
    with_experts(tmp_path / "hf", "num_experts", 8)
    with pytest.raises(ValueError, match=r"has shape \[7, .*\], but its config asks for \[8, "):
        checkpoint_command("import", tmp_path / "hf", tmp_path / "run")


@pytest.mark.parametrize("expert", [2, 4])  # between others, and the last
def test_a_missing_expert_is_no_other_number_of_experts(expert: int, tmp_path: Path) -> None:
    theirs = save_model(CASES["mixtral"], tmp_path / "hf")
    tensors = load_file(theirs / "model.safetensors")
    gone = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
    del tensors[gone]
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks the tensor '{gone}': download it again"):
        checkpoint_command("import", theirs, tmp_path / "run")


# --- what the conversion says and computes ---


@pytest.mark.parametrize("name", MOE_CASES)
def test_every_tensor_has_a_say_in_the_logits(name: str, tmp_path: Path) -> None:
    """Each expert's for itself: so that the logits of the round trip prove all of them."""
    save_model(CASES[name], tmp_path / "hf")
    checkpoint_command("import", tmp_path / "hf", tmp_path / "run")
    model = load_trained(tmp_path / "run").model
    tokens = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    silent = []
    with torch.inference_mode():
        before = model.logits(model(tokens))
        for tensor_name, tensor in named_tensors(model)[0].items():
            parts = list(tensor) if ".experts." in tensor_name else [tensor]
            for index, part in enumerate(parts):
                saved = part.clone()
                part.add_(torch.randn_like(part) * 0.3)
                if (model.logits(model(tokens)) - before).abs().max() < 1e-3:
                    silent.append((tensor_name, index))
                part.copy_(saved)
    assert not silent


def swap_gate_and_up(row: Row) -> Row:
    other = {"gate": "w3", "up": "w1"}.get(row.native[0].rpartition(".")[2]) if isinstance(row, Stack) else None
    return Stack(row.native[0], f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{other}.weight") if other else row


class Reversed(Stack):
    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return super().to_hf(tensors)[::-1]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return super().to_native(tensors[::-1], shapes)


def reverse_experts(row: Row) -> Row:
    return Reversed(row.native[0], row.hf[0]) if isinstance(row, Stack) else row


@pytest.mark.parametrize("bug", [swap_gate_and_up, reverse_experts])
def test_a_mapping_bug_of_experts_is_found(bug: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Both are undone by importing, so that comparing tensors alone would not see them."""
    save_model(CASES["mixtral"], tmp_path / "hf")
    checkpoint_command("import", tmp_path / "hf", tmp_path / "run")
    rows = tuple(bug(row) for row in hf.MIXTRAL.tensors)
    monkeypatch.setitem(hf.BRANDS, "mixtral", replace(hf.MIXTRAL, tensors=rows))
    with pytest.raises(NotEqual, match=r"logits differ by .*; block 0 is the first whose output differs"):
        checkpoint_command("export", tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def native(**moe: Any) -> dict[str, Any]:
    experts = {"experts": 6, "top_k": 2, "ffn": 28, **moe}
    sizes = {"vocab_size": VOCAB, "hidden": 48, "layers": 3, "ffn": 76, "heads": 6, "kv_heads": 2, "max_seq_len": 64}
    return sizes | {"moe": experts}


FROM_SCRATCH: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", native(balance="sequence", balance_weight=0.2, z_weight=0.1)),
    "mixtral-other-training": ("mixtral", native(balance="none", groups=3, top_groups=3, precision="fp64")),
    "qwen3_moe": ("qwen3_moe", native(first_dense=1, normalize=False) | {"qk_norm": "head"}),
    "olmoe": ("olmoe", native(normalize=False, balance="micro_batch") | {"qk_norm": "full", "head_dim": 8}),
}


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_native_model_exports_under_its_brand_and_comes_back(name: str, tmp_path: Path) -> None:
    """However it was balanced; the coefficient that the brand has is the weight of ours."""
    brand, model = FROM_SCRATCH[name]
    config = validate({"run": {"dir": "x"}, "model": model, "data": {"seq_len": 32}}, "test")
    run = tmp_path / "run"
    run.mkdir()
    write_config(config, run / "config.toml")
    shapes, ties = native_tensors(config.model)
    torch.manual_seed(0)
    tensors = {tensor: torch.randn(shape) * 0.2 for tensor, shape in shapes.items()}
    CheckpointStore(run / "checkpoints").save(3, tensors, {}, {}, ties=ties)
    assert checkpoint_command("export", run, tmp_path / "out") == 0
    exported = json.loads((tmp_path / "out/config.json").read_text())
    weight = model["moe"].get("balance_weight", 0.01) if model["moe"].get("balance") != "none" else 0.0
    assert (exported["model_type"], exported["router_aux_loss_coef"]) == (brand, weight)
    assert checkpoint_command("import", tmp_path / "out", tmp_path / "again") == 0
    back = tensors_of(tmp_path / "again")
    assert back.keys() == tensors.keys() and all(torch.equal(tensors[key], back[key]) for key in back)
    loaded = load_trained(tmp_path / "again").config.model.moe
    assert (loaded.balance_weight, loaded.balance) == (weight, "global")


@pytest.mark.parametrize(
    ("brand", "moe", "words"),
    [
        ("mixtral", {"bias": True}, "model.moe.bias = True (allowed: False)"),
        ("mixtral", {"scores": "sigmoid"}, "model.moe.scores = 'sigmoid' (allowed: 'softmax')"),
        ("mixtral", {"shared_ffn": 8}, "model.moe.shared_ffn = 8 (allowed: 0)"),
        ("qwen3_moe", {"groups": 3, "top_groups": 2}, "model.moe.top_groups = 2 (allowed: '3, as model.moe.groups')"),
        ("olmoe", {"scale": 2.5}, "model.moe.scale = 2.5 (allowed: 1.0)"),
        ("qwen3_moe", {"capacity": 1.5}, "model.moe.capacity = 1.5 (allowed: 0.0)"),
        ("olmoe", {"choice": "expert", "balance": "none"}, "model.moe.choice = 'expert' (allowed: 'token')"),
        ("mixtral", {"normalize": False}, "model.moe.normalize = False (allowed: True)"),
        ("mixtral", {"first_dense": 1}, "model.moe.first_dense = 1 (allowed: 0)"),
        ("olmoe", {"every": 2}, "model.moe.every = 2 (allowed: 1)"),
        ("llama", {}, "llama cannot express model.moe = 'set' (allowed: None)"),
    ],
)
def test_what_a_brand_cannot_express_is_refused(brand: str, moe: dict, words: str) -> None:
    more = {"mixtral": {}, "qwen3_moe": {"qk_norm": "head"}, "olmoe": {"qk_norm": "full"}, "llama": {}}
    config = DecoderConfig(**native(**moe), **more[brand]).model_dump(mode="json")
    with pytest.raises(Misfit) as caught:
        choose_brand(BRANDS, config, brand)
    assert words in str(caught.value) and str(caught.value).startswith(f"{brand} cannot express")
    dense = DecoderConfig(**(native() | {"moe": None}), **more[brand]).model_dump(mode="json")
    if brand != "llama":
        with pytest.raises(Misfit, match=rf"{brand} cannot express model.moe = None"):
            choose_brand(BRANDS, dense, brand)


def test_olmoe_has_no_width_of_heads_of_its_own() -> None:
    config = DecoderConfig(**native(), qk_norm="full", head_dim=10).model_dump(mode="json")
    with pytest.raises(Misfit, match=r"olmoe cannot express model.head_dim = 10 \(allowed: 0, 8"):
        choose_brand(BRANDS, config, "olmoe")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 (allowed: 0.0)"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok = 6 (allowed: '1 to num_local_experts = 5')"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 (allowed: None)"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers = [1] (allowed: 'layers that, with"),
        ("qwen3-moe", {"decoder_sparse_step": 9}, "mlp_only_layers = [] (allowed: 'layers that, with decoder_sparse"),
    ],
)
def test_config_features_we_lack_are_named(name: str, change: dict, message: str, tmp_path: Path) -> None:
    theirs = save_model(CASES[name], tmp_path / "hf")
    config = json.loads((theirs / "config.json").read_text()) | change
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(Misfit) as caught:
        checkpoint_command("import", theirs, tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, 5, 8])
def test_sparse_layers_of_qwen3_moe(layers: int) -> None:
    """Every list of sparse layers that we have is, in their words, the same list, and comes back."""
    for first_dense in range(layers):
        for every in range(1, layers - first_dense + 1):
            moe = {"first_dense": first_dense, "every": every}
            config = DecoderConfig(**(native(**moe) | {"layers": layers}), qk_norm="head")
            ours = [config.sparse(index) for index in range(layers)]
            written = hf.QWEN3_MOE.to_hf(config.model_dump(mode="json"))
            only, step = written["mlp_only_layers"], written["decoder_sparse_step"]
            assert ours == [index not in only and (index + 1) % step == 0 for index in range(layers)]
            back = hf.QWEN_EXPERTS.to_native(written)["moe"]
            again = DecoderConfig(**(native(**back) | {"layers": layers}))
            assert ours == [again.sparse(index) for index in range(layers)]


MIXTRAL_8X7B = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "max_window_layers": 48, "rope_theta": 1e6, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "use_sliding_window": False, "sliding_window": None,
    "tie_word_embeddings": False,
}  # fmt: skip
OLMOE_1B_7B = {
    "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": False, "router_aux_loss_coef": 0.01, "clip_qkv": None, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("published", "all_parameters", "active", "normalize"),
    [
        (MIXTRAL_8X7B, 46_702_792_704, 12.9e9, True),
        (QWEN3_30B, 30_532_122_624, 3.3e9, True),
        (OLMOE_1B_7B, 6_919_161_856, 1.3e9, False),
    ],
    ids=["mixtral", "qwen3-moe", "olmoe"],
)
def test_published_configs_are_understood(
    published: dict, all_parameters: int, active: float, normalize: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published))
    brand, values, _ = read_config(tmp_path, BRANDS)
    config = DecoderConfig(**values)
    shapes, _ = native_tensors(config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == config.num_parameters() == all_parameters
    assert config.num_parameters(active=True) == pytest.approx(active, rel=0.03)
    assert config.moe is not None and config.moe.normalize == normalize
    assert config.moe.balance_weight == published["router_aux_loss_coef"]
    assert choose_brand(BRANDS, config.model_dump(mode="json"), None) == brand


def test_a_trained_run_goes_out_and_comes_back(tmp_path: Path, tiny_shards: Path) -> None:
    run, out, again = tmp_path / "run", tmp_path / "out", tmp_path / "again"
    moe = ("model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=64", "train.steps=4")
    train(resolve("tiny", [*small_overrides(run, tiny_shards), *moe])[0], World(0, 1, torch.device("cpu")))
    assert checkpoint_command("export", run, out) == 0
    assert checkpoint_command("import", out, again) == 0
    trained, back = load_trained(run).model, load_trained(again).model
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(200, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, imported = trained.logits(trained(tokens)), back.logits(back(tokens))
        torch.testing.assert_close(theirs(tokens, use_cache=False).logits, ours, rtol=0, atol=1e-4)
    assert torch.equal(ours, imported)
