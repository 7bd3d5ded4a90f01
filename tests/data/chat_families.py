# ruff: noqa: E501 (templates)
"""Chat templates of our own with the traits of twelve families: how each opens, closes and alters a turn."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A template, the special tokens that it needs, and what a reply "Yes." is in it."""

    template: str
    special: tuple[str, ...]
    eos: str
    reply: str  # by hand: from the opened reply to the turn's end
    system: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)


_TURN = "{{ m['role'] }}\n{{ m['content'] }}"
_CHATML = (
    "{% for m in messages %}<|im_start|>" + _TURN + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

FAMILIES = {
    # The template closes turns with another token than the tokenizer's end token.
    "Qwen2.5 base": Family(template=_CHATML, special=_IM, eos="<|endoftext|>", reply="Yes.<|im_end|>"),
    # The last reply gets an empty think block; reasoning of earlier turns goes.
    "Qwen3": Family(
        template=(
            "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
            "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content }}"
            "\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
            "{% endif %}"
        ),
        special=_IM,
        eos="<|im_end|>",
        reply="<think>\n\n</think>\n\nYes.<|im_end|>",
    ),
    # A space before the reply and one before its end; the system message inside the first turn.
    "Llama 2": Family(
        template=(
            "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
            "{% set first = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}"
            "{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
            "{% for m in rest %}{% if m.role == 'user' %}"
            "{{ bos_token }}[INST] {{ first if loop.first }}{{ m.content }} [/INST]"
            "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        reply=" Yes. </s>",
    ),
    # A date, and contents that are trimmed.
    "Llama 3": Family(
        template=(
            "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else 'none' %}"
            "{{ bos_token }}<|start_header_id|>day<|end_header_id|>\n\n{{ date_string or day }}<|eot_id|>"
            "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        special=("<s>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        reply="Yes.<|eot_id|>",
    ),
    # The system message stands in the last turn, so that it moves once there is a reply.
    "Mistral": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
            "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
            "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}"
            "{% endfor %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        reply=" Yes.</s>",
    ),
    # No system role, another name for the assistant, and an end that the tokenizer does not call EOS.
    "Gemma": Family(
        template=(
            "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}"
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
            "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        special=("<s>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        reply="Yes.<end_of_turn>",
        system=False,
    ),
    # After the last turn the end token follows where no reply is opened.
    "Phi-3": Family(
        template=(
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
        ),
        special=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        eos="<|endoftext|>",
        reply="Yes.<|end|>",
    ),
    # The reply is opened inside of a think block that finished replies do not have.
    "R1 distill": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
            "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
        ),
        special=("<s>", "</s>", "<|User|>", "<|Assistant|>"),
        eos="</s>",
        reply="Yes.</s>",
    ),
    # A system message of its own where the first message is none.
    "SmolLM2": Family(
        template=(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
            + _CHATML
        ),
        special=_IM,
        eos="<|im_end|>",
        reply="Yes.<|im_end|>",
    ),
    # Role names that are plain text, and the end token closes every turn.
    "Zephyr": Family(
        template=(
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        special=("</s>",),
        eos="</s>",
        reply="Yes.</s>",
    ),
    # Turns without a line break between marker and text.
    "Command R": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}<|START|><|{{ m.role | upper }}|>{{ m.content | trim }}"
            "<|END|>{% endfor %}{% if add_generation_prompt %}<|START|><|ASSISTANT|>{% endif %}"
        ),
        special=("<s>", "<|END|>", "<|START|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"),
        eos="<|END|>",
        reply="Yes.<|END|>",
    ),
    # No marker at all between a question and the reply.
    "Vicuna": Family(
        template=(
            "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
            "ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        reply=" Yes.</s>",
    ),
}
