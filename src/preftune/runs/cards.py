"""The README.md of a saved model: what it is, of what data, how good, how to load it.

Written when the model is saved and again when it has been evaluated. Names and sources come from settings and
files of others: they are shortened and stand in code spans, and the metadata is written by a YAML library.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from preftune.config import config_of
from preftune.records.base import Estimate, read_record
from preftune.records.outdated import outdated
from preftune.records.policy import PolicyRecord
from preftune.records.reward_model import RewardModelRecord
from preftune.rundir import RunDir, policy_name, short_name, write_text
from preftune.runs.stages import SIDE_FILE, Stage
from preftune.version import __version__

if TYPE_CHECKING:
    from preftune.runs.session import Session

_Row = tuple[str, str, Estimate | None]  # key, words, number
_HUB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_.-]{1,96}")
_PRETRAINED = "a small GPT-2, pretrained from random weights on the dialogues of the training data"
_LIMITS = (
    "- One seed: the luck of training is not in the intervals, which are over prompts or pairs only.",
    "- Measured on held-out rows of its own data, with the reward model of its own run.",
    "- Not tested for safety, facts or other languages; replies can be wrong or harmful.",
)


def model_card(session: "Session", stage: Stage) -> str:
    """Metadata and text; the measurements are those that the run directory holds now."""
    numbers, kind = _numbers(session.run, stage), config_of(stage.algorithm)
    sections = [
        "---\n"
        + yaml.safe_dump(_metadata(session, stage, numbers), sort_keys=False, allow_unicode=False)
        + "---",
        f"# {stage.name}",
        f"This is {kind.card if kind else _PRETRAINED}. Made with preftune {__version__}.",
        "## Data\n\n" + "\n".join(_data(session)),
        "## Recipe\n\n" + _recipe(session, stage),
        "## Measured\n\n" + _measured_text(stage, numbers),
        "## Limits\n\n" + "\n".join([*_LIMITS, *(kind.card_limits if kind else ())]),
        "## How to load\n\n" + _loading(session, stage),
    ]
    return "\n\n".join(sections) + "\n"


def rewrite_cards(session: "Session", stages: Sequence[str]) -> None:
    """Bring the cards of models that this run saved up to date with its evaluation."""
    for name in [*session.scratch, *stages]:
        stage = session.stage(name)
        directory = stage.model_dir(session.run)
        if stage.makes_model and (directory / SIDE_FILE).is_file():
            write_text(directory / "README.md", model_card(session, stage))


def _metadata(
    session: "Session", stage: Stage, numbers: Sequence[tuple[str, str, Estimate]]
) -> dict[str, Any]:
    """What the Hugging Face Hub reads: https://huggingface.co/docs/hub/model-cards."""
    judge = not stage.trains_policy
    task = "text-classification" if judge else "text-generation"
    meta: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["preftune", "reward-model" if judge else "rlhf", stage.algorithm],
    }
    base, data = session.config.model.base, str(session.config.data.name)
    if _is_hub_id(base):
        meta["base_model"] = base
    if _is_hub_id(data):
        meta["datasets"] = [data]
    metrics = [
        {"type": key, "name": words, "value": round(number.value, 4)} for key, words, number in numbers
    ]
    if metrics:
        result = {
            "task": {"type": task},
            "dataset": {"name": short_name(data), "type": data if _is_hub_id(data) else "other"},
            "metrics": metrics,
        }
        meta["model-index"] = [{"name": stage.name, "results": [result]}]
    return meta


def _is_hub_id(name: str) -> bool:
    """Whether it has the form of a hub id. Anything else may hold line ends, or whatever else YAML folds."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _data(session: "Session") -> Iterator[str]:
    report, data = session.dataset.report, session.config.data
    commit = f" at commit {code(report['commit'])}" if "commit" in report else ""
    yield f"- {code(short_name(str(data.name)))}{commit}, form {code(data.form)}"
    for split, rows in report["splits"].items():
        sources = ", ".join(f"{code(s or 'all')} {n:,}" for s, n in report["sources"][split].items())
        yield f"- {split}: {rows:,} pairs ({sources})"
    if report.get("rejected"):
        reasons = ", ".join(f"{code(reason)} {n:,}" for reason, n in report["rejected"].items())
        yield f"- left out of {report['rows_read']:,} rows: {reasons}"


def _recipe(session: "Session", stage: Stage) -> str:
    settings = json.dumps(dict(stage.inputs).get("settings", {}), indent=2, sort_keys=True)
    parents = ", ".join(code(parent) for parent in stage.parents) or "nothing"
    config = session.config
    facts = (
        f"Run {code(config.name)}, seed {config.seed}, precision {session.precision}; starts from {parents}"
    )
    commit = session.commit_of_base
    base = f"base model {code(short_name(config.model.base))}{f' at commit {code(commit)}' if commit else ''}"
    return f"{facts}; {base}. Settings of the stage:\n\n```json\n{settings.replace('```', '')}\n```"


def _measured_text(stage: Stage, numbers: Sequence[tuple[str, str, Estimate]]) -> str:
    if "/" in stage.name:
        return "A member of an ensemble: the card of the directory above says what was measured."
    if not numbers:
        return "Not evaluated yet: `preftune evaluate RUN` measures it and completes this card."
    rows = [f"| {words} | {x.text(digits=3)} | {'' if x.n is None else x.n} |" for _, words, x in numbers]
    head = "| number | value [95 % interval] | n |\n|---|---|---|"
    return (
        "\n".join([head, *rows])
        + "\n\nWhat each number is: docs/metrics.md and docs/evaluation.md of preftune."
    )


def _numbers(run: RunDir, stage: Stage) -> list[tuple[str, str, Estimate]]:
    """(key, words, estimate) of what the evaluation found about this model, not about one before it."""
    gone, policy = outdated(run), policy_name(stage.name)
    if gone.policy(policy) if stage.trains_policy else gone.judge(stage.name):
        return []
    rows = list[_Row]()
    if stage.trains_policy:
        file = run.evaluation(policy)
        if file.is_file():
            rows = _policy_numbers(read_record(file, PolicyRecord))
    else:
        stage_file = run.evaluation(f"reward_model_{stage.name}")
        file = stage_file if stage_file.is_file() else run.reward_evaluation
        record = read_record(file, RewardModelRecord) if file.is_file() else None
        if record is not None and record.stage == stage.name:
            rows = _reward_numbers(record)
    return [(key, words, number) for key, words, number in rows if number is not None]


def _reward_numbers(record: RewardModelRecord) -> list[_Row]:
    chance = record.ece_if_calibrated
    words = "" if chance is None else f" (by chance alone up to {chance:.3f})"
    ece = None if record.ece is None else Estimate(value=record.ece, n=record.n)
    rules = [
        (f"baseline_{name}", f"the same for the rule {code(name)}", rule)
        for name, rule in record.baselines.items()
    ]
    of = f" of the members together ({record.combine})" if record.members else ""
    members = [
        (f"accuracy_{name}", f"the same of {code(name)}", share) for name, share in record.members.items()
    ]
    return [
        ("accuracy", f"accuracy{of} on held-out pairs, ties wrong", record.accuracy),
        *members,
        ("accuracy_unanimous", "the same on pairs on which all members agree", record.unanimous),
        *rules,
        ("brier", "Brier score (a coin: 0.25)", record.brier),
        ("ece", f"expected calibration error{words}", ece),
        ("correlation_score_length", "correlation of score and length", record.correlation_score_length),
    ]


def _policy_numbers(record: PolicyRecord) -> list[_Row]:
    controlled = record.length_controlled
    return [
        ("score", "score (normalised, by the run's reward model)", record.score),
        ("score_difference_to_sft", "score minus SFT's, paired by prompt", record.score_difference),
        ("win_rate_vs_sft", "win rate against SFT", record.win_rate),
        ("win_rate_vs_chosen", "win rate against the chosen response", record.win_rate_chosen),
        (
            "held_out_difference_to_sft",
            "score of a second reward model minus SFT's",
            record.held_out_difference,
        ),
        ("gold", "gold score", record.gold),
        ("length", "response length in tokens", record.length),
        ("eos_rate", "share of responses that end by themselves", record.eos_rate),
        ("length_controlled_win_rate", "the same at equal lengths", controlled and controlled.win_rate),
        ("kl", "exact KL to SFT, nats per response", record.kl_sequence),
    ]


def _loading(session: "Session", stage: Stage) -> str:
    """Code that prompts the model in the form in which it was trained, and samples as it was measured."""
    snippet = _snippet(session, reply=not stage.trains_policy)
    if stage.inputs.get("settings", {}).keys() & {"members", "experts"}:
        code_lines = (
            "from preftune import load_reward_model  # member-0 and so on load as plain Hugging Face models",
            "",
            'ensemble = load_reward_model("THIS_DIRECTORY")',
            *snippet.words,
            "normalised = ensemble.score([prompt], [response], ended=True)",
            "disagreement = ensemble.member_scores([prompt], [response]).std(0, correction=0)",
        )
    elif stage.inputs.get("settings", {}).get("pooling") == "mean":
        code_lines = (
            "from preftune import load_reward_model  # transformers would read the last token's score alone",
            "",
            'model = load_reward_model("THIS_DIRECTORY")',
            *snippet.words,
            "raw = model.raw_score([prompt], [response], ended=True)  # the mean over the response's tokens",
            "normalised = model.score([prompt], [response], ended=True)",
        )
    elif not stage.trains_policy:
        code_lines = (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            'model = AutoModelForSequenceClassification.from_pretrained("THIS_DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
            *snippet.words,
            f"text = {snippet.text}",
            f"raw = model(**{snippet.ids}).logits  # preftune.json: mean, std",
            "",
            "from preftune import load_reward_model",
            'normalised = load_reward_model("THIS_DIRECTORY").score([prompt], [response], ended=True)',
        )
    else:
        code_lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
            *snippet.words,
            f"text = {snippet.text}",
            f"as_measured = {_sampling(session)}  # not what generation_config.json may say",
            f"reply = model.generate(**{snippet.ids}, **as_measured)",
        )
    lines = "\n".join(code_lines)
    return f"```python\n{lines}\n```"


class _Snippet(NamedTuple):
    """Lines that name a prompt (and a response), the text of them, and its ids, as code."""

    words: tuple[str, ...]
    text: str
    ids: str


def _snippet(session: "Session", reply: bool) -> _Snippet:
    form, arguments = session.config.data.form, session.config.data.template_arguments
    ids = 'tokenizer(text, return_tensors="pt")'
    if form != "chat":
        prompt = '"\\n\\nHuman: Hello\\n\\nAssistant:"' if form == "transcript" else '"The film was"'
        if not reply:
            return _Snippet((f"prompt = {prompt}",), "prompt", ids)
        return _Snippet(
            (f'prompt, response = {prompt}, " Hi!"',), "prompt + response + tokenizer.eos_token", ids
        )
    ids = 'tokenizer(text, add_special_tokens=False, return_tensors="pt")'
    options = "".join(f", {name}={value!r}" for name, value in arguments.items()).replace("```", "")
    prompt = '[{"role": "user", "content": "Hello"}]'
    if not reply:
        text = f"tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True{options})"
        return _Snippet((f"prompt = {prompt}",), text, ids)
    chat = 'prompt + [{"role": "assistant", "content": response}]'
    text = f"tokenizer.apply_chat_template({chat}, tokenize=False{options}).rstrip()  # up to the end token"
    return _Snippet((f'prompt, response = {prompt}, "Hi!"',), text, ids)


def _sampling(session: "Session") -> str:
    settings = session.config.evaluation
    return (
        f"dict(do_sample=True, temperature={settings.temperature:g}, top_k=0, top_p=1.0, "
        f"repetition_penalty=1.0, max_new_tokens={settings.max_new_tokens})"
    )


def code(text: str) -> str:
    """Foreign text as a code span of one line: at most 100 characters, no backquotes."""
    plain = "".join(c if c.isprintable() and c != "`" else " " for c in str(text)[:100])
    return f"`{plain.strip() or ' '}`"
