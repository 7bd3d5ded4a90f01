"""How settings name reward functions: those that score, with weights, and those that are only watched."""

import random
from pathlib import Path

import pytest

from preftune.config import GRPOConfig, PPOConfig, build
from preftune.config.rewards import find_function, reward_terms, source_hashes
from preftune.errors import ConfigError, InputMissing


def letters(prompt: str, response: str) -> int:
    return len(response)


def test_terms_are_read_with_their_weights() -> None:
    assert reward_terms("a:f") == {"a:f": 1.0}
    assert reward_terms("0.5 * a.b:f + -2e-1*c:g + d:h.i") == {"a.b:f": 0.5, "c:g": -0.2, "d:h.i": 1.0}


@pytest.mark.parametrize(
    "text", ["", "a", "a:f b:g", "0 * a:f", "x * a:f", "a:f + a:f", "1e999 * a:f", "os:1"]
)
def test_what_is_no_weighted_sum_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"weighted function|occurs twice"):
        reward_terms(text)


def test_settings_refuse_a_stage_without_any_score() -> None:
    for kind in (PPOConfig, GRPOConfig):
        with pytest.raises(ConfigError, match="nothing scores the responses"):
            build(kind, {"reward_model": None})
        build(kind, {"reward_model": None, "reward_functions": "a:f"})
        with pytest.raises(ConfigError, match="is no weighted function"):
            build(kind, {"reward_functions": "print"})
        with pytest.raises(ConfigError, match="nothing scores the responses"):
            build(kind, {"reward_model": None, "watched_functions": "a:f"})
        for text in ("2 * a:f", "a:f + b:g", "./judge", "print"):
            with pytest.raises(ConfigError, match="is no function"):
                build(kind, {"watched_functions": text})
        with pytest.raises(ConfigError, match="occurs twice"):
            build(kind, {"watched_functions": "a:f, a:f"})
        with pytest.raises(ConfigError, match="a:f is one of reward_functions"):
            build(kind, {"reward_functions": "2 * a:f", "watched_functions": "b:g, a:f"})
        assert build(kind, {"watched_functions": ["a:f", "b:g"]}).all_functions == "a:f + b:g"


def test_functions_that_are_not_there_are_named() -> None:
    with pytest.raises(InputMissing, match=r"no_such_module:f: no module 'no_such_module'"):
        find_function("no_such_module:f")
    with pytest.raises(ConfigError, match=r"math has no function 'sinus'"):
        find_function("math:sinus")
    with pytest.raises(ConfigError, match="has no function 'pi'"):
        find_function("math:pi")


def test_the_package_around_a_module_changes_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drawing_package").mkdir()
    (tmp_path / "drawing_package/__init__.py").write_text("import random\nrandom.seed(0)\n")
    (tmp_path / "drawing_package/inside.py").write_text("def f(prompt, response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = random.getstate()
    assert find_function("drawing_package.inside:f")("", "") == 1.0
    assert random.getstate() == before


def test_another_source_is_another_stage() -> None:
    found = source_hashes("test_reward_terms:letters + preftune.world.gold:gold + builtins:len")
    assert len(set(found.values())) == 3
    assert found["builtins:len"] == "built in"
