"""Merges for vocabularies that only rank their tokens (SentencePiece BPE scores, tiktoken ranks).

Knows token strings and ranks. Does not know files.

Both encoders join, again and again, the neighbours whose union ranks best, leftmost first. The library joins by a
list of pairs. Every way to cut a token into two tokens is therefore one pair, and pairs are listed by the rank of
their union; cuts of one token are listed by their left part, longest first, because leftmost-first joining leaves
the short remainder on the right.
"""

from collections.abc import Collection, Mapping

from inhouse.core.errors import FormatError
from inhouse.model.tokens.checks import MAX_TOKEN


def merges_of_ranks(ranked: Mapping[str, float], parts: Collection[str]) -> list[tuple[str, str]]:
    """All pairs of `parts` that join to a token of `ranked`, best rank (lowest) first.

    Args:
        ranked: token to rank; the lowest is joined first.
        parts: tokens that may be joined.
    """
    pairs: list[tuple[float, int, str, str]] = []
    for order, (token, rank) in enumerate(ranked.items()):
        if len(token) > MAX_TOKEN:
            raise FormatError(f"token {token[:40]!r}... has {len(token)} characters, the limit is {MAX_TOKEN}")
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in parts and right in parts:
                pairs.append((rank, order, left, right))
    pairs.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in pairs]
