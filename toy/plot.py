"""Drawing with Pillow, for all of toy/: charts, and images side by side.

    axes = Axes(title, x_label, y_label, (low, high), (low, high), x_log=True)   with these ranges of x and y
    axes.line(x, y, colour, low, high)                      with a band, if low and high are given
    axes.points(x, y, colour, x_error=e, y_error=e)         dots, e half the length of their error bars
    axes.bar(x, y, colour)                                  a bar at y, from the left to x
    axes.diamonds(x, y)                                     hollow: the paper's values
    axes.text(x, y, text, colour)                           right of a point, or at an anchor (Pillow's)
    axes.image()                                            the finished chart; these give images too:
    panels({title: uint8 [n,H,W,3]}, rows, abreast, zoom)   each title's images as a grid, laid out row by row
    sheet([image, …], abreast)                              images side by side, then below

x, y, errors: arrays, lists, CPU tensors, numbers. NaN is left out, what is out of range lies on the edge.
Axes: y_ticks={0: "C", 1: "B"} for names, legend={text: colour}, size, font and right (margin) in pixels.
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

COLOURS = ("#1f60c4", "#ce5414", "#229944", "#8040a0", "#d8a000", "#c8102e", "#109a9a", "#606060")
SPELLED = str.maketrans({"é": "e", "×": "x", "–": "-", "−": "-", "‖": "|", "→": "->", "√": "sqrt ",
                         "²": "^2", "τ": "tau", "κ": "kappa", "⁺": "+", "⁻": "-"})   # Pillow's font is ASCII
K = 2                                                    # charts are drawn twice as large, for smooth lines


def ticks(low, high, log):
    sizes = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
    step = next(s for s in sizes if high - low <= 6 * s)
    values = step * np.arange(round(low / step), high / step + 0.01)
    if log:
        values = sizes[::3] if high > 150 * low else sizes
    return {v: f"{v:g}" for v in values if low - 1e-6 * abs(low) <= v <= high + 1e-6 * abs(high)}


class Axes:
    def __init__(self, title, x_label, y_label, x, y, *, x_log=False, y_log=False, x_ticks=None, y_ticks=None,
                 legend={}, size=(720, 440), font=15, right=24):
        em = K * font
        self.x, self.y, self.size, self.font = x, y, size, ImageFont.load_default(em)
        self.fx, self.fy = (np.log if log else np.asarray for log in (x_log, y_log))
        x_ticks, y_ticks = x_ticks or ticks(*x, x_log), y_ticks or ticks(*y, y_log)
        head = "\n".join(filter(None, (title, y_label)))
        left, top = em + max(map(self.font.getlength, y_ticks.values())), em * (2 + 1.35 * head.count("\n"))
        right, bottom = K * (size[0] - right), K * size[1] - em * (1.8 + 1.3 * bool(x_label))
        self.box = left, top, right, bottom
        self.canvas = Image.new("RGB", (K * size[0], K * size[1]), "white")
        self.draw = ImageDraw.Draw(self.canvas, "RGBA")
        self.write(em / 2, em / 2, head, "la")
        self.write((left + right) / 2, K * size[1] - em / 2, x_label, "ms")
        for (px, _), text in zip(self.pixels(list(x_ticks), y[0]), x_ticks.values()):
            self.draw.line((px, top, px, bottom + 8), "#dddddd", K)
            self.write(px, bottom + 10, text, "ma")
        for (_, py), text in zip(self.pixels(x[0], list(y_ticks)), y_ticks.values()):
            self.draw.line((left - 8, py, right, py), "#dddddd", K)
            self.write(left - 12, py, text, "rm")
        self.draw.rectangle(self.box, outline="#888888", width=K)
        for text, colour in reversed(legend.items()):
            self.write(right, top - em / 2, text, "rs", colour)
            right -= self.font.getlength(text) + em

    def write(self, px, py, text, anchor, colour="black"):
        self.draw.text((px, py), text.translate(SPELLED), colour, self.font, anchor)

    def pixels(self, x, y):
        left, top, right, bottom = self.box
        px = np.interp(self.fx(np.asarray(x, float).clip(self.x[0])), self.fx(self.x), (left, right))
        py = np.interp(self.fy(np.asarray(y, float).clip(self.y[0])), self.fy(self.y), (bottom, top))
        return [p for p in zip(*map(np.ravel, np.broadcast_arrays(px, py))) if not np.isnan(p).any()]

    def line(self, x, y, colour, low=None, high=None):
        if low is not None:
            self.draw.polygon(self.pixels(x, low) + self.pixels(x, high)[::-1], colour + "28")
        self.draw.line(self.pixels(x, y), colour, 2 * K, "curve")

    def points(self, x, y, colour, radius=4, x_error=0, y_error=0):
        x, y, dx, dy = np.broadcast_arrays(x, y, np.nan_to_num(x_error), np.nan_to_num(y_error))
        across = zip(self.pixels(x - dx, y), self.pixels(x + dx, y))
        for ends in [*across, *zip(self.pixels(x, y - dy), self.pixels(x, y + dy))]:
            self.draw.line(ends, colour, 2 * K)
        for centre in self.pixels(x, y):
            self.draw.circle(centre, K * radius, colour)

    def bar(self, x, y, colour="#b4c6e4"):
        for corners in zip(self.pixels(self.x[0], y + 0.35), self.pixels(x, y - 0.35)):
            self.draw.rectangle(corners, colour)

    def diamonds(self, x, y):
        for centre in self.pixels(x, y):
            self.draw.regular_polygon((centre, 7 * K), 4, 45, None, "black", 2 * K)

    def text(self, x, y, text, colour="black", anchor="lm"):
        for px, py in self.pixels(x, y):
            self.write(px, py, "  " + text, anchor, colour)

    def image(self):
        return self.canvas.resize(self.size, Image.LANCZOS)


def panels(images, rows, abreast=3, zoom=2):
    done = []
    for title, tiles in images.items():
        tiles = tiles.permute(0, 3, 1, 2).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        tiles = make_grid(tiles, len(tiles) // rows, padding=1, pad_value=150)
        grid = Image.fromarray(tiles.permute(1, 2, 0).numpy())
        em = max(15, grid.width // 18)
        panel = Image.new("RGB", (grid.width + em, grid.height + 3 * em), "white")
        panel.paste(grid, (em // 2, 2 * em))
        ImageDraw.Draw(panel).text((em / 2, em), title.translate(SPELLED), "black", anchor="lm", font_size=em)
        done.append(panel)
    return sheet(done, abreast)


def sheet(images, abreast):
    width = max(image.width for image in images)
    lines = [images[i:i + abreast] for i in range(0, len(images), abreast)]
    tops = np.cumsum([0] + [max(image.height for image in line) for line in lines]).tolist()
    canvas = Image.new("RGB", (width * len(lines[0]), tops[-1]), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (i % abreast * width, tops[i // abreast]))
    return canvas
