"""How many visual tokens a method keeps: a share of them, or what meets a target sparsity."""

from collections.abc import Callable

from focuslib.errors import UserError
from focuslib.prefill.ops import DecoderShape, counted_operations, dense_operations
from focuslib.prefill.record import Prefill

MISSED = 0.015  # a target that no setting comes this near cannot be met


def check_share(method: str, name: str, value: float | None, *, zero: bool = False) -> None:
    """Raise UserError unless a setting is a share: above 0 (or 0 too) and at most 1; None passes."""
    if value is not None and not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise UserError(f"method {method}: {name} is {value}; it must lie in {'[' if zero else '('}0, 1]")


def check_choice(method: str, name: str, value: str, other: str, usual: str = "published") -> None:
    """Raise UserError unless a setting is the usual thing or the other one that it may be."""
    if value not in (usual, other):
        raise UserError(f"method {method}: {name} is {value!r}; it must be {usual} or {other}")


def check_target(method: str, target: float | None) -> None:
    """Raise UserError unless a target sparsity is None or a share below 1."""
    if target is not None and not 0 <= target < 1:
        raise UserError(f"method {method}: target_sparsity is {target}; it must lie in [0, 1), or be none")


def schedule_sparsity(shape: DecoderShape, tokens: int, present: list[int], retained: list[int] | None = None) -> float:
    """Computation sparsity of a prefill that drops tokens: the visual tokens present, layer by layer.

    retained: those that each layer's MLP sees, where some are dropped before it.
    """
    return 1 - counted_operations(shape, present, retained or present, []) / dense_operations(shape, tokens)


def solve(method: str, target: float, most: int, sparsity: Callable[[int], float], cause: str = "") -> int:
    """The n of 1 … most whose sparsity, falling in n, is nearest the target.

    Raises UserError if even the nearest is more than MISSED away; cause: what then stands in the way.
    """
    low, high = 1, most  # the least n whose sparsity is at most the target
    while low < high:
        middle = (low + high) // 2
        if sparsity(middle) > target:
            low = middle + 1
        else:
            high = middle
    best = min((n for n in (low - 1, low) if n >= 1), key=lambda n: abs(sparsity(n) - target))
    if abs(sparsity(best) - target) > max(MISSED, 1 / most):
        reach = f"{sparsity(most):.3f} to {sparsity(1):.3f}"
        raise UserError(f"method {method}: target_sparsity {target} cannot be met{cause}; within reach: {reach}")
    return best


def tokens_for(method: str, prefill: Prefill, target: float) -> int:
    """How many visual tokens to keep from the coming layer on, for the whole prefill to reach the target sparsity."""
    record, layers = prefill.record, prefill.shape.layers
    layer = len(record.attended)

    def sparsity(kept: int) -> float:
        rest = [kept] * (layers - layer)
        return schedule_sparsity(prefill.shape, prefill.grid.length, record.attended + rest, record.retained + rest)

    cause = f" by dropping before layer {layer} of {layers}" if layer else ""
    return solve(method, target, len(prefill.present), sparsity, cause)
