from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hivtp import Pipeline, Request, SamplingParams
from hivtp.export.checkpoint.folder import Checkpoint
from hivtp.export.checkpoint.processor import Processor
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.main import main
from hivtp_ops.errors import CheckpointError, SpecError
from tests.support.folders import edit_json

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_AND_TEXT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def written(*templates: tuple[str, str]) -> list[dict[str, str]]:
    """As tokenizer_config.json has several templates."""
    return [{"name": name, "template": f"{opening} {IMAGE_AND_TEXT}"} for name, opening in templates]


def named(folder: Path, *templates: tuple[str, str]) -> Path:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(folder / "tokenizer_config.json", chat_template=written(*templates))
    return folder


def template_of(folder: Path, name: str | None = None) -> str:
    return Processor.open(Checkpoint.open(folder), name).prompt["chat_template"].split()[0]


def test_of_several_templates_the_default_is_taken(broken: Path) -> None:
    named(broken, ("rag", "RAG"), ("default", "USUAL"), ("tool_use", "TOOLS"))
    assert template_of(broken) == "USUAL"
    assert template_of(broken, "rag") == "RAG"
    assert template_of(broken, "default") == "USUAL"


def test_without_a_default_a_choice_is_asked_for(broken: Path) -> None:
    named(broken, ("short", "SHORT"), ("long", "LONG"))
    with pytest.raises(
        CheckpointError, match="has the chat templates long, short, and none of them is the default; ch"
    ):
        template_of(broken)
    with pytest.raises(CheckpointError, match="none is named 'other'; choose one with --chat-template NAME"):
        template_of(broken, "other")
    assert template_of(broken, "long") == "LONG"


def test_templates_in_files_of_their_own_count_as_in_transformers(broken: Path) -> None:
    from transformers import AutoProcessor

    (broken / "chat_template.jinja").write_text(f"USUAL {IMAGE_AND_TEXT}")
    (broken / "additional_chat_templates").mkdir()
    (broken / "additional_chat_templates" / "rag.jinja").write_text(f"RAG {IMAGE_AND_TEXT}")
    assert template_of(broken) == "USUAL"
    assert template_of(broken, "rag") == "RAG"
    templates = AutoProcessor.from_pretrained(broken).chat_template
    assert {name: template.split()[0] for name, template in templates.items()} == {"default": "USUAL", "rag": "RAG"}


def test_a_name_where_there_is_one_template_is_refused(broken: Path) -> None:
    with pytest.raises(CheckpointError, match="has one chat template, without a name, so none is named 'rag'"):
        template_of(broken, "rag")
    assert template_of(broken, "default") == template_of(broken)
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template, so none is named 'default'"):
        template_of(broken, "default")
    with pytest.raises(SpecError, match="an encoder bundle answers no prompts; drop chat_template"):
        ExportSettings(graph="encoder", chat_template="rag")


def test_the_command_takes_the_name(broken: Path, tmp_path: Path, photo: Path) -> None:
    named(broken, ("short", "SHORT"), ("long", "LONG"))
    arguments = ["export", str(broken), str(tmp_path / "bundle"), "--quiet"]
    assert main(arguments) == 1
    assert not (tmp_path / "bundle").exists()
    assert main([*arguments, "--chat-template", "long"]) == 0
    prompt = json.loads((tmp_path / "bundle" / "processor" / "prompt.json").read_text())
    assert prompt["chat_template"].startswith("LONG")
    with Pipeline.load(tmp_path / "bundle") as pipeline:
        assert pipeline.generate(Request("What?", [photo], SamplingParams(max_new_tokens=2))).token_ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'][1]['text'] }}", "cannot be asked about an image: .*loses words or an image"),
        ("<image>", "cannot be asked about an image"),
        ("{{ nonsense(", "cannot be asked about an image: .*failed: TemplateSyntaxError"),
        ("{{ raise_exception('never') }}", "cannot be asked about an image: .*never"),
        ("{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", "cannot be asked about"),
        ("{{ ''.__class__.__mro__ }}", "cannot be asked about an image"),
    ],
)
def test_a_template_that_cannot_ask_about_an_image_is_refused_at_the_start(
    broken: Path, template: str, message: str
) -> None:
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=message):
        template_of(broken)


def test_every_special_token_reaches_the_template(broken: Path, tmp_path: Path, photo: Path) -> None:
    """Those with a name of their own included, as transformers passes them."""
    from tests.support.reference import HuggingFace

    edit_json(broken / "tokenizer_config.json", pad_token="<unk>", extra_special_tokens={"answer_token": "!"})
    template = "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ eos_token }}{{ answer_token }}" + IMAGE_AND_TEXT
    (broken / "chat_template.jinja").write_text(template)
    processor = Processor.open(Checkpoint.open(broken))
    content = [{"type": "image"}, {"type": "text", "text": "What is red?"}]
    text = processor.original.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<s><unk><unk></s>!<image>What is red?"
    assert processor.question_ids("What is red?") == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    export_bundle(broken, tmp_path / "bundle", ExportSettings(is_pruned=False), is_quiet=True)
    with Pipeline.load(tmp_path / "bundle") as pipeline:
        sampling = SamplingParams(max_new_tokens=6, temperature=0)
        found = pipeline.generate(Request("What is red?", [photo], sampling)).token_ids
    from hivtp.runtime.inputs.images import load_image

    assert found == HuggingFace(broken).generate("What is red?", [load_image(photo)], max_new_tokens=6)
