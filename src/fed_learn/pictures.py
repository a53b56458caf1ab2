"""What the pictures of the package share: their palette, a figure that needs no display, and axes without a frame."""

from typing import Any

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, AMBER, GREEN, RED = "#2563eb", "#d97706", "#059669", "#dc2626"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of some inches, for a file.

    Raises:
        ImportError: matplotlib is not installed (extra `demo`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'fed-learn[demo]'") from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def without_frame(axes: Any) -> None:
    """Takes away the frame and the ticks' marks; their labels stay, muted."""
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
