"""Settings of the optimizer of a stage."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from preftune.config.base import NonNegative, Positive, Settings, Share


class OptimizerConfig(Settings):
    """AdamW and the course of its learning rate over a stage."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="AdamW beta1: decay rate of the first moment."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="AdamW beta2: decay rate of the second moment."
    )
    eps: Positive = Field(default=1e-8, description="AdamW epsilon, added to the denominator.")
    weight_decay: NonNegative = Field(
        default=0.0, description="Decoupled weight decay, of parameters with two dimensions or more."
    )
    decay_all: bool = Field(default=False, description="Decay norms and biases, too.")
    warmup: Share = Field(default=0.05, description="Fraction of the steps used for linear warm-up.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning-rate schedule after the warm-up."
    )
    final: Share = Field(default=0.0, description="Final learning rate as a fraction of the peak.")
    max_grad_norm: Positive = Field(default=1.0, description="Clip the gradient norm to this.")

    def unused(self, key: str, group: str) -> str | None:
        if key == "final" and self.schedule == "constant":
            return f"a constant learning rate does not fall: {group}.schedule is linear or cosine then"
        return super().unused(key, group)

    def warm_steps(self, steps: int) -> int:
        """Steps of the warm-up, of so many in all."""
        return round(self.warmup * steps)

    def same_rates(self, steps: int, more: int) -> bool:
        """Whether the first `steps` have the rates that they have if there are `more` in all."""
        flat = self.schedule == "constant" or self.final == 1
        return flat and self.warm_steps(steps) == self.warm_steps(more)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """A whole table without `decay_all` is of a run in which all decayed."""
        if not isinstance(values, dict):
            return values
        if values.get("weight_decay", 0) == 0:  # none decay: it says nothing
            says_which = type(values.get("decay_all")) is bool
            return {**values, "decay_all": False} if says_which else values
        whole = cls.model_fields.keys() - {"decay_all"} <= values.keys()
        return {"decay_all": True, **values} if whole else values

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `decay_all` where nothing is spared: keys of stages from before it stay valid."""
        values = serialize(self)
        if self.decay_all or self.weight_decay == 0:
            values.pop("decay_all", None)
        return values
