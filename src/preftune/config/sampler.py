"""Settings of a vLLM server that writes the responses of stages that sample (docs/vllm.md)."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from preftune.config.address import AddressConfig
from preftune.config.base import Count, Name, Positive


class SamplerConfig(AddressConfig):
    """Which server samples, how it gets the weights, and how far it may be from the policy. What is in
    `decides` belongs to the key of a stage.
    """

    url: Name | None = Field(
        default=None,
        description="Address of a vLLM server that samples responses, such as http://127.0.0.1:8000; none "
        "samples in preftune.",
    )
    model: Name | None = Field(
        default=None, description="Name under which the server offers the model; none takes its only one."
    )
    weights_dir: Name | None = Field(
        default=None,
        description="Directory for passing weights, which the server must see under the same path.",
    )
    refresh_every: Count = Field(
        default=1,
        description="Steps between updates of the server's weights; with 1 every step samples from the "
        "current policy.",
    )
    max_kl: Positive = Field(
        default=0.02,
        description="Maximum KL from server to policy in a step, in nats per token (k3); more stops the run, "
        "since the server may have stale weights or another model.",
    )
    importance_sampling_cap: Positive | None = Field(
        default=2.0,
        description="Upper limit of the importance weights, policy over server, that correct the policy "
        "loss; none does not correct.",
    )
    timeout: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=240.0, description="Timeout in seconds of one request, including the whole answer."
    )
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        default=5, description="Number of retries if the server fails, after 1, 2, 4, ... seconds."
    )
    parallel: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=64, description="Number of prompts to sample for at a time."
    )

    @model_validator(mode="after")
    def _weights_have_a_way(self) -> Self:
        if self.url is not None and self.weights_dir is None:
            raise ValueError("weights_dir is needed: a directory that the server sees by the same path")
        if self.url is None and self.weights_dir is not None:
            raise ValueError("url is needed: weights_dir has a use with a server only")
        return self

    @property
    def decides(self) -> dict[str, Any]:
        """What changes the numbers of a stage."""
        names = {"refresh_every", "importance_sampling_cap"}
        return {"kind": "vllm", **self.model_dump(include=names)}
