"""From what a program costs to what it will be like: the time of a step, what bounds it, what to change.

The bound lets products, memory and network run beside each other at their peaks, so a step takes the longest of them
and in truth more. Of memory it counts what has to be moved, whatever the schedule: everything that is there before a
step once in, everything that is left once out. The serial time lets nothing run beside anything else, with all memory
traffic that the program's text shows, which is more than there is; a step lies between the two. Advice follows from
the numbers alone; who asks decides.
"""

from __future__ import annotations

import dataclasses
import math

from recjax.launch.chips import GIB, Chip
from recjax.launch.cost import Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device: `arguments` (parameters, optimiser, batch, facts), `temporaries`, and `code`.

    `state` is the part of the arguments that is carried from step to step. Results are written over it. Where the
    compiler gave up, `needed` is what it said it would take, and `room` what it said there is.
    """

    state: int
    arguments: int
    results: int = 0
    temporaries: int = 0
    code: int = 0
    needed: float = 0.0
    room: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for all of it."""
        return not self.needed

    @property
    def total(self) -> float:
        """All of it."""
        return self.needed or self.arguments + self.results + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step that each part of a device takes by itself, at its peak.

    `memory` is what has to be moved at the least, `traffic` what the program's text shows.
    """

    products: float
    memory: float
    links: float
    network: float
    traffic: float = 0.0

    @property
    def bound(self) -> float:
        """The least a step can take."""
        return max(self._bounds.values())

    @property
    def bounded_by(self) -> str:
        """Which part that is."""
        return max(self._bounds.items(), key=lambda item: item[1])[0]

    @property
    def serial(self) -> float:
        """What a step takes where nothing runs beside anything else."""
        return self.products + max(self.memory, self.traffic) + self.links + self.network

    @property
    def _bounds(self) -> dict[str, float]:
        return {name: seconds for name, seconds in dataclasses.asdict(self).items() if name != "traffic"}


def times(cost: Cost, chip: Chip, moved: float) -> Times:
    """The cost at the peaks of the chip; `moved` are bytes of memory that any program would have to move."""
    return Times(
        products=cost.flops / chip.peak,
        memory=moved / chip.memory_rate,
        traffic=cost.memory / chip.memory_rate,
        links=cost.sent_within() / chip.link_rate,
        network=cost.sent_between() / chip.network_rate,
    )


def mfu_bound(model_flops: float, found: Times, chip: Chip) -> float:
    """The most of the peak that the model's own arithmetic (per device) can make use of."""
    return model_flops / (found.bound * chip.peak) if found.bound else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a recipe advice is about: its preset, mesh, micro-batches, rows of a device in one of them, remat.

    `table` is the number of rows of the model's table, `slots` that of all places in a micro-batch.
    """

    preset: str
    mesh: str
    accumulate: int
    rows: int
    remats: bool | None  # None: the model has no such choice
    devices: int
    table: int = 0
    slots: int = 0


def advice(memory: Memory, chip: Chip, setting: Setting) -> list[str]:
    """What would make a program fit that does not, the least intrusive first; nothing for one that fits."""
    if memory.fits:
        return []
    room = memory.room or chip.memory
    found = []
    temporaries = max(memory.total - memory.arguments, 0)
    if memory.arguments > room:
        parts = math.ceil(memory.arguments / room)
        if setting.preset == "data" and setting.devices > 1:
            found.append(
                f"SHARDING = 'fsdp': parameters and optimiser take {_gib(memory.state)} on every device, some "
                f"{_gib(memory.state / setting.devices)} when split over {setting.devices}"
            )
        else:
            found.append(f"at least {parts} times as many chips: {_gib(memory.arguments)} are there between steps")
        found.append("Recipe.adapters with a frozen, quantised base: no optimiser state and a byte or less a weight")
        return found
    left = room - memory.arguments
    if setting.remats is False:
        found.append(
            f"TransformerConfig.remat = 'full': {_gib(temporaries)} are made during a step, and most of it only to be "
            "read again in the backward pass"
        )
    if setting.preset == "fsdp" and setting.slots > 2 * setting.table > 0:
        found.append(
            f"SHARDING = 'fsdp_text': {setting.slots:,} hidden vectors are brought to every device to meet "
            f"{setting.table:,} rows of the table; split by columns, the rows are brought to them"
        )
    parts = next((n for n in _divisors(setting.rows) if n > 1 and temporaries / n < 0.9 * left), None)
    if parts is not None:
        found.append(
            f"Recipe.accumulate = {setting.accumulate * parts}: {_gib(temporaries)} made during a step, "
            f"{_gib(left)} left for it, {setting.rows} rows on a device at a time"
        )
    elif setting.rows > 1:
        found.append(f"Recipe.accumulate = {setting.accumulate * setting.rows}, one row on a device at a time")
    if parts is None:
        found.append(
            "shorter rows (Feed.row_length), more chips, or rows split over chips too (SHARDING = 'fsdp_model' and "
            f"a model axis beside MESH = {setting.mesh!r})"
        )
    return found


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
