"""The base class of all parts of a model: modules whose arguments can be shown and saved."""

import inspect

from torch import nn

from ndm.errors import UserError


class Part(nn.Module):
    """Base class of the parts of a model.

    Subclasses store every argument of their constructor as an attribute of the same name, so that
    the part can be shown and saved.
    """

    def arguments(self) -> dict[str, object]:
        """Return the arguments of the constructor by name."""
        names = [
            name
            for name in inspect.signature(type(self).__init__).parameters
            if name not in ("self", "args", "kwargs")
        ]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return the arguments that are not modules, for ``repr``."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.arguments().items()
            if not isinstance(value, nn.Module)
        )


def check_network(network: object, owner: str, call: str) -> None:
    """Check that an argument is an ``nn.Module``.

    Args:
        network: the argument.
        owner: the part that needs it, such as "a predictor".
        call: how the part calls it, such as "network(z, t)".

    Raises:
        UserError: it is not.
    """
    if not isinstance(network, nn.Module):
        raise UserError(
            f"network is a {type(network).__name__}: {owner} needs an nn.Module called as {call}"
        )
