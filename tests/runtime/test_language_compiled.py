"""The language backend transformers, compiled over static caches: the same tokens as uncompiled.

What torch.compile makes of the model is tested by the slow tests; the others run the same code as it stands.
"""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.checkpoints import make_checkpoint
from hivtp import Pipeline, Request
from hivtp.export.exporter import export_bundle
from hivtp.export.settings import ExportSettings
from hivtp.runtime.cli import main
from hivtp.runtime.images import load_image
from hivtp.runtime.language import static_cache
from hivtp.runtime.language.base import DecodeRequest
from hivtp.runtime.language.settings import LanguageSettings
from hivtp_ops.errors import EngineError, OutOfMemoryError, SettingsError
from tests.answers import alone, assert_same_alone, assert_same_together, embeddings, greedy, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from hivtp.runtime.language.transformers import TransformersLanguage

NUM_TOKENS = 16
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")


@dataclass(frozen=True)
class Pair:
    """One bundle and its checkpoint in transformers, as it stands and compiled."""

    checkpoint: Path
    bundle: Path
    plain: Pipeline
    compiled: Pipeline

    @property
    def language(self) -> TransformersLanguage:
        language: Any = self.compiled.language
        return language


def load(bundle: Path, checkpoint: Path, **settings: Any) -> Pipeline:
    return Pipeline.load(bundle, num_threads=1, language="transformers", checkpoint=checkpoint, **settings)


def load_pair(bundle: Path, checkpoint: Path, **settings: Any) -> Pair:
    plain = load(bundle, checkpoint, **settings)
    return Pair(checkpoint, bundle, plain, load(bundle, checkpoint, language_compile=True, **settings))


@pytest.fixture
def as_it_stands(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    """Loads a pair of which nothing is compiled, and whose caches begin so small that sequences have to move."""
    monkeypatch.setattr(torch, "compile", lambda function, **_settings: function)
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 128)
    return load_pair


@pytest.fixture
def llava(as_it_stands: Callable[..., Pair], tiny_checkpoint: Path, varying_bundle: Path) -> Pair:
    """LLaVA-1.5 with a rule that keeps as many patches as the picture makes it."""
    return as_it_stands(varying_bundle, tiny_checkpoint)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LLaVA-NeXT with a Mistral whose attention sees 24 positions back."""
    folder = tmp_path_factory.mktemp("next")
    text = {"initializer_range": 0.2, "max_position_embeddings": 2048, "sliding_window": 24}
    checkpoint = make_checkpoint(folder / "checkpoint", family="llava_next", language="mistral", text=text)
    bundle = export_bundle(checkpoint, folder / "bundle", ExportSettings(preset="192"), is_quiet=True)
    return bundle.folder, checkpoint


@pytest.fixture(params=["llava", "llava_next"])
def pair(request: pytest.FixtureRequest, as_it_stands: Callable[..., Pair], sliding: tuple[Path, Path]) -> Pair:
    return as_it_stands(*sliding) if request.param == "llava_next" else request.getfixturevalue("llava")


@pytest.fixture
def requests(photos: Path) -> list[Request]:
    sizes = [(150, 60), (64, 64), (50, 130)]
    pictures = [load_image(photos / name).resize(size) for name, size in zip(PHOTOS, sizes, strict=True)]
    return [
        Request("What is in the picture?", [pictures[0]], NUM_TOKENS),
        Request("how many dogs", (), 7),
        Request("Is <image> brighter than <image>?", pictures[1:], 120),
        Request("where is it <image>", [pictures[2]], 1),
        Request("a " * 150, (), NUM_TOKENS),
        Request("What is in the picture?", [pictures[1]], 12, temperature=1.0, seed=5),
        Request("What is in the picture?", [pictures[0]], NUM_TOKENS),
    ]


def test_answers_equal_the_uncompiled_ones(pair: Pair, requests: list[Request]) -> None:
    assert_same_alone(pair.compiled, pair.plain, requests)


def test_answers_of_a_batch_equal_the_uncompiled_ones(pair: Pair, requests: list[Request]) -> None:
    assert_same_together(pair.compiled, pair.plain, requests)


def test_conversations_equal_the_uncompiled_ones(pair: Pair, photos: Path) -> None:
    """With turns that move to a larger cache, and caches that are cut, since a turn was given up."""
    chats = [pair.plain.chat(), pair.compiled.chat()]
    turns = [("What is in the picture?", [PHOTOS[0]]), ("how many dogs", []), ("or rather <image>", [PHOTOS[1]])]
    for question, names in [*turns, ("why", [])]:
        images = [load_image(photos / name).resize((90, 70)) for name in names]
        for chat in chats:
            next(chat.stream("a b c d e", max_new_tokens=NUM_TOKENS))
        first, second = (chat.ask(question, images, max_new_tokens=NUM_TOKENS) for chat in chats)
        assert same(first, second)
    assert chats[0].turns == chats[1].turns
    assert chats[0]._cache.length == chats[1]._cache.length > 150


def test_random_sequences_in_turn_equal_the_uncompiled_ones(llava: Pair) -> None:
    random = np.random.default_rng(3)
    for round_number in range(2):
        sequences = [(embeddings(random.integers(1, 450), seed), int(random.integers(1, 50))) for seed in range(4)]
        streams = [llava.language.generate(embeds, num, greedy) for embeds, num in sequences]
        tokens: list[list[int]] = [[] for _ in streams]
        while any(streams):
            for index, stream in enumerate(streams):
                if stream is not None and (token_id := next(stream, None)) is not None:
                    tokens[index].append(token_id)
                else:
                    streams[index] = None
        expected = [list(llava.plain.language.generate(embeds, num, greedy)) for embeds, num in sequences]
        assert tokens == expected, round_number


@pytest.mark.parametrize("cuts", [(40, 40), (100, 1), (63, 20), (129, 128)])
def test_a_cut_sequence_goes_on_as_the_uncompiled_one(llava: Pair, cuts: tuple[int, int]) -> None:
    """Also after a padded prompt, whose padding the following positions overwrite."""
    logits = []
    for language in (llava.plain.language, llava.language):
        cache: Any = language.new_cache()
        parts = [cache.append(embeddings(130)).copy()]
        for number, length in enumerate(cuts):
            cache.cut(length)
            parts += [cache.append(embeddings(num_new, seed=number)).copy() for num_new in (1, 70, 1, 2)]
        assert cache.length == cuts[1] + 74
        logits.append(parts)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=2e-4)


def test_the_context_bounds_an_answer(llava: Pair) -> None:
    assert len(list(llava.language.generate(embeddings(509), 40, greedy))) == 3
    cache = llava.language.new_cache()
    list(llava.language.generate(embeddings(500), 1, greedy, cache))
    assert len(list(llava.language.generate(embeddings(10), 40, greedy, cache))) == 2


def test_a_tensor_is_as_good_as_an_array(llava: Pair) -> None:
    for language in (llava.plain.language, llava.language):
        kinds = (np.asarray, torch.tensor)
        first, second = (list(language.generate(kind(embeddings(90)), 9, greedy)) for kind in kinds)
        assert first == second


def test_lengths_are_padded_to_few_shapes(llava: Pair) -> None:
    decoder = llava.language._compiled
    padded = {length: decoder.padded_length(length, is_first=True) for length in range(1, 4097)}
    assert len(set(padded.values())) == 32
    assert all(0 <= padded[length] - length <= max(63, length / 8) for length in padded)
    assert decoder.padded_length(1, is_first=False) == 1
    assert decoder.padded_length(2, is_first=False) == padded[1] == 64


@pytest.mark.parametrize(("bundle", "is_exact"), [("exact", True), ("unpruned", True), ("varying", False)])
def test_prompts_whose_length_recurs_are_not_padded(
    as_it_stands: Callable[..., Pair],
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    photos: Path,
    bundle: str,
    is_exact: bool,
) -> None:
    """Where every picture becomes as many tokens; four such lengths at most."""
    pipeline = as_it_stands(request.getfixturevalue(f"{bundle}_bundle"), tiny_checkpoint).compiled
    decoder: Any = pipeline.language._compiled
    shapes, begin = set(), decoder._begin
    decoder._begin = lambda model, embeds, *rest: shapes.add(embeds.shape[1]) or begin(model, embeds, *rest)
    for name in PHOTOS:
        pipeline.generate("What is in the picture?", [photos / name], max_new_tokens=2)
    assert [length % 64 != 0 for length in shapes] == ([True] if is_exact else [False] * len(shapes))
    for num_words in range(1, 12):
        pipeline.generate("a " * num_words, max_new_tokens=1)
    assert len([length for length in shapes if length % 64]) == (4 if is_exact else 0)


def test_caches_come_back_for_the_next_sequence(llava: Pair) -> None:
    pool = llava.language._compiled.caches
    streams = [llava.language.generate(embeddings(length), 9, greedy) for length in (100, 100, 200)]
    for stream in streams:
        next(stream)
    assert pool._free == {}
    caches = [stream.gi_frame.f_locals["sequence"]._cache for stream in streams]
    assert [static_cache.capacity_of(cache) for cache in caches] == [128, 128, 256]
    for stream in streams:
        stream.close()
    del stream, streams
    gc.collect()
    # One of each capacity; the memory of the second small one is free.
    assert sorted(pool._free) == [(1, 128), (1, 256)]
    assert pool.take(120) in caches
    assert (1, 128) not in pool._free


def test_what_a_sequence_leaves_in_memory_reaches_no_other(llava: Pair) -> None:
    expected = list(llava.language.generate(embeddings(90), 30, greedy))
    poison = llava.language.new_cache()
    poison.append(np.full((120, 64), np.nan, np.float32))
    poison.cut(20)
    assert not any(layer.keys[:, :, 20:].isnan().any() for layer in poison._cache.layers)
    del poison
    gc.collect()
    assert list(llava.language.generate(embeddings(90), 30, greedy)) == expected


@pytest.mark.parametrize(("raised", "kind"), [(torch.OutOfMemoryError, OutOfMemoryError), (RuntimeError, EngineError)])
def test_a_turn_that_fails_leaves_the_chat_as_it_was(llava: Pair, photo: Path, monkeypatch, raised, kind) -> None:
    chat, other = llava.compiled.chat(), llava.compiled.chat()
    for each in (chat, other):
        each.ask("What is in the picture?", [photo], max_new_tokens=NUM_TOKENS)
    layer = llava.language._compiled._model.model.layers[1]

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        # The first layer has its new positions by now.
        raise raised("no room")

    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", fail)
        with pytest.raises(kind, match="no room"):
            chat.ask("or rather", max_new_tokens=NUM_TOKENS)
    answers = [each.ask("how many", max_new_tokens=NUM_TOKENS) for each in (chat, other)]
    assert same(*answers)
    assert chat.turns == other.turns


def test_several_threads_get_the_answers_of_one(llava: Pair, requests: list[Request]) -> None:
    expected = [alone(llava.compiled, request) for request in requests]
    with ThreadPoolExecutor(3) as threads:
        for answers in threads.map(lambda _: [alone(llava.compiled, request) for request in requests], range(3)):
            assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))


def decode_requests(*counts: int) -> list[DecodeRequest]:
    return [DecodeRequest(embeddings(5 + 30 * seed, seed), num, greedy) for seed, num in enumerate(counts)]


def tokens_of(steps: Iterable[dict[int, Any]], num_requests: int) -> list[list[Any]]:
    steps = list(steps)
    return [[step[index] for step in steps if index in step] for index in range(num_requests)]


@pytest.mark.parametrize("counts", [(9,), (6, 6, 6), (9, 2, 5), (1, 8, 1, 3, 7), (1, 1)])
def test_sequences_of_any_number_and_length_give_what_each_gives_alone(llava: Pair, counts: tuple[int, ...]) -> None:
    requests = decode_requests(*counts)
    alone_ = [
        list(llava.plain.language.generate(request.inputs_embeds, num, greedy))
        for request, num in zip(requests, counts, strict=True)
    ]
    assert tokens_of(llava.language.generate_batch(requests), len(counts)) == alone_


def test_a_batch_comes_back_to_the_memory_of_one_of_as_many_rows(llava: Pair) -> None:
    pool = llava.language._compiled.caches
    expected = tokens_of(llava.language.generate_batch(decode_requests(9, 9, 9)), 3)
    cache = pool._free[4, 128]
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
    batch = llava.language.generate_batch(decode_requests(9, 9, 9, 9))
    assert next(batch)
    assert (4, 128) not in pool._free
    batch.close()
    assert pool._free[4, 128] is cache
    assert tokens_of(llava.language.generate_batch(decode_requests(9, 9, 9)), 3) == expected


def test_a_prompt_that_fails_costs_no_other_its_answer_and_leaves_nothing_in_its_row(llava: Pair) -> None:
    def fails(_logits: np.ndarray) -> int:
        raise OutOfMemoryError("no more")

    requests = decode_requests(9, 9, 9)
    expected = tokens_of(llava.language.generate_batch(requests), 3)
    poison = DecodeRequest(np.full((60, 64), np.nan, np.float32), 9, fails)
    found = tokens_of(llava.language.generate_batch([poison, *requests]), 4)
    assert [type(outcome) for outcome in found[0]] == [OutOfMemoryError]
    assert found[1:] == expected


def test_where_memory_is_short_the_halves_of_a_batch_come_one_after_the_other(llava: Pair, monkeypatch) -> None:
    new, sizes = static_cache.CachePool._new, []

    def short(self: Any, num_rows: int, capacity: int) -> Any:
        sizes.append(num_rows)
        if num_rows > 2:
            raise torch.OutOfMemoryError("no more")
        return new(self, num_rows, capacity)

    requests = decode_requests(4, 4, 4, 4, 4)
    expected = tokens_of(llava.language.generate_batch(requests), 5)
    llava.language._compiled.caches._free.clear()
    monkeypatch.setattr(static_cache.CachePool, "_new", short)
    assert tokens_of(llava.language.generate_batch(requests), 5) == expected
    assert [size for size in sizes if size > 1] == [8, 2, 4, 2]


def test_a_step_that_fails_fails_for_all_and_the_next_batch_is_as_ever(llava: Pair, monkeypatch) -> None:
    requests = decode_requests(9, 9, 9)
    expected = tokens_of(llava.language.generate_batch(requests), 3)
    layer = llava.language._compiled._model.model.layers[1]

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    batch = llava.language.generate_batch(requests)
    firsts = [next(batch) for _ in requests]
    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", fail)
        rest = list(batch)
    assert [first[index] for index, first in enumerate(firsts)] == [tokens[0] for tokens in expected]
    assert [{index: type(outcome) for index, outcome in step.items()} for step in rest] == [
        dict.fromkeys(range(3), OutOfMemoryError)
    ]
    assert tokens_of(llava.language.generate_batch(requests), 3) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_compiled": True}, "is_compiled 'True' belongs to the language backend transformers"),
        (
            {"backend": "transformers", "checkpoint": "folder", "is_compiled": "fully"},
            "compiled must be True or False, not 'fully'",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LanguageSettings(**settings)


def test_where_torch_does_not_compile_at_all_loading_says_so(llava: Pair, monkeypatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(EngineError, match=r"not supported on Python 3\.99"):
        load(llava.bundle, llava.checkpoint, language_compile=True)


def test_a_model_that_torch_cannot_compile_is_an_error_that_says_what_to_do(llava: Pair, monkeypatch) -> None:
    def refuse(*_args: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("no working C++ compiler found\nand much more")

    expected = list(llava.language.generate(embeddings(90), 3, greedy))
    with monkeypatch.context() as patched:
        patched.setattr(llava.language._compiled, "_begin", refuse)
        with pytest.raises(EngineError, match=r"for cpu: no working C\+\+ compiler found; .*without language_compile$"):
            next(llava.language.generate(embeddings(90), 3, greedy))
    assert list(llava.language.generate(embeddings(90), 3, greedy)) == expected


def test_the_command_answers_compiled(llava: Pair, photo: Path, capsys, monkeypatch) -> None:
    arguments = [str(llava.bundle), "What is it?", "--image", str(photo), "--max-new-tokens", "9", "--json"]
    assert main(arguments) == 0
    expected = json.loads(capsys.readouterr().out)
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_settings: compiled.append(function) or function)
    language = ["--language", "transformers", "--checkpoint", str(llava.checkpoint), "--language-compile"]
    for vision, num_compiled in (([], 3), (["--engine", "torch"], 3), (["--engine", "torch", "--vision-compile"], 4)):
        compiled.clear()
        assert main([*arguments, *language, *vision]) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"] == expected["token_ids"]
        assert len(compiled) == num_compiled


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pair]]:
    """Loads a pair for which torch.compile follows the model as ever, and then runs what it wrote down as it is."""
    compile_: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend="eager", **settings))
    torch._dynamo.reset()
    yield load_pair
    torch._dynamo.reset()


def test_torch_can_follow_the_model_as_one_graph_for_each_shape(traced, tiny_checkpoint, varying_bundle) -> None:
    pair = traced(varying_bundle, tiny_checkpoint)
    torch._dynamo.utils.counters.clear()
    num_graphs = []
    for seed, length in enumerate((100, 128, 70, 140)):
        expected = list(pair.plain.language.generate(embeddings(length, seed), 5, greedy))
        assert list(pair.compiled.language.generate(embeddings(length, seed), 5, greedy)) == expected
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # A prompt and a step; then a prompt of another shape.
    assert num_graphs == [2, 2, 2, 3]
    for counts in ((4, 3, 5), (2, 6, 2, 2)):
        expected = tokens_of(pair.plain.language.generate_batch(decode_requests(*counts)), len(counts))
        assert tokens_of(pair.compiled.language.generate_batch(decode_requests(*counts)), len(counts)) == expected
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # The prompts are padded to one new shape, and three sequences run in four rows.
    assert num_graphs[4:] == [5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_compiled_answers_equal_the_uncompiled_ones(
    tiny_checkpoint: Path, exact_bundle: Path, sliding: tuple[Path, Path], photos: Path, family: str
) -> None:
    pair = load_pair(exact_bundle, tiny_checkpoint) if family == "llava" else load_pair(*sliding)
    for name in PHOTOS:
        request = Request("What is in the picture?", [load_image(photos / name).resize((80, 60))], NUM_TOKENS)
        assert same(alone(pair.compiled, request), alone(pair.plain, request))
    chats = [pair.plain.chat(), pair.compiled.chat()]
    for question in ("how many dogs", "why"):
        assert same(*(chat.ask(question, max_new_tokens=NUM_TOKENS) for chat in chats))


@pytest.mark.slow
def test_without_a_compiler_the_error_says_what_to_do(tiny_checkpoint, exact_bundle, tmp_path, monkeypatch) -> None:
    # What was compiled before is not compiled again.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    pipeline: Any = load(exact_bundle, tiny_checkpoint, language_compile=True)
    # The settings of torch.compile belong to the thread.
    pipeline.language._compiled.call(setattr, torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(EngineError, match=r"cannot compile the language model for cpu: .*without language_compile"):
        pipeline.generate("how many dogs", max_new_tokens=2)


@pytest.mark.gpu
def test_on_a_gpu_it_runs_as_cuda_graphs(tiny_checkpoint: Path, exact_bundle: Path, photos: Path) -> None:
    pair = load_pair(exact_bundle, tiny_checkpoint, language_device="cuda")
    counters = torch._dynamo.utils.counters
    counters.clear()
    requests = [Request("What is in the picture?", [photos / name], NUM_TOKENS) for name in PHOTOS * 2]
    expected = [alone(pair.plain, request) for request in requests]
    answers = [alone(pair.compiled, request) for request in requests[:3]]
    num_graphs = counters["stats"]["unique_graphs"]
    answers += [alone(pair.compiled, request) for request in requests[3:]]
    assert all(same(answer, single) for answer, single in zip(answers, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == num_graphs == 2
    expected = pair.plain.generate_batch(requests)
    for _ in range(2):
        together = pair.compiled.generate_batch(requests)
        assert all(same(answer, single) for answer, single in zip(together, expected, strict=True))
    assert counters["inductor"]["cudagraph_skips"] == 0
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        alone(pair.compiled, requests[0])
    launches = {event.key: event.count for event in profile.key_averages()}
    assert launches.get("cudaGraphLaunch", 0) == NUM_TOKENS
