"""Two figures of docs/studies/sentiment.md that `preftune study` does not make.

    python benchmarks/sentiment.py accuracy DATA       the confirming classifier on DATA's test reviews
    python benchmarks/sentiment.py blind DATA RUN OUT  40 pairs of replies of a finished seed, shuffled

DATA is a directory with train.jsonl.gz and test.jsonl.gz (text, label). `blind` takes a reply of SFT and one
of PPO to each prompt and writes OUT/pairs.txt to read and OUT/key.json, which says which side is PPO's: write
your choices down before you open it.
"""

import argparse
import json
import random
from pathlib import Path

from preftune import api
from preftune.judges.reviews import fit, labelled

PAIRS, WORDS = 40, 8  # prompts, and words of a review in one


def accuracy(data: Path) -> None:
    model = fit(*zip(*labelled(data / "train.jsonl.gz"), strict=True))
    texts, labels = zip(*labelled(data / "test.jsonl.gz"), strict=True)
    for what, part in (
        ("whole reviews", slice(None)),
        ("first 48 words", slice(48)),
        ("first 32 words", slice(32)),
        ("words 9 to 36", slice(WORDS, 36)),
    ):
        cut = texts if part == slice(None) else [" ".join(text.split()[part]) for text in texts]
        print(f"{what}: {model.score(cut, labels):.3f} of {len(labels):,}")


def blind(data: Path, run: Path, out: Path, seed: int = 0) -> None:
    draw = random.Random(seed)
    texts = [text for text, _ in labelled(data / "test.jsonl.gz")]
    prompts = [" ".join(text.split()[:WORDS]) for text in draw.sample(texts, PAIRS)]
    replies = [[row["response"] for row in api.sample(run, name, prompts, seed)] for name in ("sft", "ppo")]
    lines, key = [], []
    for number, (prompt, sft, ppo) in enumerate(zip(prompts, *replies, strict=True), 1):
        key.append(draw.choice("AB"))
        first, second = (ppo, sft) if key[-1] == "A" else (sft, ppo)
        lines += [f"{number}. [{prompt}]", f"  A: {first.strip()!r}", f"  B: {second.strip()!r}"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "key.json").write_text(json.dumps(key), encoding="utf-8")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=["accuracy", "blind"])
    parser.add_argument("paths", type=Path, nargs="+")
    asked = parser.parse_args()
    (accuracy if asked.what == "accuracy" else blind)(*asked.paths)


if __name__ == "__main__":
    main()
