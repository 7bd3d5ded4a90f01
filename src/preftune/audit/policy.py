"""A causal language model under probe texts: are its log-probabilities the same however they are computed?"""

from collections.abc import Iterator

import torch
from torch import Tensor

from preftune.audit.checks import FAULT, NOTE, OK, PROBES, WARNING, Check, attempted
from preftune.audit.files import Directory, probe_ids
from preftune.audit.reward import FEW, WIDTHS, padded, rows_of
from preftune.data import pad_prompts
from preftune.errors import DataError
from preftune.models.check import check_scalar_head, findings
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy
from preftune.rollout.sample import ended, sample

TOLERANCE = 1e-3  # nats per token
REPLIES, LONGEST = 24, 48  # replies that are sampled, and their longest
SAMPLING = ("top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_p", "typical_p")


def check_policy(directory: Directory) -> list[Check]:
    """All checks that need the model to compute."""
    checks = attempted(
        directory,
        {
            "log-probabilities": _finite,
            "padding does not matter": _padding,
            "supported by preftune": _supported,
            "dropout": _dropout,
            "sampling settings": _sampling,
            "chat template": _template,
        },
    )
    if directory.end is not None and not any(c.status == FAULT for c in checks):
        checks += attempted(directory, {"ends by itself": _ends})
    return checks


@torch.no_grad()
def _logprobs(directory: Directory, row: list[int], columns: int, side: str, positions: bool) -> Tensor:
    """log π of every token of a row but the first, from a padded batch of one."""
    pad = directory.tokenizer.pad_token_id
    fill = pad if isinstance(pad, int) else 0
    ids, mask = padded([row], fill, columns, side)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0) if positions else None
    logits = directory.model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits.float()
    first = 0 if side == "right" else columns
    logprobs = logits[0, first : first + len(row) - 1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1)


def _finite(directory: Directory) -> Iterator[Check]:
    values = torch.cat([_logprobs(directory, row, 0, "right", False) for row in rows_of(directory)])
    good = bool(values.isfinite().all())
    yield Check(
        name="log-probabilities",
        status=OK if good else FAULT,
        found=f"mean {values.mean():.2f} nats per token of the probe texts",
        consequence="ratios and KL are NaN from the first step",
    )


def _padding(directory: Directory) -> Iterator[Check]:
    rows = rows_of(directory)[:FEW]

    plain = [_logprobs(directory, row, 0, "right", False) for row in rows]

    def worst(side: str, positions: bool) -> float:
        changes = [
            (_logprobs(directory, row, width, side, positions) - before).abs().max()
            for row, before in zip(rows, plain, strict=True)
            for width in WIDTHS
        ]
        return torch.stack(changes).max().item()  # of which a NaN is not lost

    for name, change, status in (
        ("padding on the right does not matter", worst("right", False), FAULT),
        ("padding on the left, with position ids, does not matter", worst("left", True), FAULT),
        ("padding on the left alone does not matter", worst("left", False), NOTE),
    ):
        fine = change <= TOLERANCE
        yield Check(
            name=name,
            status=OK if fine else status,
            found=f"log-probabilities change by up to {change:.2g} nats",
            consequence="pass position_ids with every left-padded batch, or old and new log-probabilities "
            "differ"
            if status == NOTE
            else "log-probabilities depend on the longest other response in the batch: ratios are not 1",
        )


def _supported(directory: Directory) -> Iterator[Check]:
    """The questions that a run asks before it trains, in the same words."""
    kind, name = type(directory.model).__name__, "supported by preftune"
    wrong = [finding for finding in findings(directory.model) if finding.wrong]
    for finding in wrong:
        yield Check(name=name, status=FAULT, found=f"{kind} {finding.wrong}", remedy=finding.hint)
    if not wrong:
        load_causal_lm(directory.source)
        yield Check(name=name, status=OK, found=kind)
    try:
        check_scalar_head(directory.source)
        yield Check(name="can become a reward model or critic", status=OK, found="yes")
    except DataError as error:
        yield Check(
            name="can become a reward model or critic", status=NOTE, found=error.message, remedy=error.hint
        )


def _dropout(directory: Directory) -> Iterator[Check]:
    config = directory.model.config.get_text_config().to_dict()
    on = {
        k: v
        for k, v in config.items()
        if "drop" in k and "summary" not in k and isinstance(v, float) and v > 0
    }
    yield Check(
        name="dropout",
        status=NOTE if on else OK,
        found=", ".join(f"{k} = {v}" for k, v in on.items()) or "none",
        consequence="in train mode the first ratio is not 1; preftune keeps models in eval mode",
    )


def _sampling(directory: Directory) -> Iterator[Check]:
    settings = directory.model.generation_config.to_diff_dict() if directory.model.generation_config else {}
    on = {k: settings[k] for k in SAMPLING if settings.get(k) not in (None, 0, 1.0, 50)}
    yield Check(
        name="sampling settings",
        status=WARNING if on else OK,
        found=", ".join(f"{k} = {v}" for k, v in on.items()) or "nothing that changes the distribution",
        consequence="generate() draws from another distribution than that of the log-probabilities: "
        "ratios and KL are biased, KL may be negative",
        remedy="sample with temperature alone, as preftune does",
    )


def _template(directory: Directory) -> Iterator[Check]:
    has = bool(directory.tokenizer.chat_template)
    yield Check(
        name="chat template",
        status=NOTE,
        found="there is one: data.form=chat uses it" if has else "none: data.form=transcript",
    )


def _ends(directory: Directory) -> Iterator[Check]:
    longest = min(LONGEST, directory.context // 2) if directory.context else LONGEST
    room, end = directory.context - longest if directory.context else 10**6, directory.end
    assert end is not None
    ids = [probe_ids(directory, prompt, None, ended=False)[0][-room:] for prompt, _, _ in PROBES]
    out = sample(
        Policy(directory.model),
        pad_prompts(ids, list(range(len(ids))), end),
        max_new_tokens=longest,
        temperature=1.0,
        eos_id=directory.ends,
        responses_per_prompt=REPLIES // len(ids),
    )
    share = float(ended(out, directory.ends).float().mean())
    yield Check(
        name="ends by itself",
        status=OK if share >= 0.5 else NOTE if share > 0 else WARNING,
        found=f"{share:.0%} of {len(out)} replies end within {longest} tokens",
        consequence=""
        if share > 0
        else "every sampled response gets missing_eos_score: no reward tells one from another",
        remedy="" if share > 0 else "run an sft stage first: it teaches the end token",
    )
