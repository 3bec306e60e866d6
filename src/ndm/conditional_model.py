"""Models that may take a condition, and are bound to it in one place: ``model.given(c)``.

Binding copies the parts of a model and shares their weights (:class:`ndm.parts.Conditional`), so
the bound, the likelihood and the samplers need not know of it.
"""

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from ndm.condition import Condition
from ndm.errors import UserError
from ndm.parts import Conditional, check_part, needs_condition


class Conditions(Protocol):
    """A data set that may know conditions of its examples, see :class:`ndm.data.EventDataset`."""

    def conditions(self, indices: Sequence[int]) -> Tensor | None:
        """Return the conditions of examples, or None."""


class ConditionalModel(Conditional):
    """A model that may take a condition; without one it is the model of p(x)."""

    condition: Condition | None
    """The kind of condition."""
    fixed: bool = False
    """Whether :meth:`given` has bound the model to a condition."""

    def given(self, c: object) -> Self:
        """Return the model of p(x|c), which shares all weights with this one.

        A conditional model that is given nothing is the model of p(x).

        Args:
            c: the condition, as its kind takes it (:mod:`ndm.condition`): that of each example of
                the batches to come, or one for all, such as the index of a class. None is p(x).

        Raises:
            UserError: the model takes no condition, or not this one.
        """
        if self.condition is None:
            raise UserError(
                "this model takes no condition: build it with one, such as"
                " condition=ndm.ClassCondition(num_classes), and train it"
            )
        bound = self.bind(self.condition.encode(c))
        bound.fixed = c is not None
        return bound

    def given_data(self, data: Conditions, indices: Sequence[int]) -> Self:
        """Return the model given the conditions of examples of a data set.

        It is this model if it takes no condition, or the data have none: that of p(x), or of the
        condition that it has been given.
        """
        unknown = self.condition is None or self.condition.masks or self.fixed
        c = None if unknown else data.conditions(indices)
        return self if c is None else self.given(c)

    def check_count(self, count: int) -> None:
        """Check that the model is bound to a condition for all of ``count`` examples, or for each.

        Raises:
            UserError: it is not.
        """
        if self.c is not None and len(self.c) not in (1, count):
            raise UserError(
                f"the condition is of {len(self.c)} examples, and {count} are wanted: give one of"
                " each example, or one for all"
            )

    def check_given(self) -> None:
        """Check that a condition is known, if the model has no p(x).

        Raises:
            UserError: it is not.
        """
        if self.condition is not None and self.c is None:
            self.condition.encode(None)

    def check_conditions(self) -> None:
        """Check that networks and condition fit, and bind the model to its null.

        Raises:
            UserError: they do not.
        """
        if self.condition is None:
            asking = next((one for one in self.networks() if needs_condition(one)), None)
            if asking is not None:
                raise UserError(
                    f"the network {type(asking).__name__} takes a condition and the model has none:"
                    " give the model one, such as condition=ndm.ClassCondition(num_classes)"
                )
            return
        check_part("condition", self.condition, Condition, "ndm.ClassCondition(num_classes)")
        if not self.conditional:
            raise UserError(
                f"the model has a {type(self.condition).__name__}, and none of its networks takes"
                f" it: give a network of this library {self.condition.argument}="
                f"{self.condition.size}, or use one that is called as network(x, t, c)"
            )
        for network in self.networks():
            self.condition.check_network(network)
        if self.condition.masks:
            self.check_masks()
        if self.condition.has_null:
            null = self.condition.null()
            bound = self.bind(null, self.condition.masks)
            self.c, self.masked, self._modules = null, bound.masked, bound._modules

    def check_masks(self) -> None:
        """Check that the model can be one of any part of x given any other.

        Raises:
            UserError: a part of it cannot.
        """

    def rows(self, start: int, stop: int) -> Self:
        """Return the model for a part of its batch: its conditions may be those of examples."""
        return self if self.c is None or len(self.c) == 1 else self.bind(self.c[start:stop])
