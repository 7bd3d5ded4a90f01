"""A whole run of the recipe `tiny`: its files, what is in them, and that a second run trains nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import preftune
from preftune.cli import main
from preftune.config import RunConfig, load_recipe
from preftune.data import Encoder, order, pad_sequences
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.models.load import Source
from preftune.models.scalar import load_scalar_model
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.sources import dataset_of

POLICIES = ["base", "policy_sft", "policy_ppo", "policy_grpo", "policy_dpo", "best_of_4"]
STAGES = ["base", "sft", "rm", "ppo", "grpo", "dpo"]
MODELS = ["base", "policy_sft", "policy_ppo", "policy_grpo", "policy_dpo", "reward_model"]
PROMPTS = ["\n\nHuman: Hello\n\nAssistant:", "\n\nHuman: What colour is it , please ?\n\nAssistant:"]
REPLIES = [" It is red .", " I do not know ."]


def config() -> RunConfig:
    return load_recipe("tiny", []).config


def context() -> int:
    scratch = config().model.scratch
    assert scratch is not None
    return scratch.positions


def files(run: RunDir) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of writing and its content, but for an attempt's log and lock."""
    left = {run.logs, run.lock}
    found = [p for p in run.path.rglob("*") if p.is_file() and not left & {p, p.parent}]
    return {str(p.relative_to(run.path)): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


def test_the_run_directory_holds_exactly_these_files(tiny_run: RunDir) -> None:
    saved = [
        "README.md",
        "config.json",
        "model.safetensors",
        "preftune.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    expected = {"config.toml", "run.json", "origins.json", "data.json", "ANALYSIS.md", "report.html"}
    expected |= {f"models/{name}/{file}" for name in MODELS for file in saved}
    expected |= {f"models/{name}/generation_config.json" for name in MODELS if name != "reward_model"}
    expected |= {"models/reward_model/reward_head.bin", "analysis/reward_model_mistakes.jsonl"}
    expected |= {f"analysis/{part}.md" for part in ("config", "data", "mistakes", "samples", "setup")}
    expected |= {f"samples/{'base_scratch' if p == 'base' else p}_samples.jsonl" for p in POLICIES}
    expected |= {f"evaluation/{name}.json" for name in [*POLICIES, "reward_model", "best_of_n"]} | {
        "evaluation/comparisons.jsonl"
    }
    expected |= {
        f"stages/{stage}/{file}"
        for stage in STAGES
        for file in ("stage.json", "metrics.jsonl", "ledger.jsonl")
    }
    expected |= {"stages/evaluation/stage.json", ".preftune", ".report.json"}
    drawn = [
        "reward_distribution",
        "reward_kl",
        "reward_kl_gold",
        "reward_model_groups",
        "reward_model_length",
        "reward_model_margins",
        "reward_model_reliability",
        *(f"training_{s}" for s in STAGES),
    ]
    expected |= {f"figures/{name}.svg" for name in drawn}
    assert set(files(tiny_run)) == expected


def test_a_second_run_changes_nothing(tiny_run: RunDir) -> None:
    before = files(tiny_run)
    preftune.run("tiny", out=str(tiny_run.path))
    assert files(tiny_run) == before


@pytest.mark.parametrize(
    ("function", "model"),
    [
        (preftune.train_reward_model, "reward_model"),
        (preftune.supervised_finetune, "policy_sft"),
        (preftune.ppo_train, "policy_ppo"),
        (preftune.grpo_train, "policy_grpo"),
        (preftune.dpo_train, "policy_dpo"),
    ],
)
def test_stage_functions_return_their_models(
    tiny_run: RunDir, function: Callable[..., Path], model: str
) -> None:
    before = files(tiny_run)
    path = function("tiny", out=str(tiny_run.path))
    assert path == tiny_run.path / "models" / model
    assert (path / "model.safetensors").is_file()
    assert files(tiny_run) == before


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("stage.sft.learning_rate=2e-3", "settings.learning_rate: 0.001 -> 0.002"),
        ("stage.dpo.beta=0.5", "settings.beta: 0.1 -> 0.5"),
        ("seed=1", "seed: 0 -> 1"),
        ("model.scratch.steps=61", "settings.scratch.steps: 60 -> 61"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    tiny_run: RunDir, override: str, difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tiny_run)
    with pytest.raises(ConfigError) as caught:
        preftune.run("tiny", override, out=str(tiny_run.path))
    assert difference in str(caught.value)
    assert f"--out {tiny_run.path}" in caught.value.hint
    assert f"--from {tiny_run.path}" in caught.value.hint
    assert main(["run", "tiny", override, "--out", str(tiny_run.path)]) == 78
    assert difference in capsys.readouterr().err
    assert files(tiny_run) == before  # config.toml, too, is still that of the run


def test_memory_settings_may_change(tiny_run: RunDir) -> None:
    weights = {name: content for name, content in files(tiny_run).items() if name.startswith("models/")}
    path = preftune.supervised_finetune("tiny", "stage.sft.microbatch_size=16", out=str(tiny_run.path))
    assert path.is_dir()
    assert {
        name: content for name, content in files(tiny_run).items() if name.startswith("models/")
    } == weights
    preftune.supervised_finetune("tiny", out=str(tiny_run.path))  # as it was


def test_samples_answer_the_same_prompts(tiny_run: RunDir) -> None:
    rows = {name: read_jsonl(path) for name, path in tiny_run.samples_files().items()}
    assert set(rows) == set(POLICIES)
    prompts = [[row["prompt"] for row in each] for each in rows.values()]
    assert all(each == prompts[0] for each in prompts)
    assert len(prompts[0]) == len(set(prompts[0])) == 5
    for name, row in ((name, row) for name, each in rows.items() for row in each):
        kl = set() if name.startswith("best_of") else {"kl", "k1"}  # a selection has no KL of its own
        assert (
            row.keys() == {"row", "prompt", "response", "score", "held_out", "ended", "length", "gold"} | kl
        )
        assert row["prompt"].startswith("\n\nHuman:")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert 1 <= row["length"] <= 16
        assert row.get("kl", 0) >= 0
    assert all(row["kl"] == row["k1"] == 0 for row in rows["policy_sft"])
    held_out = {row.prompt.transcript() for row in dataset_of(config().data, 0).train}
    assert not held_out & set(prompts[0])


def test_evaluations_agree_with_each_other(tiny_run: RunDir) -> None:
    results = {name: read_json(tiny_run.evaluation(name)) for name in POLICIES}
    for name, result in results.items():
        low, high = result["score"]["interval"]
        assert low <= result["score"]["mean"] <= high, name
        assert result["n_prompts"] == result["n_samples"] == 16
        assert result["gold"]["n"] == 16
    assert results["policy_sft"]["kl"]["exact_per_sequence"]["mean"] == 0.0
    assert results["policy_sft"]["score_difference_to_sft"] is None
    assert results["best_of_4"]["score"]["mean"] >= results["policy_sft"]["score"]["mean"]
    sft = results["policy_sft"]["score"]["mean"]
    for name in set(POLICIES) - {"policy_sft"}:
        difference = results[name]["score_difference_to_sft"]["mean"]
        assert difference == pytest.approx(results[name]["score"]["mean"] - sft, abs=1e-9)


def test_mistakes_are_the_validation_pairs_in_the_wrong_order(tiny_run: RunDir) -> None:
    """Recomputed from the saved model, row by row of the validation split; ties count as mistakes."""
    model = preftune.load_reward_model(tiny_run.models / "reward_model")
    data = config().data
    encoder = Encoder(model.encoder.tokenizer, "transcript", data.max_prompt_length, data.max_response_length)
    pairs, sides = dataset_of(data, 0).validation, []
    for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs]):
        prompts = [p.prompt.transcript() for p in pairs]
        rows = [(encoder.text(a), encoder.response(b)) for a, b in zip(prompts, texts, strict=True)]
        assert max(len(prompt) for prompt, _ in rows) <= data.max_prompt_length
        batch = pad_sequences(*zip(*rows, strict=True), model.encoder.pad_id)
        with torch.no_grad():
            sides.append(model.role.raw_scores(batch))
    margins = sides[0] - sides[1]
    listed = {row["idx"]: row for row in read_jsonl(tiny_run.mistakes)}
    for i, margin in enumerate(margins.tolist()):
        if abs(margin) > 1e-4:  # closer ones are decided by rounding
            assert (i in listed) == (margin <= 0)
    assert 100 < len(listed) < len(pairs)
    for i, row in listed.items():
        assert row["reward_chosen"] <= row["reward_rejected"]
        assert row["reward_chosen"] == pytest.approx(sides[0][i].item(), abs=1e-4)
        assert (row["prompt"], row["chosen"]) == (pairs[i].prompt.transcript(), pairs[i].chosen)
        assert row["rejected"] == pairs[i].rejected
    order = [row["margin"] for row in read_jsonl(tiny_run.mistakes)]
    assert order == sorted(order)
    record = read_json(tiny_run.reward_evaluation)
    assert record["accuracy"]["value"] == pytest.approx(1 - len(listed) / record["n"])
    assert record["n"] == len(pairs)


def test_the_reward_model_is_a_sequence_classifier_like_any_other(tiny_run: RunDir) -> None:
    """transformers' own pooling, on a padded batch, gives our scores; the pad token is not EOS."""
    directory = tiny_run.models / "reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert model.config.num_labels == 1
    texts = [prompt + reply + tokenizer.eos_token for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.squeeze(-1)
    ours = preftune.load_reward_model(directory)
    torch.testing.assert_close(ours.raw_score(PROMPTS, REPLIES), theirs, atol=1e-5, rtol=0)
    side = read_json(directory / "preftune.json")
    normalised = (theirs - side["mean"]) / side["std"]
    torch.testing.assert_close(ours.score(PROMPTS, REPLIES), normalised, atol=1e-5, rtol=0)
    assert (ours.score(PROMPTS, REPLIES, ended=False) - ours.score(PROMPTS, REPLIES)).abs().min() > 1e-5


def test_a_score_depends_on_nothing_but_its_row(tiny_run: RunDir) -> None:
    model = preftune.load_reward_model(tiny_run.models / "reward_model")
    together = model.score(PROMPTS, REPLIES)
    alone = torch.cat([model.score([p], [r]) for p, r in zip(PROMPTS, REPLIES, strict=True)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert model.score([], []).shape == (0,)


def test_scores_of_chosen_training_responses_have_mean_0_and_sd_1(tiny_run: RunDir) -> None:
    model = preftune.load_reward_model(tiny_run.models / "reward_model")
    train = dataset_of(config().data, 0).train
    rows = [train[i] for i in order(len(train), 0, "rows", 0)[:256]]  # a sample of all sources, not the front
    scores = model.score([r.prompt.transcript() for r in rows], [r.chosen for r in rows])
    assert scores.mean().item() == pytest.approx(0.0, abs=0.02)
    assert scores.std().item() == pytest.approx(1.0, abs=0.02)


def test_the_head_file_holds_the_head(tiny_run: RunDir) -> None:
    directory = tiny_run.models / "reward_model"
    head = torch.load(directory / "reward_head.bin", weights_only=True)
    model = load_scalar_model(Source(str(directory)))
    assert list(head) == ["weight"]
    assert torch.equal(head["weight"], model.score.weight)


def test_the_head_file_is_never_read(tiny_run: RunDir, tmp_path: Path) -> None:
    """The replaced pipeline took its head from there, and a stale or missing file left it random."""
    copy = tmp_path / "reward_model"
    copy.mkdir()
    for file in (tiny_run.models / "reward_model").iterdir():
        (copy / file.name).write_bytes(b"" if file.name == "reward_head.bin" else file.read_bytes())
    here = preftune.load_reward_model(tiny_run.models / "reward_model")
    assert torch.equal(preftune.load_reward_model(copy).score(PROMPTS, REPLIES), here.score(PROMPTS, REPLIES))


def test_a_policy_generates_and_looks_up(tiny_run: RunDir) -> None:
    directory = tiny_run.models / "policy_sft"
    policy = preftune.load_policy(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    greedy = policy.generate(PROMPTS, max_new_tokens=12, temperature=0)
    for prompt, reply in zip(PROMPTS, greedy, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.eos_token_id)
        assert reply == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    sampled = policy.generate(PROMPTS * 9, max_new_tokens=12, seed=1)
    assert policy.generate(PROMPTS * 9, max_new_tokens=12, seed=1) == sampled
    assert policy.generate(PROMPTS * 9, max_new_tokens=12, seed=2) != sampled
    assert len(set(sampled[::2])) > 1
    assert all(isinstance(reply, str) and tokenizer.eos_token not in reply for reply in sampled)
    prompt, reply = policy.encoder.text(PROMPTS[0]), policy.encoder.response(REPLIES[0])
    got = policy.logprobs(pad_sequences([prompt], [reply], policy.encoder.pad_id))
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([prompt + reply])).logits[0, :-1], -1)
    expected = logp[torch.arange(len(logp)), torch.tensor(prompt + reply)[1:]][len(prompt) - 1 :]
    torch.testing.assert_close(got[0, len(prompt) :], expected, atol=1e-5, rtol=0)


def test_a_text_longer_than_the_context_is_an_error_for_people(tiny_run: RunDir) -> None:
    long = "\n\nHuman:" + " red" * context() + "\n\nAssistant:"
    policy = preftune.load_policy(tiny_run.models / "policy_sft")
    with pytest.raises(DataError, match=f"prompt 1 .* {context()} tokens"):
        policy.generate([PROMPTS[0], long], max_new_tokens=4)
    with pytest.raises(DataError, match=f"prompt 0 .* {context()} tokens"):
        preftune.load_reward_model(tiny_run.models / "reward_model").score([long], REPLIES[:1])


def test_a_reply_ends_where_the_context_does(tiny_run: RunDir) -> None:
    """For each prompt by its own length, whatever its neighbours."""
    policy = preftune.load_policy(tiny_run.models / "base")
    ids = policy.encoder.text(PROMPTS[0])
    prompts = ["\n\nHuman:" + " red" * n + "\n\nAssistant:" for n in (1, context() - len(ids), 5)]
    several = policy.generate(prompts, max_new_tokens=context(), seed=4, temperature=3.0)
    assert policy.generate(prompts[:1], max_new_tokens=context(), seed=4, temperature=3.0) == several[:1]
    assert len(several[1].split()) < min(len(several[0].split()), len(several[2].split()))


def test_a_tokenizer_of_another_model_is_noticed(tiny_run: RunDir, tmp_path: Path) -> None:
    copy = tmp_path / "policy"
    copy.mkdir()
    for file in (tiny_run.models / "policy_sft").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).write_bytes((tiny_run.models / "reward_model" / file).read_bytes())  # one token more
    with pytest.raises(DataError, match="tokenizer"):
        preftune.load_policy(copy)


def test_what_is_no_model_is_named(tiny_run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no model directory"):
        preftune.load_policy(tmp_path / "missing")
    with pytest.raises(DataError, match="not a reward model"):
        preftune.load_reward_model(tiny_run.models / "policy_sft")


def test_every_stage_says_what_it_was_made_from(tiny_run: RunDir) -> None:
    records = {stage: read_json(tiny_run.stage_json(stage)) for stage in STAGES}
    assert {record["status"] for record in records.values()} == {"finished"}
    assert records["ppo"]["parents"] == ["sft", "rm"]
    assert records["ppo"]["inputs"]["parents"] == {name: records[name]["key"] for name in ("sft", "rm")}
    assert records["sft"]["inputs"]["parents"] == {"base": records["base"]["key"]}
    for stage, steps in {"base": 60, "sft": 4, "rm": 4, "ppo": 3, "grpo": 3, "dpo": 4}.items():
        rows = read_jsonl(tiny_run.metrics(stage))
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(row["time"] > 0 for row in rows)
    first = read_jsonl(tiny_run.metrics("ppo"))[0]
    assert first["first/val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["first/policy/clipfrac_avg"] == 0.0
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the policy still is the reference
    assert read_jsonl(tiny_run.metrics("dpo"))[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_saved_tokenizers_neither_cut_nor_pad(tiny_run: RunDir) -> None:
    """The replaced pipeline's tokenizer.json did both, silently, in every reader."""
    for name in MODELS:
        content = json.loads((tiny_run.models / name / "tokenizer.json").read_text())
        assert content["truncation"] is None
        assert content["padding"] is None
