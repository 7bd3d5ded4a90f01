"""Replies of a vLLM server: one that works, one with stale weights, one that fails in every way."""

import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import resuming
import torch
from resuming import STEPS, prepare, rows
from torch import Tensor

import families
from gloo import join, two
from llm_server import serving
from patience import PATIENCE
from preftune.config.sampler import SamplerConfig
from preftune.errors import ConfigError, InputMissing, SamplerDisagrees
from preftune.functional.advantages import importance_weights
from preftune.models.roles import Policy
from preftune.runs.vllm import VLLM, server_of
from preftune.training.checkpoint import newest_step
from preftune.training.learner import Learner
from tiny import EOS, Judge, causal_lm, prompts, roles, rollout, runner, same_weights
from vllm_server import COMPLETIONS, VLLMServer

ONLINE = pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
TOKENIZER = SimpleNamespace(save_pretrained=lambda directory: None)


@pytest.fixture
def server() -> Iterator[VLLMServer]:
    with serving(VLLMServer()) as model:
        assert isinstance(model, VLLMServer)
        yield model


def sampler(server: VLLMServer, where: Path, learner: Learner | None = None, **more: Any) -> VLLM:
    config = SamplerConfig(**{"url": server.url, "weights_dir": str(where), "retries": 2, **more})
    session: Any = SimpleNamespace(config=SimpleNamespace(sampler=config, name="run"))
    found = server_of(session, "grpo", TOKENIZER, learner or Learner())
    assert found is not None
    return found


def draw(source: VLLM, policy: Policy, **more: Any) -> Any:
    how = {"max_new_tokens": 6, "temperature": 1.0, "eos_id": (EOS,), "responses_per_prompt": 2, "say": None}
    return source(policy, prompts(3, 3), **{**how, **more})


# --- a server that works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replies_come_with_the_log_probs_that_the_policy_gives_them(
    server: VLLMServer, tmp_path: Path, temperature: float
) -> None:
    policy = Policy(causal_lm(1))
    source = sampler(server, tmp_path)
    batch, logprobs = draw(source, policy, temperature=temperature)
    again, _ = draw(source, policy, temperature=temperature)
    torch.testing.assert_close(logprobs, policy.logprobs(batch, temperature).detach(), atol=2e-5, rtol=0)
    assert torch.equal(batch.ids, again.ids)  # seeds are of requests, whoever is asked at the same time
    assert len({tuple(row) for row in batch.ids.tolist()}) > 3  # and replies to one prompt differ
    assert server.loaded[0].parent == tmp_path


def test_an_adapter_is_handed_over_with_its_weights(server: VLLMServer, tmp_path: Path) -> None:
    _, _, models = prepare("grpo", rank=2)
    policy = models["policy"]
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if ".lora_B." in name:
                weight.add_(0.3)
    batch, logprobs = draw(sampler(server, tmp_path), policy)
    torch.testing.assert_close(logprobs, policy.logprobs(batch).detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tied_embedding_that_has_moved_arrives_in_the_head_too(
    family: str, server: VLLMServer, tmp_path: Path
) -> None:
    """vLLM's build for CPUs makes its copy of the head anew only where the file names the head."""
    shape = families.TREES[family]()
    shape.tie_word_embeddings = True
    model = families.made(shape)
    policy, source = Policy(model), sampler(server, tmp_path)
    draw(source, policy)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
        model.get_input_embeddings().weight[3] *= -1
    batch, logprobs = draw(source, policy)
    torch.testing.assert_close(logprobs, policy.logprobs(batch).detach(), atol=2e-5, rtol=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # still tied here


@ONLINE
def test_a_stage_learns_from_them_and_measures_the_distance(
    algorithm: str, server: VLLMServer, tmp_path: Path
) -> None:
    made, _, _ = prepare(algorithm)
    made.scorer = replace(made.scorer, sampler=sampler(server, tmp_path))  # type: ignore[attr-defined]
    metrics = made.step(prompts(1, 4))
    assert 0 <= metrics["sampling/kl_k3"] < 1e-8
    assert abs(metrics["sampling/kl"]) < 1e-5
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
    assert metrics["completions/mean_length"] > 0


def test_every_nth_step_hands_weights_over_and_the_rest_is_corrected(
    server: VLLMServer, tmp_path: Path
) -> None:
    trained(server, tmp_path, refresh_every=2, max_kl=10.0)
    found = rows(tmp_path / "out")
    assert len(server.loaded) == 3
    assert [row["sampling/kl_k3"] > 1e-5 for row in found] == [False, True, False, True, False]
    assert found[1]["sampling/importance_sampling_ratio/max"] <= 2.0
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [server.loaded[-1].name]


def test_weights_of_another_run_that_goes_on_stay(server: VLLMServer, tmp_path: Path) -> None:
    theirs, dead = (tmp_path / f"run-grpo-{pid}-000000" for pid in (os.getppid(), 999999999))
    for folder in (theirs, dead):
        folder.mkdir()
    draw(sampler(server, tmp_path), Policy(causal_lm(1)))
    assert (theirs.exists(), dead.exists()) == (True, False)


def trained(server: VLLMServer, out: Path, **more: Any) -> Any:
    """Five steps of GRPO with a server."""
    source = sampler(server, out / "weights", **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming, "Judge", partial(Judge, sampler=source))
        return resuming.run("grpo", out / "out", size=2)


def one_of_two(rank: int, port: int, server: int, where: Path, told: Connection) -> None:
    join(rank, port)
    told.send(stepped(VLLMServer(port=server), where, shard=True))


def stepped(server: VLLMServer, where: Path, shard: bool = False) -> dict[str, float]:
    """A step on three prompts, of which one of two processes has two."""
    made, learner, _ = prepare("grpo", shard=shard)
    made.scorer = replace(made.scorer, sampler=sampler(server, where, learner))  # type: ignore[attr-defined]
    return made.step(learner.place(prompts(1, 3)))


@pytest.mark.xdist_group("forked")
def test_two_processes_with_parts_hand_over_once_and_ask_for_what_one_asks(
    server: VLLMServer, tmp_path: Path
) -> None:
    alone = stepped(server, tmp_path)
    with two(one_of_two, server.port, tmp_path) as both:
        for each in both:
            assert each.poll(PATIENCE)
            assert each.recv() == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert len(server.loaded) == 2
    assert server.paths.count(COMPLETIONS) == 6


# --- importance weights -------------------------------------------------------------------------------------


def test_importance_weights_are_those_of_the_formula() -> None:
    ours = torch.tensor([[math.log(0.5), math.log(0.1), 7.0]])
    theirs = torch.tensor([[math.log(0.25), math.log(0.4), math.nan]])
    mask = torch.tensor([[True, True, False]])
    by_token = importance_weights(ours, theirs, 1.5, mask=mask)
    torch.testing.assert_close(by_token, torch.tensor([[1.5, 0.25, 1.0]]))
    whole = importance_weights(ours, theirs, 3.0, level="sequence_sum", mask=mask)
    torch.testing.assert_close(whole, torch.tensor([[0.5]]))  # 2 · 0.25
    with pytest.raises(ValueError, match="mask"):
        importance_weights(ours, theirs, 3.0, level="sequence_sum")


@ONLINE
def test_the_policy_loss_of_each_token_is_multiplied_by_its_weight(algorithm: str) -> None:
    """With ratios inside of the clip range, by the gradient of Σ -w A ratio, worked out here."""
    plain = rollout(3, policy=Policy(causal_lm(1)), noise=0.0)
    moved = torch.randn(plain.logprobs.shape, generator=torch.Generator().manual_seed(2)).mul(0.7)
    theirs = torch.where(plain.sequences.response, plain.logprobs + moved, 0.0)
    found = {}
    for name, cap in (("plain", None), ("weighted", 1.3)):
        made, recorders = runner(algorithm, roles(algorithm), kl_coef=0.0)
        made.improve(replace(plain, sampler_logprobs=theirs, cap=cap))
        found[name] = recorders["policy"].steps[0]
        advantages = made.experience(plain).advantages
    assert any(not torch.equal(found["plain"][n], found["weighted"][n]) for n in found["plain"])
    response = plain.sequences.response
    ratio = torch.where(response, -moved, 0.0)
    weights = ratio.sum(1, keepdim=True) if algorithm == "rloo" else ratio
    weights = weights.exp().clamp(max=1.3)
    terms = weights * (advantages if advantages.dim() == 2 else advantages.unsqueeze(1))
    expected = gradient(algorithm, plain, terms)
    for name, value in expected.items():
        torch.testing.assert_close(found["weighted"][name], value, atol=1e-5, rtol=1e-3)


def gradient(algorithm: str, given: Any, terms: Tensor) -> dict[str, Tensor]:
    """Of -Σ A · ratio at ratio 1: over tokens alike, or (RLOO) whole responses alike."""
    policy, response = Policy(causal_lm(1)), given.sequences.response
    logprobs = policy.logprobs(given.sequences)
    total = (terms * logprobs * response).sum()
    scale = len(response) if algorithm == "rloo" else response.sum()
    (-total / scale).backward()
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


# --- one with other weights ---------------------------------------------------------------------------------


def test_stale_weights_are_refused_before_anything_is_learnt(server: VLLMServer, tmp_path: Path) -> None:
    def stale(answer: Any) -> None:
        server.reloads = False

    server.spoil = stale
    message = r"KL .* nats a token, where sampler\.max_kl = 0\.001; nothing was learnt from it"
    with pytest.raises(SamplerDisagrees, match=message) as caught:
        trained(server, tmp_path, max_kl=0.001)
    assert caught.value.code == 65
    learnt = newest_step(tmp_path / "out" / "checkpoints")
    assert learnt == len(rows(tmp_path / "out")) >= 1
    server.spoil, server.reloads = (lambda answer: None), True
    trained(server, tmp_path, max_kl=0.001)  # the same command, with a server that loads what it is given
    assert len(rows(tmp_path / "out")) == STEPS


def test_another_model_is_refused(server: VLLMServer, tmp_path: Path) -> None:
    server.holds, server.reloads = causal_lm(9).eval(), False
    made, _, models = prepare("grpo")
    before = {name: p.detach().clone() for name, p in models["policy"].model.named_parameters()}
    made.scorer = replace(made.scorer, sampler=sampler(server, tmp_path))  # type: ignore[attr-defined]
    with pytest.raises(SamplerDisagrees, match="nothing was learnt"):
        made.step(prompts(1, 4))
    assert same_weights(dict(models["policy"].model.named_parameters()), before)


# --- one that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [(500, {}, b"{}"), (200, {}, b"<html>"), (200, {}, b'{"choices": [{}]}'), "closed", "truncated"]
)
def test_what_passes_is_asked_again_and_changes_nothing(
    server: VLLMServer, tmp_path: Path, fault: Any
) -> None:
    policy, source = Policy(causal_lm(1)), sampler(server, tmp_path, parallel=1)
    calm, _ = draw(source, policy)
    server.faults = [fault, fault]
    stormy, _ = draw(source, policy)
    assert torch.equal(calm.ids, stormy.ids)
    assert not server.faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((503, {}, b'{"error": "engine is dead"}'), r"it says 503: engine is dead \(asked 3 times\)"),
        ((200, {}, b"<html>"), "its answer has no token ids and log-probs: '<html>'"),
        ("closed", "closed connection"),
    ],
)
def test_what_does_not_pass_is_named(server: VLLMServer, tmp_path: Path, fault: Any, message: str) -> None:
    server.faults = [fault] * 99
    with pytest.raises(InputMissing, match=message) as caught:
        draw(sampler(server, tmp_path), Policy(causal_lm(1)))
    assert caught.value.code == 66
    assert "what has been trained is kept" in caught.value.hint
    assert f"the vLLM server at {server.url}" in caught.value.message


def test_a_slow_one_has_a_time_limit(server: VLLMServer, tmp_path: Path) -> None:
    policy, source = Policy(causal_lm(1)), sampler(server, tmp_path, retries=0, refresh_every=2)
    draw(source, policy)
    server.faults, source.endpoint.timeout = ["drip"] * 99, 0.3
    with pytest.raises(InputMissing, match=r"no whole answer within 0\.3 s"):
        draw(source, policy)


SPOILT: list[tuple[Callable[[Any], object], str]] = [
    (lambda answer: answer["choices"].pop(), "gave 1 replies where 2 were asked for"),
    (lambda answer: ids_of(answer).__setitem__(0, 23), "outside of the policy's vocabulary of 23"),
    (lambda answer: ids_of(answer).__setitem__(0, -1), "outside of the policy's vocabulary"),
    (lambda answer: ids_of(answer).__setitem__(0, 1.5), "outside of the policy's vocabulary"),
    (lambda answer: ids_of(answer).append(3), "log-probs"),
    (lambda answer: ids_of(answer).clear(), "gave 0 tokens"),
    (lambda answer: logprobs_of(answer).__setitem__(0, 0.5), "gave log-probs that are none"),
    (lambda answer: logprobs_of(answer).__setitem__(0, math.nan), "gave log-probs that are none"),
    (lambda answer: logprobs_of(answer).__setitem__(0, None), "gave log-probs that are none"),
    (lambda answer: answer["choices"][0].update(CUT), "before --max-model-len"),
]
CUT = {"token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}}


def ids_of(answer: Any) -> Any:
    return answer["choices"][0]["token_ids"]


def logprobs_of(answer: Any) -> Any:
    return answer["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_replies_that_are_none_are_refused(
    server: VLLMServer, tmp_path: Path, spoil: Callable[[Any], object], message: str
) -> None:
    server.spoil = spoil
    with pytest.raises(SamplerDisagrees, match=message) as caught:
        draw(sampler(server, tmp_path), Policy(causal_lm(1)))
    assert caught.value.code == 65


def test_tokens_of_an_older_server_are_read_too(server: VLLMServer, tmp_path: Path) -> None:
    policy, source = Policy(causal_lm(1)), sampler(server, tmp_path)
    new, _ = draw(source, policy)
    server.spoil = lambda answer: [choice.pop("token_ids") for choice in answer["choices"]]
    old, _ = draw(source, policy)
    assert torch.equal(new.ids, old.ids)


def test_one_that_is_down_at_the_start_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = VLLMServer(port=free.getsockname()[1])
    with pytest.raises(InputMissing, match=r"the vLLM server at .*refused.*\(asked 3 times\)"):
        sampler(nobody, tmp_path)


def test_one_that_dies_loses_no_step_and_the_same_command_goes_on(server: VLLMServer, tmp_path: Path) -> None:
    whole = trained(server, tmp_path / "whole")
    served = iter(range(10**6))
    a_step = server.paths.count(COMPLETIONS) // STEPS

    def dies(answer: Any) -> None:
        if next(served) == 3 * a_step:  # in the middle of step 4; the last checkpoint is of step 2
            server.faults = [(500, {}, b"{}")] * 99

    server.spoil = dies
    with pytest.raises(InputMissing):
        trained(server, tmp_path / "pieces", parallel=1)
    assert newest_step(tmp_path / "pieces" / "out" / "checkpoints") == 3
    server.spoil, server.faults = (lambda answer: None), []
    pieces = trained(server, tmp_path / "pieces")
    assert rows(tmp_path / "pieces" / "out") == rows(tmp_path / "whole" / "out")
    assert all(same_weights(pieces[name], whole[name]) for name in whole)


def test_without_the_development_endpoints_it_says_so(server: VLLMServer, tmp_path: Path) -> None:
    server.faulty, server.faults = "/collective_rpc", [(404, {}, b'{"detail": "Not Found"}')]
    with pytest.raises(ConfigError, match="404") as caught:
        draw(sampler(server, tmp_path), Policy(causal_lm(1)))
    assert "VLLM_SERVER_DEV_MODE=1" in caught.value.hint


def test_a_request_that_it_refuses_is_named(server: VLLMServer, tmp_path: Path) -> None:
    server.faults = [(400, {}, b'{"error": {"message": "This model\'s maximum context length is 8"}}')]
    with pytest.raises(ConfigError, match=rf"refuses {COMPLETIONS}: 400: .*maximum context length is 8"):
        draw(sampler(server, tmp_path), Policy(causal_lm(1)))


def test_a_model_of_another_name_is_refused(server: VLLMServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serves policy, not other") as caught:
        sampler(server, tmp_path, model="other")
    assert "sampler.model" in caught.value.hint
    assert sampler(server, tmp_path, model="policy").model == sampler(server, tmp_path).model == "policy"


@pytest.mark.parametrize("given", [{"url": "http://a:8000"}, {"weights_dir": "x"}, {"url": "ftp://a"}])
def test_settings_without_a_use_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"weights_dir|url"):
        SamplerConfig(**given)
