"""The accelerators that the paper compares, as data: array, tiles, components and buffers (paper, Table III).

Areas and powers are those that the authors synthesised and their simulator ships
(params/published/hardware/simulator/*_rtl.csv, buffer_model_spec.csv; tests hold the two equal).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CLOCK_HZ = 500_000_000
WORD_BYTES = 2  # FP16
DRAM_MJ_PER_BYTE = 99.98e-9
# The size of tiles, vectors and scatter that buffers and their power are published for.
PUBLISHED_M_TILE, PUBLISHED_VECTOR, PUBLISHED_SCATTERS = 1024, 32, 2
_MULTIPLIERS = 1024  # of the Focus array, whichever way it is cut


@dataclass(frozen=True)
class Array:
    """A weight-stationary systolic array.

    rows: inputs K it holds at once. columns: outputs N.
    """

    rows: int = 32
    columns: int = 32

    def tile_cycles(self, tile_rows: float) -> float:
        """Cycles of one tile of `tile_rows` rows: fill, stream and drain."""
        return tile_rows + 2 * self.rows + self.columns - 3


@dataclass(frozen=True)
class Component:
    """`count` instances of one synthesised block; area in mm² and power in mW of a single one."""

    name: str
    area_mm2: float
    power_mw: float
    count: int = 1


@dataclass(frozen=True)
class Macro:
    """One SRAM macro of the published compiler tables: area in mm², currents in µA (a MHz, or leakage), volts."""

    area_mm2: float
    read: float
    write: float
    leakage: float
    voltage: float = 0.81

    @property
    def power_mw(self) -> float:
        """Peak power: leakage, and a read or a write in every cycle."""
        return (self.leakage + (self.read + self.write) / 2 * (CLOCK_HZ / 1e6)) * self.voltage / 1000


MACROS = {
    "1024x128": Macro(0.0276, 9.3, 10.1, 251),
    "2048x16": Macro(0.0093, 1.83, 1.88, 89),
    "1024x16": Macro(0.0051, 1.7, 1.7, 47.8),
    "512x128": Macro(0.016, 8.3, 7.6, 142),
    "32x256": Macro(0.0057, 4.9, 4.4, 256),
    "512x16": Macro(0.003, 1.5, 1.5, 27.6),
}


@dataclass(frozen=True)
class Buffer:
    """An on-chip buffer: how many of each macro it is made of."""

    name: str
    macros: tuple[tuple[str, int], ...]

    @property
    def area_mm2(self) -> float:
        return sum(MACROS[name].area_mm2 * count for name, count in self.macros)

    @property
    def power_mw(self) -> float:
        """Peak power of all its macros."""
        return sum(MACROS[name].power_mw * count for name, count in self.macros)


@dataclass(frozen=True)
class Accelerator:
    """One accelerator.

    m_tile, n_tile: rows and outputs of a product that its buffers hold, which decide how often DRAM is read
        (m_tile −1: all rows).
    vector_size: channels of a vector (Focus). scatters: vectors that it scatters a cycle (Focus).
    sec_only: prompt-guided pruning alone, the ablation of Focus.
    buffer_kib: the published capacity, whose macros are rounded up.
    buffers_known: whether the buffers' area and power are published for this size. Others need CACTI, which is not
        part of this: their buffer energy and area are left out (nan).
    """

    name: str
    array: Array
    m_tile: int
    n_tile: int
    components: tuple[Component, ...]
    buffers: tuple[Buffer, ...]
    buffer_kib: float
    vector_size: int = PUBLISHED_VECTOR
    scatters: int = PUBLISHED_SCATTERS
    sec_only: bool = False
    buffers_known: bool = True

    @property
    def core_mw(self) -> float:
        """Power of everything but the buffers, mW."""
        return sum(part.power_mw * part.count for part in self.components)

    @property
    def buffer_mw(self) -> float:
        """Peak power of the buffers, mW; nan where it is not published."""
        return sum(buffer.power_mw for buffer in self.buffers) if self.buffers_known else float("nan")

    @property
    def area_mm2(self) -> float:
        """Area of the chip in mm²; nan where the buffers' is not published."""
        core = sum(part.area_mm2 * part.count for part in self.components)
        return core + sum(buffer.area_mm2 for buffer in self.buffers) if self.buffers_known else float("nan")


_SFU = (
    Component("FP16 Exp (SFU)", 0.00107112, 0.41, 192),
    Component("FP16 Sqrt (SFU)", 0.00213733, 0.2713, 6),
    Component("FP16 Reciprocal (SFU)", 0.00026422, 0.1099, 6),
    Component("FP16 Mul (SFU)", 0.00046241, 0.3659, 192),
    Component("FP16 Add (SFU)", 7.90766e-05, 0.024184375, 192),
)
_ARRAY = Component("Systolic Array", 1.41112515, 324.3681)
_ACCUMULATOR = Component("Accumulator (SIC)", 0.00253045, 0.7739)

_FOCUS_COMPONENTS = (
    _ARRAY,
    Component("Cosine Similarity (SIC)", 0.01589691, 6.1991),
    Component("L2 Norm (SIC)", 0.00347558, 0.5827),
    Component("Max Unit (SIC)", 5.63929e-05, 0.0198),
    Component("Average Update (SIC)", 0.00123139, 1.3418),
    replace(_ACCUMULATOR, count=PUBLISHED_SCATTERS),
    Component("Max Unit (SEC)", 5.63929e-05, 0.0198, 32),
    Component("Importance Vector Buffer (SEC)", 0.0588, 5.570046),
    *_SFU,
)
_FOCUS_BUFFERS = (
    Buffer("input", (("1024x128", 8),)),
    Buffer("wgt", (("2048x16", 3), ("1024x16", 2))),
    Buffer("concentrate_out", (("1024x128", 8),)),
    Buffer("output", (("1024x128", 16), ("512x128", 16))),
    Buffer("layouter", (("32x256", 16),)),
    Buffer("similarity_map", (("1024x16", 1),)),
    Buffer("similarity_table", (("1024x128", 4),)),
)

DENSE = Accelerator("dense", Array(), 1024, 96, (_ARRAY, *_SFU), _FOCUS_BUFFERS, 734)
ADAPTIV = Accelerator(
    "adaptiv",
    Array(rows=64, columns=16),  # rows: of M here, its array is not weight-stationary
    256,
    256,
    (Component("MAC Array", 1.43837517, 670.4133), Component("AdapTME", 0.077933782, 29.14840435), *_SFU),
    (Buffer("buffers", (("512x128", 96),)),),
    768,
)
CMC = Accelerator(
    "cmc",
    Array(),
    768,
    64,
    (
        _ARRAY,
        Component("Codec PE", 0.00800162, 5.062, 16),
        Component("Codec Adder Tree", 0.00010281, 0.1013, 4),
        *_SFU,
    ),
    (
        Buffer("input", (("1024x128", 12),)),
        Buffer("weights", (("1024x128", 12),)),
        Buffer("qs", (("1024x128", 10),)),
        Buffer("frame", (("1024x128", 20),)),
        Buffer("output", (("512x16", 25),)),
        Buffer("kv", (("512x16", 50),)),
    ),
    907,
)
FOCUS = Accelerator("focus", Array(), PUBLISHED_M_TILE, 96, _FOCUS_COMPONENTS, _FOCUS_BUFFERS, 734)
# Its buffers are of half the tile, sized with CACTI.
SEC_ONLY = replace(FOCUS, name="focus_sec_only", m_tile=512, sec_only=True, buffers_known=False)

ACCELERATORS = {design.name: design for design in (DENSE, ADAPTIV, CMC, FOCUS, SEC_ONLY)}


def focus_design(
    m_tile: int | None = None,
    vector_size: int | None = None,
    scatters: int | None = None,
    *,
    sec_only: bool = False,
) -> Accelerator:
    """Focus at another point of its design space (paper, Figure 10); None: as published.

    Vectors shorter than the array's 32 rows get an array of that many rows and as many more columns (8: 8 × 128).
    Every scatter has an accumulator. Buffers are published for one size only; at others their energy and area are nan.
    """
    base = SEC_ONLY if sec_only else FOCUS
    m_tile = base.m_tile if m_tile is None else m_tile
    vector_size = vector_size or PUBLISHED_VECTOR
    scatters = scatters or PUBLISHED_SCATTERS
    rows = min(PUBLISHED_VECTOR, vector_size)
    return replace(
        base,
        array=Array(rows, _MULTIPLIERS // rows),
        m_tile=m_tile,
        vector_size=vector_size,
        scatters=scatters,
        components=tuple(
            replace(part, count=scatters) if part.name == _ACCUMULATOR.name else part for part in base.components
        ),
        buffers_known=base.buffers_known
        and (m_tile, vector_size, scatters) == (PUBLISHED_M_TILE, PUBLISHED_VECTOR, PUBLISHED_SCATTERS),
    )
