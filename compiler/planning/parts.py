"""What planning knows of a graph, whatever it is divided into: units, and what each may keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from ..costs.hardware import Device
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..units.menus import options_of
from ..units.pricing import UnitPrices, repriced
from ..units.stash import Body, Stash, bodies_of
from ..units.units import Unit, units_of
from .formulation import Grounds


@dataclass(frozen=True)
class Parts:
    """Of one graph and device.

    Attributes:
        places: the unit of every staged node.
        menus: per unit, its ways to run.
        grounds: of the problems that are made of them.
    """

    units: Sequence[Unit]
    bodies: Sequence[Body]
    places: dict[fx.Node, int]
    menus: Sequence[Sequence[Stash]]
    grounds: Grounds
    _by_kind: dict[object, list[UnitPrices]] = field(default_factory=dict)

    def by_kind(self, device: Device) -> dict[str, list[UnitPrices]]:
        """Prices on each kind of device that ranks have, whatever their order."""
        found: dict[str, list[UnitPrices]] = {}
        for each in sorted(set(device.order)):
            own = device.at(device.order.index(each))
            known = each, own.table is None
            if known not in self._by_kind:
                self._by_kind[known] = repriced(self.bodies, self.menus, own)
            found[each] = self._by_kind[known]
        return found

    @staticmethod
    def of(
        graph: JointGraph,
        locality: Locality,
        device: Device,
        remat: str,
        pinned: Mapping[fx.Node, int],
        fuses: bool = False,
    ) -> Parts:
        """Args:
        remat: the option.
        fuses: whether the backend compiles runs of operators.
        pinned: forward nodes whose stage is given; units end where these begin and end.
        """
        units = units_of(graph, locality, device, pinned)
        bodies, places = bodies_of(graph, locality, units)
        menus = options_of(bodies, places, device, remat, fuses)
        return Parts(units, bodies, places, menus, Grounds(graph, bodies, places, menus))
