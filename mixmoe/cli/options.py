"""Options that a command was given and has no use for: refused, never dropped in silence."""

from collections.abc import Sequence

import typer

from mixmoe.errors import MixMoEError


def refuse_given(ctx: typer.Context, names: Sequence[str], rule: str, nearest: str) -> None:
    """Raise MixMoEError for the first of these parameters that stands on the command line."""
    spelt = {p.name: p.opts[0] if p.param_type_name == "option" else "" for p in ctx.command.params}
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            value = ctx.params[name]
            words = [spelt[name], "" if value is True else str(value)]
            raise MixMoEError(rule, " ".join(filter(None, words)), nearest)
