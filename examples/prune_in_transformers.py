"""Prune a loaded Hugging Face model: python examples/prune_in_transformers.py CHECKPOINT IMAGE "What is it?"."""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hivtp import PruningSpec
from hivtp.runtime.integrations.transformers import prune


def main(checkpoint: str, image: str, question: str) -> None:
    """Print the answer of the model as it is, and pruned to a third of its visual tokens."""
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(image).convert("RGB"), text=text, return_tensors="pt")

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    print("unpruned:", answer())
    with prune(model, PruningSpec.preset("192", (side, side))):
        print("pruned:", answer())


if __name__ == "__main__":
    main(*sys.argv[1:])
