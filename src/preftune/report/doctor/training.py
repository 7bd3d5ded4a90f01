"""Pathologies that the metrics of a stage show while it runs. Thresholds: docs/doctor.md says where from."""

from collections.abc import Iterator
from statistics import mean

from preftune.report.doctor.base import FEW_ROWS, Pathology, Symptom, course, peak, thirds
from preftune.report.view import RunView

RATIO = 1e-3  # the first update's ratio is 1 but for rounding; half precision moves it by about this
CUT, CUT_MORE = 0.8, 0.2  # share of replies without an end, and by how much it rose
ENTROPY_LEFT = 0.5  # share of the entropy at the start
ZERO_STD = 0.5
UNEXPLAINED = -0.05
STEP_KL = 0.1  # nats a token by which the policy left the one that sampled
CLIPPED = 0.4
MASKED = 0.05
NO_EFFECT = 0.005  # share by which a loss fell
FALLING = 3.0  # nats a reply, of the chosen one's log-probability
LENGTH = 1.5  # times the length at the start


def _ratio(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        first = course(stage, "first/val/ratio", "first/ratio")
        if first and (worst := peak([abs(v - 1) for v in first])) > RATIO:
            yield stage.name, f"the first update of a step has a mean ratio {worst:.2g} away from 1"


def _ends_fall(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        both = thirds(course(stage, "completions/clipped_ratio"))
        if both and both[1] - both[0] > CUT_MORE:
            yield stage.name, f"replies without an end rose from {both[0]:.0%} to {both[1]:.0%}"


def _cut_off(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        values = course(stage, "completions/clipped_ratio")
        if len(values) >= FEW_ROWS and mean(values[: len(values) // 3 or 1]) > CUT:
            yield stage.name, f"{mean(values):.0%} of the sampled replies have no end, from the start on"


def _entropy(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        if not course(stage, "tokens/sampled"):
            continue
        both = thirds(course(stage, "policy/entropy_avg", "entropy"))
        if both and 0 <= both[1] < ENTROPY_LEFT * both[0]:
            yield stage.name, f"entropy fell from {both[0]:.2f} to {both[1]:.2f} nats a token"


def _zero_std(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        both = thirds(course(stage, "frac_reward_zero_std"))
        if both and both[1] > ZERO_STD:
            yield stage.name, f"in {both[1]:.0%} of the groups all replies score the same, at the end"


def _unexplained(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        both = thirds(course(stage, "val/explained_variance"))
        if both and both[1] < UNEXPLAINED:
            yield stage.name, f"explained variance is {both[1]:.2f} in the last third of the steps"


def _chosen_falls(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        beta = run.config.get("stage", {}).get(stage.name, {}).get("beta", 0.1)
        both = thirds(course(stage, "rewards/chosen"))
        if both and isinstance(beta, int | float) and beta > 0 and both[1] / beta < -FALLING:
            yield stage.name, f"the chosen replies lost {-both[1] / beta:.1f} nats of log-probability"


def _too_high(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        moved = thirds(course(stage, "policy/approxkl_avg"))
        clipped = thirds(course(stage, "policy/clipfrac_avg", "clip_ratio/region_mean"))
        loss = thirds(course(stage, "loss"))
        if moved and max(moved) > STEP_KL:
            yield stage.name, f"a step moves the policy by {max(moved):.2f} nats a token"
        elif clipped and max(clipped) > CLIPPED:
            yield stage.name, f"{max(clipped):.0%} of the ratios are clipped"
        elif loss and not course(stage, "tokens/sampled") and loss[1] > 1.05 * loss[0] > 0:
            yield stage.name, f"the loss rose from {loss[0]:.3f} to {loss[1]:.3f}"


def _no_effect(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        loss = thirds(course(stage, "loss"))
        margins, moved = course(stage, "rewards/margins"), thirds(course(stage, "policy/approxkl_avg"))
        if margins and (end := thirds(margins)) and abs(end[1]) < NO_EFFECT:
            yield stage.name, f"the margin between chosen and rejected is still {end[1]:+.4f}"
        elif moved and max(moved) < 1e-6:
            yield stage.name, f"a step moves the policy by {max(moved):.1g} nats a token"
        elif loss and not margins and not course(stage, "tokens/sampled"):
            fell = (loss[0] - loss[1]) / abs(loss[0] or 1.0)
            if 0 <= fell < NO_EFFECT:
                yield stage.name, f"the loss went from {loss[0]:.4f} to {loss[1]:.4f}"


def _skipped(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        if n := sum(v > 0 for v in course(stage, "skipped")):
            yield stage.name, f"{n} of {len(stage.metrics)} steps had a number that is not finite"


def _masked(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        values = course(stage, "frac_reward_masked")
        if values and mean(values) > MASKED:
            yield stage.name, f"{mean(values):.0%} of the replies have no reward"


def _longer(run: RunView) -> Iterator[Symptom]:
    for stage in run.stages:
        both = thirds(course(stage, "completions/mean_length"))
        if both and both[0] > 0 and not 1 / LENGTH < both[1] / both[0] < LENGTH:
            yield stage.name, f"replies went from {both[0]:.0f} to {both[1]:.0f} tokens"


TRAINING = (
    Pathology(
        "numbers that are not finite",
        "a loss, score or gradient overflowed; such steps change nothing",
        "look at stages/STAGE/nonfinite-step-N.json; lower the learning rate, or train in float32",
        _skipped,
    ),
    Pathology(
        "first ratio not 1",
        "the sampler and the learner disagree on the log-probabilities of the same tokens",
        "train in float32, or report it: in float32 this is a fault of preftune",
        _ratio,
    ),
    Pathology(
        "learning rate too high",
        "updates carry the policy out of the range in which the objective means anything",
        "lower learning_rate by 3 to 10 times, or epochs",
        _too_high,
    ),
    Pathology(
        "learning rate without effect",
        "the stage ended about where it began",
        "raise learning_rate by 3 to 10 times, or the number of steps",
        _no_effect,
    ),
    Pathology(
        "ends are falling",
        "the policy is paid for replies that do not end",
        "set missing_eos_score, raise kl_coef, or raise max_new_tokens",
        _ends_fall,
    ),
    Pathology(
        "replies are cut off",
        "hardly any reply ends within max_new_tokens, so the score is that of a fragment",
        "raise max_new_tokens, or train SFT on replies that end within it",
        _cut_off,
    ),
    Pathology(
        "length runs away",
        "length itself is paid for, or punished",
        "look at the reward model's score by length; raise kl_coef; evaluate at equal length",
        _longer,
    ),
    Pathology(
        "entropy collapses",
        "the policy has settled on a few replies and explores no more",
        "raise kl_coef, lower learning_rate, or stop earlier",
        _entropy,
    ),
    Pathology(
        "groups without variance",
        "where all replies to a prompt score the same there is nothing to learn from",
        "use a reward that tells them apart, more replies a group, or harder prompts",
        _zero_std,
    ),
    Pathology(
        "critic explains nothing",
        "values are worse than their mean, so advantages are noise",
        "raise critic_learning_rate, or use more steps or a larger batch",
        _unexplained,
    ),
    Pathology(
        "chosen log-probability falls",
        "the margin grows by pushing both replies down (Pal et al. 2024, arXiv:2402.13228)",
        "lower learning_rate or epochs, raise beta, or add an SFT term",
        _chosen_falls,
    ),
    Pathology(
        "replies without a reward",
        "a reward function fails, or does not apply, and those replies are left out",
        "read the stage's log for the first failure",
        _masked,
    ),
)
