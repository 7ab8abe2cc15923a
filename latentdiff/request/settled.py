"""The options of a walk as they are when all is decided."""

from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from latentdiff.request.options import SAMPLING, SamplingOptions, checked

if TYPE_CHECKING:

    class Settings:
        """All of `SamplingOptions`, checked, with the defaults in place of what was not given."""

        __dataclass_fields__: ClassVar[dict[str, Any]]
        left_open: set[str]

        def __init__(self, **options: Unpack[SamplingOptions]) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    from dataclasses import field, make_dataclass

    from latentdiff.request.options import FAST

    class _Settled:
        """All of `SamplingOptions`, checked, with the defaults in place of what was not given; `fast` has done its work.

        `left_open` are the names of those that a default decided.
        """

        def __post_init__(self) -> None:
            asked = {name: getattr(self, name) for name in SAMPLING}
            given = {name: value for name, value in checked(asked).items() if value is not None}
            fast = FAST if given.get("fast") else {}
            defaults = {name: option.default for name, option in SAMPLING.items()}
            left_open = SAMPLING.keys() - given.keys() - fast.keys()
            for name, value in {**defaults, **fast, **given, "fast": False, "left_open": left_open}.items():
                object.__setattr__(self, name, value)

    Settings = make_dataclass(
        "Settings",
        [(name, Any, field(default=None)) for name in SAMPLING],
        bases=(_Settled,),
        frozen=True,
        kw_only=True,
    )
