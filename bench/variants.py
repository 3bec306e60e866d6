"""Models of the speed benchmarks: NDM variants with one predictor, and two other libraries.

================================  ==================================================================
``ddpm``                          F = x, continuous time: the plain diffusion, the baseline
``direct_*``, ``tied_*``          the reverse process, with the paper's F
``*_separable``                   F is :class:`ndm.SeparableTransform`
no suffix                         F is the predictor's U-Net at half its width
``*_same_width``, ``*_mlp``       F is that U-Net at its full width, or an MLP of width 128
``*_discrete``                    T = 1000 steps, no time derivative
``*_bf16``                        the variant with its predictor's network under bf16 autocast
``diffusers``                     ``UNet2DModel``, noise prediction, ``DDPMScheduler.add_noise``
``denoising_diffusion_pytorch``   ``Unet`` in ``GaussianDiffusion``, noise prediction
``*_channels_last``               the peer with weights and images in channels_last, as in our U-Net
================================  ==================================================================

The peers have about as many parameters as our U-Net (the counts are printed). diffusers' network
has the same architecture: resolutions, widths, blocks per level, attention at the lowest resolution
and in the middle, scale and shift by time. The other has the same resolutions and full attention at
the same places, but two blocks per level and linear attention at the other stages; its width is
chosen to match the number of parameters. All variants use the same optimizer. Neither peer chooses
a memory format, so each is measured both in the default format and in channels_last.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ndm
from ndm.transform import Transform

MULTIPLES, ATTENTION = (1, 2, 2), (False, False, True)
NUM_VALUES = 256
CHANNELS = 4
"""K of the time-separable form."""


@dataclass(frozen=True)
class Setting:
    """Settings shared by all variants."""

    size: int = 28
    """Height and width of the images."""
    batch: int = 64
    channels: int = 32
    """Width of the predictor's first level."""
    device: str = "cpu"
    bf16: bool = False
    """Run networks under bf16 autocast."""

    def data(self) -> Tensor:
        """Return random images of 256 gray values."""
        indices = torch.randint(NUM_VALUES, (self.batch, 1, self.size, self.size))
        return ndm.DiscretizedGaussian(NUM_VALUES).values[indices].float().to(self.device)

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


def unet(channels: int, outputs: int | None = None, max_frequency: float = 32.0) -> nn.Module:
    return ndm.nn.UNet(
        channels=channels,
        multiples=MULTIPLES,
        attention=ATTENTION,
        outputs=outputs,
        max_frequency=max_frequency,
    )


def _transform(name: str, setting: Setting) -> Transform:
    if name == "ddpm":
        return ndm.Identity()
    outputs = CHANNELS if "separable" in name else None
    if "mlp" in name:
        network: nn.Module = ndm.nn.MLP(
            setting.size**2, hidden=128, blocks=2, outputs=outputs, max_frequency=4.0
        )
    else:
        width = setting.channels if "same_width" in name else setting.channels // 2
        network = unet(width, outputs, 4.0)
    return ndm.SeparableTransform(network) if outputs else ndm.NetworkTransform(network)


def ours(name: str, setting: Setting) -> ndm.NDM:
    """Return a variant by name."""
    reverse = "tied"
    if name.startswith("direct"):
        reverse = "direct-score" if name.startswith("direct_score") else "direct"
    return ndm.NDM(
        ndm.LinearLogSNRSchedule(-13.3, 5.0),
        _transform(name, setting),
        ndm.Predictor(unet(setting.channels, 2 if reverse == "direct-score" else None)),
        ndm.DiscretizedGaussian(NUM_VALUES),
        steps=1000 if name.endswith("discrete") else None,
        reverse=reverse,  # type: ignore[arg-type]
    ).to(setting.device)


def diffusers(setting: Setting) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return their network and the loss of a batch, as in their training example."""
    from diffusers import DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=setting.size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=tuple(setting.channels * multiple for multiple in MULTIPLES),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=setting.channels // 8,
        attention_head_dim=32,
        resnet_time_scale_shift="scale_shift",
    ).to(setting.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss(x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        predicted = network(scheduler.add_noise(x, noise, t), t, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), noise)

    return network, loss


def _import_denoising_diffusion() -> tuple[type[nn.Module], type[nn.Module]]:
    """Import its Unet and GaussianDiffusion.

    The package imports torchvision for its data sets and pictures, but not for network and loss.
    torchvision does not load with the CPU build of torch, so an empty module replaces it during
    the import.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.utils")
    names = () if "torchvision" in sys.modules else names
    stubs = {name: types.ModuleType(name) for name in names}
    for name, stub in stubs.items():
        if "." in name:
            setattr(stubs["torchvision"], name.rpartition(".")[2], stub)
    sys.modules.update(stubs)
    try:
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
    finally:
        for name in names:
            del sys.modules[name]
    return Unet, GaussianDiffusion


def parameters(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def denoising_diffusion_pytorch(setting: Setting) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return their network and the loss of a batch.

    The (even) width and the head size are chosen to match our number of parameters best.
    """
    unet_class, diffusion_class = _import_denoising_diffusion()
    target = parameters(unet(setting.channels))

    def network(width: int, head: int) -> nn.Module:
        return unet_class(
            width,
            dim_mults=MULTIPLES,
            channels=1,
            full_attn=ATTENTION,
            attn_dim_head=head,
            flash_attn=True,
        )

    shapes = [
        (width, head)
        for width in range(setting.channels // 2, setting.channels + 5, 2)
        for head in (24, 28, 32, 36, 40)
    ]
    best = network(*min(shapes, key=lambda shape: abs(parameters(network(*shape)) - target)))
    diffusion = diffusion_class(
        best, image_size=setting.size, objective="pred_noise", auto_normalize=False
    ).to(setting.device)
    return diffusion, diffusion


Peer = Callable[[Setting], tuple[nn.Module, Callable[[Tensor], Tensor]]]


def in_channels_last(peer: Peer) -> Peer:
    """Return the peer with weights and images in channels_last."""

    def build(setting: Setting) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        module, loss = peer(setting)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module, lambda x: loss(last(x))

    def last(x: Tensor) -> Tensor:
        # A tensor of one channel has both formats; with its own strides, libraries would treat it
        # as the default one.
        strides = (x[0].numel(), 1, x.shape[1] * x.shape[3], x.shape[1])
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)

    return build


PEERS: dict[str, Peer] = {
    "diffusers": diffusers,
    "denoising_diffusion_pytorch": denoising_diffusion_pytorch,
}
PEERS |= {f"{name}_channels_last": in_channels_last(peer) for name, peer in PEERS.items()}


def training(name: str, setting: Setting) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the network and the loss of a batch for one of our variants or a peer."""
    if name in PEERS:
        return PEERS[name](setting)
    model = ours(name, setting)
    return model, lambda x: model.bound(x).loss.mean()
