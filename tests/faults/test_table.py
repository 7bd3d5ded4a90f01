"""The figures on the page are those of the measurements."""

import pytest
import table


def test_the_table_on_the_page_is_the_one_of_the_results() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    shown = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert shown.strip() == table.table()


def test_the_interval_of_all_right_is_exact() -> None:
    """100 of 100: the share whose power 100 is 2.5 %."""
    assert table.lower_bound(100, 100) == pytest.approx(0.9638, abs=1e-4)
