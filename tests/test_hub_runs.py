"""The recipes that read from the hub, end to end against a small one: tiny models under the real names, and
an unmodified client in a process of its own where a run begins.
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2Config, GPT2ForSequenceClassification

from hub_server import Hub, serving
from preftune.api import run_recipe, sample
from preftune.data.corpus import train_tokenizer
from preftune.errors import ConfigError, DataError, InputMissing
from preftune.models.load import load_causal_lm, load_tokenizer, scratch_gpt2
from preftune.models.locate import fingerprint, locate
from preftune.rundir import RunDir, read_json
from sweeps import ALL

SOURCE = str(Path(__file__).resolve().parent.parent / "src")
SMALL = [
    *("stage.rm.rows=8", "stage.rm.batch_size=8", "stage.sft.rows=8", "stage.sft.batch_size=8"),
    *("stage.ppo.steps=1", "stage.ppo.batch_size=4", "stage.ppo.minibatches=1", "stage.ppo.max_new_tokens=4"),
    *("stage.grpo.steps=1", "stage.grpo.batch_size=4", "stage.grpo.group_size=2"),
    *(
        "stage.grpo.minibatches=1",
        "stage.grpo.max_new_tokens=4",
        "stage.dpo.rows=8",
        "stage.dpo.batch_size=8",
    ),
    *("evaluation.prompts=4", "evaluation.max_new_tokens=4", "evaluation.pool=4", "evaluation.resamples=50"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_tokenizer([], 300)
    scratch_gpt2(tokenizer, layers=1, width=16, heads=2, positions=1024, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def pairs(name: str, count: int) -> bytes:
    rows = []
    for i in range(count):
        start = f"\n\nHuman: {name} question {i}?\n\nAssistant: "
        rows.append({"chosen": f"{start}Yes, {i} it is.", "rejected": f"{start}No, not {i}."})
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    """GPT-2 behind its alias, with weights that nobody asks for, and a data set like HH-RLHF."""
    content = {f.name: f.read_bytes() for f in model.iterdir()} | {"pytorch_model.bin": b"not for us"}
    data = {
        f"{part}/{split}.jsonl.gz": pairs(f"{part} {split}", count)
        for part in ("harmless-base", "helpful-base")
        for split, count in (("train", 40), ("test", 12))
    }
    data |= {"red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(b'{"transcript": "x"}\n')}
    with serving() as found:
        found.put("models/openai-community/gpt2", content)
        found.aliases["gpt2"] = "openai-community/gpt2"
        found.put("datasets/Anthropic/hh-rlhf", data)
        yield found


def preftune(hub: Hub | None, home: Path, *words: str, **environment: str) -> str:
    """What a command says, in a process that knows the hub by HF_ENDPOINT alone; it must succeed."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    endpoint = "http://127.0.0.1:9" if hub is None else hub.url
    more = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "PYTHONPATH": SOURCE,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    done = subprocess.run(
        [sys.executable, "-m", "preftune", *words],
        env=kept | more | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same hub for this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return hub


def test_hh_colab_runs_resumes_at_its_commits_and_opens_offline(
    client: Hub, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after SFT; by the time it goes on the hub has code in the model and other data."""
    hub = client
    home, out = tmp_path / "home", tmp_path / "run"
    preftune(hub, home, "train", "hh-colab", "sft", *SMALL, "--out", str(out))
    recorded = json.loads((out / "run.json").read_text())["base"]
    assert recorded == {"name": "gpt2", "commit": hub.repositories["models/openai-community/gpt2"][0][0]}
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Evil"}}
    changed = {f.name: f.read_bytes() for f in model.iterdir()} | {"config.json": json.dumps(config).encode()}
    hub.put("models/openai-community/gpt2", changed)
    hub.put("datasets/Anthropic/hh-rlhf", {"harmless-base/train.jsonl.gz": pairs("other", 20)})
    hub.requests.clear()
    if ALL:
        preftune(hub, home, "run", "hh-colab", *SMALL, "--out", str(out))
        assert (out / "report.html").is_file()
    else:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        run_recipe("hh-colab", SMALL, out=str(out), until="dpo")
    assert hub.requests == []
    assert json.loads((out / "data.json").read_text())["splits"]["test"] == 12
    assert recorded["commit"] in (out / "models/policy_sft/README.md").read_text()
    if ALL:
        preftune(None, home, "evaluate", str(out), HF_HUB_OFFLINE="1")
        preftune(None, home, "sample", str(out))  # nor does an endpoint that refuses matter
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert list(sample(out))
    assert hub.requests == []


def test_hh_gpt2_runs(client: Hub, tmp_path: Path) -> None:
    hub = client
    if ALL:
        preftune(hub, tmp_path / "home", "run", "hh-gpt2", *SMALL, "--out", str(tmp_path / "run"))
    else:
        run_recipe("hh-gpt2", SMALL, out=str(tmp_path / "run"))
    sources = json.loads((tmp_path / "run/data.json").read_text())["sources"]
    assert set(sources["test"]) == {"harmless-base", "helpful-base"}
    asked = " ".join(hub.requests)
    assert "pytorch_model.bin" not in asked
    assert "red_team" not in asked
    assert "commits" not in asked  # no question about conversions of weights


def test_a_new_machine_goes_on_with_the_commits_in_the_mirror(
    client: Hub, tmp_path: Path, model: Path
) -> None:
    """SFT is in the mirror; the hub has another model and other data by the time the run begins elsewhere."""
    drive, first, second = str(tmp_path / "drive"), tmp_path / "first", tmp_path / "second"
    words = [*SMALL, "data.name=Anthropic/hh-rlhf", "model.base=gpt2"]
    run_recipe("tiny", words, out=str(first), until="sft", mirror=drive)
    put(client, model, repository="models/openai-community/gpt2", other__txt=b"of the next commit")
    client.put("datasets/Anthropic/hh-rlhf", {"harmless-base/train.jsonl.gz": pairs("other", 20)})
    run_recipe("tiny", words, out=str(second), until="sft", mirror=drive)
    for file in ("run.json", "data.json"):
        ours, theirs = (json.loads((out / file).read_text()) for out in (first, second))
        assert ours.get("base") == theirs.get("base")
        assert ours.get("commit") == theirs.get("commit")
    third = tmp_path / "third"
    (tmp_path / "drive/commits.json").write_text('{"base gpt2": "ab')  # as none: what the hub has now differs
    with pytest.raises(ConfigError, match=r"in the mirror .* was made with other settings"):
        run_recipe("tiny", words, out=str(third), until="sft", mirror=drive)


def test_a_judge_of_the_hub_scores_by_its_commit_and_a_new_machine_takes_that_from_the_mirror(
    client: Hub, tmp_path: Path
) -> None:
    """It scores PPO's replies and those that are collected; then the hub has another one of that name."""
    tokenizer = train_tokenizer([], 300)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "num_labels": 1, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = GPT2Config(**sizes, **ends, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3)
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path / f"judge-{seed}")
        tokenizer.save_pretrained(tmp_path / f"judge-{seed}")
    client.put("models/org/judge", tmp_path / "judge-0")
    commits = client.repositories["models/org/judge"]
    pairs = ["stage.pairs.algorithm=collect", "stage.pairs.judge=org/judge", "stage.pairs.rows=4"]
    words = [*SMALL, "model.scratch.steps=6", "data.pairs=40", *pairs, "stage.pairs.replies=2"]
    words += ["stage.ppo.reward_model=org/judge", "stage.ppo.data=pairs"]
    drive, first, second = str(tmp_path / "drive"), RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    run_recipe("tiny", words, out=str(first.path), until="ppo", mirror=drive)
    for stage, key in (("pairs", "judge"), ("ppo", "reward_model")):
        found = read_json(first.stage_json(stage))["inputs"]["settings"][key]
        assert (found["name"], found["commit"]) == ("org/judge", commits[0][0])
    assert read_json(tmp_path / "drive" / "commits.json")["judge org/judge"] == commits[0][0]
    client.put("models/org/judge", tmp_path / "judge-1")
    assert commits[1][0] != commits[0][0]
    run_recipe("tiny", words, out=str(second.path), until="ppo", mirror=drive)
    for stage in ("pairs", "ppo"):
        assert read_json(second.stage_json(stage))["key"] == read_json(first.stage_json(stage))["key"]
    third = RunDir(tmp_path / "third")  # without the mirror: what the hub has now
    run_recipe("tiny", words, out=str(third.path), until="pairs")
    assert read_json(third.stage_json("pairs"))["inputs"]["settings"]["judge"]["commit"] == commits[1][0]
    run_recipe("tiny", words, out=str(first.path), until="ppo")  # and here: what it was begun with


def test_a_model_is_loaded_from_one_commit(client: Hub, model: Path) -> None:
    source = locate("gpt2")
    assert (
        Path(source.path).name == source.commit == client.repositories["models/openai-community/gpt2"][0][0]
    )
    assert fingerprint(source) == fingerprint(locate(str(model)))
    client.requests.clear()
    assert len(load_tokenizer(source)) == 257
    load_causal_lm(source)
    assert locate("gpt2", source.commit) == source
    assert client.requests == []


def put(hub: Hub, model: Path, repository: str = "models/some/thing", **changes: bytes | None) -> None:
    content = {f.name: f.read_bytes() for f in model.iterdir()}
    changed = content | {name.replace("__", "."): body for name, body in changes.items()}
    hub.put(repository, {name: body for name, body in changed.items() if body is not None})


def test_pickles_alone_are_refused_before_a_weight_is_asked_for(client: Hub, model: Path) -> None:
    put(client, model, model__safetensors=None, pytorch_model__bin=b"pickled")
    with pytest.raises(InputMissing, match=r"no \.safetensors weights") as caught:
        locate("some/thing")
    assert "pickled" in caught.value.hint
    assert not [each for each in client.requests if "bin" in each or "commits" in each or "discuss" in each]


def test_code_is_refused_before_weights_and_tokenizer_are_fetched(client: Hub, model: Path) -> None:
    safe = locate("gpt2")
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / file).read_text()) | {
            "auto_map": {"AutoTokenizer": ["evil.Evil", None]}
        }
        changes = {file.replace(".", "__"): json.dumps(content).encode(), "evil__py": b"raise SystemExit"}
        put(client, model, **changes)
        with pytest.raises(DataError, match="auto_map"):
            locate("some/thing")
    assert locate("gpt2") == safe
    asked = [each for each in client.requests if "some" in each]
    assert not [each for each in asked if "safetensors" in each or "evil.py" in each]


def test_a_copy_of_the_familys_own_code_is_passed_by(client: Hub, model: Path) -> None:
    own = {"AutoConfig": "configuration_gpt2.GPT2Config", "AutoModelForCausalLM": "m.GPT2LMHeadModel"}
    content = json.loads((model / "config.json").read_text()) | {"auto_map": own}
    put(client, model, config__json=json.dumps(content).encode(), m__py=b"raise SystemExit")
    source = locate("some/thing")
    load_causal_lm(source)
    assert not (Path(source.path) / "m.py").exists()


@pytest.mark.parametrize("files", [("adapter_config.json",), ("adapter_model.safetensors", "README.md")])
def test_an_adapter_is_called_so_whatever_else_is_there(
    files: tuple[str, ...], client: Hub, tmp_path: Path
) -> None:
    (tmp_path / "lora").mkdir()
    for file in files:
        (tmp_path / "lora" / file).write_text("{}")
    client.put("models/some/lora", tmp_path / "lora")
    for name in (str(tmp_path / "lora"), "some/lora"):
        with pytest.raises(DataError, match="adapter") as caught:
            locate(name)
        assert "merge" in caught.value.hint


def test_a_damaged_body_is_named_with_the_file(client: Hub, model: Path) -> None:
    put(client, model, model__safetensors=(model / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors of commit .* is damaged") as caught:
        locate("some/thing")
    assert "remove" in caught.value.hint


def test_shards_come_by_their_index(client: Hub, model: Path, tmp_path: Path) -> None:
    load_causal_lm(locate(str(model))).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in model.glob("tokenizer*"):
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "shards" / "consolidated.safetensors").write_bytes(b"of another program")
    client.put("models/some/shards", tmp_path / "shards")
    source = locate("some/shards")
    assert len(list(Path(source.path).glob("model-*.safetensors"))) > 1
    assert not [each for each in client.requests if "consolidated" in each]
    load_causal_lm(source)
