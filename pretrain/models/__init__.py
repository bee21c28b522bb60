"""The families of models that recipes can name."""

from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.experts import feed_forward
from pretrain.models.decoder.hf import BRANDS as DECODER_BRANDS
from pretrain.models.decoder.megatron import facts as decoder_megatron
from pretrain.models.decoder.model import Decoder
from pretrain.models.decoder.plan import plan as decoder_plan
from pretrain.models.dual.config import DualConfig
from pretrain.models.dual.hf import BRANDS as DUAL_BRANDS
from pretrain.models.dual.model import Dual
from pretrain.models.dual.plan import plan as dual_plan
from pretrain.models.family import Family
from pretrain.models.vit.config import ViTConfig
from pretrain.models.vit.hf import BRANDS as VIT_BRANDS
from pretrain.models.vit.model import ViT
from pretrain.models.vit.plan import plan as vit_plan
from pretrain.models.vlm.config import VLMConfig
from pretrain.models.vlm.hf import BRANDS as VLM_BRANDS
from pretrain.models.vlm.model import VLM
from pretrain.models.vlm.plan import plan as vlm_plan

FAMILIES: dict[str, Family] = {
    "decoder": Family(
        config=DecoderConfig,
        build=Decoder,
        plan=decoder_plan,
        hf=DECODER_BRANDS,
        feed_forward=feed_forward,
        megatron=decoder_megatron,
    ),
    "dual": Family(config=DualConfig, build=Dual, plan=dual_plan, hf=DUAL_BRANDS),
    "vit": Family(config=ViTConfig, build=ViT, plan=vit_plan, hf=VIT_BRANDS),
    "vlm": Family(config=VLMConfig, build=VLM, plan=vlm_plan, hf=VLM_BRANDS, feed_forward=feed_forward),
}
