"""transformers' LLaVA on the same checkpoint: what an unpruned and a pruned answer must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hivtp_ops import select

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    import numpy as np
    from PIL import Image

    from hivtp_ops import PruningSpec


class HuggingFace:
    """A checkpoint in transformers, in float32, with its own processor; greedy."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.model.vision_tower.set_attn_implementation("eager")

    @torch.inference_mode()
    def generate(
        self, prompt: str, images: Sequence[Image.Image], max_new_tokens: int, system: str | None = None, **options: Any
    ) -> list[int]:
        """New token ids of the unpruned model."""
        inputs = self._inputs(prompt, images, system)
        outputs = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
        return outputs[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def generate_pruned(
        self, prompt: str, images: Sequence[Image.Image], max_new_tokens: int, spec: PruningSpec
    ) -> tuple[list[int], list[list[int]]]:
        """New token ids where only what `select` keeps reaches the projector, and the kept indices per image."""
        inputs, config = self._inputs(prompt, images), self.model.config
        outputs = self.model.model.vision_tower(
            inputs["pixel_values"], output_attentions=True, output_hidden_states=True
        )
        layers = range(spec.first_layer, spec.first_layer + spec.num_layers)
        importance = torch.stack([outputs.attentions[layer] for layer in layers]).mean(dim=(0, 2, 3))[:, 1:]
        side = config.vision_config.image_size // config.vision_config.patch_size
        selection = select(importance.numpy(), (side, side), spec)
        kept = [row[:count].tolist() for row, count in zip(selection.indices, selection.counts, strict=True)]

        features = outputs.hidden_states[config.vision_feature_layer]
        prefix = [0] if config.vision_feature_select_strategy == "full" else []
        embeds = [
            self.model.model.multi_modal_projector(image[prefix + [1 + index for index in indices]])
            for image, indices in zip(features, kept, strict=True)
        ]
        # The processor wrote one run of placeholders per image; each run shrinks to what was kept of its image.
        ids = inputs["input_ids"][0].tolist()
        num_tokens = len(features[0]) - (not prefix)
        trimmed: list[int] = []
        remaining = iter(embeds)
        while ids:
            if ids[0] == config.image_token_id:
                trimmed += [config.image_token_id] * len(next(remaining))
                ids = ids[num_tokens:]
            else:
                trimmed.append(ids.pop(0))
        input_ids = torch.tensor([trimmed])
        inputs_embeds = self.model.get_input_embeddings()(input_ids)
        inputs_embeds[input_ids == config.image_token_id] = torch.cat(embeds)
        return self.continue_embeds(inputs_embeds[0].numpy(), max_new_tokens), kept

    @torch.inference_mode()
    def continue_embeds(self, embeds: np.ndarray, max_new_tokens: int) -> list[int]:
        """New token ids after embeddings [length, hidden]."""
        inputs_embeds = torch.from_numpy(embeds)[None]
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64)
        outputs = self.model.generate(
            inputs_embeds=inputs_embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
        )
        return outputs[0].tolist()

    @torch.inference_mode()
    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """Logits [length, vocab] of embeddings [length, hidden]."""
        return self.model(inputs_embeds=torch.from_numpy(embeds)[None]).logits[0].numpy()

    def _inputs(self, prompt: str, images: Sequence[Image.Image], system: str | None = None) -> dict[str, torch.Tensor]:
        image = [{"type": "image"}] if len(images) == 1 and "<image>" not in prompt else []
        messages = [{"role": "user", "content": [*image, {"type": "text", "text": prompt}]}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor(text=text, images=list(images) or None, return_tensors="pt")
