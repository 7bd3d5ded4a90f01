"""What all stages of a run share: its config, its directory, its data, and a way to say what is going on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from preftune.config import RunConfig, StageSettings, from_outside, judge_of, parents
from preftune.config.algorithms.base import Part, names_a_stage
from preftune.config.algorithms.llm import LLMConfig
from preftune.config.rewards import source_hashes
from preftune.config.trainable import ALL, LORA
from preftune.data import Dataset, Encoder, Preference, order
from preftune.data.dataset import read_training, row_key
from preftune.data.encode import UNLIMITED
from preftune.errors import ConfigError, InputMissing
from preftune.evaluation.policy import Gold
from preftune.hashing import sha256_file
from preftune.judges.llm import read_template
from preftune.models.load import context_length, declared_ends, load_tokenizer, quiet_libraries
from preftune.models.locate import Source, fingerprint, locate, surroundings
from preftune.models.memory import keep_freed_memory
from preftune.records.base import read_record
from preftune.records.run import RunRecord
from preftune.records.stage import StageRecord
from preftune.rollout.calls import data_columns
from preftune.rundir import BASE, RunDir
from preftune.runs.console import Console
from preftune.runs.inputs import mirrored_commits
from preftune.runs.mirror import Mirror
from preftune.runs.outside import reading_of
from preftune.runs.sources import (
    data_settings,
    held_out_prompts,
    in_part,
    learners_rows,
    own_rows,
    sources_left_out,
)
from preftune.runs.stages import SIDE_FILE, Stage, check_model, inputs_in, settings_of
from preftune.sums import read_sealed, sum_of
from preftune.training.learner import Learner
from preftune.training.precision import Precision, effective_precision

_JUDGES = ("reward_model", "judge")  # settings that may name a reward model from elsewhere


Groups = Sequence[Sequence[Any]]


class GoesOver(Protocol):
    """How what follows a stage's steps goes over fixed rows: `work` is called with them, in their groups, and
    gives the result. `trained_on` says that training had these rows, so that their states may lie on disk.
    """

    def __call__(
        self, stage: str, groups: Groups, work: Callable[[Groups], Any], trained_on: bool
    ) -> Any: ...


def columns_hash(terms: str, rows: Sequence[Preference]) -> dict[str, str]:
    """A hash of the data's further columns, where functions may read them: {} where there is nothing."""
    columns = data_columns(terms)
    values = [[dict(r.columns)] if "**" in columns else [r.columns.get(n) for n in columns] for r in rows]
    read = any(value not in (None, {}) for row in values for value in row)
    return {"columns": sum_of({"values": json.loads(json.dumps(values, default=str))})} if read else {}


@dataclass(kw_only=True)
class Session:
    """One invocation on one run directory. Data and models are looked up when first needed. One that trains
    nothing goes by the recorded hashes of its stages' reward functions, and imports none of them.
    """

    config: RunConfig
    dataset: Dataset
    run: RunDir
    console: Console
    mirror: Mirror | None = None
    trains: bool = True
    _collected: dict[str, Dataset] = field(default_factory=dict)
    _learnt: dict[str, frozenset[str]] = field(init=False, default_factory=dict)
    _stages: dict[str, Stage] = field(init=False, default_factory=dict)
    located: Source | None = None  # the base model, where it has been looked for before
    origin: RunDir | None = None  # the run that finished stages are taken from (--from)
    outside: dict[str, Source] = field(default_factory=dict)  # reward models from elsewhere, by their name
    anew: Sequence[str] = ()  # stages that are made here (--redo), whatever there is elsewhere
    cut: Callable[[str, Any], Any] = lambda stage, job: job  # of a stage's job what is done: a probe's part
    go_over: GoesOver = lambda stage, groups, work, trained_on: work(groups)  # all; of a probe, some rows

    def __post_init__(self) -> None:
        quiet_libraries()
        keep_freed_memory()

    @cached_property
    def precision(self) -> Precision:
        """Of all passes. Where it is `auto`, what the run began with; in a new run what that is here."""
        setting = self.config.precision
        if setting != "auto":
            return setting
        began: str | None = None
        if self.run.run.is_file():
            began = read_record(self.run.run, RunRecord).precision
        elif self.mirror is not None:  # of a run that began on another machine
            began = mirrored_commits(self.mirror.directory).get("precision")
        return "bf16" if began == "bf16" else "float32" if began else effective_precision(setting)

    @cached_property
    def data_hash(self) -> str:
        """Of the data settings and of every text in every split."""
        settings = self.config.data.model_dump(mode="json", exclude={"name", "on_bad_row"})
        return sum_of({"settings": settings, "content": self.dataset.report["content_sha256"]})

    @cached_property
    def base(self) -> Source:
        """The base model: where it lies, or where its own stage puts it."""
        if self.config.model.base == "scratch":
            return Source(str(self.run.model_dir(BASE)))
        return self.located or locate(self.config.model.base)

    @property
    def commit_of_base(self) -> str:
        """Of a base model from the hub; "" for any other."""
        return "" if self.config.model.base == "scratch" else self.base.commit

    @property
    def scratch(self) -> list[str]:
        """The stage of a base that is trained from random weights, if it is."""
        return [BASE] if self.config.model.scratch is not None else []

    @property
    def is_world(self) -> bool:
        return self.config.is_world

    @property
    def gold(self) -> Gold | None:
        """The world's score by rule; None for real data, where nobody knows it."""
        if not self.is_world:
            return None
        from preftune.world.gold import gold

        return gold

    @property
    def judge(self) -> str | None:
        """The stage whose model scores every policy."""
        return judge_of(self.config.stage)

    def shuffled(self, rows: Sequence[Preference]) -> list[Preference]:
        """Rows in an order drawn from the seed, the same for every stage: a part of them, from the front on,
        is a sample of all sources, not of the first file.
        """
        return [rows[i] for i in order(len(rows), self.config.seed, "rows", 0)] if rows else []

    def data_of(self, stage: str) -> Dataset:
        """What a stage learns from: the run's data, its own, or what another stage has collected."""
        data = self.config.stage[stage].data if stage in self.config.stage else None
        if data is None:
            return self.dataset
        if not names_a_stage(data):
            return self.dataset.others[data]
        if data not in self._collected:
            check_model(self.run, data, self.run.collected(data))
            file = str(self.run.preferences(data))
            held_out = held_out_prompts(self.dataset)
            settings = data_settings(self.config, file, collected=True)
            self._collected[data] = dataset = read_training(settings, held_out)
            if self.trains and dataset.report["rejected"]:
                for note in dataset.report["notes"]:
                    self.console.line(f"{data}: {note}")
        return self._collected[data]

    def training_rows(self, part: Part = "all", stage: str = "") -> list[Preference]:
        """Shuffled training rows of a stage, or of the run; for "first" and "second" those of one half of the
        prompts.
        """
        settings = self.config.stage.get(stage)
        rows = self.shuffled(self.data_of(stage).rows_for(settings.batch if settings else ""))
        if settings is not None:
            rows = own_rows(rows, settings, stage)
        return in_part(rows, part)

    def learnt_prompts(self, stage: str) -> frozenset[str]:
        """Hashes of the prompts of the rows that a trained stage read, up to its limit of rows."""
        if stage not in self._learnt:
            settings, file = self.config.stage[stage], self.run.stage_json(stage)
            unusable = sum(read_record(file, StageRecord).left_out.values()) if file.is_file() else 0
            rows = self.shuffled(self.data_of(stage).rows_for(settings.batch))
            most = settings.most_rows
            by_learner = learners_rows(rows, settings, stage)
            read = [learner_rows[: most and most + unusable] for learner_rows in by_learner]
            self._learnt[stage] = frozenset(row_key(row) for learner_rows in read for row in learner_rows)
        return self._learnt[stage]

    def say_left_out(self, stage: str) -> None:
        """Report the rows of sources that a stage does not learn from."""
        settings = self.config.stage[stage]
        if words := sources_left_out(self.data_of(stage).rows_for(settings.batch), settings):
            self.console.line(f"{stage}: {words}")

    def is_trained(self, stage: str) -> bool:
        """Whether the stage's model is there; a base or a judge from elsewhere always is."""
        if (stage == BASE and self.config.model.scratch is None) or from_outside(stage):
            return True
        return check_model(self.run, stage, self._model_dir(stage))

    def source(self, stage: str) -> Source:
        """The model directory of a stage, the base, or a judge from elsewhere. DataError if the stage wrote
        another model there.
        """
        if stage == BASE and self.config.model.scratch is None:
            return self.base
        if from_outside(stage):
            if stage not in self.outside:
                try:
                    mirrored = mirrored_commits(self.mirror.directory if self.mirror else None)
                    commit = self._recorded_commit(stage) or mirrored.get(f"judge {stage}")
                    self.outside[stage] = locate(stage, commit)
                except InputMissing as error:
                    hint = "reward_model takes a stage, a directory or a hub id"
                    raise InputMissing(f"reward_model = {stage}: {error.message}", hint) from error
            return self.outside[stage]
        model = self._model_dir(stage)
        check_model(self.run, stage, model)
        return Source(str(model))

    def _model_dir(self, stage: str) -> Path:
        algorithm = "" if stage == BASE else self.config.stage[stage].algorithm
        return Stage(name=stage, algorithm=algorithm, parents=(), inputs={}).model_dir(self.run)

    def encoder(self, source: Source, new_tokens: int = 0) -> Encoder:
        """The encoder of a saved model: prompts leave room for `new_tokens` in its context."""
        ends, context = declared_ends(source), context_length(source)
        if context and new_tokens >= context:
            raise ConfigError(
                f"max_new_tokens = {new_tokens} leaves no room for a prompt in the {context} positions of "
                f"{source.path}",
                hint="a smaller max_new_tokens (--max-new-tokens of sample and chat)",
            )
        return self.encoder_of(load_tokenizer(source), context, new_tokens, ends)

    def encoder_of(
        self, tokenizer: Any, context: int, new_tokens: int = 0, ends: Sequence[int] = ()
    ) -> Encoder:
        data = self.config.data
        context = context or UNLIMITED
        return Encoder(
            tokenizer,
            data.form,
            max_prompt_length=min(data.max_prompt_length, context - max(new_tokens, 1)),
            max_response_length=data.max_response_length,
            max_length=context,
            ends=ends,
            template_arguments=data.template_arguments,
        )

    def learner(self, microbatch_size: int) -> Learner:
        patience, parallel = self.config.process_timeout, self.config.parallel
        how = {"shard": parallel.shard, "by_block": parallel.gather == "block"}
        return Learner(self.precision, microbatch_size, patience, self.console.line, **how)

    def stage(self, name: str) -> Stage:
        """The stage with all that its result depends on, as it is when first asked for."""
        if name not in self._stages:
            self._stages[name] = self._stage(name)
        return self._stages[name]

    def _stage(self, name: str) -> Stage:
        if name == BASE:
            return Stage(name=BASE, algorithm="pretraining", parents=(), inputs=self._base_inputs)
        config = self.config.stage[name]
        above = parents(config)
        keys = {parent: self.stage(parent).key for parent in above}
        if BASE in config.parents():
            keys[BASE] = self.stage(BASE).key
        inputs = {**self._inputs(config), "parents": keys, **self._data_inputs(config)}
        if config.scored_by is not None and from_outside(config.scored_by):
            inputs["settings"] = {**inputs["settings"], "reward_model": self.contents(config.scored_by)}
        if (trainable := self.config.trainable_of(name)) != ALL:
            inputs["trainable"] = trainable
            if not config.online and self.config.model.kept_dtype != "float32" and self.config.model.kept_gb:
                inputs["kept"] = self.config.model.kept_dtype
        if self.config.checkpoint.best and config.makes == "model":
            inputs["best"] = {"every": self.config.checkpoint.every}
        if trainable == LORA:
            inputs["lora"] = self.config.model.lora.model_dump()
        if config.makes == "data":
            inputs["max_new_tokens"] = self.new_tokens(name)
        if (functions := config.all_functions) is not None:
            inputs |= self._functions(name, functions)
        if member := name.partition("/")[2]:
            inputs["member"] = member
        if config.online and config.makes == "model" and self.config.sampler.url is not None:
            inputs["sampler"] = self.config.sampler.decides
        if config.asks is not None:
            inputs["llm"] = self._llm_inputs(name, config.asks)
        return Stage(name=name, algorithm=config.algorithm, parents=tuple(keys), inputs=inputs)

    def contents(self, judge: str) -> dict[str, Any]:
        """What a reward model from elsewhere consists of, wherever it lies."""
        source = self.source(judge)
        side = Path(source.path) / SIDE_FILE
        return {
            "sha256": fingerprint(source),
            "beside_sha256": surroundings(source),
            **({"side_sha256": sha256_file(side)} if side.is_file() else {}),
            **({"name": source.name, "commit": source.commit} if source.commit else {}),
            **reading_of(source),
        }

    def commits(self) -> dict[str, str]:
        """Of what the run reads from the hub, and the precision that `auto` is, under the names that
        `inputs.mirrored_commits` has them by.
        """
        reports = {self.config.data.name: self.dataset.report, **self.dataset.report.get("others", {})}
        by_name = {f"data {name}": report.get("commit") for name, report in reports.items()}
        by_name[f"base {self.config.model.base}"] = self.commit_of_base
        by_name |= {f"judge {name}": source.commit for name, source in self.outside.items()}
        by_name |= {"precision": self.precision} if self.config.precision == "auto" else {}
        return {name: commit for name, commit in by_name.items() if commit}

    def _recorded_commit(self, judge: str) -> str | None:
        """That with which a stage of this run was begun, for a judge of the hub."""
        for name in self.config.stage:
            settings = inputs_in(read_sealed(self.run.stage_json(name))).get("settings")
            for record in map(settings.get, _JUDGES) if isinstance(settings, dict) else ():
                if isinstance(record, dict) and record.get("name") == judge:
                    commit = record.get("commit")
                    return commit if isinstance(commit, str) else None
        return None

    def new_tokens(self, stage: str) -> int:
        """The longest reply that a stage which collects samples."""
        return self.config.stage[stage].new_tokens or self.config.evaluation.max_new_tokens

    def _data_inputs(self, config: StageSettings) -> dict[str, Any]:
        """For a stage with data of its own: the hash of its rows (those that are collected have the key of
        their stage), of undesirable replies, and of a judge from elsewhere.
        """
        inputs: dict[str, Any] = {}
        dataset = self.dataset.of(config.data)
        if config.batch == "unpaired" and dataset is not None and dataset.undesirable:
            inputs["undesirable"] = dataset.report["undesirable"]
        if (data := config.data) is not None:
            rows = {"stage": data} if names_a_stage(data) else self.dataset.others[data].report
            inputs["data"] = sum_of({"run": self.data_hash, "rows": rows.get("content_sha256", rows)})
        if judge := config.judge_directory:
            source = self.source(judge)
            pinned = source.commit or reading_of(source)
            identity = self.contents(judge) if pinned else fingerprint(source)
            inputs["settings"] = {**settings_of(config), "judge": identity}
        return inputs

    def _llm_inputs(self, stage: str, llm: LLMConfig) -> Any:
        """What a language model's verdicts depend on besides its name; where it is asked is no part of it."""
        if (recorded := self._recorded_inputs(stage).get("llm")) is not None:
            return recorded
        template = hashlib.sha256(read_template(llm.template).encode()).hexdigest()
        return {**llm.decides, "template_sha256": template}

    def _recorded_inputs(self, stage: str) -> dict[str, Any]:
        """Of a finished stage, for a session that trains nothing: it goes by them."""
        recorded = read_sealed(self.run.stage_json(stage)) if not self.trains else {}
        return inputs_in(recorded) if recorded.get("status") == "finished" else {}

    def _functions(self, stage: str, terms: str) -> dict[str, Any]:
        if inputs := self._recorded_inputs(stage):
            return {key: inputs[key] for key in ("reward_functions", "columns") if key in inputs}
        collected = names_a_stage(self.config.stage[stage].data)  # the key of their stage says what they hold
        rows = () if collected else self.data_of(stage).train
        return {"reward_functions": source_hashes(terms), **columns_hash(terms, rows)}

    @cached_property
    def _base_inputs(self) -> dict[str, Any]:
        """What made the base model, or the bytes it consists of."""
        if self.config.model.scratch is not None:
            return self._inputs(self.config.model)
        encoder = self.encoder(self.base)
        version = {} if encoder.as_before else {"encoding": 2, "ends": list(encoder.ends)}
        commit = {"commit": self.base.commit} if self.base.commit else {}
        weights = {"sha256": fingerprint(self.base), **commit, **version}
        beside = {} if self._has_old_key(weights) else surroundings(self.base)
        return {**weights, "beside_sha256": beside} if beside else weights

    def _has_old_key(self, weights: Mapping[str, Any]) -> bool:
        """Whether the run is from before the files beside the weights were part of the base's key."""
        old = sum_of(weights)
        records = [inputs_in(read_sealed(self.run.stage_json(name))) for name in self.config.stage]
        return any(old in (inputs.get("parents") or {}).values() for inputs in records)

    def _inputs(self, config: Any) -> dict[str, Any]:
        return {
            "settings": settings_of(config),
            "seed": self.config.seed,
            "precision": self.precision,
            "data": self.data_hash,
        }
