"""One step of PPO or GRPO on paper: FLOPs, bytes and seconds from stated rates. Nothing here is measured.

    python benchmarks/paper.py             (prints the table of docs/scaling.md)

N parameters, B replies of R tokens to prompts of P, W cards, float32 weights, products in bf16. A pass costs
2 N FLOPs a token, a pass with its gradient 6 N (Kaplan et al., arXiv:2001.08361, section 2.1; attention is
left out). A token of sampling reads every weight once for all rows of a card.
"""

from dataclasses import dataclass

FLOPS, MEMORY, LINK = 989e12, 3.35e12, 450e9  # H100 SXM: dense bf16, HBM3, NVLink a direction (NVIDIA)
GOOD = {"products": 0.4, "memory": 0.6, "link": 0.6}  # assumed shares of those
PROMPT, REPLY, MICROBATCH = 256, 256, 8


@dataclass(frozen=True)
class Kind:
    trained: int  # models with gradient and two moments
    frozen: int
    looked_up: int  # passes over prompt and reply between sampling and updates


KINDS = {"PPO": Kind(2, 2, 4), "GRPO": Kind(1, 2, 3)}


def step(kind: Kind, parameters: float, cards: int, replies: int) -> dict[str, float]:
    """Seconds of the parts of a step, and bytes on a card before activations."""
    rows, tokens = replies / cards, (PROMPT + REPLY) * replies / cards
    weights = 4 * parameters
    compute, moved = FLOPS * GOOD["products"], LINK * GOOD["link"]
    gather = weights * (cards - 1) / cards / moved
    a_token = max(weights / (MEMORY * GOOD["memory"]), 2 * parameters * rows / compute)
    microbatches = -(-rows // MICROBATCH)
    return {
        "sampling": REPLY * a_token,
        "look-ups": kind.looked_up * 2 * parameters * tokens / compute,
        "updates": kind.trained * 6 * parameters * tokens / compute,
        "gathers": (1 + kind.looked_up) * gather + kind.trained * microbatches * 3 * gather,
        "GB": ((16 * kind.trained + 4 * kind.frozen) * parameters / cards + weights * (cards > 1)) / 1e9,
    }


def main() -> None:
    print("| step | replies | sampling | look-ups | updates | gathers | GB a card |")
    print("|---" * 7 + "|")
    for name, parameters, cards, replies in (
        ("PPO", 135e6, 1, 64),
        ("PPO", 135e6, 8, 512),
        ("GRPO", 8e9, 8, 512),
        ("PPO", 8e9, 8, 512),
    ):
        found = step(KINDS[name], parameters, cards, replies)
        size = f"{parameters / 1e9:g} B" if parameters >= 1e9 else f"{parameters / 1e6:g} M"
        times = " | ".join(f"{found[key]:.2g} s" for key in ("sampling", "look-ups", "updates", "gathers"))
        what = f"{name}, {size}, {cards} card{'s' * (cards > 1)}"
        print(f"| {what} | {replies} | {times} | {found['GB']:.0f} |")


if __name__ == "__main__":
    main()
