"""The objectives that recipes can name. Objective = collate + count + loss; the loop knows no modality."""

from typing import Any

from pretrain.objectives.causal import CausalConfig, CausalObjective
from pretrain.objectives.classification import ClassificationConfig, ClassificationObjective
from pretrain.objectives.contrastive import ContrastiveConfig, ContrastiveObjective

OBJECTIVES: dict[str, tuple[type[Any], type[Any]]] = {
    "causal": (CausalConfig, CausalObjective),
    "classification": (ClassificationConfig, ClassificationObjective),
    "contrastive": (ContrastiveConfig, ContrastiveObjective),
}
