"""An algorithm says itself what others ask of it: nobody asks which one it is. Read from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from preftune.algorithms import ALGORITHMS
from preftune.config import ALGORITHM_CONFIGS, OptimizerConfig, StageSettings
from preftune.config.algorithms import register, stage_kinds

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "preftune"
FILES = sorted(SOURCE.rglob("*.py"))
KINDS = stage_kinds()  # those that make data, too
NAMES = set(KINDS)
OF_ONE = {*(cls.__name__ for cls in KINDS.values()), *(cls.__name__ for cls in ALGORITHMS.values())}
CLASSES = {*OF_ONE, "StageSettings", "OfflineConfig", "OnlineConfig"}
SETTINGS = {name for cls in KINDS.values() for name in (*cls.model_fields, *vars(cls))}
SETTINGS |= {*OptimizerConfig.model_fields, *vars(StageSettings)}
SETTINGS = {name for name in SETTINGS if not name.startswith("_")}
# Maths and its golden vectors know papers, not stages.
WITHOUT_STAGES = ("functional/", "selftest/", "data/formats/")


def where(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def own(path: Path) -> set[str]:
    """Names of the algorithm whose own file this is."""
    if path.parent.name != "algorithms" or path.stem not in NAMES:
        return set()
    return {path.stem, KINDS[path.stem].__name__, KINDS[path.stem].implementation.partition(":")[2]}


def names_in(node: ast.AST) -> set[str]:
    """Identifiers and texts below a node."""
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    found |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return found | {text for text in texts if isinstance(text, str)}


def about_algorithms(node: ast.AST) -> bool:
    """Whether what is compared is an algorithm: `.algorithm`, or a name like it."""
    return any("algorithm" in name or "kind" in name for name in names_in(node) - NAMES)


def ladders(path: Path, tree: ast.AST) -> Iterator[str]:
    """Places that ask which algorithm it is: isinstance of one, a comparison with a name, a table of them."""
    foreign, mine = CLASSES - own(path), own(path)
    for node in ast.walk(tree):
        place = f"{where(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if found := names_in(node.args[1]) & foreign:
                yield f"{place}: {ast.unparse(node.func)} of {', '.join(sorted(found))}"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(names_in(side) & (NAMES - mine) for side in sides) and about_algorithms(node):
                yield f"{place}: compares with the name of an algorithm"
        elif isinstance(node, ast.Match) and about_algorithms(node.subject):
            if any(names_in(case.pattern) & (NAMES - mine) for case in node.cases):
                yield f"{place}: matches the name of an algorithm"
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if len(keys & NAMES) > 1 and where(path) != "config/algorithms/__init__.py":
                yield f"{place}: a table by algorithm"


def probes(path: Path, tree: ast.AST) -> Iterator[str]:
    """Places outside of the settings that look whether a stage has a setting: its class has an answer."""
    if where(path).startswith("config/algorithms/"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in SETTINGS:
                yield f"{where(path)}:{node.lineno}: {ast.unparse(node)}"


def uses(path: Path, tree: ast.AST) -> Iterator[str]:
    """Classes of one algorithm, and of its settings, that a file imports which is not its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"preftune\.(algorithms|config)", node.module or ""):
            yield from (
                f"{where(path)}: {name.name}" for name in node.names if name.name in OF_ONE - own(path)
            )


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_nobody_asks_which_algorithm_it_is(trees: dict[Path, ast.AST]) -> None:
    found = [line for path, tree in trees.items() for line in ladders(path, tree)]
    assert not found, "\n".join(found)


def test_nobody_probes_the_settings_of_a_stage(trees: dict[Path, ast.AST]) -> None:
    found = [line for path, tree in trees.items() for line in probes(path, tree)]
    assert not found, "\n".join(found)


def test_the_classes_of_one_algorithm_are_used_in_its_files_but_for_what_architecture_says(
    trees: dict[Path, ast.AST],
) -> None:
    """Pretraining is no stage, and SFT's loss on whole documents. The kind that makes data has no algorithm:
    two files are it, with one cast.
    """
    faces = ("config/__init__.py", "config/algorithms/__init__.py")
    found = {use for path, tree in trees.items() if where(path) not in faces for use in uses(path, tree)}
    exceptions = {"runs/train.py: SFT", "runs/train.py: SFTConfig"}
    collecting = {"runs/collect.py: CollectConfig", "runs/collected.py: CollectConfig"}
    assert found == exceptions | collecting
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert "[`src/preftune/runs/train.py::_pretraining`](src/preftune/runs/train.py)" in page
    calls = [
        (path, node) for path, tree in trees.items() for node in ast.walk(tree) if type(node) is ast.Call
    ]
    casts = [path for path, call in calls if ast.unparse(call.func) == "cast" and names_in(call) & OF_ONE]
    assert [where(path) for path in casts] == ["runs/collected.py"]


@pytest.mark.parametrize(
    "code", ['getattr(stage, "rows", None)', 'getattr(config, "kl_target", "")', 'hasattr(stage, "members")']
)
def test_a_probe_is_found(code: str) -> None:
    assert list(probes(SOURCE / "runs" / "x.py", ast.parse(code)))
    assert not list(probes(SOURCE / "config" / "algorithms" / "x.py", ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ['getattr(config, "eos_token_id", None)', "getattr(settings, key)", 'getattr(error, "strerror", None)'],
)
def test_what_is_no_setting_of_a_stage_may_be_probed(code: str) -> None:
    assert not list(probes(SOURCE / "models" / "x.py", ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(stage, PPOConfig | GRPOConfig)",
        "isinstance(config, config_module.RewardConfig)",
        "isinstance(settings, CollectConfig)",
        "issubclass(kind, PPO)",
        "isinstance(stage, (Other, OnlineConfig))",
        'stage.algorithm == "sft"',
        'stage.algorithm == "collect"',
        '"dpo" != stage["algorithm"]',
        'stage.get("algorithm") == "dpo"',
        'algorithm in ("ppo", "grpo")',
        'x = {"ppo": 1, "grpo": 2}',
        'match stage.algorithm:\n    case "kto": pass',
    ],
)
def test_the_rule_can_fail(code: str) -> None:
    assert list(ladders(SOURCE / "runs" / "x.py", ast.parse(code)))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("algorithms/ppo.py", 'algorithm == "ppo"'),
        ("config/algorithms/__init__.py", 'x = {"ppo": 1, "grpo": 2}'),
        ("runs/x.py", "isinstance(model, RewardModel)"),
        ("runs/x.py", 'measure == "reward"'),
        ("runs/x.py", "stage.algorithm == wanted"),
    ],
)
def test_the_rule_lets_pass_what_is_right(file: str, code: str) -> None:
    assert not list(ladders(SOURCE / file, ast.parse(code)))


def mentioning(word: str) -> list[str]:
    """Source files with a stage in mind that hold the word ("tiktoken" holds another)."""
    files = [path for path in FILES if not where(path).startswith(WITHOUT_STAGES)]
    return [
        where(path)
        for path in files
        if re.search(rf"(?<![a-z]){word}", path.read_text("utf-8"), re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", ["rloo", "kto"])
def test_an_algorithm_is_three_source_files(name: str) -> None:
    files = [f"algorithms/{name}.py", "config/algorithms/__init__.py", f"config/algorithms/{name}.py"]
    assert mentioning(name) == files


def test_to_add_an_algorithm_takes_the_files_that_architecture_lists() -> None:
    """What is true of RLOO and KTO is what the page says: each file, and nothing else in src."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^\* \*\*an algorithm\*\*:.*?(?=^\* )", page, re.MULTILINE | re.DOTALL)
    listed = re.findall(r"`((?:config|algorithms|docs|tests)/[\w./]+)`", entry)
    for name in ("rloo", "kto"):
        files = {path.replace("NAME", name) for path in listed}
        assert files == {
            *mentioning(name),
            f"docs/algorithms/{name}.md",
            "docs/metrics.md",
            f"tests/algorithms/test_{name}.py",
        }
        for path in files:
            assert any((root / path).is_file() for root in (ROOT, SOURCE)), path


# --- one word for one thing ---------------------------------------------------------------------------------

# Where measured numbers are shown: what a judge gives a whole reply is its score, what training gives a token
# its reward.
SHOWN = (
    *("report/", "study/page.py", "study/beside.py", "study/frontier.py", "study/figures.py"),
    *("study/command.py", "runs/cards.py", "measure/compare.py", "measure/write_up.py", "measure/pairs.py"),
    "inspection/paint.py",
)
OTHER_REWARDS = (  # what the word stands for besides
    r"reward[ _-]?(models?|functions?|hacking|terms|evaluation)",
    r"no_reward_model",
    r"reward_(kl|distribution)\w*",  # files of figures
    r"rewards/\w*|objective/rlhf_reward|frac_reward_\w+|reward_std",  # TRL's names of metrics
    r"reward_(chosen|rejected)",  # keys of the mistakes' file
    r"the reward that DPO trains implicitly",
    r"replies without a reward|replies have no reward|use a reward that tells them apart",  # in training
)
METRICS = "report/plots/curves.py"  # where TRL's metric `reward` stands, alone


def wrong_words(path: Path, tree: ast.AST) -> Iterator[str]:
    """Strings that call a score reward or proxy; not docstrings, not patterns."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node.value in docs:
            continue
        text = "" if node.value == "reward" and where(path) == METRICS else node.value
        for other in OTHER_REWARDS:
            text = re.sub(other, "", text, flags=re.IGNORECASE)
        if re.search(r"reward|proxy", text, re.IGNORECASE) and not text.startswith("(?<!"):
            yield f"{where(path)}:{node.lineno}: {node.value}"


def test_a_measured_number_is_called_score() -> None:
    shown = [path for path in FILES if where(path).startswith(SHOWN)]
    assert len(shown) > 40
    found = [line for p in shown for line in wrong_words(p, ast.parse(p.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        '"Reward [95 %]"',
        'f"Reward − {reference}"',
        'attrgetter("reward")',
        '"the gain in reward is not shown"',
        '"proxy gain"',
        '"the reward model pays a reward"',
    ],
)
def test_the_rule_of_words_can_fail(code: str) -> None:
    assert list(wrong_words(SOURCE / "report" / "x.py", ast.parse(f"x = {code}")))


# --- the registry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_class_and_settings_belong_together(name: str) -> None:
    kind, config = ALGORITHMS[name], ALGORITHM_CONFIGS[name]
    assert kind.Config is config
    assert config.name() == name
    assert set(kind.trains) <= set(kind.needs)
    assert config.trains_policy == ("policy" in kind.trains)
    assert hasattr(kind, "improve") == (config.batch == "prompts")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_reads_every_role_that_it_needs(name: str) -> None:
    """`needs` decides what is loaded into memory: a role that nobody reads is a model for nothing."""
    source = (SOURCE / "algorithms" / f"{name}.py").read_text(encoding="utf-8")
    read = {role for role in ("policy", "reference", "critic", "reward_model") if f".{role}" in source}
    if "sampled(" in source:
        read |= {"policy", "reference"}  # `on_policy.sampled` reads both
    assert read == set(ALGORITHMS[name].needs)


def test_a_class_that_says_too_little_is_not_registered() -> None:
    class Silent(StageSettings):
        algorithm: str = "silent"

    with pytest.raises(TypeError, match="Silent lacks label, implementation, batch, card, init"):
        register(Silent)
    assert "silent" not in ALGORITHM_CONFIGS


def test_a_name_is_given_once() -> None:
    taken = ALGORITHM_CONFIGS["dpo"]
    assert register(taken) is taken

    class Other(taken):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(ValueError, match="there is an algorithm 'dpo' already"):
        register(Other)
