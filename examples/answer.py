"""Ask about an image; the answer streams: python examples/answer.py BUNDLE IMAGE "What is in the image?"."""

import sys

from hivtp import Pipeline


def main(bundle: str, image: str, question: str = "What is in the image?") -> None:
    """Print the answer as it comes, then what it cost."""
    with Pipeline.load(bundle) as pipeline:
        stream = pipeline.stream(question, images=[image])
        for piece in stream:
            print(piece, end="", flush=True)
    answer = stream.answer
    print(f"\n{answer.num_kept_tokens} of {answer.num_image_tokens} visual tokens were kept,", end=" ")
    print(f"and the first token came after {answer.timings.ttft_ms:.0f} ms.")


if __name__ == "__main__":
    main(*sys.argv[1:])
