"""What quantising cost, by kind of tensor and for the worst ones. Every tensor's is in the manifest beside the files."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fp4lab.checkpoint.quantise import TensorError

WORST = 5


def print_errors(errors: "Sequence[TensorError]", console: Console | None = None) -> None:
    """Nothing for no tensors."""
    if not errors:
        return
    console = console or Console(highlight=False, soft_wrap=True)
    kinds: dict[str, list[TensorError]] = defaultdict(list)
    for e in errors:
        kinds[e.name.removesuffix(".weight").rpartition(".")[2]].append(e)
    table = Table("tensors", "", "relative error", "worst", "largest error", box=None, pad_edge=False)
    for kind in sorted(kinds):
        found = kinds[kind]
        mean = sum(e.relative_error for e in found) / len(found)
        worst = max(e.relative_error for e in found)
        table.add_row(kind, str(len(found)), f"{mean:.4f}", f"{worst:.4f}", f"{max(e.max_abs_error for e in found):.3g}")
    console.print(table)
    if len(errors) > WORST:
        console.print(f"worst of {len(errors)}:")
    for e in sorted(errors, key=lambda e: -e.relative_error)[:WORST]:
        console.print(f"  {e.relative_error:.4f}  {e.name} {list(e.shape)}", markup=False)
