from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from pathlib import Path

# The template of llava-hf/llava-1.5-7b-hf.
LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# In the manner of the Qwen templates: a default system turn, line breaks, content of either form.
CHATML = """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<image>' }}
                {%- continue %}
            {%- endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# What else a template can use: tokens, a namespace, JSON, the generation tag, and what is not there.
EVERYTHING = """{{ bos_token }}{% set ns = namespace(n=0) %}
{% for message in messages %}
  {% for part in message['content'] %}{% set ns.n = ns.n + 1 %}
    {{- '<image>' if part.type == 'image' }}
  {% endfor %}
  {% generation %}{% set ns.n = ns.n + 10 %}{{ message['content'][-1]['text'] }}{% endgeneration %}
{% endfor %}
{{ ns.n }} {{ {'b': 'é<&>', 'a': [1, none]} | tojson(sort_keys=True, indent=1) }} {{ dict(a=1) | tojson }}
{{ tools is none }} {{ documents is defined }} {{ pad_token }} {{ unknown }} {{ strftime_now('%Y') | length }}
{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}{{ eos_token }}"""
VICUNA = (
    "{{ bos_token }}A chat. {% for message in messages %}"
    "{{ message['role'].upper() + ': ' + message['content'] | trim + ' ' }}{% endfor %}ASSISTANT:"
)
STRINGIFIES = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
DROPS_LISTS = (
    "{% for m in messages %}{% if m.content is string %}Human: {{ m.content }}{% endif %}{% endfor %} Assistant:"
)
LOSES_IMAGES = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %} Assistant:"

PROMPTS = ["What is this?", "  Two\n lines \n", "a <b> & 'c' \"d\" {{ 7 * 7 }}", "日本 🙂", "A"]


def _template(chat_template: str | None) -> PromptTemplate:
    return PromptTemplate(chat_template, bos_token="<s>", eos_token="</s>")


def _backend() -> Backend:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)]
    backend = Backend(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    _backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def image_token_id(reference: Any) -> int:
    token_id: int = reference.convert_tokens_to_ids("<image>")
    return token_id


def _expected(reference: Any, chat_template: str, content: Any) -> str:
    text: str = reference.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    return text


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_image_renders_as_in_transformers(reference: Any, chat_template: str, prompt: str) -> None:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = _template(chat_template).render(prompt, num_images=1)
    assert text == _expected(reference, chat_template, content)


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_alone_renders_as_in_transformers(reference: Any, chat_template: str, prompt: str) -> None:
    text = _template(chat_template).render(prompt, num_images=0)
    assert text == _expected(reference, chat_template, [{"type": "text", "text": prompt}])


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
def test_image_tokens_in_the_prompt_stay_where_they_are(reference: Any, chat_template: str) -> None:
    prompt = "Compare <image> with <image>, please."
    text = _template(chat_template).render(prompt, num_images=2)
    assert prompt in text
    assert text == _expected(reference, chat_template, [{"type": "text", "text": prompt}])


@pytest.mark.parametrize("chat_template", [VICUNA, STRINGIFIES, DROPS_LISTS])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_template_of_plain_text_gets_plain_text(reference: Any, chat_template: str, prompt: str) -> None:
    template = _template(chat_template)
    text = template.render(prompt, num_images=1)
    assert text == _expected(reference, chat_template, f"<image>\n{prompt}")
    assert template.render(prompt, num_images=0) == _expected(reference, chat_template, prompt)
    assert template.render("<image><image>" + prompt, num_images=2).count("<image>") == 2


def test_llava_renders_as_it_was_trained() -> None:
    expected = "USER: <image>\nWhat is this? ASSISTANT:"
    assert _template(LLAVA).render("What is this?", 1) == expected
    assert _template(None).render("What is this?", 1) == expected


def test_without_a_template_the_form_is_that_of_llava() -> None:
    template = _template(None)
    assert template.render("Say hi.", num_images=0) == "USER: Say hi. ASSISTANT:"
    assert template.render("This <image>?", num_images=1) == "USER: This <image>? ASSISTANT:"


def test_a_template_without_tokens_renders_nothing_for_them() -> None:
    template = PromptTemplate(EVERYTHING, bos_token=None, eos_token=None)
    text = template.render("What?", num_images=1)
    assert text.startswith("<image>")
    assert "None" not in text


def test_another_image_token_is_respected() -> None:
    template = PromptTemplate(None, None, None, image_token="[IMG]")
    assert template.render("Why <image>?", num_images=1) == "USER: [IMG]\nWhy <image>? ASSISTANT:"


@pytest.mark.parametrize("chat_template", [LLAVA, VICUNA, None])
@pytest.mark.parametrize("injection", ["{{ 7 * 7 }}", "{% raw %}", "{# gone #}", "{{ raise_exception('x') }}"])
def test_jinja_in_a_prompt_is_text(chat_template: str | None, injection: str) -> None:
    assert injection in _template(chat_template).render(injection, num_images=1)


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        _template(LLAVA).render(prompt, num_images=1)


@pytest.mark.parametrize("prompt", [None, b"What?", 3, ["What?"]])
def test_a_prompt_that_is_no_str_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match=f"not {type(prompt).__name__}"):
        _template(LLAVA).render(prompt, num_images=1)


def test_a_prompt_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="surrogates"):
        _template(LLAVA).render("a\ud800b", num_images=1)


@pytest.mark.parametrize(
    ("prompt", "num_marks", "num_images"),
    [("Compare.", 0, 2), ("<image> what?", 1, 0), ("<image> <image>", 2, 1), ("<image> what?", 1, 2)],
)
@pytest.mark.parametrize("chat_template", [LLAVA, None])
def test_image_tokens_must_match_the_images(
    chat_template: str | None, prompt: str, num_marks: int, num_images: int
) -> None:
    with pytest.raises(PromptError, match=f"has {num_marks} <image> marks and {num_images} images.*once per image"):
        _template(chat_template).render(prompt, num_images)


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only system turns') }}", "only system turns"),
        ("{{ messages[0].content[0].text.missing.deeper }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace({'_private': 1}) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_named_with_its_reason(chat_template: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as raised:
        _template(chat_template).render("What?", num_images=1)
    assert repr(chat_template)[:40] in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("chat_template", [LOSES_IMAGES, "<image> ASSISTANT:", "<image> <image>", ""])
def test_a_template_that_loses_the_prompt_or_the_image_is_refused(chat_template: str) -> None:
    with pytest.raises(PromptError, match="loses the prompt or an image"):
        _template(chat_template).render("What?", num_images=1)


def test_a_template_that_loses_image_tokens_of_the_prompt_is_refused() -> None:
    chat_template = LLAVA.replace("content['text']", "content['text'].replace('<image>', '')")
    assert _template(chat_template).render("What?", num_images=1).count("<image>") == 1
    with pytest.raises(PromptError, match="2 images became 0 <image>"):
        _template(chat_template).render("<image> or <image>?", num_images=2)


def test_a_template_that_loses_some_prompts_is_refused() -> None:
    template = _template(LLAVA.replace("content['text']", "content['text'].split('</think>')[-1]"))
    with pytest.raises(PromptError, match="loses the prompt"):
        template.render("What is </think> for?", num_images=1)


def test_a_template_is_a_value() -> None:
    template = _template(LLAVA)
    template.render("What?", num_images=1)
    assert pickle.loads(pickle.dumps(template)) == template


@pytest.mark.parametrize("chat_template", [LLAVA, VICUNA, None])
def test_ids_are_those_of_the_reference_with_one_per_image(
    reference: Any, tokenizer: Tokenizer, image_token_id: int, chat_template: str | None
) -> None:
    template = _template(chat_template)
    text = template.render("Is <image> like <image>?", num_images=2)
    ids = template.encode(tokenizer, text, image_token_id)
    assert ids == reference(text, add_special_tokens=chat_template != VICUNA)["input_ids"]
    assert ids.count(image_token_id) == 2
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_special_tokens_are_added_where_there_is_no_bos_token(tokenizer: Tokenizer, image_token_id: int) -> None:
    text = "<s>Hello"
    assert PromptTemplate(None, None, None).encode(tokenizer, text, image_token_id)[:2] == [1, 1]
    assert _template(None).encode(tokenizer, text, image_token_id).count(1) == 1


def test_an_image_token_unknown_to_the_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    template = PromptTemplate(None, "<s>", "</s>", image_token="[IMG]")
    with pytest.raises(PromptError, match=r"1 \[IMG\] and the tokenizer made 0 tokens 5"):
        template.encode(tokenizer, template.render("What?", num_images=1), image_token_id=5)


def test_other_text_that_becomes_an_image_token_is_refused(tokenizer: Tokenizer, image_token_id: int) -> None:
    template = PromptTemplate(None, "<s>", "</s>", image_token="[IMG]")
    with pytest.raises(PromptError, match="must be an added token"):
        template.encode(tokenizer, template.render("<image>?", num_images=0), image_token_id)
