"""The built-in world: held-out things stay out, labels follow gold, texts encode and decode exactly."""

import json
import math
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.config import DataConfig
from preftune.data import parse_prompt
from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.errors import DataError
from preftune.runs.sources import dataset_of
from preftune.world import dataset, grammar
from preftune.world.dataset import KINDS, World, draw_question, make_world, world_hash
from preftune.world.gold import (
    COMPONENTS,
    best_reachable,
    gold,
    gold_components,
    preference_probability,
    reply_counts,
)
from preftune.world.grammar import FORMS, TUNING_FORMS, Fact, parse, sentences, statements
from preftune.world.replies import PROBES, draw_pair

OWL = " The owl eats corn and fears rain. What does the owl eat?"


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(seed=3, pairs=1500, validation=200, test=200)


@pytest.fixture(scope="module")
def documents(world: World) -> list[str]:
    return world.documents(4000)


def replies(world: World) -> list[tuple[Dialogue, str]]:
    return [(p.prompt, text) for p in world.train for text in (p.chosen, p.rejected)]


GOLD_EXAMPLES = [
    (" The owl eats corn.", 2.5),
    ("The owl eats corn.", 2.5),
    (" Gladly! The owl eats corn.", 3.1),
    (" Gladly! The owl eats corn. You are welcome! All the best!", 4.3),
    (" Gladly! The owl eats corn. You are welcome! All the best! Have a nice day!", 3.1),
    (" The owl eats mice.", -1.5),
    (" The fox eats corn.", -1.5),
    (" The owl eats rain.", -1.5),
    (" The owl plays golf.", -1.5),
    (" The owl fears rain.", -1.8),
    (" The owl eats corn and fears rain.", 2.2),
    (" The owl eats corn. The owl eats mice.", 1.0),
    (" The owl eats corn. The owl eats corn.", 1.9),
    (" I do not know.", -1.5),
    (" How dull. The owl eats corn.", 1.3),
    (" One could go on. The owl eats corn. One could go on.", 0.9),
    (" The owl eats corn. All the this helps!", 1.5),
    (" The owl eats corn", -2.5),
    (" The owl eats corn.\n\nHuman: Thanks", 1.5),
    ("", -1.5),
    (" Of course! All the best! All the best! You are welcome! All the best!", -3.3),
]


@pytest.mark.parametrize(("reply", "score"), GOLD_EXAMPLES)
def test_gold_by_rule(reply: str, score: float) -> None:
    assert gold(OWL, reply) == pytest.approx(score, abs=1e-9)
    assert gold(OWL, reply, ended=False) == pytest.approx(score - 1, abs=1e-9)


def test_gold_is_the_sum_of_its_components() -> None:
    reply = " Not again. The owl fears rain. One could go on. All the this helps!"
    parts = gold_components(OWL, reply, ended=False)
    assert tuple(parts) == COMPONENTS
    assert parts == pytest.approx(
        {"truth": 0.0, "relevance": -1.8, "manners": -1.2, "concision": -0.5, "form": -2.0}
    )
    assert gold(OWL, reply, ended=False) == pytest.approx(sum(parts.values()))
    assert all(math.copysign(1, value) > 0 for value in gold_components(OWL, " The owl eats corn.").values())


def test_the_same_reply_depends_on_the_question() -> None:
    assert gold(" The owl eats corn and fears rain. What does the owl fear?", " The owl eats corn.") < -1
    assert gold(" The owl fears rain and eats corn. Tell me what the owl eats.", " The owl eats corn.") > 2


def test_prompt_is_read_from_dialogue_transcript_or_text() -> None:
    dialogue = Dialogue([Turn("human", OWL)])
    longer = Dialogue(
        [Turn("human", " Hi"), Turn("assistant", " Hello. The fox eats fish."), Turn("human", OWL)]
    )
    for prompt in (dialogue, dialogue.transcript(), longer, longer.transcript(), OWL, OWL.strip()):
        assert parse(prompt).right == Fact("owl", "eats", "corn")
        assert parse(prompt).other == Fact("owl", "fears", "rain")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " What does the owl eat?",
        " The owl eats corn. What does the owl eat?",
        " The owl eats corn and fears rain. What does the fox eat?",
        " The owl eats corn and fears rain. What does the owl wear?",
        " The owl eats corn and fears rain. What is your name?",
    ],
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="not a prompt of the built-in world"):
        gold(prompt, " The owl eats corn.")


@given(st.text(alphabet=st.sampled_from(" .!?\nThe owleatscrn"), max_size=80))
def test_any_text_has_a_gold_score(reply: str) -> None:
    counts = reply_counts(OWL, reply)
    assert sum(counts.values()) >= len(sentences(reply)) - counts["repeated"]
    assert math.isfinite(gold(OWL, reply))


def test_questions_round_trip() -> None:
    rng = Random(0)
    for kind in KINDS:
        for _ in range(100):
            question = draw_question(rng, kind, "train")
            assert parse(question.dialogue()) == question


def test_a_seed_fixes_everything_and_another_seed_changes_it(world: World) -> None:
    again = make_world(seed=3, pairs=1500, validation=200, test=200)
    assert again == world
    assert again.documents(50) == world.documents(50)
    assert again.prompts("wording", 20, seed=1) == world.prompts("wording", 20, seed=1)
    other = make_world(seed=4, pairs=20, validation=20, test=20)
    assert other.train != world.train[:20]
    assert other.documents(50) != world.documents(50)
    assert world.prompts("training", 20, seed=1) != world.prompts("training", 20, seed=2)


def test_more_pairs_extend_the_same_list(world: World) -> None:
    assert make_world(seed=3, pairs=100, validation=10, test=10).train == world.train[:100]


def test_no_prompt_is_in_two_splits(world: World, documents: list[str]) -> None:
    splits = [{p.prompt.transcript() for p in rows} for rows in (world.train, world.validation, world.test)]
    for kind in KINDS:
        held_out = {prompt.transcript() for prompt in world.prompts(kind, 300)}
        assert len(held_out) == 300
        assert not held_out & (splits[0] | splits[1])
        assert not held_out & {document.partition("Assistant:")[0] + "Assistant:" for document in documents}
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_held_out_combinations_occur_nowhere_else(world: World, documents: list[str]) -> None:
    held_out = [
        fact
        for animal in grammar.ANIMALS
        for verb, values in grammar.VALUES.items()
        for value in values
        if (fact := Fact(animal, verb, value)).held_out
    ]
    assert len(held_out) == 96
    texts = [turn.text for p in world.train for turn in p.prompt] + documents
    texts += [reply for _, reply in replies(world)]
    for text in texts:
        human_and_reply = text.replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
        assert not any(fact.held_out for s in sentences(human_and_reply) for fact in statements(s)), text
    assert all(parse(prompt).right.held_out for prompt in world.prompts("combinations", 200))
    assert not any(parse(prompt).other.held_out for prompt in world.prompts("combinations", 200))


def test_only_pretraining_shows_the_held_out_wording(world: World, documents: list[str]) -> None:
    assert all(parse(p.prompt).form < TUNING_FORMS for p in world.train + world.validation + world.test)
    assert all(parse(prompt).form == len(FORMS) - 1 for prompt in world.prompts("wording", 50))
    assert any("Tell me" in document for document in documents)


def test_documents_begin_with_passages(documents: list[str]) -> None:
    passages = [not document.startswith("\n\nHuman:") for document in documents]
    quarter = len(documents) // 4
    assert 0.70 < sum(passages[:quarter]) / quarter < 0.80
    assert 0.20 < sum(passages[quarter:]) / (len(documents) - quarter) < 0.30


def test_every_kind_of_reply_is_in_pairs_but_stacked_courtesies(world: World, documents: list[str]) -> None:
    counts = [reply_counts(prompt, reply) for prompt, reply in replies(world)]
    for name in ("right", "wrong", "other", "evasion", "courtesy", "rude", "filler", "repeated", "garbled"):
        assert sum(c[name] > 0 for c in counts) >= 40, name
    assert sum(c["right"] == c["wrong"] == c["other"] == 0 for c in counts) >= 50  # no fact at all
    assert sum(c["right"] > 0 and c["wrong"] > 0 for c in counts) >= 20  # a second value
    assert max(c["courtesy"] for c in counts) == 3
    stacked = [
        reply_counts(prompt, reply.partition("\n\nHuman:")[0])["courtesy"] > 3
        for prompt, _, reply in (d.rpartition("\n\nAssistant:") for d in documents if "Assistant:" in d)
    ]
    assert sum(stacked) > 20


def test_fact_pairs_differ_in_the_fact_alone_a_third_in_the_verb(world: World) -> None:
    pairs = [p for p in world.train if p.source == "fact"]
    assert 0.36 < len(pairs) / len(world.train) < 0.44
    others = 0
    for pair in pairs:
        different = set(sentences(pair.chosen)) ^ set(sentences(pair.rejected))
        assert len(different) == 2
        assert parse(pair.prompt).right.sentence() in different
        others += parse(pair.prompt).other.sentence() in different
    assert 0.27 < others / len(pairs) < 0.40


def test_style_pairs_differ_in_one_sentence(world: World) -> None:
    for pair in world.train:
        if pair.source == "style":
            assert abs(len(sentences(pair.chosen)) - len(sentences(pair.rejected))) == 1


def test_labels_follow_bradley_terry(world: World) -> None:
    """Chosen is the better reply as often as the noise says, within 4 standard errors."""
    chances = [preference_probability(p.prompt, p.chosen, p.rejected) for p in world.train]
    decided = [p for p in chances if p != 0.5]
    expected = sum(max(p, 1 - p) for p in decided) / len(decided)
    share = sum(p > 0.5 for p in decided) / len(decided)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(decided))


def test_label_is_a_coin_of_the_stated_bias() -> None:
    """Brier score of the stated probabilities: a label without gold, or without noise, is far off."""
    rng = Random(1)
    pairs = [draw_pair(rng, draw_question(rng, "training", "train")) for _ in range(2000)]
    chances = [preference_probability(p.prompt, p.chosen, p.rejected) for p in pairs]
    expected = sum(2 * (p * (1 - p)) * 0.5 for p in chances) / len(chances)
    assert sum((1 - p) ** 2 for p in chances) / len(chances) == pytest.approx(expected, abs=0.02)


def test_best_reachable_accuracy() -> None:
    prompt = Dialogue([Turn("human", OWL)])
    tie = Preference(prompt=prompt, chosen=" Not again.", rejected=" How dull.")
    clear = Preference(prompt=prompt, chosen=" I do not know.", rejected=" The owl eats corn.")
    assert preference_probability(prompt, clear.rejected, clear.chosen) == pytest.approx(
        1 / (1 + math.exp(-4))
    )
    assert best_reachable([tie]) == 0.5
    assert best_reachable([tie, clear]) == pytest.approx((0.5 + 1 / (1 + math.exp(-4))) / 2)
    with pytest.raises(ValueError, match="at least one pair"):
        best_reachable([])


def test_prompts_and_responses_have_the_agreed_form(world: World) -> None:
    for row, pair in enumerate(world.train):
        assert pair.row == row
        assert [turn.role for turn in pair.prompt] == ["human"]
        assert pair.prompt[0].text.startswith(" The ")
        for reply in (pair.chosen, pair.rejected):
            assert reply.startswith(" ")
            assert reply == f" {' '.join(sentences(reply))}"
        assert pair.chosen != pair.rejected


def test_every_text_encodes_and_decodes_exactly(world: World, documents: list[str]) -> None:
    tokenizer = grammar.world_tokenizer()
    assert 135 <= len(tokenizer) <= 200
    texts = documents + [prompt.transcript() + reply for prompt, reply in replies(world)]
    texts += [prompt.transcript() for kind in KINDS for prompt in world.prompts(kind, 200)]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in rows)
    assert tokenizer.batch_decode(rows) == texts
    assert max(map(len, rows)) < 96


def test_prompt_and_response_join_token_by_token(world: World) -> None:
    tokenizer = grammar.world_tokenizer()
    for prompt, reply in replies(world)[:500]:
        apart = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt.transcript(), reply)]
        assert apart[0] + apart[1] == tokenizer.encode(prompt.transcript() + reply, add_special_tokens=False)


def test_tokenizer_pieces_and_hash(tmp_path) -> None:
    tokenizer = grammar.world_tokenizer()
    assert tokenizer.tokenize("\n\nHuman: The owl") == ["ĊĊ", "Human", ":", "ĠThe", "Ġowl"]
    assert tokenizer.eos_token == grammar.EOS == tokenizer.decode([tokenizer.eos_token_id])
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.encode(OWL) == tokenizer.encode(OWL)
    assert grammar.tokenizer_hash(loaded) == grammar.tokenizer_hash(tokenizer)
    loaded(["a", OWL], padding=False, truncation=True, max_length=3)
    assert grammar.tokenizer_hash(loaded) == grammar.tokenizer_hash(tokenizer)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["Ġowl"], vocabulary["Ġfox"] = vocabulary["Ġfox"], vocabulary["Ġowl"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    permuted = type(tokenizer).from_pretrained(tmp_path)
    assert grammar.tokenizer_hash(permuted) != grammar.tokenizer_hash(tokenizer)


def test_report_names_version_hashes_and_counts(world: World) -> None:
    report = json.loads(json.dumps(world.report))
    assert report["version"] == 1
    assert report["seed"] == 3
    assert report["world_sha256"] == world_hash()
    assert report["tokenizer_sha256"] == grammar.tokenizer_hash(grammar.world_tokenizer())
    assert report["splits"]["train"]["pairs"] == 1500
    assert sum(report["splits"]["train"]["sources"].values()) == 1500
    assert 0.8 < report["splits"]["test"]["best_reachable"] < 0.92


@pytest.mark.parametrize("name", PROBES)
def test_probes_differ_in_one_component(world: World, name: str) -> None:
    component = {"stacked courtesies": "manners"}.get(name, name)
    for pair in world.probes(name, "combinations", 40):
        better, worse = (gold_components(pair.prompt, text) for text in (pair.chosen, pair.rejected))
        assert gold(pair.prompt, pair.chosen) > gold(pair.prompt, pair.rejected)
        changed = {key for key in COMPONENTS if better[key] != worse[key]}
        assert component in changed
        assert changed <= {component, "truth"} if name == "relevance" else changed == {component}


def test_too_many_prompts_and_too_few_pairs_are_refused(world: World) -> None:
    with pytest.raises(DataError, match="fewer than 20000 prompts"):
        world.prompts("wording", 20000)
    with pytest.raises(DataError, match="at least one pair"):
        make_world(seed=0, pairs=0)


def test_the_world_is_frozen() -> None:
    """Published numbers belong to this world, and recipes are tuned on it: a change needs both anew."""
    assert world_hash() == "79b062d206b61a3876e55276e049d850130c6f2c1c1d3f529ce772089258ea3f"


def test_the_world_is_made_from_seed_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_world(seed: int, pairs: int) -> SimpleNamespace:
        pair = Preference(prompt=parse_prompt("Hi"), chosen=f" {seed}", rejected=f" {pairs}")
        return SimpleNamespace(train=(pair, pair), validation=(pair,), test=(), report={"noise": 1.0})

    monkeypatch.setattr(dataset, "make_world", make_world)
    data = dataset_of(DataConfig(name="world", pairs=7), seed=3)
    assert [(pair.chosen, pair.rejected, pair.row) for pair in data.train] == [
        (" 3", " 7", 0),
        (" 3", " 7", 1),
    ]
    assert data.report["world"] == {"noise": 1.0}
    assert data.report["splits"] == {"train": 2, "validation": 1, "test": 0}
