"""Published data sets: subsets get another name, and a checksum can pin the content.

A release has a name and a known number of examples in each split. If the files hold another number,
the source raises an error unless ``partial`` is set, and then its name ends in ``-partial``.
Publishers give no checksums of the content. Pass the checksum that the library computes and records
(:class:`ndm.data.DataDescription`) as ``sha256`` to reject any other content.
"""

from collections.abc import Mapping

from ndm.data.source import Loaded
from ndm.errors import UserError, describe_value


def check_sha256_argument(sha256: str | None) -> None:
    """Check that a pinned checksum has the form of one.

    Raises:
        UserError: it is neither None nor 64 hexadecimal digits.
    """
    if sha256 is not None and not (
        isinstance(sha256, str)
        and len(sha256) == 64
        and set(sha256.lower()) <= set("0123456789abcdef")
    ):
        raise UserError(
            f"sha256={describe_value(sha256)}: give the 64 hexadecimal digits from the data.json"
            " of a run, or null"
        )


def describe_release(
    name: str, found: Mapping[str, int], full: Mapping[str, int], partial: bool, where: str
) -> tuple[str, str]:
    """Return the name under which these files may be reported, and an addition to their version.

    Args:
        name: name of the release.
        found: split -> number of examples in the files.
        full: split -> number of examples in the release.
        partial: whether the user accepts a subset.
        where: the folder, for the message.

    Returns:
        The name, with ``-partial`` appended for a subset, and the text to append to the version.

    Raises:
        UserError: the numbers differ from those of the release, and ``partial`` is False.
    """
    if dict(found) == dict(full):
        return name, ""
    counts = ", ".join(f"{found[split]} of {count} {split}" for split, count in full.items())
    if not partial:
        raise UserError(
            f"{where} is not the whole of {name}: it holds {counts} examples; complete the files,"
            f" or give partial: true to use them under the name {name}-partial"
        )
    return f"{name}-partial", f", partial: {counts}"


def check_content(loaded: Loaded, sha256: str | None, where: str) -> Loaded:
    """Check the content against a pinned checksum, and return it.

    Raises:
        UserError: the content has another checksum.
    """
    found = loaded.description.sha256
    if sha256 is not None and found != sha256.lower():
        raise UserError(
            f"{where} has other content than the configuration pins: its sha256 is {found}, the"
            f" pinned one {sha256.lower()}; restore the files, or leave sha256 out"
        )
    return loaded
