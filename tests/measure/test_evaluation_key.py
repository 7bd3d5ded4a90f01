"""What an evaluation depends on beside texts and models: the columns that its functions read."""

from types import SimpleNamespace
from typing import Any

from preftune.config import load_recipe
from preftune.data import Dialogue, Preference, Turn
from preftune.measure import evaluate


def by_level(prompt: str, response: str, level: int) -> float:
    return float(level)


def by_answer(prompt: str, response: str, answer: str) -> float:
    return float(answer in response)


def by_length(prompt: str, response: str) -> float:
    return float(len(response))


def key(*functions: str, gold: str = "", **columns: Any) -> dict[str, Any]:
    """The part of the key that is about functions, with one test row of these columns."""
    settings = {"reward_functions": " + ".join(f"test_evaluation_key:{name}" for name in functions)}
    settings |= {"gold": f"test_evaluation_key:{gold}"} if gold else {}
    config = load_recipe("tiny", [f"evaluation.{name}={value}" for name, value in settings.items()]).config
    prompt = Dialogue([Turn("human", " Q")])
    row = Preference(prompt=prompt, chosen=" a", rejected=" b", columns=columns)
    session: Any = SimpleNamespace(config=config, dataset=SimpleNamespace(test=(row,)))
    return evaluate.functions_of(session)


def test_a_column_that_a_function_reads_is_part_of_the_key() -> None:
    one = key("by_level", level=1, answer="x")
    assert "columns" in one
    assert one != key("by_level", level=2, answer="x")
    assert one == key("by_level", level=1, answer="y")  # nobody reads that


def test_where_no_function_reads_a_column_none_is_in_the_key() -> None:
    assert "columns" not in key("by_length", level=1)
    assert "columns" not in key("by_level")  # not there: the function is given nothing


def test_columns_of_functions_and_of_gold_are_covered_side_by_side() -> None:
    one = key("by_level", gold="by_answer", level=1, answer="x")
    assert one != key("by_level", gold="by_answer", level=2, answer="x")
    assert one != key("by_level", gold="by_answer", level=1, answer="y")
