"""400 damaged checkpoints: a file cut short, one bit flipped, a file missing. Is the older one used?"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from faultlab import Lab, seeded, write_result

from preftune.config import OptimizerConfig
from preftune.models.load import load_causal_lm, quiet_libraries
from preftune.models.locate import Source
from preftune.models.roles import Policy
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.state import capture

COUNT = 400
KINDS = ("truncated", "one bit flipped", "file missing")


def damage(directory: Path, kind: str, rng: random.Random) -> str:
    """Spoil a random file of a checkpoint; its name."""
    file = rng.choice(sorted(directory.iterdir()))
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "one bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    else:
        file.unlink()
    return file.name


def main(count: int = COUNT) -> None:
    rng, detected, files = seeded("corruption"), Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="preftune-corruption-") as place:
        lab = Lab(Path(place))
        lab.prepare(())
        quiet_libraries()
        learner = Learner()
        policy = Policy(load_causal_lm(Source(str(lab.parents.model_dir("sft")))))
        learner.train("policy", policy, OptimizerConfig(), 1e-3)
        good, work = Path(place) / "good", Path(place) / "work"
        for step in (2, 4):
            learner.bad_steps = step % 3  # so that it shows which one was read
            checkpoint.save(good, step, capture(learner), keep=2)
        for i in range(count):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(good, work)
            kind = KINDS[i % 3]
            files[damage(work / "step-000004", kind, rng)] += 1
            used = checkpoint.restore(work, learner, say=lambda text: None)
            aside = (work / "corrupt" / "step-000004").is_dir()
            detected[kind] += used == 2 and learner.bad_steps == 2 and aside
    kinds = Counter(KINDS[i % 3] for i in range(count))
    write_result(
        "corruption",
        {
            "damaged": count,
            "detected_and_older_used": sum(detected.values()),
            "by_kind": {kind: {"damaged": kinds[kind], "detected": detected[kind]} for kind in KINDS},
            "by_file": dict(files),
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
