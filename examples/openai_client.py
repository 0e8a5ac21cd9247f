"""Ask a running `hivtp serve` with the client of OpenAI: python examples/openai_client.py URL IMAGE QUESTION."""

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI


def main(url: str, image: str, question: str) -> None:
    """Print the answer as it comes, then how many visual tokens were kept. The URL ends with /v1."""
    client = OpenAI(base_url=url, api_key="none")
    kind = mimetypes.guess_type(image)[0]
    data = base64.b64encode(Path(image).read_bytes()).decode()
    content = [
        {"type": "text", "text": question},
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
    ]
    chunks = client.chat.completions.create(
        model="hivtp",
        messages=[{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens_details.multimodal_tokens['image']} visual tokens were kept.")


if __name__ == "__main__":
    main(*sys.argv[1:])
