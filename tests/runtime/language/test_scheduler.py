"""The scheduler: sequences that come and go get the tokens that each gets alone."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hivtp.engines.bundle import Bundle
from hivtp.engines.manifest import SamplingDefaults
from hivtp.runtime.language import LanguageOptions, create_language
from hivtp.runtime.language.sampler import Sampler
from hivtp.runtime.language.sampling import SamplingParams
from hivtp.runtime.language.scheduler import LONG_CHUNK, Scheduler, SchedulerOptions
from hivtp_ops.errors import EngineError, HivtpError, OutOfMemoryError, PromptError, RequestError, SettingsError
from tests.support.decoding import Decoded, decode, decode_all, embeddings, greedy, make_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from numpy.typing import NDArray

    from hivtp.runtime.language.base import LanguageBackend


@pytest.fixture(scope="module")
def languages(request: pytest.FixtureRequest) -> Callable[[str], LanguageBackend]:
    """Opens a backend by its name, once."""
    bundles = {"fp32": "pruned_bundle", "int4": "int4_bundle", "fp16": "half_bundle", "transformers": "pruned_bundle"}

    @cache
    def opened(name: str) -> LanguageBackend:
        options = LanguageOptions(num_threads=1)
        if name == "transformers":
            options = LanguageOptions(name, checkpoint=request.getfixturevalue("tiny_checkpoint"))
        return create_language(Bundle.open(request.getfixturevalue(bundles[name])), options)

    return opened


@pytest.fixture
def language(languages: Callable[[str], LanguageBackend]) -> LanguageBackend:
    return languages("fp32")


def sampler(seed: int) -> Sampler:
    """Greedy for every other seed."""
    return Sampler(SamplingParams(temperature=seed % 2, seed=seed).resolved(SamplingDefaults()))


class Drawn(Decoded):
    """A random sequence; the same seed gives the same one."""

    def __init__(self, seed: int, max_length: int = 90, *, keys: list[Hashable] | None = None) -> None:
        random = np.random.default_rng(seed)
        embeds = random.normal(size=(int(random.integers(1, max_length)), 64)).astype(np.float32)
        super().__init__(embeds, int(random.integers(1, 40)), sampler(seed), keys=keys, ends=range(0, 512, 37))
        self.seed = seed

    def alone(self, language: LanguageBackend) -> list[int]:
        return decode(language, self.embeds, self.max_new_tokens, sampler(self.seed), self.ends)


def runs_of(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the decoder runs from now on: (slot, positions) of a prompt, or the slots of a joint step."""
    runs: list[Any] = []
    prefill, step = scheduler._slots.prefill, scheduler._slots.step

    def noted_prefill(slot: int, embeds: Any, prompt_length: int) -> Any:
        runs.append((slot, len(embeds)))
        return prefill(slot, embeds, prompt_length)

    def noted_step(slots: Any, embeds: Any) -> Any:
        runs.append(list(slots))
        return step(slots, embeds)

    monkeypatch.setattr(scheduler._slots, "prefill", noted_prefill)
    monkeypatch.setattr(scheduler._slots, "step", noted_step)
    return runs


def slots_of(scheduler: Scheduler) -> dict[Any, int]:
    return {item.request: item.slot for item in [*scheduler._prefilling, *scheduler._decoding]}


RANDOM_CASES = [("fp32", 200, seed) for seed in range(3)] + [("int4", 200, seed) for seed in range(3, 5)]
RANDOM_CASES += [("fp16", 200, 5), ("transformers", 40, 6)]


@pytest.mark.parametrize(("name", "num_sequences", "seed"), RANDOM_CASES)
def test_sequences_that_come_and_go_get_what_they_get_alone(languages, name, num_sequences, seed) -> None:
    language, random = languages(name), np.random.default_rng(seed)
    options = {"num_slots": 3 + seed % 2, "chunk_size": int(random.integers(8, 17))}
    scheduler = make_scheduler(language, **options, capacity=140, steps_per_chunk=int(random.integers(2, 5)))
    sequences = [Drawn(1000 * seed + number) for number in range(num_sequences)]
    coming, cancelled, slots = list(reversed(sequences)), set(), {}
    has_more = True
    while coming or has_more:
        for _ in range(min(len(coming), random.integers(0, 3))):
            scheduler.add(coming.pop())
        if random.random() < 0.03:
            victim = sequences[random.integers(0, num_sequences - len(coming))]
            if not victim.tokens or (victim in slots_of(scheduler)):
                cancelled.add(victim)
            scheduler.cancel(victim)
        has_more = scheduler.step()
        running = slots_of(scheduler)
        assert len(set(running.values())) == len(running) == scheduler.num_running <= options["num_slots"]
        for sequence, slot in running.items():
            assert slots.setdefault(sequence, slot) == slot
    assert 0 < len(cancelled) < num_sequences / 2
    assert scheduler.num_waiting == scheduler.num_running == 0
    for sequence in sequences:
        expected = sequence.alone(language)
        assert sequence.error is None
        assert sequence.tokens == (expected[: len(sequence.tokens)] if sequence in cancelled else expected)


@pytest.mark.parametrize("name", ["fp32", "int4", "transformers"])
def test_kept_slots_serve_who_begins_alike_and_are_never_changed_by_others(languages, name, monkeypatch) -> None:
    """Few prefixes, continued in many ways, among sequences that share nothing."""
    language, random = languages(name), np.random.default_rng(1)
    scheduler = make_scheduler(language, 4, 100, chunk_size=10, steps_per_chunk=2, keeps_slots=True)
    table, sequences, runs = language.embed(range(512)), [], runs_of(scheduler, monkeypatch)
    num_sequences = 120 if name == "fp32" else 40
    while len(sequences) < num_sequences or scheduler.step():
        if len(sequences) < num_sequences and random.random() < 0.3:
            prefix = int(random.integers(0, 3))
            ids = np.random.default_rng(prefix).integers(0, 512, 30)[: random.integers(5, 31)]
            ids = np.concatenate([ids, random.integers(0, 512, random.integers(1, 20))])
            keys = None if prefix == 0 else ids.tolist()
            sequences.append(Decoded(table[ids], int(random.integers(1, 40)), sampler(len(sequences)), keys=keys))
            scheduler.add(sequences[-1])
    num_computed = sum(run[1] for run in runs if isinstance(run, tuple))
    assert num_computed < 0.9 * sum(len(sequence.embeds) for sequence in sequences)
    for number, sequence in enumerate(sequences):
        assert sequence.tokens == decode(language, sequence.embeds, sequence.max_new_tokens, sampler(number))


def test_a_prompt_runs_in_chunks_between_joint_steps(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 3, chunk_size=16, steps_per_chunk=2)
    runs = runs_of(scheduler, monkeypatch)
    first, second = Decoded(embeddings(50), 20), Decoded(embeddings(40, 1), 3)
    scheduler.add(first)
    scheduler.step()
    scheduler.step()
    scheduler.add(second)
    scheduler.run()
    # Whole where nobody waits for a token.
    assert runs[:2] == [(0, 50), [0]]
    assert runs[2:12] == [[0], (1, 16), [0], [0], (1, 16), [0], [0], (1, 8), [0, 1], [0, 1]]
    assert runs[12:] == [[0]] * 11
    assert [len(sequence.tokens) for sequence in (first, second)] == [20, 3]


def test_without_chunks_prompts_run_first(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 3)
    runs = runs_of(scheduler, monkeypatch)
    for length, num in ((20, 3), (30, 2), (10, 1)):
        scheduler.add(Decoded(embeddings(length), num))
    scheduler.run()
    assert runs == [(0, 20), (1, 30), (2, 10), [0, 1], [0]]


def test_a_sequence_that_takes_the_place_of_another_leaves_the_rest_where_they_are(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 3)
    runs = runs_of(scheduler, monkeypatch)
    for num in (2, 6, 3, 2):
        scheduler.add(Decoded(embeddings(5), num))
    scheduler.run()
    assert runs == [(0, 5), (1, 5), (2, 5), [0, 1, 2], (0, 5), [0, 1, 2], [1], [1], [1]]


class Panic(BaseException):
    """As a library written in Rust raises it: no Exception."""


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("place", ["choose", "push"])
@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (EngineError("odd"), EngineError),
        (MemoryError("odd"), OutOfMemoryError),
        (KeyError("odd"), RequestError),
        (StopIteration("odd"), RequestError),
        (Panic("odd"), RequestError),
        (UnprintableError(), RequestError),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("number", [0, 4])
def test_a_sequence_that_raises_costs_no_other_its_tokens(language, place, raised, kind, number) -> None:
    sequences = [Decoded(embeddings(length, length), 9) for length in (7, 30, 12)]
    function = getattr(sequences[1], place)

    def fails(*arguments: Any) -> Any:
        if len(sequences[1].tokens) == number:
            raise raised
        return function(*arguments)

    setattr(sequences[1], place, fails)
    # What it says of its error is not our concern either.
    fail = sequences[1].fail
    sequences[1].fail = lambda error: (fail(error), 1 / 0)
    decode_all(language, sequences, chunk_size=8)
    assert isinstance(sequences[1].error, kind)
    assert raised in (sequences[1].error, sequences[1].error.__cause__)
    for sequence in (sequences[0], sequences[2]):
        assert sequence.tokens == decode(language, sequence.embeds, 9)


def test_what_ends_the_program_passes_through(language) -> None:
    def interrupted(_logits: NDArray[np.float32]) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(language, embeddings(3), 4, interrupted)


def test_logits_that_cannot_be_used_cost_only_their_sequence(language) -> None:
    sequences = [Decoded(embeddings(length), 6, sampler(0)) for length in (5, 9, 30)]
    sequences[1].embeds[3] = np.nan
    decode_all(language, sequences)
    assert isinstance(sequences[1].error, EngineError)
    for sequence in (sequences[0], sequences[2]):
        assert sequence.tokens == decode(language, sequence.embeds, 6)


@pytest.mark.parametrize("name", ["fp32", "transformers"])
@pytest.mark.parametrize("kind", [MemoryError, ValueError, EngineError])
def test_what_one_cannot_compute_costs_no_other_its_tokens(languages, monkeypatch, name, kind) -> None:
    """A token that fails to be embedded, and so the joint step."""
    language = languages(name)
    sequences = [Decoded(embeddings(length, length), 9) for length in (7, 30, 12)]
    expected = [decode(language, sequence.embeds, 9) for sequence in sequences]
    embed, bad_token = language.embed, expected[1][4]
    assert bad_token not in expected[0] + expected[2]

    def fails(token_ids: list[int]) -> Any:
        if bad_token in token_ids:
            raise kind("no room")
        return embed(token_ids)

    monkeypatch.setattr(language, "embed", fails)
    decode_all(language, sequences)
    assert [len(sequence.tokens) for sequence in sequences] == [9, 5, 9]
    assert "no room" in str(sequences[1].error)
    assert [sequence.tokens for sequence in sequences[::2]] == expected[::2]


def test_push_may_cancel_its_own_sequence_and_others(language) -> None:
    scheduler = make_scheduler(language, 4, keeps_slots=True)
    sequences = [Decoded(embeddings(5, seed), 12, keys=range(5)) for seed in range(4)]
    waiting = Decoded(embeddings(6), 2)
    push = sequences[1].push

    def cancels(token_id: int, milliseconds: float) -> bool:
        push(token_id, milliseconds)
        if len(sequences[1].tokens) == 3:
            for victim in (sequences[0], sequences[1], sequences[3]):
                scheduler.cancel(victim)
            raise KeyError
        return True

    sequences[1].push = cancels
    for sequence in [*sequences, waiting]:
        scheduler.add(sequence)
    scheduler.run()
    assert [len(sequence.tokens) for sequence in sequences] == [3, 3, 12, 2]
    assert [sequence.error for sequence in sequences] == [None] * 4
    assert sequences[2].tokens == decode(language, sequences[2].embeds, 12)
    assert waiting.tokens == decode(language, waiting.embeds, 2)


def test_a_cancelled_sequence_is_gone_wherever_it_was(language) -> None:
    scheduler = make_scheduler(language, 2, chunk_size=4, steps_per_chunk=1)
    decoding, prefilling, waiting = (Decoded(embeddings(20, seed), 30) for seed in range(3))
    for sequence in (decoding, prefilling, waiting):
        scheduler.add(sequence)
    for _ in range(3):
        scheduler.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    for sequence in (prefilling, waiting, decoding, Decoded(embeddings(1))):
        scheduler.cancel(sequence)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert not scheduler.step()
    assert [len(sequence.tokens) for sequence in (prefilling, waiting)] == [0, 0]


@pytest.mark.parametrize("max_passed", [0, 1, 3])
def test_those_that_fit_overtake_one_that_does_not_so_often_and_no_more(language, max_passed) -> None:
    budget = 100 * language.kv_bytes_per_position
    scheduler = make_scheduler(language, 10, max_kv_bytes=budget, max_passed=max_passed)
    first, large, larger = (Decoded(embeddings(length), 20) for length in (40, 60, 70))
    small = [Decoded(embeddings(3, seed), 2) for seed in range(8)]
    begun = []
    for sequence in [first, large, larger, *small]:
        sequence.choose = lambda logits, sequence=sequence: begun.append(sequence) or greedy(logits)
        scheduler.add(sequence)
    scheduler.run()
    order = list(dict.fromkeys(begun))
    # Several fit at once, and even so no more pass than may; those that are passed stay in their order.
    assert order == [first, *small[:max_passed], large, larger, *small[max_passed:]]


def test_the_kv_budget_is_never_passed(language) -> None:
    random = np.random.default_rng(0)
    for keeps_slots in (False, True):
        budget = 150 * language.kv_bytes_per_position
        scheduler = make_scheduler(language, 4, max_kv_bytes=budget, keeps_slots=keeps_slots, max_passed=3)
        sequences = [Drawn(seed, 60, keys=random.integers(0, 3, 60).tolist()) for seed in range(60)]
        for sequence in sequences:
            scheduler.add(sequence)
        used = []
        while scheduler.step():
            held = sum(scheduler._slots.length(slot) for slot in range(4)) * language.kv_bytes_per_position
            assert held <= scheduler.num_reserved_bytes <= budget
            used.append(scheduler.num_reserved_bytes)
        assert max(used) > budget / 2
        assert all(sequence.tokens for sequence in sequences)


def test_what_can_never_fit_is_refused_at_once(language) -> None:
    with pytest.raises(SettingsError, match="takes up to 60 positions, and a slot holds 50; shorten the prompt"):
        make_scheduler(language, capacity=50).add(Decoded(embeddings(40), 20))
    size = language.kv_bytes_per_position
    for length in (0, 512, 600):
        with pytest.raises(PromptError, match=f"the prompt takes {length} positions, and the context holds 512"):
            make_scheduler(language, grows=True).add(Decoded(embeddings(length), 20))
    scheduler = make_scheduler(language, max_kv_bytes=59 * size)
    with pytest.raises(SettingsError, match=f"takes up to {60 * size} bytes of KV cache, and there are {59 * size}"):
        scheduler.add(Decoded(embeddings(40), 20))
    assert scheduler.num_waiting == 0


def test_room_is_made_where_that_is_allowed(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 2, 20, grows=True)
    running = Decoded(embeddings(10), 10)
    scheduler.add(running)
    for _ in range(3):
        scheduler.step()
    longer = [Decoded(embeddings(length, length), 10) for length in (15, 40, 300)]
    for sequence in longer:
        scheduler.add(sequence)
    scheduler.run()
    assert scheduler._slots.capacity == 310
    for sequence in [running, *longer]:
        assert sequence.tokens == decode(language, sequence.embeds, 10)

    def no_room(_capacity: int) -> None:
        raise MemoryError

    monkeypatch.setattr(scheduler._slots, "reserve", no_room)
    failing, short = Decoded(embeddings(400), 10), Decoded(embeddings(4), 10)
    scheduler.add(failing)
    scheduler.add(short)
    scheduler.run()
    assert isinstance(failing.error, OutOfMemoryError)
    assert short.tokens == decode(language, short.embeds, 10)


def turn(language: LanguageBackend, ids: list[int], num: int = 3) -> Decoded:
    return Decoded(language.embed(ids), num, keys=ids)


def test_a_kept_slot_saves_what_two_have_in_common(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 2, keeps_slots=True)
    runs = runs_of(scheduler, monkeypatch)

    def prefilled(sequence: Decoded) -> tuple[int, int]:
        runs.clear()
        scheduler.add(sequence)
        scheduler.run()
        assert sequence.tokens == decode(language, sequence.embeds, sequence.max_new_tokens)
        return runs[0]

    ids = list(range(40, 70))
    first = turn(language, ids)
    assert prefilled(first) == (0, 30)
    # Another one takes the empty slot, although it begins with a few of the same tokens.
    assert prefilled(turn(language, [*ids[:4], *range(100, 120)])) == (1, 24)
    # The last token of an answer is never computed; so the one before it is the last that is known.
    longer = [*ids, *first.tokens, 7, 8]
    assert prefilled(turn(language, longer)) == (0, 3)
    # The very same again: its last position gives the first logits.
    assert prefilled(turn(language, longer)) == (0, 1)
    # It begins alike and ends before the slot does.
    assert prefilled(turn(language, longer[:32])) == (0, 1)
    assert prefilled(turn(language, [*longer[:20], 9, 9])) == (0, 2)
    # What tells nobody its keys never shares; it takes the slot that was not used for longest.
    assert prefilled(Decoded(language.embed(ids), 3)) == (1, 30)
    assert prefilled(turn(language, ids)) == (0, 10)


def test_a_kept_slot_survives_what_its_sequence_raised(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, keeps_slots=True)
    runs = runs_of(scheduler, monkeypatch)
    failing = turn(language, list(range(20)), 9)
    failing.push = lambda *_: 1 / 0
    scheduler.add(failing)
    scheduler.run()
    again = turn(language, [*range(20), 30])
    scheduler.add(again)
    scheduler.run()
    assert runs[:2] == [(0, 20), (0, 1)]
    assert again.tokens == decode(language, again.embeds, 3)


@pytest.mark.parametrize("name", ["fp32", "transformers"])
def test_kept_slots_can_be_forgotten_while_others_run(languages, name) -> None:
    language = languages(name)
    scheduler = make_scheduler(language, 2, keeps_slots=True)
    kept, running = turn(language, list(range(20))), Decoded(embeddings(9), 12)
    scheduler.add(kept)
    scheduler.run()
    scheduler.add(running)
    scheduler.step()
    assert scheduler._pool.num_kept_positions > 20
    scheduler.forget()
    assert scheduler._pool.num_kept_positions == 0
    scheduler.run()
    assert running.tokens == decode(language, running.embeds, 12)
    again = turn(language, [*range(20), 30])
    scheduler.add(again)
    scheduler.run()
    assert again.num_cached == 0
    assert again.tokens == decode(language, again.embeds, 3)


def test_slots_together_take_the_memory_of_what_they_hold(language) -> None:
    """However long the sequences were that ran in them before."""
    scheduler = make_scheduler(language, 4, keeps_slots=True)
    for _ in range(3):
        for seed in range(4):
            scheduler.add(Decoded(embeddings(400, seed), 30, keys=range(400)))
        scheduler.run()
        scheduler.add(Decoded(embeddings(4), 2))
        scheduler.run()
    scheduler.forget()
    for memory in scheduler._slots._cache._memories:
        written = np.count_nonzero(memory.array.any(axis=(1, 3)), axis=1)
        # A page holds positions of two slots at their border.
        page = 4096 // (4 * memory.array.shape[-1])
        assert (written <= 2 * page).all()


def test_a_long_prompt_can_be_given_up_though_nobody_else_is_there(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 2, chunk_size=10)
    runs = runs_of(scheduler, monkeypatch)
    whole, given_up = Decoded(embeddings(200), 3), Decoded(embeddings(200), 3)
    scheduler.add(whole)
    scheduler.run()
    assert runs[:3] == [(0, 10 * LONG_CHUNK), (0, 10 * LONG_CHUNK), (0, 200 - 20 * LONG_CHUNK)]
    assert whole.tokens == decode(language, whole.embeds, 3)
    runs.clear()
    scheduler.add(given_up)
    scheduler.step()
    scheduler.cancel(given_up)
    assert not scheduler.step()
    assert runs == [(0, 10 * LONG_CHUNK)]


def test_a_prompt_that_was_given_up_half_way_is_continued(language, monkeypatch) -> None:
    scheduler = make_scheduler(language, 2, chunk_size=8, keeps_slots=True)
    runs = runs_of(scheduler, monkeypatch)
    other, half, again = Decoded(embeddings(5), 30), turn(language, list(range(40))), turn(language, list(range(40)))
    for sequence in (other, half):
        scheduler.add(sequence)
        scheduler.step()
    scheduler.cancel(half)
    scheduler.add(again)
    scheduler.run()
    assert runs[:6] == [(0, 5)] + [(1, 8)] * 5
    assert again.tokens == decode(language, again.embeds, 3)
    assert other.tokens == decode(language, other.embeds, 30)


@pytest.mark.parametrize("name", ["fp32", "transformers"])
def test_a_run_that_fails_leaves_its_slots_as_they_were(languages, name) -> None:
    language = languages(name)
    slots = language.open_slots(3, 50)
    for slot in range(3):
        slots.prefill(slot, embeddings(10, slot), 10)
    expected = slots.step([0, 2], embeddings(2)).copy()
    for slot in (0, 2):
        slots.truncate(slot, 10)
    for run in (partial(slots.step, [0, 2]), partial(slots.prefill, 1, prompt_length=12)):
        with pytest.raises(EngineError):
            run(embeds=np.zeros((2, 65), np.float32))
    assert [slots.length(slot) for slot in range(3)] == [10, 10, 10]
    np.testing.assert_allclose(slots.step([0, 2], embeddings(2)), expected, atol=1e-5)


def test_times_are_those_of_all_runs_that_led_to_a_token(language, monkeypatch) -> None:
    """By a clock that the runs themselves put forward."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    scheduler = make_scheduler(language, 2, chunk_size=10, steps_per_chunk=1)
    for name, seconds in (("prefill", 3), ("step", 1)):
        run = getattr(scheduler._slots, name)

        def timed(*arguments: Any, run: Any = run, seconds: int = seconds) -> Any:
            now[0] += seconds
            return run(*arguments)

        monkeypatch.setattr(scheduler._slots, name, timed)
    first, second = Decoded(embeddings(5), 6), Decoded(embeddings(25, 1), 2)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.run()
    # The second took three chunks, between which the first went on; its waiting is in neither.
    assert first.step_ms == [3000] + [1000] * 5
    assert second.step_ms == [9000, 1000]


def test_the_context_and_max_new_tokens_bound_an_answer(languages) -> None:
    for name in ("fp32", "transformers"):
        language = languages(name)
        assert language.context_length == 512
        assert [len(decode(language, embeddings(length), 40)) for length in (509, 511)] == [3, 1]
        tokens = decode(language, embeddings(10), 9)
        assert [decode(language, embeddings(10), num) for num in (1, 2, 8)] == [tokens[:num] for num in (1, 2, 8)]


def test_the_decoder_runs_once_per_token_and_not_after_the_last(language, monkeypatch) -> None:
    scheduler = make_scheduler(language)
    runs = runs_of(scheduler, monkeypatch)
    scheduler.add(Decoded(embeddings(50), 6))
    assert runs == []
    scheduler.run()
    assert runs == [(0, 50)] + [[0]] * 5
    assert not scheduler.step()


@pytest.mark.parametrize(
    "options",
    [
        {"num_slots": 0},
        {"capacity": 1},
        {"chunk_size": 0},
        {"steps_per_chunk": -1},
        {"max_kv_bytes": 0},
        {"max_passed": -1},
        {"max_passed": None},
        {"num_slots": 2.0},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(SettingsError, match=f"{name} must be a whole number, . or more, not {value}"):
        SchedulerOptions(**{"num_slots": 1, "capacity": 9} | options)


def test_every_error_is_one_of_ours(language) -> None:
    sequence = Decoded(embeddings(3), 4, lambda _logits: 1 / 0)
    decode_all(language, [sequence])
    assert isinstance(sequence.error, HivtpError)
    assert "ZeroDivisionError: division by zero; please report this" in str(sequence.error)
