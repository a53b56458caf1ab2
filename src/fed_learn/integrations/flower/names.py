"""Which node of Flower's is which contributor."""

from collections.abc import Callable, Hashable, Iterable, Sequence

from fed_learn.aggregation.round import Told
from fed_learn.errors import UnknownContributorError
from fed_learn.integrations.flower.replies import node_name, of_partition

LISTED = 10
"""Names in one line of the log."""


class Names:
    """The names of the nodes of one job.

    Several nodes may hold one partition, and users may give several the same name. Then each contributes for itself, as
    `<name>@node-<id>`. A name under which a node has contributed in an earlier round is that node's as long as it takes
    part: another that claims it is refused.

    Args:
        told: Says things once in the job.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self._names: dict[Hashable, str] = {}
        self._shared: set[str] = set()
        self._new: set[Hashable] = set()
        self._present: set[Hashable] = set()

    def called(self, node: Hashable) -> str:
        """What a node is called, as far as is known."""
        return self._names.get(node, node_name(node))

    def begin_round(self, *, forget: bool) -> None:
        """Another round begins.

        Args:
            forget: Nothing says that its nodes are those of the rounds before.
        """
        self._new, self._present = set(), set()
        if forget:
            self._names = {}

    def expect(self, claims: Iterable[tuple[Hashable, str | None]]) -> None:
        """Notes which names several nodes have, where all replies of a round are at hand: none has the bare name.

        So it does not depend on who answered first who is called what, and with it the order of sums.
        """
        holders: dict[str, set[Hashable]] = {}
        for node, claim in claims:
            self._present.add(node)
            if claim is not None:
                holders.setdefault(claim, set()).add(node)
        for claim, nodes in holders.items():
            taken = not of_partition(claim) and any(self._names.get(node) == claim for node in nodes)
            if len(nodes) > 1 and not taken:
                self._share(claim)

    def name(self, node: Hashable, claim: str | None, takes_part: Callable[[Hashable], bool]) -> str:
        """The name of a node, which is its own from now on.

        Args:
            node: The node.
            claim: What it claims to be called; None: nothing.
            takes_part: Tells whether another node takes part in this round.

        Raises:
            UnknownContributorError: It claims another name than before, or that of another node that takes part.
        """
        own = node_name(node)
        known = self._names.get(node)
        name = claim or known or own
        shared = f"{name}@{own}"
        if known not in (None, own) and (of_partition(name) or known == shared):
            name = known  # whatever an app counts as its partition from message to message
        elif name in self._shared:
            name = shared
        if known not in (None, own, name):
            raise UnknownContributorError(
                f"{known}: {own} has contributed under this name, and now claims to be {name!r}", contributor=known
            )
        other = next((other for other, taken in self._names.items() if taken == name and other != node), None)
        if other is not None:
            if other not in self._present and not takes_part(other):
                del self._names[other]  # a node that was started anew has another id
            elif of_partition(name):
                name = shared
            elif other in self._new:
                self._tell(name)
                name = shared
            else:
                raise UnknownContributorError(
                    f"{own}: claims to be {name!r}, which is {node_name(other)}", contributor=own
                )
        if node not in self._names:
            self._new.add(node)
        self._names[node] = name
        return name

    def _share(self, claim: str) -> None:
        self._shared.add(claim)
        if not of_partition(claim):
            self._tell(claim)

    def _tell(self, claim: str) -> None:
        self._told.once(
            ("shared", claim),
            f"several nodes are called {claim!r}: each counts for itself, as '{claim}@{node_name('<id>')}', which is "
            "another name in every run; let ClientMod(name=...) give each node a name of its own",
        )


def in_one_line(names: Sequence[str]) -> str:
    """Names for one line of the log.

    Example:
        >>> in_one_line([f"node-{k}" for k in range(2, 15)])
        'node-2, node-3, node-4, node-5, node-6, node-7, node-8, node-9, node-10, node-11 and 3 more'
    """
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
