"""Single weights of a Linear layer removed anywhere, most of them: values with column deltas."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from liveweight.formats import delta_layout, pattern
from liveweight.formats.delta_layout import BITS, CLASSES, HEAD, LANES, MOST_PART, Layout

_OWNER = "Delta"


@dataclasses.dataclass(frozen=True, eq=False)
class Delta(pattern.PackedWeight):
    """A sparse matrix W of shape (N, K) as streams of values with bit-packed column deltas.

    For kernels that read a weight once for few samples, where more than about three quarters of it
    are removed. Every row is cut into `lanes` streams of equal length, and 32 streams side by side
    are a slice, what the threads of a warp read. Rows stand by falling length, so that those of a
    slice are alike. An entry's column is its stream's start plus all deltas up to its own, times
    `classes`; a gap that a delta cannot say is bridged by fillers. Fillers, and what fills the end
    of a stream, have the value -0.0; a kept -0.0 is stored as 0.0.

    values    [G * 256] floating point: G groups of 32 lanes x 8 entries
    deltas    [D * 32] int32: D rows of 32 words, one of each lane. Entry i of a stream has bits
              i * bits and on of the lane's words, lowest first; a slice begins a new row
    starts    [S, 32] int16: column of a stream's first entry, within its part
    order     [S, 32 / lanes] int32: the rows of a slice, -1 where there is none
    offsets   [S + 1, 2] int32: first group and first row of words of each slice's tail
    shape     (N, K) = (out_features, in_features)
    layout    (bits, lanes, part, head, classes)
                bits     4, 5, 6 or 8, of a delta
                lanes    a power of two up to 32: streams of a row
                part     columns of a part, a multiple of 8 up to 32768. The S slices are those of
                         the first part of the columns, then those of the next; most weights have
                         one part
                head     0 or 4: so many first groups of all slices, and their words, stand before
                         the tails of all slices, where a kernel finds them without offsets
                classes  1, or 8: then 8 neighbouring lanes hold columns 0, 1, ... 7 modulo 8 and
                         hit different banks of shared memory when they gather 4 or 8 samples at
                         once; streams are less even, and filled up more

    At 90 % sparsity a 16-bit weight takes 2.8 bytes, the 16-bit value included.
    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "delta"

    values: Tensor
    deltas: Tensor
    starts: Tensor
    order: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    layout: tuple[int, int, int, int, int]

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        *,
        tokens: int = 1,
        bits: int | None = None,
        lanes: int | None = None,
        part: int | None = None,
        head: int | None = None,
    ) -> Delta:
        """Keep the entries of weight [N, K] that are not zero (-0.0 is zero), or those under mask.

        mask    [N, K] bool, says what is kept, zeros included
        tokens  how many samples the layer will mostly see; from 3 on, streams keep to one class of
                columns
        bits, lanes, part and head override what suits this shape and pattern. Packs on the device
        of weight. Raises TypeError (dtypes) and ValueError (shapes, sizes).
        """
        pattern.check_dense(_OWNER, weight, 2)
        if mask is None:
            mask = weight != 0
        pattern.check_mask(_OWNER, mask, (tuple(weight.shape),))
        layout = _first_layout(tuple(weight.shape), tokens, bits, lanes, part, head)
        row, column = mask.nonzero(as_tuple=True)
        kept = weight.detach()[row, column] + 0.0  # -0.0 becomes 0.0
        place, column = column // layout.part * layout.rows + row, column % layout.part
        classes = layout.classes
        place, column = place * classes + column % classes, column // classes
        if layout.parts * classes > 1:
            place, by_place = place.sort(stable=True)
            column, kept = column[by_place], kept[by_place]
        gaps = delta_layout.gaps_of(place, column)
        if bits is None:
            layout = dataclasses.replace(layout, bits=delta_layout.pick_bits(gaps))
        sequence = delta_layout.fill_gaps(place, column, gaps, layout)
        if lanes is None:
            lanes = delta_layout.pick_lanes(layout, sequence.place.numel())
            layout = dataclasses.replace(layout, lanes=lanes)
        if head is None:
            head = delta_layout.pick_head(sequence.lengths, layout)
            layout = dataclasses.replace(layout, head=head)
        return cls._pack(kept, sequence, layout)

    @classmethod
    def _pack(cls, kept: Tensor, sequence: delta_layout.Sequence, layout: Layout) -> Delta:
        slices = delta_layout.arrange(sequence.lengths, layout)
        where = delta_layout.streams(sequence, slices, layout)
        values = kept.new_full((int(slices.offsets[-1, 0]) * LANES * 8,), -0.0)
        weights = sequence.source >= 0
        index = delta_layout.value_index(slices, where, layout)
        values[index[weights]] = kept[sequence.source[weights]]
        deltas, starts = delta_layout.pack_deltas(sequence, slices, where, layout)
        shape = (layout.rows, layout.columns)
        numbers = (layout.bits, layout.lanes, layout.part, layout.head, layout.classes)
        return cls(values, deltas, starts, slices.order, slices.offsets, shape, numbers)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return where in values, in which row and in which column each weight stands: int64."""
        return entries_of(
            self.values, self.deltas, self.starts, self.order, self.offsets, self.shape, self.layout
        )

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor."""
        index, row, column = self.entries()
        return self.values.new_zeros(self.shape).index_put((row, column), self.values[index])

    def mask(self) -> Tensor:
        """Return which entries are stored: bool [N, K]; fillers are none."""
        _, row, column = self.entries()
        kept = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        return kept.index_put((row, column), kept.new_ones(()))

    @property
    def density(self) -> float:
        """Fraction of entries kept, in [0, 1]; 0 where there are none."""
        total = self.shape[0] * self.shape[1]
        return int((~is_filler(self.values)).sum()) / total if total else 0.0

    def validate(self) -> Delta:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops check only sizes: a column outside W would read foreign memory there.
        """
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"{_OWNER}: shape must be (N, K), got {tuple(self.shape)}")
        check_layout(self.layout)
        self._check_tensors()
        self._check_order()
        layout = Layout(*self.shape, *self.layout)
        index = (self.deltas, self.starts, self.order, self.offsets)
        row, column = delta_layout.unpack(*index, layout)
        part = delta_layout.slice_groups(self.offsets, layout)[0] // max(layout.slices, 1)
        part = part.repeat_interleave(LANES * 8)
        limit = ((part + 1) * layout.part).clamp(max=max(self.shape[1], 1))
        outside = (column < part * layout.part) | (column >= limit)
        if bool(outside.any()):
            got = int(column[outside][0])
            raise ValueError(f"{_OWNER}: columns must lie in their part, got {got}")
        kept = ~is_filler(self.values)
        if bool((row[kept] < 0).any()):
            raise ValueError(f"{_OWNER}: a stream of no row must hold fillers alone")
        flat = row[kept] * max(self.shape[1], 1) + column[kept]
        if torch.unique(flat).numel() != flat.numel():
            raise ValueError(f"{_OWNER}: an entry of W must be stored once")
        return self

    def _check_tensors(self) -> None:
        """Raise unless all tensors have their dtypes, shapes and ranges, on one device."""
        layout = Layout(*self.shape, *self.layout)
        count = layout.slices * layout.parts
        wanted = {
            "deltas": (torch.int32, (-1,)),
            "starts": (torch.int16, (count, LANES)),
            "order": (torch.int32, (count, layout.rows_per_slice)),
            "offsets": (torch.int32, (count + 1, 2)),
        }
        for name, (dtype, size) in wanted.items():
            index = getattr(self, name)
            if index.dtype != dtype:
                raise TypeError(f"{_OWNER}: {name} must be {_word(dtype)}, got {_word(index)}")
            if index.dim() != len(size) or any(
                w not in (-1, g) for w, g in zip(size, index.shape, strict=True)
            ):
                raise ValueError(f"{_OWNER}: {name} must be {list(size)}, got {list(index.shape)}")
            if index.device != self.values.device:
                raise ValueError(f"{_OWNER}: {name} on {index.device}, values on {self.device}")
        offsets = self.offsets.long()
        first = [count * layout.head, count * layout.head_words]
        if offsets[0].tolist() != first or bool((offsets.diff(dim=0) < 0).any()):
            raise ValueError(f"{_OWNER}: offsets must rise from {first}")
        groups, words = offsets[-1].tolist()
        pattern.check_values(_OWNER, self.values, (groups * LANES * 8,), self.deltas)
        if self.deltas.numel() != words * LANES:
            raise ValueError(
                f"{_OWNER}: expected {words * LANES} deltas, got {self.deltas.numel()}"
            )
        sizes = offsets.diff(dim=0)
        if not torch.equal(sizes[:, 1], (sizes[:, 0] * layout.bits + 3) // 4):
            raise ValueError(f"{_OWNER}: offsets count other words than their groups need")

    def _check_order(self) -> None:
        """Raise unless every row stands once in every part."""
        layout = Layout(*self.shape, *self.layout)
        rows = self.order.reshape(layout.parts, -1).sort(dim=1).values
        wanted = torch.arange(self.shape[0], dtype=torch.int32, device=rows.device)
        spare = rows.shape[1] - self.shape[0]
        if bool((rows[:, :spare] != -1).any()) or bool((rows[:, spare:] != wanted).any()):
            raise ValueError(f"{_OWNER}: order must name every row once in every part")

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.starts, self.order, self.offsets, self.deltas


def _first_layout(
    shape: tuple[int, int],
    tokens: int,
    bits: int | None,
    lanes: int | None,
    part: int | None,
    head: int | None,
) -> Layout:
    """Return the layout as asked for, with the least where nothing is said yet."""
    classes = CLASSES if tokens > 2 else 1
    part = delta_layout.pick_part(shape[1]) if part is None else part
    bits, lanes = BITS[0] if bits is None else bits, classes if lanes is None else lanes
    return Layout(*shape, *check_layout((bits, lanes, part, head or 0, classes)))


def entries_of(
    values: Tensor,
    deltas: Tensor,
    starts: Tensor,
    order: Tensor,
    offsets: Tensor,
    shape: tuple[int, int],
    layout: tuple[int, int, int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where in values, in which row and in which column each weight stands: int64."""
    row, column = delta_layout.unpack(deltas, starts, order, offsets, Layout(*shape, *layout))
    index = (~is_filler(values)).nonzero()[:, 0]
    return index, row[index], column[index]


def is_filler(values: Tensor) -> Tensor:
    """Return whether each value marks a filler: bool like values."""
    return (values == 0) & torch.signbit(values)


def check_layout(layout: tuple[int, ...]) -> tuple[int, int, int, int, int]:
    """Return layout if it is (bits, lanes, part, head, classes) as kernels know them.

    Raises ValueError if it is not.
    """
    if len(layout) != 5 or not all(isinstance(v, int) for v in layout):
        names = "(bits, lanes, part, head, classes)"
        raise ValueError(f"{_OWNER}: layout must be {names}, got {layout!r}")
    bits, lanes, part, head, classes = layout
    if classes not in (1, CLASSES):
        raise ValueError(f"{_OWNER}: classes must be 1 or {CLASSES}, got {classes}")
    if head not in (0, HEAD):
        raise ValueError(f"{_OWNER}: head must be 0 or {HEAD}, got {head}")
    if bits not in BITS:
        raise ValueError(f"{_OWNER}: bits must be one of {BITS}, got {bits}")
    if lanes not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"{_OWNER}: lanes must be a power of two up to {LANES}, got {lanes}")
    if lanes % classes:
        raise ValueError(f"{_OWNER}: {classes} classes need as many lanes or more, got {lanes}")
    if part % 8 or not 8 <= part <= MOST_PART:
        raise ValueError(
            f"{_OWNER}: part must be a multiple of 8 from 8 to {MOST_PART}, got {part}"
        )
    return tuple(layout)


def _word(kind: Tensor | torch.dtype) -> str:
    return str(kind.dtype if isinstance(kind, Tensor) else kind).removeprefix("torch.")
