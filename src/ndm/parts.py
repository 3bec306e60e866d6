"""What all parts of a model share: their arguments can be shown and saved."""

import inspect

from torch import nn

from ndm.errors import UserError


class Part(nn.Module):
    """A part of a model. Every argument of its constructor is kept as an attribute of the same
    name, so that it can be shown and saved.
    """

    def arguments(self) -> dict[str, object]:
        """The constructor's arguments by name."""
        names = [
            name
            for name in inspect.signature(type(self).__init__).parameters
            if name not in ("self", "args", "kwargs")
        ]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """The arguments that are not modules themselves."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.arguments().items()
            if not isinstance(value, nn.Module)
        )


def check_network(network: object, owner: str, call: str) -> None:
    """Check that an argument is an ``nn.Module``.

    Args:
        network: the argument.
        owner: what needs it, such as "a predictor".
        call: how it is called.

    Raises:
        UserError: it is not.
    """
    if not isinstance(network, nn.Module):
        raise UserError(
            f"network is a {type(network).__name__}: {owner} needs an nn.Module called as {call}"
        )
