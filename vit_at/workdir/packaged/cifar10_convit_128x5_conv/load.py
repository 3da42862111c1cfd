"""The model of this folder in PyTorch: images [B, C, H, W] in [0, 1] -> logits [B, classes].

    import sys
    sys.path.append("THIS FOLDER")
    from load import load

    model = load().to("cuda")

Written by ``vit-at export``. Needs torch, timm and safetensors; vit_at and JAX are not needed.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import timm
import torch
from safetensors.torch import load as tensors_of
from timm.layers import LayerNorm2d
from torch import nn

HERE = Path(__file__).parent


class Classifier(nn.Module):
    """Normalises images and calls timm's ``model`` on them."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.std)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with LayerNorm and GELU, and a 1x1 convolution.

    Takes the place of timm's ``patch_embed.proj``. widths: [channels after each convolution].
    """

    def __init__(self, in_chans: int, widths: list[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([in_chans, *widths]):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1)
            layers += [convolution, LayerNorm2d(after, eps=1e-6), nn.GELU()]
        self.stem = nn.Sequential(*layers, nn.Conv2d(widths[-1], widths[-1], 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images)


def load(directory: str | Path = HERE) -> nn.Module:
    """The exported model in eval mode, on the CPU, with the normalisation inside.

    Raises:
      ValueError: the weights are not those that model.json describes.
    """
    about = json.loads((Path(directory) / "model.json").read_text(encoding="utf-8"))
    described, arguments = about["timm"], about["timm"]["create_model"]
    model = timm.create_model(**arguments)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = described["layer_norm_eps"]
    if described["conv_stem"]:
        model.patch_embed.proj = ConvStem(arguments["in_chans"], described["conv_stem"])
    model.load_state_dict(_read(directory, about["weights"]))
    return Classifier(model, **about["normalisation"]).eval()


def load_images(directory: str | Path = HERE) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [N, C, H, W] in [0, 1], labels [N]) that ``vit-at export --images=N`` has added."""
    about = json.loads((Path(directory) / "model.json").read_text(encoding="utf-8"))
    if "images" not in about:
        raise ValueError(f"{directory} holds no images; export it again with --images=N")
    stored = _read(directory, about["images"])
    return stored["images"].float() / 255, stored["labels"]


def _read(directory: str | Path, described: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a file; ValueError if it has another SHA-256 than described."""
    path = Path(directory) / described["file"]
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != described["sha256"]:
        raise ValueError(f"{path} is not the file that model.json describes; export it again")
    return tensors_of(content)
