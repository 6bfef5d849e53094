"""The architectures that are compared: the whole causal-LM mapping, and others by name."""

from __future__ import annotations

from typing import NamedTuple

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class Case(NamedTuple):
    """One architecture."""

    family: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.model_type}/{self.class_name}"

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.class_name)  # type: ignore[no-any-return]


CAUSAL = "causal LM"

_OTHERS: dict[str, list[tuple[str, str]]] = {
    "seq2seq": [
        ("t5", "T5ForConditionalGeneration"),
        ("mt5", "MT5ForConditionalGeneration"),
        ("umt5", "UMT5ForConditionalGeneration"),
        ("longt5", "LongT5ForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
        ("mbart", "MBartForConditionalGeneration"),
        ("pegasus", "PegasusForConditionalGeneration"),
        ("marian", "MarianMTModel"),
        ("led", "LEDForConditionalGeneration"),
        ("m2m_100", "M2M100ForConditionalGeneration"),
        ("prophetnet", "ProphetNetForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("speech_to_text", "Speech2TextForConditionalGeneration"),
    ],
    "encoder": [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForMaskedLM"),
        ("modernbert", "ModernBertForMaskedLM"),
        ("distilbert", "DistilBertForMaskedLM"),
        ("albert", "AlbertForMaskedLM"),
        ("electra", "ElectraForMaskedLM"),
        ("deberta", "DebertaForMaskedLM"),
        ("deberta-v2", "DebertaV2ForMaskedLM"),
        ("mpnet", "MPNetForMaskedLM"),
        ("longformer", "LongformerForMaskedLM"),
        ("funnel", "FunnelForMaskedLM"),
        ("fnet", "FNetForMaskedLM"),
        ("esm", "EsmForMaskedLM"),
    ],
    "vision": [
        ("vit", "ViTForImageClassification"),
        ("deit", "DeiTForImageClassification"),
        ("beit", "BeitForImageClassification"),
        ("swin", "SwinForImageClassification"),
        ("swinv2", "Swinv2ForImageClassification"),
        ("dinov2", "Dinov2ForImageClassification"),
        ("dinov3_vit", "DINOv3ViTModel"),
        ("resnet", "ResNetForImageClassification"),
        ("convnext", "ConvNextForImageClassification"),
        ("convnextv2", "ConvNextV2ForImageClassification"),
        ("mobilenet_v2", "MobileNetV2ForImageClassification"),
        ("mobilevit", "MobileViTForImageClassification"),
        ("efficientnet", "EfficientNetForImageClassification"),
        ("segformer", "SegformerForSemanticSegmentation"),
        ("sam", "SamModel"),
        ("dpt", "DPTForDepthEstimation"),
        ("vit_mae", "ViTMAEModel"),
        ("hiera", "HieraForImageClassification"),
        ("timesformer", "TimesformerForVideoClassification"),
        ("videomae", "VideoMAEForVideoClassification"),
    ],
    "audio": [
        ("audio-spectrogram-transformer", "ASTForAudioClassification"),
        ("wav2vec2", "Wav2Vec2ForCTC"),
        ("hubert", "HubertForCTC"),
        ("wavlm", "WavLMForCTC"),
        ("data2vec-audio", "Data2VecAudioForCTC"),
        ("wav2vec2-bert", "Wav2Vec2BertForCTC"),
        ("encodec", "EncodecModel"),
        ("vits", "VitsModel"),
    ],
    "vision-language": [
        ("clip", "CLIPModel"),
        ("siglip", "SiglipModel"),
        ("blip", "BlipForConditionalGeneration"),
        ("blip-2", "Blip2ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("llava_next", "LlavaNextForConditionalGeneration"),
        ("paligemma", "PaliGemmaForConditionalGeneration"),
        ("idefics3", "Idefics3ForConditionalGeneration"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        ("internvl", "InternVLForConditionalGeneration"),
        ("vision-encoder-decoder", "VisionEncoderDecoderModel"),
    ],
}


def cases() -> list[Case]:
    """Every architecture, the causal LMs first, in the order of transformers' own mapping."""
    found = [Case(CAUSAL, kind, name) for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()]
    for family, members in _OTHERS.items():
        found += [Case(family, kind, name) for kind, name in members]
    return found


def case(name: str) -> Case:
    """The case of that name (``model_type/ClassName``, or a model type that has one case)."""
    matching = [c for c in cases() if name in (c.name, c.model_type)]
    if not matching:
        raise ValueError(f"no architecture is called {name!r}")
    return matching[0]
