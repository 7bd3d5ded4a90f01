"""Responses sampled from a policy, with all that learning from them needs."""

from preftune.rollout.rollout import Rollout

__all__ = ["Rollout"]
