"""The digits of the data set `glyphs`: drawn from matplotlib's fonts, turned, sheared, scaled and shifted at random."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

FONTS = [
    *(f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"]


def draw_glyphs(count, seed=0, batch=500):
    """Yields `count` digits in batches, uint8 [at most batch, 1, 32, 32]. Image i shows the digit i % 10 and ignores `count`."""
    atlas, u = glyph_atlas(), torch.rand(count, 7, generator=torch.Generator().manual_seed(seed))
    for i in tqdm(torch.arange(count).split(batch), "drawing glyphs", disable=None):
        font, digit = (u[i, 0] * len(atlas)).long(), i % 10
        angle, shear, *zoom, dx, dy = ((2 * u[i, 1:] - 1) * torch.tensor([0.17, 0.15, 0.15, 0.15, 0.1, 0.1])).T
        (sx, sy), cos, sin = (1.1 + z for z in zoom), angle.cos(), angle.sin()
        affine = torch.stack([cos * sx, (shear * cos - sin) * sy, dx, sin * sx, (shear * sin + cos) * sy, dy], -1)
        grid = F.affine_grid(affine.view(-1, 2, 3), (len(i), 1, 84, 84), align_corners=False)
        images = F.avg_pool2d(F.grid_sample(atlas[font, digit], grid, align_corners=False), 3)  # 3x3 samples a pixel
        yield F.pad((images * 255).round(), (2, 2, 2, 2)).to(torch.uint8).numpy()


def glyph_atlas():
    """Every digit of every font, centred and about 60 of 84 pixels high: float [fonts, 10, 1, 84, 84] in [0, 1]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    atlas = np.zeros((len(FONTS), 10, 1, 84, 84), np.float32)
    for i, name in enumerate(FONTS):
        font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), 86)
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            canvas = Image.new("L", (84, 84))
            ImageDraw.Draw(canvas).text((42 - (left + right) / 2, 42 - (top + bottom) / 2), str(digit), fill=255, font=font)
            atlas[i, digit, 0] = np.asarray(canvas) / 255
    return torch.from_numpy(atlas)
