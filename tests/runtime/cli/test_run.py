from __future__ import annotations

import json

import pytest
from PIL import Image

from hivtp import Pipeline, SamplingParams
from tests.support.command import hivtp_run, shell

PROMPT = "What is in the picture?"
TWENTY = SamplingParams(max_new_tokens=20)


def test_the_answer_comes_first_then_the_counts_and_timings(pruned_bundle, pruned, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 20)
    assert (done.returncode, done.stderr) == (0, "")
    answer, report = done.stdout.split("\n\n", 1)
    assert answer == pruned.generate(PROMPT, [photo], TWENTY).text
    names = [line.split("  ")[0] for line in report.splitlines()]
    assert names == [
        "visual tokens",
        "preprocess",
        "vision",
        "prefill",
        "first token",
        "decode",
        "20 tokens, finished by length",
        "ran by",
    ]
    assert report.endswith("fp32 graph in onnxruntime; fp32 decoder in onnxruntime\n")
    assert "visual tokens  64 -> 32" in report


def test_json_is_one_object_with_exactly_the_documented_keys(pruned_bundle, pruned, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 20, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == [
        "text",
        "token_ids",
        "num_prompt_tokens",
        "num_image_tokens",
        "num_kept_tokens",
        "kept_indices",
        "finish_reason",
        "stop",
        "logprobs",
        "timings",
        "ran",
    ]
    assert list(found["ran"]) == ["vision", "language"]
    assert list(found.pop("timings")) == [
        "preprocess_ms",
        "vision_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms_per_token",
    ]
    expected = pruned.generate(PROMPT, [photo], TWENTY).to_dict()
    del expected["timings"]
    assert found == expected


def test_several_images_stand_where_the_prompt_marks_them(pruned_bundle, pruned, photos):
    files = [photos / "astronaut.png", photos / "coffee.png"]
    prompt = "Is <image> brighter than <image>?"
    done = hivtp_run(
        pruned_bundle,
        "--image",
        files[0],
        prompt,
        "--image",
        files[1],
        "--max-new-tokens",
        20,
        "--json",
        "--check-hashes",
    )
    found = json.loads(done.stdout)
    assert found["token_ids"] == pruned.generate(prompt, files, TWENTY).token_ids
    assert len(found["kept_indices"]) == 2


def test_sampling_options_reach_the_sampler(pruned_bundle, pruned, photo):
    settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 3}
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 20, "--json", *options)
    expected = pruned.generate(PROMPT, [photo], SamplingParams(max_new_tokens=20, **settings)).token_ids
    assert json.loads(done.stdout)["token_ids"] == expected
    assert expected != pruned.generate(PROMPT, [photo], TWENTY).token_ids


def test_a_text_only_prompt_is_answered(pruned_bundle):
    done = hivtp_run(pruned_bundle, "how many dogs", "--max-new-tokens", 3, "--threads", 1)
    assert done.returncode == 0
    assert "visual tokens  0 -> 0" in done.stdout


def test_an_overlay_is_written_for_each_image(pruned_bundle, unpruned_bundle, photos, tmp_path):
    coffee, chelsea = ["--image", photos / "coffee.png"], ["--image", photos / "chelsea.png"]
    options = ["--max-new-tokens", 1, "--overlay"]
    one = hivtp_run(pruned_bundle, PROMPT, *coffee, *options, tmp_path / "one.png")
    assert (one.returncode, one.stderr) == (0, f"wrote {tmp_path / 'one.png'}\n")
    two = hivtp_run(unpruned_bundle, "<image> <image>", *coffee, *chelsea, *options, tmp_path / "two.png")
    assert two.returncode == 0
    assert {file.name for file in tmp_path.iterdir()} == {"one.png", "two-1.png", "two-2.png"}
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            assert min(picture.size) >= 672
            picture.load()


def test_what_a_terminal_cannot_show_is_replaced(pruned_bundle, pruned, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--max-new-tokens", 40, PYTHONIOENCODING="ascii")
    text = pruned.generate(PROMPT, [photo], SamplingParams(max_new_tokens=40)).text
    assert not text.isascii()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(text.encode("ascii", "replace").decode())


def test_options_of_the_prompt_reach_the_model(pruned_bundle, pruned, photo):
    options = ["--system", "Be brief.", "--repetition-penalty", 1.5, "--max-new-tokens", 20]
    found = json.loads(hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--json", *options).stdout)
    sampling = SamplingParams(max_new_tokens=20, repetition_penalty=1.5)
    expected = pruned.generate(PROMPT, [photo], sampling, system="Be brief.")
    assert found["token_ids"] == expected.token_ids
    stop = expected.text[5:8]
    found = json.loads(
        hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--json", *options, "--stop", "§", "--stop", stop).stdout
    )
    assert (found["stop"], found["finish_reason"]) == (stop, "stop")
    assert found["text"] == expected.text[: expected.text.index(stop)]


@pytest.mark.parametrize(
    "script",
    [
        'hivtp run "$1" "$3" --image "$2" --max-new-tokens 20 --json',
        'hivtp run "$1" "$3" --image <(cat "$2") --max-new-tokens 20 --json',
        'cat "$2" | hivtp run "$1" "$3" --image - --max-new-tokens 20 --json',
        'hivtp run "$1" "$3" --image - --max-new-tokens 20 --json < "$2"',
        'cat "$2" | hivtp run "$1" "$3" --image /dev/stdin --max-new-tokens 20 --json',
    ],
    ids=["file", "substitution", "pipe", "redirection", "device"],
)
def test_an_image_may_come_through_a_pipe(pruned_bundle, pruned, photo, script):
    done = shell(script, pruned_bundle, photo, PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["token_ids"] == pruned.generate(PROMPT, [photo], TWENTY).token_ids


def test_an_overlay_of_an_image_from_a_pipe_is_written(pruned_bundle, photo, tmp_path):
    script = 'cat "$2" | hivtp run "$1" what --image - --max-new-tokens 1 --overlay "$3"'
    done = shell(script, pruned_bundle, photo, tmp_path / "kept.webp")
    assert (done.returncode, done.stderr) == (0, f"wrote {tmp_path / 'kept.webp'}\n")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('true | hivtp run "$1" what --image -', "standard input gave no image: it ended at once"),
        ('hivtp run "$1" what --image - <&-', "standard input gave no image: it ended at once"),
        ('hivtp run "$1" what --image <(true)', "gave no image: it ended at once"),
        ('cat "$2" | hivtp run "$1" "<image> <image>" --image - --image -', "standard input gave no image"),
        ('echo words | hivtp run "$1" what --image -', "the bytes given: not an image, or a damaged one"),
    ],
)
def test_a_pipe_that_gives_no_image_is_one_line_and_exit_code_1(pruned_bundle, photo, script, message):
    done = shell(script, pruned_bundle, photo)
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 1


def test_a_pipeline_in_python_and_the_command_agree_on_defaults(pruned_bundle, photo):
    done = hivtp_run(pruned_bundle, PROMPT, "--image", photo, "--json")
    assert json.loads(done.stdout)["token_ids"] == Pipeline.load(pruned_bundle).generate(PROMPT, [photo]).token_ids
