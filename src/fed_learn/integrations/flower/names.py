"""Which node of Flower's is which contributor."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fed_learn.aggregation.told import Told
from fed_learn.contribution import check_contributor
from fed_learn.errors import UnknownContributorError, brief, described
from fed_learn.integrations.flower.replies import node_name, of_partition

LISTED = 10
"""Names in one line of the log."""

NodeNames: TypeAlias = Mapping[Any, str] | Callable[[Any], str | None]
"""The user's registry: the number of a node (Flower's client id, in its older interface) → its contributor's name."""


class Names:
    """The names of the nodes of one job.

    What the user's registry says counts. Of a node of which it says nothing the name is the one that it claims, and
    belongs to the first that contributes under it: as long as that node is connected, or takes part, another that
    claims it is refused. Only a name whose node is gone goes over to another, such as a node that was started anew,
    which has another number; if the first comes back, the name is its own again.

    Several nodes may hold one partition, and users may give several the same name. Then each contributes for itself, as
    `<name>@node-<id>`.

    Args:
        told: Says things once in the job.
        takes_part: Tells whether a node is asked, or has answered, in this round.
        registry: The user's, if there is one.

    Raises:
        UnknownContributorError: The registry holds what cannot be a name.
        TypeError: It is neither a mapping nor a function.

    Attributes:
        connected: Tells which nodes are connected to the stack; None: nobody knows, so that none is taken to be gone.
    """

    def __init__(self, told: Told, takes_part: Callable[[Hashable], bool], registry: NodeNames | None = None) -> None:
        check_node_names(registry)
        self._told = told
        self._takes_part = takes_part
        self._registry = registry
        self._reserved = set(map(check_contributor, registry.values() if isinstance(registry, Mapping) else ()))
        self.connected: Callable[[], Iterable[Hashable]] | None = None
        self._names: dict[Hashable, str] = {}
        self._holders: dict[str, list[Hashable]] = {}
        self._shared: set[str] = set()
        self._new: set[Hashable] = set()
        self._present: set[Hashable] = set()
        self._there: frozenset[Hashable] | None = None

    def called(self, node: Hashable) -> str:
        """What a node is called, as far as is known."""
        try:
            registered = None if self._registry is None else self._registered(node)
        except UnknownContributorError:  # told where the node contributes
            return node_name(node)
        if registered is not None:
            return registered
        name = self._names.get(node)
        return node_name(node) if name is None or self._owner(name, node) is not None else name

    def begin_round(self, *, forget: bool) -> None:
        """Another round begins.

        Args:
            forget: Nothing says that its nodes are those of the rounds before.
        """
        self._new, self._present, self._there = set(), set(), None
        if forget:
            self._names, self._holders = {}, {}

    def expect(self, claims: Iterable[tuple[Hashable, str | None]]) -> None:
        """Notes which names several nodes have, where all replies of a round are at hand: none has the bare name.

        So it does not depend on who answered first who is called what, and with it the order of sums.
        """
        claimants: dict[str, set[Hashable]] = {}
        for node, claim in claims:
            self._present.add(node)
            if claim is not None:
                claimants.setdefault(claim, set()).add(node)
        for claim, nodes in claimants.items():
            owned = claim in self._reserved or self._owner(claim, None) is not None
            if len(nodes) > 1 and (of_partition(claim) or not owned):
                self._share(claim)

    def name(self, node: Hashable, claim: str | None) -> str:
        """The name of a node, which is its own from now on.

        Args:
            node: The node.
            claim: What it claims to be called; None: nothing.

        Raises:
            UnknownContributorError: It claims another name than before, that of another node, or another than the
                user's registry says.
        """
        own, known = node_name(node), self._names.get(node)
        registered = None if self._registry is None else self._registered(node)
        if registered is not None:
            if claim not in (None, registered) and not of_partition(claim or ""):
                raise UnknownContributorError(
                    f"{registered}: {own} claims to be {brief(claim)}, and node_names says that it is {registered!r}",
                    contributor=registered,
                )
            return self._give(node, registered)
        if claim is None:
            return self._give(node, self.called(node))
        shared = f"{claim}@{own}"
        if known not in (None, own) and (of_partition(claim) or known == shared):
            name = self.called(node)  # whatever an app counts as its partition from message to message
            return self._give(node, name if name != own else shared)
        name = shared if claim in self._shared and known != claim else claim
        if known not in (None, own, name):
            raise UnknownContributorError(
                f"{known}: {own} has contributed under this name, and now claims to be {brief(claim)}",
                contributor=self.called(node),
            )
        owner = self._owner(name, node)
        if owner is None and name not in self._reserved:
            others = [other for other in self._holders.get(name, ()) if other != node]
            if others and known != name:
                self._told.once(
                    ("gone", name, node),
                    f"{own} is called {name!r} from now on: {node_name(others[0])}, which was, is no longer connected",
                )
            return self._give(node, name)
        if of_partition(name):
            return self._give(node, shared)
        if owner in self._new and name not in self._reserved:
            self._tell(name)
            return self._give(node, shared)
        whose = "another node by node_names" if owner is None else node_name(owner)
        raise UnknownContributorError(f"{own}: claims to be {brief(name)}, which is {whose}", contributor=own)

    def _give(self, node: Hashable, name: str) -> str:
        before = self._names.get(node)
        if before != name:
            if before in (None, node_name(node)):
                self._new.add(node)
            self._names[node] = name
            self._holders.setdefault(name, []).append(node)
            if before is not None:
                self._holders[before].remove(node)
        return name

    def _registered(self, node: Hashable) -> str | None:
        """The name that the user's registry gives a node, whose number may stand there as text; None: it gives none.

        Raises:
            UnknownContributorError: It cannot be a name, or the registry raised.
        """
        if self._registry is None:
            return None
        if isinstance(self._registry, Mapping):
            name = self._registry.get(node, self._registry.get(str(node)))
        else:
            try:
                name = self._registry(node)
            except Exception as error:
                own = node_name(node)
                raise UnknownContributorError(
                    f"{own}: node_names raised {described(error)}", contributor=own
                ) from error
        if name is not None:
            self._reserved.add(check_contributor(name))
        return name

    def _owner(self, name: str, node: Hashable | None) -> Hashable | None:
        """Another node whose name this is; None: there is none, or it is gone."""
        for holder in self._holders.get(name, ()):
            if holder == node:
                return None
            if not self._gone(holder):
                return holder
        return None

    def _gone(self, node: Hashable) -> bool:
        """Whether the stack says that a node is no longer there. That it is not asked in a round says nothing."""
        if node in self._present or self._takes_part(node) or self.connected is None:
            return False
        if self._there is None:
            try:
                self._there = frozenset(self.connected())
            except Exception as error:  # noqa: BLE001 - of a connection, say; then no name is taken from anybody
                self._told.once("connected", f"it is not known which nodes are connected: {described(error)}")
                return False
        return node not in self._there

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


def check_node_names(registry: NodeNames | None) -> None:
    """Checks the user's registry.

    Raises:
        UnknownContributorError: It holds what cannot be a name.
        TypeError: It is neither a mapping nor a function.
    """
    if registry is not None and not isinstance(registry, Mapping) and not callable(registry):
        raise TypeError(f"node_names must map nodes to names, or be a function of a node, not {brief(registry)}")
    for name in registry.values() if isinstance(registry, Mapping) else ():
        check_contributor(name)


def in_one_line(names: Sequence[str]) -> str:
    """Names for one line of the log.

    Example:
        >>> in_one_line([f"node-{k}" for k in range(2, 15)])
        'node-2, node-3, node-4, node-5, node-6, node-7, node-8, node-9, node-10, node-11 and 3 more'
    """
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
