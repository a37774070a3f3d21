"""How a run trained, as HTML: small charts of pretraining and of what came after it."""

from html import escape

from certprune.reports.look import Style, styles
from certprune.reports.read import RunView, Stage, Variant
from certprune.reports.rows import network, ordered
from certprune.reports.svg import Axes, Line, line_chart, swatch

SIZE = (340, 220)
PANELS = (
    ("loss", "Validation loss", False),
    ("clean_accuracy", "Clean accuracy", True),
    ("noisy_accuracy", "Accuracy under noise", True),
    ("attack_accuracy", "Accuracy under attack", True),
    ("certified_accuracy", "Certified accuracy", True),
)
SOLID, DASHED, DOTTED = Style(1, (), "o"), Style(2, (6, 4), "o"), Style(3, (2, 3), "o")


def pretraining(run: RunView) -> str:
    """Loss, accuracies and the eps ramp of pretraining."""
    stage = run.pretrain
    if stage is None or not stage.metrics:
        return ""
    loss = [
        _stage_line("training", stage, "train", "loss", SOLID),
        _stage_line("validation, at the final eps", stage, "validation", "loss", DASHED),
    ]
    accuracy = [
        _stage_line("clean", stage, "validation", "clean_accuracy", SOLID),
        _stage_line("certified, at the final eps", stage, "validation", "certified_accuracy", DASHED),
        _stage_line("under attack, at the final eps", stage, "validation", "attack_accuracy", DOTTED),
        _stage_line("under noise", stage, "validation", "noisy_accuracy", DOTTED),
    ]
    ramp = [_stage_line("eps", stage, "train", "eps", SOLID)]
    panels = [
        _panel(loss, _axes("Loss")),
        _panel(accuracy, _axes("Validation accuracy", share=True)),
        _panel(ramp, _axes("Training eps"), legend=False),
    ]
    caption = "Pretraining of the dense network that all others start from. "
    if stage.selected_epoch:
        caption += f"The dots mark epoch {stage.selected_epoch}, whose weights were kept."
    return _figure(panels, caption)


def afterwards(run: RunView) -> str:
    """Validation loss and accuracies of every network after pretraining, on one axis of epochs."""
    held = [(variant, text) for variant, text in ordered(run).values() if variant.name != "pretrain"]
    held = [(variant, text) for variant, text in held if any(stage.metrics for stage in variant.stages.values())]
    if not held:
        return ""
    looks = styles(network(variant) for variant, _ in held)
    starts = {len(v.stages["prune"].metrics) for v, _ in held if "prune" in v.stages and v.stages["prune"].metrics}
    marks = tuple((start, "finetuning") for start in starts) if len(starts) == 1 else ()
    panels = []
    for key, title, share in PANELS:
        lines = [_path(text, variant, key, style) for (variant, text), style in zip(held, looks, strict=True)]
        panels.append(_panel(lines, _axes(title, share, "epochs after pretraining", marks), legend=False))
    legend = "".join(
        f"<li>{swatch(style, marker=False)}{escape(text)}</li>" for (_, text), style in zip(held, looks, strict=True)
    )
    caption = (
        "After pretraining, on validation images at the final eps. Scores are learned up to the dotted line; a "
        "network that has no scores to learn is finetuned for those epochs too, so that all have equally many. Dots "
        "mark the epochs whose weights were kept."
    )
    return _figure(panels, caption, f'<ul class="legend">{legend}</ul>')


def _values(stage: Stage, part: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values on record; entries without a number are left out."""
    xs, ys = [], []
    for entry in stage.metrics:
        value = (entry.get(part) or {}).get(key)
        if isinstance(value, (int, float)) and isinstance(entry.get("epoch"), int):
            xs.append(entry["epoch"])
            ys.append(float(value))
    return xs, ys


def _stage_line(label: str, stage: Stage, part: str, key: str, style: Style) -> Line:
    xs, ys = _values(stage, part, key)
    chosen = (xs.index(stage.selected_epoch),) if stage.selected_epoch in xs else ()
    return Line(label, xs, ys, style, points=chosen, width=1.7)


def _path(label: str, variant: Variant, key: str, style: Style) -> Line:
    """A variant's stages one after the other."""
    xs: list[float] = []
    ys: list[float] = []
    chosen: list[int] = []
    before = 0
    for stage in variant.stages.values():
        epochs, values = _values(stage, "validation", key)
        if stage.selected_epoch in epochs:
            chosen.append(len(xs) + epochs.index(stage.selected_epoch))
        xs += [before + epoch for epoch in epochs]
        ys += values
        before += len(stage.metrics)
    return Line(label, xs, ys, style, points=tuple(chosen), width=1.7)


def _axes(title: str, share: bool = False, x_label: str = "epochs", marks=()) -> Axes:
    if not share:
        return Axes(x_label, title, y_limit=(0.0, float("inf")), y_format="{:.3g}".format, marks=marks)

    def y_format(value: float) -> str:
        return f"{100 * value:.1f}".removesuffix(".0") + " %"

    return Axes(x_label, title, y_limit=(0.0, 1.0), y_format=y_format, marks=marks)


def _panel(lines: list[Line], axes: Axes, legend: bool = True) -> str:
    lines = [line for line in lines if line.xs]
    if not lines:
        return ""
    chart = line_chart(lines, axes, *SIZE, direct=False)
    if not legend:
        return f"<div>{chart}</div>"
    items = "".join(f"<li>{swatch(line.style, marker=False)}{escape(line.label)}</li>" for line in lines)
    return f'<div>{chart}<ul class="legend">{items}</ul></div>'


def _figure(panels: list[str], caption: str, legend: str = "") -> str:
    return (
        f'<figure><div class="panels">{"".join(panels)}</div>{legend}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
