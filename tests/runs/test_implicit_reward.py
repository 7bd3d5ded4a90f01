"""A DPO stage in the place of the reward model: its implicit reward trains, measures and is audited."""

from dataclasses import replace

import pytest
import torch

import preftune
from preftune.config import PPOConfig
from preftune.data import Preference, pad_sequences
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy, RewardModel
from preftune.models.scalar import score_head
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.reopen import reopen
from preftune.runs.roles import critic_of
from preftune.runs.scoring import reward_model_of
from preftune.runs.session import Session


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few_pairs: None) -> RunDir:
    """SFT, DPO, and PPO on DPO's implicit reward; no reward stage at all."""
    without = ["stage.rm=none", "stage.grpo=none", "stage.ppo.reward_model=dpo", "evaluation.prompts=6"]
    return preftune.run("tiny", *without, out=str(tmp_path_factory.mktemp("implicit") / "run"))


@pytest.fixture(scope="module")
def session(run: RunDir) -> Session:
    return reopen(run.path)


def scores(session: Session, model: RewardModel, rows: list[Preference]) -> torch.Tensor:
    encoder = session.encoder(session.source("dpo"))
    batch = encoder.sequences([(row.prompt, row.chosen) for row in rows])
    return model.normalised(model.raw_scores(batch))


def test_scores_are_normalised_on_chosen_training_responses(session: Session) -> None:
    model = reward_model_of(session, "dpo", session.learner(8))
    got = scores(session, model, session.shuffled(session.dataset.train)[:256])
    assert got.mean().item() == pytest.approx(0, abs=1e-3)
    assert got.std().item() == pytest.approx(1, abs=1e-3)


def test_policies_are_measured_by_it(run: RunDir, session: Session) -> None:
    """A sample's score is β (log π - log π_ref) of its text, normalised, from the two saved models."""
    model = reward_model_of(session, "dpo", session.learner(8))
    policy, reference = (load_causal_lm(session.source(name)) for name in ("dpo", "sft"))
    encoder = session.encoder(session.source("dpo"))
    for sample in read_jsonl(run.samples_file("policy_ppo"))[:3]:
        response = encoder.response(sample["response"], ended=sample["ended"])
        batch = pad_sequences([encoder.text(sample["prompt"])], [response], encoder.pad_id)
        ratio = Policy(policy).logprobs(batch).sum() - Policy(reference).logprobs(batch).sum()
        assert sample["score"] == pytest.approx((0.1 * ratio.item() - model.mean) / model.std, abs=1e-3)


def test_it_is_audited_like_a_reward_model(run: RunDir) -> None:
    audit = read_json(run.reward_evaluation)
    assert audit["stage"] == "dpo"
    assert audit["invariance"]["ok"]
    assert 0 < audit["accuracy"]["value"] < 1
    worst = read_jsonl(run.mistakes)[0]
    assert worst["tokens_chosen"][-1][1] == pytest.approx(worst["reward_chosen"], abs=1e-4)


def test_a_critic_starts_from_the_policy_with_values_of_zero(session: Session) -> None:
    config = session.config.stage["ppo"]
    assert isinstance(config, PPOConfig)
    critic = critic_of(session, config, reward_model_of(session, "dpo", session.learner(8)))
    assert (score_head(critic.model).weight == 0).all()


def test_the_judge_is_a_parent_of_what_it_judges(run: RunDir) -> None:
    assert read_json(run.stage_json("ppo"))["parents"] == ["sft", "dpo"]


def test_what_dpo_fitted_by_averages_is_read_by_averages(session: Session) -> None:
    """Two replies of one policy: the longer one's log-ratio is divided by more tokens."""
    settings = session.config.stage["dpo"].model_copy(update={"length_average": True})
    stages = {**session.config.stage, "dpo": settings}
    averaging = replace(session, config=session.config.model_copy(update={"stage": stages}))
    sums, means = (reward_model_of(each, "dpo", each.learner(8)) for each in (session, averaging))
    encoder, rows = session.encoder(session.source("dpo")), session.dataset.train[:4]
    batch = encoder.sequences([(row.prompt, row.chosen) for row in rows])
    lengths = batch.response.sum(1)
    assert len(set(lengths.tolist())) > 1
    torch.testing.assert_close(means.raw_scores(batch), sums.raw_scores(batch) / lengths)
