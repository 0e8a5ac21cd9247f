"""The miniature: a LLaVA of about 1.2 million parameters, in the Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import CHAT_TEMPLATE, write_processor
from benchmarks.miniature.pictures import COLOURS, GRID, NUM_SHAPES, NUMERALS, PATCH, PLACES, SHAPES, SIDE

if TYPE_CHECKING:
    import torch

CHECKPOINT = Path(__file__).parent / "checkpoint"
WIDTH = 96
HEADS = 3
# The tower's layers that run: the features are those of the last but one layer, as in LLaVA-1.5.
NUM_VISION_LAYERS = 6
# Other than WIDTH: ONNX Runtime GenAI takes every linear layer with as many outputs as words for the head.
VOCAB_SIZE = 128
# Bounds the attention maps: 13 MB for each layer.
PICTURES_PER_RUN = 50
# Those that CLIP's image processor subtracts and divides by.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_QUESTION_WORDS = (
    "user assistant : ? . , what colour which shape shapes is the a there where are how many number shown left of above"
)
_WORDS = [
    *_QUESTION_WORDS.split(),
    *SHAPES,
    *COLOURS,
    *(NUMERALS[count] for count in NUM_SHAPES),
    *dict.fromkeys(" ".join(PLACES).split()),
    "yes",
    "no",
    # A digit that begins a number, and one that goes on with it.
    *(str(digit) for digit in range(10)),
    *(f"##{digit}" for digit in range(10)),
]
_SPECIAL = ("<unk>", "<s>", "</s>", "<image>")


def make_tokenizer() -> Any:
    """A tokenizer of whole words in lower case, and of single digits; `<s>` in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate(dict.fromkeys([*_SPECIAL, *_WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int = 0) -> Any:
    """A miniature that has learnt nothing: a `LlavaForConditionalGeneration` in float32."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_attention_heads=HEADS,
            num_hidden_layers=NUM_VISION_LAYERS + 1,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=256,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            num_hidden_layers=3,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    _initialise(model)
    return model


def _initialise(model: Any) -> None:
    """Weights for this width: those that transformers sets are meant for models ten times as wide.

    The tower's keys begin as its queries, so that patches attend to those like them and next to them; it learns
    shapes in far fewer steps so (Mimetic Initialization of Self-Attention Layers, arXiv 2305.09828).
    """
    import torch

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                std = (3 * module.weight[0].numel()) ** -0.5
                is_residual = name.endswith(("out_proj", "fc2", "o_proj", "down_proj"))
                module.weight.normal_(std=std / 2 if is_residual else std)
                if module.bias is not None:
                    module.bias.zero_()
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(2)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        embeddings = model.model.vision_tower.embeddings
        embeddings.class_embedding.normal_(std=0.3)
        embeddings.position_embedding.weight[0].zero_()
        embeddings.position_embedding.weight[1:] = _grid_waves(GRID, WIDTH)
        model.get_input_embeddings().weight.normal_(std=0.3)


def _grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of rows and columns: where a tower begins to learn its positions. [side * side, width]."""
    import torch

    frequencies = 8.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) * 0.5
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [pictures, SIDE, SIDE, 3] as the image processor of the checkpoint gives them."""
    import torch

    scaled = (pixels.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return scaled.permute(0, 3, 1, 2).contiguous()


def vision_states(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The tower's states that LLaVA takes, the class token's first: [pictures, 1 + patches, WIDTH]."""
    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for layer in tower.encoder.layers[:NUM_VISION_LAYERS]:
        states = layer(states, None)
    return states


def run_tower(model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What LLaVA and the rules take from the tower, which has eager attention; of the layers that LLaVA runs.

    Returns:
        Features [pictures, patches, width], and of the attention maps, mean over heads, what each patch receives in
        the mean over all queries and what it receives from the class token: [pictures, layers, patches] each.
    """
    import torch

    feature_layer = model.config.vision_feature_layer
    parts = []
    for chunk in pixel_values.split(PICTURES_PER_RUN):
        with torch.inference_mode():
            outputs = model.model.vision_tower(chunk, output_hidden_states=True, output_attentions=True)
        num_layers = range(len(outputs.hidden_states))[feature_layer]
        maps = torch.stack(outputs.attentions[:num_layers], dim=1)
        received, from_class = maps.mean(dim=(2, 3))[..., 1:], maps[:, :, :, 0, 1:].mean(dim=2)
        parts.append((outputs.hidden_states[feature_layer][:, 1:], received, from_class))
    features, received, from_class = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, received, from_class


def answer_logits(
    model: Any, patches: torch.Tensor, opening_ids: torch.Tensor, question_ids: torch.Tensor
) -> torch.Tensor:
    """Logits of several questions about each picture, which share its visual tokens.

    Each question sees the opening, the picture and itself, at the positions that it has when it is asked alone.

    Args:
        model: the miniature.
        patches: states of the kept patches in raster order, [pictures, kept, WIDTH].
        opening_ids: token ids before the picture, [opening].
        question_ids: token ids after it, [pictures, questions, length], padded at the end.

    Returns:
        [pictures, questions, length, VOCAB_SIZE].
    """
    import torch

    num_pictures, num_questions, length = question_ids.shape
    embed = model.get_input_embeddings()
    opening = embed(opening_ids).expand(num_pictures, -1, -1)
    visual = model.model.multi_modal_projector(patches)
    prefix = opening.shape[1] + visual.shape[1]
    embeddings = torch.cat([opening, visual, embed(question_ids.flatten(1))], dim=1)
    positions = torch.cat([torch.arange(prefix), prefix + torch.arange(length).repeat(num_questions)])
    question = torch.cat([torch.full((prefix,), -1), torch.arange(num_questions).repeat_interleave(length)])
    is_before = torch.arange(len(question))[:, None] >= torch.arange(len(question))
    is_visible = is_before & ((question[:, None] == question) | (question == -1))
    mask = torch.zeros(is_visible.shape).masked_fill(~is_visible, float("-inf"))
    states = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask[None, None],
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state
    logits: torch.Tensor = model.lm_head(states[:, prefix:])
    return logits.unflatten(1, (num_questions, length))


def save(model: Any, folder: Path) -> None:
    """Write the miniature as a checkpoint in float16. The model itself is left as it is."""
    import copy

    import torch

    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(folder)
    write_processor(folder, model.config, make_tokenizer())
