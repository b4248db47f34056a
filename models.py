"""The networks: CIFAR ResNets, a plain ViT, and torchvision's classifiers by their own names.

forward takes normalised images (B, 3, H, W) and returns logits (B, num_classes), nothing else: in
float32 also under autocast, which LastLinear stays out of. The table of names is at the bottom.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from support import networks
from support.networks import LastLinear

# --- CIFAR ResNets (He et al., CVPR 2016, section 4.2) -------------------------------------------

class BasicBlock(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # Option B of the paper: a 1x1 convolution, only where the shape changes.
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                                            nn.BatchNorm2d(channels))

    def forward(self, x):                                     # (B, in_channels, H, W)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)   # (B, channels, H/stride, W/stride)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A CIFAR ResNet of `depth` = 6n + 2 layers: a 3x3 stem and three stages of n blocks.

    widths: channels of the stem and of the three stages. The parameter names are those of the
    field's public CIFAR checkpoints, so these load with strict=True. Any input size: the last
    feature map is averaged over its positions.
    """

    def __init__(self, num_classes, image_size, depth, widths):
        super().__init__()
        n = (depth - 2) // 6
        stem, w1, w2, w3 = widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = self._stage(stem, w1, n, stride=1)
        self.layer2 = self._stage(w1, w2, n, stride=2)
        self.layer3 = self._stage(w2, w3, n, stride=2)
        self.fc = LastLinear(w3, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels, channels, n, stride):
        return nn.Sequential(BasicBlock(in_channels, channels, stride),
                             *[BasicBlock(channels, channels, 1) for _ in range(n - 1)])

    def forward(self, x):                                     # (B, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)     # (B, stem, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))          # (B, w3, H/4, W/4)
        return self.fc(x.mean((2, 3)))                        # (B, num_classes)


# --- ViT (Dosovitskiy et al., ICLR 2021) ---------------------------------------------------------

class Block(nn.Module):
    """A pre-norm transformer block, written out so that attention can be read.

    nn.TransformerEncoderLayer would hide it, and computes by another path in eval mode than in
    train mode. F.scaled_dot_product_attention is slow in bfloat16 on a CPU: its backward pass would
    take over half of a vit_nano's step.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def attention(self, x):                                   # (B, N, D)
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                  # 3 of (B, heads, N, D/heads)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, N, N)
        out = scores.softmax(-1).to(v.dtype) @ v              # (B, heads, N, D/heads)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))

    def forward(self, x):                                     # (B, N, D)
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def patch_size(image_size):
    """The side, in pixels, of a ViT's patches: 4 for images of 16 and 32 pixels, 8 for 64, 16 for
    224. It is the largest divisor of image_size up to 16 and up to an eighth of it, but may be 4.

    Raises ValueError unless image_size is a multiple of 8.
    """
    if image_size % 8:
        raise ValueError(f"a ViT needs an image size that is a multiple of 8, not {image_size}")
    return max(p for p in range(1, 17) if image_size % p == 0 and p <= max(4, image_size // 8))


def conv_stem(dim, patch):
    """(B, 3, H, W) -> (B, dim, H/patch, W/patch) by small convolutions in place of one big patch
    convolution (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021)."""
    layers, channels = [], 3
    while patch % 2 == 0:
        layers += [nn.Conv2d(channels, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        channels, patch = dim, patch // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, dim, patch, patch))


class ViT(nn.Module):
    """A plain ViT with a class token and learnt positions.

    dim: D, of each token. depth: number of blocks. stem: "patch", one big convolution as
    published, or "conv", as in `conv_stem`.
    """

    def __init__(self, num_classes, image_size, dim, depth, heads, stem="patch"):
        super().__init__()
        patch = patch_size(image_size)
        self.patch_embed = (nn.Conv2d(3, dim, patch, patch) if stem == "patch"
                            else conv_stem(dim, patch))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = LastLinear(dim, num_classes)
        # Xavier weights and clearly distinct positions: with the usual std of 0.02 for both, a
        # narrow ViT hardly starts to learn in the few hundred steps of a small data set.
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.5)
        if stem == "patch":
            nn.init.xavier_uniform_(self.patch_embed.weight.view(dim, -1))
        for block in self.blocks:
            for linear in (block.qkv, block.proj, block.fc1, block.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, x):                                     # (B, 3, H, W)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)    # (B, N, D), N patches
        # Not len(x), which would fix B in an exported file.
        token = self.cls_token.expand(x.shape[0], -1, -1)     # (B, 1, D)
        x = torch.cat([token, x], 1) + self.pos_embed         # (B, 1+N, D)
        return self.head(self.norm(self.blocks(x))[:, 0])     # (B, num_classes)


# --- The table of names --------------------------------------------------------------------------

_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
MODELS = {
    "resnet8": (ResNet, dict(depth=8, widths=_NARROW)),
    "resnet14": (ResNet, dict(depth=14, widths=_NARROW)),
    "resnet20": (ResNet, dict(depth=20, widths=_NARROW)),
    "resnet32": (ResNet, dict(depth=32, widths=_NARROW)),
    "resnet44": (ResNet, dict(depth=44, widths=_NARROW)),
    "resnet56": (ResNet, dict(depth=56, widths=_NARROW)),
    "resnet110": (ResNet, dict(depth=110, widths=_NARROW)),
    "resnet8x4": (ResNet, dict(depth=8, widths=_WIDE)),
    "resnet32x4": (ResNet, dict(depth=32, widths=_WIDE)),
    # With a patch stem it stays near chance on the few images of glyphs.
    "vit_nano": (ViT, dict(dim=64, depth=4, heads=2, stem="conv")),
    "vit_tiny": (ViT, dict(dim=192, depth=12, heads=3)),
    "vit_small": (ViT, dict(dim=384, depth=12, heads=6)),
}


def create_model(name, num_classes, image_size=32, pretrained=False):
    """A network of the table above, freshly initialised, or one of torchvision's.

    name: a key of MODELS, or a classifier of torchvision.models. num_classes: C, at least 2.
    image_size: side in pixels; only our ViTs are built for one. pretrained: with torchvision's
    ImageNet weights, and a new last layer unless C is 1,000; our own have none, and ignore it.
    Raises ValueError for an unknown name, fewer than two classes, a ViT whose patches do not fit,
    or weights that cannot be had.
    """
    check_name(name)
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, not {num_classes}")
    if name in MODELS:
        build, arguments = MODELS[name]
        return build(num_classes, image_size, **arguments)
    return networks.create_torchvision(name, num_classes, image_size, pretrained)


# What train.py and eval.py ask before they build a network; both raise ValueError.
check_name = functools.partial(networks.check_name, ours=MODELS)
check_size = functools.partial(networks.check_size, create_model)
