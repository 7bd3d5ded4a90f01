"""A stage of a run whose replies a server writes: settings, keys, what is handed over, what is recorded."""

from pathlib import Path

from llm_server import serving
from preftune.api import run_recipe
from preftune.rundir import RunDir, read_json, read_jsonl
from vllm_server import VLLMServer


def test_a_stage_takes_its_replies_from_a_server_and_records_it(tiny_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with serving(VLLMServer()) as server:
        words = [f"sampler.url={server.url}/v1", f"sampler.weights_dir={tmp_path / 'weights'}"]
        words += ["stage.ppo=none", "stage.dpo=none", "stage.grpo.steps=2", "sampler.refresh_every=2"]
        run_recipe("tiny", words, out=str(run.path), until="grpo", from_run=str(tiny_run.path))
    record, before = (read_json(each.stage_json("grpo")) for each in (run, tiny_run))
    assert record["inputs"]["sampler"] == {
        "kind": "vllm",
        "refresh_every": 2,
        "importance_sampling_cap": 2.0,
    }
    assert "sampler" not in before["inputs"]
    assert record["inputs"]["parents"] == before["inputs"]["parents"]  # SFT and reward model were taken over
    own, stale = read_jsonl(run.metrics("grpo"))
    assert own["sampling/kl_k3"] < 1e-7 < stale["sampling/kl_k3"]
    (left,) = (tmp_path / "weights").iterdir()
    assert left.name.startswith("tiny-grpo-")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in left.iterdir()}
