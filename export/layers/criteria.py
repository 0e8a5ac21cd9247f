"""What a choice of scoring layers costs, without labels: by the answers, or by the features only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hivtp.export.verify.reference import language_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from hivtp.export.checkpoint.folder import Checkpoint

# Bounds the memory of a pass through the language model: 0.3 GB for the hidden states of a 7B model, and several times
# that while a layer runs. More positions take another pass, which reads the weights again.
MAX_POSITIONS = 16_384


@dataclass(frozen=True)
class Cost:
    """The cost of dropping the other tokens of one image.

    Attributes:
        value: 0 where nothing is lost; its unit is the criterion's.
        agreement: share of the answer's tokens that the pruned model would choose too; None without answers.
    """

    value: float
    agreement: float | None = None


def feature_costs(features: NDArray[np.float32], kept_sets: Sequence[NDArray[np.int64]]) -> list[Cost]:
    """The dropped tokens' share of the variance around the mean token.

    Where most of an image is background, background lies near the mean, and things lie far from it. Features are
    scaled to length 1 first: CLIP has a few tokens that are much longer than all others and show nothing.

    Args:
        features: [patches, width], of one image.
        kept_sets: raster indices of each set.
    """
    directions = features.astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    spread = ((directions - directions.mean(axis=0)) ** 2).sum(axis=1)
    return [Cost(max(0.0, 1 - float(spread[kept].sum() / spread.sum()))) for kept in kept_sets]


@dataclass(frozen=True)
class Prompt:
    """A question about an image, as embeddings.

    Attributes:
        before: [length, hidden], the text before the image.
        image: [prefix + patches, hidden], all tokens of the image.
        after: [length, hidden], the text after the image.
        num_prefix_tokens: tokens of the image that are not patches and are always kept.
    """

    before: NDArray[np.float32]
    image: NDArray[np.float32]
    after: NDArray[np.float32]
    num_prefix_tokens: int

    def embeds(self, kept: NDArray[np.int64] | None, answer: NDArray[np.float32]) -> NDArray[np.float32]:
        """The prompt with the kept patches, or all, and the beginning of an answer: [length, hidden]."""
        prefix = self.num_prefix_tokens
        image = self.image if kept is None else np.concatenate([self.image[:prefix], self.image[prefix + kept]])
        return np.concatenate([self.before, image, self.after, answer])


@dataclass(frozen=True)
class UnprunedAnswer:
    """The answer of the unpruned model.

    Attributes:
        embeds: [tokens, hidden], of the answer's tokens.
        log_probabilities: [tokens, vocab], those that each token was chosen from.
    """

    embeds: NDArray[np.float32]
    log_probabilities: NDArray[np.float32]


class AnswerCriterion:
    """Compares the answers of a language model that sees the kept tokens with those of one that sees all.

    The unpruned model answers greedily. The pruned model then reads the same answer token by token, and the cost is
    the Kullback-Leibler divergence, in nats and averaged over the answer's tokens, of its next-token distribution
    from the unpruned one's. One layer of the model is in memory at a time, in float32.

    Args:
        checkpoint: only its language weights are read.
        eos_token_ids: tokens that end an answer.
        max_answer_tokens: answers end after this many tokens.
    """

    def __init__(self, checkpoint: Checkpoint, eos_token_ids: Sequence[int], max_answer_tokens: int) -> None:
        self._checkpoint = checkpoint
        self._table = checkpoint.language_tensor("model.embed_tokens.weight")
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_answer_tokens = max_answer_tokens

    def prompt(self, token_ids: Sequence[int], image: NDArray[np.float32], num_prefix_tokens: int) -> Prompt:
        """A prompt from its token ids, in which one token stands for the image."""
        place = list(token_ids).index(self._checkpoint.config.image_token_id)
        return Prompt(self._embed(token_ids[:place]), image, self._embed(token_ids[place + 1 :]), num_prefix_tokens)

    def answer(self, prompts: Sequence[Prompt], report: Callable[[int, int], None]) -> list[UnprunedAnswer]:
        """Answer prompts greedily with all tokens of their images; all together, token by token."""
        tokens: list[list[int]] = [[] for _ in prompts]
        found: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        for step in range(self._max_answer_tokens):
            sequences = ((prompts[index].embeds(None, self._embed(tokens[index])), 1) for index in unfinished)
            for index, logits in zip(unfinished, self._logits(sequences), strict=True):
                found[index].append(_log_softmax(logits[0]))
                tokens[index].append(int(logits[0].argmax()))
            unfinished = [index for index in unfinished if tokens[index][-1] not in self._eos_token_ids]
            report(step + 1, self._max_answer_tokens)
            if not unfinished:
                break
        return [UnprunedAnswer(self._embed(ids), np.stack(rows)) for ids, rows in zip(tokens, found, strict=True)]

    def costs(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[UnprunedAnswer],
        kept_sets: Sequence[Sequence[NDArray[np.int64]]],
        report: Callable[[int, int], None],
    ) -> list[list[Cost]]:
        """The cost of each set of kept tokens.

        Args:
            prompts: the questions.
            answers: of the unpruned model, one for each prompt.
            kept_sets: for each prompt the sets, raster indices each.
            report: gets (sets done, all sets).
        """

        def sequences() -> Iterator[tuple[NDArray[np.float32], int]]:
            for prompt, answer, sets in zip(prompts, answers, kept_sets, strict=True):
                for kept in sets:
                    yield prompt.embeds(kept, answer.embeds[:-1]), len(answer.embeds)

        logits, num_all = self._logits(sequences()), sum(map(len, kept_sets))
        costs: list[list[Cost]] = []
        for answer, sets in zip(answers, kept_sets, strict=True):
            costs.append([_divergence(answer.log_probabilities, next(logits)) for _ in sets])
            report(sum(map(len, costs)), num_all)
        return costs

    def _embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        embeds: NDArray[np.float32] = self._table[np.asarray(token_ids, np.int64)].float().numpy()
        return embeds

    def _logits(self, sequences: Iterable[tuple[NDArray[np.float32], int]]) -> Iterator[NDArray[np.float32]]:
        """The logits of the last positions of each sequence, whose number comes with it."""
        for chunk in _chunks(sequences):
            embeds, num_last = zip(*chunk, strict=True)
            yield from language_reference(
                self._checkpoint.config.text_config, self._checkpoint.language_tensor, embeds, num_last
            )


def _chunks(
    sequences: Iterable[tuple[NDArray[np.float32], int]],
) -> Iterator[list[tuple[NDArray[np.float32], int]]]:
    chunk: list[tuple[NDArray[np.float32], int]] = []
    num_positions = 0
    for embeds, num_last in sequences:
        if chunk and num_positions + len(embeds) > MAX_POSITIONS:
            yield chunk
            chunk, num_positions = [], 0
        chunk.append((embeds, num_last))
        num_positions += len(embeds)
    if chunk:
        yield chunk


def _divergence(expected: NDArray[np.float32], logits: NDArray[np.float32]) -> Cost:
    """KL(expected || found) and agreement of [tokens, vocab] log probabilities and logits."""
    found = _log_softmax(logits)
    divergence = (np.exp(expected) * (expected - found)).sum(axis=-1)
    agreement = expected.argmax(axis=-1) == found.argmax(axis=-1)
    return Cost(float(divergence.mean()), float(agreement.mean()))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
