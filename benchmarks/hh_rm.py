"""The reward-model lab on HH: what words, length and reward models make of the same judgements.

    python benchmarks/hh_rm.py run --data PATH [--rows length bag ...] [--fractions 1/16 1 ...] [--seeds 3]
    python benchmarks/hh_rm.py table        docs/studies/hh-rm/STUDY.md from the cells that are there

PATH holds HH-RLHF, a directory per source with train and validation files. A cell is a row of the table at
one share of the training pairs and one seed, which draws that share: what it makes of every validation pair.
It is written to benchmarks/results/hh_rm as soon as it is there, and not made again: a killed command goes on
where it stood. Settings are chosen on a tenth of train, cut by prompt. Cells hold numbers, no text.
"""

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hh_rm_probe import probe, probe_by_prompt, tokens_of, told_apart
from hh_rm_rules import (
    Rule,
    bag,
    length,
    log_lengths,
    slope_on_length,
    terms,
    terms_by_kind,
    terms_by_prompt,
)

from preftune import api
from preftune.config import load_recipe
from preftune.data import Preference
from preftune.data.dataset import load_dataset
from preftune.data.loader import order

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "hh_rm"
FRACTIONS = ("1/16", "1/8", "1/4", "1/2", "1")
WHOLE = "data.held_out=1e-9"  # as recipe hh-rm: all but one prompt of train teach
SLOPE_PAIRS = 512  # training pairs that the slope of a reward model on length is fitted to


@dataclass(frozen=True, slots=True)
class Model:
    """A row that preftune trains: recipe, stage that scores, overrides, and pairs where not by fraction.
    `whole`: it takes all pairs, which its own settings share out; `pairs` are then what they leave.
    """

    recipe: str
    stage: str
    overrides: tuple[str, ...] = ()
    pairs: int | None = None
    whole: bool = False

    def settings(self, data: str, seed: int, count: int) -> list[str]:
        """Overrides of the recipe for a run on so many pairs of `data`."""
        own = [f"data.name={data}", WHOLE, f"seed={seed}", *self.overrides]
        return own if self.whole else [*own, f"stage.{self.stage}.rows={count}"]


TOP12, TWICE = "model.trainable=top:12", "stage.rm.epochs=2"
DPO = (
    "stage.rm=none",
    "stage.dpo.algorithm=dpo",
    "stage.dpo.init=base",
    "stage.dpo.batch_size=32",
    "stage.dpo.microbatch_size=16",
    "stage.dpo.beta=0.1",
    "stage.dpo.learning_rate=2e-4",
)


MEAN = ("stage.rm.pooling=mean", "stage.rm.fit_head=true", "stage.rm.learning_rate=2e-5")
ONE_MODEL = ("stage.rm.experts=none", "stage.rm.batch_size=32")


def smollm2(*overrides: str, stage: str = "rm", pairs: int | None = None) -> Model:
    own = ONE_MODEL if stage == "rm" else ()
    return Model("hh-rm", stage, (*own, *overrides), pairs)


MODELS = {
    "hh-scratch": Model("hh-scratch", "rm", (), 4000),
    "smollm2-top6": smollm2(),
    "smollm2-top6-experts": Model("hh-rm", "rm", (), whole=True),
    "smollm2-top6-experts-mean": Model("hh-rm", "rm", MEAN, whole=True),
    # all 1,456 harmless pairs, and as many helpful ones as a quarter of all
    "smollm2-top6-experts-mean-few": Model("hh-rm", "rm", (*MEAN, "stage.rm.rows=3314"), 4770, whole=True),
    "smollm2-top6-two-epochs": smollm2(TWICE),
    "smollm2-top12": smollm2(TOP12),
    "smollm2-top12-two-epochs": smollm2(TOP12, TWICE),
    "smollm2-top6-of-five": smollm2("stage.rm.members=5"),
    "smollm2-lora": smollm2("model.trainable=lora", pairs=3000),
    "smollm2-dpo": smollm2(*DPO, stage="dpo", pairs=3000),
}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Both splits as the recipe reads them, and what was left out of train."""

    data: str
    train: Sequence[Preference]
    validation: Sequence[Preference]
    left_out: Mapping[str, int]

    def drawn(self, count: int, seed: int) -> list[Preference]:
        """The training pairs that a run of this seed with so many rows learns from: `Session.shuffled`."""
        return [self.train[i] for i in order(len(self.train), seed, "rows", 0)][:count]


def read(data: str) -> Pairs:
    found = load_dataset(load_recipe("hh-rm", [f"data.name={data}", WHOLE]).config.data)
    files = [file for file in found.report["files"] if file["split"] == "train"]
    left_out = sum((Counter(file["rejected"]) for file in files), Counter[str]())
    held = len(found.test)
    return Pairs(data, found.train, found.validation, {**left_out, "held_out_by_the_reader": held})


RULES: dict[str, Rule] = {
    "length": length,
    "bag": bag,
    "terms": terms,
    "terms-by-kind": terms_by_kind,
    "terms-by-prompt": terms_by_prompt,
}
FITTED = {**RULES, "probe": probe, "probe-by-prompt": probe_by_prompt}


def trained(
    row: Model, pairs: Pairs, count: int, seed: int, work: Path, validation: Sequence[Preference]
) -> dict[str, Any]:
    """Margins of a model that `preftune train` makes; states below the trained blocks stay in the cache."""
    from preftune.measure.reward_models import examiner
    from preftune.runs.reopen import reopen
    from preftune.runs.roles import keep_rows

    overrides = row.settings(pairs.data, seed, count)
    api.run_recipe(row.recipe, overrides, out=str(work), until=row.stage)
    session = reopen(work, write=False)
    by = examiner(session, row.stage)
    learnt = by.encoder.usable(pairs.drawn(count, seed)[:SLOPE_PAIRS])[0]
    readable = told_apart(by.encoder, validation)
    keep_rows(session, [by.model], tokens_of(readable))
    told = [pair for pair, _ in readable]
    found = {}
    for what, part in (("train", learnt), ("validation", told)):
        found[what] = np.array([each["chosen"] - each["rejected"] for each in by.pair_scores(what, part)])
    margins = dict(zip(map(id, told), found["validation"], strict=True))
    return {
        "margins": np.array([margins.get(id(pair), 0.0) for pair in validation]),  # the others are ties
        "slope": slope_on_length(found["train"], log_lengths(learnt)),
        "settings": {"overrides": [o for o in overrides if not o.startswith("data.name")]},
    }


def fitted(row: str, pairs: Pairs, count: int, seed: int, validation: Sequence[Preference]) -> dict[str, Any]:
    rows = pairs.drawn(count, seed)
    score, settings = FITTED[row](rows, seed)
    slope = slope_on_length(score(rows), log_lengths(rows))
    return {"margins": score(validation), "slope": slope, "settings": settings}


def cell_of(row: str, pairs: Pairs, fraction: str, seed: int, many: int, work: Path) -> dict[str, Any]:
    model = MODELS.get(row)
    count = math.floor(Fraction(fraction) * len(pairs.train))
    if model is not None and model.pairs is not None:
        count = model.pairs
    which = order(len(pairs.validation), 0, "validation", 0)[:many]  # the same for all rows
    validation = [pairs.validation[i] for i in which]
    if model is None:
        made = fitted(row, pairs, count, seed, validation)
    else:
        name = f"{row}-{count}-{seed}"
        made = trained(model, pairs, count, seed, work / name, validation)
    margins = [float(f"{margin:.5g}") for margin in made.pop("margins")]
    return {
        "row": row,
        "pairs": count,
        "seed": seed,
        "of": len(pairs.train),
        **made,
        "validation": [int(i) for i in which],
        "margins": margins,
    }


def wanted_cells(rows: Sequence[str], fractions: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    for row in rows:
        if row in MODELS and MODELS[row].pairs is not None and not MODELS[row].whole:
            yield row, "1", 0
            continue
        for fraction in fractions if row not in MODELS or not MODELS[row].whole else ["1"]:
            # all pairs are the same pairs whatever the seed; what has no random start is then the same
            for seed in range(1 if row in FITTED and fraction == "1" else seeds):
                yield row, fraction, seed


def run(asked: argparse.Namespace) -> None:
    pairs = read(asked.data)
    asked.results.mkdir(parents=True, exist_ok=True)
    about = {
        "train": len(pairs.train),
        "left_out": dict(pairs.left_out),
        "train_sources": dict(Counter(pair.source for pair in pairs.train)),
        "sources": [pair.source for pair in pairs.validation],
        "log_lengths": [float(f"{x:.5g}") for x in log_lengths(pairs.validation)],
    }
    write(asked.results / "pairs.json", about)
    for row, fraction, seed in wanted_cells(asked.rows, asked.fractions, asked.seeds):
        many = min(asked.validation or len(pairs.validation), len(pairs.validation))
        file = asked.results / f"{row}-{fraction.replace('/', 'of')}-{seed}.json"
        if file.is_file() and len(json.loads(file.read_text())["margins"]) >= many:
            continue
        cell = cell_of(row, pairs, fraction, seed, many, asked.work)
        write(file, {**cell, "fraction": fraction})
        right = np.mean(np.array(cell["margins"]) > 0)
        print(f"{row:24s} {fraction:5s} seed {seed}: {right:.3f} of {many}, {cell['settings']}", flush=True)


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(part, file)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--data", help="directory of HH-RLHF")
    parser.add_argument("--rows", nargs="+", choices=[*FITTED, *MODELS], default=[*RULES])
    parser.add_argument("--fractions", nargs="+", choices=FRACTIONS, default=[*FRACTIONS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", type=int, help="the first so many validation pairs, shuffled; all")
    parser.add_argument("--work", type=Path, default=Path("runs/hh-rm-lab"), help="directory of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.what == "run":
        if not asked.data:
            parser.error("run needs --data PATH")
        run(asked)
    else:
        from hh_rm_table import study

        page = ROOT / "docs" / "studies" / "hh-rm" / "STUDY.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(study(asked.results), encoding="utf-8")


if __name__ == "__main__":
    main()
