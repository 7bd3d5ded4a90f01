"""What every config model shares: strict types, no unknown keys, no change after it is built."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A group of settings. Values are checked strictly: the text "3" is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]  # a number of things
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # a part of a whole
Name = Annotated[str, Field(min_length=1)]
