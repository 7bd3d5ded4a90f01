"""Pathologies that the metrics of a stage show while it runs. Thresholds: docs/doctor.md says where from."""

from statistics import mean

from preftune.report.doctor.base import FEW_ROWS, Pathology, course, in_stages, thirds
from preftune.report.view import StageView

RATIO = 1e-3  # the first update's ratio is 1 but for rounding; half precision moves it by about this
SERVED = 0.01  # nats a token between a server that samples and the policy: half precision is far below
CUT, CUT_MORE = 0.8, 0.2  # share of replies without an end, and by how much it rose
ENTROPY_LEFT = 0.5  # share of the entropy at the start
ZERO_STD = 0.5
UNEXPLAINED = -0.05
CATCHING_UP = 0.5  # of what it was below 0 at first: a critic that comes up is only late
STEP_KL = 0.1  # nats a token by which the policy left the one that sampled
CLIPPED = 0.4
MASKED = 0.05
NO_EFFECT = 0.005  # share by which a loss fell
FALLING = 3.0  # nats a reply, of the chosen one's log-probability
LENGTH = 1.5  # times the length at the start


def _ratio(stage: StageView) -> str | None:
    first = course(stage, "first/val/ratio", "first/ratio")
    if first and (worst := max(abs(v - 1) for v in first)) > RATIO:
        return f"the first update of a step has a mean ratio {worst:.2g} away from 1"
    served = course(stage, "sampling/kl_k3")
    if served and (worst := max(served)) > SERVED:
        return f"the server that samples is {worst:.2g} nats a token away from the policy"
    return None


def _ends_fall(stage: StageView) -> str | None:
    means = thirds(course(stage, "completions/clipped_ratio"))
    if means and means.last - means.first > CUT_MORE:
        return f"replies without an end rose from {means.first:.0%} to {means.last:.0%}"
    return None


def _cut_off(stage: StageView) -> str | None:
    values = course(stage, "completions/clipped_ratio")
    if len(values) >= FEW_ROWS and mean(values[: len(values) // 3 or 1]) > CUT:
        return f"{mean(values):.0%} of the sampled replies have no end, from the start on"
    return None


def _entropy(stage: StageView) -> str | None:
    means = thirds(course(stage, "policy/entropy_avg", "entropy")) if _samples(stage) else None
    if means and 0 <= means.last < ENTROPY_LEFT * means.first:
        return f"entropy fell from {means.first:.2f} to {means.last:.2f} nats a token"
    return None


def _zero_std(stage: StageView) -> str | None:
    means = thirds(course(stage, "frac_reward_zero_std"))
    if means and means.last > ZERO_STD:
        return f"in {means.last:.0%} of the groups all replies score the same, at the end"
    return None


def _unexplained(stage: StageView) -> str | None:
    means = thirds(course(stage, "val/explained_variance"))
    if means and means.last < UNEXPLAINED and means.last < CATCHING_UP * means.first:
        return (
            f"explained variance is {means.last:.2f} in the last third of the steps, {means.first:.2f} before"
        )
    return None


def _chosen_falls(stage: StageView) -> str | None:
    beta = stage.settings.get("beta", 0.1)
    means = thirds(course(stage, "rewards/chosen"))
    if means and isinstance(beta, int | float) and beta > 0 and means.last / beta < -FALLING:
        return f"the chosen replies lost {-means.last / beta:.1f} nats of log-probability"
    return None


def _too_high(stage: StageView) -> str | None:
    moved = thirds(course(stage, "policy/approxkl_avg"))
    clipped = thirds(course(stage, "policy/clipfrac_avg", "clip_ratio/region_mean"))
    loss = thirds(course(stage, "loss"))
    if moved and max(moved) > STEP_KL:
        return f"a step moves the policy by {max(moved):.2f} nats a token"
    if clipped and max(clipped) > CLIPPED:
        return f"{max(clipped):.0%} of the ratios are clipped"
    if loss and not _samples(stage) and loss.last > 1.05 * loss.first > 0:
        return f"the loss rose from {loss.first:.3f} to {loss.last:.3f}"
    return None


def _no_effect(stage: StageView) -> str | None:
    loss = thirds(course(stage, "loss"))
    margins, moved = course(stage, "rewards/margins"), thirds(course(stage, "policy/approxkl_avg"))
    if margins and (ends := thirds(margins)) and abs(ends.last) < NO_EFFECT:
        return f"the margin between chosen and rejected is still {ends.last:+.4f}"
    if moved and max(moved) < 1e-6:
        return f"a step moves the policy by {max(moved):.1g} nats a token"
    if (
        loss
        and not margins
        and not _samples(stage)
        and 0 <= loss.first - loss.last < NO_EFFECT * abs(loss.first or 1.0)
    ):
        return f"the loss went from {loss.first:.4f} to {loss.last:.4f}"
    return None


def _skipped(stage: StageView) -> str | None:
    n = sum(v > 0 for v in course(stage, "skipped"))
    return f"{n} of {len(stage.metrics)} steps had a number that is not finite" if n else None


def _masked(stage: StageView) -> str | None:
    values = course(stage, "frac_reward_masked")
    if values and mean(values) > MASKED:
        return f"{mean(values):.0%} of the replies have no reward"
    return None


def _longer(stage: StageView) -> str | None:
    means = thirds(course(stage, "completions/mean_length"))
    if means and means.first > 0 and not 1 / LENGTH < means.last / means.first < LENGTH:
        return f"replies went from {means.first:.0f} to {means.last:.0f} tokens"
    return None


def _samples(stage: StageView) -> bool:
    return bool(course(stage, "tokens/sampled"))


TRAINING = (
    Pathology(
        "numbers that are not finite",
        "a loss, score or gradient overflowed; such steps change nothing",
        "look at stages/STAGE/nonfinite-step-N.json; lower the learning rate, or train in float32",
        in_stages(_skipped),
    ),
    Pathology(
        "first ratio not 1",
        "the sampler and the learner disagree on the log-probabilities of the same tokens",
        "train in float32, or report it: in float32 this is a fault of preftune; where a server "
        "samples: docs/vllm.md",
        in_stages(_ratio),
    ),
    Pathology(
        "learning rate too high",
        "updates carry the policy out of the range in which the objective means anything",
        "lower learning_rate by 3 to 10 times, or epochs",
        in_stages(_too_high),
    ),
    Pathology(
        "learning rate without effect",
        "the stage ended about where it began",
        "raise learning_rate by 3 to 10 times, or the number of steps",
        in_stages(_no_effect),
    ),
    Pathology(
        "ends are falling",
        "the policy is paid for replies that do not end",
        "set missing_eos_score, raise kl_coef, or raise max_new_tokens",
        in_stages(_ends_fall),
    ),
    Pathology(
        "replies are cut off",
        "hardly any reply ends within max_new_tokens, so the score is that of a fragment",
        "raise max_new_tokens, or train SFT on replies that end within it",
        in_stages(_cut_off),
    ),
    Pathology(
        "length runs away",
        "length itself is paid for, or punished",
        "look at the reward model's score by length; raise kl_coef; evaluate at equal length",
        in_stages(_longer),
    ),
    Pathology(
        "entropy collapses",
        "the policy has settled on a few replies and explores no more",
        "raise kl_coef, lower learning_rate, or stop earlier",
        in_stages(_entropy),
    ),
    Pathology(
        "groups without variance",
        "where all replies to a prompt score the same there is nothing to learn from",
        "use a reward that tells them apart, more replies a group, or harder prompts",
        in_stages(_zero_std),
    ),
    Pathology(
        "critic explains nothing",
        "values are worse than their mean, so advantages are noise",
        "raise critic_learning_rate, or use more steps or a larger batch",
        in_stages(_unexplained),
    ),
    Pathology(
        "chosen log-probability falls",
        "the margin grows by pushing both replies down (Pal et al. 2024, arXiv:2402.13228)",
        "lower learning_rate or epochs, raise beta, or add an SFT term",
        in_stages(_chosen_falls),
    ),
    Pathology(
        "replies without a reward",
        "a reward function fails, or does not apply, and those replies are left out",
        "read the stage's log for the first failure",
        in_stages(_masked),
    ),
)
