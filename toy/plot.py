"""Drawing with Pillow, for all of toy/: charts, and images side by side.

    axes = Axes(title, x_label, y_label, (low, high), (low, high))      the ranges of x and y
    axes.line(x, y, colour, low, high)       a curve; a band around it, if low and high are given
    axes.points(x, y, colour, radius)        dots
    axes.text(x, y, text, colour)            right of a point, or at one of Pillow's anchors
    axes.image()                             the finished chart
    panels({title: uint8 [n,H,W,3]}, rows)   an image: for each title its tiles as a grid
    note({text: colour}, size)               an image: lines of text
    sheet([image, …], abreast)               an image: `abreast` images per row
    write_gif(file, [image, …])              a film of images

x and y are arrays, lists, CPU tensors or numbers. NaN is left out, and what is out of range lies on
the edge. As ticks, Axes takes {value: name}, and {} for none; as legend, {text: colour}. Sizes are
in pixels.
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import make_grid

COLOURS = ("#1f60c4", "#ce5414", "#229944", "#8040a0", "#d8a000", "#c8102e", "#109a9a", "#606060")
# Pillow's own font has little more than ASCII.
SPELLED = str.maketrans({"é": "e", "×": "x", "–": "-", "−": "-", "‖": "|", "→": "->", "√": "sqrt ",
                         "²": "^2", "τ": "tau", "κ": "kappa", "Σ": "sum ", "⁺": "+", "⁻": "-"})
K = 2                   # charts are drawn twice as large and then reduced, for smooth lines
THIN, THICK, TICK = K, 2 * K, 4 * K
GRID, FRAME = "#dddddd", "#888888"


def ticks(low, high, log):
    """The round values from low to high: {value: name}."""
    sizes = [digit * 10.0**e for e in range(-9, 10) for digit in (1, 2, 5)]
    step = next(size for size in sizes if high - low <= 6 * size)
    values = step * np.arange(round(low / step), high / step + 0.01)
    if log:
        values = sizes[::3] if high > 150 * low else sizes
    slack = 1e-6 * (high - low)
    return {v: f"{v:g}" for v in values if low - slack <= v <= high + slack}


def place(values, ends, log, pixels):
    """Where values on an axis with these ends lie between two pixels."""
    values = np.clip(np.asarray(values, float), *ends)
    if log:
        values, ends = np.log(values), np.log(ends)
    return np.interp(values, ends, pixels)


class Axes:
    """A chart; the module's docstring has its methods."""

    def __init__(self, title, x_label, y_label, x, y, *, x_log=False, y_log=False, x_ticks=None,
                 y_ticks=None, legend=None, size=(720, 440), font=15, right=24):
        self.x = x
        self.x_log = x_log
        self.y = y
        self.y_log = y_log
        self.size = size
        self.font = ImageFont.load_default(K * font)
        width = K * size[0]
        height = K * size[1]
        self.canvas = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.canvas, "RGBA")
        em = K * font
        if x_ticks is None:
            x_ticks = ticks(*x, x_log)
        if y_ticks is None:
            y_ticks = ticks(*y, y_log)
        names = map(self.font.getlength, y_ticks.values())
        left = em + max(names, default=-em / 2)
        right = width - K * right
        head = "\n".join(filter(None, (title, y_label)))
        top = em * (2 + 1.35 * head.count("\n"))
        foot = 0.5 + 1.3 * bool(x_ticks) + 1.3 * bool(x_label)
        self.frame = left, top, right, height - em * foot
        self.write(em / 2, em / 2, head, "la")
        middle = (left + right) / 2
        self.write(middle, height - em / 2, x_label, "ms")
        self.grid(x_ticks, y_ticks)
        for text, colour in reversed((legend or {}).items()):
            self.write(right, top - em / 2, text, "rs", colour)
            right -= self.font.getlength(text) + em

    def grid(self, x_ticks, y_ticks):
        left, top, right, bottom = self.frame
        feet = self.pixels(list(x_ticks), self.y[0])
        for (px, _), name in zip(feet, x_ticks.values()):
            low = bottom + TICK
            self.draw.line((px, top, px, low), GRID, THIN)
            self.write(px, low + THIN, name, "ma")
        feet = self.pixels(self.x[0], list(y_ticks))
        for (_, py), name in zip(feet, y_ticks.values()):
            start = left - TICK
            self.draw.line((start, py, right, py), GRID, THIN)
            self.write(start - THICK, py, name, "rm")
        self.draw.rectangle(self.frame, outline=FRAME, width=THIN)

    def write(self, px, py, text, anchor, colour="black"):
        text = text.translate(SPELLED)
        self.draw.text((px, py), text, colour, self.font, anchor)

    def pixels(self, x, y):
        """-> the pixels [(px, py), …] of the points, without NaN."""
        left, top, right, bottom = self.frame
        px = place(x, self.x, self.x_log, (left, right))
        py = place(y, self.y, self.y_log, (bottom, top))
        px, py = np.broadcast_arrays(px, py)
        known = np.isfinite(px + py)
        return list(zip(px[known], py[known]))

    def line(self, x, y, colour, low=None, high=None):
        if low is not None:
            there, back = self.pixels(x, low), self.pixels(x, high)
            self.draw.polygon(there + back[::-1], colour + "28")    # 28: mostly transparent
        self.draw.line(self.pixels(x, y), colour, THICK, "curve")

    def points(self, x, y, colour, radius=4):
        reach = np.full(2, K * radius)
        for centre in self.pixels(x, y):
            corners = np.concatenate([centre - reach, centre + reach])
            self.draw.ellipse(corners.tolist(), colour)

    def text(self, x, y, text, colour="black", anchor="lm"):
        for px, py in self.pixels(x, y):
            self.write(px, py, "  " + text, anchor, colour)

    def image(self):
        return self.canvas.resize(self.size, Image.LANCZOS)


def panels(images, rows):
    done = []
    for title, tiles in images.items():
        across = len(tiles) // rows
        tiles = tiles.permute(0, 3, 1, 2)                   # [n,3,H,W]
        grid = make_grid(tiles, across, padding=1, pad_value=150)
        grid = grid.permute(1, 2, 0).numpy()
        grid = ImageOps.scale(Image.fromarray(grid), 2, Image.NEAREST)
        em = min(28, max(15, grid.width // 18))
        head = round(em * (0.7 + 1.5 * (1 + title.count("\n"))))
        size = grid.width + em, grid.height + head + em
        panel = note(dict.fromkeys(title.splitlines(), "black"), size, em)
        panel.paste(grid, (em // 2, head))
        done.append(panel)
    return sheet(done, 4)


def note(lines, size, font=15):
    image = Image.new("RGB", size, "white")
    face = ImageFont.load_default(font)
    draw = ImageDraw.Draw(image)
    middle = font
    for text, colour in lines.items():
        text = text.translate(SPELLED)
        draw.text((font / 2, middle), text, colour, face, "lm")
        middle += 1.5 * font
    return image


def write_gif(file, frames):
    """Each of the images stays for 120 milliseconds, the last one for 2.5 seconds."""
    times = [120] * (len(frames) - 1) + [2500]
    first, *others = frames
    first.save(file, format="GIF", append_images=others, save_all=True, duration=times, loop=0)


def sheet(images, abreast):
    rows = [images[i:i + abreast] for i in range(0, len(images), abreast)]
    heights = [max(image.height for image in row) for row in rows]
    width = max(image.width for image in images)
    size = width * len(rows[0]), sum(heights)
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, abreast)
        top = sum(heights[:row])
        canvas.paste(image, (width * column, top))
    return canvas
