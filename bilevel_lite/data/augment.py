"""Random crops and flips of batches that live on a device; images compressed and read back."""

import io
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel_lite.refuse import require_fraction, require_generator

__all__ = ["crop_and_flip", "jpeg"]


def crop_and_flip(
    x: Tensor, generator: torch.Generator, padding: int = 4, flip: float = 0.5
) -> Tensor:
    """Shift each image by up to ``padding`` pixels, reflected at its borders, and mirror some.

    The same as a crop of the original size from an image padded by reflection, then a horizontal
    flip. The pixels are gathered where they are; only 3 n numbers are drawn, on the CPU, so that
    every device sees the same images.

    Args:
        x: Images, shape (n, C, H, W).
        generator: CPU generator.
        padding: p; each shift is one of -p .. p, up or down and sideways. 0: no shift.
        flip: Probability of mirroring an image. 0 and ``padding=0``: the images as they are.

    Returns:
        Images like ``x``.

    Raises:
        TypeError: if ``x`` is no tensor, or the generator none.
        ValueError: if ``x`` are no images, ``padding`` is not from 0 to H - 1 and W - 1 or ``flip``
            not from 0 to 1.

    Source: the usual augmentation of CIFAR (He et al., 2016, Section 4.2), which pads by zeros;
    Meta-Weight-Net's code (Shu et al., 2019) pads by reflection.

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 1, 4)
        >>> bl.data.crop_and_flip(x, torch.Generator().manual_seed(0), padding=0, flip=1.0)
        tensor([[[[3., 2., 1., 0.]]]])
    """
    _require_images(x)
    require_generator(generator)
    n, _, height, width = x.shape
    if not _whole(padding, 0, min(height, width) - 1):
        raise ValueError(
            f"padding: got {padding!r}, expected a whole number from 0 to {min(height, width) - 1} "
            f"for images of {height} x {width}"
        )
    require_fraction("flip", flip)
    how = {"generator": generator, "device": generator.device}
    shifts = torch.randint(-padding, padding + 1, (2, n), **how)
    mirrored = torch.rand(n, **how) < flip

    def reflected(size: int, shift: Tensor) -> Tensor:
        at = (torch.arange(size, device=shift.device) + shift[:, None]).abs()  # (n, size)
        return size - 1 - (size - 1 - at).abs()

    rows, columns = reflected(height, shifts[0]), reflected(width, shifts[1])
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    # one index into each image's pixels, the same for all its colours
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1).to(x.device)
    return x.flatten(2).gather(2, pixels[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Store each image as JPEG and read it back: what is fine and faint does not survive.

    Args:
        x: Images, shape (n, C, H, W) with 1 or 3 colours, from 0 to 1; on any device.
        quality: 1 to 95; the lower, the coarser.

    Returns:
        Images like ``x``, of 8 bits a pixel.

    Raises:
        TypeError: if ``x`` is no tensor.
        ValueError: if ``x`` are no such images, or ``quality`` is out of range.

    Example:
        >>> x = torch.full((1, 1, 8, 8), 0.2)
        >>> torch.allclose(bl.data.jpeg(x, 90), x, atol=0.02)
        True
    """
    from PIL import Image  # comes with matplotlib

    _require_images(x, (1, 3))
    if not _whole(quality, 1, 95):
        raise ValueError(f"quality: got {quality!r}, expected a whole number from 1 to 95")
    if len(x) and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise ValueError(
            f"x: has pixels from {float(x.min()):.3g} to {float(x.max()):.3g}, expected 0 to 1"
        )
    pixels = (255 * x.detach().cpu()).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    out = np.empty_like(pixels)
    for row, image in zip(out, pixels, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
            file, "JPEG", quality=int(quality)
        )
        row[:] = np.asarray(Image.open(file)).reshape(row.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous().to(x) / 255


def _require_images(x: Any, colours: tuple[int, ...] = ()) -> None:
    expected = "images, (n, C, H, W)" + " with C = 1 or 3" * bool(colours)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor of {expected}")
    if x.dim() != 4 or colours and x.shape[1] not in colours:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")


def _whole(value: Any, least: int, most: int) -> bool:
    """True for a whole number in this range."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most
