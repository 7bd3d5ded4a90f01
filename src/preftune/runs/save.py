"""Finished models on disk: plain Hugging Face directories, written whole or not at all, and read back."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from preftune.config import TextForm
from preftune.data import Encoder, Preference, Sequences, first_encoded
from preftune.errors import DataError, StorageError
from preftune.faults import faultpoint
from preftune.models.adapter import fold, save_adapter
from preftune.models.check import divergence
from preftune.models.gate import load_gate
from preftune.models.load import load_tokenizer, vocabulary_hash
from preftune.models.locate import Source, locate
from preftune.models.roles import Combine, Ensemble, RewardModel
from preftune.models.scalar import POOLED, load_scalar_model, score_head
from preftune.models.trunk import alone
from preftune.models.whole import writing
from preftune.rundir import BASE, RunDir, read_object, sync, write_json, write_text
from preftune.runs.cards import model_card
from preftune.runs.job import Job
from preftune.runs.session import Session
from preftune.runs.stages import SIDE_FILE, Stage
from preftune.sums import check, read_sealed

_PROBES = 16
_NORMALISING = 256  # chosen responses
_SCORED = 8  # of them at a time


def finished_model(session: Session, stage: Stage, job: Job) -> dict[str, Any]:
    """Write models/<name>; a reward model is also normalised and must reload to the same scores. DataError
    for a model that gives no finite numbers: its stage is not finished.
    """
    target = stage.model_dir(session.run)
    partial = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    for stale in target.parent.glob(f".tmp-{target.name}-*"):  # of a process that was killed here
        shutil.rmtree(stale, ignore_errors=True)
    side: dict[str, Any] = {
        "stage": stage.name,
        "key": stage.key,
        "vocabulary_sha256": vocabulary_hash(job.encoder.tokenizer),
    }
    data = session.config.data
    if job.encoder.tokenizer.chat_template:  # which of the two forms it was is seen nowhere else
        side |= {"form": data.form, "template_arguments": data.template_arguments}
    declare_ends(job.model.model, job.encoder.ends)
    adapter = fold(job.model.model)
    if isinstance(job.model, RewardModel):
        job.model.mean, job.model.std = normalised(session, stage.name, job.model, job.encoder)
        side |= {"mean": job.model.mean, "std": job.model.std} | _pooled(job.model)
    if diverged := divergence(job.model.model):
        raise DataError(
            f"stage {stage.name}: the trained model {diverged}",
            hint=f"lower stage.{stage.name}'s learning_rate, in another out=DIR or with --restart",
        )
    with writing(target, partial):
        job.model.model.save_pretrained(partial)
        faultpoint("model.weights")
        job.encoder.tokenizer.save_pretrained(partial)
        write_json(partial / SIDE_FILE, side)
        write_text(partial / "README.md", model_card(session, stage))
        if adapter is not None:
            save_adapter(adapter, partial / "adapter", _base_of(session, stage))
        if isinstance(job.model, RewardModel):
            _write_head(job.model, partial)
            _prove_reload(session, stage, job, partial)
        in_place(partial, target)
    return {k: side[k] for k in ("mean", "std") if k in side}


def _base_of(session: Session, stage: Stage) -> str:
    """What a stage's adapter belongs to: the base by its name on the hub or its path, a stage's model by its
    way from `adapter/`.
    """
    init = session.config.stage[stage.name].init
    if init == BASE and session.config.model.scratch is None:
        return session.base.name or str(Path(session.base.path).resolve())
    up = "../" * (2 + stage.name.count("/"))
    return f"{up}{Path(session.source(init).path).name}"


def declare_ends(model: PreTrainedModel, ends: Sequence[int]) -> None:
    """State in config.json and generation_config.json at which ids replies end, where they do not yet: what
    was trained, or `generate` runs past it.
    """
    configs: list[Any] = [model.config, model.generation_config] if model.can_generate() else [model.config]
    for config in configs:
        stated = getattr(config, "eos_token_id", None)
        if {*(stated if isinstance(stated, list) else [stated])} != {*ends}:
            config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def in_place(partial: Path, target: Path) -> None:
    """Give a directory that is written its name, with all of it on the disk and as open as the umask allows.
    What has that name is replaced: `begin` made sure that it is ours.
    """
    settle(partial, partial.rglob("*"))
    faultpoint("model.rename")
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
    sync(target.parent)
    faultpoint("model.renamed")


def settle(folder: Path, files: Iterable[Path]) -> None:
    """Put files of a directory onto the disk, as open as it is."""
    for file in files:
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)  # libraries differ
        sync(file)


def _write_head(model: RewardModel, directory: Path) -> None:
    """reward_head.bin, for readers of that layout."""
    with (directory / "reward_head.bin").open("wb") as file:
        torch.save({"weight": score_head(model.model).weight.detach().cpu()}, file)


def load_reward_model(source: Source) -> RewardModel:
    """A saved reward model, or an ensemble of them, with normalisation constants."""
    side = read_side_file(source)
    mean, std = _unit(side)
    pooling = side.get("pooling", "last")
    if not (members := side.get("members")):
        return RewardModel(load_scalar_model(source), mean, std, pooling)
    models = [load_scalar_model(directory) for directory in member_sources(source)]
    units = [_unit(member) for member in members]
    gate = load_gate(Path(source.path), len(members), models[0]) if side.get("experts") else None
    return Ensemble(models, units, side["combine"], side["sd_coef"], mean, std, gate, pooling)


def load_first_scalar(source: Source) -> tuple[PreTrainedModel, float, float]:
    """The weights of a saved reward model with mean and sd: of an ensemble those of its first member."""
    side = read_side_file(source)
    if members := side.get("members"):
        return load_scalar_model(member_sources(source)[0]), *_unit(members[0])
    return load_scalar_model(source), *_unit(side)


def member_sources(source: Source) -> list[Source]:
    """The directories of an ensemble's members; [] for one model. As safe to load as any other's."""
    count = len(read_side_file(source).get("members", ()))
    folder = Path(source.path).resolve()  # in full: a short name could be that of a model on the hub
    return [locate(str(folder / f"member-{i}")) for i in range(count)]


def _unit(side: Mapping[str, Any]) -> tuple[float, float]:
    return float(side.get("mean", 0.0)), float(side.get("std", 1.0))


def check_sums(directory: Path) -> None:
    """DataError if a file of a model in its run's directory is not what preftune wrote. A model that was
    copied out of its run has no sums beside it.
    """
    side = directory / SIDE_FILE
    stage = read_object(side).get("stage") if side.is_file() else None
    run = RunDir(directory.resolve().parent.parent)
    if isinstance(stage, str) and "/" not in stage and directory.resolve().parent == run.models.resolve():
        record = read_sealed(run.stage_json(stage))
        check(run, record, f"train stage {stage} again", f"models/{directory.resolve().name}/")


def read_side_file(source: Source) -> dict[str, Any]:
    """preftune.json beside the weights, {} for a foreign model. DataError if the tokenizer is not its own."""
    path = Path(source.path) / SIDE_FILE
    if not path.is_file():
        return {}
    side = read_object(path)
    members = side.get("members", [])
    units = [side, *members] if isinstance(members, list) else [None]
    pools = side.get("pooling", "last") in POOLED
    if not all(map(_is_unit, units)) or not pools or (members and not _combines(side)):
        raise DataError(
            f"{path} is not as preftune writes it",
            hint="mean and std are numbers, std is not 0, and pooling is last or mean; train the model again",
        )
    form, arguments = side.get("form", "chat"), side.get("template_arguments", {})
    if form not in get_args(TextForm) or not isinstance(arguments, dict):
        raise DataError(f"{path} is not as preftune writes it", hint="train the model again")
    recorded = side.get("vocabulary_sha256")
    if recorded and recorded != vocabulary_hash(load_tokenizer(source)):
        raise DataError(
            f"the tokenizer in {source.path} is not the one that the model was trained with",
            hint="restore tokenizer.json, or train the model again",
        )
    return side


def _pooled(model: RewardModel) -> dict[str, str]:
    """What preftune.json says of where the score is read: nothing where every reader of the weights knows."""
    return {} if model.pooling == "last" else {"pooling": model.pooling}


def _is_unit(side: Any) -> bool:
    numbers = [side.get(key, 1.0) for key in ("mean", "std")] if isinstance(side, dict) else [math.nan]
    return all(type(x) in (int, float) and math.isfinite(x) for x in numbers) and numbers[-1] != 0


def _combines(side: Mapping[str, Any]) -> bool:
    coef = side.get("sd_coef")
    return side.get("combine") in get_args(Combine) and type(coef) is float and 0 <= coef < math.inf


def normalised(session: Session, name: str, model: RewardModel, encoder: Encoder) -> tuple[float, float]:
    """`normalisation` over the stage's rows, of both halves of the prompts."""
    rows = first_replies(encoder, session.training_rows(stage=name))
    return session.go_over(
        name, [rows], lambda groups: normalisation(model, encoder, groups[0]), trained_on=True
    )


@torch.no_grad()
def normalisation(model: RewardModel, encoder: Encoder, rows: Sequence[Preference]) -> tuple[float, float]:
    """Mean and sd of raw scores over chosen responses, what SFT imitates (Huang et al., arXiv:2403.17031)."""
    scores = _scores(model, encoder, rows)
    if len(scores) < 2 or float(scores.std()) < 1e-8:
        return float(scores.mean()), 1.0
    return float(scores.mean()), float(scores.std())


def first_replies(encoder: Encoder, rows: Sequence[Preference]) -> list[Preference]:
    """Up to 256 rows that can be encoded, with a chosen reply: an undesirable one has none."""
    return first_encoded(encoder, [row for row in rows if row.chosen], _NORMALISING)[0]


@torch.no_grad()
def _scores(model: RewardModel, encoder: Encoder, rows: Sequence[Preference]) -> torch.Tensor:
    device = next(model.model.parameters()).device
    scores = [model.raw_scores(b.to(device)).cpu() for b in chosen_batches(encoder, rows, _SCORED)]
    return torch.cat(scores)


def chosen_batches(encoder: Encoder, rows: Sequence[Preference], size: int) -> list[Sequences]:
    """Prompts with their chosen replies, `size` rows a batch."""
    items, ended = [(row.prompt, row.chosen) for row in rows], [row.ended[0] for row in rows]
    spans = [slice(i, i + size) for i in range(0, len(rows), size)]
    return [encoder.sequences(items[span], ended[span]) for span in spans]


def _prove_reload(session: Session, stage: Stage, job: Job, directory: Path) -> None:
    """Score probe rows of different lengths with the saved model; anything but equality stops the stage."""
    assert isinstance(job.model, RewardModel)
    source = Source(str(directory))
    pooling = job.model.pooling
    saved = RewardModel(load_scalar_model(source), pooling=pooling)
    reloaded = session.encoder(source)
    device = next(job.model.model.parameters()).device
    saved.module.to(device)
    probes = first_encoded(job.encoder, session.data_of(stage.name).train, _PROBES)[0]
    with alone():
        before = _scores(RewardModel(job.model.model, pooling=pooling), job.encoder, probes)
    after = _scores(saved, reloaded, probes)
    if not torch.equal(before, after):
        worst = (before - after).abs().max().item()
        raise StorageError(
            f"the reward model in {directory} scores differently after reloading (by up to {worst:.3g})",
            hint="the stage is not finished; report this with the model's config.json",
        )
