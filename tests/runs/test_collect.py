"""A stage that collects: replies of a policy, judged, as data of another stage; stopped, resumed, refused."""

import shutil
import traceback
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import preftune
import prose
from gloo import join, two
from made_once import small_world
from patience import PATIENCE
from preftune import api, load_policy, load_reward_model
from preftune.config import load_recipe
from preftune.data import prompt_hash, read_preferences
from preftune.errors import ConfigError, DataError
from preftune.models.load import load_causal_lm
from preftune.models.locate import locate
from preftune.models.roles import Policy
from preftune.rollout.score import Scorer
from preftune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from preftune.runs import collect

pytestmark = [
    pytest.mark.xdist_group("forked"),  # one worker has all that fork
    pytest.mark.usefixtures("few_pairs"),
]

SMALL = ("model.scratch.steps=20", "stage.sft.rows=32", "stage.rm.rows=32", "stage.dpo.batch_size=8")
PAIRS = (
    "stage.pairs.algorithm=collect",
    "stage.pairs.init=sft",
    f"stage.pairs.judge={__name__}:words",
    "stage.pairs.rows=20",
    "stage.pairs.batch_size=8",
    "stage.pairs.replies=3",
    "stage.dpo.data=pairs",
)
MEASURED = (
    "evaluation.prompts=12",
    "evaluation.batch_size=5",
    "evaluation.pool=4",
    f"evaluation.reward_functions={__name__}:words",
)


def words(prompt: str, response: str) -> float:
    """A judge that counts words."""
    return float(len(response.split()))


def train(out: Path, *more: str, until: str = "dpo") -> RunDir:
    return api.run_recipe("tiny", [*SMALL, *PAIRS, *more], out=str(out), until=until)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few_pairs: None) -> RunDir:
    return train(tmp_path_factory.mktemp("collect") / "run")


@pytest.fixture
def begun(run: RunDir, tmp_path: Path) -> RunDir:
    """The same run before it collected."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    for gone in (copy.collected("pairs"), copy.stage_dir("pairs"), copy.stage_dir("dpo")):
        shutil.rmtree(gone)
    shutil.rmtree(copy.model_dir("dpo"))
    return copy


def collect_and_evaluate(rank: int, port: int, out: Path, told: Connection) -> None:
    """One of two processes of a run and of its evaluation."""
    join(rank, port)
    try:
        with small_world():
            train(out, *MEASURED, until="pairs")
            api.evaluate(out)
        told.send("")
    except BaseException:
        told.send(traceback.format_exc())


def test_two_processes_collect_and_measure_what_one_does(begun: RunDir, run: RunDir) -> None:
    """Prompts of a step and batches of an evaluation are shared: the same files to the last bit."""
    with two(collect_and_evaluate, begun.path) as ears:
        assert [ear.poll(PATIENCE) and ear.recv() for ear in ears] == ["", ""]
    for file in ("replies.jsonl", "preferences.jsonl"):
        assert (begun.collected("pairs") / file).read_bytes() == (run.collected("pairs") / file).read_bytes()
    assert read_json(begun.stage_json("pairs"))["world_size"] == 2
    folders = ("evaluation", "samples")
    found = {file: file.read_bytes() for each in folders for file in (begun.path / each).iterdir()}
    assert len(found) > 4
    for each in (*folders, "stages/evaluation"):
        shutil.rmtree(begun.path / each)
    api.evaluate(begun.path)
    assert {file: file.read_bytes() for each in folders for file in (begun.path / each).iterdir()} == found


def test_replies_are_scored_by_the_judge_and_paired_by_their_scores(run: RunDir) -> None:
    rows = read_jsonl(run.collected("pairs") / "replies.jsonl")
    assert len(rows) == 20
    assert all(len(row["replies"]) == 3 for row in rows)
    assert [row["scores"] for row in rows] == [[words("", text) for text in row["replies"]] for row in rows]
    pairs = {row["row"]: row for row in read_jsonl(run.preferences("pairs"))}
    for row in rows:
        if len(set(row["scores"])) > 1:
            made = pairs.pop(row["row"])
            assert (
                made["chosen"][0]["content"]
                == row["replies"][row["scores"].index(max(row["scores"]))].strip()
            )
            assert made["score_rejected"] == min(row["scores"])
            assert made["prompt"] == row["prompt"]
    assert not pairs


def test_a_row_says_who_wrote_and_who_judged_it(run: RunDir) -> None:
    row, *_ = read_jsonl(run.preferences("pairs"))
    assert row["judge"] == f"{__name__}:words"
    assert len(row["policy_sha256"]) == 64
    assert {message["role"] for message in row["prompt"] + row["chosen"]} == {"user", "assistant"}
    facts = read_json(run.stage_json("pairs"))["collected"]
    assert facts["prompts"], facts["replies"] == (20, 60)
    assert facts["labels_agree"] == facts["best_reachable"] == 1.0
    assert facts["longer_wins"]["value"] == 1.0  # the judge counts words
    assert facts["longer_wins"]["n"] == facts["pairs"]
    card = (run.collected("pairs") / "README.md").read_text(encoding="utf-8")
    assert f"judged by `{__name__}:words`; {facts['pairs']:,} pairs" in card
    assert f"where lengths differ: 100.0% [{facts['longer_wins']['low']:.1%}, 100.0%]" in card


def test_the_file_is_read_like_any_other(run: RunDir) -> None:
    rows, pairs = read_jsonl(run.preferences("pairs")), read_preferences(run.preferences("pairs"))
    assert 0 < len(pairs) <= len(rows)
    whole = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}
    assert {(pair.chosen.strip(), pair.rejected.strip()) for pair in pairs} <= whole


def test_a_reply_that_was_cut_is_learned_from_without_an_end(run: RunDir) -> None:
    rows, found = read_jsonl(run.preferences("pairs")), read_preferences(run.preferences("pairs"))
    assert {row["ended_chosen"] for row in rows} | {row["ended_rejected"] for row in rows} == {True, False}
    encoder = preftune.load_policy(run.model_dir("sft")).encoder
    for pair in found:
        ends = tuple(ids[-1] in encoder.ends for ids in encoder.pair(pair)[1:])
        assert ends == pair.ended


def test_another_stage_learns_from_them(run: RunDir) -> None:
    usable = len(read_preferences(run.preferences("pairs")))
    taken = [name for row in read_jsonl(run.ledger("dpo")) for name in row["rows"]]
    assert len(taken) == 8 * -(-usable // 8)
    assert set(taken) == {str(i) for i in range(usable)}
    record = read_json(run.stage_json("dpo"))
    assert record["parents"] == ["sft", "pairs"]
    assert record["made_from"]["pairs"]


def test_stopped_in_the_middle_it_ends_with_the_same_files(
    run: RunDir, begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def append(path: Path, row: Any) -> None:
        if len(written) == 11:  # in the second step
            raise KeyboardInterrupt
        written.append(row)
        original(path, row)

    original = collect.append_jsonl
    monkeypatch.setattr(collect, "append_jsonl", append)
    with pytest.raises(KeyboardInterrupt):
        train(begun.path)
    assert len(read_jsonl(begun.replies("pairs"))) == 11
    assert not begun.collected("pairs").exists()
    write_jsonl(
        begun.metrics("pairs"), [{**row, "time": 1000.0} for row in read_jsonl(begun.metrics("pairs"))]
    )
    monkeypatch.setattr(collect, "append_jsonl", original)
    train(begun.path)
    for name in ("replies.jsonl", "preferences.jsonl", "preftune.json"):
        ours, theirs = (each.collected("pairs") / name for each in (run, begun))
        assert ours.read_bytes() == theirs.read_bytes()
    assert read_jsonl(run.ledger("pairs")) == read_jsonl(begun.ledger("pairs"))
    assert read_json(begun.stage_json("pairs"))["seconds"] > 1000  # of the first attempt
    models = [each.model_dir("dpo") / "model.safetensors" for each in (run, begun)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_other_settings_do_not_go_on_with_what_was_collected(
    begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect, "_write", fails)
        with pytest.raises(KeyboardInterrupt):
            train(begun.path)
    with pytest.raises(ConfigError, match=r"stage pairs .* was made with other settings"):
        train(begun.path, "stage.pairs.temperature=0.5")


def test_a_changed_file_is_refused(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    file = copy.preferences("pairs")
    file.write_bytes(file.read_bytes().replace(b"chosen", b"chosin", 1))
    with pytest.raises(DataError, match=r"preferences\.jsonl is not what was written"):
        train(copy.path)


def test_a_reward_stage_and_its_directory_judge_alike(begun: RunDir) -> None:
    own = ("stage.rm.init=sft", "stage.pairs.judge=rm")
    made = read_jsonl(train(begun.path, *own, until="pairs").collected("pairs") / "replies.jsonl")
    handle = load_reward_model(begun.models / "reward_model")
    asked = [
        f"\n\nHuman: {row['prompt'][0]['content']}\n\nAssistant:" for row in made for _ in row["replies"]
    ]
    texts = [text for row in made for text in row["replies"]]
    scores = [score for row in made for score in row["scores"]]
    ends = (handle.score(asked, texts, ended=True), handle.score(asked, texts, ended=False))
    either = zip(scores, *ends, strict=True)  # the file does not say how a reply ended
    equal = [min(abs(score - float(each)) for each in rest) < 1e-4 for score, *rest in either]
    assert sum(equal) > len(equal) / 2  # others are no text that is encoded as it was sampled
    shutil.rmtree(begun.collected("pairs"))
    shutil.rmtree(begun.stage_dir("pairs"))
    train(begun.path, f"stage.pairs.judge={begun.models / 'reward_model'}", until="pairs")
    again = read_jsonl(begun.collected("pairs") / "replies.jsonl")
    assert [row["replies"] for row in again] == [row["replies"] for row in made]
    assert [row["scores"] for row in again] == [pytest.approx(row["scores"], abs=1e-5) for row in made]


def test_replies_without_an_end_get_the_score_that_is_set(run: RunDir, begun: RunDir) -> None:
    train(begun.path, "stage.pairs.missing_eos_score=-7", until="pairs")
    files = [each.collected("pairs") / "replies.jsonl" for each in (run, begun)]
    own, shaped = ([(row["ended"], row["scores"]) for row in read_jsonl(file)] for file in files)
    assert {closed for ended, _ in own for closed in ended} == {True, False}
    assert shaped == [
        (ended, [score if closed else -7 for closed, score in zip(ended, scores, strict=True)])
        for ended, scores in own
    ]
    card = (begun.collected("pairs") / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in card.splitlines() if "the score -7" in line)
    assert "the score -" not in (run.collected("pairs") / "README.md").read_text(encoding="utf-8")
    prose.compare("runs/collect: replies without an end have a score of their own", line)


def test_replies_without_an_end_are_in_no_pair_where_that_is_set(run: RunDir, begun: RunDir) -> None:
    train(begun.path, "stage.pairs.truncated=drop", "stage.pairs.pairing=all", until="pairs")
    rows = read_jsonl(begun.collected("pairs") / "replies.jsonl")
    assert rows == read_jsonl(run.collected("pairs") / "replies.jsonl")
    expected = [
        (row["row"], max(a, b), min(a, b))
        for row in rows
        for (a, first, x), (b, second, y) in combinations(
            zip(row["scores"], row["ended"], row["replies"], strict=True), 2
        )
        if first and second and a != b and x.strip() != y.strip()
    ]
    pairs = read_jsonl(begun.collected("pairs") / "preferences.jsonl")
    assert [(pair["row"], pair["score_chosen"], pair["score_rejected"]) for pair in pairs] == expected
    assert pairs
    assert all(pair["ended_chosen"] and pair["ended_rejected"] for pair in pairs)
    card, plain = ((each.collected("pairs") / "README.md").read_text() for each in (begun, run))
    assert "are in no pair" not in plain
    (line,) = (line for line in card.splitlines() if "are in no pair" in line)
    prose.compare("runs/collect: replies without an end are in no pair", line)


def test_the_implicit_reward_of_a_policy_judges(begun: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """β (log π - log π_ref) of the sampled tokens under the two saved models, up to mean and unit."""
    seen: list[Any] = []
    scores = Scorer.scored

    def heard(self: Scorer, sequences: Any, rows: Any = ()) -> Any:
        found = scores(self, sequences, rows)
        seen.append((sequences, found[0]))
        return found

    monkeypatch.setattr(Scorer, "scored", heard)
    judge = ("stage.judge.algorithm=dpo", "stage.judge.rows=32", "stage.judge.learning_rate=1e-2")
    train(begun.path, *judge, "stage.pairs.judge=judge", until="pairs")
    policy, reference = (Policy(load_causal_lm(locate(str(begun.model_dir(n))))) for n in ("judge", "sft"))
    with torch.no_grad():
        ratios = torch.cat([(policy.logprobs(s) - reference.logprobs(s)).sum(1) for s, _ in seen])
    given = torch.cat([found for _, found in seen])
    assert ratios.std() > 0.1
    assert torch.corrcoef(torch.stack([ratios, given]))[0, 1].item() == pytest.approx(1, abs=1e-5)
    written = [x for row in read_jsonl(begun.collected("pairs") / "replies.jsonl") for x in row["scores"]]
    assert written == pytest.approx(given.tolist())


def test_best_of_n_distillation_makes_the_best_replies_likelier(begun: RunDir) -> None:
    distilled = ("stage.best.algorithm=sft", "stage.best.init=sft", "stage.best.data=pairs")
    train(begun.path, *distilled, "stage.best.epochs=4", "stage.best.learning_rate=5e-3", until="best")
    rows = read_preferences(begun.preferences("pairs"))
    means = []
    for handle in (load_policy(begun.model_dir(name)) for name in ("sft", "best")):
        batch = handle.encoder.sequences([(row.prompt, row.chosen) for row in rows])
        means.append(handle.logprobs(batch).sum().item() / batch.response.sum().item())
    assert means[1] > means[0] + 0.1
    ledger = [name for row in read_jsonl(begun.ledger("best")) for name in row["rows"]]
    assert set(ledger) == {str(i) for i in range(len(rows))}


# --- data of a stage ----------------------------------------------------------------------------------------


def test_a_stage_learns_from_a_file_of_its_own_without_held_out_prompts(tmp_path: Path) -> None:
    config = load_recipe("tiny").config
    from preftune.runs.sources import dataset_of

    kept = dataset_of(config.data, config.seed)
    held, free = kept.test[0], kept.train[0]
    rows = [
        {"prompt": pair.prompt.transcript(), "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in (held, free)
    ]
    file = tmp_path / "own.jsonl"
    write_jsonl(file, rows)
    changes = (*SMALL, f"stage.dpo.data={file}")
    run = api.run_recipe("tiny", changes, out=str(tmp_path / "run"), until="dpo")
    report = read_json(run.data)["others"][str(file)]
    assert (report["splits"]["train"], report["held_out_prompts"]) == (1, 1)
    assert {name for row in read_jsonl(run.ledger("dpo")) for name in row["rows"]} == {"0"}
    assert prompt_hash(held.prompt) != prompt_hash(free.prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage.dpo.data=nothing", 'stage.dpo.data = "nothing": expected a stage that collects'),
        ("stage.dpo.data=sft", 'stage.dpo.data = "sft": expected a stage that collects'),
        ("stage.pairs.judge=nothing", 'stage.pairs.judge = "nothing": expected a stage whose model scores'),
        ("stage.pairs.judge=no number:f", "is no weighted function"),
        ("stage.pairs.replies=1", "stage.pairs.replies = 1"),
        ("stage.pairs.data=pairs", "stages wait for each other: pairs -> pairs"),
        ("stage.rm.init=pairs", 'stage.rm.init = "pairs": expected a stage that trains a policy'),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [*PAIRS, change])
    assert message in caught.value.message


def test_a_judge_is_required() -> None:
    with pytest.raises(ConfigError, match=r"stage\.pairs\.judge is required"):
        load_recipe("tiny", ["stage.pairs.algorithm=collect"])


def test_a_judge_to_which_all_replies_are_equal_makes_no_pairs(begun: RunDir) -> None:
    with pytest.raises(DataError, match="no two replies with different scores"):
        train(begun.path, f"stage.pairs.judge={__name__}:nothing")


def nothing(prompt: str, response: str) -> float:
    return 0.0


def stops(prompt: str, response: str, ended: bool) -> float:
    """A judge that no training sees."""
    return float(ended)


def test_the_whole_run_is_measured_and_gold_stands_beside_the_score(run: RunDir) -> None:
    few = ("evaluation.prompts=8", "evaluation.pool=4", "stage.ppo=none", "stage.grpo=none")
    name = f"{__name__}:stops"
    made = preftune.run("tiny", *SMALL, *PAIRS, *few, f"evaluation.gold={name}", out=str(run.path))
    assert not made.evaluation("policy_pairs").exists()
    for policy in ("base", "policy_sft", "policy_dpo", "best_of_4"):
        record = read_json(made.evaluation(policy))
        assert record["golds"][name]["mean"] == record["eos_rate"]["value"]
        assert record["score"]["mean"] != record["golds"][name]["mean"]
    measures = {row["measure"] for row in read_jsonl(made.comparisons)}
    assert {"score", "gold", f"gold:{name}"} <= measures
    text = made.analysis_text.read_text(encoding="utf-8")
    assert f"Gold, {name}" in text
    facts = read_json(made.stage_json("pairs"))["collected"]
    (row,) = [line for line in text.splitlines() if line.startswith("| `pairs` | `sft` |")]
    assert f"| 20 | 60 | {facts['pairs']} | {facts['left_out_pairs']} |" in row


def test_its_metrics_are_documented(run: RunDir) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition("## collect")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in section for name in read_jsonl(run.metrics("pairs"))[0])
