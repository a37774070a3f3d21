"""Kept weights by layer, as an HTML heat table."""

import math
from html import escape

from certprune.reports.read import RunView
from certprune.reports.rows import ordered


def layers(run: RunView) -> str:
    """Kept weights by layer: a heat table, a column for each pruned network."""
    sizes = {text: variant.size for variant, text in ordered(run).values() if variant.size}
    sizes = {text: size for text, size in sizes.items() if size["kept"] < size["weights"]}
    if not sizes:
        return ""
    columns = [{layer["name"]: layer for layer in size["layers"]} for size in sizes.values()]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in sizes)
    order = dict.fromkeys(name for column in columns for name in column)
    body = []
    for name in order:
        size = next(column[name]["weights"] for column in columns if name in column)
        cells = "".join(_heat(column.get(name)) for column in columns)
        body.append(f'<tr><th scope="row" class="left"><code>{escape(name)}</code></th><td>{size:,}</td>{cells}</tr>')
    whole = "".join(_heat(size) for size in sizes.values())
    weights = max(size["weights"] for size in sizes.values())
    body.append(f'<tr><th scope="row" class="left">all prunable layers</th><td>{weights:,}</td>{whole}</tr>')
    return (
        '<div class="scroll"><table><thead><tr><th scope="col" class="left">Layer</th><th scope="col">Weights</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">The share of a layer’s weights that is kept, and how many they are; the deeper the colour, '
        "the larger the share (on a logarithmic scale). Biases are never pruned and are not counted.</p>"
    )


def _heat(layer: dict | None) -> str:
    if not layer:
        return "<td></td>"
    share = layer["kept"] / layer["weights"] if layer["weights"] else 0.0
    heat = 75 * (1 + max(math.log10(share), -4.0) / 4.0) if share else 0.0
    digits = 0 if share == 1 else 1 if share >= 0.1 else 2
    return (
        f'<td class="heat" style="--h:{heat:.0f}%">{100 * share:.{digits}f} %'
        f'<span class="interval">{layer["kept"]:,}</span></td>'
    )
