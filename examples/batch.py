"""Ask one question about many images together: python examples/batch.py BUNDLE QUESTION IMAGE IMAGE ..."""

import sys

from hivtp import HivtpError, Pipeline, Request, SamplingParams


def main(bundle: str, question: str, *images: str) -> None:
    """Print an answer for each image; one that cannot be read costs no other its answer."""
    sampling = SamplingParams(max_new_tokens=64, temperature=0)
    with Pipeline.load(bundle) as pipeline:
        results = pipeline.generate_batch([Request(question, [image], sampling) for image in images])
    for image, result in zip(images, results, strict=True):
        print(f"{image}: {f'failed: {result}' if isinstance(result, HivtpError) else result.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
