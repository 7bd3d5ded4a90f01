"""What accuracy others reached with a reward model of this size on these data: is 0.6 good?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HH_SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
NEAR = 1.6  # a published model counts as "this size" within this factor of its parameters


@dataclass(frozen=True, slots=True)
class Published:
    """Held-out accuracy on a part of HH-RLHF as its author states it; `sources` are the subsets it is of."""

    model: str
    parameters: float
    accuracy: float
    sources: tuple[str, ...]
    citation: str


_HELPFUL, _HARMLESS = HH_SUBSETS[:3], HH_SUBSETS[3:]
_LLAMA2 = "Touvron et al. 2023 (arXiv:2307.09288), table 7"

# Read off the model cards and the paper named; none of these numbers was measured with preftune.
PUBLISHED = (
    Published("GPT-2 large", 774e6, 0.726, _HELPFUL, "model card Ray2333/gpt2-large-helpful-reward_model"),
    Published("GPT-2 large", 774e6, 0.737, _HARMLESS, "model card Ray2333/gpt2-large-harmless-reward_model"),
    Published(
        "DeBERTa-v3-large",
        435e6,
        0.752,
        HH_SUBSETS,
        "model card sileod/deberta-v3-large-tasksource-rlhf-reward-model",
    ),
    Published("OpenAssistant DeBERTa-v3-large", 435e6, 0.677, _HELPFUL, _LLAMA2),
    Published("OpenAssistant DeBERTa-v3-large", 435e6, 0.684, _HARMLESS, _LLAMA2),
    Published("Llama 2 70B helpfulness reward model", 70e9, 0.72, _HELPFUL, _LLAMA2),
    Published("Llama 2 70B safety reward model", 70e9, 0.747, _HARMLESS, _LLAMA2),
)


def expected_band(
    data: str, sources: Iterable[str], parameters: int, best_reachable: float | None = None
) -> dict[str, Any]:
    """Lowest and highest published accuracy at this size on these data, with the sources; or none."""
    if best_reachable is not None:
        text = (
            "the built-in world: its labels are noisy on purpose, and the rule that drew them agrees with "
            f"{100 * best_reachable:.1f} % of them; no number of others exists"
        )
        return {
            "low": None,
            "high": best_reachable,
            "text": text,
            "source": "the labels' own gold score, computed on these pairs",
        }
    named = {source for source in sources if source}
    published = [entry for entry in PUBLISHED if _is_hh(data, named) and _covers(entry, named)]
    near = [e for e in published if 1 / NEAR <= parameters / e.parameters <= NEAR]
    if not near:
        text = f"none known at this size ({_count(parameters)} parameters) on these data"
        least = min((entry.parameters for entry in published), default=0)
        smallest = [entry for entry in published if entry.parameters == least]
        if smallest:
            text += f"; the smallest published ({_count(least)}): {_accuracies(smallest)}"
        return {"low": None, "high": None, "text": text, "source": _citations(smallest) or None}
    return {
        "low": min(entry.accuracy for entry in near),
        "high": max(entry.accuracy for entry in near),
        "text": f"published at this size on HH-RLHF: {_accuracies(near)}; their test pairs need not be these",
        "source": _citations(near),
    }


def _accuracies(entries: Iterable[Published]) -> str:
    suffixes = {_HELPFUL: " on helpful", _HARMLESS: " on harmless"}
    texts = (f"{e.model} {100 * e.accuracy:.1f} %{suffixes.get(e.sources, '')}" for e in entries)
    return ", ".join(dict.fromkeys(texts))


def _citations(entries: Iterable[Published]) -> str:
    return "; ".join(dict.fromkeys(entry.citation for entry in entries))


def _is_hh(data: str, sources: set[str]) -> bool:
    return "hh-rlhf" in data.lower() or (bool(sources) and all(_subset(s) for s in sources))


def _covers(entry: Published, sources: set[str]) -> bool:
    subsets = {_subset(source) for source in sources} - {None}
    return not subsets or bool(subsets & set(entry.sources))


def _subset(source: str) -> str | None:
    return next((name for name in HH_SUBSETS if name in source), None)


def _count(n: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"
