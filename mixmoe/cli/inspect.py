"""``mixmoe inspect``: the picture of a memory order."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mixmoe.errors import MixMoEError
from mixmoe.preshuffle import ORDERS, order_named


def inspect(
    order: Annotated[str | None, typer.Argument(help="an order's name; none lists them")] = None,
    element: Annotated[str | None, typer.Option(help="an element it holds: e2m1, e4m3fn")] = None,
) -> None:
    """Show which row and column of a weight matrix lies where in memory."""
    if order is None:
        table = Table(title="memory orders", title_justify="left")
        for column in ("order", "elements"):
            table.add_column(column)
        for name, known in ORDERS.items():
            table.add_row(name, ", ".join(e.name for e in known.elements))
        Console().print(table)
        return
    chosen = order_named(order)
    held = {e.name: e for e in chosen.elements}
    if element is not None and element not in held:
        raise MixMoEError(f"{order} holds other elements", element, ", ".join(held))
    print(chosen.picture(None if element is None else held[element]), end="")
