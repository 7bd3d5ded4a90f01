"""Lower blocks that are frozen and shared: the numbers of plain freezing, one copy, one pass of each row."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from families import PLAIN, TREES, made
from preftune.algorithms import ALGORITHMS
from preftune.config import OptimizerConfig
from preftune.errors import DataError
from preftune.models.check import check_causal_lm
from preftune.models.fast.trunk import branch_of
from preftune.models.layers import token_embedding
from preftune.models.locate import Source, reading
from preftune.models.roles import Critic, Policy, Reference, RewardModel, Role
from preftune.models.trunk import forget_states, keep_states, share_trunk, trunk_digest
from preftune.training.learner import Learner
from sweeps import ALL
from tiny import GROUP, batch_for, grouped, online, passes, sequences, state, step

LAYERS = {**TREES, **PLAIN}
ABOVE = re.compile(r"\.1\.|^score|^lm_head|^model\.norm|ln_f|^(gpt_neox|model\.decoder)\.final_layer_norm")
ADAM = OptimizerConfig(eps=1e-3, max_grad_norm=1e9)  # eps: where a gradient is 0, its rounding has no sign
RATE = 1e-2


def roles_of(config: Callable[[], PreTrainedConfig], algorithm: str) -> dict[str, Role]:
    """One network below; heads and upper blocks of each role's own."""

    def policy(seed: int) -> PreTrainedModel:
        model = made(config())
        random = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if ".1." in name:
                weight.data += 0.05 * torch.randn(weight.shape, generator=random)
        return model

    def scalar() -> PreTrainedModel:
        model = made(config(), AutoModelForSequenceClassification)
        model.base_model.load_state_dict(made(config()).base_model.state_dict())
        model.config.pad_token_id = 0
        return model

    make: dict[str, Callable[[], Role]] = {
        "policy": lambda: Policy(policy(1)),
        "reference": lambda: Reference(policy(2)),
        "reward_model": lambda: RewardModel(scalar(), 0.3, 2.0),
        "critic": lambda: Critic(scalar(), 0.3, 2.0),
    }
    return {name: make[name]() for name in ALGORITHMS[algorithm].needs}


def three_updates(
    algorithm: str, roles: dict[str, Role], learner: Learner
) -> tuple[list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    kind, settings = ALGORITHMS[algorithm], dict[str, Any]()
    settings |= {"epochs": 3, "minibatches": 1} if online(algorithm) else {}
    settings |= {"group_size": GROUP} if grouped(algorithm) else {}
    made_of = kind(kind.Config(algorithm=algorithm, microbatch_size=3, **settings), roles, learner)
    seen = []
    for i in range(1 if online(algorithm) else 3):
        learner.begin_step()
        seen.append(step(algorithm, made_of, batch_for(algorithm, seed=5 + i)))
    return seen, {name: state(roles[name].model) for name in kind.trains}


def trained(
    algorithm: str, config: Callable[[], PreTrainedConfig], *, shared: bool, keeps: bool = True
) -> tuple[list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    """With what is below frozen: by `share_trunk`, or parameter by parameter and nothing else."""
    roles, learner = roles_of(config, algorithm), Learner(microbatch_size=3)
    for name, role in roles.items():
        if shared:
            share_trunk(role.model, 1)
            keep_states(role.model, keeps)
        if name not in ALGORITHMS[algorithm].trains:
            learner.freeze(role)
        elif shared:
            learner.train(name, role, ADAM, RATE)
        else:
            for key, parameter in role.model.named_parameters():
                parameter.requires_grad_(bool(ABOVE.search(key)) and "embed" not in key)
            own = [p for p in role.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(own, lr=RATE, eps=ADAM.eps, weight_decay=0.0)
            learner.adopt(name, role, optimizer, ADAM)
    return three_updates(algorithm, roles, learner)


OTHERS = ("dpo", "ppo") if ALL else ("ppo",)
CASES = [("gpt2", algorithm) for algorithm in ALGORITHMS]
CASES += [(family, algorithm) for family in LAYERS if family != "gpt2" for algorithm in OTHERS]


@pytest.mark.parametrize(("family", "algorithm"), CASES)
def test_three_updates_are_those_of_plain_freezing(family: str, algorithm: str) -> None:
    plain_metrics, plain = trained(algorithm, LAYERS[family], shared=False)
    for keeps in (True, False) if ALL or family == "gpt2" else (True,):
        metrics, weights = trained(algorithm, LAYERS[family], shared=True, keeps=keeps)
        for ours, theirs in zip(metrics, plain_metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6)
        for role, each in plain.items():
            fresh = state(roles_of(LAYERS[family], algorithm)[role].model)
            for name, weight in each.items():
                assert (weights[role][name] - weight).abs().max() <= 4e-6, (
                    name
                )  # of 1e-2 a step; rounding by the processor
            moved = {name for name, weight in each.items() if not torch.equal(weight, fresh[name])}
            assert moved
            assert all(ABOVE.search(name) for name in moved)


def test_the_blocks_below_are_in_memory_once_whatever_the_head() -> None:
    policy, reference = made(TREES["gpt2"]()), made(TREES["gpt2"]())
    judge = made(TREES["gpt2"](), AutoModelForSequenceClassification)
    judge.base_model.load_state_dict(policy.base_model.state_dict())
    judge.resize_token_embeddings(24, mean_resizing=False)  # with a pad token of its own
    token_embedding(judge).weight.data[-1] = 0
    other = made(TREES["gpt2"]())
    other.base_model.get_parameter("h.0.mlp.c_fc.weight").data[0, 0] += 1e-3
    before = [Policy(model).logprobs(sequences(1)).detach() for model in (policy, reference, other)]
    for model in (policy, reference, judge, other):
        share_trunk(model, 1)
    places = [
        {n: p.data_ptr() for n, p in m.base_model.named_parameters()}
        for m in (policy, reference, judge, other)
    ]
    names = {name for name in places[0] if name.startswith("h.0.") or name in ("wte.weight", "wpe.weight")}
    for name, place in places[0].items():
        assert (places[1][name] == place) == (places[2][name] == place) == (name in names), name
    assert not set(places[0].values()) & set(places[3].values())
    assert trunk_digest(policy) == trunk_digest(judge) != trunk_digest(other)
    for model, was in zip((policy, reference, other), before, strict=True):
        assert torch.allclose(Policy(model).logprobs(sequences(1)), was, atol=1e-5)


def test_equal_weights_that_are_used_in_another_way_share_nothing() -> None:
    """A corrected config, a variant for longer texts: the states of one are not those of the other."""
    models = [made(TREES["llama"]()) for _ in range(3)]
    models[1].config.rms_norm_eps = 1e-3
    models[2].config.eos_token_id = models[2].config.pad_token_id = 3  # of heads and ends alone
    for model in models:
        share_trunk(model, 1)
    first, other, alike = (branch_of(model).trunk for model in models)  # type: ignore[union-attr]
    assert first is alike
    assert first is not other
    assert trunk_digest(models[0]) == trunk_digest(models[1])  # checkpoints know frozen weights by it


def test_a_rollout_goes_through_the_lower_blocks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four epochs of policy and critic, reference and reward model besides; each distinct beginning once."""
    roles, learner = roles_of(TREES["gpt2"], "ppo"), Learner(microbatch_size=8)
    for name, role in roles.items():
        share_trunk(role.model, 1)
        learner.train(name, role, ADAM, RATE) if name != "reference" else learner.freeze(role)
    seen = {n: passes(r.model, monkeypatch) for n, r in roles.items()}
    kind, rollout = ALGORITHMS["ppo"], batch_for("ppo")
    learner.begin_step()
    for values in (roles["policy"].logprobs, roles["reference"].logprobs, roles["critic"].values):  # type: ignore[union-attr]
        values(rollout.sequences)
    settings: Any = {"epochs": 4, "minibatches": 2, "batch_size": 8, "microbatch_size": 4}
    made_of: Any = kind(kind.Config(**settings), roles, learner)
    made_of.improve(rollout)
    rows = zip(rollout.sequences.ids.tolist(), rollout.sequences.attention.sum(1).tolist(), strict=True)
    beginnings = {tuple(row[: i + 1]) for row, length in rows for i in range(length)}
    assert seen == {"policy": [len(beginnings)], "reference": [], "critic": []}
    learner.begin_step()
    roles["reference"].logprobs(rollout.sequences)  # type: ignore[union-attr]
    assert seen["reference"] == [len(beginnings)]  # nothing is kept from one step to the next


def test_the_optimizer_has_states_for_what_is_trained_alone(tmp_path: Path) -> None:
    role, learner = Policy(made(TREES["llama"]())), Learner()
    share_trunk(role.model, 1)
    learner.train("policy", role, ADAM, RATE)
    groups = learner.trained["policy"].optimizer.param_groups
    named = {p: n for n, p in role.model.named_parameters()}
    held = {named[p] for group in groups for p in group["params"]}
    assert held == {n for n in named.values() if ".layers.1." in n} | {"model.norm.weight", "lm_head.weight"}


def test_a_saved_model_is_a_plain_directory(tmp_path: Path) -> None:
    """Also where its embedding is a part of a reward model's, which has a row more."""
    policy, judge = made(TREES["gpt2"]()), made(TREES["gpt2"](), AutoModelForSequenceClassification)
    judge.base_model.load_state_dict(policy.base_model.state_dict())
    judge.resize_token_embeddings(24, mean_resizing=False)
    token_embedding(judge).weight.data[-1] = 0
    for model in (policy, judge):
        share_trunk(model, 1)
        model.save_pretrained(tmp_path / type(model).__name__)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "GPT2LMHeadModel")
    assert all(torch.equal(p, state(policy)[n]) for n, p in loaded.named_parameters())
    files = sorted(file.name for file in (tmp_path / "GPT2LMHeadModel").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]


class _Crossing(nn.Module):
    """A block that reads what the first one has left behind in the same pass."""

    def __init__(self, block: nn.Module, desk: list[Tensor], first: bool) -> None:
        super().__init__()
        self.block, self.desk, self.first = block, desk, first

    def forward(self, states: Tensor, *args: Any, **named: Any) -> Tensor:
        if self.first:
            self.desk.append(states)
        return self.block(states if self.first else states + self.desk.pop(), *args, **named)


def test_a_model_whose_blocks_reach_across_the_cut_is_refused_by_name() -> None:
    model, desk = made(TREES["gpt2"]()), list[Tensor]()
    blocks: Any = model.base_model.get_submodule("h")
    for i in (0, 1):
        blocks[i] = _Crossing(blocks[i], desk, first=i == 0)
    with pytest.raises(
        DataError, match="GPT2LMHeadModel: the upper 1 blocks cannot be trained by themselves"
    ):
        share_trunk(model, 1)
    assert branch_of(model) is None
    with pytest.raises(DataError, match="it has 2 blocks"):
        share_trunk(made(TREES["gpt2"]()), 3)


def test_memory_that_runs_out_says_nothing_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("preftune.models.trunk.cut_at", full)
    with pytest.raises(torch.OutOfMemoryError):
        share_trunk(made(TREES["gpt2"]()), 1)
    monkeypatch.setattr("preftune.models.check._QUESTIONS", (("memory", full, ""),))
    with pytest.raises(torch.OutOfMemoryError):
        check_causal_lm(made(TREES["gpt2"]()), "it")
    with pytest.raises(torch.OutOfMemoryError), reading(Source("nowhere"), "weights"):
        full()


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.models.fast.trunk._ROOM", 16 * 4 * 60)  # 60 tokens, 16 wide
    policy = Policy(made(TREES["gpt2"]()))
    share_trunk(policy.model, 1)
    seen = passes(policy.model, monkeypatch)
    for seed in (1, 2, 2, 1):
        policy.logprobs(sequences(seed))
    assert len(seen) == 3  # the newest rows were there, the oldest were not
    forget_states()
    policy.logprobs(sequences(1))
    assert len(seen) == 4
