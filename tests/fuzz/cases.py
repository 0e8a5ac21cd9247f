"""What is tried in one case of a fuzz test: something damaged, and what a user would do with it."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hivtp import Pipeline, Request
from hivtp.engines.bundle import Bundle, sha256_of
from hivtp.engines.tensorrt.plan import read_plan
from hivtp_ops.errors import HivtpError, RequestError
from tests.engines.tensorrt import fake_gpu
from tests.engines.tensorrt.plans import H200, add
from tests.fuzz.arguments import FEW, PICTURE, any_image, any_list, any_request, any_sampling, any_text, encoded_images
from tests.fuzz.mutations import mutated_bytes, mutated_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

# A message is for people: it must be there, and not drown them.
MAX_MESSAGE = 5000


@dataclass
class Fuzz:
    """Bundles to damage, and a folder for what comes of it.

    Attributes:
        bundles: whole ones.
        folder: everything that a case writes lies here.
    """

    bundles: list[Path]
    folder: Path

    def __post_init__(self) -> None:
        self.pipelines = [Pipeline.load(bundle) for bundle in self.bundles]

    def run(self, random: Random, kind: str) -> str:
        """Try one case; what came of it, "works" or the name of the error.

        Anything but a HivtpError is raised.
        """
        try:
            KINDS[kind](self, random)
        except RequestError as error:
            # It stands for an exception that nobody foresaw.
            raise AssertionError("an unforeseen exception") from error
        except HivtpError as error:
            name, message = type(error).__name__, str(error)
        else:
            return "works"
        assert 0 < len(message) < MAX_MESSAGE, message
        return name

    def copy(self, random: Random) -> Path:
        """A bundle whose files can be replaced."""
        folder = self.folder / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(random.choice(self.bundles), folder, copy_function=os.link)
        return folder


def write(bundle: Path, name: str, content: bytes, random: Random) -> None:
    """Put a file into a bundle, and mostly into its manifest too, so that it is read."""
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    if random.random() < 0.95:
        file = bundle / "manifest.json"
        manifest = json.loads(file.read_bytes())
        manifest["files"][name] = {"num_bytes": len(content), "sha256": sha256_of(bundle / name)}
        replace(file, json.dumps(manifest).encode())


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def use(bundle: Path, random: Random) -> None:
    """Load a bundle and ask it something."""
    with Pipeline.load(bundle, check_hashes=random.random() < 0.3) as pipeline:
        request = random.choice(
            [
                Request("what", [PICTURE], FEW),
                Request("hello", (), FEW),
                Request("<image> or <image>", [PICTURE, PICTURE[:20]], FEW),
                Request("what", [PICTURE], FEW, system="Be brief."),
            ]
        )
        pipeline.generate(request)


def fuzz_manifest(fuzz: Fuzz, random: Random) -> None:
    bundle = fuzz.copy(random)
    file = bundle / "manifest.json"
    manifest = mutated_json(json.loads(file.read_bytes()), random, random.choice([1, 1, 1, 2, 4]))
    replace(file, json.dumps(manifest).encode())
    use(bundle, random)


def fuzz_manifest_bytes(fuzz: Fuzz, random: Random) -> None:
    bundle = fuzz.copy(random)
    file = bundle / "manifest.json"
    replace(file, mutated_bytes(file.read_bytes(), random))
    use(bundle, random)


def fuzz_settings(fuzz: Fuzz, random: Random) -> None:
    bundle = fuzz.copy(random)
    name = random.choice(["prompt.json", "image_processor.json"])
    content = (bundle / "processor" / name).read_bytes()
    if random.random() < 0.3:
        content = mutated_bytes(content, random)
    else:
        content = json.dumps(mutated_json(json.loads(content), random, random.choice([1, 1, 2, 4]))).encode()
    write(bundle, f"processor/{name}", content, random)
    use(bundle, random)


TEMPLATES = (
    "{% for i in range(999999999) %}x{% endfor %}",
    "{{ 'x' * 999999999999 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages }}",
    "{{ messages[0]['content'] }}",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% set x = namespace(a=1) %}{% set x._b = 2 %}",
    "<image>\ud800",
    "\ue0000\ue001<image>",
    "{{ messages[0]['content'][0]['text'] | tojson }}<image>",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'USER: <image>\n' + messages[0]['content'][-1]['text'] + '</s>' * 2000 }}",
)


def fuzz_template(fuzz: Fuzz, random: Random) -> None:
    bundle = fuzz.copy(random)
    settings = json.loads((bundle / "processor/prompt.json").read_bytes())
    template = random.choice(TEMPLATES)
    if random.random() < 0.3:
        template = mutated_bytes(template.encode(errors="ignore"), random).decode(errors="replace")
    settings["chat_template"] = template
    write(bundle, "processor/prompt.json", json.dumps(settings).encode(), random)
    use(bundle, random)


# Parts of a tokenizer that load, and on which the library then fails, panics, or takes its time.
TOKENIZER_PARTS: tuple[dict[str, Any], ...] = (
    {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}},
    {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**32 - 1}}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "^(a+)+$"}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "ab"}},
    {"normalizer": {"type": "Prepend", "prepend": "y" * 10_000}},
    {"post_processor": {"type": "BertProcessing", "sep": ["x", 5], "cls": ["y", 2**32 - 1]}},
    {"decoder": {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"}},
    {"decoder": {"type": "Strip", "content": " ", "start": 2**62, "stop": 2**62}},
    {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
)


def fuzz_tokenizer(fuzz: Fuzz, random: Random) -> None:
    bundle = fuzz.copy(random)
    content = (bundle / "processor/tokenizer.json").read_bytes()
    if random.random() < 0.3:
        content = mutated_bytes(content, random)
    else:
        tokenizer = json.loads(content)
        # Most of a tokenizer is its vocabulary, and most of what can go wrong is not.
        parts = {name: part for name, part in tokenizer.items() if name != "model"}
        changed = mutated_json(parts, random, random.choice([1, 1, 2, 4]))
        if random.random() < 0.7 and isinstance(changed, dict):
            tokenizer |= changed
        if random.random() < 0.5:
            model = {name: part for name, part in tokenizer.get("model", {}).items() if name not in ("vocab", "merges")}
            changed = mutated_json(model, random)
            tokenizer["model"] = {**tokenizer.get("model", {}), **changed} if isinstance(changed, dict) else changed
        if random.random() < 0.2:
            tokenizer |= random.choice(TOKENIZER_PARTS)
        content = json.dumps(tokenizer).encode()
    write(bundle, "processor/tokenizer.json", content, random)
    use(bundle, random)


def fuzz_arrays(fuzz: Fuzz, random: Random) -> None:
    bundle = fuzz.copy(random)
    name = random.choice([file.relative_to(bundle).as_posix() for file in sorted(bundle.rglob("*.npy"))])
    content = (bundle / name).read_bytes()
    # The header: changes to the numbers only make another model.
    length = random.choice([128, 128, 128, len(content)])
    content = mutated_bytes(content[:length], random) + content[length:]
    if random.random() < 0.2:
        array = np.frombuffer(content[128:], np.uint8)
        file = io.BytesIO()
        np.save(file, array.astype(random.choice(["f2", "f8", ">f4", "i4", "c8", "U2", "?"])))
        content = file.getvalue()
    write(bundle, name, content, random)
    use(bundle, random)


def fuzz_sidecar(fuzz: Fuzz, random: Random) -> None:
    folder = fuzz.copy(random)
    bundle = Bundle.open(folder)
    sidecar = add(bundle).with_suffix(".json")
    content = sidecar.read_bytes()
    if random.random() < 0.3:
        content = mutated_bytes(content, random)
    else:
        content = json.dumps(mutated_json(json.loads(content), random, random.choice([1, 1, 2, 4]))).encode()
    sidecar.write_bytes(content)
    read_plan(bundle, fake_gpu.library(), H200, trust_plans=random.random() < 0.5)


def fuzz_image(fuzz: Fuzz, random: Random) -> None:
    image: Any = mutated_bytes(random.choice(list(encoded_images().values())), random)
    if random.random() < 0.2:
        image = fuzz.folder / "image"
        image.write_bytes(mutated_bytes(random.choice(list(encoded_images().values())), random))
    random.choice(fuzz.pipelines).generate("what", [image], FEW)


def fuzz_request(fuzz: Fuzz, random: Random) -> None:
    pipeline = random.choice(fuzz.pipelines)
    match random.randrange(4):
        case 0:
            requests = [Request("what", [PICTURE], FEW), any_request(fuzz.folder, random)]
            first, second = pipeline.generate_batch(requests)
            assert not isinstance(first, HivtpError), "one request cost another its answer"
            if isinstance(second, HivtpError):
                raise second
        case 1:
            stream = pipeline.stream(any_request(fuzz.folder, random))
            text = "".join(stream)
            assert text == stream.answer.text
        case 2:
            chat = pipeline.chat(random.choice([None, any_text(random)]))
            chat.ask(any_text(random), any_list(random, [any_image(fuzz.folder, random)]), any_sampling(random))
        case _:
            pipeline.generate(any_request(fuzz.folder, random))


KINDS: dict[str, Callable[[Fuzz, Random], None]] = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}
# In each round: what costs little is tried more often.
ROUND = [*KINDS, *["request"] * 6, *["image"] * 3, *["sidecar", "manifest", "manifest_bytes"]]
