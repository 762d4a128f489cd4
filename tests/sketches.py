"""What a figure shows, as a few words and numbers, and pictures that hold these in place of drawn pixels, in no time."""

import json
import zlib

import numpy as np
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image

DRAW = Figure.savefig


def contents_of(figure):
    """Of each axes and legend, without drawing: a checksum of words and styles, and a weighted sum of all numbers."""
    contents = []
    for part in [*figure.axes, *figure.legends]:
        words, values = [], [] if part in figure.legends else [part.get_xlim(), part.get_ylim()]
        for artist in part.findobj(lambda artist: artist.get_visible()):
            if isinstance(artist, Text):
                words.append(artist.get_text())
            elif isinstance(artist, Line2D):
                words += map(str, (artist.get_color(), artist.get_linestyle(), artist.get_marker(), artist.get_label()))
                values.append(artist.get_xydata())
            elif isinstance(artist, Collection):
                sizes = artist.get_sizes() if hasattr(artist, "get_sizes") else ()
                paths = [path.vertices for path in artist.get_paths()]
                values += [artist.get_offsets(), artist.get_facecolor(), artist.get_edgecolor(), sizes, *paths]
            elif isinstance(artist, Patch):
                values += [artist.get_path().vertices, artist.get_facecolor()]
            elif isinstance(artist, AxesImage):
                values += [artist.get_array(), artist.get_extent()]
        values = np.concatenate([np.zeros(0), *(np.ma.filled(np.ma.asarray(value, float), np.nan).ravel() for value in values)])
        values = np.nan_to_num(values, nan=-1.5, posinf=-2.5, neginf=-3.5)
        contents.append([f"{zlib.crc32('|'.join(words).encode()):08x}", float(f"{values @ np.cos(np.arange(len(values))):.6g}")])
    return contents


def contents_in(file):
    """The contents that a sketch holds."""
    return json.loads(bytes(np.asarray(Image.open(file).convert("L"))[0]))


def sketch(figure, file, **options):
    """Figure.savefig without drawing: equal pictures have equal contents."""
    Image.fromarray(np.frombuffer(json.dumps(contents_of(figure)).encode(), np.uint8)[None]).save(file, "PNG")
