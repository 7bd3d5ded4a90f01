"""250 generated files, in which nothing may end in a traceback or hang; `make sweeps` tries 500, `make fuzz`
10,000.
"""

from pathlib import Path

import pytest
from fuzzing import Case, Trial, try_many

from sweeps import ALL

FILES = 500 if ALL else 250


def test_generated_files_are_read_or_refused(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    try_many(FILES, trial)
    assert not trial.faults, trial.faults[0]
    assert max(trial.seconds) < 60  # `make fuzz` measures; here nothing may hang
    assert len(trial.seconds) >= 0.9 * FILES
    assert sum(n for name, n in trial.outcomes.items() if name.endswith(": read")) > 0.3 * FILES
    assert len(trial.outcomes) >= 8


def test_the_trial_sees_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path)
    monkeypatch.setattr("fuzzing.load_recipe", lambda path: [][1])
    trial.hand_in(Case(".toml", b""))
    assert "IndexError" in trial.faults[0]
    assert trial.outcomes == {".toml: traceback": 1}
