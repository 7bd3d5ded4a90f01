"""A run that trains the upper blocks: its settings, and its plan (test_kept_states has the rest)."""

from types import SimpleNamespace
from typing import cast

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

import prose
from preftune.cli import main
from preftune.config import load_recipe
from preftune.data import Dataset
from preftune.errors import ConfigError
from preftune.runs.sizes import _adapters, sizes


@pytest.mark.parametrize("wrong", ["top:0", "top", "some", "top:-1"])
def test_what_is_no_part_of_a_model_is_refused_with_the_choices(wrong: str) -> None:
    for key in ("model.trainable", "stage.dpo.trainable"):
        with pytest.raises(ConfigError, match='none of "all", "lora" and "top:K"'):
            load_recipe("tiny", [f"{key}={wrong}"])


def test_a_stage_may_differ_from_its_model() -> None:
    config = load_recipe("tiny", ["model.trainable=top:2", "stage.rm.trainable=top:1"]).config
    assert [config.trainable_of(name) for name in ("sft", "rm")] == ["top:2", "top:1"]
    assert config.shared_blocks() == 2
    assert load_recipe("tiny").config.shared_blocks() is None


def test_the_plan_says_what_is_trained_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "--dry-run", "model.trainable=top:1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo: trains")]
    assert "the upper 1 of 2 blocks" in lines[0]
    assert "of weights for 4 models" in lines[0]


def test_the_plan_counts_tokens_and_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, at the longest that the settings allow (48 + 40), 32 numbers of 4 bytes a token. Three members
    read 128 pairs twice; PPO looks at 3 steps of 16 replies of 16 tokens with policy, reference, critic and
    three judges, and trains two of these in 2 epochs.
    """
    words = ["model.trainable=top:1", "stage.rm.members=3", "stage.rm.epochs=2"]
    assert main(["run", "tiny", "--dry-run", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens through" in line]
    pairs, replies = 128 * 2 * 88, 3 * 16 * (48 + 16)
    assert f"rm: at most {pairs:,} tokens through" in lines[1]
    assert "their states take 0.0029 GB" in lines[1]
    assert lines[1].endswith(f"; {pairs * 2 * 3:,} through those above")
    above = f"{replies * (6 + 2 * 2):,} through those above"
    assert lines[2].startswith(f"ppo: at most {replies:,} tokens through")
    assert lines[2].endswith(f"; {above}")
    said = lines[1:3]
    assert main(["run", "tiny", "--dry-run", *words, "model.kept_gb=0"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rm: at most"))
    assert line.startswith(f"rm: at most {pairs * 2 * 3:,} tokens")
    assert "model.kept_gb: none are kept" in line
    assert main(["run", "hh-rm", "--dry-run", "data.name=PATH"]) == 0  # reads no base
    (unknown,) = (line for line in capsys.readouterr().out.splitlines() if "sizes are not known" in line)
    assert "smollm2" in unknown
    prose.compare("runs/trainable: tokens and disk", *said, line, unknown)


def test_the_plan_counts_collected_pairs_as_many_as_there_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Six pairs of four replies: of 20 prompts; of the 7 that the data has; for 1,000 if unknown."""
    words = ["model.trainable=top:1", "stage.pairs.algorithm=collect", "stage.pairs.judge=a:f"]
    words += ["stage.pairs.replies=4", "stage.pairs.pairing=all", "stage.rm.data=pairs", "stage.rm.rows=none"]
    for more, pairs in (["stage.pairs.rows=20"], 20 * 6), ([], 1000):
        assert main(["run", "tiny", "--dry-run", *words, *more]) == 0
        line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("rm: at most"))
        assert line.startswith(f"rm: at most {pairs * 2 * 88:,} tokens through the frozen blocks")
        assert line.endswith(" (for 1,000 rows)") == (not more)
    rows = SimpleNamespace(rows_for=lambda batch: [SimpleNamespace(source="")] * 7)
    data = cast(Dataset, SimpleNamespace(of=lambda name: rows if name is None else None))
    config = load_recipe("tiny", [*words, "stage.pairs.rows=20"]).config
    line = list(sizes(config, None, ["rm"], data))[-1]
    assert line.startswith(f"rm: at most {7 * 6 * 2 * 88:,} tokens through the frozen blocks")


def test_the_plan_counts_ktos_mismatched_rows_and_both_models_of_an_implicit_reward(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """64 pairs at their longest are 128 rows of 88 tokens, and as many mismatched ones, for two models. PPO
    has a policy, a reference and a critic besides DPO's policy and reference.
    """
    words = ["model.trainable=top:1", "stage.kto.algorithm=kto", "stage.kto.rows=64", "stage.rm=none"]
    assert main(["run", "tiny", "--dry-run", *words, "stage.ppo.reward_model=dpo", "stage.grpo=none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kto = next(line for line in lines if line.startswith("kto: at most"))
    tokens = 64 * 2 * 88 * 2
    assert kto.startswith(f"kto: at most {tokens:,} tokens through the frozen blocks")
    assert f"their states take {tokens * 32 * 4 / 1e9:.2g} GB on disk" in kto
    assert kto.endswith(f"; {tokens * 2:,} through those above")
    assert "of weights for 5 models" in next(line for line in lines if line.startswith("ppo: trains"))


def test_the_plan_counts_a_row_for_the_expert_that_learns_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.trainable=top:1", "stage.rm.experts=harmless, helpful", "stage.rm.rows=none"]
    for more, rows in ([], 1000), (["stage.rm.rows=40"], 2 * 40):
        assert main(["run", "tiny", "--dry-run", *words, *more]) == 0
        line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("rm: at most"))
        tokens = f"{rows * 2 * 88:,}"
        assert line.startswith(f"rm: at most {tokens} tokens through the frozen blocks")
        assert f"; {tokens} through those above" in line


def test_the_plan_counts_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    """r · (in + out) of four matrices in each of two blocks, 32 wide: 8 · 2 · (128 + 64 + 160 + 160)."""
    assert main(["run", "tiny", "--dry-run", "stage.dpo.trainable=lora", "model.lora.rank=8"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": trains" in line]
    assert len(lines) == 1
    assert "rank 8 in 8 linear layers" in lines[0]
    assert "8,192 of " in lines[0]
    prose.compare("runs/trainable: adapters", lines[0])


def test_the_plan_says_that_experts_get_no_adapter() -> None:
    """Stacks of matrices: 4 experts of 3 times 16 x 24 in each of two blocks."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_local_experts=4, **size))
    line = _adapters(model, load_recipe("tiny", ["stage.dpo.trainable=lora"]).config, "dpo")
    weights = f"{2 * 4 * 3 * 16 * 24:,}"
    assert f"; the {weights} weights of its experts" in line
    prose.compare("runs/trainable: experts get no adapter", line)


def test_the_plan_counts_4_bit_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """12 · 640² in each of two blocks: 4 bits, 8 for each 64 of them, 32 for each 256 of those."""
    words = ["model.trainable=lora", "model.lora.quantize=nf4", "model.scratch.width=640"]
    assert main(["run", "tiny", "--dry-run", *words, "model.scratch.heads=4"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sft: trains"))
    frozen = 2 * 12 * 640**2
    size = frozen * (4 + 8 / 64 + 32 / (64 * 256)) / 8e6
    assert f"; {frozen:,} frozen weights in NF4" in line
    assert f"4.13 bits each, {size:.0f} MB" in line
    prose.compare("runs/trainable: 4-bit weights", line)


REFUSED = {
    "stages train all": ["model.lora.quantize=nf4"],
    "with parallel.shard": ["model.trainable=lora", "model.lora.quantize=nf4", "parallel.shard=true"],
    'expected "none"': ["model.trainable=lora", "model.lora.quantize=fp4"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_4_bit_weights_are_refused_where_they_have_no_use(words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe("tiny", REFUSED[words])
