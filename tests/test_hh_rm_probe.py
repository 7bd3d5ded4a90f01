"""The linear probes of benchmarks/hh_rm_probe.py: what they read, and what they can and cannot learn."""

from pathlib import Path

import hh_rm_probe
import numpy as np
import pytest
import torch
from hh_rm_probe import LowerBlocks, States
from transformers import AutoModel

from preftune.config import load_recipe
from preftune.data import Dialogue, Preference, Turn
from preftune.data.corpus import train_tokenizer
from preftune.models.load import scratch_gpt2

WIDTH = 12


def pair(i: int, chosen: str = "yes it is", rejected: str = "no", source: str = "helpful-base") -> Preference:
    prompt = Dialogue([Turn("human", f"is it {i}?")])
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, source=source, row=i)


def test_a_reply_is_the_mean_of_its_states_below_the_trained_blocks(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([], 257)
    model = scratch_gpt2(tokenizer, layers=3, width=WIDTH, heads=2, positions=128, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = ["data.name=any", f"model.base={tmp_path}", "model.trainable=top:1", "model.kept_gb=0"]
    blocks = LowerBlocks(load_recipe("hh-rm", settings).config)
    pairs = [pair(1), pair(22, "it may be"), pair(3, "x" * 97, "x" * 98)]
    *found, alike = blocks.of(pairs)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    for each, states in zip(pairs, found, strict=False):
        prompt, *replies = blocks.encoder.pair(each)
        for reply, mean in zip(replies, states.replies, strict=True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                out = plain(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states[2][0]
            np.testing.assert_allclose(mean, out[len(prompt) :].mean(0), atol=2e-2)
            np.testing.assert_allclose(states.prompt, out[len(prompt) - 1], atol=2e-2)
    assert not alike.replies.any()  # equal as far as they are read: a tie


class Made:
    """States in the place of a model's: the first number says which reply is preferred, the other way round
    for harmless pairs; the prompt's first number tells the kinds apart.
    """

    def of(self, pairs: list[Preference]) -> list[States]:
        return [self.one(each) for each in pairs]

    def one(self, each: Preference) -> States:
        noise = np.random.default_rng(each.row)
        sign = -1.0 if each.source.startswith("harmless") else 1.0
        replies, prompt = noise.normal(size=(2, WIDTH)), noise.normal(size=WIDTH)
        replies[:, 0] = [sign, -sign]
        prompt[0] = 4 * sign
        return States(replies, prompt)


def test_two_probes_learn_what_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hh_rm_probe, "lower_blocks", Made)
    pairs = [pair(i, source="harmless-base" if i % 2 else "helpful-base") for i in range(400)]
    learnt, new = pairs[:300], pairs[300:]
    right = {}
    for rule in (hh_rm_probe.probe, hh_rm_probe.probe_by_prompt):
        margins, settings = rule(learnt, 0)
        assert settings["C"] in hh_rm_probe.PENALTIES
        right[rule.__name__] = float((margins(new) > 0).mean())
    assert right["probe_by_prompt"] > 0.9
    assert 0.3 < right["probe"] < 0.7
