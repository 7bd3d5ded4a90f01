"""Settings of a judge that is a language model behind an OpenAI-compatible endpoint."""

import json
import re
from typing import Annotated, Any, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, model_validator

from preftune.config.base import Count, Name, NonNegative, Settings

LLM = "llm:"  # before the name of a model
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_OURS = {"model", "messages", "temperature", "max_tokens", "stream", "n"}


class LLMConfig(Settings):
    """Where the model is asked, and how. What is in `decides` belongs to the key of a stage."""

    url: Name | None = Field(
        default=None,
        description="Address of the endpoint, up to the version: http://127.0.0.1:8000/v1.",
    )
    key_variable: Name | None = Field(
        default=None,
        description="Environment variable that holds the endpoint's key, such as OPENAI_API_KEY; none sends "
        "no key. The key itself is written nowhere.",
    )
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
        description="How often to ask again where the endpoint fails, after 1, 2, 4, ... seconds, or as long "
        "as it says.",
    )
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Questions at a time; the results do not depend on it."
    )
    price_in: NonNegative | None = Field(
        default=None, description="Price of a million tokens of questions, in a currency of your choice."
    )
    price_out: NonNegative | None = Field(default=None, description="Price of a million tokens of answers.")

    @model_validator(mode="after")
    def _address_is_one(self) -> Self:
        if self.url is None:
            return self
        parts, plain = urlsplit(self.url), re.fullmatch(r"https?://[!-~]+", self.url)
        if not plain or not parts.hostname or parts.query or parts.fragment or not _has_port(parts):
            raise ValueError("url is no address of an endpoint; write it like http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url holds a name or password; put the key into a variable: key_variable")
        if self.key_variable and parts.scheme == "http" and parts.hostname not in _THIS_MACHINE:
            raise ValueError(f"the key would go to {parts.hostname} unencrypted; use https")
        return self

    @model_validator(mode="after")
    def _variable_is_one(self) -> Self:
        """Its name must be one that messages and logs are cleaned of (`untrusted`)."""
        name = self.key_variable
        if name is not None and not re.fullmatch(r"(?i)[A-Z_]\w*_(KEY|TOKEN)", name):
            raise ValueError("key_variable is the name of a variable that ends in _KEY or _TOKEN, not a key")
        return self

    @model_validator(mode="after")
    def _options_are_fields(self) -> Self:
        try:
            fields = json.loads(self.options or "{}")
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise ValueError("options is no JSON object; write it like '{\"seed\": 1}'")
        if taken := sorted(_OURS & fields.keys()):
            raise ValueError(f"options holds {', '.join(taken)}, which has a place of its own or is not used")
        return self

    @property
    def decides(self) -> dict[str, Any]:
        """The fields of a request besides model and messages: verdicts depend on them."""
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {k: v for k, v in own.items() if v is not None} | json.loads(self.options or "{}")


def _has_port(parts: SplitResult) -> bool:
    """Whether the port is none, or one."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False
