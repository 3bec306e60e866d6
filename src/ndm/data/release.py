"""Published data sets by their releases: a subset is never reported as the data set, and a checksum
can pin the content.

A release has a name, and a known number of examples of each split. Where the files hold another
number, the source refuses them unless it was told ``partial``, and then its name says so. Nobody
publishes checksums of the content itself; the one that the library computes and records
(:class:`ndm.data.DataDescription`) can be given back as ``sha256``, and other content is refused
from then on.
"""

from collections.abc import Mapping

from ndm.data.source import Loaded
from ndm.errors import UserError, describe_value


def check_sha256_argument(sha256: str | None) -> None:
    """Check that a pinned checksum is one.

    Raises:
        UserError: it is neither None nor 64 hexadecimal digits.
    """
    if sha256 is not None and not (
        isinstance(sha256, str)
        and len(sha256) == 64
        and set(sha256.lower()) <= set("0123456789abcdef")
    ):
        raise UserError(
            f"sha256={describe_value(sha256)}: give the 64 hexadecimal digits that data.json of a"
            " run records, or null"
        )


def release_words(
    name: str, found: Mapping[str, int], full: Mapping[str, int], partial: bool, where: str
) -> tuple[str, str]:
    """The name under which these files may be reported, and what to add to their version.

    Args:
        name: of the release.
        found: split -> number of examples in the files.
        full: split -> number of examples of the release.
        partial: whether the user knows that this is a part.
        where: the folder, for the message.

    Returns:
        The name, with ``-partial`` at its end where it is one, and words for the version.

    Raises:
        UserError: the numbers are not those of the release, and the user did not say ``partial``.
    """
    if dict(found) == dict(full):
        return name, ""
    counts = ", ".join(f"{found[split]} of {count} {split}" for split, count in full.items())
    if not partial:
        raise UserError(
            f"{where} is not the whole of {name}: it holds {counts} examples; complete the files,"
            f" or say partial: true to use them under the name {name}-partial"
        )
    return f"{name}-partial", f", partial: {counts}"


def check_content(loaded: Loaded, sha256: str | None, where: str) -> Loaded:
    """Check the content against the checksum that the configuration pins, and hand it back.

    Raises:
        UserError: it is other content.
    """
    found = loaded.description.sha256
    if sha256 is not None and found != sha256.lower():
        raise UserError(
            f"{where} holds other content than the configuration pins: sha256 {found} here,"
            f" {sha256.lower()} there; restore the files, or leave sha256 out"
        )
    return loaded
