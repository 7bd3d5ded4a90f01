"""Checks of a model directory that need no forward pass."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from preftune.audit.checks import FAULT, NOTE, OK, WARNING, Check, attempted
from preftune.data import Encoder, parse_prompt
from preftune.data.encode import UNLIMITED
from preftune.models.aligned import aligned
from preftune.models.load import context_length, declared_ends, quiet_libraries
from preftune.models.locate import Source, locate, reading
from preftune.runs.outside import is_foreign
from preftune.runs.save import check_sums, read_side_file

_SHORT_CONTEXT = 256  # tokens; dialogues of HH-RLHF have 175 in the mean


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A loaded model, in eval mode and float32, with what its loader had to say. What its chat template does
    is asked once: each encoder starts a process that fills it in.
    """

    path: Path
    source: Source
    kind: str  # "reward model" or "policy"
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def end(self) -> int | None:
        """Id of the tokenizer's end token."""
        end: Any = self.tokenizer.eos_token_id
        return end

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids at which replies end: the one that training appends, the tokenizer's and all declared ones."""
        written = [] if self.end is None else [_trained_end(self)[0], self.end]
        return tuple(dict.fromkeys([*written, *declared_ends(self.source)]))

    @cached_property
    def chat(self) -> Encoder | None:
        """How whole dialogues are encoded as its chat template writes them, for a judge from elsewhere to the
        last token; None if it reads joined text.
        """
        if not _in_chat_form(self):
            return None
        whole = self.kind == "reward model" and is_foreign(read_side_file(self.source))
        return Encoder(self.tokenizer, "chat", UNLIMITED, UNLIMITED, ends=self.ends, whole_turns=whole)

    @property
    def context(self) -> int:
        """Positions that the model can take; 0 if its config states none."""
        return context_length(self.source)


def probe_ids(
    directory: Directory, prompt: str, reply: str | None, ended: bool
) -> tuple[list[int], list[int]]:
    """Token ids of a probe's transcript and of its reply (None: none), with the end token if `ended`. For a
    chat model what its template writes; else as the model's own tokenizer encodes the joined text.
    """
    if (encoder := directory.chat) is not None:
        messages = parse_prompt(prompt)
        return encoder.prompt(messages), [] if reply is None else encoder.response(reply, ended, messages)
    ids: Any = directory.tokenizer(prompt + (reply or ""), add_special_tokens=False).input_ids
    return list(ids), [directory.end] if ended and directory.end is not None else []


def open_directory(path: Path) -> Directory:
    """Load without any of preftune's own requirements but the safety of its files. PreftuneError if not."""
    quiet_libraries()
    check_sums(path)
    source = locate(str(path))
    with reading(source, "the model"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        names = config.architectures or []
        judge = any(name.endswith("ForSequenceClassification") for name in names)
        loader = AutoModelForSequenceClassification if judge else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(
            source.path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    return Directory(
        path=path,
        source=source,
        kind="reward model" if judge else "policy",
        model=aligned(model.eval()),
        tokenizer=tokenizer,
        missing=tuple(sorted(map(str, info["missing_keys"]))),
        unexpected=tuple(sorted(map(str, info["unexpected_keys"]))),
    )


def check_files(directory: Directory) -> list[Check]:
    """Weights, vocabulary, special tokens, and settings that are baked into the tokenizer."""
    return attempted(
        directory,
        {
            "weights are complete": _weights,
            "vocabulary fits the model": _vocabulary,
            "has an end token": _end_token,
            "has its own pad token": _pad_token,
            "tokenizer neither cuts nor pads by itself": _baked_in,
            "context": _context,
        },
    )


def _weights(directory: Directory) -> Iterator[Check]:
    missing, unexpected = directory.missing, directory.unexpected
    if missing:
        yield Check(
            name="weights are complete",
            status=FAULT,
            found=f"missing: {', '.join(missing[:4])}",
            consequence="these weights are random, and others at every load: scores and text mean nothing",
            remedy="save the model again with save_pretrained, its head included",
        )
    else:
        found = f"left over and ignored: {', '.join(unexpected[:4])}" if unexpected else "all there"
        yield Check(name="weights are complete", status=NOTE if unexpected else OK, found=found)
    broken = [name for name, p in directory.model.named_parameters() if not bool(torch.isfinite(p).all())]
    yield Check(
        name="weights are finite",
        status=FAULT if broken else OK,
        found=f"NaN or infinity in {', '.join(broken[:4])}" if broken else "no NaN, no infinity",
        consequence="every score or log-probability becomes NaN, and after one update the whole policy",
        remedy="train it again with a lower learning rate, or in float32",
    )


def _vocabulary(directory: Directory) -> Iterator[Check]:
    embeddings: Any = directory.model.get_input_embeddings()
    rows, size = int(embeddings.weight.shape[0]), len(directory.tokenizer)
    highest = max(directory.tokenizer.get_vocab().values(), default=-1)
    head = directory.model.get_output_embeddings()
    if highest >= rows:
        yield Check(
            name="vocabulary fits the model",
            status=FAULT,
            found=f"the tokenizer's ids go up to {highest}, the model has {rows} embeddings",
            consequence="the first text with such a token (often the pad token) is an index out of range",
            remedy="model.resize_token_embeddings(len(tokenizer)), or use the model's tokenizer",
        )
    elif head is not None and head.weight.shape[0] != rows:
        yield Check(
            name="vocabulary fits the model",
            status=FAULT,
            found=f"{rows} input embeddings, but {head.weight.shape[0]} rows in the output head",
            consequence="ids that are sampled and ids that are read are not the same set",
            remedy="resize both with resize_token_embeddings",
        )
    else:
        extra = f", {rows - size} rows of padding" if rows > size else ""
        yield Check(
            name="vocabulary fits the model", status=OK, found=f"{size} tokens, {rows} embeddings{extra}"
        )


def _end_token(directory: Directory) -> Iterator[Check]:
    tokenizer, config = directory.tokenizer, directory.model.config.get_text_config()
    end: Any = tokenizer.eos_token_id
    if end is None:
        yield Check(
            name="has an end token",
            status=FAULT,
            found="the tokenizer has no eos_token",
            consequence="nothing can learn to stop: every response runs to the limit",
            remedy="set eos_token in tokenizer_config.json to the token that the model was trained with",
        )
        return
    written: list[Any] = [getattr(config, "eos_token_id", None)]
    if directory.model.can_generate() and directory.model.generation_config is not None:
        written.append(directory.model.generation_config.eos_token_id)
    trained, name = _trained_end(directory)
    wrong = [w for w in written if w is not None and trained not in (w if isinstance(w, list) else [w])]
    yield Check(
        name="has an end token",
        status=WARNING if wrong else OK,
        found=f"{name!r} ({trained})" + (f", but the config says {wrong[0]}" if wrong else ""),
        consequence="generate() stops at another token than the one that training appends",
        remedy="make config.json, generation_config.json and the tokenizer agree",
    )


def _trained_end(directory: Directory) -> tuple[int, str]:
    """The end token that training appends, id and name: in chat form that of the template's turns."""
    tokenizer: Any = directory.tokenizer
    if _in_chat_form(directory):
        end = Encoder(tokenizer, form="chat", max_prompt_length=1, max_response_length=1).eos_id
        return end, tokenizer.convert_ids_to_tokens(end)
    return tokenizer.eos_token_id, tokenizer.eos_token


def _in_chat_form(directory: Directory) -> bool:
    """Whether it reads what its chat template writes, as far as is known: preftune's own models say so."""
    form = read_side_file(directory.source).get("form", "chat")
    return bool(directory.tokenizer.chat_template) and form == "chat"


def _pad_token(directory: Directory) -> Iterator[Check]:
    yield _pad_of_judge(directory) if directory.kind == "reward model" else _pad_of_policy(directory)


def _pad_of_judge(directory: Directory) -> Check:
    """It finds the last token of a row, where the score is, by what it takes for padding."""
    name, tokenizer = "has its own pad token", directory.tokenizer
    pad = tokenizer.pad_token_id
    stated = getattr(directory.model.config.get_text_config(), "pad_token_id", None)
    if pad is None:
        return Check(
            name=name,
            status=FAULT if stated is None else WARNING,
            found="the tokenizer has no pad_token",
            consequence="a batch of rows of different lengths cannot be scored",
            remedy="add a new pad token and resize the embeddings",
        )
    if pad == tokenizer.eos_token_id:
        return Check(
            name=name,
            status=FAULT,
            found=f"pad and end token are the same, {tokenizer.eos_token!r} ({pad})",
            consequence="pooling takes EOS for padding: the score is read one token too early, and whether a "
            "response ends makes no difference to it",
            remedy="train it again with its own pad token",
        )
    if stated != pad:
        return Check(
            name=name,
            status=FAULT,
            found=f"the tokenizer pads with {pad}, config.pad_token_id is {stated}",
            consequence="pooling does not know what padding looks like: scores are read on padding",
            remedy=f"set pad_token_id to {pad} in config.json",
        )
    return Check(name=name, status=OK, found=f"{tokenizer.pad_token!r} ({pad})")


def _pad_of_policy(directory: Directory) -> Check:
    """preftune asks nothing of its padding; the losses of other libraries do."""
    name, tokenizer = "has its own pad token", directory.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None:
        return Check(
            name=name,
            status=NOTE,
            found="the tokenizer has no pad_token",
            consequence="other libraries pad with EOS and then mask EOS out of the loss: it unlearns to stop",
            remedy="mask by length, as preftune does, or add a pad token",
        )
    if pad == tokenizer.eos_token_id:
        return Check(
            name=name,
            status=WARNING,
            found=f"pad and end token are the same, {tokenizer.eos_token!r} ({pad})",
            consequence="a mask by `ids != pad` drops EOS from the loss: it unlearns to stop",
            remedy="mask by length, as preftune does",
        )
    return Check(name=name, status=OK, found=f"{tokenizer.pad_token!r} ({pad})")


def _baked_in(directory: Directory) -> Iterator[Check]:
    file = directory.path / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        content = {}
    settings = [key for key in ("truncation", "padding") if content.get(key) is not None]
    yield Check(
        name="tokenizer neither cuts nor pads by itself",
        status=WARNING if settings else OK,
        found=f"tokenizer.json has {' and '.join(settings)} baked in" if settings else "no such setting",
        consequence="whoever reads the file directly cuts texts and pads them without being asked",
        remedy="save the tokenizer after tokenizer.backend_tokenizer.no_truncation() and no_padding()",
    )


def _context(directory: Directory) -> Iterator[Check]:
    context = directory.context
    short = 0 < context < _SHORT_CONTEXT
    yield Check(
        name="context",
        status=WARNING if short else OK,
        found=f"{context or 'unknown'} tokens",
        consequence="prompt and response must fit together: long dialogues lose their beginning",
    )
