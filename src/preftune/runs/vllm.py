"""A vLLM server as the sampler of a stage: weights by safetensors through a directory, replies by HTTP.

    weights_dir/RUN-STAGE-PID-N/   the policy as a plain Hugging Face directory, renamed into place when whole
    POST /collective_rpc           {"method": "reload_weights", "kwargs": {"weights_path": DIRECTORY}}
    POST /reset_prefix_cache       what it has cached was computed by the weights before
    POST /v1/completions           a prompt's ids, n replies, one seed; token ids and log-probs come back

The two in the middle are development endpoints of vLLM: VLLM_SERVER_DEV_MODE=1. Every hand-over has a
directory of its own, since a server that reloads by the same path may find the old file in a cache
(vllm-project/vllm issue 32718). The server is not trusted: replies are checked before they become a batch.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftune.config.sampler import SamplerConfig
from preftune.data.batch import Prompts, Sequences, pad_sequences
from preftune.errors import ConfigError, SamplerDisagrees
from preftune.judges.endpoint import Endpoint, FailedError
from preftune.models.adapter import merged, plain_weights
from preftune.models.layers import language_head
from preftune.models.roles import Policy
from preftune.models.whole import writing
from preftune.runs.inputs import key_of
from preftune.runs.lock import is_alive
from preftune.runs.save import in_place
from preftune.runs.session import Session
from preftune.stops import stopping_point
from preftune.training.learner import Learner

WHO = "the vLLM server"
MAX_ANSWER = 1 << 28
_LOOK = 0.2  # seconds between looks whether the run was asked to stop
_HINT = "sampler.url and sampler.model lead to another server, or it is no vLLM (docs/vllm.md)"
Reply = tuple[list[int], list[float]]  # token ids and their log-probs


@dataclass(kw_only=True)
class VLLM:
    """The sampler of one stage: a `rollout.sampler.Sampler`. `name` begins the names of its directories."""

    endpoint: Endpoint
    config: SamplerConfig
    model: str
    name: str
    tokenizer: Any
    learner: Learner
    calls: int = 0

    @property
    def max_kl(self) -> float:
        return self.config.max_kl

    @property
    def cap(self) -> float | None:
        return self.config.importance_sampling_cap

    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        temperature: float,
        eos_id: Sequence[int],
        responses_per_prompt: int,
        say: Callable[[str], None] | None,
    ) -> tuple[Sequences, Tensor]:
        if self.calls % self.config.refresh_every == 0:  # the first time, too: nobody knows what it has
            self._hand_over(policy)
        self.calls += 1
        vocabulary = int(policy.model.config.get_text_config().vocab_size)
        texts = [ids[real].tolist() for ids, real in zip(prompts.ids, prompts.attention, strict=True)]
        settings = _common_settings(self.model, responses_per_prompt, max_new_tokens, temperature, eos_id)
        requests = [
            {**settings, "prompt": ids, "seed": seed >> 1}  # reply i has seed + i, which must stay below 2^63
            for ids, seed in zip(texts, prompts.seeds, strict=True)
        ]
        limits = _Limits(responses_per_prompt, max_new_tokens, vocabulary, frozenset(eos_id))
        replies = [reply for group in self._ask(requests, limits) for reply in group]
        repeated = [ids for ids in texts for _ in range(responses_per_prompt)]
        batch = pad_sequences(repeated, [ids for ids, _ in replies], eos_id[0])
        logprobs = torch.zeros(batch.ids.shape)
        logprobs[batch.response] = torch.tensor([x for _, row in replies for x in row])
        device = prompts.ids.device
        return batch.to(device), logprobs.to(device)

    def _ask(self, requests: Sequence[dict[str, Any]], limits: "_Limits") -> list[list[Reply]]:
        """The replies to each request, many at a time. Errors of the endpoint, SamplerDisagrees for replies
        that are none, Interrupted.
        """

        def ask(request: dict[str, Any]) -> list[Reply]:
            return self.endpoint.call("POST", "/v1/completions", request, self._replies)

        pool = ThreadPoolExecutor(self.config.parallel)
        try:
            jobs = [pool.submit(ask, request) for request in requests]
            waiting = set(jobs)
            while waiting:
                done, waiting = wait(waiting, _LOOK, FIRST_EXCEPTION)
                for job in done:
                    job.result()
                stopping_point("rollout.token")
            answers = [job.result() for job in jobs]
        except BaseException:
            self.endpoint.stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for replies in answers:
            if wrong := limits.broken_by(replies):
                raise SamplerDisagrees(f"{WHO} at {self.endpoint.url} {wrong}", _HINT)
        return answers

    def _replies(self, content: bytes) -> list[Reply]:
        """Token ids and log-probs of an answer. FailedError for one that is no completion with both."""
        try:
            choices = json.loads(content)["choices"]
            return [(_ids(choice), list(choice["logprobs"]["token_logprobs"])) for choice in choices]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            message = f"its answer has no token ids and log-probs: {self.endpoint.quote(content[:1000])!r}"
            raise FailedError(message) from None

    def _hand_over(self, policy: Policy) -> None:
        """Write the policy where the server sees it, have it loaded, and remove earlier ones: not those of
        another process that is there.
        """
        if self.learner.is_main:
            target = Path(self.config.weights_dir or "").expanduser().resolve()
            target = target / f"{self.name}-{os.getpid()}-{self.calls:06}"
            partial = target.with_name(f".tmp-{target.name}")
            with writing(target, partial), merged(policy.model):
                policy.model.save_pretrained(partial, state_dict=_with_head(policy.model))
                self.tokenizer.save_pretrained(partial)
                in_place(partial, target)
            order = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
            self.endpoint.call("POST", "/collective_rpc", order, lambda content: None)
            self.endpoint.call("POST", "/reset_prefix_cache", {}, lambda content: None)
            pattern = re.compile(rf"(?:\.tmp-)?{re.escape(self.name)}-(\d+)-\d{{6,}}")
            for old in target.parent.iterdir():
                writer = pattern.fullmatch(old.name) if old != target else None
                if writer and (int(writer[1]) == os.getpid() or not is_alive(int(writer[1]))):
                    shutil.rmtree(old, ignore_errors=True)
        self.learner.wait()


def _with_head(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by name, a head that is tied to the embedding once more in memory of its own, since
    `save_pretrained` leaves out what is shared. vLLM for CPUs multiplies by a packed copy of the head, which
    `reload_weights` makes anew only where the file names the head (docs/vllm.md).
    """
    weights, head = plain_weights(model), language_head(model)
    for name in (f"{name}.weight" for name, module in model.named_modules() if module is head):
        weights[name] = weights[name].clone()
    return weights


@dataclass(frozen=True, slots=True)
class _Limits:
    """What replies to one prompt must satisfy."""

    count: int
    longest: int
    vocabulary: int
    ends: frozenset[int]

    def broken_by(self, replies: list[Reply]) -> str:
        """What is wrong with them; "" if nothing is."""
        if len(replies) != self.count:
            return f"gave {len(replies)} replies where {self.count} were asked for"
        for ids, logprobs in replies:
            if not 1 <= len(ids) <= self.longest or len(ids) != len(logprobs):
                return (
                    f"gave {len(ids)} tokens with {len(logprobs)} log-probs; at most {self.longest} may come"
                )
            if not all(type(i) is int and 0 <= i < self.vocabulary for i in ids):
                return f"gave a token outside of the policy's vocabulary of {self.vocabulary}"
            if not all(isinstance(x, int | float) and math.isfinite(x) and x < 1e-3 for x in logprobs):
                return "gave log-probs that are none"
            if self.ends & {*ids[:-1]} or (ids[-1] not in self.ends and len(ids) < self.longest):
                return "ends replies at other tokens than the policy does, or before --max-model-len"
        return ""


def server_of(session: Session, stage: str, tokenizer: Any, learner: Learner) -> VLLM | None:
    """The server that samples for a stage, None where the sampler here does. InputMissing if it is down,
    ConfigError if it serves another model than is named.
    """
    config = session.config.sampler
    if config.url is None:
        return None
    endpoint = Endpoint(
        url=config.url.rstrip("/").removesuffix("/v1"),
        key=key_of(config, WHO),
        key_variable=config.key_variable or "",
        timeout=config.timeout,
        retries=config.retries,
        max_body=MAX_ANSWER,
        who=WHO,
        table="sampler",
        again="what has been trained is kept",
        wrong_place="sampler.url is where vLLM listens; handing weights over needs VLLM_SERVER_DEV_MODE=1 in "
        "its environment",
    )
    endpoint.call("GET", "/health", None, lambda content: None)
    served = endpoint.call("GET", "/v1/models", None, lambda content: _names(endpoint, content))
    model = config.model or (served[0] if len(served) == 1 else None)
    if model not in served:
        expected = "one model" if config.model is None else config.model
        raise ConfigError(
            f"{WHO} at {endpoint.url} serves {', '.join(served) or 'nothing'}, not {expected}",
            "name the one to use as sampler.model",
        )
    return VLLM(
        endpoint=endpoint,
        config=config,
        model=model,
        name=f"{session.config.name}-{stage.replace('/', '-')}",
        tokenizer=tokenizer,
        learner=learner,
    )


def _common_settings(
    model: str, count: int, max_new_tokens: int, temperature: float, ends: Sequence[int]
) -> dict[str, Any]:
    """What all requests of a step say, so that draws are from softmax(logits / T), whole, and end where the
    policy's do, whatever the model's generation_config.json says.
    """
    return {
        "model": model,
        "n": count,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(ends),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,  # of the token that was drawn
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _names(endpoint: Endpoint, content: bytes) -> list[str]:
    """Names of the models in an answer, adapters left out."""
    try:
        models = json.loads(content)["data"]
        return [endpoint.quote(str(model["id"])) for model in models if model.get("parent") is None]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise FailedError(f"its answer is no list of models: {endpoint.quote(content[:1000])!r}") from None


def _ids(choice: dict[str, Any]) -> list[int]:
    """The token ids of a reply; from before `return_token_ids` they are the tokens, as "token_id:7"."""
    if isinstance(choice.get("token_ids"), list):
        return choice["token_ids"]
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
