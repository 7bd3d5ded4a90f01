"""Recipes, overrides, origins, and the errors that a wrong key or value gives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.config import (
    DPOConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    build,
    config_hash,
    dump_toml,
    load,
    load_recipe,
    recipe_names,
)
from preftune.config.base import Settings
from preftune.config.graph import parents
from preftune.config.unused import refuse_unused
from preftune.errors import ConfigError, PreftuneError, UsageError

NEEDS_DATA = {"hh-rm", "hh-scratch", "hh-smollm2", "own-small", "sentiment"}
ONE_STAGE = {"hh-rm"}  # trains a reward model, and no policy
WITHOUT_RL = {"own-small"}  # a reward model of few pairs has nothing to teach
MORE_STAGES = {
    "hh-scratch": {"rm2": "reward"},
    "hh-smollm2": {"rm2": "reward"},
    "sentiment": {"pairs": "collect", "best": "sft", "ceiling": "ppo"},
}


def failure(recipe: str, *overrides: str) -> PreftuneError:
    with pytest.raises((ConfigError, UsageError)) as caught:
        load_recipe(recipe, overrides)
    return caught.value


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads_and_has_its_stages(name: str) -> None:
    overrides = ["data.name=somewhere"] if name in NEEDS_DATA else []
    config = load_recipe(name, overrides).config
    assert config.name == name
    found = {stage: settings.algorithm for stage, settings in config.stage.items()}
    five = {"sft": "sft", "rm": "reward", "ppo": "ppo", "grpo": "grpo", "dpo": "dpo"}
    if name in WITHOUT_RL:
        del five["ppo"], five["grpo"]
    assert found == ({"rm": "reward"} if name in ONE_STAGE else five | MORE_STAGES.get(name, {}))


@pytest.mark.parametrize("name", recipe_names())
def test_every_line_of_a_shipped_recipe_says_what_it_sets(name: str) -> None:
    text = (Path(__file__).parents[2] / "src/preftune/recipes" / f"{name}.toml").read_text()
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            comment = line.partition(" # ")[2]
            assert comment.endswith((".", ".)")), line
            assert comment[0].isupper() or comment[0].isdigit(), line


def test_nine_recipes_are_shipped() -> None:
    hh = {"hh-rm", "hh-gpt2", "hh-colab", "hh-scratch", "hh-smollm2"}
    assert set(recipe_names()) == {"quickstart", "tiny", "sentiment", "own-small"} | hh


def test_colab_keeps_the_subset_sizes_of_the_replaced_pipeline() -> None:
    config = load_recipe("hh-colab").config
    rows = {name: getattr(config.stage[name], "rows", None) for name in ("rm", "sft", "dpo")}
    assert rows == {"rm": 1000, "sft": 500, "dpo": 500}
    assert [config.stage[name].steps for name in ("ppo", "grpo")] == [10, 10]
    assert (config.evaluation.prompts, config.precision) == (100, "fp16")
    assert (config.model.base, config.data.name, config.data.data_dir) == (
        "gpt2",
        "Anthropic/hh-rlhf",
        "harmless-base",
    )


@pytest.mark.parametrize("name", sorted(NEEDS_DATA))
def test_recipe_without_data_asks_for_a_path(name: str) -> None:
    assert "data.name=PATH is required" in str(failure(name))


@pytest.mark.parametrize("name", ["hh-scratch", "hh-smollm2"])
def test_a_second_reward_model_shares_no_prompt_and_scores_no_training(name: str) -> None:
    stages = load_recipe(name, ["data.name=x"]).config.stage
    judges = {name: stage for name, stage in stages.items() if isinstance(stage, RewardConfig)}
    assert {name: stage.part for name, stage in judges.items()} == {"rm": "first", "rm2": "second"}
    assert judges["rm"].model_copy(update={"part": "second"}) == judges["rm2"]
    assert not any("rm2" in parents(stage) for stage in stages.values())


def test_no_stage_of_hh_smollm2_learns_from_a_pair_of_its_second_reward_model() -> None:
    stages = load_recipe("hh-smollm2", ["data.name=x"]).config.stage
    parts = {name: stage.training_part() for name, stage in stages.items() if not stage.online}
    assert parts == {"sft": "first", "rm": "first", "dpo": "first", "rm2": "second"}


@pytest.mark.parametrize("name", sorted({*recipe_names()} - ONE_STAGE - WITHOUT_RL))
def test_dumped_config_reads_back_equal(name: str, tmp_path: Path) -> None:
    overrides = ['data.name=some\\odd "path"\x7f\u2028é', "stage.ppo.value_clip=none", "stage.sft.rows=none"]
    if name in ("quickstart", "tiny"):
        overrides = overrides[1:]
    config = load_recipe(name, overrides).config
    again = load_recipe(write(tmp_path / "config.toml", dump_toml(config))).config
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert list(again.stage) == list(config.stage)


def test_origins_name_where_each_value_comes_from() -> None:
    origins = load_recipe("tiny", ["stage.ppo.steps=9", "checkpoint.keep=3"]).origins
    assert origins["stage.ppo.steps"] == "command line"
    assert origins["checkpoint.keep"] == "command line"
    assert origins["stage.ppo.batch_size"] == "recipe"
    assert origins["stage.ppo.gamma"] == "default"
    assert origins["stage.ppo.optimizer.eps"] == "default"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stage.ppo.learning_rate=1e-6", 1e-6),
        ("stage.ppo.kl_coef=1", 1.0),
        ("stage.ppo.steps=7", 7),
        ("stage.ppo.value_clip=none", None),
        ("stage.ppo.value_clip=None", None),
        ("stage.dpo.length_average=true", True),
        ("stage.dpo.length_average=False", False),
        ("stage.grpo.scale=none", "none"),
        ("data.name=123", "123"),
        ("data.name=a=b", "a=b"),
        ("stage.ppo.optimizer.beta2=0.95", 0.95),
        ("data.template_arguments.depth=3", 3),
        ("data.template_arguments.depth=3.5", 3.5),
        ("data.template_arguments.depth=true", True),
        ("data.template_arguments.depth=inf", "inf"),
    ],
)
def test_override_has_the_type_of_its_key(override: str, value: object) -> None:
    found: object = load_recipe("tiny", ["data.form=chat", override]).config
    for part in override.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_last_of_equal_overrides_wins() -> None:
    assert load_recipe("tiny", ["seed=1", "seed=2"]).config.seed == 2


def test_ppo_keeps_its_own_eps_when_another_optimizer_key_is_set() -> None:
    assert load_recipe("tiny", ["stage.ppo.optimizer.warmup=0.1"]).config.stage["ppo"].optimizer.eps == 1e-5
    assert PPOConfig().optimizer.eps == 1e-5


def test_a_name_of_any_form_may_be_one_that_was_meant() -> None:
    error = failure("tiny", "stage.my__sft_.algorithm=sft", "stage.my_sft.rows=1")
    assert "did you mean stage.my__sft_?" in error.hint


def test_a_stage_can_be_added_and_left_out() -> None:
    config = load_recipe("tiny", ["stage.low.beta=0.01", "stage.low.algorithm=dpo", "stage.grpo=none"]).config
    assert list(config.stage) == ["sft", "rm", "ppo", "dpo", "low"]
    assert config.stage["low"] == DPOConfig(beta=0.01)


def test_another_base_drops_the_size_of_a_scratch_model() -> None:
    assert load_recipe("tiny", ["model.base=gpt2"]).config.model.scratch is None
    assert load_recipe("hh-gpt2", ["model.base=scratch", "model.scratch.positions=700"]).config.model.scratch


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("stage.ppo.learning_rte", "stage.ppo.learning_rate"),
        ("stage.ppo.lr", "stage.ppo.learning_rate"),
        ("stage.dpo.betta", "stage.dpo.beta"),
        ("stage.pop.steps", "stage.ppo"),
        ("stages.ppo.steps", "stage.ppo.steps"),
        ("sed", "seed"),
        ("data.nam", "data.name"),
        ("stage.ppo.group_size", "stage.grpo.group_size"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    error = failure("tiny", f"{key}=1")
    assert error.code == 78
    assert meant in error.hint
    assert key.rpartition(".")[0] in str(error)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "stage.ppo.learning_rate=fast",
            'stage.ppo.learning_rate = "fast" (on the command line): expected a number > 0',
        ),
        (
            "stage.ppo.steps=1.5",
            'stage.ppo.steps = "1.5" (on the command line): expected a whole number >= 1',
        ),
        ("stage.ppo.steps=0", "stage.ppo.steps = 0 (on the command line): expected a whole number >= 1"),
        ("stage.ppo.kl_coef=nan", "expected a number >= 0"),
        ("stage.ppo.gamma=1.1", "expected a number >= 0 and <= 1"),
        ("stage.ppo.value_clip=x", "expected a number > 0 or none"),
        ("stage.sft.rows=many", "expected a whole number >= 1 or none"),
        ("stage.dpo.kind=simple", 'expected "sigmoid" | "robust"'),
        ("stage.dpo.length_average=1", "expected true or false"),
        ("stage.dpo.algorithm=spo", 'expected "sft" | "reward" | "ppo" | "grpo" | "dpo"'),
        ("stage.dpo.algorithm=spo", "(on the command line)"),
        ("seed=none", "expected a whole number >= 0"),
        ("precision=fp8", 'expected "auto" | "float32" | "bf16" | "fp16"'),
        ("model=gpt2", "model is a group of settings"),
        ("stage=none", "stage is a group of settings"),
        ("name=../away", "is no name"),
        ("stage.a/b.algorithm=dpo", "is no name"),
    ],
)
def test_wrong_value_names_key_value_and_expectation(override: str, expected: str) -> None:
    error = failure("tiny", override)
    assert error.code == 78
    assert expected in str(error)
    assert "dpo.dpo" not in str(error)  # the union's tag is no part of a key


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stage.ppo.init=rm"], 'stage.ppo.init = "rm": expected a stage that trains a policy'),
        (["stage.ppo.init=nobody"], "stage.ppo.init"),
        (["stage.grpo.reward_model=sft"], "stage.grpo.reward_model"),
        (["stage.rm=none"], "stage.ppo.reward_model"),
        (["stage.ppo.reward_model=dpo", "stage.dpo.kind=reference_free"], "a stage whose model scores"),
        (["stage.sft=none"], "stage.rm.init"),
        (["stage.ppo.init=ppo"], "ppo -> ppo"),
        (["stage.ppo.init=dpo", "stage.dpo.init=ppo"], "ppo -> dpo -> ppo"),
        (["stage.rm.init=ppo"], "rm -> ppo -> rm"),
        (["stage.ppo.minibatches=3"], "batch_size = 16 is not a multiple of minibatches = 3"),
        (["stage.grpo.group_size=5"], "batch_size = 16 is not a multiple of group_size = 5"),
        (["model.scratch.heads=3"], "width = 32 is not a multiple of heads = 3"),
        (["evaluation.max_new_tokens=100"], "model.scratch.positions = 88 is too small"),
        (["stage.dpo.kind=hinge", "stage.dpo.label_smoothing=0.1"], "label_smoothing"),
        (["model.base=gpt2", "model.scratch.layers=3"], 'only'),
        (["data.data_dir=harmless-base"], "data_dir"),
        (["stage.base.algorithm=sft"], "base"),
        (["stage.zz=none"], "unknown key stage.zz"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], expected: str) -> None:
    error = failure("tiny", *overrides)
    assert error.code == 78
    assert expected in str(error)


@pytest.mark.parametrize("text", ["seed", "=3", ""])
def test_override_without_key_and_value_is_wrong_usage(text: str) -> None:
    assert failure("tiny", text).code == 64


def test_unknown_recipe_lists_the_recipes() -> None:
    error = failure("quikstart")
    assert error.code == 64
    assert "did you mean quickstart?" in error.hint
    assert all(name in error.hint for name in recipe_names())
    assert all(name in failure("missing.toml").hint for name in recipe_names())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = ", "not valid TOML"),
        ('name = "x"\n[stage.a]\n', "stage.a has no algorithm"),
        ('name = "x"\n', "stage is required"),
        ('[stage.a]\nalgorithm = "sft"\n[data]\nname = "d"', "r.toml)"),
        ('name = "x"\nseed = "3"\n[stage.a]\nalgorithm = "sft"', 'seed = "3" (in '),
        ('name = "x"\nseed = true\n[stage.a]\nalgorithm = "sft"', "expected a whole number"),
        ('name = "x"\nstage = 3\n', "stage is a group of settings"),
        ('name = "x"\nstage = 3\n', "`preftune options`"),
        ('name = "x"\n[stage.a]\nalgorithm = ["sft"]', "stage.a.algorithm"),
        ('name = "x"\n[stage.a]\nalgorithm = "sft"\nepochs = {}', "stage.a.epochs"),
        ('name = "x"\nepochs = 3\n[stage.a]\nalgorithm = "sft"', "unknown key epochs"),
        (
            'name = "x"\n[model]\nbase = "gpt2"\n[model.scratch]\nlayers = 2\n[stage.a]\nalgorithm = "sft"',
            "scratch",
        ),
    ],
)
def test_wrong_recipe_file_is_a_config_error(text: str, expected: str, tmp_path: Path) -> None:
    error = failure(write(tmp_path / "r.toml", text))
    assert error.code == 78
    assert expected in str(error)


def test_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"name = \xff")
    assert failure(str(tmp_path / "r.toml")).code == 78


def test_many_mistakes_stay_readable() -> None:
    keys = [
        "steps",
        "batch_size",
        "minibatches",
        "epochs",
        "microbatch_size",
        "learning_rate",
        "clip",
        "kl_coef",
    ]
    lines = str(failure("tiny", *[f"stage.ppo.{key}=x" for key in keys])).split("\n")
    assert len(lines) == 6
    assert lines[-1] == "and 3 more"


def test_build_speaks_of_keys_and_values() -> None:
    assert build(DPOConfig, {"beta": 0.3}).beta == 0.3
    with pytest.raises(ConfigError, match=r"beta = -1: expected a number > 0"):
        build(DPOConfig, {"beta": -1})
    with pytest.raises(ConfigError, match=r"unknown key betta, did you mean beta\?"):
        build(DPOConfig, {"betta": 1.0})
    with pytest.raises(ConfigError, match=r"stage.x.optimizer.beta2 = 2.0: expected a number >= 0 and < 1"):
        build(DPOConfig, {"optimizer": {"beta2": 2.0}}, where="stage.x")


def test_a_whole_number_in_a_recipe_serves_as_a_number(tmp_path: Path) -> None:
    text = 'name = "x"\n[data]\nname = "d"\n[stage.d]\nalgorithm = "dpo"\ninit = "base"\nbeta = '
    one, same = (load_recipe(write(tmp_path / "r.toml", text + beta)).config for beta in ("1", "1.0"))
    assert type(one.stage["d"].beta) is float
    assert config_hash(one) == config_hash(same)


def test_configs_are_frozen_and_hash_by_value() -> None:
    config: RunConfig = load_recipe("tiny").config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # pyright: ignore
    assert config_hash(config) == config_hash(load_recipe("tiny").config)
    assert config_hash(config) != config_hash(load_recipe("tiny", ["stage.dpo.beta=0.11"]).config)


def test_tables_from_before_norms_were_spared_keep_their_meaning_and_their_text() -> None:
    """A run's config.toml has every setting; keys of stages are made of that text."""
    old = {**OptimizerConfig().model_dump(), "weight_decay": 0.01}
    assert OptimizerConfig(**old).decay_all
    assert OptimizerConfig(**old).model_dump() == old
    assert "decay_all" not in OptimizerConfig().model_dump()
    new = OptimizerConfig(weight_decay=0.01)
    assert new.model_dump() == {**old, "decay_all": False}
    assert OptimizerConfig(**new.model_dump()) == new


UNUSED = [
    ("hh-gpt2", ["data.pairs=100"], "size of the built-in world"),
    ("tiny", ["data.held_out=0.2"], "makes its validation and test rows itself"),
    ("tiny", ["data.config=one"], "neither configurations nor texts"),
    ("tiny", ["data.form=plain", "data.prompt_words=8"], "neither configurations nor texts"),
    ("tiny", ["model.lora.rank=8"], 'model.trainable="lora"'),
    ("tiny", ["sampler.timeout=10"], "sampler.url"),
    ("tiny", ["sampler.max_kl=0.1"], "sampler.url"),
    ("tiny", ["stage.ppo.kl_horizon=500"], "stage.ppo.kl_target"),
    ("tiny", ["stage.rm.members=2", "stage.rm.sd_coef=1.0"], 'stage.rm.combine="mean-sd"'),
    (
        "tiny",
        ["stage.dpo.optimizer.schedule=constant", "stage.dpo.optimizer.final=0.1"],
        "stage.dpo.optimizer.schedule",
    ),
    (
        "tiny",
        ["model.scratch.optimizer.schedule=constant", "model.scratch.optimizer.final=0.1"],
        "model.scratch.optimizer.schedule",
    ),
]
USED = [
    ("hh-gpt2", ["stage.dpo.data=world", "data.pairs=100"]),
    ("tiny", ["stage.kto.algorithm=kto", "stage.kto.data=./mine.jsonl", "data.config=one"]),
    ("tiny", ["data.on_bad_row=skip"]),  # `evaluate --pairs` reads by it
    ("tiny", ["stage.dpo.trainable=lora", "model.lora.rank=8"]),
    ("tiny", ["sampler.url=http://127.0.0.1:8000", "sampler.weights_dir=w", "sampler.timeout=10"]),
    ("tiny", ["stage.ppo.kl_target=6", "stage.ppo.kl_horizon=500"]),
    ("tiny", ["stage.rm.members=2", "stage.rm.combine=mean-sd", "stage.rm.sd_coef=1.0"]),
    ("tiny", ["stage.dpo.optimizer.final=0.1"]),
    ("hh-gpt2", ["data.pairs=6000", "sampler.timeout=240", "data.config=none"]),  # as they are
]


@pytest.mark.parametrize(("recipe", "words", "hint"), UNUSED, ids=lambda value: str(value)[:50])
def test_a_setting_that_nothing_reads_is_refused_where_it_is_typed(
    recipe: str, words: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may state it: a run's config.toml states all, and runs were begun with them."""
    words = [*words, *["data.name=mine.jsonl"] * (recipe == "hh-gpt2")]
    with pytest.raises(ConfigError, match="has no use in this run") as caught:
        load_recipe(recipe, words)
    assert hint in caught.value.hint
    with monkeypatch.context() as before:
        before.setattr(load, "refuse_unused", lambda *_: None)
        config = load_recipe(recipe, words).config
    assert (
        load_recipe(write(tmp_path / "config.toml", dump_toml(config)), ["seed=0"]).config.stage
        == config.stage
    )


@pytest.mark.parametrize(("recipe", "words"), USED, ids=lambda value: str(value)[:50])
def test_a_setting_that_something_reads_is_taken(recipe: str, words: list[str]) -> None:
    load_recipe(recipe, [*words, *["data.name=mine.jsonl"] * (recipe == "hh-gpt2")])


@pytest.mark.parametrize("key", ["kl_horizon", "sd_coef", "optimizer.final"])
def test_a_registered_algorithm_may_have_one_setting_without_the_other(key: str) -> None:
    class Optimizer(Settings):
        final: float = 0.5

    class Mine(Settings):
        kl_horizon: int = 5
        sd_coef: float = 2.0
        optimizer: Optimizer = Optimizer()

    config: Any = SimpleNamespace(stage={"mine": Mine()})
    refuse_unused(config, [f"stage.mine.{key}"])


def test_a_byte_order_mark_before_a_recipe_is_none_of_its_words(tmp_path: Path) -> None:
    shipped = Path(load.__file__).parent.parent / "recipes" / "tiny.toml"
    marked = tmp_path / "r.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + shipped.read_bytes())
    assert load_recipe(str(marked)).config == load_recipe("tiny").config


def test_a_run_in_the_place_of_a_recipe_is_told_of_its_settings(tmp_path: Path) -> None:
    write(tmp_path / "config.toml", "")
    error = failure(str(tmp_path))
    assert error.code == 64
    assert error.hint.endswith(str(tmp_path / "config.toml"))
