"""The recipe's `[deepspeed]` section: read without the package."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Place = Literal["none", "cpu", "nvme"]


class DeepSpeedOptions(BaseModel):
    """What of a run's state the data processes share, and where it lies.

    Source: Rajbhandari et al. 2020 (arXiv:1910.02054); offloading: arXiv:2101.06840, arXiv:2104.07857.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    zero: Literal[0, 1, 2, 3] = Field(
        2, description="Cut over the data processes: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too"
    )
    offload_optimizer: Place = Field(
        "none", description="Keep optimizer state elsewhere and update there; needs zero 1, nvme needs zero 3"
    )
    offload_parameters: Place = Field("none", description="Keep parameters elsewhere; needs zero 3")
    nvme_path: str = Field("", description="Folder on a local disk for what is kept on nvme")
    persistent: int = Field(
        100_000, ge=0, description="zero 3: parameters of fewer elements are gathered once a step, not at each use"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "DeepSpeedOptions":
        least = {"none": 0, "cpu": 1, "nvme": 3}[self.offload_optimizer]
        if self.zero < least:
            raise ValueError(
                f'deepspeed.offload_optimizer = "{self.offload_optimizer}" needs deepspeed.zero = {least} or more, '
                f"which is {self.zero}; raise it, or set offload_optimizer to none"
            )
        if self.offload_parameters != "none" and self.zero < 3:
            raise ValueError(
                f'deepspeed.offload_parameters = "{self.offload_parameters}" needs deepspeed.zero = 3, which is '
                f"{self.zero}; raise it, or set offload_parameters to none"
            )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            raise ValueError("deepspeed.nvme_path is empty, but something is to be kept on nvme; name a folder there")
        return self
