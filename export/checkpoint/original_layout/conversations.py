"""The conversation forms of the original LLaVA code, which its checkpoints do not hold, as chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hivtp_ops.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Of a message: its images, each on a line of its own, and its words.
_CONTENT = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
)
# The words of a system message that comes first, else those of the form.
_SYSTEM = (
    "{%% if messages and messages[0]['role'] == 'system' %%}{%% set system = messages[0]['content'] "
    "| selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %%}{%% set messages = messages[1:] %%}"
    "{%% else %%}{%% set system = %r %%}{%% endif %%}"
)


def _two_separators(system: str) -> str:
    """`SYSTEM USER: question ASSISTANT: answer</s>USER: ...`."""
    return (
        _SYSTEM % system + "{{ system + ' ' if system else '' }}{% for message in messages %}"
        "{{ message['role'].upper() + ': ' }}" + _CONTENT + "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def _instructions(system: str, between: str) -> str:
    """`[INST] <<SYS>> SYSTEM <</SYS>> question [/INST] answer </s>[INST] ...`."""
    return (
        _SYSTEM % system + "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '' if loop.first else " + repr(between) + " }}{{ '[INST] ' }}"
        "{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' }}"
        + _CONTENT
        + "{{ ' [/INST]' }}"
        "{% else %}{{ ' ' }}" + _CONTENT + "{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    )


_CHATML = (
    _SYSTEM % "Answer the questions." + "{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}" + _CONTENT + "{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# By the names that the original code gives them in its conv_templates.
CONVERSATIONS: Mapping[str, str] = {
    "vicuna_v1": _two_separators(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "llava_v1": _two_separators(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
    "mistral_instruct": _instructions("", ""),
    "llava_llama_2": _instructions(
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
        "<s>",
    ),
    "chatml_direct": _CHATML,
}


def conversation_of(name: str | None, text_type: str, has_chatml_tokens: bool) -> str:
    """The chat template of a form.

    Args:
        name: of the form; None takes the one that checkpoints of its kind were trained with.
        text_type: of the language model.
        has_chatml_tokens: whether `<|im_start|>` is a token.

    Raises:
        CheckpointError: there is no such form.
    """
    if name is None:
        name = "mistral_instruct" if text_type == "mistral" else "chatml_direct" if has_chatml_tokens else "vicuna_v1"
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"no conversation form is named {name!r}; there are {', '.join(CONVERSATIONS)} (--conversation)"
        )
    return CONVERSATIONS[name]
