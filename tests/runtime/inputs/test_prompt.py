from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from hivtp.runtime.inputs.messages import ImagePart, Message, user_message
from hivtp.runtime.inputs.prompt import PromptTemplate
from hivtp.runtime.inputs.tokenizer import Tokenizer
from hivtp_ops.errors import BundleError, PromptError

if TYPE_CHECKING:
    from collections.abc import Callable
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


IMAGE = b"the template sees no pixels"


def _template(chat_template: str | None) -> PromptTemplate:
    return PromptTemplate(chat_template, {"bos_token": "<s>", "eos_token": "</s>"})


def _question(prompt: str, num_images: int) -> list[Message]:
    return [user_message(prompt, [IMAGE] * num_images, "<image>")]


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


@pytest.fixture(scope="module")
def assert_writes(tokenizer: Tokenizer, reference: Any, image_token_id: int) -> Callable[..., None]:
    """Checks text and token ids of a conversation."""

    def check(template: PromptTemplate, messages: list[Message], expected: str) -> None:
        text = template.render(messages, tokenizer)
        assert template._literals(tokenizer).plain(text) == expected
        ids = template.encode(tokenizer, text, image_token_id)
        bos_token = template.tokens.get("bos_token")
        has_bos_token = bos_token is not None and expected.startswith(bos_token)
        assert ids == reference(expected, add_special_tokens=not has_bos_token)["input_ids"]
        template.close()

    return check


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_image_is_written_as_in_transformers(
    reference: Any, assert_writes: Any, chat_template: str, prompt: str
) -> None:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    assert_writes(_template(chat_template), _question(prompt, 1), _expected(reference, chat_template, content))


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_alone_is_written_as_in_transformers(
    reference: Any, assert_writes: Any, chat_template: str, prompt: str
) -> None:
    expected = _expected(reference, chat_template, [{"type": "text", "text": prompt}])
    assert_writes(_template(chat_template), _question(prompt, 0), expected)


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
def test_image_marks_in_the_prompt_stay_where_they_are(reference: Any, assert_writes: Any, chat_template: str) -> None:
    prompt = "Compare <image> with <image>, please."
    expected = _expected(reference, chat_template, [{"type": "text", "text": prompt}])
    assert prompt in expected
    assert_writes(_template(chat_template), _question(prompt, 2), expected)


@pytest.mark.parametrize("chat_template", [VICUNA, STRINGIFIES, DROPS_LISTS])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_template_of_plain_text_gets_plain_text(
    reference: Any, assert_writes: Any, tokenizer: Tokenizer, chat_template: str, prompt: str
) -> None:
    template = _template(chat_template)
    assert_writes(template, _question(prompt, 1), _expected(reference, chat_template, f"<image>\n{prompt}"))
    assert_writes(template, _question(prompt, 0), _expected(reference, chat_template, prompt))
    text = template.render(_question("<image><image>" + prompt, 2), tokenizer)
    assert text.count("<image>") == 2
    template.close()


def _turns(*content: Any) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(content)
    return [{"role": role, "content": words} for role, words in zip(roles, content, strict=False)]


@pytest.mark.parametrize("chat_template", [LLAVA, CHATML, EVERYTHING])
def test_a_conversation_is_written_as_in_transformers(reference: Any, assert_writes: Any, chat_template: str) -> None:
    def part(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    turns = [
        {"role": "system", "content": part("Be brief.")},
        *_turns([{"type": "image"}, *part("What is this?")], part("A cat."), part("And {{ this }}?")),
    ]
    expected = reference.apply_chat_template(
        turns, chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )
    messages = [
        Message("system", ["Be brief."]),
        Message("user", [ImagePart(IMAGE), "What is this?"]),
        Message("assistant", ["A cat."]),
        Message("user", ["And {{ this }}?"]),
    ]
    assert_writes(_template(chat_template), messages, expected)


def test_llava_is_written_as_it_was_trained(assert_writes: Any) -> None:
    expected = "USER: <image>\nWhat is this? ASSISTANT:"
    assert_writes(_template(LLAVA), _question("What is this?", 1), expected)
    assert_writes(_template(None), _question("What is this?", 1), expected)


def test_without_a_template_the_form_is_that_of_llava(assert_writes: Any) -> None:
    template = _template(None)
    assert_writes(template, _question("Say hi.", 0), "USER: Say hi. ASSISTANT:")
    assert_writes(template, _question("This <image>?", 1), "USER: This <image>? ASSISTANT:")
    turns = [
        Message("system", ["Be brief."]),
        Message("user", [ImagePart(IMAGE), "What?"]),
        Message("assistant", ["A cat."]),
        Message("user", ["Why?"]),
    ]
    assert_writes(template, turns, "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:")


def test_a_template_without_tokens_writes_nothing_for_them(tokenizer: Tokenizer) -> None:
    template = PromptTemplate(EVERYTHING)
    text = template.render(_question("What?", 1), tokenizer)
    assert text.startswith("<image>")
    assert "None" not in text
    template.close()


def test_every_special_token_reaches_the_template(tokenizer: Tokenizer) -> None:
    source = "{{ unk_token }}|{{ image_token }}|{{ pad_token }}|{{ messages[0].content[-1].text }}"
    template = PromptTemplate(source, {"unk_token": "<unk>", "image_token": "<image>"})
    assert template.render(_question("What?", 1), tokenizer) == "<unk>|<image>||What?"
    template.close()


def test_another_image_token_is_respected(tokenizer: Tokenizer) -> None:
    template = PromptTemplate(None, image_token="[IMG]")
    text = template.render(_question("Why [IMG]?", 1), tokenizer)
    assert text.startswith("USER: [IMG]\nWhy ")
    assert text.count("[IMG]") == 1
    assert template._literals(tokenizer).plain(text) == "USER: [IMG]\nWhy [IMG]? ASSISTANT:"


@pytest.mark.parametrize("chat_template", [LLAVA, VICUNA, None])
@pytest.mark.parametrize("injection", ["{{ 7 * 7 }}", "{% raw %}", "{# gone #}", "{{ raise_exception('x') }}"])
def test_jinja_in_a_prompt_is_text(tokenizer: Tokenizer, chat_template: str | None, injection: str) -> None:
    template = _template(chat_template)
    assert injection in template.render(_question(injection, 1), tokenizer)
    template.close()


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, prompt: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        _question(prompt, 1)
    for chat_template in (LLAVA, None):
        template = _template(chat_template)
        for messages in ([], [Message("user", [])], [Message("user", [prompt])]):
            with pytest.raises(PromptError, match="empty"):
                template.render(messages, tokenizer)


def test_an_image_alone_is_a_prompt(assert_writes: Any) -> None:
    assert_writes(_template(None), [Message("user", [ImagePart(IMAGE)])], "USER: <image>\n ASSISTANT:")


@pytest.mark.parametrize("prompt", [None, b"What?", 3, ["What?"]])
def test_a_prompt_that_is_not_a_str_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match=f"not a {type(prompt).__name__}"):
        _question(prompt, 1)


def test_a_prompt_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="surrogates"):
        _question("a\ud800b", 1)


@pytest.mark.parametrize(
    ("prompt", "num_marks", "num_images"),
    [("Compare.", 0, 2), ("<image> what?", 1, 0), ("<image> <image>", 2, 1), ("<image> what?", 1, 2)],
)
def test_image_marks_must_match_the_images(prompt: str, num_marks: int, num_images: int) -> None:
    with pytest.raises(PromptError, match=f"has {num_marks} <image> marks and {num_images} images.*once per image"):
        _question(prompt, num_images)


def test_without_marks_the_images_come_before_the_words(tokenizer: Tokenizer, image_token_id: int) -> None:
    template = _template(None)
    text = template.render([user_message("Is <image> a mark?", [IMAGE, IMAGE], None)], tokenizer)
    assert text.startswith("USER: <image>\n<image>\nIs ")
    ids = template.encode(tokenizer, text, image_token_id)
    assert ids.count(image_token_id) == 2
    assert tokenizer.decode(ids).endswith("Is <image> a mark? ASSISTANT:")


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
        ("{{ dict.mro() }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_is_named_with_its_reason(tokenizer: Tokenizer, chat_template: str, reason: str) -> None:
    template = _template(chat_template)
    with pytest.raises(PromptError, match=reason) as raised:
        template.render(_question("What?", 1), tokenizer)
    assert repr(chat_template)[:40] in str(raised.value)
    template.close()


@pytest.mark.parametrize("chat_template", [LOSES_IMAGES, "<image> ASSISTANT:", "<image> <image>", ""])
def test_a_template_that_loses_words_or_the_image_is_refused(tokenizer: Tokenizer, chat_template: str) -> None:
    template = _template(chat_template)
    with pytest.raises(PromptError, match="loses words or an image"):
        template.render(_question("What?", 1), tokenizer)
    template.close()


def test_a_template_that_loses_image_tokens_of_the_prompt_is_refused(tokenizer: Tokenizer) -> None:
    template = _template(LLAVA.replace("content['text']", "content['text'].replace('<image>', '')"))
    assert template.render(_question("What?", 1), tokenizer).count("<image>") == 1
    with pytest.raises(PromptError, match="2 images became 0 <image>"):
        template.render(_question("<image> or <image>?", 2), tokenizer)
    template.close()


def test_a_template_that_loses_some_prompts_is_refused(tokenizer: Tokenizer) -> None:
    template = _template(LLAVA.replace("content['text']", "content['text'].split('THINK')[-1]"))
    with pytest.raises(PromptError, match="loses words"):
        template.render(_question("What is THINK for?", 1), tokenizer)
    template.close()


def test_a_template_that_writes_lone_surrogates_is_refused(tokenizer: Tokenizer) -> None:
    template = _template(LLAVA + "{{ '\\ud800' }}")
    with pytest.raises(PromptError, match="surrogates"):
        template.render(_question("What?", 1), tokenizer)
    template.close()


def test_a_template_is_a_value(tokenizer: Tokenizer) -> None:
    template = _template(LLAVA)
    template.render(_question("What?", 1), tokenizer)
    assert template == _template(LLAVA)
    template.close()


@pytest.mark.parametrize("chat_template", [LLAVA, VICUNA, None])
def test_ids_are_those_of_the_reference_with_one_per_image(
    reference: Any, tokenizer: Tokenizer, image_token_id: int, chat_template: str | None
) -> None:
    template = _template(chat_template)
    text = template.render(_question("Is <image> like <image>?", 2), tokenizer)
    ids = template.encode(tokenizer, text, image_token_id)
    assert ids == reference(text, add_special_tokens=chat_template != VICUNA)["input_ids"]
    assert ids.count(image_token_id) == 2
    assert ids.count(1) == 1
    assert ids[0] == 1
    template.close()


def test_special_tokens_are_added_where_there_is_no_bos_token(tokenizer: Tokenizer, image_token_id: int) -> None:
    text = "<s>Hello"
    assert PromptTemplate(None).encode(tokenizer, text, image_token_id)[:2] == [1, 1]
    assert _template(None).encode(tokenizer, text, image_token_id).count(1) == 1


def test_words_alone_hold_no_control_token(reference: Any, tokenizer: Tokenizer) -> None:
    template = _template(None)
    assert template.encode_words("A cat.", tokenizer) == reference("A cat.")["input_ids"]
    ids = template.encode_words("</s> <image> <s>", tokenizer)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0)
    assert tokenizer.decode(ids) == "</s> <image> <s>"


def test_an_image_token_unknown_to_the_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    template = PromptTemplate(None, image_token="[IMG]")
    text = template.render(_question("What?", 1), tokenizer)
    with pytest.raises(PromptError, match=r"1 \[IMG\] and the tokenizer made 0 tokens 5"):
        template.encode(tokenizer, text, image_token_id=5)


def test_other_text_that_becomes_an_image_token_is_refused(tokenizer: Tokenizer, image_token_id: int) -> None:
    template = PromptTemplate(None, image_token="[IMG]")
    with pytest.raises(PromptError, match="must be an added token"):
        template.encode(tokenizer, "USER: <image>? ASSISTANT:", image_token_id)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"chat_template": None, "tokens": {}},
        {"chat_template": None, "tokens": {}, "image_token": "<image>", "more": 1},
        {"chat_template": 3, "tokens": {}, "image_token": "<image>"},
        {"chat_template": ["a"], "tokens": {}, "image_token": "<image>"},
        {"chat_template": None, "tokens": [], "image_token": "<image>"},
        {"chat_template": None, "tokens": {"bos_token": None}, "image_token": "<image>"},
        {"chat_template": None, "tokens": {"bos_token": ""}, "image_token": "<image>"},
        {"chat_template": None, "tokens": {"bos_token": "\ud800"}, "image_token": "<image>"},
        {"chat_template": None, "tokens": {}, "image_token": ""},
        {"chat_template": None, "tokens": {}, "image_token": " "},
        {"chat_template": None, "tokens": {}, "image_token": "<" * 257},
        {"chat_template": None, "tokens": {}, "image_token": "\udfff"},
        {"chat_template": "\ud800", "tokens": {}, "image_token": "<image>"},
    ],
)
def test_a_damaged_prompt_json_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"prompt\.json"):
        PromptTemplate.from_json(values)


def test_what_the_export_writes_is_read_back() -> None:
    values = {"chat_template": LLAVA, "tokens": {"bos_token": "<s>"}, "image_token": "<image>"}
    assert PromptTemplate.from_json(values) == PromptTemplate(LLAVA, {"bos_token": "<s>"})
