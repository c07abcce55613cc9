"""The picture of a partition, in a process of its own, because matplotlib keeps its fonts open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import needs

DRAW = """
from pathlib import Path
import numpy as np
from matplotlib.image import imread
from torchfedrpc.experiments.partition_plot import draw_partition

def draw(name, parts, labels):
    draw_partition({f"client_{number}": part for number, part in enumerate(parts)}, labels, Path(name))
    return imread(name)

labels = np.arange(4000) % 4 * 7
apart = [np.flatnonzero(labels <= 7), np.flatnonzero(labels > 7)]
few = draw("few.png", apart, labels)
blue = few[..., 2] - few[..., 0] > 0.3
height, width = blue.shape
quarters = blue[: height // 2, : width // 4], blue[height // 2 :, : width // 4]
assert quarters[0].mean() > 0.3 > 10 * quarters[1].mean(), "the first client has the first classes alone"
assert blue[: height // 2, -width // 8 :].any(), "its number of samples is a bar"

assert draw("one.png", [np.arange(4)], labels[:4]).shape[0] == 360
many = draw("many.png", np.array_split(np.random.default_rng(0).permutation(4000), 2000), labels)
assert many.shape[:2] == (960, 1200), "the picture does not grow with the number of clients"
sorted_by_class = draw("sorted.png", np.arange(4000).reshape(1000, 4).T.repeat(25, 0).reshape(100, -1), labels)
blue = sorted_by_class[..., 2] - sorted_by_class[..., 0] > 0.3
assert blue[100:200, 100:200].all(), "the clients of the first class come first"
draw("classes.png", [np.arange(4000)], np.arange(4000))
"""


def test_pictures_show_classes_and_sizes_of_few_and_of_many_clients(tmp_path: Path) -> None:
    needs("matplotlib")
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # which matplotlib 3.9 gets from newer libraries
    subprocess.run([sys.executable, *warnings, "-c", DRAW], cwd=tmp_path, check=True, timeout=100)
