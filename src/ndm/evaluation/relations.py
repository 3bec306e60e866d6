r"""Relations that should hold between measurements.

.. math::
    \text{NLL} \le \text{NELBO}, \qquad \text{NELBO}_T \ge \text{NELBO}_\infty, \qquad
    \text{NELBO}_T - \text{NELBO}_\infty = O(1/T), \qquad \text{NELBO}_{T, K} \le \text{NELBO}_T .

Each relation is checked on the differences per example, which vary much less than the values.

The first relation holds for a perfect predictor and an F that is affine in x. For any other model
the ODE and the SDE are different models, and a violation shows how far they differ. It is checked
if both use q(z_0|x). The next two hold if the predictor is good at the times of the grid. A
violated relation deserves a closer look, but does not prove an error. The quadrature of the
likelihood is compared with a quadrature on half of its nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ndm.evaluation.measurement import LikelihoodProtocol, Measurement, paired_difference


@dataclass(frozen=True)
class Check:
    """A relation between two measurements."""

    text: str
    holds: bool


def check_relations(measurements: Sequence[Measurement], errors: float = 3.0) -> list[Check]:
    """Check the relations of this module; return no checks if there is only one example.

    Args:
        measurements: measurements of the same examples.
        errors: tolerance in standard errors of the difference.
    """
    if len(measurements[0].values) < 2:
        return []
    if len({one.null for one in measurements}) > 1:
        parts = [[one for one in measurements if one.null == null] for null in (False, True)]
        return [check for part in parts if part for check in check_relations(part, errors)]
    bounds = [one for one in measurements if one.quantity == "nelbo" and not one.weighted]
    plain = [one for one in bounds if not one.fitted]
    limit = next((one for one in plain if one.steps is None), None)
    reference = next((one for one in plain if one.as_trained), limit)
    discrete = [one for one in plain if one.steps is not None and not one.as_trained]
    discrete.sort(key=lambda one: one.steps or 0)
    checks = []
    for one in measurements:
        if isinstance(one.protocol, LikelihoodProtocol):
            if reference is not None and one.protocol.dequantization == "variational":
                checks.append(_at_most(one, reference, errors))
            if one.protocol.solver is not None:
                checks.append(_quadrature(one, one.protocol, errors))
    if limit is not None:
        checks += [_at_most(limit, one, errors) for one in discrete]
        if len(discrete) > 1:
            checks.append(_tends_to(discrete[0], discrete[-1], limit, errors))
    for one in measurements:
        alike = [other for other in bounds if one.weighted and other.fitted == one.fitted]
        checks += [_at_most(one, other, errors) for other in alike if other.steps == one.steps]
    return checks


def _quadrature(one: Measurement, protocol: LikelihoodProtocol, errors: float) -> Check:
    """Half of the nodes give the same result, up to noise and 0.01 bits/dim."""
    shift, error = protocol.half_the_nodes_shift_bpd, protocol.half_the_nodes_shift_bpd_stderr
    holds = abs(shift) <= max(errors * error, 0.01)
    verdict, advice = ("fine", "") if holds else ("NOT fine", "; raise --nodes")
    return Check(
        f"{one.label}: quadrature {verdict} enough, half of the nodes shift it by {shift:+.4f} ±"
        f" {error:.4f}{advice}",
        holds,
    )


def _difference(a: Measurement, b: Measurement) -> tuple[float, float]:
    """Return the mean of a - b and its standard error over the same examples, bits/dim."""
    return paired_difference(a.values, b.values, a.dims)


def _at_most(low: Measurement, high: Measurement, errors: float) -> Check:
    difference, error = _difference(low, high)
    holds = difference <= errors * error
    return Check(
        f"{low.label} <= {high.label}: {'yes' if holds else 'NO'}, difference {difference:+.4f} ±"
        f" {error:.4f} bits/dim",
        holds,
    )


def _tends_to(coarse: Measurement, fine: Measurement, limit: Measurement, errors: float) -> Check:
    """The gap to the limit falls as 1/T, up to a factor of two."""
    (first, _), (last, error) = _difference(coarse, limit), _difference(fine, limit)
    expected = first * (coarse.steps or 1) / (fine.steps or 1)
    holds = abs(last) <= 2 * abs(expected) + errors * error
    return Check(
        f"NELBO tends to continuous time: {'yes' if holds else 'NO'}, {first:+.4f} at T ="
        f" {coarse.steps}, {last:+.4f} ± {error:.4f} at T = {fine.steps}",
        holds,
    )
