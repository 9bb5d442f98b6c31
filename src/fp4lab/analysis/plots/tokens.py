"""First tokens of the paths side by side, differences coloured and marked."""

from typing import TYPE_CHECKING, Any

from fp4lab.analysis.plots.style import INK, MUTED, SKY, VERMILION, figure, label
from fp4lab.analysis.select import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fp4lab.analysis.frames import Frames

MOST_ROWS = 64


def top_tokens(frames: "Frames") -> list[dict[str, Any]]:
    """A row for each run, prompt and moment (before or after the step): {"run", "prompt", "when", "paths": {path: cell}}.

    A cell has id, logit and text of the likeliest token, `bad` (values of the hidden state and logits that are not finite)
    and `differs` (another id than the first path's).
    """
    tops = frames.first_tokens[frames.first_tokens["rank"] <= 0]
    found: dict[tuple, dict[str, Any]] = {}
    for r in tops.to_dict("records"):
        row = found.setdefault(
            (r["run"], r["prompt"], r["when"]), {"run": r["run"], "prompt": r["prompt"], "when": r["when"], "paths": {}}
        )
        bad = sum(int(r[k]) for k in ("hidden_nan", "hidden_inf", "logits_nan", "logits_inf"))
        first = next(iter(row["paths"].values()), None)
        cell = {"id": r["id"], "logit": r["logit"], "text": r["text"], "bad": bad}
        row["paths"][r["path"]] = {**cell, "differs": first is not None and first["id"] != r["id"]}
    return list(found.values())


def first_token_table(frames: "Frames") -> "Figure | None":
    """The likeliest first token of each path, a row a run, prompt and moment; None if no run has any.

    A token that is not the first path's has "≠" and another background. At most MOST_ROWS rows: those that differ first.
    """
    from matplotlib.transforms import Bbox

    rows = top_tokens(frames)
    if not rows:
        return None
    paths = list(dict.fromkeys(path for row in rows for path in row["paths"]))
    shown = sorted(rows, key=lambda r: not any(c["differs"] or c["bad"] for c in r["paths"].values()))[:MOST_ROWS]
    labels = {r["run"]: label(r, frames.runs) for r in frames.runs.to_dict("records")}
    cells, colours = [], []
    for row in shown:
        texts = [labels[row["run"]][:46], f"{row['prompt'][:24]!r} {row['when']}"]
        tints = ["none", "none"]
        for path in paths:
            cell = row["paths"].get(path)
            texts.append("" if cell is None else cell_text(cell))
            marked = cell is not None and (cell["differs"] or cell["bad"])
            tints.append(VERMILION + "55" if marked else "none" if cell is None else SKY + "33")
        cells.append(texts)
        colours.append(tints)
    fig = figure(3.2 + 1.6 + 1.7 * len(paths), 0.24 * len(cells) + 0.9)
    axes = fig.subplots()
    axes.axis("off")
    table = axes.table(
        cells,
        cellColours=colours,
        colLabels=["run", "prompt", *paths],
        colWidths=[0.3, 0.16, *[0.54 / len(paths)] * len(paths)],
        cellLoc="left",
        colLoc="left",
        bbox=Bbox.unit(),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (at, _), cell in table.get_celld().items():
        cell.set_edgecolor(MUTED)
        cell.set_linewidth(0.3)
        cell.get_text().set_color(INK)
        if at == 0:
            cell.set_facecolor("none")
            cell.get_text().set_fontweight("bold")
    left_out = f"; {len(rows) - len(shown)} more rows, none of them with a difference" if len(shown) < len(rows) else ""
    title = f"Likeliest first token (logit); ≠ and colour: not that of {paths[0]}{left_out}"
    fig.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    return fig


def cell_text(cell: dict[str, Any]) -> str:
    """ "≠ 'Hi' 12.31", or that the numbers are bad."""
    if cell["id"] < 0 or missing(cell["logit"]):
        return f"✕ {cell['bad']} values not finite" if cell["bad"] else "no token"
    bad = f", ✕ {cell['bad']} not finite" if cell["bad"] else ""
    return f"{'≠ ' if cell['differs'] else ''}{cell['text']!r} {cell['logit']:.2f}{bad}"
