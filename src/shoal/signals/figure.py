"""The picture of a probe: is a probability what it says, and which levels does the probe look at?"""

from __future__ import annotations

from pathlib import Path

from shoal.errors import InvalidInput, MissingExtra
from shoal.files import replaced
from shoal.signals.report import Evaluation

SUFFIXES = (".png", ".svg")
MOST_CLASSES = 10
"""Lines in the panel of levels."""


def check_picture(path: Path) -> None:
    """Raises `InvalidInput` for a suffix that is no picture's, `MissingExtra` without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"{path}: a picture is a PNG or SVG, so the suffix must be {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'shoal[plot]'") from None


def draw(found: Evaluation, path: Path) -> None:
    """Write reliability and mean weight of each level as a PNG or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    sure, correct, share = zip(*found.reliability, strict=True)
    left.plot(sure, correct, color="C0")
    left.scatter(sure, correct, s=[10 + 300 * one for one in share], color="C0")
    binary = len(found.probe.settings.classes) == 2
    left.set_xlabel(f"probability of {found.probe.settings.classes[1]}" if binary else "confidence", parse_math=False)
    left.set_ylabel("how often it is true")
    left.set_title(f"reliability, error {found.quality.calibration_error:.3f}", fontsize=10)
    for name, weights in list(found.layer_weights.items())[:MOST_CLASSES]:
        right.plot(range(len(weights)), weights, marker="o", markersize=3, label=name)
    right.axhline(1 / found.probe.settings.num_levels, color="0.7", linewidth=1)
    right.set_xlabel("level (0: embedding)")
    right.set_ylabel("mean weight")
    right.set_ylim(bottom=0)
    right.set_title("levels, by what was decided", fontsize=10)
    for text in right.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)  # a class may be named "$"
    with replaced(path) as partial:
        figure.savefig(partial, format=path.suffix.lower().removeprefix("."), dpi=150, metadata={})
