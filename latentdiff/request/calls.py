"""The door of the library: calls with a name that nobody takes, or a value outside its domain, end here in one line; and
the options of a walk as they are when all is decided."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, Unpack, cast

from latentdiff.errors import UsageError
from latentdiff.request.options import OPTIONS, SAMPLING, SamplingOptions, options_of

Function = TypeVar("Function", bound=Callable[..., Any])
Domain = Callable[[str, Any], Any]

# Names of diffusers that mean the same as ours. `docs/diffusers.md` has the whole table.
SAME = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num_images",
    "mask_image": "mask",
}
# Names of diffusers for what is said otherwise here.
OTHERWISE = {
    "generator": "give `seed`, a whole number or a list with one for each image",
    "output_type": 'give `output`: "images" for PIL images, or "latents"',
    "return_dict": "leave it out: a list of PIL images is returned",
    "callback_on_step_end": "give `callback`, which is called as callback(step, t, x0) and cancels by returning False",
    "callback_on_step_end_tensor_inputs": "leave it out: `callback` is called as callback(step, t, x0)",
    "callback_steps": "leave it out: `callback` is called after every step",
    "scheduler": "give `sampler`, and `spacing` for its noise levels",
    "padding_mask_crop": "give `only_masked=True`, and `padding` in pixels",
    "pooled_prompt_embeds": "join it to prompt_embeds: latentdiff.networks.pooled.with_pooled(prompt_embeds, pooled)",
    "negative_pooled_prompt_embeds": "join it to negative_prompt_embeds, see latentdiff.networks.pooled.with_pooled",
    "crops_coords_top_left": "give `crop_top_left`",
    "denoising_end": "give the whole to `latentdiff.tasks.refine`, which takes a `switch`",
    "cross_attention_kwargs": "give the scale of a LoRA to `load_lora`",
    "ip_adapter_image": "give `image_prompts`: [IPAdapter.load(file)(image)]",
    "ip_adapter_image_embeds": "give `image_prompts`: [IPAdapter.load(file)(image)]",
    "torch_dtype": 'give `precision`: "fp32", "bf16", "fp16" or "int8"',
    "dtype": 'give `precision`: "fp32", "bf16", "fp16" or "int8"',
    "device_map": "give `device`",
}


def public(options: type[Any] | None = None, **domains: Domain) -> Callable[[Function], Function]:
    """Make a function answer wrong calls with a `UsageError`, and its signature show all of its options.

    Args:
        options: the group of `latentdiff.request.options` that its `**options` are.
        domains: of its other arguments, where those are checked at the door.
    """
    group = options_of(options) if options else {}
    checks = {**{name: option.domain for name, option in group.items()}, **domains}

    def decorate(function: Function) -> Function:
        plain = inspect.signature(function)
        shown = _expanded(plain, options, group)
        rest = {name for name, parameter in plain.parameters.items() if parameter.kind is parameter.VAR_KEYWORD}

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            named = _translated(named, shown.parameters)
            try:
                bound = plain.bind(*arguments, **named)
            except TypeError as error:
                raise UsageError(f"{function.__qualname__}: {error}") from None
            for values in (bound.arguments, *(bound.arguments[name] for name in rest & bound.arguments.keys())):
                for name in checks.keys() & values.keys():
                    if values[name] is not None:
                        values[name] = checks[name](name, values[name])
            return function(*bound.args, **bound.kwargs)

        vars(call)["__signature__"] = shown
        return cast(Function, call)

    return decorate


def unknown(name: str, known: Iterable[str]) -> UsageError:
    """The error for an option that nobody takes, which names the nearest one."""
    names = list(known)
    if name in OTHERWISE:
        return UsageError(f"there is no option {name!r} here; {OTHERWISE[name]}")
    if name in OPTIONS:
        return UsageError(f"this call takes no option {name!r}; expected one of {', '.join(names)}")
    if near := get_close_matches(name, names, n=1):
        return UsageError(f"there is no option {name!r}; did you mean {near[0]!r}?")
    return UsageError(f"there is no option {name!r}; expected one of {', '.join(names)}")


def _translated(named: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The arguments under our names.

    Raises:
        UsageError: one that is not taken, or is given under both names.
    """
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    ours: dict[str, Any] = {}
    for name, value in named.items():
        own = SAME[name] if name not in parameters and SAME.get(name) in parameters else name
        if own not in parameters and not takes_any:
            raise unknown(name, [known for known in parameters if known not in ("self", "cls")])
        if own in named and own != name:
            raise UsageError(f"{name!r} is another name of {own!r}; give one of the two")
        ours[own] = value
    return ours


def _expanded(plain: inspect.Signature, group: type[Any] | None, options: Mapping[str, Any]) -> inspect.Signature:
    """The signature with the options in place of `**options`."""
    if group is None:
        return plain
    own = [parameter for parameter in plain.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=group.__annotations__[name]
        )
        for name, option in options.items()
    ]
    return plain.replace(parameters=[*own, *added])


if TYPE_CHECKING:

    class Settings:
        """All of `SamplingOptions`, checked, with the defaults in place of what was not given."""

        __dataclass_fields__: ClassVar[dict[str, Any]]
        left_open: set[str]
        given: dict[str, Any]

        def __init__(self, **options: Unpack[SamplingOptions]) -> None: ...
        def but(self, **changes: Any) -> Self: ...
        def decided(self, changes: Mapping[str, Any]) -> Self: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    from latentdiff.request.options import FAST, checked

    class _Settled:
        """All of `SamplingOptions`, checked, with the defaults in place of what was not given, or those of `fast`.

        `given` are those that were given, `left_open` the names of those that a default decided.
        """

        def __post_init__(self) -> None:
            given = _not_none(self)
            self._settle(checked(given) if given else given)

        def _settle(self, given: dict[str, Any]) -> None:
            fast = FAST if given.get("fast") else {}
            defaults = {name: option.default for name, option in SAMPLING.items()}
            left_open = SAMPLING.keys() - given.keys() - fast.keys()
            for name, value in {**defaults, **fast, **given, "left_open": left_open, "given": given}.items():
                object.__setattr__(self, name, value)

        def but(self, **changes: Any) -> Self:
            """The same with these options given, and what was left open left open."""
            return type(self)(**{**self.given, **changes})

        def decided(self, changes: Mapping[str, Any]) -> Self:
            """The same with these values, which are not checked again, and nothing left open that has a default."""
            other = copy(self)
            other._settle(_not_none(self) | {name: value for name, value in changes.items() if value is not None})
            return other

    def _not_none(settings: _Settled) -> dict[str, Any]:
        values = ((name, getattr(settings, name)) for name in SAMPLING)
        return {name: value for name, value in values if value is not None}

    Settings = make_dataclass(
        "Settings",
        [(name, Any, field(default=None)) for name in SAMPLING],
        bases=(_Settled,),
        frozen=True,
        kw_only=True,
    )
