"""Replies of a stage that was trained again since: a set that was begun goes on, a new one says why not."""

from pathlib import Path

import pytest
from label_run import begun, judge_all, sampled, trained_again

from preftune.cli import main
from preftune.errors import ConfigError, InputMissing
from preftune.label.items import read_items
from preftune.label.store import find_set
from preftune.rundir import RunDir, read_jsonl, write_json, write_jsonl


def with_ppo(folder: Path) -> RunDir:
    """Samples of PPO besides, the last policy; scores in all of them."""
    run = sampled(folder, n=8)
    for policy in ("sft", "ppo", "dpo"):
        rows = read_jsonl(run.samples_file("policy_dpo"))
        texts = [{**row, "response": f" By {policy} {row['row']}", "score": 0.5} for row in rows]
        write_jsonl(run.samples_file(f"policy_{policy}"), texts)
    return run


def test_a_set_goes_on_whatever_became_of_its_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sampled(tmp_path, n=8)
    judge_all(begun(run), "me", "a")
    trained_again(run, "dpo")
    for source in (None, "sft,dpo"):
        assert find_set(run, None, source)[0] == run.labels("sft-against-dpo")
        assert begun(run, source=source).design.source == "sft-against-dpo"
    assert main(["label", str(run.path), "--results"]) == 0
    assert capsys.readouterr().out.startswith("sft-against-dpo: 8 items")
    run.samples_file("policy_dpo").unlink()
    assert begun(run, source="sft,dpo").items


def test_a_named_set_goes_on_and_another_source_is_still_refused(tmp_path: Path) -> None:
    run = with_ppo(tmp_path)
    begun(run, source="sft,dpo", name="mine")
    trained_again(run, "dpo")
    assert begun(run, source="sft,dpo", name="mine").items
    with pytest.raises(ConfigError, match="was begun with source sft-against-dpo, not sft-against-ppo"):
        begun(run, source="sft,ppo", name="mine")


@pytest.mark.parametrize("source", [None, "sft,ppo"])
def test_no_set_is_begun_with_replies_of_an_old_model_and_that_is_said(
    tmp_path: Path, source: str | None
) -> None:
    """By default, too, where another policy is there: which one is asked about is not changed silently."""
    run = trained_again(with_ppo(tmp_path), "ppo")
    why = "what was sampled of sft and ppo is of a model of ppo that is no longer there"
    with pytest.raises(InputMissing, match=why) as caught:
        begun(run, source=source)
    assert caught.value.hint.startswith("preftune evaluate RUN measures what is there")
    assert begun(run, source="sft,dpo").items
    begun(run, source="sft,dpo", name="sft-against-ppo")  # a name is no source
    with pytest.raises(InputMissing, match=why):
        begun(run, source=source, name="other")


def test_texts_do_not_hang_on_a_judge_but_scores_and_best_of_n_do(tmp_path: Path) -> None:
    run = with_ppo(tmp_path)
    write_jsonl(run.samples_file("best_of_4"), read_jsonl(run.samples_file("policy_dpo")))
    held_out = {"mean": 0.1, "interval": [0.0, 0.2], "n": 2, "stage": "rm2"}
    write_json(run.evaluation("policy_ppo"), {"policy": "policy_ppo", "held_out_score": held_out})
    trained_again(run, "rm2", shared=("sft", "rm", "rm2"))
    for source in ("sft,ppo", "ppo,best_of_4"):
        _, origin = find_set(run, None, source)
        assert origin is not None
        assert {item.scores for item in read_items(origin, 0, informative=True)} == {(0.5, 0.5)}
    trained_again(run, "rm", "rm2", shared=("sft", "rm", "rm2"))
    assert {item.scores for item in begun(run).items.values()} == {None}
    with pytest.raises(InputMissing, match=r"the scores in .* are of a model of rm that is no longer there"):
        begun(run, name="close", informative=True)
    with pytest.raises(InputMissing, match="ppo and best_of_4 is of a model of rm that is no longer there"):
        begun(run, source="ppo,best_of_4")
