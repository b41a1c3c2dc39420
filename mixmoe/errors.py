"""The library's one exception: the rule, the value given, the nearest legal value."""


class MixMoEError(ValueError):
    """A request that breaks a rule. Nothing was computed and no device memory was touched.

    ``MixMoEError("H must be a multiple of 32", 100, "96 or 128")`` reads
    ``H must be a multiple of 32: got 100, nearest legal: 96 or 128``.
    """

    def __init__(self, rule: str, got: object, nearest: object = None) -> None:
        self.rule, self.got, self.nearest = rule, got, nearest
        tail = "" if nearest is None else f", nearest legal: {nearest}"
        super().__init__(f"{rule}: got {got}{tail}")


def nearest_multiple(value: int, step: int) -> str:
    """The multiples of ``step`` on both sides of ``value``, for the last part of an error."""
    below = value // step * step
    return f"{below} or {below + step}" if below > 0 else f"{step}"
