"""Several questions about one image, which is encoded once: python examples/chat_with_image.py BUNDLE IMAGE Q Q ..."""

import sys

from hivtp import Pipeline


def main(bundle: str, image: str, *questions: str) -> None:
    """Print each answer; from the second question on, only the new tokens are computed."""
    with Pipeline.load(bundle) as pipeline:
        chat = pipeline.chat()
        for number, question in enumerate(questions):
            answer = chat.ask(question, images=[image] if number == 0 else [])
            print(f"{question} {answer.text} ({answer.timings.ttft_ms:.0f} ms to the first token)")


if __name__ == "__main__":
    main(*sys.argv[1:])
