"""What policies are measured with: held-out prompts, one reward model or two, one reference."""

from collections.abc import Iterable, Sequence

from preftune.config.graph import witnesses
from preftune.config.rewards import judges_in
from preftune.data import Preference
from preftune.errors import DataError
from preftune.evaluation.policy import Conditions, Gold
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy, Reference
from preftune.rollout.score import Scorer
from preftune.rundir import BASE
from preftune.runs.roles import share
from preftune.runs.scoring import reward_model_of
from preftune.runs.session import Session
from preftune.runs.train import scorer_for
from preftune.training.learner import Learner


def second_judge(session: Session) -> str | None:
    """The first trained reward stage that no stage learns from, preferably on other prompts than the judge's:
    without one nothing checks on the judge.
    """
    if session.judge is None:
        return None
    names = [name for name in witnesses(session.config.stage) if session.is_trained(name)]
    return min(names, key=lambda name: shares_prompts(session, name) is not False, default=None)


def shares_prompts(session: Session, stage: str) -> bool | None:
    """Whether a stage learnt from a prompt that the judge, too, learnt from; None where the judge's are not
    known.
    """
    judge = session.judge
    if judge is None or judge not in session.config.stage:
        return None
    return not session.learnt_prompts(judge).isdisjoint(session.learnt_prompts(stage))


def policies_of(session: Session, stages: Sequence[str]) -> list[str]:
    """Those that train a policy."""
    return [name for name in stages if session.config.stage[name].trains_policy]


def reference_stage(session: Session, stages: Sequence[str]) -> str:
    """What every policy is compared with: SFT, or the base without an SFT stage."""
    return next((n for n in stages if session.config.stage[n].imitates), BASE)


def shared_by_all(session: Session, stages: Sequence[str]) -> list[str]:
    """The stages whose models all numbers hang on: what policies are compared with, and the judges."""
    reference = reference_stage(session, policies_of(session, stages))
    names = [reference, session.judge, second_judge(session)]
    return [name for name in dict.fromkeys(names) if name in stages]


def frozen_policy(session: Session, learner: Learner, name: str) -> Policy:
    """A stage's finished policy, or the base, where `learner` wants it and without gradients."""
    policy = Policy(load_causal_lm(session.source(name)))
    share(policy, session.config.shared_blocks())
    learner.freeze(policy)
    return policy


def make_conditions(
    session: Session,
    reference_name: str,
    prompts: Sequence[Preference],
    gold: Gold | None,
    shared_by: Learner | None = None,
) -> tuple[Conditions, Learner]:
    """Everything held equal while policies are measured on `prompts`, and the learner that places models.
    `shared_by`: of the processes that measure together.
    """
    config, settings = session.config, session.config.evaluation
    source = session.source(reference_name)
    reference = Reference(load_causal_lm(source))
    encoder = session.encoder(source, settings.max_new_tokens)
    learner = session.learner(settings.batch_size)
    share(reference, config.shared_blocks())
    learner.freeze(reference)

    def scorer(stage: str | None, terms: str | None) -> Scorer | None:
        model = None
        if stage is not None and session.source(stage).exists():
            model = reward_model_of(session, stage, learner)
            share(model, config.shared_blocks())
        if model is None and terms is None:
            return None
        trained = stage if model is not None else None
        return scorer_for(session, encoder, model, trained, settings.batch_size, prompts, terms)

    def judge(name: str) -> Scorer | None:
        return scorer(None, name) if ":" in name else scorer(name, None)

    second = second_judge(session)
    conditions = Conditions(
        prompts=prompts,
        encoder=encoder,
        scorer=scorer(session.judge, settings.reward_functions),
        reference=reference,
        settings=settings,
        seed=config.seed,
        device=learner.device,
        say=learner.say_once,
        gold=gold,
        golds={name: gold_scorer for name in judges_in(settings.gold) if (gold_scorer := judge(name))},
        held_out=scorer(second, None) if second else None,
        learner=shared_by,
    )
    return conditions, learner


def held_out_prompts(session: Session) -> list[Preference]:
    """Test rows with prompts different from each other, without those that a chat template refuses."""
    prompts = asked_of(session, session.dataset.test)
    if not prompts:
        raise DataError(
            "there is no test prompt to compare policies on",
            hint="give a file named test, or more training prompts from which one can be cut",
        )
    return prompts


def asked_of(session: Session, rows: Sequence[Preference]) -> list[Preference]:
    """The prompts of `rows` that policies are asked: from all sources, different from each other, and in chat
    form none that the template refuses.
    """
    shuffled: Iterable[Preference] = session.shuffled(rows)
    if session.config.data.form == "chat":
        encoder = session.encoder(session.base)
        shuffled = (row for row in shuffled if encoder.accepts(row.prompt))
    return distinct(shuffled, session.config.evaluation.prompts)


def distinct(rows: Iterable[Preference], n: int) -> list[Preference]:
    """The first `n` rows with different prompts; fewer if there are no more."""
    by_prompt: dict[str, Preference] = {}
    for row in rows:
        if len(by_prompt) == n:
            break
        by_prompt.setdefault(row.prompt.transcript(), row)
    return list(by_prompt.values())
