"""What an earlier evaluation left behind: nothing of it may stand beside the numbers of a later one."""

import shutil

from preftune.cli import main
from preftune.rundir import RunDir, read_json


def test_audits_of_stages_that_judge_no_more_do_not_stay(copy: RunDir) -> None:
    old = copy.evaluation("reward_model_old")
    shutil.copyfile(copy.reward_evaluation, old)
    before = read_json(copy.reward_evaluation)
    shutil.rmtree(copy.stage_dir("evaluation"))
    assert main(["evaluate", str(copy.path)]) == 0
    assert not old.exists()
    assert read_json(copy.reward_evaluation) == before
    assert copy.mistakes.is_file()


def test_without_a_judge_to_audit_neither_its_audit_nor_its_mistakes_stay(copy: RunDir) -> None:
    """As where reward functions alone score now."""
    for stage in ("rm", "ppo", "grpo", "evaluation"):
        shutil.rmtree(copy.stage_dir(stage))
    for model in ("reward_model", "policy_ppo", "policy_grpo"):
        shutil.rmtree(copy.models / model)
    assert main(["evaluate", str(copy.path)]) == 0
    assert not copy.reward_evaluation.exists()
    assert not copy.mistakes.exists()
    assert copy.evaluation("policy_dpo").is_file()
