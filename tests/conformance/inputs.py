"""What each architecture is asked: token ids, pictures, sound, told from its configuration.

The same seed gives the same inputs. Knows how inputs look; knows nothing of how they are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

ROWS, LENGTH = 2, 7
Inputs = dict[str, Tensor]


def inputs_of(model: PreTrainedModel) -> Inputs:
    """Arguments of ``model``'s forward pass."""
    torch.manual_seed(11)
    special = _SPECIAL.get(model.config.model_type)
    if special is not None:
        return special(model)
    main = model.main_input_name
    maker = _BY_MAIN_INPUT.get(main)
    if maker is None:
        raise ValueError(f"no inputs are made for a model that takes {main!r}")
    found = maker(model)
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" in accepted and main == "input_ids" and _is_dual(model):
        found.update(_pictures(model))
    if "decoder_input_ids" in accepted and model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids(model, length=5)
    return found


def ids(model: PreTrainedModel, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Random token ids that no special token has."""
    return torch.randint(5, 90, (rows, length))


def _is_dual(model: PreTrainedModel) -> bool:
    """Two towers, like CLIP: both inputs are required."""
    return hasattr(model, "logit_scale")


def _text(model: PreTrainedModel) -> Inputs:
    return {"input_ids": ids(model)}


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    return getattr(config, "vision_config", None) or config


def _pictures(model: PreTrainedModel, rows: int = ROWS) -> Inputs:
    config = _vision(model.config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.randn(rows, channels, height, width)}


def _video(model: PreTrainedModel) -> Inputs:
    frames = getattr(model.config, "num_frames", 8)
    size = model.config.image_size
    return {"pixel_values": torch.randn(ROWS, frames, model.config.num_channels, size, size)}


def _sound(model: PreTrainedModel) -> Inputs:
    return {"input_values": torch.randn(ROWS, 6400)}


def _features(model: PreTrainedModel) -> Inputs:
    config = model.config
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
    return {"input_features": torch.randn(ROWS, bins, 2 * config.max_source_positions)}


def _frames_first(model: PreTrainedModel) -> Inputs:
    width = getattr(model.config, "input_feat_per_channel", None) or getattr(
        model.config, "feature_projection_input_dim", 80
    )
    return {"input_features": torch.randn(ROWS, 40, width)}


def _spectrogram(model: PreTrainedModel) -> Inputs:
    config = model.config
    return {"input_values": torch.randn(ROWS, config.max_length, config.num_mel_bins)}


def _waveform(model: PreTrainedModel) -> Inputs:
    return {"input_values": torch.randn(ROWS, 1, 960)}


def _picture_and_text(model: PreTrainedModel) -> Inputs:
    """Text around the place of one picture, as many image tokens as the picture becomes."""
    config = model.config
    pictures = _pictures(model, rows=1)
    vision = _vision(config)
    patches = (_side(vision.image_size) // _side(vision.patch_size)) ** 2
    factor = getattr(config, "scale_factor", None) or (
        round(1 / config.downsample_ratio) if hasattr(config, "downsample_ratio") else 1
    )
    image = getattr(config, "image_token_id", None) or config.image_token_index
    found = _around(model, image, patches // factor**2)
    if config.model_type == "idefics3":
        pictures["pixel_values"] = pictures["pixel_values"].unsqueeze(1)
    return {**found, **pictures}


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _around(model: PreTrainedModel, token: int, count: int, before: tuple[int, ...] = ()) -> Inputs:
    picture = torch.tensor([[*before, *[token] * count]])
    text = ids(model, rows=1)
    together = torch.cat([text[:, :3], picture, text[:, 3:]], dim=1)
    return {"input_ids": together, "attention_mask": torch.ones_like(together)}


def _llava_next(model: PreTrainedModel) -> Inputs:
    """One base view and one tile, with a token at the end of each row of patches."""
    config, vision = model.config, model.config.vision_config
    side = vision.image_size // vision.patch_size
    pictures = torch.randn(1, 3, 3, vision.image_size, vision.image_size)
    count = side * side + side * (2 * side + 1)
    found = _around(model, config.image_token_id, count)
    size = vision.image_size
    return {**found, "pixel_values": pictures, "image_sizes": torch.tensor([[size, 2 * size]])}


def _qwen_vl(model: PreTrainedModel) -> Inputs:
    """One picture of 4 × 4 patches, which the model merges 2 × 2."""
    config, vision = model.config, model.config.vision_config
    channels = getattr(vision, "in_channels", 3)
    features = channels * vision.temporal_patch_size * vision.patch_size**2
    found = _around(model, config.image_token_id, 4, (config.vision_start_token_id,))
    kinds = (found["input_ids"] == config.image_token_id).long()
    found["mm_token_type_ids"] = kinds
    return {
        **found,
        "pixel_values": torch.randn(16, features),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _vision_to_text(model: PreTrainedModel) -> Inputs:
    return {**_pictures(model), "decoder_input_ids": ids(model, length=5)}


def _codebooks(model: PreTrainedModel) -> Inputs:
    """A row of codes for each codebook."""
    return {"input_ids": ids(model, rows=ROWS * model.config.num_codebooks)}


def _letters(model: PreTrainedModel) -> Inputs:
    return {"input_ids": torch.randint(1, 30, (ROWS, LENGTH))}


def _blip(model: PreTrainedModel) -> Inputs:
    return {**_pictures(model), **_text(model)}


def _blip2(model: PreTrainedModel) -> Inputs:
    found = _around(model, model.config.image_token_index, model.config.num_query_tokens)
    return {**found, **_pictures(model, rows=1)}


def _sam(model: PreTrainedModel) -> Inputs:
    return {**_pictures(model), "input_points": 16 * torch.rand(ROWS, 1, 2, 2)}


_BY_MAIN_INPUT: dict[str, Callable[[PreTrainedModel], Inputs]] = {
    "input_ids": _text,
    "pixel_values": _pictures,
    "input_values": _sound,
    "input_features": _features,
}

_SPECIAL: dict[str, Callable[[PreTrainedModel], Inputs]] = {
    "audio-spectrogram-transformer": _spectrogram,
    "encodec": _waveform,
    "speech_to_text": lambda model: {
        **_frames_first(model),
        "decoder_input_ids": ids(model, length=5),
    },
    "wav2vec2-bert": _frames_first,
    "timesformer": _video,
    "videomae": _video,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "reformer": lambda model: {"input_ids": ids(model, length=8)},
    "vits": _letters,
    "sam": _sam,
    "blip": _blip,
    "blip-2": _blip2,
    "llava": _picture_and_text,
    "llava_next": _llava_next,
    "paligemma": _picture_and_text,
    "idefics3": _picture_and_text,
    "internvl": _picture_and_text,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
    "vision-encoder-decoder": _vision_to_text,
}
