"""A language model as the judge of collected replies: any two of a prompt's, asked about in both orders.

    stages/STAGE/answers.jsonl          while it is going on: {"key", "verdict", "answer", ...}, as they come
    collected/STAGE/judgements.jsonl    at the end: the same by row and replies, in order

`key` is the hash of the whole request. What it holds has been answered, so that a stage which was killed asks
nothing twice. A reply's score is the share of its comparisons that it wins: each order counts half, a tie or
an answer without a verdict gives either side half of that.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from preftune.config.algorithms.llm import LLM, LLMConfig
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.evaluation.stats import wilson
from preftune.judges.endpoint import Answer, Endpoint, StoppedError
from preftune.judges.llm import is_bare, question, read_template, verdict
from preftune.rundir import append_jsonl, read_jsonl
from preftune.runs.inputs import key_of
from preftune.sums import sum_of

Json = dict[str, Any]
_POINTS = {"first": 1.0, "second": 0.0}  # of the reply that stands first; a tie, or no verdict: a half
_KEPT = 2000  # characters of an answer, from its end
_MANY = 20  # answers, of which more than half without a verdict are no accident
_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """One question: which reply stands first, which second, and the request."""

    first: int
    second: int
    request: Json

    @property
    def key(self) -> str:
        return sum_of(self.request)


@dataclass(kw_only=True)
class LLMJudge:
    """The judge of one stage, with all that it has answered. A question that was refused is asked again: a
    server with other limits may take it.
    """

    model: str
    config: LLMConfig
    template: str
    endpoint: Endpoint
    file: Path
    answers: dict[str, Json] = field(default_factory=dict)

    def scores(self, rows: Sequence[Json]) -> list[list[float]]:
        """For each {"prompt", "replies"} the score of each reply, 0 to 1. Asks what has not been answered.

        InputMissing or ConfigError from the endpoint.
        """
        self._ask({item.key: item for row in rows for item in self.questions(row)})
        return [self._shares(row) for row in rows]

    def questions(self, row: Json) -> Iterator[_Question]:
        """Any two different replies, in both orders."""
        texts, prompt = [text.strip() for text in row["replies"]], _in_words(row["prompt"])
        for i, j in permutations(range(len(texts)), 2):
            if texts[i] != texts[j]:
                content = question(self.template, prompt, texts[i], texts[j])
                messages = [{"role": "user", "content": content}]
                request = {"model": self.model, "messages": messages, **self.config.decides}
                yield _Question(first=i, second=j, request=request)

    def judgements(self, rows: Sequence[Json]) -> list[Json]:
        """What was answered about rows, in their order."""
        return [
            {"row": row["row"], "first": item.first, "second": item.second, **self.answers[item.key]}
            for row in rows
            for item in self.questions(row)
        ]

    def summary(self, rows: Sequence[Json]) -> Json:
        """How often it was asked about rows, how it answered, and what that cost."""
        answers, orders = dict[str, Json](), dict[frozenset[str], tuple[Any, Any]]()
        for row in rows:  # equal texts share their questions
            keys = {(item.first, item.second): item.key for item in self.questions(row)}
            answers |= {key: self.answers[key] for key in keys.values()}
            for (i, j), key in keys.items():
                reverse = keys[j, i]
                orders[frozenset((key, reverse))] = (answers[key]["verdict"], answers[reverse]["verdict"])
        records, verdicts = answers.values(), [record["verdict"] for record in answers.values()]
        clear = [pair for pair in orders.values() if None not in pair]
        alike = sum(_POINTS.get(forward, 0.5) == 1 - _POINTS.get(swapped, 0.5) for forward, swapped in clear)
        first = verdicts.count("first")
        tokens = [sum(record[key] for record in records) for key in ("tokens_in", "tokens_out")]
        prices = [self.config.price_in, self.config.price_out]
        cost = sum(n * (price or 0.0) for n, price in zip(tokens, prices, strict=True)) / 1e6
        return {
            "questions": len(records),
            "no_verdict": verdicts.count(None),
            "refused": sum("refused" in record for record in records),
            "ties": verdicts.count("tie"),
            "both_orders": share(alike, len(clear)),
            "first_wins": share(first, first + verdicts.count("second")),
            "tokens_in": tokens[0],
            "tokens_out": tokens[1],
            "cost": None if prices == [None, None] else cost,
            "answered_by": sorted({record["model"] for record in records if record["model"]}),
        }

    def _shares(self, row: Json) -> list[float]:
        count = len(row["replies"])
        won = [[0.5] * count for _ in range(count)]  # by the one that stands first
        for item in self.questions(row):
            won[item.first][item.second] = _POINTS.get(self.answers[item.key]["verdict"], 0.5)
        opponents = [[j for j in range(count) if j != i] for i in range(count)]
        return [
            sum(won[i][j] + 1 - won[j][i] for j in opponents[i]) / (2 * len(opponents[i]))
            for i in range(count)
        ]

    def _ask(self, questions: dict[str, _Question]) -> None:
        new = {k: item for k, item in questions.items() if "refused" in self.answers.get(k, {"refused": ""})}
        pool, waiting = ThreadPoolExecutor(self.config.parallel), dict[Future[Answer], str]()
        failures = list[Exception]()

        def ask(request: Mapping[str, Any]) -> Answer:
            """A failure ends all questions at once, before this thread takes the next."""
            try:
                return self.endpoint.ask(request)
            except (ConfigError, InputMissing) as failure:
                failures.append(failure)
                self.endpoint.stop()
                raise

        try:
            for key, item in new.items():
                waiting[pool.submit(ask, item.request)] = key
            for job in as_completed(waiting):
                key = waiting.pop(job)
                self._keep(key, job.result())
        except BaseException as error:
            self.endpoint.stop()
            for job, key in waiting.items():  # what has come all the same
                with suppress(ConfigError, InputMissing, StoppedError):
                    if job.done() and not job.cancelled():
                        self._keep(key, job.result())
            if isinstance(error, StoppedError) and failures:
                raise failures[0] from None  # why the others were ended
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _keep(self, key: str, answer: Answer) -> None:
        """Write an answer down at once, so that its question is not asked again."""
        if answer.model and not _is_same(self.model, answer.model):
            raise ConfigError(
                f"the LLM judge at {self.endpoint.url} answers as {answer.model}, and {self.model} was asked",
                f'name the model as the server does, judge = "{LLM}{answer.model}", or serve the other one',
            )
        # Half an answer may only weigh what it mentions, unless it is the verdict and nothing else.
        decided = verdict(answer.text) if not answer.cut or is_bare(answer.text) else None
        outcome = {"verdict": decided, "answer": answer.text.strip()[-_KEPT:]}
        counts = {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out, "model": answer.model}
        more = {"refused": answer.refused} if answer.refused else {"cut": True} if answer.cut else {}
        self.answers[key] = {"key": key, **outcome, **counts, **more}
        append_jsonl(self.file, self.answers[key])

    def check(self) -> None:
        """DataError where most of its answers have no verdict."""
        lost = [answer for answer in self.answers.values() if answer["verdict"] is None]
        if len(self.answers) >= _MANY and len(lost) > len(self.answers) / 2:
            last = lost[-1].get("refused") or lost[-1]["answer"][-200:]
            raise DataError(
                f"the LLM judge {self.model} gives no verdict in {len(lost)} of {len(self.answers)} answers; "
                f"one of them: {last!r}",
                "llm.template must make it end with [[A]], [[B]] or [[C]], and llm.max_tokens let it come "
                "so far; or take another model",
            )


def llm_judge(judge: str, config: LLMConfig, file: Path) -> LLMJudge:
    """The judge of a stage that keeps its answers in `file`."""
    assert config.url is not None
    earlier = read_jsonl(file) if file.is_file() else []
    return LLMJudge(
        model=judge.removeprefix(LLM),
        config=config,
        template=read_template(config.template),
        endpoint=Endpoint(
            url=config.url,
            key=key_of(config),
            key_variable=config.key_variable or "",
            timeout=config.timeout,
            retries=config.retries,
        ),
        file=file,
        answers={row["key"]: row for row in earlier},
    )


def share(wins: float, n: int) -> Json:
    """A share with Wilson's interval."""
    low, high = wilson(wins, n)
    return {"value": wins / n if n else None, "low": low, "high": high, "n": n}


def _in_words(prompt: str | Sequence[Json]) -> str:
    """A prompt as it stands in a file of replies, as text."""
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n\n".join(f"{_SPEAKERS[m['role']]}: {m['content'].strip()}" for m in prompt)


def _is_same(requested: str, answered: str) -> bool:
    """Whether the model that a server names in its answer is the requested one, apart from a path, a date, a
    revision.
    """
    base, served = (name.casefold().rsplit("/", 1)[-1] for name in (requested, answered))
    return served.startswith(base) and re.fullmatch(r"(?:-\d[\d-]*|[@:].*)?", served[len(base) :]) is not None
