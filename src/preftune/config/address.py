"""Where a server is asked: its address, and the name of a variable with its key."""

import re
from typing import Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, model_validator

from preftune.config.base import Name, Settings

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class AddressConfig(Settings):
    """A server with an OpenAI-compatible API."""

    url: Name | None = Field(
        default=None, description="Address of the endpoint, up to the version: http://127.0.0.1:8000/v1."
    )
    key_variable: Name | None = Field(
        default=None,
        description="Environment variable with the API key, such as OPENAI_API_KEY; none sends no key. "
        "The key itself is never stored.",
    )

    @model_validator(mode="after")
    def _address_is_one(self) -> Self:
        if self.url is None:
            return self
        address, plain = urlsplit(self.url), re.fullmatch(r"https?://[!-~]+", self.url)
        if not plain or not address.hostname or address.query or address.fragment or not _has_port(address):
            raise ValueError("url is no address of an endpoint; write it like http://127.0.0.1:8000/v1")
        if address.username is not None or address.password is not None:
            raise ValueError("url holds a name or password; put the key into a variable: key_variable")
        if self.key_variable and address.scheme == "http" and address.hostname not in _THIS_MACHINE:
            raise ValueError(f"the key would go to {address.hostname} unencrypted; use https")
        return self

    @model_validator(mode="after")
    def _variable_is_one(self) -> Self:
        """Its name must be one that messages and logs are cleaned of (`untrusted`)."""
        name = self.key_variable
        if name is not None and not re.fullmatch(r"(?i)[A-Z_]\w*_(KEY|TOKEN)", name):
            raise ValueError("key_variable is the name of a variable that ends in _KEY or _TOKEN, not a key")
        return self


def _has_port(address: SplitResult) -> bool:
    """Whether the port is none, or one."""
    try:
        return address.port is None or address.port > 0
    except ValueError:
        return False
