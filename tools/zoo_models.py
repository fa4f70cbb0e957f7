"""The architectures of the zoo: how each is built, what it takes, and how it becomes an ONNX file.

Model code comes from torchvision, timm and transformers (``pip install --no-deps`` will do: no weights and no
compiled operators of theirs are used) and from ``tools.zoo_networks``. All weights are random. Statistics of
BatchNormalization, scales, biases, layer scales and position tables are random too, so that a channel that
ends up in the wrong place changes the outputs.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools import zoo_networks as hand

OPSET = 17
DYNAMO_OPSET = 18
VARIANTS = ("main", "dynB", "dynamo", "bn")


@dataclass(frozen=True)
class Input:
    """One input of a network: its shape without the batch, and what its numbers are.

    ``kind`` is image (smooth, with noise), noise, tokens (below ``high``) or mask (ones, then zeros).
    ``open`` names axes that a dynamic export leaves open besides the batch; they count from the batch.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "image"
    high: int = 100
    open: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """An architecture: ``build`` makes the module, which takes ``inputs`` in order.

    ``variants`` are the files made of it beside the main one; ``exporter`` writes that one. ``dynamic``
    leaves the open axes and the batch of the main file open.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...] = ("output",)
    variants: tuple[str, ...] = ()
    exporter: str = "torchscript"
    dynamic: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, without suffix."""
        return (self.name, *(f"{self.name}__{variant}" for variant in self.variants))


# ---------------------------------------------------------------- model libraries


def _import_torchvision() -> ModuleType:
    """Import torchvision without its compiled operators, which belong to one build of torch.

    Only the module that describes them to torch's tracers needs them, and nothing here traces them.
    """
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, ModuleType(name))
    import torchvision

    return torchvision


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        _import_torchvision()
        from torchvision import models

        return models.get_model(name, weights=None, **options)

    return build


class _OneOutput(nn.Module):
    """Takes one entry of what a module returns; passes inputs on by position or by ``names``."""

    def __init__(self, module: nn.Module, key: str | int, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.module, self.key, self.names = module, key, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.module(**dict(zip(self.names, inputs))) if self.names else self.module(*inputs)
        return result[self.key]


def _segmentation(name: str) -> Callable[[], nn.Module]:
    build = _torchvision(name, weights_backbone=None)
    return lambda: _OneOutput(build(), "out")


def _googlenet() -> nn.Module:
    return _torchvision("googlenet", aux_logits=False, init_weights=False)()


def _inception() -> nn.Module:
    return _torchvision("inception_v3", aux_logits=False, init_weights=False)()


def _classic(name: str, side: int, n_features: int, n_hidden: int) -> Callable[[], nn.Module]:
    """AlexNet or VGG for a small image: fewer positions, and a narrower classifier, behind the same trunk."""

    def build() -> nn.Module:
        model = _torchvision(name)()
        model.avgpool = nn.AdaptiveAvgPool2d((side, side))
        model.classifier = nn.Sequential(
            nn.Linear(n_features * side**2, n_hidden), nn.ReLU(), nn.Dropout(),
            nn.Linear(n_hidden, n_hidden), nn.ReLU(), nn.Dropout(), nn.Linear(n_hidden, 1000),
        )  # fmt: skip
        return model

    return build


def _wide_resnet() -> nn.Module:
    _import_torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=80)


def _vision_transformer() -> nn.Module:
    _import_torchvision()
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=64, patch_size=16, num_layers=5, num_heads=4, hidden_dim=96, mlp_dim=384, num_classes=100
    )


def _maxvit() -> nn.Module:
    _import_torchvision()
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[24, 48, 80],
        block_layers=[1, 1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=100,
    )  # fmt: skip


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        _import_torchvision()
        import timm

        return timm.create_model(name, pretrained=False, num_classes=100, **options)

    return build


def _convmixer() -> nn.Module:
    _import_torchvision()
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=256, depth=8, kernel_size=7, patch_size=4, num_classes=100)


def _transformer(
    model: str, config: str, key: str, names: Sequence[str], /, **options: Any
) -> Callable[[], nn.Module]:
    """A model of transformers, by its class (and its module, unless exported) and its configuration."""

    def build() -> nn.Module:
        _import_torchvision()
        import transformers

        module, _, class_name = f"transformers.{model}".rpartition(".")
        settings = getattr(transformers, config)(**options)
        return _OneOutput(getattr(import_module(module), class_name)(settings).eval(), key, names)

    return build


# ---------------------------------------------------------------- the zoo

_IMAGE64 = (Input("input", (3, 64, 64)),)
_TOKENS = (Input("input_ids", (16,), "tokens", open={1: "sequence"}),)
_MASKED = (*_TOKENS, Input("attention_mask", (16,), "mask", open={1: "sequence"}))


def _image(size: int, channels: int = 3) -> tuple[Input, ...]:
    return (Input("input", (channels, size, size)),)


def _noise(*shape: int, name: str = "input") -> tuple[Input, ...]:
    return (Input(name, shape, "noise"),)


_SMALL = {  # sizes of most transformers here
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
_TEXT = {**_SMALL, "vocab_size": 100, "max_position_embeddings": 64}
_TORCHVISION = (
    Network("alexnet", _classic("alexnet", 3, 256, 1200), _image(127)),
    Network("vgg11_bn", _classic("vgg11_bn", 2, 512, 2464), _IMAGE64, variants=("bn",)),
    Network("resnet18", _torchvision("resnet18"), _IMAGE64, variants=("dynB", "dynamo", "bn")),
    Network("resnet50", _torchvision("resnet50"), _IMAGE64, variants=("dynamo", "bn")),
    Network("resnext50_32x4d", _torchvision("resnext50_32x4d"), _IMAGE64),
    Network("wide_resnet50_w80", _wide_resnet, _IMAGE64),
    Network("densenet121", _torchvision("densenet121"), _IMAGE64, variants=("dynamo",)),
    Network("squeezenet1_1", _torchvision("squeezenet1_1"), _IMAGE64),
    Network("mobilenet_v2", _torchvision("mobilenet_v2"), _IMAGE64, variants=("dynB", "dynamo", "bn")),
    Network("mobilenet_v3_small", _torchvision("mobilenet_v3_small"), _IMAGE64, variants=("dynamo",)),
    Network("mobilenet_v3_large", _torchvision("mobilenet_v3_large"), _IMAGE64),
    Network("efficientnet_b0", _torchvision("efficientnet_b0"), _IMAGE64, variants=("dynB", "dynamo")),
    Network("efficientnet_v2_s", _torchvision("efficientnet_v2_s"), _IMAGE64),
    Network("regnet_y_400mf", _torchvision("regnet_y_400mf"), _IMAGE64),
    Network("regnet_x_400mf", _torchvision("regnet_x_400mf"), _IMAGE64),
    Network("shufflenet_v2_x0_5", _torchvision("shufflenet_v2_x0_5"), _IMAGE64, variants=("dynB", "dynamo")),
    Network("mnasnet0_5", _torchvision("mnasnet0_5"), _IMAGE64),
    Network("googlenet", _googlenet, _IMAGE64),
    Network("inception_v3", _inception, _image(75)),
    Network("convnext_tiny", _torchvision("convnext_tiny"), _IMAGE64, variants=("dynB",)),
    Network("swin_t", _torchvision("swin_t"), _image(112), variants=("dynamo",)),
    Network("vit_b_16_small", _vision_transformer, _IMAGE64, variants=("dynB", "dynamo")),
    Network("maxvit_small", _maxvit, _IMAGE64),
    Network("fcn_resnet50", _segmentation("fcn_resnet50"), _IMAGE64),
    Network("deeplabv3_mobilenet_v3_large", _segmentation("deeplabv3_mobilenet_v3_large"), _IMAGE64,
            variants=("dynB",)),
    Network("lraspp_mobilenet_v3_large", _segmentation("lraspp_mobilenet_v3_large"), _IMAGE64),
)  # fmt: skip
_TIMM = (
    Network("timm_res2net50_26w_4s", _timm("res2net50_26w_4s"), _IMAGE64),
    Network("timm_resnest14d", _timm("resnest14d"), _IMAGE64),
    Network("timm_hrnet_w18_small", _timm("hrnet_w18_small"), _IMAGE64),
    Network("timm_ghostnet_100", _timm("ghostnet_100"), _IMAGE64, variants=("dynB",)),
    Network("timm_repvgg_a0", _timm("repvgg_a0"), _IMAGE64),
    Network("timm_dla34", _timm("dla34"), _IMAGE64),
    Network("timm_cspresnet50", _timm("cspresnet50"), _IMAGE64),
    Network("timm_darknet53", _timm("darknet53"), _IMAGE64),
    Network("timm_mobilevit_s", _timm("mobilevit_s"), _IMAGE64, variants=("dynB",)),
    Network("timm_mobileone_s0", _timm("mobileone_s0"), _IMAGE64),
    Network("timm_edgenext_xx_small", _timm("edgenext_xx_small"), _IMAGE64, variants=("dynamo",)),
    Network("timm_poolformer_s12", _timm("poolformer_s12"), _IMAGE64),
    Network("timm_levit_128s", _timm("levit_128s", img_size=64), _IMAGE64),
    Network("timm_xcit_nano_12_p16_224", _timm("xcit_nano_12_p16_224", img_size=64), _IMAGE64),
    Network("timm_deit_tiny_patch16_224", _timm("deit_tiny_patch16_224", img_size=64), _IMAGE64,
            variants=("dynB", "dynamo")),
    Network("timm_convmixer_d8", _convmixer, _IMAGE64),
    Network("timm_coatnet_nano_rw_224", _timm("coatnet_nano_rw_224", img_size=64), _IMAGE64),
    Network("timm_tf_efficientnet_lite0", _timm("tf_efficientnet_lite0"), _IMAGE64),
    Network("timm_fbnetc_100", _timm("fbnetc_100"), _IMAGE64),
    Network("timm_hardcorenas_a", _timm("hardcorenas_a"), _IMAGE64),
    Network("timm_nfnet_l0", _timm("nfnet_l0"), _IMAGE64),
    Network("timm_gernet_s", _timm("gernet_s"), _IMAGE64),
    Network("timm_rexnet_100", _timm("rexnet_100"), _IMAGE64),
    Network("timm_selecsls42", _timm("selecsls42"), _IMAGE64),
    Network("timm_ese_vovnet19b_dw", _timm("ese_vovnet19b_dw"), _IMAGE64, variants=("dynamo",)),
)  # fmt: skip
_IDS, _BOTH, _PIXELS = ("input_ids",), ("input_ids", "attention_mask"), ("pixel_values",)
_TRANSFORMERS = (
    Network("hf_bert", _transformer("BertModel", "BertConfig", "last_hidden_state", _BOTH, **_TEXT),
            _MASKED, variants=("dynB", "dynamo")),
    Network("hf_distilbert",
            _transformer("DistilBertModel", "DistilBertConfig", "last_hidden_state", _BOTH, vocab_size=100,
                         dim=64, n_layers=3, n_heads=4, hidden_dim=128, max_position_embeddings=64), _MASKED),
    Network("hf_gpt2",
            _transformer("GPT2LMHeadModel", "GPT2Config", "logits", _IDS, vocab_size=100, n_embd=64,
                         n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
                         use_cache=False), _TOKENS, exporter="dynamo"),
    Network("hf_llama",
            _transformer("LlamaForCausalLM", "LlamaConfig", "logits", _IDS, **_TEXT, num_key_value_heads=2,
                         bos_token_id=0, eos_token_id=0, use_cache=False), _TOKENS, exporter="dynamo"),
    Network("hf_vit",
            _transformer("ViTModel", "ViTConfig", "last_hidden_state", _PIXELS, **_SMALL, image_size=32,
                         patch_size=8), _image(32), variants=("dynamo",)),
    Network("hf_swin",
            _transformer("SwinModel", "SwinConfig", "last_hidden_state", _PIXELS, image_size=32, patch_size=2,
                         embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0),
            _image(32), variants=("dynamo",)),
    Network("hf_segformer",
            _transformer("SegformerForSemanticSegmentation", "SegformerConfig", "logits", _PIXELS,
                         depths=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1], hidden_sizes=[16, 32, 48, 64],
                         num_attention_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=64,
                         num_labels=5), _IMAGE64),
    Network("hf_convnextv2",
            _transformer("ConvNextV2ForImageClassification", "ConvNextV2Config", "logits", _PIXELS,
                         hidden_sizes=[32, 64, 96, 144], depths=[1, 1, 3, 1], num_labels=10), _IMAGE64),
    Network("hf_mobilevit",
            _transformer("MobileViTForImageClassification", "MobileViTConfig", "logits", _PIXELS,
                         image_size=64, hidden_sizes=[32, 48, 64],
                         neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 128],
                         num_attention_heads=4, mlp_ratio=2.0, num_labels=10), _IMAGE64),
    Network("hf_wav2vec2",
            _transformer("Wav2Vec2Model", "Wav2Vec2Config", "last_hidden_state", ("input_values",), **_SMALL,
                         vocab_size=32, conv_dim=[32, 32, 32], conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2],
                         num_feat_extract_layers=3, num_conv_pos_embeddings=16,
                         num_conv_pos_embedding_groups=4, apply_spec_augment=False), _noise(640)),
    Network("hf_whisper_enc",
            _transformer("models.whisper.modeling_whisper.WhisperEncoder", "WhisperConfig",
                         "last_hidden_state", ("input_features",),
                         vocab_size=100, num_mel_bins=20, d_model=64, encoder_layers=2,
                         encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1,
                         decoder_attention_heads=4, decoder_ffn_dim=64, max_source_positions=32,
                         pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0),
            _noise(20, 64), variants=("dynamo",)),
    Network("hf_clip_text",
            _transformer("CLIPTextModel", "CLIPTextConfig", "last_hidden_state", _BOTH, **_TEXT,
                         bos_token_id=0, eos_token_id=99, pad_token_id=1), _MASKED, variants=("dynamo",)),
    Network("hf_clip_vision",
            _transformer("CLIPVisionModel", "CLIPVisionConfig", "last_hidden_state", _PIXELS, **_SMALL,
                         image_size=32, patch_size=8), _image(32), variants=("dynamo",)),
    Network("hf_t5_enc",
            _transformer("T5EncoderModel", "T5Config", "last_hidden_state", _BOTH, vocab_size=100, d_model=64,
                         d_kv=16, d_ff=128, num_layers=2, num_heads=4), _MASKED, variants=("dynamo",)),
)  # fmt: skip
_HAND = (
    Network("unet_deconv", lambda: hand.UNet(bilinear=False), _image(32),
            variants=("dynB", "dynamo", "bn")),
    Network("unet_bilinear_dynHW", lambda: hand.UNet(bilinear=True),
            (Input("input", (3, 32, 32), open={2: "height", 3: "width"}),), dynamic=True),
    Network("yolov5n_like", hand.Yolo5, _IMAGE64, variants=("dynB",)),
    Network("yolov8n_like", hand.Yolo8, _IMAGE64, variants=("dynB", "dynamo")),
    Network("espcn", hand.EspcnNet, _image(16, 1)),
    Network("edsr_mid_shuffle", hand.EdsrMidShuffle, _image(16)),
    Network("crnn_lstm", lambda: hand.Crnn(nn.LSTM), (Input("input", (1, 32, 64)),)),
    Network("crnn_gru", lambda: hand.Crnn(nn.GRU), (Input("input", (1, 32, 64)),)),
    Network("tcn_conv1d", hand.TemporalNet, _noise(8, 32), variants=("dynB",)),
    Network("conv3d", hand.Conv3dNet, _noise(3, 8, 16, 16)),
    Network("resnet20_cifar", hand.resnet20, _image(32), variants=("dynB", "dynamo")),
    Network("preresnet29_cifar", hand.preresnet29, _image(32), variants=("dynB", "dynamo")),
    Network("resnet20_groupnorm", hand.resnet20_groupnorm, _image(32)),
    Network("grouped_convs", hand.grouped_convs, _image(16)),
    Network("dilated_convs", hand.DilatedNet, _image(32)),
    Network("se_linear", hand.se_linear, _image(32), variants=("dynB",)),
    Network("lenet_flatten", hand.lenet, _image(28, 1), variants=("dynB", "dynamo")),
    Network("mlp", hand.mlp, _noise(64), variants=("dynB",)),
    Network("dcgan_generator", hand.dcgan_generator, _noise(32)),
    Network("prelu_net", hand.prelu_net, _image(32)),
    Network("style_instancenorm", hand.StyleNet, _image(32)),
    Network("dscnn_kws", hand.KeywordSpotter, _noise(1, 49, 10), variants=("dynB",)),
    Network("multi_in_out_siamese", hand.Siamese,
            (Input("first", (3, 32, 32)), Input("second", (3, 32, 32)), Input("extra", (8,), "noise")),
            outputs=("verdict", "embedding")),
    Network("nn_transformer_encoder", hand.TinyEncoder, _noise(12, 10), variants=("dynB",)),
    Network("demucs_glu1d", hand.GluDemixer, _noise(1, 256)),
    Network("shufflenet_v1_unit", hand.ShuffleUnit, _image(32)),
)  # fmt: skip
NETWORKS: Mapping[str, Network] = {
    network.name: network for network in (*_HAND, *_TRANSFORMERS, *_TORCHVISION, *_TIMM)
}
"""By name, cheap ones first."""

FILES: Mapping[str, tuple[Network, str]] = {
    name: (network, name.partition("__")[2] or "main")
    for network in NETWORKS.values()
    for name in network.files
}
"""Network and variant of each file."""


# ---------------------------------------------------------------- inputs


def make_inputs(network: Network, n: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw n samples: images with structure, so that a random network tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    return {entry.name: _draw(entry, n, generator).numpy() for entry in network.inputs}


def _draw(entry: Input, n: int, generator: torch.Generator) -> Tensor:
    shape = (n, *entry.shape)
    if entry.kind == "tokens":
        return torch.randint(2, entry.high, shape, generator=generator)
    if entry.kind == "mask":
        lengths = torch.randint(entry.shape[0] // 2, entry.shape[0] + 1, (n, 1), generator=generator)
        return (torch.arange(entry.shape[0])[None] < lengths).long()
    noise = torch.randn(shape, generator=generator)
    if entry.kind == "noise":
        return noise
    coarse = torch.randn(n, entry.shape[0], 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=entry.shape[1:], mode="bilinear", align_corners=False)
    return 1.5 * smooth + 0.5 * noise


# ---------------------------------------------------------------- random weights

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def randomise(model: nn.Module, inputs: Sequence[Tensor], *, seed: int = 0) -> None:
    """Draw all weights; statistics of BatchNormalization fit the inputs roughly, and differ per channel."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator)

    known: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            is_norm = isinstance(module, (*_NORMS, *_BATCH_NORMS)) or "Norm" in type(module).__name__
            if isinstance(module, _LINEAR):
                fan_in = math.prod(weight.shape[1:])
                if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
                    fan_in = weight.shape[0] * math.prod(module.kernel_size) // math.prod(module.stride)
                gain = 1.0 if isinstance(module, nn.Linear) else 2.0
                weight.copy_(normal(weight, math.sqrt(gain / fan_in)))
            elif is_norm and isinstance(weight, Tensor):
                weight.copy_(uniform(weight, 0.5, 1.5))
            else:
                continue
            if isinstance(bias, Tensor):
                bias.copy_(normal(bias, 0.2))
            known.update(id(tensor) for tensor in (weight, bias) if isinstance(tensor, Tensor))
        for parameter in model.parameters():
            if id(parameter) in known:
                continue
            if parameter.ndim <= 1 or parameter.std() < 0.1:  # zeros, tiny layer scales, ones
                parameter.add_(normal(parameter, 0.3))
        for module in model.modules():
            if hasattr(module, "fix_constants"):
                module.fix_constants()
        _fit_statistics(model, inputs, uniform)


def _fit_statistics(
    model: nn.Module, inputs: Sequence[Tensor], uniform: Callable[[Tensor, float, float], Tensor]
) -> None:
    """Give each BatchNormalization what it sees, changed at random, before it passes that on.

    Statistics of a network whose other statistics are not what they will be would let activations grow from
    layer to layer, until rounding shows.
    """

    def fit(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        # Of the second moment, not the variance: channels that hardly vary, around a large mean or on these
        # few samples, would blow rounding up, too.
        mean, variance = x.mean(axes), x.square().mean(axes)
        variance = variance.clamp_min(0.5 * float(variance.mean()))
        norm.running_mean = mean + variance.sqrt() * uniform(mean, -0.5, 0.5)
        norm.running_var = variance * uniform(mean, 0.6, 1.6) + 1e-3

    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
    model.eval()
    if norms:
        model(*inputs)
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------- export


@contextmanager
def _export_settings() -> Iterator[None]:
    """No fast path that an exporter does not see, and none of its warnings."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def export(network: Network, variant: str, path: Path, *, seed: int = 0) -> int:
    """Build a network, give it random weights and write it to ``path``; returns its number of parameters."""
    torch.manual_seed(seed)
    model = network.build().eval()
    samples = make_inputs(network, 8, seed=seed + 1).values()
    randomise(model, [torch.from_numpy(values) for values in samples], seed=seed)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dynamo = variant == "dynamo" or (variant == "main" and network.exporter == "dynamo")
    dynamic = variant == "dynB" or network.dynamic
    n = 2 if dynamic and dynamo else 1
    inputs = tuple(torch.from_numpy(array) for array in make_inputs(network, n, seed=seed + 2).values())
    names = [entry.name for entry in network.inputs]
    axes: dict[str, dict[int, str]] = {}
    if dynamic:
        axes = {entry.name: {0: "batch", **entry.open} for entry in network.inputs}
        axes.update({name: {0: "batch"} for name in network.outputs})
    with _export_settings():
        if dynamo:
            torch.onnx.export(
                model, inputs, path, input_names=names, output_names=list(network.outputs),
                opset_version=DYNAMO_OPSET, dynamo=True, external_data=False,
            )  # fmt: skip
        else:
            keep = variant == "bn"
            torch.onnx.export(
                model, inputs, path, input_names=names, output_names=list(network.outputs),
                opset_version=OPSET, dynamo=False, dynamic_axes=axes or None, do_constant_folding=not keep,
                training=torch.onnx.TrainingMode.PRESERVE if keep else torch.onnx.TrainingMode.EVAL,
            )  # fmt: skip
    return sum(parameter.numel() for parameter in model.parameters())
