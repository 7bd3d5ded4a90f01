"""What every config model shares: strict types, no unknown keys, no change after it is built."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Settings(BaseModel):
    """A group of settings. Values are checked strictly: the text "3" is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def unused(self, key: str, group: str) -> str | None:
        """What the setting `key` of this group, which is called `group` in full, needs to be read, if that is
        missing in the group itself.
        """
        return None


def later(default: Any, description: str) -> Any:
    """A setting that came after the first runs: left out at its default, so that the keys of stages, the
    evaluations and the settings of runs from before it stay what they were.
    """
    return Field(default=default, exclude_if=lambda value: value == default, description=description)


Count = Annotated[int, Field(ge=1)]  # a number of things
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # a part of a whole
Name = Annotated[str, Field(min_length=1)]


def comma_text(value: Any) -> Any:
    """A list of texts as one text with commas, which a setting may also be."""
    return ", ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def words_in(text: str | None) -> tuple[str, ...]:
    """The parts of a text with commas."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _are_several(text: str) -> str:
    words = words_in(text)
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError(f"{text!r} should be two or more different words, separated by commas")
    return text


Words = Annotated[str, BeforeValidator(comma_text), AfterValidator(_are_several)]
