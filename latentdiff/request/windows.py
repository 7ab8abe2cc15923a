"""What a walk sees of its latents at once, as options say it in pixels."""

from __future__ import annotations

from latentdiff.errors import UsageError
from latentdiff.networks.windows import Windows
from latentdiff.request.plan import Plan


def windows_of(plan: Plan, factor: int) -> Windows | None:
    """The windows of a plan; None if latents are seen whole.

    Args:
        factor: pixels for a latent.

    Raises:
        UsageError: they are no multiples of the factor, would leave gaps, or do not go with a cache.
    """
    side, stride, interval = plan.options.window, plan.options.window_stride, plan.options.cache_interval
    if side is None:
        if stride is not None:
            raise UsageError(f"expected window, how large, with window_stride; found {stride} alone")
        return None
    stride = stride or max(side // 2 // factor, 1) * factor
    for name, pixels in (("window", side), ("window_stride", stride)):
        if pixels % factor:
            raise UsageError(f"expected a {name} that is a multiple of {factor}, found {pixels}")
    if stride > side:
        raise UsageError(f"expected a window_stride of at most the window, {side}, found {stride}")
    if interval > 1:
        raise UsageError(f"windows have no layers in common to cache; leave cache_interval at 1, found {interval}")
    return Windows(side // factor, stride // factor, plan.around)
