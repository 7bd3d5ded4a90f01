"""Settings of a judge that is a language model behind an OpenAI-compatible endpoint."""

import json
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from preftune.config.address import AddressConfig
from preftune.config.base import Count, Name, NonNegative

LLM = "llm:"  # before the name of a model
_OURS = {"model", "messages", "temperature", "max_tokens", "stream", "n"}


class LLMConfig(AddressConfig):
    """Where the model is asked, and how. What is in `decides` belongs to the key of a stage."""

    template: Name | None = Field(
        default=None,
        description="File with the question, holding {prompt}, {first} and {second}; none takes the "
        "shipped one.",
    )
    temperature: NonNegative | None = Field(
        default=0.0, description="Sampling temperature of the judge; none does not send one."
    )
    max_tokens: Count | None = Field(
        default=512, description="Maximum number of tokens of an answer; none does not send one."
    )
    options: Name | None = Field(
        default=None,
        description="Further fields of the request, as JSON: '{\"max_completion_tokens\": 512}'.",
    )
    timeout: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=60.0, description="Timeout in seconds of one question, whole answer included."
    )
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        default=5,
        description="How often to ask again where the endpoint fails, after 1, 2, 4, ... seconds or as long "
        "as it says, the longer of both.",
    )
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Questions at a time; the results do not depend on it."
    )
    price_in: NonNegative | None = Field(
        default=None, description="Price of a million tokens of questions, in a currency of your choice."
    )
    price_out: NonNegative | None = Field(default=None, description="Price of a million tokens of answers.")

    @model_validator(mode="after")
    def _options_are_fields(self) -> Self:
        try:
            fields = json.loads(self.options or "{}")
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise ValueError("options is no JSON object; write it like '{\"seed\": 1}'")
        if ours := sorted(_OURS & fields.keys()):
            raise ValueError(f"options holds {', '.join(ours)}, which has a place of its own or is not used")
        return self

    @property
    def decides(self) -> dict[str, Any]:
        """The fields of a request besides model and messages: verdicts depend on them."""
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {k: v for k, v in sampling.items() if v is not None} | json.loads(self.options or "{}")
